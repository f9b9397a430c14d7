import copy
import ctypes
import mmap
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from alphaq.errors import AlphaQError, CheckpointError
from alphaq.formats.blocks import encode
from alphaq.formats.table import format_of, parse_choice
from alphaq.nouns.choice import Choice
from alphaq.quantizers.base import DEFAULT, rounder_of
from alphaq.runtime import input_kernels, kernels, restored_kernels, tile_kernels
from alphaq.runtime import multiply as module
from alphaq.runtime.multiply import multiply, packed_linear
from alphaq.runtime.packed import PackedWeights
from alphaq.runtime.threads import parallel
from alphaq.simd.tiles import tiles_allowed

EVERY_CHOICE = [
    Choice(bits, group, symmetric) for bits in range(1, 9) for group in (32, 64, 128) for symmetric in (0, 1)
]
TRELLIS = format_of(parse_choice("t2")).choices()
EVERY_KIND = [*EVERY_CHOICE, *TRELLIS, torch.bfloat16, torch.float16]
SHAPES = [(64, 128), (65, 136), (7, 40), (130, 384), (3, 1000)]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def packed(
    shape: tuple[int, int], kinds: Sequence[Choice | torch.dtype], projections: int = 1, scale: float = 1.0
) -> PackedWeights:
    """Random matrices, an expert for each kind; every projection begins with another."""
    generator = torch.Generator().manual_seed(0)
    names = [[f"{projection}.{expert}" for expert in range(len(kinds))] for projection in range(projections)]
    tensors = []
    for projection in range(projections):
        row = []
        for kind in [*kinds[projection:], *kinds[:projection]]:
            weight = torch.randn(shape, generator=generator) * scale
            row.append(weight.to(kind) if isinstance(kind, torch.dtype) else encode(rounder_of(DEFAULT)(weight, kind)))
        tensors.append(row)
    weights = PackedWeights(names, shape)
    weights.fill(tensors)
    return weights


