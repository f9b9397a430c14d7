"""Checkpoints on an S3-compatible server give what local ones give, for the bytes needed and no more."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("moto", reason="moto is not installed: pip install 'alphaq[dev]'")
pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'alphaq[s3]'")

import fsspec
import torch

import hubserver
import objectstore
from alphaq.checkpoint import remote
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.checkpoint.remote import Store, is_url
from alphaq.errors import AlphaQError, CheckpointError, MissingExtraError
from conftest import Ran
from contents import contents

SLACK = 1.1


@pytest.fixture(autouse=True)
def _environment(server: objectstore.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.counter.reset()
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def hosted(server: objectstore.Server, tiny: Path) -> str:
    return server.upload(tiny, "models", "tiny")


@pytest.fixture
def copy(server: objectstore.Server, tiny: Path, request: pytest.FixtureRequest) -> str:
    """One that a test may spoil."""
    return server.upload(tiny, "models", f"copy-{abs(hash(request.node.name))}/tiny")


@pytest.fixture
def bare(server: objectstore.Server, tiny: Path, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """Without weights."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((tiny / "config.json").read_bytes())
    return server.upload(tmp_path / "bare", "models", f"bare-{abs(hash(request.node.name))}")


def test_checkpoint_on_a_store_is_that_of_the_folder(tiny: Path, hosted: str) -> None:
    local, there = open_checkpoint(tiny), open_checkpoint(hosted)
    assert (there.name, there.fingerprint, there.matrices) == (local.name, local.fingerprint, local.matrices)
    assert there.settings_digest() == local.settings_digest()
    assert [path.name for path in there.side_files()] == [path.name for path in local.side_files()]
    for matrix in there.matrices[::17]:
        assert torch.equal(there.read(matrix), local.read(matrix))


@pytest.mark.slow
def test_quantizing_from_a_store_gives_the_same_bytes(
    tiny: Path, hosted: str, tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    plan = tmp_path / "plan.json"
    assert alphaq("plan", tiny, "-o", plan, "--bits", "2.5", "--method", "alphaq", "--workers", "1").code == 0
    options = ("--plan", plan, "--workers", "1")
    assert alphaq("quantize", tiny, "-o", tmp_path / "here", *options).code == 0
    ran = alphaq("quantize", hosted, "-o", tmp_path / "there", *options)
    assert ran.code == 0, ran.err
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


@pytest.mark.slow
def test_worker_processes_read_from_a_store(hosted: str, tmp_path: Path, alphaq: Callable[..., Ran]) -> None:
    for workers in (1, 2):
        ran = alphaq("analyze", hosted, "-o", tmp_path / f"{workers}.csv", "--workers", workers, "--no-cache")
        assert ran.code == 0, ran.err
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "2.csv").read_bytes()


