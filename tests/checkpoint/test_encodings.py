"""FP8, MXFP4 and Q8_0 sources: the same values, matrices and analysis as the bf16 weights that they stand for."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from coded import Tensors, assert_same_values, changed, is_linear, load, save
from torch import Tensor

from alphaq import pipeline
from alphaq.calibration.stream import LayerTraffic, stream_forward
from alphaq.calibration.tokens import random_windows
from alphaq.checkpoint.encoded.encodings import decode
from alphaq.checkpoint.files import PlainFile
from alphaq.checkpoint.ranges import expect
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.checkpoint.summary import summarize
from alphaq.checkpoint.tensors import Encoding
from alphaq.errors import CheckpointError
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.nouns.plan import Plan
from conftest import COMMON, Ran, read_back
from runnable import byte_level, save_runnable, save_tokenizer

BLOCK = (24, 40)  # divides no side of the tiny models' matrices
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
GATE = "model.layers.1.mlp.experts.0.gate_proj.weight"
FUSED = "model.layers.0.mlp.experts.gate_up_proj"
STACKED = "model.layers.1.mlp.experts"


def expanded(scales: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A scale for every weight, element by element."""
    rows, columns = (torch.arange(side) // length for side, length in zip(shape[-2:], BLOCK, strict=True))
    return scales[..., rows[:, None], columns[None, :]].float()


def to_fp8(name: str, weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensors, Tensor]:
    """Codes and scales under their names, and what they stand for in bf16."""
    grid = [-(-side // length) for side, length in zip(weight.shape[-2:], BLOCK, strict=True)]
    scales = (torch.rand(*weight.shape[:-2], *grid, generator=torch.Generator().manual_seed(len(name))) + 0.5) * 3e-3
    scales = scales.to(scale_dtype)
    codes = (weight.float() / expanded(scales, tuple(weight.shape))).clamp(-448, 448).to(torch.float8_e4m3fn)
    decoded = (codes.float() * expanded(scales, tuple(weight.shape))).to(torch.bfloat16)
    return {name: codes, f"{name}_scale_inv": scales}, decoded


@pytest.fixture(scope="module")
def fp8_and_bf16(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny DeepSeek-V3 in FP8, and the same weights decoded in bf16; both with a tokenizer."""
    base = tmp_path_factory.mktemp("fp8")
    config, tensors = load(save_runnable(base / "source", "deepseek_v3"))
    codes, decoded = {}, dict(tensors)
    for name, value in tensors.items():
        if is_linear(name, value):
            stored, decoded[name] = to_fp8(name, value)
            codes.update(stored)
        else:
            codes[name] = value
    fp8 = save(base / "model-fp8", config | {"quantization_config": FP8}, {"model-1.safetensors": codes})
    bf16 = save(base / "model", config, {"model-1.safetensors": decoded})
    for folder in (fp8, bf16):
        save_tokenizer(folder, byte_level(), add_bos_token=False)
    return fp8, bf16


@pytest.fixture(scope="module")
def mxfp4_and_bf16(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny gpt-oss in MXFP4, and what transformers' own class saves of it in bf16."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    base = tmp_path_factory.mktemp("mxfp4")
    torch.manual_seed(0)
    sizes = {**COMMON, "num_hidden_layers": 2, "num_local_experts": 4, "head_dim": 16}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **sizes))
    codes: Tensors = {}
    for layer, block in enumerate(model.model.layers):
        for part in ("gate_up_proj", "down_proj"):
            experts, columns, rows = getattr(block.mlp.experts, part).shape
            blocks = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 124, blocks.shape[:-1], dtype=torch.uint8)
            name = f"model.layers.{layer}.mlp.experts.{part}"
            codes |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            getattr(block.mlp.experts, part).data = convert_moe_packed_tensors(blocks, scales)
    model.to(torch.bfloat16).save_pretrained(base / "saved")
    config, tensors = load(base / "saved")
    rest = {name: value for name, value in tensors.items() if f"{name}_blocks" not in codes}
    config |= {"quantization_config": MXFP4}
    return save(base / "model", config, {"model-1.safetensors": codes | rest}), base / "saved"


# -- values ---------------------------------------------------------------------------------------


def test_mxfp4_decodes_every_code_at_every_scale_as_transformers_does() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 255, 16, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).expand(1, 255, 16).contiguous()
    found = decode(Encoding("mxfp4", (1, 32)), blocks.view(255, -1), {"scales": scales[0]})
    expected = convert_moe_packed_tensors(blocks, scales)[0].T
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    assert torch.equal(torch.signbit(found), torch.signbit(expected))


def test_mxfp4_scale_that_is_no_number_decodes_to_none() -> None:
    codes, scales = torch.zeros(1, 16, dtype=torch.uint8), torch.full((1, 1), 255, dtype=torch.uint8)
    assert not decode(Encoding("mxfp4", (1, 32)), codes, {"scales": scales}).isfinite().any()


def test_q8_0_decodes_as_gguf_does() -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    values = np.random.default_rng(0).normal(size=(7, 96)).astype(np.float32) * 10.0 ** np.arange(-8, -1)[:, None]
    codes = quantize(values, GGMLQuantizationType.Q8_0)
    found = decode(Encoding("Q8_0", (1, 32)), torch.from_numpy(codes), {})
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(dequantize(codes, GGMLQuantizationType.Q8_0)))


def test_fp8_is_each_code_times_the_scale_of_its_block(fp8_and_bf16: tuple[Path, Path]) -> None:
    fp8, bf16 = map(open_checkpoint, fp8_and_bf16)
    assert all(side % length for side, length in zip(fp8.info(GATE).shape, BLOCK, strict=True))  # ragged at the edges
    assert fp8.info(GATE).encoding is not None
    assert_same_values(fp8, bf16)


def test_mxfp4_is_what_transformers_saves_in_bf16(mxfp4_and_bf16: tuple[Path, Path]) -> None:
    mxfp4, bf16 = map(open_checkpoint, mxfp4_and_bf16)
    assert mxfp4.info(FUSED).encoding is not None
    assert_same_values(mxfp4, bf16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_of_a_layer_s_fused_experts_with_scales_in_a_shard_of_their_own(
    save_family: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    config, tensors = load(save_family("deepseek_v3", fused=True))
    shards: dict[str, Tensors] = {"codes.safetensors": {}, "scales.safetensors": {}}
    decoded = dict(tensors)
    for name, value in tensors.items():
        stored, decoded[name] = to_fp8(name, value, dtype) if is_linear(name, value) else ({name: value}, value)
        for part, tensor in stored.items():
            shards["scales.safetensors" if part.endswith("_scale_inv") else "codes.safetensors"][part] = tensor
    fp8 = open_checkpoint(save(tmp_path / "fp8", config | {"quantization_config": FP8}, shards))
    assert fp8.info(f"{STACKED}.gate_up_proj").shape == (4, 64, 64)
    assert list(fp8.shards) == ["codes.safetensors"] and fp8.weight_files == list(shards)
    assert fp8.nbytes == sum(value.nbytes for tensors in shards.values() for value in tensors.values())
    assert_same_values(fp8, open_checkpoint(save(tmp_path / "bf16", config, {"model-1.safetensors": decoded})))


def test_rows_are_read_alone(fp8_and_bf16: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(fp8_and_bf16[0])
    matrix = next(matrix for matrix in checkpoint.matrices if matrix.name == GATE)
    whole = checkpoint.read(matrix)
    asked: list[int] = []
    read = PlainFile.read
    monkeypatch.setattr(
        PlainFile, "read", lambda file, begin, n, *memory: asked.append(n) or read(file, begin, n, *memory)
    )
    for start, stop in [(0, 32), (5, 6), (23, 25), (24, 32), (30, 32)]:
        asked.clear()
        assert torch.equal(checkpoint.read_rows(matrix, slice(start, stop)), whole[start:stop])
        blocks = -(-stop // BLOCK[0]) - start // BLOCK[0]
        assert asked == [(stop - start) * 64, blocks * 2 * 4]


def test_one_expert_is_read_without_the_others(
    mxfp4_and_bf16: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(mxfp4_and_bf16[0])
    matrix = next(matrix for matrix in checkpoint.matrices if matrix.tensor == FUSED and matrix.expert == 2)
    asked: list[int] = []
    read = PlainFile.read
    monkeypatch.setattr(
        PlainFile, "read", lambda file, begin, n, *memory: asked.append(n) or read(file, begin, n, *memory)
    )
    checkpoint.read(matrix)
    assert asked == [matrix.parameters // 2, matrix.parameters // 32]
    assert checkpoint.place(matrix) == (checkpoint.info(FUSED).begin + 2 * asked[0], asked[0])
    assert checkpoint.stored_bytes(matrix) == sum(asked)
    assert torch.equal(checkpoint.read_rows(matrix, slice(3, 9)), checkpoint.read(matrix)[3:9])
    expect(checkpoint, matrix)


def test_rows_of_a_matrix_stored_as_columns_are_its_rows(mxfp4_and_bf16: tuple[Path, Path]) -> None:
    mxfp4, bf16 = map(open_checkpoint, mxfp4_and_bf16)
    for left, right in zip(mxfp4.with_role(Role.EXPERT), bf16.with_role(Role.EXPERT), strict=True):
        assert left == right
        assert torch.equal(bf16.read_rows(right, slice(3, 9)), mxfp4.read_rows(left, slice(3, 9)))


# -- commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", ["fp8_and_bf16", "mxfp4_and_bf16"])
def test_analysis_and_plan_are_those_of_the_decoded_weights(
    pair: str, request: pytest.FixtureRequest, alphaq: Callable[..., Ran], tmp_path: Path
) -> None:
    encoded, bf16 = request.getfixturevalue(pair)
    stats, choices = [], []
    for number, folder in enumerate((encoded, bf16)):
        csv, plan = tmp_path / f"{number}.csv", tmp_path / f"{number}.json"
        assert alphaq("analyze", folder, "-o", csv).code == 0
        assert alphaq("plan", folder, "--bits", "2.5", "--method", "alphaq", "-o", plan).code == 0
        stats.append(sorted(csv.read_text().splitlines()))
        choices.append({key: json.loads(plan.read_text())[key] for key in ("choices", "alpha", "size_bytes")})
    assert stats[0] == stats[1] and len(stats[0]) > 10
    assert choices[0] == choices[1]


@pytest.mark.parametrize(("engine", "choice"), [("native", "3g32"), ("llama.cpp", "Q4_0")])
def test_files_for_an_engine_hold_the_decoded_weights(
    engine: str, choice: str, fp8_and_bf16: tuple[Path, Path], tmp_path: Path
) -> None:
    written = []
    for folder in fp8_and_bf16:
        source, out = open_checkpoint(folder), tmp_path / folder.name
        choices = {matrix.name: choice for matrix in source.with_role(Role.EXPERT)}
        pipeline.quantize(source, Plan(engine=engine, choices=choices), out)
        assert pipeline.verify(out).tensors == pipeline.verify(out, source).tensors
        written.append(read_back(out, source))
    fp8, bf16 = written
    assert fp8.keys() == bf16.keys()
    for name, values in fp8.items():
        assert values.dtype == bf16[name].dtype and torch.equal(values, bf16[name]), name


def test_summary_counts_weights_and_names_what_they_are_stored_as(
    fp8_and_bf16: tuple[Path, Path], mxfp4_and_bf16: tuple[Path, Path]
) -> None:
    for (encoded, bf16), stored in ((fp8_and_bf16, "F8_E4M3"), (mxfp4_and_bf16, "MXFP4")):
        found, expected = summarize(open_checkpoint(encoded)), summarize(open_checkpoint(bf16))
        assert found.parameters == expected.parameters
        assert found.dtypes == sorted({*expected.dtypes, stored})
        assert found.bytes == sum(value.nbytes for value in load(encoded)[1].values())
        assert found.bytes == sum(role.bytes for role in found.roles.values())


def test_config_is_that_of_an_ordinary_model(fp8_and_bf16: tuple[Path, Path]) -> None:
    fp8, bf16 = map(open_checkpoint, fp8_and_bf16)
    assert fp8.config == bf16.config and "quantization_config" not in fp8.config


def test_streamed_pass_sees_the_decoded_weights(fp8_and_bf16: tuple[Path, Path]) -> None:
    seen: list[list[LayerTraffic]] = [[], []]
    ids = random_windows(COMMON["vocab_size"], windows=2, length=16)
    for folder, found in zip(fp8_and_bf16, seen, strict=True):
        stream_forward(open_checkpoint(folder), ids, found.append)
    for left, right in zip(*seen, strict=True):
        assert torch.equal(left.inputs, right.inputs) and torch.equal(left.experts, right.experts)


def test_gpt_oss_experts_are_matrices_and_their_biases_are_not(mxfp4_and_bf16: tuple[Path, Path]) -> None:
    checkpoint = open_checkpoint(mxfp4_and_bf16[0])
    experts: list[MatrixRef] = checkpoint.with_role(Role.EXPERT)
    assert {(m.projection, m.shape) for m in experts} == {("gate_up", (192, 64)), ("down", (64, 96))}
    assert len(experts) == 2 * 4 * 2
    assert checkpoint.roles[f"{FUSED}_bias"] is Role.OTHER
    assert not any("bias" in matrix.name for matrix in checkpoint.matrices)
    assert len(checkpoint.with_role(Role.ROUTER)) == 2


def test_gpt_oss_passes_see_the_same_through_mxfp4(mxfp4_and_bf16: tuple[Path, Path]) -> None:
    ids = random_windows(64, windows=1, length=16)
    states = [stream_forward(open_checkpoint(folder), ids, lambda traffic: None) for folder in mxfp4_and_bf16]
    assert torch.equal(*states)


def test_encoded_checkpoint_travels_to_workers(fp8_and_bf16: tuple[Path, Path]) -> None:
    checkpoint = open_checkpoint(fp8_and_bf16[0])
    there = pickle.loads(pickle.dumps(checkpoint))
    assert torch.equal(there.tensor(GATE), checkpoint.tensor(GATE))


# -- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{GATE}_scale_inv"), rf"{GATE} has no scales: .*Complete the download"),
        (lambda t: t.pop(GATE), rf"{GATE}_scale_inv are scales, but {GATE} is not there"),
        (lambda t: t.update({GATE: t[GATE].float()}), r"is not there as fp8"),
        (lambda t: t.update({f"{GATE}_scale_inv": torch.ones(2, 3)}), r"is F32 \[2, 3\], but .* needs .*\[2, 2\]"),
        (lambda t: t.update({f"{GATE}_scale_inv": torch.ones(())}), r"is F32 \[\], but .* needs .*\[2, 2\]"),
        (lambda t: t.update({f"{GATE}_scale_inv": torch.ones(2, 2).int()}), r"is I32 .* needs F32 or BF16 or F16"),
        (lambda t: t.update({GATE: t[GATE][0]}), r"is F8_E4M3 \[64\], not a matrix"),
        (lambda t: t.update({GATE: t[GATE][:0]}), r"is F8_E4M3 \[0, 64\], not a matrix"),
        (lambda t: t.update({GATE.replace("weight", "weight_scale"): torch.ones(1)}), r"are scales of the same weight"),
    ],
)
def test_damaged_or_other_fp8_is_refused(
    fp8_and_bf16: tuple[Path, Path], tmp_path: Path, change: Callable[[Tensors], object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(changed(fp8_and_bf16[0], tmp_path / "out", change))


@pytest.mark.parametrize("block", [128, [128], [0, 128], [True, 1], [128.0, 128], [-1, 1], [2**40, 1]])
def test_fp8_in_blocks_of_no_size_is_refused(fp8_and_bf16: tuple[Path, Path], tmp_path: Path, block: object) -> None:
    with pytest.raises(CheckpointError, match=r"weight_block_size is .* 16-bit"):
        open_checkpoint(changed(fp8_and_bf16[0], tmp_path / "out", lambda tensors: None, weight_block_size=block))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{FUSED}_scales"), rf"{FUSED}_blocks has no scales: .*Complete the download"),
        (lambda t: t.pop(f"{FUSED}_blocks"), rf"{FUSED}_scales are scales, but {FUSED}_blocks is not there as mxfp4"),
        (lambda t: t.update({FUSED: torch.zeros(4, 64, 192)}), rf"{FUSED} is stored twice"),
        (lambda t: t.update({f"{FUSED}_scales": t[f"{FUSED}_scales"][:3]}), r"is U8 \[3, 192, 2\], but"),
        (lambda t: t.update({f"{FUSED}_scales": t[f"{FUSED}_scales"].float()}), r"is F32 .* needs U8"),
        (lambda t: t.update({f"{FUSED}_blocks": t[f"{FUSED}_blocks"].flatten(2)}), r"not U8 \[experts, rows,"),
    ],
)
def test_damaged_mxfp4_is_refused(
    mxfp4_and_bf16: tuple[Path, Path], tmp_path: Path, change: Callable[[Tensors], object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(changed(mxfp4_and_bf16[0], tmp_path / "out", change))


def test_fp8_whose_scales_have_other_blocks_than_the_config_names_is_refused(
    fp8_and_bf16: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = changed(fp8_and_bf16[0], tmp_path / "out", lambda tensors: None, weight_block_size=None)
    with pytest.raises(CheckpointError, match=r"_scale_inv is F32 .*needs F32 .* or \[\] or \[1\]"):
        open_checkpoint(folder)


@pytest.mark.parametrize("method", ["gptq", None, ["fp8"]])
def test_other_quantized_sources_are_still_refused(
    fp8_and_bf16: tuple[Path, Path], tmp_path: Path, method: object
) -> None:
    folder = changed(fp8_and_bf16[0], tmp_path / "out", lambda tensors: None, quant_method=method)
    with pytest.raises(CheckpointError, match=r"already quantized by .*16-bit.* FP8, MXFP4, NVFP4"):
        open_checkpoint(folder)


def test_fp8_codes_alone_are_no_weights(fp8_and_bf16: tuple[Path, Path], tmp_path: Path) -> None:
    config, tensors = load(fp8_and_bf16[0])
    del config["quantization_config"]
    codes = {name: value for name, value in tensors.items() if not name.endswith("_scale_inv")}
    with pytest.raises(CheckpointError, match=r"is stored as F8_E4M3; readable: .* Restore config.json, whose"):
        open_checkpoint(save(tmp_path / "out", config, {"model-1.safetensors": codes}))


def test_native_copy_of_mxfp4_loads_with_the_restored_logits(mxfp4_and_bf16: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import alphaq  # noqa: F401 - registers the plug-in
    from alphaq.nouns.choice import Choice
    from alphaq.nouns.plan import Plan

    source = open_checkpoint(mxfp4_and_bf16[0])
    choices = {matrix.name: str(Choice(5, 32)) for matrix in source.with_role(Role.EXPERT)}
    pipeline.quantize(source, Plan(choices=choices), tmp_path / "out")
    loaded, expected = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (tmp_path / "out", mxfp4_and_bf16[1])
    )
    with torch.no_grad():
        for name, values in read_back(tmp_path / "out", source).items():
            if ".experts." in name and values.ndim == 2 and "bias" not in name:
                layer, expert, part = re.findall(r"layers\.(\d+).*experts\.(\d+)\.(\w+)\.", name)[0]
                experts = expected.model.layers[int(layer)].mlp.experts
                getattr(experts, part)[int(expert)] = values.T
        ids = torch.randint(0, 128, (1, 16), generator=torch.Generator().manual_seed(0))
        assert float((loaded(ids).logits - expected(ids).logits).abs().max()) < 1e-4
