"""Every engine profile keeps the same promises, and counts bytes as the engine's own library does."""

import ctypes
import re
import subprocess
import sys
from dataclasses import replace
from itertools import groupby, pairwise

import gguf
import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from exported import gaussian, round_trip
from hypothesis import given
from hypothesis import strategies as st

from alphaq.engines import vllm
from alphaq.engines.gguf import profile as llama_cpp
from alphaq.engines.profile import Profile
from alphaq.engines.profiles import ENGINES, profile
from alphaq.errors import ChoiceError, MissingEngineError, MissingExtraError, UnknownNameError
from alphaq.formats.gaussian import GAUSSIAN_ERROR
from alphaq.formats.ggml import GGML_BLOCKS, GGML_TYPES
from alphaq.formats.ggml_library import library
from alphaq.formats.native import kind_of
from alphaq.formats.table import parse_choice
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role, Shape

SHAPES = [(256, 512), (1408, 2048), (2048, 256)]

every_profile = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_type = pytest.mark.parametrize("name", GGML_BLOCKS)


def matrix_of(shape: Shape, layer: int = 0, expert: int = 0, projection: str = "gate") -> MatrixRef:
    name = f"layers.{layer}.experts.{expert}.{projection}"
    return MatrixRef(name, shape, "BF16", layer, expert, projection, Role.EXPERT, name)


def quantized(engine: Profile) -> list[Choice]:
    return [choice for choice in engine.choices if choice.bits != 16]


@pytest.mark.parametrize("name", ENGINES)
def test_engine_is_found_by_its_name(name: str) -> None:
    assert profile(name).name == name


def test_mistyped_engine_is_refused_with_the_closest_name() -> None:
    with pytest.raises(UnknownNameError, match=r"--engine 'lama\.cpp'.*Did you mean 'llama\.cpp'.*Available: .*vllm"):
        profile("lama.cpp")


@every_profile
def test_defaults_are_quantized_choices_of_the_engine(engine: Profile) -> None:
    assert engine.defaults
    assert set(engine.defaults) <= set(quantized(engine))
    assert len(set(engine.choices)) == len(engine.choices)


@every_profile
def test_choices_are_written_and_read_back(engine: Profile) -> None:
    assert tuple(parse_choice(str(choice)) for choice in engine.choices) == engine.choices


@every_profile
def test_bare_width_is_a_choice_of_the_engine_or_refused(engine: Profile) -> None:
    offered = {choice.bits for choice in engine.choices}
    for bits in range(-1, 40):
        try:
            choice = engine.with_bits(bits)
        except ChoiceError as error:
            assert bits not in offered or (engine.name, bits) == ("llama.cpp", 1)  # IQ1_S or IQ1_M: to be named
            assert str(bits) in str(error)
            assert "Available" in str(error)
        else:
            assert choice in engine.choices
            assert choice.bits == bits


@every_profile
@every_shape
def test_kept_matrices_take_two_bytes_a_weight(engine: Profile, shape: Shape) -> None:
    assert engine.storage_bytes(Choice(16), shape) == 2 * shape[0] * shape[1]


@every_profile
@every_shape
def test_bytes_grow_with_bits(engine: Profile, shape: Shape) -> None:
    def group(choice: Choice) -> tuple[int, bool, str]:
        return choice.group_size, choice.symmetric, kind_of(choice)

    for _, members in groupby(sorted(quantized(engine), key=group), key=group):
        sizes: dict[int, list[int]] = {}
        for choice in members:
            sizes.setdefault(choice.bits, []).append(engine.storage_bytes(choice, shape))
        narrow_to_wide = [sizes[bits] for bits in sorted(sizes)]
        assert all(min(size) > 0 for size in narrow_to_wide)
        assert all(max(low) < min(high) for low, high in pairwise(narrow_to_wide))


@every_profile
@every_shape
def test_bytes_hold_the_codes(engine: Profile, shape: Shape) -> None:
    kept = engine.storage_bytes(Choice(16), shape)
    for choice in quantized(engine):
        assert choice.bits * shape[0] * shape[1] / 8 < engine.storage_bytes(choice, shape) < kept


@every_profile
def test_what_is_encoded_has_the_promised_bytes_and_is_read_back(engine: Profile) -> None:
    """By what reads the files, with the error that the quantizer counted."""
    weight = gaussian(64, 512)
    for choice in engine.defaults:
        try:
            matrix, restored = round_trip(engine, choice, weight)
        except (MissingExtraError, MissingEngineError) as error:
            pytest.skip(str(error))
        parts = engine.writer.encode(matrix)
        assert sum(part.nbytes for part in parts) == engine.storage_bytes(choice, (64, 512))
        error = (restored - weight.float()).double().square().sum()
        assert matrix.squared_error == pytest.approx(float(error), rel=1e-4)


