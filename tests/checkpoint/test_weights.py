"""What a folder holds is what transformers loads of it, in every command; two truths are told or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaq.checkpoint.reader import open_checkpoint
from alphaq.checkpoint.weights import INDEX_NAME, SINGLE_NAME, read_weights, weight_files
from alphaq.errors import CheckpointError
from alphaq.runtime import loading
from conftest import Ran

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
OWN = "own.safetensors"


def put(path: Path, **tensors: Any) -> None:
    """A weight file of vectors."""
    path.parent.mkdir(exist_ok=True)
    save_file({name: torch.tensor(values).float() for name, values in tensors.items()}, path, metadata={"format": "pt"})


def put_index(path: Path, places: Mapping[str, str]) -> None:
    path.write_text(json.dumps({"metadata": {}, "weight_map": dict(places)}))


def sharded(folder: Path, index: str = INDEX_NAME) -> None:
    """Two shards and their index."""
    put(folder / SHARDS[0], a=[1], b=[2])
    put(folder / SHARDS[1], c=[3])
    put_index(folder / index, {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]})


def configured(folder: Path, **settings: Any) -> None:
    (folder / "config.json").write_text(json.dumps(settings))


def published(folder: Path) -> None:
    """Shards, and the same in other formats."""
    sharded(folder)
    put(folder / "consolidated.safetensors", a=[1])
    put(folder / "original" / SINGLE_NAME, a=[1])
    put(folder / "model.fp16.safetensors", a=[1])
    put(folder / "model.fp16-00001-of-00002.safetensors", a=[1])


def saved_as_one_after(folder: Path) -> None:
    put(folder / SINGLE_NAME, a=[1])
    put_index(folder / INDEX_NAME, {"a": SHARDS[0]})


def saved_in_shards_after(folder: Path) -> None:
    put(folder / SINGLE_NAME, a=[7])
    sharded(folder)


def with_an_index_of_one(folder: Path) -> None:
    put(folder / SINGLE_NAME, a=[1])
    put_index(folder / INDEX_NAME, {"a": SINGLE_NAME})


def with_another_shard(folder: Path) -> None:
    sharded(folder)
    put(folder / "model-00003-of-00003.safetensors", d=[1])


def named_file(folder: Path) -> None:
    sharded(folder)
    put(folder / OWN, a=[1])
    configured(folder, transformers_weights=OWN)


def named_index(folder: Path) -> None:
    sharded(folder, "own.safetensors.index.json")
    put(folder / SINGLE_NAME, a=[1])
    configured(folder, transformers_weights="own.safetensors.index.json")


FOLDERS: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "single": (lambda folder: put(folder / SINGLE_NAME, a=[1]), None),
    "shards": (sharded, None),
    "published": (published, None),
    "left-over index": (saved_as_one_after, INDEX_NAME),
    "left-over single file": (saved_in_shards_after, SHARDS[0]),
    "index of a single file": (with_an_index_of_one, None),
    "left-over shard": (with_another_shard, "model-00003-of-00003.safetensors"),
    "named file": (named_file, SHARDS[0]),
    "named index": (named_index, SINGLE_NAME),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_files_are_those_of_transformers_and_what_is_left_is_told(kind: str, tmp_path: Path) -> None:
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    make, left = FOLDERS[kind]
    make(tmp_path)
    named = (
        json.loads((tmp_path / "config.json").read_text())["transformers_weights"] if kind.startswith("named") else None
    )
    theirs, _ = _get_resolved_checkpoint_files(tmp_path, None, None, True, None, False, named)
    found = weight_files(tmp_path)
    assert theirs is not None
    assert sorted(found.names) == sorted(Path(path).name for path in theirs)
    if left is None:
        assert found.notes() == ()
    else:
        assert left in found.left and len(found.notes()) == 1


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_weights(folder)
    return str(caught.value)


def test_what_nothing_loads_is_refused_with_the_remedy_that_fits(tmp_path: Path) -> None:
    put(tmp_path / "model.fp16.safetensors", a=[1])
    assert "call it model.safetensors" in refused(tmp_path)
    (tmp_path / "model.fp16.safetensors").rename(tmp_path / "consolidated.safetensors")
    assert "in another format" in refused(tmp_path)
    (tmp_path / "consolidated.safetensors").rename(tmp_path / "model.gguf")
    assert "It holds GGUF files: name one on this machine, such as model.gguf" in refused(tmp_path)
    (tmp_path / "model.gguf").rename(tmp_path / SHARDS[0])
    assert "has neither model.safetensors nor model.safetensors.index.json. Complete the download" in refused(tmp_path)
    put(tmp_path / SINGLE_NAME, a=[1])
    (tmp_path / SHARDS[0]).rename(tmp_path / "shard-00000-model-00001-of-00002.safetensors")
    assert "parts of a distributed checkpoint" in refused(tmp_path)


@pytest.mark.parametrize(
    "name", ["../own.safetensors", "/own.safetensors", "pytorch_model.bin", 7, "", "a/b.safetensors"]
)
def test_a_config_cannot_name_files_elsewhere(name: object, tmp_path: Path) -> None:
    put(tmp_path / SINGLE_NAME, a=[1])
    configured(tmp_path, transformers_weights=name)
    assert "which is not a safetensors file or index of this folder" in refused(tmp_path)


def values(folder: Path, name: str) -> list[float]:
    """Of a tensor, in the file that counts."""
    shards = read_weights(folder).shards
    (holder,) = (shard for shard, tensors in shards.items() if name in tensors)
    return load_file(folder / holder)[name].tolist()


def test_a_later_shard_supersedes_a_tensor_as_the_index_says(tmp_path: Path) -> None:
    sharded(tmp_path)
    put(tmp_path / "model-fixed.safetensors", a=[9])
    put_index(tmp_path / INDEX_NAME, {"a": "model-fixed.safetensors", "b": SHARDS[0], "c": SHARDS[1]})
    found = read_weights(tmp_path)
    assert values(tmp_path, "a") == [9]
    assert {shard: list(tensors) for shard, tensors in found.shards.items()} == {
        "model-fixed.safetensors": ["a"],
        SHARDS[0]: ["b"],
        SHARDS[1]: ["c"],
    }
    assert "a lies in several shards; model-fixed.safetensors, the last by name, counts" in found.notes[0]


def test_a_shard_whose_tensors_are_all_superseded_is_no_file_of_the_model(tmp_path: Path) -> None:
    sharded(tmp_path)
    put(tmp_path / "model-fixed.safetensors", c=[9])
    places = {"a": SHARDS[0], "b": SHARDS[0], "c": "model-fixed.safetensors", "d": SHARDS[1]}
    put_index(tmp_path / INDEX_NAME, {name: places[name] for name in ("a", "b", "c")})
    assert SHARDS[1] not in read_weights(tmp_path).shards
    put(tmp_path / SHARDS[1], c=[3], d=[4])
    put_index(tmp_path / INDEX_NAME, places)
    assert list(read_weights(tmp_path).shards[SHARDS[1]]) == ["d"]


def test_equal_copies_are_one_and_unequal_ones_are_refused_where_the_index_names_the_first(tmp_path: Path) -> None:
    sharded(tmp_path)
    put(tmp_path / SHARDS[1], a=[1], c=[3])
    assert values(tmp_path, "a") == [1]
    for other in ({"a": [9]}, {"a": [1, 1]}):
        put(tmp_path / SHARDS[1], c=[3], **other)
        assert f"Tensor 'a' is in both {SHARDS[0]} and {SHARDS[1]}, with different values" in refused(tmp_path)
    put_index(tmp_path / INDEX_NAME, {"a": SHARDS[1], "b": SHARDS[0], "c": SHARDS[1]})
    assert values(tmp_path, "a") == [1, 1]


def test_a_tensor_in_another_shard_than_the_index_says_is_found_as_transformers_finds_it(tmp_path: Path) -> None:
    sharded(tmp_path)
    put_index(tmp_path / INDEX_NAME, {"a": SHARDS[1], "b": SHARDS[0], "c": SHARDS[1]})
    assert values(tmp_path, "a") == [1]
    put_index(tmp_path / INDEX_NAME, {"a": SHARDS[0], "c": SHARDS[1], "ghost": SHARDS[1]})
    assert "places 'ghost'" in refused(tmp_path)


@pytest.fixture
def model(save_family: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(save_family("qwen2_moe"), tmp_path / "model"))


def test_quantizing_and_evaluating_take_the_same_overlay(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    index = json.loads((model / INDEX_NAME).read_text())
    name = "model.layers.1.self_attn.q_proj.weight"
    shard = load_file(model / index["weight_map"][name])
    save_file({name: shard[name] * 2}, model / "model-z.safetensors", metadata={"format": "pt"})
    put_index(model / INDEX_NAME, index["weight_map"] | {name: "model-z.safetensors"})
    checkpoint = open_checkpoint(model)
    (matrix,) = (one for one in checkpoint.matrices if one.name == name)
    loaded = AutoModelForCausalLM.from_pretrained(model).model.layers[1].self_attn.q_proj.weight
    assert torch.equal(checkpoint.read(matrix), loaded) and torch.equal(loaded, shard[name] * 2)
    put_index(model / INDEX_NAME, index["weight_map"] | {"x": "model-z.safetensors"})  # contradicts transformers
    with pytest.raises(CheckpointError, match="with different values"):
        open_checkpoint(model)
    with pytest.raises(CheckpointError, match="with different values"):
        loading._check_folder(model)


def test_an_adapter_is_not_added_to_what_is_evaluated_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    loading._check_folder(model)
    monkeypatch.setattr(loading, "find_spec", lambda name: name)
    with pytest.raises(CheckpointError, match="holds an adapter beside the weights"):
        loading._check_folder(model)
    assert "adapter_config.json" not in {path.name for path in open_checkpoint(model).side_files()}


def test_left_over_files_are_told_by_commands_that_read_them_and_by_those_that_load(
    tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    put_index(folder / INDEX_NAME, {"a": SHARDS[0]})
    for ran in (alphaq("inspect", folder), alphaq("generate", folder, "def main", "--max-new-tokens", 1)):
        assert ran.code == 0, ran.err
        assert "the weights are read from model.safetensors, as transformers does" in ran.err
        assert ran.err.count("note:") == 1


def test_a_left_over_index_may_be_damaged_but_not_hostile(tmp_path: Path) -> None:
    put(tmp_path / SINGLE_NAME, a=[1])
    (tmp_path / INDEX_NAME).write_text("{")
    assert weight_files(tmp_path).left == (INDEX_NAME,)
    put_index(tmp_path / INDEX_NAME, {"a": "../own.safetensors"})
    assert "its index may be hostile" in refused(tmp_path)


def test_what_is_written_has_the_usual_names(model: Path, tmp_path: Path) -> None:
    from alphaq.engines.safetensors.folder import write_model_folder

    config = json.loads((model / "config.json").read_text())
    (model / INDEX_NAME).rename(model / "own.safetensors.index.json")
    (model / "config.json").write_text(json.dumps(config | {"transformers_weights": "own.safetensors.index.json"}))
    checkpoint = open_checkpoint(model)
    assert checkpoint.matrices
    (tmp_path / "out").mkdir()
    write_model_folder(tmp_path / "out", checkpoint, [], {})
    assert "transformers_weights" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert {path.name for path in (tmp_path / "out").glob("*index*")} == {INDEX_NAME}


def linked(model: Path, blobs: Path) -> Path:
    """The model's weights and tokenizer as links to where they were moved to."""
    blobs.mkdir(parents=True)
    for path in [*model.glob("*.safetensors"), model / INDEX_NAME]:
        shutil.move(path, blobs / path.name)
        path.symlink_to(blobs / path.name)
    return model


def test_links_into_a_cache_of_the_hub_are_followed(model: Path, tmp_path: Path) -> None:
    assert open_checkpoint(linked(model, tmp_path / "hub" / "models--org--name" / "blobs")).matrices


@pytest.mark.parametrize(
    "blobs", ["hub/other/blobs", "hub/models--org--name/snapshots", "hub/models--org--name/blobs/x"]
)
def test_links_to_elsewhere_are_refused(blobs: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        open_checkpoint(linked(model, tmp_path / blobs))


def test_an_output_is_verified_in_the_files_that_would_be_loaded(
    tiny: Path, tiny_quantized: Path, tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    out = Path(shutil.copytree(tiny_quantized, tmp_path / "out"))
    assert alphaq("verify", out).code == 0
    shutil.copy(tiny / SINGLE_NAME, out)  # which transformers would load instead
    ran = alphaq("verify", out)
    assert ran.code == 2, ran.out
