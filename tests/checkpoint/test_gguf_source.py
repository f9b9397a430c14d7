import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from alphaq.calibration.stream import stream_forward
from alphaq.calibration.tokens import random_windows
from alphaq.checkpoint.gguf.format import read_gguf
from alphaq.checkpoint.gguf.imatrix import ImportanceMatrix
from alphaq.checkpoint.gguf.source import open_gguf
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.engines.gguf.importance import importance_of
from alphaq.errors import CheckpointError
from conftest import COMMON, Ran, random_model

# What llama.cpp's converter writes for each family, by the gguf package's own names.
ARCHITECTURES = {
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
}
# llama.cpp runs qwen3moe with these whatever a config says.
OVERRIDES: dict[str, dict[str, Any]] = {"qwen3_moe": dict(mlp_only_layers=[], norm_topk_prob=True)}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A bf16 Hugging Face folder of a family as llama.cpp can run it, saved once."""
    saved: dict[str, Path] = {}

    def save(family: str) -> Path:
        if family not in saved:
            saved[family] = tmp_path_factory.mktemp(family)
            model = random_model(family, **OVERRIDES.get(family, {})).bfloat16()
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter)
            model.save_pretrained(saved[family], save_original_format=True)
        return saved[family]

    return save


def weights(folder: Path) -> Tensors:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def stacked(tensors: Tensors) -> Tensors:
    """Experts of a layer as one tensor, under the names that the gguf package knows them by."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        expert = re.search(r"(?<=\.experts)\.\d+", name)
        if expert is None:
            found[name] = tensor
        else:
            whole = re.sub(r"\.experts\.\d+", ".experts", name)
            whole = re.sub(r"model\.(.*)block_sparse_moe\.experts", r"\1feed_forward.experts", whole)
            found.setdefault(whole, {})[int(expert[0][1:])] = tensor
    return {
        name: torch.stack([value[number] for number in sorted(value)]) if isinstance(value, dict) else value
        for name, value in found.items()
    }


def permuted(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """As llama.cpp's converter does (LlamaModel.permute)."""
    return tensor.reshape(heads, 2, len(tensor) // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)


def write_gguf(
    folder: Path,
    path: Path,
    type: str = "BF16",
    fused: bool = False,
    flat: bool = False,
    tied: bool = False,
    **split: Any,
) -> Path:
    """A folder's model as llama.cpp's converter would write it."""
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], **split)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if arch is gguf.MODEL_ARCH.LLAMA:
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_token_list(["<a>", "b", "c"])
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    tensors = {names.get_name(name, (".weight", ".bias")): tensor for name, tensor in stacked(weights(folder)).items()}
    for name, tensor in list(tensors.items()):
        if arch is gguf.MODEL_ARCH.LLAMA and (found := re.search(r"attn_([qk])\.", name)):
            tensors[name] = permuted(
                tensor, config["num_attention_heads" if found[1] == "q" else "num_key_value_heads"]
            )
        if fused and "ffn_gate_exps" in name:
            up = tensors.pop(name.replace("gate", "up"))
            tensors[name.replace("gate", "gate_up")] = torch.cat([tensors.pop(name), up], 1)
    for name, tensor in tensors.items():
        if tied and name == "output.weight":
            continue
        if flat and "ffn_gate_inp_shexp" in name:
            tensor = tensor[0]
        kept = tensor.ndim == 1 or "norm" in name or "gate_inp" in name
        kind = gguf.GGMLQuantizationType["F32" if kept else type]
        values = tensor.float().numpy()
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_all(checkpoint: Checkpoint) -> Tensors:
    return {name: checkpoint.tensor(name) for name in checkpoint.shard_of}


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].float(), tensor.float()), name


every_family = pytest.mark.parametrize("family", list(ARCHITECTURES))