@every_profile
def test_units_hold_exactly_what_must_agree(engine: Profile) -> None:
    matrices = [
        matrix_of((256, 256), layer, expert, projection)
        for layer in range(3)
        for expert in range(4)
        for projection in ("gate", "up", "down")
    ]
    units: dict[str, list[MatrixRef]] = {}
    for matrix in matrices:
        units.setdefault(engine.unit_of(matrix), []).append(matrix)
    size = {"matrix": 1, "layer × projection": 4, "layer": 12}[engine.unit]
    assert [len(unit) for unit in units.values()] == [size] * (len(matrices) // size)
    assert all(len({matrix.layer for matrix in unit}) == 1 for unit in units.values())
    if engine.unit == "layer × projection":
        assert all(len({matrix.projection for matrix in unit}) == 1 for unit in units.values())


@every_profile
def test_outside_the_experts_each_matrix_is_a_unit(engine: Profile) -> None:
    """A shared expert's gate is no member of the experts' gates, nor the embedding of the output matrix."""
    roles = [Role.SHARED_EXPERT, Role.ATTENTION, Role.EMBEDDING, Role.HEAD]
    matrices = [replace(matrix_of((256, 256)), name=role.value, role=role, expert=None) for role in roles]
    assert [engine.unit_of(matrix) for matrix in matrices] == [matrix.name for matrix in matrices]


@every_profile
@every_shape
def test_ordinary_shapes_meet_no_obstacle(engine: Profile, shape: Shape) -> None:
    assert [engine.obstacle(choice, matrix_of(shape)) for choice in engine.choices] == [None] * len(engine.choices)


@every_profile
def test_kept_matrices_meet_no_obstacle_whatever_the_shape(engine: Profile) -> None:
    assert engine.obstacle(Choice(16), matrix_of((3, 5))) is None


@pytest.mark.parametrize(
    ("name", "choice", "shape", "reason"),
    [
        ("llama.cpp", "Q4_K", (2048, 1408), "rows of 1408 weights are not whole Q4_K blocks of 256"),
        ("llama.cpp", "Q4_0", (2048, 1408), None),
        ("llama.cpp", "Q8_0", (32, 80), "rows of 80 weights are not whole Q8_0 blocks of 32"),
        ("vllm", "4g128s", (64, 96), "96 columns are not divisible by the group size 128"),
        ("vllm", "4g32s", (64, 96), None),
        ("mlx", "3g64", (5, 96), "96 columns are not divisible by the group size 64"),
        ("mlx", "3g32", (5, 96), None),
        ("gptqmodel", "3g32", (48, 64), "its shape 48×64 is not in multiples of 32"),
        ("gptqmodel", "3g32", (64, 48), "its shape 64×48 is not in multiples of 32"),
        ("gptqmodel", "3g64", (64, 96), "96 columns are not divisible by the group size 64"),
        ("native", "3g64", (5, 7), None),
    ],
)
def test_obstacles_say_what_does_not_fit(name: str, choice: str, shape: Shape, reason: str | None) -> None:
    assert profile(name).obstacle(parse_choice(choice), matrix_of(shape)) == reason


@every_type
def test_ggml_blocks_are_those_of_the_library_and_of_the_gguf_package(name: str) -> None:
    number, *sizes = GGML_TYPES[name]
    found = library()
    found.ggml_type_name.restype = ctypes.c_char_p
    found.ggml_blck_size.restype, found.ggml_type_size.restype = ctypes.c_int64, ctypes.c_size_t
    assert found.ggml_type_name(number).decode().upper() == name
    assert [found.ggml_blck_size(number), found.ggml_type_size(number)] == sizes
    if name in gguf.GGMLQuantizationType.__members__:
        assert list(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]) == sizes


ASK = """
import sys
import numpy as np
from alphaq.formats.ggml_library import library
values, out, ones = np.ones(256, np.float32), np.zeros(2048, np.uint8), np.ones(256, np.float32)
library().ggml_quantize_chunk(int(sys.argv[1]), values.ctypes.data, out.ctypes.data, 0, 1, 256, ones.ctypes.data)
"""


def test_every_type_that_the_library_quantizes_is_on_offer() -> None:
    """It ends the process that asks for another, so each that is not on offer is asked of one of its own."""
    others = {name: kind for name, kind in GGML_TYPES.items() if name not in GGML_BLOCKS and name[0] in "QIMNT"}
    names = [name for name in others if not re.fullmatch(r"I\d+", name)]
    assert names == ["Q8_1", "Q8_K"]  # of activations
    for name in names:
        ran = subprocess.run([sys.executable, "-c", ASK, str(others[name].number)], capture_output=True)
        assert ran.returncode != 0


@every_type
@pytest.mark.parametrize("shape", [*SHAPES, (1, 256), (7, 768)], ids=str)
def test_ggml_bytes_are_those_of_a_gguf_tensor(name: str, shape: Shape) -> None:
    if name not in gguf.GGMLQuantizationType.__members__:
        pytest.skip(f"the gguf package has no {name}")
    stored = gguf.quants.quant_shape_to_byte_shape(shape, gguf.GGMLQuantizationType[name])
    padded = gguf.GGUFWriter.ggml_pad(stored[0] * stored[1], gguf.GGUF_DEFAULT_ALIGNMENT)
    assert llama_cpp.storage_bytes(parse_choice(name), shape) == padded


