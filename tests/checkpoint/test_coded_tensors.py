"""Sources in few bits decode to what their makers' own libraries make of them, and every command sees only that."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coded import Pair, Tensors, assert_same_values, changed, coded_pair, load, save
from safetensors.torch import load_file
from torch import Tensor

from alphaq import pipeline
from alphaq.calibration.stream import stream_forward
from alphaq.calibration.tokens import random_windows
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.checkpoint.summary import summarize
from alphaq.errors import AlphaQError, CheckpointError
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Plan
from conftest import COMMON, EXPERTS, Ran, read_back
from families import HEADS, random_family, save_layout

GATE = "model.layers.1.mlp.experts.0.gate_proj"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(name.encode()))


def with_tensors(base: Path, source: Path, more: Tensors) -> Path:
    """A copy with more tensors."""
    config, tensors = load(source)
    return save(base, config, {"model-1.safetensors": tensors | more})


# -- compressed-tensors ---------------------------------------------------------------------------


def compressed(
    base: Path, source: Path, form: str, dtype: torch.dtype = torch.bfloat16, only: str = "", **weights: Any
) -> Pair:
    """A checkpoint as compressed-tensors' own compressor writes it, and as its decompressor reads it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry(form)

    def code(name: str, weight: Tensor) -> tuple[Tensors, Tensor] | None:
        if only not in name:
            return None
        given = {"weight": weight.to(dtype), **scales_of(name, weight, dtype, **weights)}
        stored = compressor.compress(given, scheme)
        module = name.removesuffix("weight")
        decoded = compressor.decompress(stored, scheme)["weight"]
        values = decoded if dtype == torch.float16 else decoded.to(torch.bfloat16)
        return {f"{module}{key}": value for key, value in stored.items()}, values

    group = {"targets": ["Linear"], "format": form, "weights": json.loads(scheme.weights.model_dump_json())}
    told = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return coded_pair(base, source, code, {"quantization_config": told})