def expected(inputs: torch.Tensor, weights: PackedWeights, experts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """What `packed_linear` is to compute, in float64."""
    projections, count = len(weights.names), len(weights.names[0])
    matrices = {
        expert: torch.cat([weights.dequantized(projection, expert, torch.float64) for projection in range(projections)])
        for expert in set(experts.tolist())
        if 0 <= expert < count
    }
    nothing = torch.zeros(projections * weights.shape[0], inputs.shape[1], dtype=torch.float64)
    rows = [
        matrices.get(expert, nothing) @ inputs[token].double()
        for expert, token in zip(experts.tolist(), tokens.tolist(), strict=True)
    ]
    return torch.stack(rows)


def check(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Errors against the size of the results."""
    assert float((found.double() - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt()) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_dequantized_matrices(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weights = packed(shape, EVERY_KIND, projections=2)
    generator = torch.Generator().manual_seed(1)
    for count in (1, 6, 70):
        inputs = torch.randn(count, shape[1], generator=generator).to(dtype)
        experts = torch.cat([torch.arange(len(EVERY_KIND)), torch.full((37,), 3), torch.full((5,), 11)])
        tokens = torch.randint(0, count, (len(experts),), generator=generator)
        found = multiply(inputs, weights, experts, tokens)
        assert found.dtype == dtype
        wanted = expected(inputs, weights, experts, tokens)
        for expert in range(len(EVERY_KIND)):  # one kind's error must not hide behind another's size
            mine = experts == expert
            check(found[mine], wanted[mine], TOLERANCE[dtype])


def test_many_tokens_give_what_few_give(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [Choice(3, 32), Choice(8, 64, True), Choice(1, 128), torch.float16, TRELLIS[5]]
    weights = packed((300, 200), kinds)
    inputs = torch.randn(9, 200, generator=torch.Generator().manual_seed(2))
    experts, tokens = torch.arange(5).repeat_interleave(9), torch.arange(9).repeat(5)
    few = multiply(inputs, weights, experts, tokens)
    monkeypatch.setattr(module, "FEW_TOKENS", 0)
    monkeypatch.setattr(module, "RESTORED_BYTES", 100_000)  # of 800 bytes a row: several parts
    check(multiply(inputs, weights, experts, tokens), few.double(), 5e-6)


def test_rows_restored_in_the_cache_are_those_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "tiles_allowed", lambda: False)
    monkeypatch.setattr(module, "FAST_BRAINS", True)  # also where it would be slow, and is not chosen
    monkeypatch.setattr(module, "FEW_BRAINS", 4)
    shape = (70, restored_kernels.DEPTH + 224)
    weights = packed(shape, EVERY_KIND, projections=2)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(9, shape[1], generator=generator).bfloat16()
    experts = torch.arange(len(EVERY_KIND)).repeat_interleave(9)
    experts = torch.cat([experts[torch.randperm(len(experts), generator=generator)], torch.tensor([-1, 10**6])])
    tokens = torch.randint(0, 9, (len(experts),), generator=generator)
    found, wanted = multiply(inputs, weights, experts, tokens), expected(inputs, weights, experts, tokens)
    for expert in range(len(EVERY_KIND)):
        check(found[experts == expert], wanted[experts == expert], 4e-3)  # weights and results have 8 bits each
    assert not found[-2:].any()
    once = torch.full((5,), 3), torch.arange(5)
    many = multiply(inputs, weights, *once)
    monkeypatch.setattr(module, "FEW_BRAINS", 5)
    few = multiply(inputs, weights, *once)
    assert not torch.equal(many, few)  # each in its own way
    check(many, few.double(), 5e-3)
    monkeypatch.setattr(module, "MANY_BRAINS", 4)  # of this expert: the others have no tokens
    monkeypatch.setattr(module, "FEW_BRAINS", 4)
    asked = []
    monkeypatch.setattr(module, "_multiply_restored", lambda *given: asked.append(len(given[0])))
    multiply(inputs, weights, *once)
    assert asked == [5]


needs_tiles = pytest.mark.skipif(not tiles_allowed(), reason="needs a processor with AMX")


@needs_tiles
@pytest.mark.parametrize("shape", [(70, restored_kernels.TILES_DEPTH + 224), (7, 96), (130, 2048)], ids=str)
def test_tiles_give_the_products_of_every_kind(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts with few tokens, none, a block, two, more; in any order; some lie elsewhere."""
    weights = packed(shape, EVERY_KIND, projections=2)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(50, shape[1], generator=generator).bfloat16()
    counts = torch.tensor([(7, 16, 1, 17, 0, 32, 33)[kind % 7] for kind in range(len(EVERY_KIND))])
    experts = torch.cat([torch.arange(len(EVERY_KIND)).repeat_interleave(counts), torch.tensor([-1, 999])])
    experts = experts[torch.randperm(len(experts), generator=generator)]
    tokens = torch.randint(0, 50, (len(experts),), generator=generator)
    monkeypatch.setattr(module, "_multiply_restored", None)  # nothing is left to it
    found, wanted = multiply(inputs, weights, experts, tokens), expected(inputs, weights, experts, tokens)
    for expert in set(experts.tolist()):
        mine = experts == expert
        if 0 <= expert < len(EVERY_KIND):
            check(found[mine], wanted[mine], 5e-3)  # weights and results have 8 bits each
        else:
            assert not found[mine].any()


@needs_tiles
def test_tiles_of_more_rows_where_tokens_are_many_and_long() -> None:
    kinds = [Choice(2, 128), TRELLIS[4], torch.float16, Choice(5, 32)]
    weights = packed((1100, restored_kernels.TILES_DEPTH + 224), kinds)
    counts = torch.tensor([190, tile_kernels.MOST_TOKENS + 40, 33, 3])
    assert counts.max() * weights.shape[1] > kernels.MOST_TURNED
    assert len(kinds[:3]) * weights.shape[0] >= kernels.TASKS_A_THREAD * torch.get_num_threads() * kernels.MORE_ROWS
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(50, weights.shape[1], generator=generator).bfloat16()
    experts = torch.arange(len(kinds)).repeat_interleave(counts)
    experts = experts[torch.randperm(len(experts), generator=generator)]
    tokens = torch.randint(0, 50, (len(experts),), generator=generator)
    found, wanted = multiply(inputs, weights, experts, tokens), expected(inputs, weights, experts, tokens)
    for one, other in zip(found, wanted, strict=True):
        check(one, other, 6e-3)


@needs_tiles
def test_tiles_take_any_number_of_tokens() -> None:
    weights = packed((70, 160), [Choice(3, 32)])
    for count in (*range(1, 20), 31, 32, 33, 47, 48, 49, 64, 127, 128, 255, 600, 1024, 1025, 2100):
        inputs = torch.randn(count, 160, generator=torch.Generator().manual_seed(count)).bfloat16()
        experts, tokens = torch.zeros(count, dtype=torch.int64), torch.arange(count)
        found, wanted = multiply(inputs, weights, experts, tokens), expected(inputs, weights, experts, tokens)
        for one, other in zip(found, wanted, strict=True):  # none may hide behind another's size
            check(one, other, 6e-3)
        assert torch.equal(multiply(inputs, weights, experts, tokens), found)


@needs_tiles
@pytest.mark.parametrize("outliers", [1, 6, 20])
@pytest.mark.parametrize("size", [300.0, 3000.0])
def test_outliers_among_many_tokens_leave_their_neighbours_exact(size: float, outliers: int) -> None:
    """However many of 128 inputs are large, where they meet small weights: no step of theirs rounds the others."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(7))
    weight[:, 5 : 5 + outliers] *= 1e-4
    weights = PackedWeights([["one"]], (64, 256))
    weights.fill([[weight.bfloat16()]])  # few bits would have nothing so small beside the others
    inputs = torch.randn(40, 256, generator=torch.Generator().manual_seed(8)).bfloat16()
    inputs[:, 5 : 5 + outliers] = size
    zeros, tokens = torch.zeros(40, dtype=torch.int64), torch.arange(40)
    check(multiply(inputs, weights, zeros, tokens), expected(inputs, weights, zeros, tokens), 3e-3)


@needs_tiles
def test_tiles_do_not_depend_on_threads() -> None:
    weights = packed((512, 512), [Choice(2, 64), Choice(5, 128), TRELLIS[4]])
    inputs = torch.randn(40, 512, generator=torch.Generator().manual_seed(3)).bfloat16()
    experts, tokens = torch.arange(120) % 3, torch.arange(120) // 3
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results.append(multiply(inputs, weights, experts, tokens))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_threads_do_not_change_the_result() -> None:
    weights = packed((512, 512), [Choice(2, 64), Choice(5, 128), TRELLIS[4]])
    inputs = torch.randn(7, 512, generator=torch.Generator().manual_seed(3))
    experts, tokens = torch.arange(21) % 3, torch.arange(21) // 3
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results.append(multiply(inputs, weights, experts, tokens))
    torch.set_num_threads(threads)
    assert kernels.WORTH_THREADS <= 21 * 512 * 512
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_experts_that_lie_elsewhere_give_zeros_and_nothing_gives_nothing() -> None:
    weights = packed((64, 96), [Choice(4, 32), Choice(2, 32)])
    inputs = torch.randn(3, 96)
    found = multiply(inputs, weights, torch.tensor([2, 0, -1]), torch.arange(3))
    assert not found[[0, 2]].any() and found[1].any()
    assert multiply(inputs, weights, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)).shape == (
        0,
        64,
    )


def test_inputs_of_any_size_are_multiplied_as_exactly() -> None:
    weights = packed((64, 512), [Choice(4, 128)])
    inputs = torch.randn(6, 512, generator=torch.Generator().manual_seed(4))
    inputs *= torch.tensor([1e-25, 1e-3, 1.0, 1e3, 1e15, 0.0])[:, None]
    inputs[2, 77] = 3000.0  # an outlier as trained models have
    found, zeros = multiply(inputs, weights, torch.zeros(6, dtype=torch.int64), torch.arange(6)), torch.zeros(6).long()
    wanted = expected(inputs, weights, zeros, torch.arange(6))
    for row in range(5):
        check(found[row], wanted[row], 5e-6)
    assert not found[5].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(bad: float) -> None:
    weights = packed((64, 256), [Choice(4, 128)])
    inputs = torch.ones(2, 256)
    inputs[1, 5] = bad
    found = multiply(inputs, weights, torch.zeros(2, dtype=torch.int64), torch.arange(2))
    assert torch.isfinite(found[0]).all() and not torch.isfinite(found[1]).any()


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
@pytest.mark.parametrize("shape", [(1, 3), (7, 40), (65, 136), (64, 64), (18, 96), (2, 1000)], ids=str)
def test_nothing_beyond_a_block_is_read(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that ends where readable memory ends: reading on would be a segmentation fault."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in EVERY_KIND:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        tensor = weight.to(kind) if isinstance(kind, torch.dtype) else encode(rounder_of(DEFAULT)(weight, kind))
        pages = -(-tensor.nbytes // mmap.PAGESIZE)
        memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert libc.mprotect(ctypes.c_void_p(start + pages * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
        held = torch.frombuffer(memory, dtype=torch.uint8)[: pages * mmap.PAGESIZE][-tensor.nbytes :]
        held.copy_(tensor.reshape(-1).view(torch.uint8))
        weights = PackedWeights([["one"]], shape)
        weights.fill([[held.view(kind).view(shape) if isinstance(kind, torch.dtype) else held]])
        for few, dtype in ((32, torch.float32), (0, torch.float32), (0, torch.bfloat16)):
            monkeypatch.setattr(module, "FEW_TOKENS", few)
            monkeypatch.setattr(module, "FEW_BRAINS", few)
            monkeypatch.setattr(module, "FEW_TILES", few)
            inputs = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(6)).to(dtype)
            zeros, tokens = torch.zeros(5, dtype=torch.int64), torch.arange(5)
            found, wanted = multiply(inputs, weights, zeros, tokens), expected(inputs, weights, zeros, tokens)
            check(found, wanted, TOLERANCE[dtype])
        libc.mprotect(ctypes.c_void_p(start + pages * mmap.PAGESIZE), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)


def test_blocks_of_another_shape_are_refused_by_name() -> None:
    weights = PackedWeights([["layer.weight"]], (64, 64))
    with pytest.raises(CheckpointError, match=r"layer\.weight has shape \[64, 32\], .* \[64, 64\]"):
        weights.fill([[encode(rounder_of(DEFAULT)(torch.randn(64, 32), Choice(4, 32)))]])
    with pytest.raises(CheckpointError, match=r"layer\.weight has shape \[32, 64\]"):
        weights.fill([[torch.randn(32, 64).bfloat16()]])


def test_types_stay_when_a_model_is_cast() -> None:
    weights = packed((64, 64), [Choice(4, 32), torch.bfloat16])
    before = multiply(torch.ones(2, 64), weights, torch.arange(2), torch.arange(2))
    weights.to(torch.float16).double()
    assert torch.equal(multiply(torch.ones(2, 64), weights, torch.arange(2), torch.arange(2)), before)
    assert [weights.choice(0, 0), weights.choice(0, 1)] == [Choice(4, 32), Choice(16)]


@pytest.mark.slow
def test_operator_keeps_torch_s_rules() -> None:
    weights = packed((64, 96), [Choice(4, 32), Choice(2, 32)])
    arguments = (torch.randn(3, 96), weights.table, 64, torch.tensor([0, 1, 1]), torch.tensor([0, 2, 1]))
    torch.library.opcheck(packed_linear, arguments, test_utils=("test_schema", "test_faketensor"))


def test_training_is_refused() -> None:
    weights = packed((64, 96), [Choice(4, 32)])
    found = multiply(
        torch.randn(1, 96, requires_grad=True), weights, torch.zeros(1, dtype=torch.int64), torch.zeros(1).long()
    )
    with pytest.raises(AlphaQError, match="no gradients"):
        found.sum().backward()


def test_outliers_leave_their_neighbours_exact() -> None:
    """Trained models have a few inputs thousands of times larger than the rest, and small weights for them."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(7))
    weight[:, 17] *= 1e-3
    weights = PackedWeights([["one"]], (64, 256))
    weights.fill([[encode(rounder_of(DEFAULT)(weight, Choice(8, 32)))]])
    for dtype, bound in ((torch.bfloat16, 6e-3), (torch.float16, 1e-3), (torch.float32, 1e-4)):
        for size in (30.0, 300.0, 3000.0):
            inputs = torch.randn(1, 256, generator=torch.Generator().manual_seed(8)).to(dtype)
            inputs[0, 17] = size
            one = torch.zeros(1, dtype=torch.int64)
            check(multiply(inputs, weights, one, one), expected(inputs, weights, one, one), bound)


@pytest.mark.parametrize(("planes", "bound"), [(2, 2.0**-15), (3, 2.0**-23)])
def test_whole_numbers_are_within_half_a_step(planes: int, bound: float) -> None:
    values = torch.randn(1, 512, generator=torch.Generator().manual_seed(6)).numpy()
    digits = np.zeros((planes, 1, 512), np.int8)
    steps, sums = np.zeros((2, 3, 1, 16), np.float32)
    input_kernels.prepare(values, 512, planes, input_kernels.LIMITS[planes - 2], digits, steps, sums)
    whole = sum(digits[plane, 0].astype(np.float64) * 256.0 ** (planes - 1 - plane) for plane in range(planes))
    restored = whole * np.repeat(steps[0, 0].astype(np.float64), 32)
    largest = np.abs(values).reshape(-1, 128).max(1).repeat(128)
    assert (np.abs(restored - values[0]) <= bound * largest).all()
    assert np.allclose(sums[0, 0], restored.reshape(-1, 32).sum(1), rtol=1e-5, atol=1e-5)


def test_copies_and_pickles_know_where_they_lie() -> None:
    weights = packed((64, 96), [Choice(4, 32), Choice(2, 32), torch.float16])
    inputs, experts, tokens = torch.ones(1, 96), torch.arange(3), torch.zeros(3, dtype=torch.int64)
    before = multiply(inputs, weights, experts, tokens)
    copies = copy.deepcopy(weights), pickle.loads(pickle.dumps(weights))
    addresses = {int(one.table[0, 0, 0]) for one in (weights, *copies)}
    assert len(addresses) == 3
    del weights
    for one in copies:
        assert torch.equal(multiply(inputs, one, experts, tokens), before)


def test_scales_that_are_no_numbers_are_refused_by_name() -> None:
    block = encode(rounder_of(DEFAULT)(torch.randn(64, 64), Choice(4, 32)))
    block[-256:].view(torch.float16)[3] = float("nan")
    with pytest.raises(CheckpointError, match="one has scales that are not finite"):
        PackedWeights([["one"]], (64, 64)).fill([[block]])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere kernels run on one thread")
def test_torch_s_threads_are_found() -> None:
    assert parallel()[0] != 0 and parallel()[2] == torch.get_num_threads()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("features", "tests"),
    [
        ("+avx2,+fma,+f16c,+avx,+sse4.2", ("test_products", "test_nothing", "test_many", "test_rows")),
        ("+f16c,+avx,+sse4.2", ("test_nothing",)),
    ],
    ids=["avx2", "avx"],
)
def test_processors_without_avx512_give_the_same(features: str, tests: tuple[str, ...]) -> None:
    """The code for others, compiled here: the same file's tests under numba's own setting."""
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features}
    chosen = [f"{__file__}::{name}" for name in globals() if name.startswith(tests)]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *chosen], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-2000:]
