"""Tokens read from a recording are what the model's own class reads."""

import copy
import pickle
from collections.abc import Callable
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_transformers_plugin import distance, native
from test_transformers_plugin import load as loaded
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from alphaq.errors import AlphaQError
from alphaq.formats.blocks import encode
from alphaq.formats.table import parse_choice
from alphaq.nouns.choice import Choice
from alphaq.quantizers.base import DEFAULT, rounder_of
from alphaq.runtime import line_kernels, step_kernels
from alphaq.runtime import row_kernels as places
from alphaq.runtime.decoding import Stepwise, record_tokens
from alphaq.runtime.multiply import packed_linear
from alphaq.runtime.packed import PackedWeights
from alphaq.runtime.programs import room_of
from alphaq.runtime.recording import Recorder, memory_of
from alphaq.runtime.row_forms import append, take
from alphaq.runtime.rows import Rows
from alphaq.runtime.sharing import share_inputs
from alphaq.runtime.skipping import skip_experts
from alphaq.runtime.threads import parallel
from alphaq.simd.vectors import flat
from families import random_family, save_layout

CLOSE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
PROMPT = torch.tensor([[12, 400, 31, 7, 90]])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A native checkpoint of a tiny random model of a family, made once."""

    @cache
    def made(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        return native(save_layout(random_family(family), folder / "source", True), folder / "out", "2,3,4,16", 3, 32)

    return made


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A native checkpoint's model, which reads tokens from a recording from now on."""
    model = loaded(folder, dtype)
    record_tokens(model)
    return model


def own(model: Any) -> Any:
    """The forward pass of the model's class."""
    return type(model).forward.__get__(model)


@torch.inference_mode()
def steps(forward: Any, tokens: list[int], cache_of: Any = None, **options: Any) -> tuple[Tensor, Any]:
    """Logits after each token, read alone behind the prompt or what a cache holds, and the cache."""
    if cache_of is None:
        cache_of = forward(input_ids=PROMPT % 300, use_cache=True).past_key_values
    found = []
    for token in tokens:
        given = torch.tensor([[token]])
        found.append(forward(input_ids=given, past_key_values=cache_of, use_cache=True, **options).logits[0, -1])
    return torch.stack(found), cache_of


TOKENS = [5, 17, 3, 250, 9, 9, 64, 1, 33, 120]


def recorded(model: Any) -> Any:
    """The model's `forward`, once it has a recording."""
    steps(model, TOKENS[:4])
    assert isinstance(model.forward, Stepwise)
    assert model.forward.program is not None, model.forward.refused
    return model.forward


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_tokens_read_from_a_recording_have_the_model_s_logits(tiny_quantized: Path, dtype: torch.dtype) -> None:
    model = load(tiny_quantized, dtype)
    wanted, expected = steps(own(model), TOKENS)
    recorded(model)
    found, given = steps(model, TOKENS)
    assert distance(found.float(), wanted.float()) < CLOSE[dtype]
    for layer, other in zip(given.layers, expected.layers, strict=True):
        assert layer.keys.shape == other.keys.shape and layer.get_seq_length() == other.get_seq_length()
        assert distance(layer.values.float(), other.values.float()) < CLOSE[dtype]


RECORDED = ["qwen2_moe", "olmoe", "qwen3_moe", "granitemoe"]


@pytest.mark.parametrize("family", RECORDED)
def test_families_are_recorded_and_computed_alike(small: Callable[[str], Path], family: str) -> None:
    model = load(small(family))
    wanted, _ = steps(own(model), TOKENS)
    recorded(model)
    found, _ = steps(model, TOKENS)
    assert float((found - wanted).abs().max()) < 1e-4


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "dbrx", "gpt_oss", "jetmoe"])
def test_other_families_compute_as_before(small: Callable[[str], Path], family: str) -> None:
    model = load(small(family))
    wanted, _ = steps(own(model), TOKENS)
    found, _ = steps(model, TOKENS)
    assert float((found - wanted).abs().max()) < 1e-4