def scales_of(
    name: str, weight: Tensor, dtype: torch.dtype, num_bits: int, strategy: str, **weights: Any
) -> dict[str, Tensor]:
    """Random scales, and zero points where there are any, of the shapes that a strategy has."""
    rows, columns = weight.shape
    size = weights.get("group_size") or columns
    height, width = weights.get("block_structure") or (1, size)
    grid = {"tensor": (1,), "channel": (rows, 1)}.get(strategy, (-(-rows // height), -(-columns // width)))
    scales = (torch.rand(grid, generator=seeded(name)) + 0.5) / 200
    if weights.get("scale_dtype") == torch.uint8:
        scales = 2.0 ** scales.log2().floor()
    if strategy == "tensor_group":
        scales = (scales * 2e4).to(torch.float8_e4m3fn)
    found = {"weight_scale": scales.to(dtype)}
    if strategy == "tensor_group":
        found["weight_global_scale"] = torch.tensor([1.7e4])
    if not weights["symmetric"]:
        half = 2 ** (num_bits - 1)
        found["weight_zero_point"] = torch.randint(-half, half, grid, generator=seeded(name), dtype=torch.int8)
    return found


INT = dict(type="int", symmetric=True)
FLOAT = dict(type="float", symmetric=True, num_bits=8)
COMPRESSED = {
    "int4 in groups": ("pack-quantized", INT | dict(num_bits=4, strategy="group", group_size=32)),
    "int4 asymmetric": ("pack-quantized", INT | dict(num_bits=4, strategy="group", group_size=16, symmetric=False)),
    "int8 packed by rows": ("pack-quantized", INT | dict(num_bits=8, strategy="channel")),
    "int2 asymmetric by rows": ("pack-quantized", INT | dict(num_bits=2, strategy="channel", symmetric=False)),
    "int8": ("int-quantized", INT | dict(num_bits=8, strategy="channel")),
    "int8 asymmetric": ("int-quantized", INT | dict(num_bits=8, strategy="channel", symmetric=False)),
    "fp8 by tensor": ("float-quantized", FLOAT | dict(strategy="tensor")),
    "fp8 by rows": ("float-quantized", FLOAT | dict(strategy="channel")),
    "fp8 in groups": ("naive-quantized", FLOAT | dict(strategy="group", group_size=16)),
    "fp8 in blocks": ("float-quantized", FLOAT | dict(strategy="block", block_structure=[24, 40])),
    "nvfp4": (
        "nvfp4-pack-quantized",
        FLOAT | dict(num_bits=4, strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn),
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        FLOAT | dict(num_bits=4, strategy="group", group_size=32, scale_dtype=torch.uint8),
    ),
    "mxfp8": ("mxfp8-quantized", FLOAT | dict(strategy="group", group_size=32, scale_dtype=torch.uint8)),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_decode_as_its_own_decompressor_does(
    name: str, save_family: Callable[..., Path], tmp_path: Path
) -> None:
    form, weights = COMPRESSED[name]
    pair = compressed(tmp_path, save_family("qwen3_moe"), form, **weights)
    found = open_checkpoint(pair.coded)
    assert found.info(f"{GATE}.weight").encoding is not None
    assert_same_values(found, open_checkpoint(pair.plain))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["int4 in groups", "fp8 by rows"])
def test_scales_in_other_dtypes_decode_as_the_decompressor_does(
    name: str, dtype: torch.dtype, save_family: Callable[..., Path], tmp_path: Path
) -> None:
    form, weights = COMPRESSED[name]
    pair = compressed(tmp_path, save_family("qwen3_moe"), form, dtype, **weights)
    found = open_checkpoint(pair.coded)
    assert found.info(f"{GATE}.weight").dtype == ("F16" if dtype == torch.float16 else "BF16")
    assert_same_values(found, open_checkpoint(pair.plain))


def test_packed_integers_whose_scales_do_not_tell_their_width_are_read_by_the_stored_shape(
    save_family: Callable[..., Path], tmp_path: Path
) -> None:
    weights = INT | dict(num_bits=4, strategy="channel")
    pair = compressed(tmp_path, save_family("qwen3_moe"), "pack-quantized", **weights)
    for number, groups in enumerate(({}, {"W4A16": ["Linear"]}, {"a": weights_of(4), "b": weights_of(8)})):
        folder = changed(pair.coded, tmp_path / str(number), lambda tensors: None, config_groups=groups)
        assert_same_values(open_checkpoint(folder), open_checkpoint(pair.plain))


def weights_of(bits: int) -> dict[str, Any]:
    return {"targets": ["re:.*"], "weights": INT | {"num_bits": bits, "strategy": "channel", "group_size": None}}


def test_columns_that_fill_no_word_are_read(save_family: Callable[..., Path], tmp_path: Path) -> None:
    """The last word of a row holds 5 codes of 8."""
    source = save_family("qwen3_moe")
    config, tensors = load(source)
    for name, value in tensors.items():
        if re.search(r"experts.\d+.(gate|up)_proj", name):
            tensors[name] = value[:45]
        elif re.search(r"experts.\d+.down_proj", name):
            tensors[name] = value[:, :45]
    cut = save(tmp_path / "cut", config | {"moe_intermediate_size": 45}, {"model-1.safetensors": tensors})
    weights = INT | dict(num_bits=4, strategy="channel")
    pair = compressed(tmp_path, cut, "pack-quantized", **weights)
    assert_same_values(open_checkpoint(pair.coded), open_checkpoint(pair.plain))


# -- FP8 and FP4 as transformers reads them ---------------------------------------------------------


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    """What transformers makes of FP8 and FP4 codes."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)


def exponents(name: str, grid: tuple[int, ...]) -> Tensor:
    return torch.randint(115, 122, grid, dtype=torch.uint8, generator=seeded(name))


def fp4(name: str, weight: Tensor) -> Tensor:
    """Random pairs of 4-bit floats."""
    *lead, columns = weight.shape
    return torch.randint(256, (*lead, columns // 2), dtype=torch.uint8, generator=seeded(name))


def code_v4(name: str, weight: Tensor) -> tuple[Tensors, Tensor] | None:
    """Experts as pairs of 4-bit floats, other matrices in FP8, both with powers of two as scales, named `.scale`."""
    if ".attn.w" not in name and ".ffn.experts." not in name and ".shared_experts." not in name:
        return None
    rows, columns = weight.shape
    if ".ffn.experts." in name:
        codes, grid = fp4(name, weight).view(torch.int8), (rows, columns // 32)
    else:
        codes = (weight.float() * 8).to(torch.float8_e4m3fn)
        grid = (-(-rows // 128), -(-columns // 128))
    scales = exponents(name, grid).view(torch.float8_e8m0fnu)
    stored = {name: codes, f"{name.removesuffix('weight')}scale": scales}
    return stored, dequantized(codes, scales)


@pytest.fixture(scope="module")
def v4(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A tiny DeepSeek-V4 as published and in bf16."""
    base = tmp_path_factory.mktemp("v4")
    told = dict(quant_method="fp8", fmt="e4m3", scale_fmt="ue8m0", weight_block_size=[128, 128])
    source = save_layout(random_family("deepseek_v4", moe_intermediate_size=64), base / "source", published=True)
    return coded_pair(base, source, code_v4, {"quantization_config": told, "expert_dtype": "fp4"})


def test_deepseek_v4_decodes_as_transformers_does(v4: Pair) -> None:
    found, expected = open_checkpoint(v4.coded), open_checkpoint(v4.plain)
    assert_same_values(found, expected)
    assert {"F8_E4M3", "MXFP4"} <= set(summarize(found).dtypes)
    assert "expert_dtype" not in found.config and found.config == expected.config


def test_4_bit_floats_with_inverse_scales_decode_as_transformers_does(
    save_family: Callable[..., Path], tmp_path: Path
) -> None:
    """Experts in MXFP4 under FP8's names, as MiMo has them, the rest in FP8 whose blocks' exponents are bytes."""

    def code(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        rows, columns = weight.shape
        experts = ".experts." in name
        codes = fp4(name, weight) if experts else weight.float().to(torch.float8_e4m3fn)
        scales = exponents(name, (rows, columns // 32) if experts else (-(-rows // 16), -(-columns // 16)))
        decoded = dequantized(codes.view(torch.int8) if experts else codes, scales)
        return {name: codes, f"{name}_scale_inv": scales}, decoded

    told = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    source = save_family("deepseek_v3")
    pair = coded_pair(tmp_path, source, code, {"quantization_config": told})
    assert_same_values(open_checkpoint(pair.coded), open_checkpoint(pair.plain))


def one_scale(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """FP8 with a number to each matrix, a scalar or [experts, 1, 1], and one for what it multiplies."""
    scales = (torch.rand((weight.shape[0], 1, 1) if weight.ndim == 3 else (), generator=seeded(name)) + 0.5) / 50
    scales = scales.bfloat16()
    codes = (weight.float() / scales.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    inputs = f"{name.removesuffix('weight')}activation_scale" if name.endswith("weight") else f"{name}_activation_scale"
    stored = {name: codes, f"{name}_scale_inv": scales, inputs: torch.tensor(0.25, dtype=torch.bfloat16)}
    return stored, dequantized(codes, scales)


@pytest.mark.parametrize("fused", [False, True])
def test_fp8_with_a_scale_to_each_matrix_decodes_as_transformers_does(
    fused: bool, save_family: Callable[..., Path], tmp_path: Path
) -> None:
    told = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    source = save_family("deepseek_v3", fused=fused)
    pair = coded_pair(tmp_path, source, one_scale, {"quantization_config": told})
    found = open_checkpoint(pair.coded)
    assert_same_values(found, open_checkpoint(pair.plain))
    assert not any("scale" in name for name in found.shard_of)


@pytest.mark.parametrize("grid", [(EXPERTS,), (EXPERTS, 64), (EXPERTS, 64, 1), (EXPERTS, 1, 64), (), (1,)])
def test_scales_of_a_stack_are_told_apart_by_their_shape(
    grid: tuple[int, ...], save_family: Callable[..., Path], tmp_path: Path
) -> None:
    """One to each expert, to each row or column of each, or to all."""

    def code(name: str, weight: Tensor) -> tuple[Tensors, Tensor] | None:
        if not name.endswith("gate_up_proj"):
            return None
        scales = torch.rand(grid, generator=seeded(name)) + 0.5
        codes = (weight.float() * 9).to(torch.float8_e4m3fn)
        spread = scales if len(grid) == 3 else scales[..., None] if len(grid) == 2 else scales.view(-1, 1, 1)
        return {name: codes, f"{name}_scale": scales}, (codes.float() * spread).bfloat16()

    source = save_family("deepseek_v3", fused=True)
    pair = coded_pair(tmp_path, source, code, {"quantization_config": {"quant_method": "fp8"}})
    assert open_checkpoint(pair.coded).info(f"{GATE.rsplit('.', 2)[0]}.gate_up_proj").shape == (EXPERTS, 64, 64)
    assert_same_values(open_checkpoint(pair.coded), open_checkpoint(pair.plain))


# -- ModelOpt -------------------------------------------------------------------------------------


def nvfp4(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """ModelOpt's NVFP4, decoded weight by weight: code · (scale of 16 · scale of the tensor), in float32."""
    rows, columns = weight.shape
    codes = fp4(name, weight)
    scales = (torch.rand(rows, columns // 16, generator=seeded(name)) * 400).to(torch.float8_e4m3fn)
    whole = torch.rand((), generator=seeded(name)) / 4000
    pairs = torch.stack([E2M1[(codes & 15).long()], E2M1[(codes >> 4).long()]], dim=-1).reshape(rows, columns)
    decoded = pairs * (scales.float() * whole)[:, torch.arange(columns) // 16]
    module = name.removesuffix("weight")
    stored = {name: codes, f"{name}_scale": scales, f"{name}_scale_2": whole, f"{module}input_scale": torch.ones(())}
    return stored, decoded.bfloat16()


CACHE = {f"model.layers.{layer}.self_attn.{part}_proj.{part}_scale": torch.ones(1) for layer in (0, 1) for part in "kv"}


@pytest.fixture(scope="module")
def modelopt(tmp_path_factory: pytest.TempPathFactory, save_family: Callable[..., Path]) -> Pair:
    """A tiny model as ModelOpt exports it in NVFP4, announced by hf_quant_config.json only; and in bf16."""
    pair = coded_pair(tmp_path_factory.mktemp("nvfp4"), save_family("qwen3_moe"), nvfp4, {})
    told = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"]}
    folder = with_tensors(pair.coded.with_name("exported"), pair.coded, CACHE)
    (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": told}))
    return Pair(folder, pair.plain)


def test_nvfp4_of_modelopt_is_each_code_times_both_scales(modelopt: Pair) -> None:
    found = open_checkpoint(modelopt.coded)
    assert_same_values(found, open_checkpoint(modelopt.plain))
    assert "NVFP4" in summarize(found).dtypes


@pytest.mark.parametrize(
    "told", [{"quant_method": "modelopt", "quant_algo": "NVFP4"}, {"quant_algo": "MIXED_PRECISION"}]
)
def test_modelopt_is_also_told_by_the_config(told: dict[str, str], modelopt: Pair, tmp_path: Path) -> None:
    folder = changed(modelopt.coded, tmp_path / "out", lambda tensors: None, **told)
    assert_same_values(open_checkpoint(folder), open_checkpoint(modelopt.plain))


def test_modelopt_fp8_by_tensor_and_by_its_blocks(save_family: Callable[..., Path], tmp_path: Path) -> None:
    def code(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        codes = (weight.float() * 9).to(torch.float8_e4m3fn)
        grid = (1, 1, 1, 1) if "q_proj" in name else ()
        scales = torch.rand(grid, generator=seeded(name))
        return {name: codes, f"{name}_scale": scales}, (codes.float() * scales.flatten()).bfloat16()

    told = {"quant_method": "modelopt", "quant_algo": "FP8"}
    pair = coded_pair(tmp_path, save_family("qwen3_moe"), code, {"quantization_config": told})
    assert_same_values(open_checkpoint(pair.coded), open_checkpoint(pair.plain))


# -- commands -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A tiny Kimi-K2.5: experts in int4, told by the config of its language model."""
    base = tmp_path_factory.mktemp("int4")
    model = random_family("kimi_k25", text_config=HEADS | {"moe_intermediate_size": 64})
    form, weights = COMPRESSED["int4 in groups"]
    pair = compressed(base, save_layout(model, base / "source", published=True), form, only=".experts.", **weights)
    config, tensors = load(pair.coded)
    told = config.pop("quantization_config")
    config["text_config"]["quantization_config"] = told
    return Pair(save(base / "nested", config, {"model-1.safetensors": tensors}), pair.plain)


@pytest.mark.parametrize("source", ["int4", "modelopt", pytest.param("v4", marks=pytest.mark.slow)])
def test_commands_see_the_decoded_weights(
    source: str, request: pytest.FixtureRequest, alphaq: Callable[..., Ran], tmp_path: Path
) -> None:
    pair, results, written = request.getfixturevalue(source), [], []
    for number, folder in enumerate((pair.coded, pair.plain)):
        csv, plan, out = tmp_path / f"{number}.csv", tmp_path / f"{number}.json", tmp_path / f"out{number}"
        assert alphaq("inspect", folder).code == 0
        assert alphaq("analyze", folder, "-o", csv).code == 0
        assert alphaq("plan", folder, "--bits", "3.5", "--method", "alphaq", "-o", plan).code == 0
        ran = alphaq("quantize", folder, "--plan", plan, "-o", out)
        assert ran.code == 0, ran.err
        assert alphaq("verify", out, "--reference", folder).code == 0
        choices = {key: json.loads(plan.read_text())[key] for key in ("choices", "alpha", "size_bytes")}
        results.append((sorted(csv.read_text().splitlines()), choices))
        written.append({path.name: load_file(path) for path in sorted(out.glob("*.safetensors"))})
    assert results[0] == results[1] and len(results[0][0]) > EXPERTS
    assert written[0].keys() == written[1].keys()
    for file, tensors in written[0].items():
        assert tensors.keys() == written[1][file].keys()
        assert all(torch.equal(value, written[1][file][name]) for name, value in tensors.items())


@pytest.mark.parametrize("source", ["int4", "modelopt", "v4"])
def test_an_output_tells_of_its_own_quantization_only(
    source: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(source).coded)
    experts = checkpoint.with_role(Role.EXPERT)
    pipeline.quantize(checkpoint, Plan(choices={matrix.name: "3g32" for matrix in experts}), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "alphaq"
    assert not re.search("quantization_config|expert_dtype|compressed-tensors|modelopt", json.dumps(config))
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    names = read_back(tmp_path / "out", checkpoint)
    assert not any(re.search(r"[._]scale|_packed|_shape|zero_point", name) for name in names if "hc_" not in name)


@pytest.mark.parametrize("source", ["int4", "modelopt", "v4"])
def test_a_pass_sees_the_decoded_weights(source: str, request: pytest.FixtureRequest) -> None:
    pair = request.getfixturevalue(source)
    ids = random_windows(COMMON["vocab_size"], windows=1, length=16)
    states = [stream_forward(open_checkpoint(folder), ids, lambda traffic: None) for folder in (pair.coded, pair.plain)]
    assert torch.equal(*states) and states[0].isfinite().all()


def test_the_default_method_plans_from_codes(modelopt: Pair, alphaq: Callable[..., Ran], tmp_path: Path) -> None:
    """It runs the model, which transformers builds by a config.json that still tells of the quantization."""
    for number, folder in enumerate((modelopt.coded, modelopt.plain)):
        ran = alphaq("plan", folder, "--bits", "3.5", "-o", tmp_path / f"{number}.json")
        assert ran.code == 0, ran.err
    plans = [json.loads((tmp_path / f"{number}.json").read_text()) for number in (0, 1)]
    assert plans[0]["choices"] == plans[1]["choices"]


def test_summary_counts_codes_and_scales_as_bytes_and_weights_as_parameters(modelopt: Pair) -> None:
    found, expected = summarize(open_checkpoint(modelopt.coded)), summarize(open_checkpoint(modelopt.plain))
    assert found.parameters == expected.parameters
    unused = (".input_scale", ".k_scale", ".v_scale")
    stored = {name: value for name, value in load(modelopt.coded)[1].items() if not name.endswith(unused)}
    assert found.bytes == sum(value.nbytes for value in stored.values())


def test_a_coded_checkpoint_travels_to_workers(int4: Pair) -> None:
    checkpoint = open_checkpoint(int4.coded)
    there = pickle.loads(pickle.dumps(checkpoint))
    name = next(name for name in checkpoint.shard_of if "experts" in name)
    assert torch.equal(there.tensor(name), checkpoint.tensor(name))


def test_fp8_of_experts_folded_into_one_matrix_is_read_by_expert(tmp_path: Path) -> None:
    """DBRX stores [experts · rows, columns], so its scales come as [experts · row blocks, column blocks]."""
    source = save_layout(random_family("dbrx"), tmp_path / "source", published=True)

    def code(name: str, weight: Tensor) -> tuple[Tensors, Tensor] | None:
        if ".experts." not in name:
            return None
        grid = (weight.shape[0] // 16, weight.shape[1] // 16)
        scales = (torch.rand(grid, generator=seeded(name)) + 0.5) / 50
        codes = (weight.float() * 9).to(torch.float8_e4m3fn)
        return {name: codes, f"{name}_scale_inv": scales}, dequantized(codes, scales)

    told = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    pair = coded_pair(tmp_path, source, code, {"quantization_config": told})
    assert_same_values(open_checkpoint(pair.coded), open_checkpoint(pair.plain))
    wide = changed(pair.coded, tmp_path / "wide", widen, weight_block_size=[192, 16])
    with pytest.raises(CheckpointError, match=r"a scale to 192 rows reaches over two experts of 96"):
        open_checkpoint(wide)


def widen(tensors: Tensors) -> None:
    """Scales of blocks as high as two experts."""
    for name in list(tensors):
        if name.endswith("_scale_inv"):
            rows = tensors[name.removesuffix("_scale_inv")].shape[0]
            tensors[name] = tensors[name][: rows // 192]


# -- faults ---------------------------------------------------------------------------------------


def of(end: str) -> str:
    return f"language_model.{GATE}.weight{end}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(of("_scale")), r"0.gate_proj.weight_packed has no scales: .*weight_scale is not there"),
        (lambda t: t.pop(of("_packed")), r"gate_proj.weight_s\w+ .*, but .*gate_proj.weight is not there"),
        (lambda t: t.update({of("_scale"): t[of("_scale")][:5]}), r"weight_scale is BF16 \[5, 2\], but .*_packed"),
        (lambda t: t.update({of("_scale"): t[of("_scale")].int()}), r"weight_scale is I32 .*needs F32 or BF16 or F16"),
        (
            lambda t: t.update({of("_packed"): t[of("_packed")][:, :5]}),
            r"weight_packed: .*do not tell how many bits .*5 words",
        ),
        (lambda t: t.update({of("_packed"): t[of("_packed")][:0]}), r"_packed is I32 \[0, 8\], not a matrix"),
        (lambda t: t.update({of(""): torch.zeros(32, 64)}), r"gate_proj.weight is stored twice"),
        (lambda t: t.update({of("_g_idx"): torch.zeros(64, dtype=torch.int32)}), r"weight_g_idx .*actorder.*16-bit"),
        (lambda t: t.update({of("_scale_inv"): torch.ones(1)}), r"are scales of the same weight"),
        (lambda t: t.update({of("_zero_point"): torch.ones(7, dtype=torch.int32)}), r"zero_point is I32 \[7\].*needs"),
    ],
)
def test_damaged_integers_are_refused_by_name(
    int4: Pair, tmp_path: Path, change: Callable[[Tensors], object], message: str
) -> None:
    config, tensors = load(int4.coded)
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(save(tmp_path / "out", config, {"model-1.safetensors": tensors}))


@pytest.mark.parametrize("stored", [[32, 10**9], [31, 64], [32, -64]])
def test_a_stored_shape_that_codes_cannot_have_is_refused(
    stored: list[int], save_family: Callable[..., Path], tmp_path: Path
) -> None:
    weights = INT | dict(num_bits=4, strategy="channel")
    pair = compressed(tmp_path, save_family("qwen3_moe"), "pack-quantized", **weights)
    change = {f"{GATE}.weight_shape": torch.tensor(stored)}
    folder = with_tensors(tmp_path / "out", pair.coded, change)
    with pytest.raises(CheckpointError, match=r"gate_proj.weight_shape says .* has the shape \[32, 8\]"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{GATE}.weight_scale_2"), r"gate_proj.weight has no scales: .*weight_scale_2 or"),
        (lambda t: t.update({f"{GATE}.weight_scale_2": torch.ones(3)}), r"weight_scale_2 is F32 \[3\], but .*needs"),
        (lambda t: t.update({f"{GATE}.weight_scale": t[f"{GATE}.weight_scale"][:, :1]}), r"weight_scale is F8_E4M3 \["),
        (lambda t: t.update({f"{GATE}.pre_quant_scale": torch.ones(64)}), r"pre_quant_scale .*AWQ.*16-bit"),
        (lambda t: t.update({f"{GATE}.weight": t[f"{GATE}.weight"].float()}), r"weight_scale\w* are scales, but"),
    ],
)
def test_damaged_nvfp4_is_refused_by_name(
    modelopt: Pair, tmp_path: Path, change: Callable[[Tensors], object], message: str
) -> None:
    folder = changed(modelopt.coded, tmp_path / "out", change, quant_method="modelopt")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_integers_of_modelopt_are_not_taken_for_4_bit_floats(modelopt: Pair, tmp_path: Path) -> None:
    """It may mix them in; their codes are bytes too, but their scales are not."""

    def change(tensors: Tensors) -> None:
        tensors.pop(f"{GATE}.weight_scale_2")
        tensors.update(
            {f"{GATE}.weight": torch.zeros(32, 64, dtype=torch.int8), f"{GATE}.weight_scale": torch.ones(32)}
        )

    folder = changed(modelopt.coded, tmp_path / "out", change, quant_method="modelopt", quant_algo="MIXED_PRECISION")
    with pytest.raises(CheckpointError, match=r"weight_scale is F32 \[32\], but .* needs U8 or F8_E8M0 or F8_E4M3"):
        open_checkpoint(folder)


def test_packed_integers_of_odd_widths_are_refused(save_family: Callable[..., Path], tmp_path: Path) -> None:
    weights = INT | dict(num_bits=3, strategy="group", group_size=32)
    pair = compressed(tmp_path, save_family("qwen3_moe"), "pack-quantized", **weights)
    with pytest.raises(CheckpointError, match=r"is packed in 3 bits; .* 2, 4, 8 can be decoded"):
        open_checkpoint(pair.coded)


def test_scales_that_are_no_numbers_are_refused_when_they_are_read(
    modelopt: Pair, alphaq: Callable[..., Ran], tmp_path: Path
) -> None:
    bad = {f"{GATE}.weight_scale_2": torch.tensor(float("nan"))}
    folder = changed(modelopt.coded, tmp_path / "out", lambda tensors: tensors.update(bad), quant_method="modelopt")
    ran = alphaq("analyze", folder)
    assert ran.code != 0 and f"{GATE}.weight" in ran.err


# -- sources of other tools -----------------------------------------------------------------------

MLX = {"group_size": 64, "bits": 4, "mode": "affine"}
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        r"GPTQ \(config.json, quantization_config\)",
    ),
    "awq": ({"quantization_config": {"quant_method": "awq"}}, "AWQ"),
    "bitsandbytes": ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
    "torchao": ({"quantization_config": {"quant_method": "torchao"}}, "torchao"),
    "alphaq": ({"quantization_config": {"quant_method": "alphaq"}}, "AlphaQ"),
    "unheard of": ({"quantization_config": {"quant_method": "brand-new"}}, "'brand-new'"),
    "mlx": ({"quantization": MLX}, r"MLX \(config.json, quantization\)"),
    "mlx twice": ({"quantization": MLX, "quantization_config": MLX}, r"MLX \(config.json, quantization\)"),
    "inside": (
        {"text_config": {"quantization_config": {"quant_method": "hqq"}}},
        r"HQQ \(config.json, text_config.quant",
    ),
    "deeper": ({"a": {"b": {"quantization_config": {"quant_method": "aqlm"}}}}, r"AQLM \(config.json, a.b.quant"),
    "sparse": (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "marlin-24"}},
        "compressed-tensors as 'marlin-24'",
    ),
    "rotated": (
        {"quantization_config": {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {}}}},
        r"compressed-tensors with rotations \(transform_config\)",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_tools_sources_are_refused_by_the_tool_s_name(
    name: str, save_family: Callable[..., Path], tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    settings, tool = OTHERS[name]
    config, tensors = load(save_family("qwen3_moe"))
    folder = save(tmp_path / "out", config | settings, {"model-1.safetensors": tensors})
    ran = alphaq("inspect", folder)
    said = " ".join(ran.err.split())
    assert ran.code != 0 and re.search(f"already quantized by {tool}.*Give the original 16-bit checkpoint", said), said


@pytest.mark.parametrize("said", [{"quant_algo": "W4A8_AWQ"}, {"quant_algo": "INT4_AWQ"}, {"quant_algo": 7}])
def test_schemes_of_modelopt_that_cannot_be_decoded_are_refused(
    said: dict[str, object], save_family: Callable[..., Path], tmp_path: Path
) -> None:
    config, tensors = load(save_family("qwen3_moe"))
    folder = save(tmp_path / "out", config, {"model-1.safetensors": tensors})
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": said}))
    with pytest.raises(CheckpointError, match=r"already quantized by ModelOpt as .*\(hf_quant_config.json\)"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("end", "tool"),
    [("qweight", "GPTQ or AWQ"), ("weight.absmax", "bitsandbytes"), ("W_q", "HQQ"), ("weight_qdata", "torchao")],
)
def test_tensors_alone_tell_of_a_tool(end: str, tool: str, save_family: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_tensors(tmp_path / "out", save_family("qwen3_moe"), {f"{GATE}.{end}": torch.ones(2)})
    with pytest.raises(CheckpointError, match=f"already quantized by {tool} \\(the tensor {GATE}"):
        open_checkpoint(folder)


def test_codes_that_nothing_tells_of_ask_for_the_config(modelopt: Pair, tmp_path: Path) -> None:
    config, tensors = load(modelopt.coded)
    with pytest.raises(CheckpointError, match=r"neither config.json nor hf_quant_config.json says"):
        open_checkpoint(save(tmp_path / "out", config, {"model-1.safetensors": tensors}))


@pytest.mark.parametrize("said", [["NVFP4"], "NVFP4", 4])
@pytest.mark.parametrize("where", ["hf_quant_config.json", "text_config", "config_groups"])
def test_words_of_quantization_of_another_type_are_errors(
    said: object, where: str, save_family: Callable[..., Path], tmp_path: Path
) -> None:
    config, tensors = load(save_family("qwen3_moe"))
    more: dict[str, Any] = {
        "hf_quant_config.json": {},
        "text_config": {"text_config": {"quantization_config": said}},
        "config_groups": {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": said}},
    }[where]
    folder = save(tmp_path / "out", config | more, {"model-1.safetensors": tensors})
    if where == "hf_quant_config.json":
        (folder / where).write_text(json.dumps({"quantization": said}))
    with pytest.raises(AlphaQError, match="is not an object"):
        open_checkpoint(folder)