@every_family
def test_values_under_their_hugging_face_names_are_the_model_s(
    family: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = family_folder(family)
    checkpoint = open_checkpoint(write_gguf(folder, tmp_path / "x.gguf"))
    assert_same(read_all(checkpoint), weights(folder))
    original = open_checkpoint(folder)
    assert {matrix.name: matrix.shape for matrix in checkpoint.matrices} == {m.name: m.shape for m in original.matrices}
    for matrix in checkpoint.matrices:
        whole = checkpoint.tensor(matrix.name)
        assert torch.equal(checkpoint.read(matrix), whole)
        part = slice(len(whole) // 3, 2 * len(whole) // 3 + 1)
        assert torch.equal(checkpoint.read_rows(matrix, part), whole[part])


@every_family
def test_the_config_makes_the_same_model(family: str, family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = family_folder(family)
    checkpoint = open_checkpoint(write_gguf(folder, tmp_path / "x.gguf"))
    ids = random_windows(128, 2, 8)
    found, expected = (stream_forward(one, ids, lambda traffic: None) for one in (checkpoint, open_checkpoint(folder)))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param(family, method, marks=() if method == "alphaq" or family == "qwen2_moe" else pytest.mark.slow)
        for family in ARCHITECTURES
        for method in ("alphaq", "auto")
    ],
)
def test_plan_is_that_of_the_folder_with_the_same_weights(
    family: str, method: str, family_folder: Callable[[str], Path], tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    folder = family_folder(family)
    plans = []
    for model in (folder, write_gguf(folder, tmp_path / "x.gguf")):
        out = tmp_path / "plan.json"
        ran = alphaq("plan", model, "--bits", 3, "--method", method, "--output", out)
        assert ran.code == 0, ran.err
        plans.append(json.loads(out.read_text()))
        out.unlink()
    for key in ("choices", "table"):
        assert plans[0][key] == plans[1][key]


def test_fused_gate_and_up_come_apart(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = family_folder("qwen2_moe")
    checkpoint = open_checkpoint(write_gguf(folder, tmp_path / "x.gguf", fused=True))
    assert_same(read_all(checkpoint), weights(folder))
    origin = checkpoint.gguf_tensor("model.layers.1.mlp.experts.3.up_proj.weight")
    assert (origin.name, origin.type) == ("blk.1.ffn_gate_up_exps.weight", "BF16")


def test_a_merged_file_takes_the_importance_matrix_that_was_made_of_it(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(write_gguf(family_folder("qwen2_moe"), tmp_path / "x.gguf", fused=True))
    rows = np.arange(4 * 64, dtype=np.float32).reshape(4, 64)
    entries = {f"blk.{layer}.ffn_gate_up_exps.weight": rows + layer for layer in range(3)}
    found = importance_of(checkpoint, ImportanceMatrix("i.gguf", "", entries))
    for part in ("gate", "up"):
        assert np.array_equal(found.columns[f"model.layers.2.mlp.experts.3.{part}_proj.weight"], rows[3] + 2)
    assert found.missing[:3] == tuple(f"blk.{layer}.ffn_down_exps.weight" for layer in range(3))


def test_a_router_of_one_row_may_be_a_vector(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = family_folder("qwen2_moe")
    path = write_gguf(folder, tmp_path / "x.gguf", flat=True)
    assert_same(read_all(open_checkpoint(path)), weights(folder))


@pytest.mark.parametrize("type", ["F16", "F32", "Q8_0"])
def test_other_types_are_read_as_the_gguf_package_does(
    type: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(write_gguf(family_folder("mixtral"), tmp_path / "x.gguf", type))
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    heads = {"q_proj": COMMON["num_attention_heads"], "k_proj": COMMON["num_key_value_heads"]}
    for matrix in checkpoint.matrices:
        stored = theirs[checkpoint.gguf_tensor(matrix.name).name]
        expected = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
        if matrix.expert is not None:
            expected = expected[matrix.expert]
        found = checkpoint.read(matrix).float()
        assert torch.equal(checkpoint.read_rows(matrix, slice(1, 4)).float(), found[1:4])
        assert torch.equal(permuted(found, heads[matrix.projection]) if matrix.projection in heads else found, expected)


def test_a_split_model_is_one_checkpoint(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = family_folder("olmoe")
    write_gguf(folder, tmp_path / "x.gguf", split_max_tensors=9)
    assert len(list(tmp_path.glob("*.gguf"))) > 2
    checkpoint = open_checkpoint(tmp_path)
    assert_same(read_all(checkpoint), weights(folder))
    assert len(checkpoint.shards) == len(list(tmp_path.glob("*.gguf")))
    assert checkpoint.name == "x"


def test_tied_embeddings_are_those_without_an_output_matrix(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    path = write_gguf(family_folder("qwen3_moe"), tmp_path / "x.gguf", tied=True)
    assert open_checkpoint(path).config["tie_word_embeddings"] is True


def test_metadata_and_origins_stay_at_hand(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(family_folder("qwen2_moe"), tmp_path / "x.gguf"))
    assert checkpoint.gguf is not None
    assert checkpoint.gguf.metadata["tokenizer.ggml.tokens"].value == ("<a>", "b", "c")
    assert checkpoint.gguf_tensor("model.norm.weight").type == "F32"
    assert checkpoint.name == "x"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert checkpoint.side_files() == []


def test_settings_are_the_metadata(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    path = write_gguf(family_folder("qwen2_moe"), tmp_path / "x.gguf")
    before = open_checkpoint(path)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"<a>", b"<z>"))
    after = open_checkpoint(path)
    assert before.settings_digest() != after.settings_digest()
    assert before.fingerprint != after.fingerprint


def test_a_folder_with_several_models_asks_which(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    path = write_gguf(family_folder("olmoe"), tmp_path / "x.gguf")
    assert open_checkpoint(tmp_path).name == "x"
    shutil.copy(path, tmp_path / "y.gguf")
    with pytest.raises(CheckpointError, match=r"holds 2 models, x\.gguf among them"):
        open_checkpoint(tmp_path)


def write_small(path: Path, arch: str, tensors: dict[str, tuple[tuple[int, ...], str]], **metadata: Any) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        writer.add_uint32(f"{arch}.{key.replace('__', '.')}", value)
    for name, (shape, type) in tensors.items():
        kind = gguf.GGMLQuantizationType[type]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor(name, np.zeros((*shape[:-1], shape[-1] // block * size), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


OLMOE = dict(
    block_count=1,
    context_length=64,
    embedding_length=32,
    feed_forward_length=32,
    attention__head_count=2,
    attention__layer_norm_rms_epsilon=0,
    expert_count=4,
    expert_used_count=2,
)


@pytest.mark.parametrize(
    ("arch", "tensors", "message"),
    [
        ("clip-without-block_count", {}, "clip.block_count is no count of layers"),
        ("olmoe", {"output.weight": ((4, 256), "Q4_K")}, "output.weight is already quantized to Q4_K"),
        ("olmoe", {"blk.0.ffn_up_exps.weight": ((3, 4, 4), "F32")}, "unlike any in a olmoe model of 4 experts"),
        ("olmoe", {"blk.0.ffn_up_exps.weight": ((4, 4), "F32")}, "unlike any"),
        ("olmoe", {"blk.0.ffn_gate_up_exps.weight": ((4, 3, 4), "F32")}, "unlike any"),
        ("olmoe", {"output_norm.weight": ((2, 2, 2), "F32")}, "unlike any"),
        ("olmoe", {"output_norm.weight": ((4,), "F32")}, "Found 0 expert matrices"),
        ("llama", {"blk.0.attn_q.weight": ((6, 4), "F32")}, r"shape \[6, 4\] has no 2 heads of two halves"),
        (
            "olmoe",
            {"blk.0.ffn_up_exps.weight": ((4, 2, 4), "F32"), "blk.0.ffn_gate_up_exps.weight": ((4, 4, 4), "F32")},
            "are the same",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, arch: str, tensors: Any, message: str) -> None:
    arch, _, without = arch.partition("-without-")
    metadata = {key: value for key, value in OLMOE.items() if not without or without not in key}
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(write_small(tmp_path / "x.gguf", arch, tensors, **metadata))
    assert "\n" not in str(caught.value)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_damage_gives_a_checkpoint_or_a_typed_error(
    family_folder: Callable[[str], Path], tmp_path: Path, data: st.DataObject
) -> None:
    whole = tmp_path / "whole.gguf"
    if not whole.exists():
        write_gguf(family_folder("mixtral"), whole)
    raw = bytearray(whole.read_bytes())
    header = min(tensor.begin for tensor in read_gguf(whole).tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(24, header - 8))
        width = data.draw(st.sampled_from([1, 4]))
        raw[place : place + width] = data.draw(st.sampled_from([b"\0", b"\1", b"\xff"])) * width
    (tmp_path / "fuzz.gguf").write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        open_checkpoint(tmp_path / "fuzz.gguf")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.gguf cannot be read: No such file"):
        open_checkpoint(tmp_path / "none.gguf")


def test_a_file_of_an_unknown_architecture_must_hold_layers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no count of layers"):
        open_gguf(write_small(tmp_path / "x.gguf", "deepseek2", {}))
