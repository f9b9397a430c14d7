"""GGUF files of models without experts, opened as checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alphaq import pipeline
from alphaq.calibration.stream import stream_forward
from alphaq.calibration.tokens import random_windows
from alphaq.checkpoint.families.architecture import architectures
from alphaq.checkpoint.gguf.format import layout, read_gguf
from alphaq.checkpoint.gguf.rope import FACTORS_TENSOR, llama3_factors, llama3_settings
from alphaq.checkpoint.gguf.values import GgufValue
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.errors import CheckpointError
from alphaq.nouns.plan import Plan
from conftest import Ran
from dense_models import DENSE, FLIPS, LLAMA3, YARN, save_dense

gguf = pytest.importorskip("gguf")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in DENSE},
    "llama-biases": ("llama", dict(attention_bias=True, head_dim=24)),
    "llama-llama3": ("llama", dict(rope_parameters=LLAMA3 | dict(original_max_position_embeddings=8192))),
    "qwen3-yarn": ("qwen3", dict(rope_parameters=YARN)),
    "gemma3-linear": ("gemma3_text", FLIPS["gemma3_text"]["linear"].settings),
    "gemma3-untied": ("gemma3_text", dict(tie_word_embeddings=False)),
}


def written(source: Path, out: Path) -> Path:
    """A folder's model as a GGUF file in 16 bits; other tests compare such files with llama.cpp's converter."""
    checkpoint = open_checkpoint(source)
    plan = Plan(engine="llama.cpp", choices={matrix.name: "16" for matrix in checkpoint.planned})
    pipeline.quantize(checkpoint, plan, out)
    return out / "model.gguf"


@pytest.mark.parametrize("case", CASES)
def test_a_dense_file_is_the_model_that_it_was_made_of(case: str, tmp_path: Path) -> None:
    family, settings = CASES[case]
    folder = open_checkpoint(save_dense(tmp_path / "model", family, **settings))
    file = open_checkpoint(written(folder.folder, tmp_path / "out"))
    for name in folder.shard_of:
        assert torch.allclose(file.tensor(name).float(), folder.tensor(name).float(), rtol=0, atol=1e-6), name
    for matrix in file.matrices:
        part = slice(len(file.tensor(matrix.name)) // 3, len(file.tensor(matrix.name)) // 2)
        assert torch.equal(file.read_rows(matrix, part), folder.tensor(matrix.name)[part])
    assert {one.name: one.role for one in file.matrices} == {one.name: one.role for one in folder.matrices}
    ids = random_windows(300, 2, 12)
    found, expected = (stream_forward(one, ids, lambda traffic: None) for one in (file, folder))
    assert torch.allclose(found, expected, atol=1e-5)
    again = written(tmp_path / "out" / "model.gguf", tmp_path / "again")
    assert again.read_bytes() == (tmp_path / "out" / "model.gguf").read_bytes()


@pytest.mark.parametrize("engine", ["native", "llama.cpp"])
def test_plans_of_folder_and_file_are_equal_and_no_word_is_of_experts(
    engine: str, tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    folder = save_dense(tmp_path / "model", "llama", hidden_size=64)
    file = written(folder, tmp_path / "out")
    choices = "Q4_0,Q8_0,Q5_0" if engine == "llama.cpp" else "2g32,3g32,4g32"
    plans, words = [], []
    for model in (folder, file):
        ran = alphaq("plan", model, "--bits", 4, "--choices", choices, "--engine", engine, "-o", tmp_path / "plan.json")
        assert ran.code == 0, ran.err
        plans.append(Plan.from_json((tmp_path / "plan.json").read_bytes(), "plan"))
        (tmp_path / "plan.json").unlink()
        words += [ran.out, alphaq("inspect", model).out]
    assert plans[0].choices == plans[1].choices
    assert "expert" not in "".join(words)
    assert "layer (across)" in words[0]


def rewritten(path: Path, out: Path, change: Callable[[dict[str, GgufValue], dict[str, Any]], None]) -> Path:
    """A GGUF file with other metadata or values."""
    tensors = gguf.GGUFReader(path).tensors
    values = {one.name: gguf.quants.dequantize(one.data, one.tensor_type).astype("float32") for one in tensors}
    metadata = dict(read_gguf(path).metadata)
    change(metadata, values)
    header, places, nbytes = layout(metadata, {name: ("F32", one.shape) for name, one in values.items()})
    data = bytearray(nbytes)
    data[: len(header)] = header
    for name, place in places.items():
        data[place.begin : place.end] = values[name].tobytes()
    out.write_bytes(data)
    return out


BY_NAMES = "Until then it is read by names alone, for llama.cpp only"


def test_rotary_factors_of_another_kind_are_read_by_names(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(
        written(save_dense(tmp_path / "model", "llama", rope_parameters=LLAMA3), tmp_path / "out")
    )
    (said,) = checkpoint.notes
    assert "rope_freqs.weight holds rotary factors that are not Llama 3's usual" in said and said.endswith(BY_NAMES)
    assert checkpoint.plain and len(checkpoint.planned) == 6


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("attention.head_count_kv", GgufValue.array("int32", [2, 1]), "head_count_kv differs by layer"),
        ("rope.scaling.type", GgufValue.of("string", "longrope"), "rope.scaling.type is 'longrope'; readable: "),
        ("attention.value_length", GgufValue.of("uint32", 8), "value_length is 8, but another key says that head_dim"),
        ("feed_forward_length", None, "lacks qwen3.feed_forward_length"),
    ],
)
def test_settings_that_no_config_of_the_family_says_are_read_by_names(
    key: str, value: GgufValue | None, said: str, tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    def change(metadata: dict[str, GgufValue], _: object) -> None:
        metadata.pop(f"qwen3.{key}", None)
        metadata.update({} if value is None else {f"qwen3.{key}": value})

    whole = written(save_dense(tmp_path / "model", "qwen3"), tmp_path / "out")
    file = rewritten(whole, tmp_path / "x.gguf", change)
    ran = alphaq("plan", file, "--engine", "llama.cpp", "--method", "distortion", "--bits", 5, "--choices", "Q4_0,Q8_0")
    assert ran.code == 0 and said in " ".join(ran.err.split()) and BY_NAMES in " ".join(ran.err.split()), ran.err
    ran = alphaq("plan", file, "--bits", 5, "--method", "alphaq")
    assert ran.code == 2 and "native cannot take it" in " ".join(ran.err.split())


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_usual_rotary_factors_are_told_from_their_values(factor: float) -> None:
    rope = dict(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    factors = llama3_factors(rope | dict(rope_theta=500_000.0), 128)
    assert llama3_settings(factors, 500_000.0) == rope | dict(rope_type="llama3", rope_theta=500_000.0)
    factors[20] *= 1.01
    assert llama3_settings(factors, 500_000.0) is None


def test_rotary_factors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = LLAMA3 | dict(rope_theta=500_000.0, original_max_position_embeddings=8192)
    config = LlamaConfig(head_dim=128, rope_parameters=rope, max_position_embeddings=131072)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500_000.0 ** (torch.arange(0, 128, 2) / 128)
    assert torch.allclose(plain / llama3_factors(rope, 128), frequencies, rtol=1e-5)


def test_a_file_without_a_count_of_layers_is_refused_without_a_word_of_experts(tmp_path: Path) -> None:
    file = written(save_dense(tmp_path / "model", "llama"), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"llama\.block_count is no count of layers") as caught:
        open_checkpoint(rewritten(file, tmp_path / "x.gguf", lambda metadata, _: metadata.pop("llama.block_count")))
    assert "xpert" not in str(caught.value)


@pytest.mark.parametrize("key", ["attn_logit_softcapping", "attention.sliding_window"])
def test_a_file_that_leaves_a_setting_to_llama_cpp_is_read_by_names(key: str, tmp_path: Path) -> None:
    file = written(save_dense(tmp_path / "model", "gemma2"), tmp_path / "out")
    checkpoint = open_checkpoint(
        rewritten(file, tmp_path / "x.gguf", lambda metadata, _: metadata.pop(f"gemma2.{key}"))
    )
    assert checkpoint.plain and f"lacks gemma2.{key}" in checkpoint.notes[0]


def test_one_name_of_llama_cpp_is_a_family_with_experts_or_without(tmp_path: Path) -> None:
    families = {one.name for one in architectures().values() if one.gguf and one.gguf.arch == "llama"}
    assert families == {"llama", "mistral", "mixtral"}
    file = written(save_dense(tmp_path / "model", "mistral"), tmp_path / "out")
    opened: Checkpoint = open_checkpoint(file)
    assert (opened.architecture.name, opened.config["model_type"]) == ("llama", "llama")
    assert FACTORS_TENSOR not in opened.shard_of
    count = GgufValue.of("uint32", 4)

    def sparse(metadata: dict[str, GgufValue], _: dict[str, Any]) -> None:
        metadata.update({"llama.expert_count": count, "llama.expert_used_count": count})

    # A dense MLP is in no table of a family with experts, so the file is read by its tensors' names alone.
    assert open_checkpoint(rewritten(file, tmp_path / "x.gguf", sparse)).plain