def test_analyzing_reads_no_more_than_the_matrices(
    server: objectstore.Server, hosted: str, tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    checkpoint = open_checkpoint(hosted)
    needed = sum(checkpoint.stored_bytes(matrix) for matrix in checkpoint.matrices)
    server.counter.reset()
    ran = alphaq("analyze", hosted, "-o", tmp_path / "stats.csv", "--workers", "1")
    assert ran.code == 0, ran.err
    small = sum(path.stat().st_size for path in checkpoint.folder.iterdir())
    assert needed <= server.counter.served - small <= SLACK * needed


def test_small_files_in_folders_come_along_if_something_names_them(server: objectstore.Server, copy: str) -> None:
    path, system = copy.removeprefix("s3://"), server.system()
    for name in ("additional_chat_templates/tools.jinja", "assets/words.dat", "original/notes.txt"):
        system.pipe_file(f"{path}/{name}", name.encode())
    objectstore.put_json(system, f"{path}/processor_config.json", {"words": "assets/words.dat"})
    checkpoint = open_checkpoint(copy)
    below = [
        path.relative_to(checkpoint.folder) for path in checkpoint.side_files() if path.parent != checkpoint.folder
    ]
    assert list(map(str, below)) == ["additional_chat_templates/tools.jinja", "assets/words.dat"]
    assert not (checkpoint.folder / "original").exists()


def test_a_left_over_index_is_told_of_a_store_too(server: objectstore.Server, copy: str) -> None:
    index = f"{copy.removeprefix('s3://')}/model.safetensors.index.json"
    objectstore.put_json(server.system(), index, {"weight_map": {"a": "gone.safetensors"}})
    checkpoint = open_checkpoint(copy)
    assert list(checkpoint.shards) == ["model.safetensors"]
    assert "model.safetensors.index.json is not read" in checkpoint.notes[0]


def test_a_web_server_that_serves_ranges_is_a_store(tiny: Path, alphaq: Callable[..., Ran]) -> None:
    served = hubserver.start_plain(tiny.parent)
    try:
        ran = alphaq("inspect", f"{served.url}/tiny", "--json")
        assert ran.code == 0, ran.err
        assert ran.json == alphaq("inspect", tiny, "--json").json
        assert served.served["model.safetensors"] < 0.01 * ran.json["bytes"]
    finally:
        served.stop()


def test_inspecting_reads_headers_alone(server: objectstore.Server, hosted: str, alphaq: Callable[..., Ran]) -> None:
    checkpoint = open_checkpoint(hosted)
    small = sum(path.stat().st_size for path in checkpoint.folder.iterdir())
    server.counter.reset()
    ran = alphaq("inspect", hosted, "--json")
    assert ran.code == 0, ran.err
    assert server.counter.served - small < 0.1 * checkpoint.nbytes


def test_one_matrix_costs_its_own_bytes(server: objectstore.Server, hosted: str) -> None:
    checkpoint = open_checkpoint(hosted)
    server.counter.reset()
    matrix = checkpoint.matrices[3]
    checkpoint.read(matrix)
    assert server.counter.served == checkpoint.stored_bytes(matrix)


@pytest.mark.slow
def test_large_ranges_are_read_in_parts(hosted: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, local = open_checkpoint(hosted), open_checkpoint(tiny)
    monkeypatch.setattr(remote, "PART_BYTES", 10_000)
    matrix = max(local.matrices, key=lambda one: one.parameters)
    assert torch.equal(there.read(matrix), local.read(matrix))
    assert len(there.file(there.shard_of[matrix.tensor])._free) > 1  # type: ignore[attr-defined]


def test_weights_that_change_are_told(server: objectstore.Server, copy: str) -> None:
    before = open_checkpoint(copy)
    known = before.contents(), before.contents(True)
    matrix = before.matrices[0]
    path = f"{copy.removeprefix('s3://')}/{before.shard_of[matrix.tensor]}"
    before.read(matrix)
    data = bytearray(server.system().cat_file(path))
    data[-1] ^= 1
    server.system().pipe_file(path, bytes(data))
    with pytest.raises(CheckpointError, match=r"was changed while it was read"):
        before.read(matrix)  # from a file that was open
    with pytest.raises(CheckpointError, match=r"was changed while it was read"):
        pickle.loads(pickle.dumps(before)).read(matrix)  # in a worker that opens it later
    with pytest.raises(CheckpointError, match=r"was changed while it was read"):
        before.require_unchanged()
    after = open_checkpoint(copy)
    assert after.fingerprint == before.fingerprint
    assert after.contents() != known[0] and after.contents(True) != known[1]  # so the cache tells them apart


@pytest.mark.parametrize("length", [2**62, 500, 200_000_000])
def test_header_of_a_hostile_length_is_not_fetched(server: objectstore.Server, bare: str, length: int) -> None:
    shard = f"{bare.removeprefix('s3://')}/model.safetensors"
    server.system().pipe_file(shard, length.to_bytes(8, "little") + b"{" * 64)
    server.counter.reset()
    with pytest.raises(CheckpointError, match=f"its header claims {length} bytes"):
        open_checkpoint(bare)
    asked = [request for request in server.counter.requests if request == ("GET", f"/{shard}")]
    assert len(asked) == 1  # for the length


@pytest.mark.parametrize(
    "shard", ["../other/model.safetensors", "s3://models/tiny/model.safetensors", "/x.safetensors"]
)
def test_index_cannot_lead_out_of_the_folder(server: objectstore.Server, bare: str, shard: str) -> None:
    path = f"{bare.removeprefix('s3://')}/model.safetensors.index.json"
    objectstore.put_json(server.system(), path, {"weight_map": {"x": shard}})
    with pytest.raises(CheckpointError, match="not a safetensors file of this folder"):
        open_checkpoint(bare)


def test_missing_shard_is_named(server: objectstore.Server, bare: str) -> None:
    path = f"{bare.removeprefix('s3://')}/model.safetensors.index.json"
    objectstore.put_json(server.system(), path, {"weight_map": {"x": "gone.safetensors"}})
    with pytest.raises(CheckpointError, match=r"lacks gone\.safetensors"):
        open_checkpoint(bare)


def test_small_file_that_is_large_is_refused(bare: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_JSON_BYTES", 100)
    with pytest.raises(CheckpointError, match="more than the 100 that a small file"):
        open_checkpoint(bare)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("s3://models/nothing", "is not there"),
        ("s3://no-such-bucket-here/x", "Check the address"),
        ("s3://models/tiny::file:///etc", "chains addresses"),
        ("nowhere://x/y", "Known: s3://"),
        ("s3://models/tiny/model.gguf", "Download it"),
        ("file://elsewhere/x", "names the machine elsewhere"),
    ],
)
def test_address_of_nothing_is_one_line(url: str, why: str, alphaq: Callable[..., Ran]) -> None:
    ran = alphaq("inspect", url)
    assert ran.code == 2
    assert why in ran.err.replace("\n", " ")


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(MissingExtraError, match=r"alphaq\[gs\]"):
        Store.of("gs://bucket/model")
    with pytest.raises(MissingExtraError, match=r"alphaq\[s3\]"):
        Store.of("s3://bucket/model")


def test_file_address_is_the_path(tiny: Path, alphaq: Callable[..., Ran]) -> None:
    assert alphaq("inspect", tiny.as_uri(), "--json").json == alphaq("inspect", tiny, "--json").json


def test_credentials_do_not_travel_with_a_checkpoint(hosted: str) -> None:
    checkpoint = open_checkpoint(hosted)
    checkpoint.read(checkpoint.matrices[0])
    assert b"testing" not in pickle.dumps(checkpoint)


def test_small_files_are_gone_with_the_checkpoint(hosted: str) -> None:
    checkpoint = open_checkpoint(hosted)
    folder = checkpoint.folder
    assert json.loads((folder / "config.json").read_text())
    del checkpoint
    assert not folder.exists()


@pytest.mark.parametrize(("text", "expected"), [("s3://b/x", True), ("C:/x", False), ("a/b", False), ("/x", False)])
def test_addresses_are_told_from_paths(text: str, expected: bool) -> None:
    assert is_url(text) is expected


def test_revision_is_for_the_hub(hosted: str) -> None:
    with pytest.raises(AlphaQError, match="--revision applies only to hub models"):
        open_checkpoint(hosted, "main")


@pytest.mark.parametrize(
    "command", [("slice", "--bits", 2), ("recode",), ("plan", "--bits", 2), ("analyze",), ("report",)], ids=str
)
def test_only_quantize_writes_to_an_address(
    command: tuple[Any, ...], tiny: Path, alphaq: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = alphaq(command[0], tiny, *command[1:], "-o", "s3://bucket/out")
    assert ran.code == 2
    assert "is an address" in ran.err
    assert not list(tmp_path.iterdir())


def test_a_search_needs_the_model_on_this_machine(hosted: str, tiny: Path, alphaq: Callable[..., Ran]) -> None:
    ran = alphaq("plan", hosted, "--ear", 0.9, "--text", tiny.parent / "texts" / "code.txt")
    assert ran.code == 2
    assert "Download it first" in ran.err
