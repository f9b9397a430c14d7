import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alphaq.checkpoint.reader import open_checkpoint
from alphaq.checkpoint.weights import INDEX_NAME
from alphaq.errors import CheckpointError


@pytest.fixture
def copy(save_family: Callable[..., Path], tmp_path: Path) -> Path:
    """A sharded checkpoint that a test may damage."""
    return Path(shutil.copytree(save_family("qwen2_moe"), tmp_path / "model"))


def test_sharded_checkpoint_opens(copy: Path) -> None:
    checkpoint = open_checkpoint(copy)
    assert len(checkpoint.shards) > 1
    assert checkpoint.read(checkpoint.matrices[0]).shape == checkpoint.matrices[0].shape


def test_fingerprint_changes_with_headers_only(copy: Path) -> None:
    before = open_checkpoint(copy).fingerprint
    assert open_checkpoint(copy).fingerprint == before
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.rename(copy / "renamed.safetensors")
    index = json.loads((copy / INDEX_NAME).read_text())
    index["weight_map"] = {k: "renamed.safetensors" if v == shard.name else v for k, v in index["weight_map"].items()}
    (copy / INDEX_NAME).write_text(json.dumps(index))
    assert open_checkpoint(copy).fingerprint != before


@pytest.mark.parametrize("place", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 7, ""])
def test_index_may_not_name_files_outside_the_folder(copy: Path, place: object) -> None:
    index = json.loads((copy / INDEX_NAME).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = place
    (copy / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a safetensors file of this folder"):
        open_checkpoint(copy)


def test_missing_shard_is_named(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        open_checkpoint(copy)


def test_tensor_missing_from_its_shard_is_named(copy: Path) -> None:
    index = json.loads((copy / INDEX_NAME).read_text())
    index["weight_map"]["ghost"] = sorted(copy.glob("*.safetensors"))[0].name
    (copy / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="ghost"):
        open_checkpoint(copy)


def test_tensor_in_two_shards_is_an_error(copy: Path) -> None:
    shards = sorted(copy.glob("*.safetensors"))
    shutil.copy(shards[0], shards[1])
    with pytest.raises(CheckpointError, match=r"is in both|is not there"):
        open_checkpoint(copy)


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00", '{"weight_map": []}', '{"weight_map": {}}'])
def test_bad_index_is_refused(copy: Path, content: str) -> None:
    (copy / INDEX_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=r"index|JSON"):
        open_checkpoint(copy)


def test_pickle_is_refused(copy: Path) -> None:
    for path in [*copy.glob("*.safetensors"), copy / INDEX_NAME]:
        path.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pickled weights \(pytorch_model.bin\).*safetensors"):
        open_checkpoint(copy)


def test_quantized_source_is_refused(tiny_quantized: Path) -> None:
    with pytest.raises(CheckpointError, match="already quantized"):
        open_checkpoint(tiny_quantized)


def test_hub_id_that_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"could not be fetched from the hub \(no route\)"):
        open_checkpoint("some-org/some-model")


def test_a_side_file_may_not_lead_out_of_the_folder(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (copy / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"notes\.txt is a link out of its folder"):
        open_checkpoint(copy).side_files()


def test_the_hub_cache_s_own_links_are_followed(copy: Path, tmp_path: Path) -> None:
    """The cache keeps files in blobs/ and links to them from snapshots/REVISION/."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in copy.iterdir():
        shutil.move(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert open_checkpoint(snapshot).side_files() == [snapshot / "generation_config.json"]


def test_integers_cannot_be_quantized(tmp_path: Path, tiny: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copy(tiny / "config.json", tmp_path)
    tensors = load_file(tiny / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} is stored as I32"):
        open_checkpoint(tmp_path)
