"""Of a hub model just what is needed is fetched: not a byte of weights to look at it, and no weights twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hubserver
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.checkpoint.weights import INDEX_NAME, SINGLE_NAME
from alphaq.errors import CheckpointError
from conftest import Ran


@pytest.fixture
def model(save_family: Callable[..., Path], tmp_path: Path) -> Path:
    """A sharded model with all that publishers put beside one."""
    folder = Path(shutil.copytree(save_family("qwen2_moe"), tmp_path / "published"))
    for name in ("original/model.safetensors", "metal/model.bin", "onnx/model.onnx"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(b"x" * 1000)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model.fp16.safetensors"):
        (folder / name).write_bytes(b"x" * 1000)
    (folder / "original" / "params.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (folder / "tokenization_own.py").write_text("raise SystemExit")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_own.Own", null]}}')
    return folder


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hubserver.Hub]:
    with hubserver.the_hub(model, tmp_path / "cache", monkeypatch) as started:
        yield started


def weights(hub: hubserver.Hub) -> dict[str, int]:
    """Bytes served of each file of weights, whatever its format."""
    return {name: n for name, n in hub.served.items() if name.endswith((".safetensors", ".bin", ".onnx"))}


def test_inspecting_fetches_headers_alone(hub: hubserver.Hub, model: Path, alphaq: Callable[..., Ran]) -> None:
    ran = alphaq("inspect", "org/model", "--json")
    assert ran.code == 0, ran.err
    local = alphaq("inspect", model, "--json").json
    assert {**ran.json, "model": ""} == {**local, "model": ""}
    shards = set(json.loads((model / INDEX_NAME).read_text())["weight_map"].values())
    assert weights(hub).keys() == shards
    for shard in shards:
        length = int.from_bytes((model / shard).read_bytes()[:8], "little")
        assert weights(hub)[shard] == 8 + length


def test_a_dry_run_fetches_headers_alone(hub: hubserver.Hub, model: Path, alphaq: Callable[..., Ran]) -> None:
    ran = alphaq("plan", "org/model", "--bits", 2.5, "--dry-run", "--json")
    assert ran.code == 0, ran.err
    assert sum(weights(hub).values()) < 0.2 * ran.json["source_bytes"]
    there = alphaq("plan", model, "--bits", 2.5, "--dry-run", "--json").json
    assert {**ran.json, "model": ""} == {**there, "model": ""}


def test_a_download_takes_the_index_s_shards_and_the_small_files(hub: hubserver.Hub, model: Path) -> None:
    checkpoint = open_checkpoint("org/model")
    assert weights(hub) == {shard: (model / shard).stat().st_size for shard in checkpoint.shards}
    fetched = {path.relative_to(checkpoint.folder).as_posix() for path in checkpoint.folder.rglob("*")}
    assert not any("original" in name or "consolidated" in name or "fp16" in name for name in fetched)
    assert {"additional_chat_templates/tools.jinja", "tokenization_own.py"} <= fetched
    carried = {path.relative_to(checkpoint.folder).as_posix() for path in checkpoint.side_files()}
    assert {"additional_chat_templates/tools.jinja", "tokenization_own.py"} <= carried
    hub.served.clear()
    assert open_checkpoint("org/model", headers_only=True).store is None  # all is there, and read from there
    assert not hub.served


def test_a_single_file_comes_before_the_index_as_in_a_folder(
    hub: hubserver.Hub, model: Path, tmp_path: Path, save_family: Callable[..., Path]
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: one for path in model.glob("model-*") for name, one in load_file(path).items()}
    save_file(tensors, model / SINGLE_NAME, metadata={"format": "pt"})
    assert list(open_checkpoint("org/model", headers_only=True).shards) == [SINGLE_NAME]
    hub.served.clear()
    checkpoint = open_checkpoint("org/model")
    assert list(checkpoint.shards) == [SINGLE_NAME]
    assert weights(hub).keys() == {SINGLE_NAME}


def test_a_cache_serves_where_the_hub_cannot_be_reached(
    hub: hubserver.Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    matrices = open_checkpoint("org/model").matrices
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_checkpoint("org/model").matrices == matrices
    assert open_checkpoint("org/model", headers_only=True).matrices == matrices
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match="could not be fetched from the hub"):
        open_checkpoint("org/model")


def test_a_model_of_pickles_alone_is_told_before_anything_large_is_fetched(hub: hubserver.Hub, model: Path) -> None:
    for path in [*model.glob("*.safetensors"), model / INDEX_NAME]:
        path.unlink()
    for headers_only in (True, False):
        with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model.bin\)"):
            open_checkpoint("org/model", headers_only=headers_only)
    assert not weights(hub)


def test_a_model_that_the_hub_does_not_have_is_one_line(hub: hubserver.Hub, alphaq: Callable[..., Ran]) -> None:
    ran = alphaq("inspect", "org/other")
    assert ran.code == 2
    assert "could not be fetched from the hub" in ran.err