def test_generated_text_is_the_same(tiny_quantized: Path) -> None:
    model = load(tiny_quantized)
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    found = model.generate(PROMPT, **options)
    assert model.forward.program is not None, model.forward.refused
    del model.forward
    assert torch.equal(found, model.generate(PROMPT, **options))


def test_the_command_line_records_native_checkpoints(alphaq: Any, tiny: Path, tiny_quantized: Path) -> None:
    asked = ("def main", "--max-new-tokens", "12")
    assert alphaq("generate", tiny_quantized, *asked, "--record").out == alphaq("generate", tiny_quantized, *asked).out
    ran = alphaq("generate", tiny, *asked, "--record")
    assert ran.code == 2 and "--record is for native checkpoints" in ran.err


def test_a_cache_can_be_copied_cropped_and_left_for_another(tiny_quantized: Path) -> None:
    model = load(tiny_quantized)
    recorded(model)
    _, first = steps(model, TOKENS[:5])
    held = [layer.keys for layer in first.layers]
    kept = [one.clone() for one in held]
    branch = copy.deepcopy(first)
    steps(model, TOKENS[5:], first)
    assert all(torch.equal(one, other) for one, other in zip(held, kept, strict=True))
    wanted, _ = steps(own(model), [70, 71], copy.deepcopy(branch))
    found, _ = steps(model, [70, 71], branch)
    assert distance(found, wanted) < 1e-4
    first.crop(-len(TOKENS[5:]))
    views = [layer.keys for layer in first.layers]
    found, _ = steps(model, [70, 71], first)
    assert distance(found, wanted) < 1e-4
    assert all(torch.equal(one, other) for one, other in zip(views, kept, strict=True))