@given(
    name=st.sampled_from([*GGML_BLOCKS, "16"]),
    experts=st.integers(1, 128),
    rows=st.integers(1, 300),
    blocks=st.integers(1, 20),
)
def test_ggml_bytes_of_slices_bound_those_of_the_stacked_tensor(
    name: str, experts: int, rows: int, blocks: int
) -> None:
    _, block, size = GGML_BLOCKS.get(name, (16, 1, 2))
    stacked = gguf.GGUFWriter.ggml_pad(experts * rows * blocks * size, gguf.GGUF_DEFAULT_ALIGNMENT)
    promised = experts * llama_cpp.storage_bytes(parse_choice(name), (rows, blocks * block))
    assert stacked <= promised < stacked + 32 * experts
    if rows * blocks * size % 32 == 0:
        assert promised == stacked


def test_every_ggml_choice_has_a_measured_error() -> None:
    assert set(GAUSSIAN_ERROR) == {str(choice) for choice in llama_cpp.PROFILE.choices}


@every_type
def test_gaussian_error_is_above_the_rate_distortion_bound_and_not_far(name: str) -> None:
    """No code of R bits per weight represents Gaussian weights with less error than 2^(-2R) (Shannon, 1959).

    Ternary types, and Q2_0, are for weights that were trained to have three or four values.
    """
    _, block, size = GGML_BLOCKS[name]
    bound = 2 ** (-2 * 8 * size / block)
    assert bound < GAUSSIAN_ERROR[name] < (12 if name in ("Q2_0", "TQ1_0", "TQ2_0") else 6) * bound


def test_gaussian_error_of_q8_0_is_the_reference_s() -> None:
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)).numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    restored = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    assert ((restored - weight) ** 2).sum() / (weight**2).sum() == pytest.approx(GAUSSIAN_ERROR["Q8_0"], rel=0.01)


def test_ggml_defaults_leave_out_only_what_another_type_beats_or_models_are_trained_in() -> None:
    defaults = [str(choice) for choice in llama_cpp.PROFILE.defaults]
    assert set(GGML_BLOCKS) - set(defaults) == {"Q2_K", "Q3_K", "Q4_0", *llama_cpp.TRAINED_IN}
    for block in (32, 256):
        members = [name for name in defaults if GGML_BLOCKS[name][1] == block]
        by_size = sorted(members, key=lambda name: GGML_BLOCKS[name][2])
        errors = [GAUSSIAN_ERROR[name] for name in by_size]
        assert errors == sorted(set(errors), reverse=True)


@pytest.mark.parametrize("choice", quantized(vllm.PROFILE), ids=str)
@pytest.mark.parametrize("shape", [(48, 256), (5, 384)], ids=str)
def test_vllm_bytes_are_those_of_compressed_tensors(choice: Choice, shape: Shape) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    groups = weight.view(shape[0], -1, choice.group_size)
    scale = groups.abs().amax(dim=-1) / (2 ** (choice.bits - 1) - 1)
    settings = QuantizationArgs(
        num_bits=choice.bits, type="int", symmetric=True, strategy="group", group_size=choice.group_size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=settings)
    stored = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    assert set(stored) == {"weight_packed", "weight_scale", "weight_shape"}
    assert sum(tensor.nbytes for tensor in stored.values()) == vllm.PROFILE.storage_bytes(choice, shape)


@pytest.mark.parametrize("choice", quantized(profile("mlx")), ids=str)
@pytest.mark.parametrize("shape", [(48, 256), (5, 384)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mlx_bytes_are_those_of_mlx(choice: Choice, shape: Shape, dtype: str) -> None:
    mx = pytest.importorskip("mlx.core")
    weight = mx.random.normal(shape).astype(getattr(mx, dtype))
    stored = mx.quantize(weight, group_size=choice.group_size, bits=choice.bits)
    assert sum(part.nbytes for part in stored) == profile("mlx").storage_bytes(choice, shape)


@pytest.mark.parametrize(
    ("text", "shape", "expected"),
    [
        # qweight 4·(128·b/32)·64 + qzeros 4·groups·(64·b/32) + scales 2·groups·64 + g_idx 4·128
        ("4g128", (64, 128), 4 * 16 * 64 + 4 * 1 * 8 + 2 * 1 * 64 + 4 * 128),
        ("3g32", (64, 128), 4 * 12 * 64 + 4 * 4 * 6 + 2 * 4 * 64 + 4 * 128),
    ],
)
def test_gptq_bytes_count_every_tensor(text: str, shape: Shape, expected: int) -> None:
    assert profile("gptqmodel").storage_bytes(parse_choice(text), shape) == expected