def test_a_cache_grows_beyond_its_room(tiny_quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alphaq.runtime.decoding.LEAST_ROOM", 2)
    model = load(tiny_quantized)
    recorded(model)
    assert distance(steps(model, TOKENS)[0], steps(own(model), TOKENS)[0]) < 1e-4


def test_what_is_not_one_plain_token_is_read_as_before(tiny_quantized: Path) -> None:
    model = load(tiny_quantized)
    recorded(model)
    run = model.forward.program.run
    asked: list[int] = []
    model.forward.program.run = lambda *given: (asked.append(given[2]), run(*given))[1]
    with torch.inference_mode():
        for ids, options in (
            (torch.tensor([[4], [5]]), {}),
            (torch.tensor([[4, 5]]), {}),
            (torch.tensor([[4]]), {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}),
        ):
            prompts = PROMPT.expand(len(ids), -1)
            mask = {"attention_mask": torch.ones_like(prompts)}
            given, other = (one(prompts, use_cache=True, **mask).past_key_values for one in (model, own(model)))
            found = model(ids, past_key_values=given, **options)
            assert torch.equal(found.logits, own(model)(ids, past_key_values=other, **options).logits)
    assert asked == []
    model(torch.tensor([[4]]), past_key_values=DynamicCache(config=model.config))  # with gradients
    steps(model, [4], attention_mask=torch.ones(1, 6, dtype=torch.long))
    assert asked == [5]
    steps(model, [4], output_hidden_states=True)
    assert asked == [5]


def test_lengths_that_are_the_same_tell_nothing_of_others(tiny_quantized: Path) -> None:
    model = load(tiny_quantized)
    for _ in range(9):
        steps(model, [4])
    assert model.forward.step is not None and model.forward.program is None
    steps(model, [4, 5])
    assert model.forward.program is not None


def test_memory_goes_with_the_cache(tiny_quantized: Path) -> None:
    model = load(tiny_quantized)
    _, given = steps(recorded(model), TOKENS)
    assert model.forward.caches is not None
    del given
    assert model.forward.caches is None


def test_caches_of_another_model_are_not_written_to(tiny_quantized: Path) -> None:
    model = load(tiny_quantized)
    recorded(model)
    cached = DynamicCache(config=model.config)
    for layer in range(4):
        cached.update(torch.zeros(1, 1, 5, 8), torch.zeros(1, 1, 5, 8), layer)
    with pytest.raises(RuntimeError):
        steps(model, [4], cached)


def test_hooks_see_every_token(tiny_quantized: Path) -> None:
    model = load(tiny_quantized)
    recorded(model)
    seen: list[int] = []
    handle = model.model.layers[1].mlp.experts.register_forward_hook(lambda *_: seen.append(1))
    steps(model, [4, 5])
    assert len(seen) == 3  # with the prompt
    handle.remove()
    steps(model, [4, 5])
    assert len(seen) == 3 and model.forward.program is not None


def test_leaving_out_experts_is_followed(tiny_quantized: Path) -> None:
    model = load(tiny_quantized)
    recorded(model)
    before, _ = steps(model, TOKENS)
    skip_experts(model, 0.9)
    found, _ = steps(model, TOKENS)
    assert torch.equal(found, steps(own(model), TOKENS)[0]) and distance(found, before) > 1e-3
    skip_experts(model, 0)
    assert distance(steps(model, TOKENS)[0], before) < 1e-4


def test_changes_of_a_model_are_followed(tiny_quantized: Path) -> None:
    model = load(tiny_quantized)
    recorded(model)
    model.to(torch.bfloat16)
    for change in (lambda: None, lambda: setattr(model.model.norm, "weight", torch.nn.Parameter(torch.rand(256)))):
        change()
        model.to(torch.bfloat16)
        wanted, _ = steps(own(model), TOKENS)
        assert distance(steps(model, TOKENS)[0].float(), wanted.float()) < 2e-2
        assert recorded(model).program is not None
        assert distance(steps(model, TOKENS)[0].float(), wanted.float()) < 2e-2
    with torch.no_grad():
        model.model.norm.weight.mul_(3)  # where it lies
    assert distance(steps(model, TOKENS)[0].float(), 3 * wanted.float()) < 2e-2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_record_for_themselves(tiny_quantized: Path, copied: Callable[[Any], Any]) -> None:
    model = load(tiny_quantized)
    wanted = recorded(model) and steps(model, TOKENS)[0]
    twin = copied(model)
    assert twin.forward.model is twin and twin.forward.program is None
    with torch.no_grad():
        model.model.norm.weight.zero_()
    recorded(twin)
    assert distance(steps(twin, TOKENS)[0], wanted) < 1e-5
    assert not isinstance(twin.dequantize().forward, Stepwise)


class Changed:
    """A layer that does something else besides."""

    def __init__(self, layer: Any, what: Callable[[Tensor, Any], Tensor]) -> None:
        self.layer, self.what, self.own = layer, what, layer.forward
        layer.forward = self

    def __call__(self, hidden: Tensor, **options: Any) -> Tensor:
        return self.what(self.own(hidden, **options), options["past_key_values"])


@pytest.mark.parametrize(
    ("what", "reason"),
    {
        "by its length": (lambda states, cache: states * (1 + 0.01 * cache.get_seq_length()), "another length"),
        "by values": (lambda states, _: states * 2 if float(states[0, 0, 0]) > 0 else states, "Python decide"),
        "by a truth": (lambda states, _: states * 2 if states[0, 0, 0] > 0 else states, "Python decide"),
        "by an index": (lambda states, _: states * len((states > 0).nonzero(as_tuple=True)[0]), "Python decide"),
        "by a copy": (lambda states, _: states * torch.tensor([states[0, 0, 0]]), "Python decide"),
        "by a list": (lambda states, _: states * 2 if states[0, 0].tolist()[0] > 0 else states, "Python decide"),
        "by chance": (lambda states, _: states + torch.rand_like(states), "random"),
        "by all keys": (lambda states, cache: states + cache.layers[0].keys.mean(), "reads the cache"),
        "with what it remembers": (lambda states, cache: states + cache.__dict__.setdefault("x", torch.ones(1)).add_(1),
                                   "changes what stays"),
        "with what is not its own": (lambda states, _: states + OTHERS, "neither parameters nor buffers"),
    }.values(),
)  # fmt: skip
def test_models_that_do_otherwise_each_time_are_not_recorded(
    tiny_quantized: Path, what: Callable[[Tensor, Any], Tensor], reason: str
) -> None:
    model = load(tiny_quantized)
    Changed(model.model.layers[2], what)
    torch.manual_seed(0)
    wanted, _ = steps(own(model), TOKENS)
    torch.manual_seed(0)
    found, _ = steps(model, TOKENS)
    assert reason in model.forward.refused
    if reason != "random":
        assert torch.equal(found, wanted)


def test_a_model_that_changes_with_its_length_is_given_up(tiny_quantized: Path) -> None:
    model = load(tiny_quantized)
    Changed(model.model.layers[2], lambda states, cache: states * (1 + cache.get_seq_length() // 16))
    wanted, _ = steps(own(model), [*TOKENS, *TOKENS])
    found, _ = steps(model, [*TOKENS, *TOKENS])
    assert "tokens it computes otherwise" in model.forward.refused
    assert distance(found[11:], wanted[11:]) < 1e-5


@pytest.mark.parametrize(
    "setting",
    [
        {"sliding_window": 9, "use_sliding_window": True},
        {"attention_chunk_size": 8},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ],
    ids=str,
)
def test_models_whose_config_says_so_are_not_recorded(tiny_quantized: Path, setting: dict[str, Any]) -> None:
    model = load(tiny_quantized)
    _, given = steps(model, TOKENS[:1])  # with a cache as if the config were silent
    for name, value in setting.items():
        setattr(model.config, name, value)
    steps(model, TOKENS[:4], given)
    assert "from some length on" in model.forward.refused


def test_a_model_whose_parts_are_exchanged_is_recorded_anew(tiny_quantized: Path) -> None:
    def another_head(model: Any) -> None:
        model.lm_head = torch.nn.Linear(256, model.config.vocab_size, bias=False)

    def another_layer(model: Any) -> None:
        model.model.layers[1].mlp = model.model.layers[2].mlp

    def fewer_experts(model: Any) -> None:
        model.model.layers[1].mlp.gate.top_k = 1

    def other_forward(model: Any) -> None:
        layer = model.model.layers[1].mlp
        forward = layer.forward
        layer.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)

    for change in (another_head, another_layer, fewer_experts, other_forward):
        model = load(tiny_quantized)
        recorded(model)
        before, _ = steps(model, TOKENS)
        change(model)
        found, _ = steps(model, TOKENS)
        wanted, _ = steps(own(model), TOKENS)
        assert distance(found, wanted) < 1e-4 < distance(before, wanted), change
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(steps(model, TOKENS)[0], steps(own(model), TOKENS)[0])


def test_a_model_that_changes_at_every_token_is_not_recorded_for_ever(tiny_quantized: Path) -> None:
    model = load(tiny_quantized)
    given = None
    for number in range(40):
        model.model.layers[1].note = number
        _, given = steps(model, TOKENS[:1], given)
    assert "again and again" in model.forward.refused


OTHERS = torch.full((1,), 0.5)


def test_equal_candidates_are_chosen_as_torch_chooses(tiny_quantized: Path) -> None:
    model = load(tiny_quantized, torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[1::2] = layer.mlp.gate.weight[::2]
    recorded(model)
    assert distance(steps(model, TOKENS)[0].float(), steps(own(model), TOKENS)[0].float()) < 2e-2


def test_numbers_that_are_no_tokens_are_refused_as_before(tiny_quantized: Path) -> None:
    model = load(tiny_quantized)
    recorded(model)
    with pytest.raises(IndexError):
        steps(model, [10**6])
    assert distance(steps(model, TOKENS)[0], steps(own(model), TOKENS)[0]) < 1e-4


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(shape)).to(dtype)


OPERATIONS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "norm": (lambda x, w: w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype),
             [(1, 1, 96), (96,)]),
    "rope": (lambda q, c: q * c + torch.cat((-q[..., 8:], q[..., :8]), -1) * c.sin(), [(1, 4, 1, 16), (1, 1, 1, 16)]),
    "gates": (lambda x: torch.cat([F.silu(x), x.sigmoid(), F.gelu(x), F.gelu(x, approximate="tanh"), x.tanh(), x.cos(),
                                   F.relu(x), F.softplus(x), x.exp(), -x, x.abs().sqrt(), x.square()]), [(2, 40)]),
    "pairs": (lambda x, y: (x + y, x - y, x * 2.5, x / y, torch.maximum(x, y), torch.minimum(x, y), 1.0 - x),
              [(3, 5, 32), (5, 1)]),
    "choices": (lambda x, y: (x > y, x < 0.5, torch.where(x > y, x, y), x.masked_fill(y > 0, -7.0), x.clamp(-1, 2),
                              x.clamp(max=0.25), x != y), [(4, 24), (4, 24)]),
    "sums": (lambda x: (x.sum(0), x.sum(1), x.mean(-1, keepdim=True), x.sum(2), x.mean(1)), [(3, 7, 20)]),
    "places": (lambda x: (x.transpose(0, 1).reshape(5, -1), x.transpose(1, 2).contiguous(), x.flatten(1).float()),
               [(3, 5, 32)]),
    "softmax": (lambda x: (x.softmax(-1), x.softmax(-1, dtype=torch.float32)), [(3, 17)]),
    "top": (lambda x: (*x.topk(3, -1), *x.float().topk(1)), [(2, 40)]),
    "in place": (lambda x, y: x.clone().mul_(y).div_(2).add_(y), [(4, 16), (16,)]),
    "linear": (lambda x, w, b: (F.linear(x, w, b), F.linear(x, w)), [(2, 48), (33, 48), (33,)]),
    "left to torch": (lambda x, y: torch.cumsum(x, -1) * y.erf(), [(4, 16), (16,)]),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_torch_s(name: str, dtype: torch.dtype) -> None:
    if name == "linear" and dtype == torch.float16:
        pytest.skip("the loop is compiled for each type of products, in half a minute")
    torch.manual_seed(1)
    function, shapes = OPERATIONS[name]
    operands = [rand(*shape, dtype=dtype) for shape in shapes]
    with torch.inference_mode():
        inputs = [one.clone() for one in operands]
        with Recorder() as recorder:
            result = function(*inputs)
        rows = Rows()
        for call in recorder.calls:
            if call.changed or not set(map(memory_of, call.outputs)) <= set(map(memory_of, call.inputs)):
                take(rows, call)
        for one in inputs:
            one.copy_(rand(*one.shape, dtype=dtype))
        wanted = function(*inputs)
        run(rows)
    left = sum(not row[0] for row in rows.rows)
    assert (left > 0) == (name == "left to torch") or name in ("gates", "linear")
    results, expected = ([one] if isinstance(one, Tensor) else one for one in (result, wanted))
    for found, one in zip(results, expected, strict=True):
        assert found.dtype == one.dtype and found.shape == one.shape
        limit = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(one.dtype, 0)
        assert float((found.double() - one.double()).norm()) <= limit * float(one.double().norm())


def run(rows: Rows) -> None:
    """Run rows without keys and values."""
    (dtype,) = rows.packed_kinds or {torch.float32}
    every, numbers = rows.arrays()
    share_inputs(every)
    slots, at, rest = np.zeros((0, 2), np.int64), 0, given(every, dtype)
    while (at := step_kernels.run(every, numbers, slots, 0, at, *rest)) < len(every):
        rows.outside[at].run(())
        at += 1


def given(rows: np.ndarray, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """What the interpreter takes after the place to begin."""
    room = room_of(rows)
    memory = np.zeros(step_kernels.memory_bytes(room), np.uint8)
    return room, memory, flat(torch.empty(0, dtype=dtype)), *parallel()


@pytest.mark.parametrize("length", [1, 100, 20000])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_attention_is_torch_s(length: int, heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    queries, shared = heads
    query, new = rand(1, queries, 1, 32), rand(1, shared, 1, 32)
    keys, values = rand(1, shared, length, 32), rand(1, shared, length, 48)
    room = [torch.zeros(1, shared, length + 9, one.shape[-1]) for one in (keys, values)]
    for one, held in zip((keys, values), room, strict=True):
        held[:, :, :length] = one
    rows = Rows()
    with torch.inference_mode(), Recorder() as recorder:
        every = torch.cat([keys, new], -2), torch.cat([values, new.repeat(1, 1, 1, 2)[..., :48]], -2)
        result = F.scaled_dot_product_attention(query, *every, scale=0.2, enable_gqa=queries != shared)
    call = recorder.calls[-1]
    for slot, cat in enumerate([one for one in recorder.calls if str(one.function) == "aten.cat.default"]):
        append(rows, cat, slot)
    take(rows, call, (0, 1))
    wanted = result.clone()
    with torch.inference_mode():
        result.zero_()
    every_row, numbers = rows.arrays()
    slots = np.array([(one.data_ptr(), one.shape[2]) for one in room])
    stopped = step_kernels.run(every_row, numbers, slots, length, 0, *given(every_row))
    assert (stopped < len(every_row)) == (length == 20000)
    if stopped < len(every_row):
        with torch.inference_mode():
            rows.outside[stopped].run([one[:, :, : length + 1] for one in room])
    assert distance(result, wanted) < 1e-5


def test_a_lone_token_is_multiplied_as_among_others() -> None:
    generator = torch.Generator().manual_seed(0)
    for bits, group, symmetric in ((1, 128, False), (1, 32, True), (3, 128, False), (4, 64, True), (8, 32, False)):
        weight = torch.randn(70, 2200, generator=generator)
        weights = PackedWeights([["a"]], (70, 2200))
        weights.fill([[encode(rounder_of(DEFAULT)(weight, Choice(bits, group, symmetric)))]])
        inputs = torch.randn(5, 2200, generator=generator)
        numbers = torch.arange(5)
        found = [packed_linear(inputs, weights.table, 70, torch.zeros(1).long(), one[None]) for one in numbers]
        together = packed_linear(inputs, weights.table, 70, torch.zeros(5).long(), numbers)
        assert distance(torch.cat(found), together) < 1e-6
        assert distance(together, inputs @ weights.dequantized(0, 0).T) < 5e-6


KINDS = ["3g32", "4g128s", "2g64", "t3", "t2.25", "16"]


def matrices(count: int, shape: tuple[int, int], kinds: list[str], projections: int = 1) -> PackedWeights:
    """Random matrices that are stored in turn as kinds say."""
    generator = torch.Generator().manual_seed(0)
    tensors = [[torch.randn(shape, generator=generator) for _ in range(count)] for _ in range(projections)]
    weights = PackedWeights([[f"{row}.{one}" for one in range(count)] for row in range(projections)], shape)
    stored = [
        [
            tensor.bfloat16() if kind == "16" else encode(rounder_of(DEFAULT)(tensor, parse_choice(kind)))
            for tensor, kind in zip(row, cycle(kinds), strict=False)
        ]
        for row in tensors
    ]
    weights.fill(stored)
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(70, 256), (9, 200)])
def test_the_loop_s_products_are_the_operator_s_to_the_bit(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Whether experts differ or not, and also of experts that there are not."""
    weights = matrices(len(KINDS), shape, KINDS, 2)
    generator = torch.Generator().manual_seed(1)
    for chosen in ([0], [3], [5], [4, 1], [5, 2, 0, 3], [2, 2, 2, 1], [1, 9], [-1]):
        inputs = torch.randn(len(chosen), shape[1], generator=generator).to(dtype)
        experts, tokens = torch.tensor(chosen), torch.arange(len(chosen)).flip(0)
        rows = Rows()
        with torch.inference_mode(), Recorder() as recorder:
            result = packed_linear(inputs, weights.table, shape[0], experts, tokens)
        take(rows, recorder.calls[-1])
        wanted = result.clone()
        with torch.inference_mode():
            result.zero_()
        run(rows)
        assert torch.equal(result, wanted), chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_are_made_whole_numbers_once_until_they_change(dtype: torch.dtype) -> None:
    """Also where the first that multiplies them anew has twice the same expert, and leaves none."""
    weights, other = matrices(2, (40, 256), ["3g32", "t2"]), matrices(1, (5, 256), ["16"])

    def times(states: Tensor, packed: PackedWeights, *experts: int) -> Tensor:
        chosen = torch.tensor(experts)
        return packed_linear(states, packed.table, packed.shape[0], chosen, torch.zeros_like(chosen))

    def step(states: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
        found = times(states, weights, 0), times(states, other, 0)
        states.mul_(factor)
        return *found, times(states, weights, 1, 1), times(states, weights, 1)

    states, factor = rand(1, 256, dtype=dtype), rand(1, 256, dtype=dtype)
    with torch.inference_mode():
        before = states.clone()
        with Recorder() as recorder:
            results = step(states, factor)
        rows = Rows()
        for call in recorder.calls:
            if call.function in (packed_linear._opoverload, torch.ops.aten.mul_.Tensor):
                take(rows, call)
        states.copy_(2 * before)
        wanted = step(2 * before, factor)
        run(rows)
    every, _ = rows.arrays()
    share_inputs(every)
    shared = [bool(row[places.PREPARED]) for row in every if row[places.OP] == places.PACKED]
    assert shared == [False, True, False, True]
    assert all(torch.equal(found, one) for found, one in zip(results, wanted, strict=True))


EXACT: dict[str, Callable[..., Tensor]] = {
    "sum": lambda x, y: x + y,
    "difference": lambda x, y: x - y,
    "difference from a number": lambda x, y: 1.5 - x,
    "product": lambda x, y: x * y,
    "product with one": lambda x, y: x * y[..., :1],
    "quotient": lambda x, y: x / y,
    "negated": lambda x, y: -x,
    "square": lambda x, y: x.square(),
    "without negatives": lambda x, y: x.relu(),
    "widened": lambda x, y: x.float(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_what_float32_rounds_once_is_torch_s_to_the_bit(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -6e-8, 65504.0, 3e38])
    for length in (1, 15, 16, 17, 32, 75):
        operands = []
        for _ in range(2):
            values = torch.cat([special, 100 * torch.randn(3 * length)])
            operands.append(values[torch.randperm(len(values))][: 3 * length].view(3, length).to(dtype))
        with torch.inference_mode(), Recorder() as recorder:
            result = EXACT[name](*operands)
        rows = Rows()
        for call in recorder.calls:
            if call.changed or not set(map(memory_of, call.outputs)) <= set(map(memory_of, call.inputs)):
                take(rows, call)
        assert all(row[places.OP] for row in rows.rows)  # none is left to torch
        if not rows.rows:  # what is float32 is not widened
            continue
        wanted = result.clone()
        with torch.inference_mode():
            result.zero_()
        run(rows)
        assert torch.equal(result.isnan(), wanted.isnan())
        assert torch.equal(result.nan_to_num(7.0), wanted.nan_to_num(7.0))
        assert torch.equal(result.signbit() | wanted.isnan(), wanted.signbit() | wanted.isnan())


def test_the_loop_s_exponential_is_exact_to_float64() -> None:
    values = torch.linspace(-690, 690, 20001, dtype=torch.float64)
    found = torch.tensor([line_kernels.exponential(float(one)) for one in values[::40]], dtype=torch.float64)
    assert float((found / values[::40].exp() - 1).abs().max()) < 1e-15
    assert np.float32(line_kernels.exponential(-1e4)) == 0.0
    assert line_kernels.exponential(np.inf) == np.inf and line_kernels.exponential(-np.inf) < 1e-300
    assert np.isnan(line_kernels.exponential(np.nan)) and line_kernels.exponential(0.0) == 1.0


def test_training_is_still_refused(tiny_quantized: Path) -> None:
    model = load(tiny_quantized)
    recorded(model)
    cached = model(PROMPT, use_cache=True).past_key_values
    with pytest.raises(AlphaQError, match="no gradients"):
        model(torch.tensor([[4]]), past_key_values=cached).logits.sum().backward()
