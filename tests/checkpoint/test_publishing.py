"""An output on a store is there whole or no model at all; an interrupted upload goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("moto", reason="moto is not installed: pip install 'alphaq[dev]'")
pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'alphaq[s3]'")

import objectstore
from alphaq.checkpoint import publishing
from alphaq.checkpoint.publishing import CLAIM_NAME, claim, publish, upload_order
from alphaq.checkpoint.remote import Store
from alphaq.errors import OutputError
from alphaq.writing import uploading
from conftest import Ran
from contents import contents


@pytest.fixture(autouse=True)
def _environment(server: objectstore.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.counter.reset()
    if not server.system().exists("out"):
        server.system().mkdir("out")
    server.counter.reset()
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "plan.json", "model-1.safetensors", "model-2.safetensors", "alphaq_manifest.json"):
        (folder / name).write_text(name * 10)
    return folder


@pytest.fixture
def store(server: objectstore.Server, request: pytest.FixtureRequest) -> Store:
    return Store.of(f"s3://out/{request.node.name}")


def names(server: objectstore.Server, store: Store) -> set[str]:
    return {path.rpartition("/")[2] for path in server.system().find(store.path)}


def test_what_makes_a_model_comes_last() -> None:
    assert upload_order(iter(["config.json", "a.safetensors", "plan.json"]))[-1] == "config.json"
    assert upload_order(iter(["alphaq.gguf", "plan.json", "z.json"]))[-1] == "alphaq.gguf"


def test_interrupted_upload_shows_no_model_and_goes_on(
    server: objectstore.Server, store: Store, model: Path, tmp_path: Path
) -> None:
    server.counter.failing = lambda method, path: method == "PUT" and "model-2" in path
    with pytest.raises(OutputError, match=r"cannot be written .*repeat the command"):
        publish(model, store, "job", tmp_path / "uploaded.jsonl")
    left = names(server, store)
    assert CLAIM_NAME in left and "config.json" not in left and "model-1.safetensors" in left
    server.counter.reset()
    publish(model, store, "job", tmp_path / "uploaded.jsonl")
    sent = [path.rpartition("/")[2] for method, path in server.counter.requests if method == "PUT"]
    assert sent == ["model-2.safetensors", "plan.json", "config.json"]
    assert names(server, store) == {path.name for path in model.iterdir()}
    for path in model.iterdir():
        assert server.system().cat_file(store.at(path.name)) == path.read_bytes()


def test_files_in_folders_are_uploaded_too(
    server: objectstore.Server, store: Store, model: Path, tmp_path: Path
) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("tools")
    publish(model, store, "job", tmp_path / "uploaded.jsonl")
    assert server.system().cat_file(store.at("additional_chat_templates/tools.jinja")) == b"tools"
    server.counter.reset()
    publish(model, Store.of(f"{store.url}-2"), "job", tmp_path / "others.jsonl")
    with pytest.raises(OutputError, match="already exists"):
        claim(Store.of(f"{store.url}-2"), "another")


def test_upload_killed_before_its_claim_is_gone_ends_by_removing_it(
    server: objectstore.Server, store: Store, model: Path, tmp_path: Path
) -> None:
    server.counter.failing = lambda method, path: method == "DELETE"
    with pytest.raises(OutputError):
        publish(model, store, "job", tmp_path / "uploaded.jsonl")
    server.counter.reset()
    publish(model, store, "job", tmp_path / "uploaded.jsonl")
    assert not [path for method, path in server.counter.requests if method == "PUT"]
    assert CLAIM_NAME not in names(server, store)


def test_file_that_someone_replaced_meanwhile_is_sent_again(
    server: objectstore.Server, store: Store, model: Path, tmp_path: Path
) -> None:
    server.counter.failing = lambda method, path: method == "PUT" and "config.json" in path
    with pytest.raises(OutputError):
        publish(model, store, "job", tmp_path / "uploaded.jsonl")
    server.counter.reset()
    file = model / "model-1.safetensors"
    server.system().pipe_file(store.at(file.name), b"x" * file.stat().st_size)
    publish(model, store, "job", tmp_path / "uploaded.jsonl")
    assert server.system().cat_file(store.at(file.name)) == file.read_bytes()


def test_large_files_go_in_parts_and_left_parts_are_dropped(
    server: objectstore.Server, store: Store, model: Path, tmp_path: Path
) -> None:
    system = server.system()
    left = system.call_s3("create_multipart_upload", Bucket="out", Key=f"{store.name}/model-9")
    other = system.call_s3("create_multipart_upload", Bucket="out", Key="elsewhere/model-9")
    with (model / "model-1.safetensors").open("wb") as file:
        file.truncate(110 << 20)
    publish(model, store, "job", tmp_path / "uploaded.jsonl")
    assert [path for method, path in server.counter.requests if "partNumber=2" in path]
    assert system.info(store.at("model-1.safetensors"))["size"] == 110 << 20
    open_uploads = {upload["UploadId"] for upload in system.list_multipart_uploads("out")}
    assert left["UploadId"] not in open_uploads and other["UploadId"] in open_uploads


def test_folder_of_others_is_left_alone(server: objectstore.Server, store: Store) -> None:
    server.system().pipe_file(store.at("theirs.txt"), b"x")
    with pytest.raises(OutputError, match="already exists"):
        claim(store, "job", restart=True)
    assert names(server, store) == {"theirs.txt"}


def test_claim_of_another_job_needs_a_restart(server: objectstore.Server, store: Store) -> None:
    claim(store, "one")
    server.system().pipe_file(store.at("model-1.safetensors"), b"x")
    with pytest.raises(OutputError, match="unfinished upload of another job"):
        claim(store, "two")
    claim(store, "two", restart=True)
    assert names(server, store) == {CLAIM_NAME}
    claim(store, "two")


def test_damaged_claim_is_no_claim_of_ours(server: objectstore.Server, store: Store) -> None:
    server.system().pipe_file(store.at(CLAIM_NAME), b"[")
    with pytest.raises(OutputError, match="another job"):
        claim(store, "job")


@pytest.mark.usefixtures("knows_tiny")
def test_store_that_refuses_is_told_before_any_work(
    server: objectstore.Server, tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--bits", "2.5", "--method", "uniform", "--workers", "1")
    ran = alphaq("quantize", tiny, "-o", "s3://no-bucket-of-ours/tiny", *options)
    assert ran.code == 2 and "cannot be written" in ran.err


@pytest.mark.usefixtures("knows_tiny")
def test_quantized_model_on_a_store_has_the_bytes_of_a_local_one(
    server: objectstore.Server,
    tiny: Path,
    tmp_path: Path,
    alphaq: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when the upload is refused once; then it is not quantized again."""
    options = ("--bits", "2.5", "--method", "uniform", "--workers", "1", "--json")
    assert alphaq("quantize", tiny, "-o", tmp_path / "tiny", *options).code == 0
    server.counter.failing = lambda method, path: method == "PUT" and path.endswith("/config.json")
    command = ("quantize", tiny, "-o", "s3://out/models/tiny", "--scratch", tmp_path, *options)
    ran = alphaq(*command)
    assert ran.code == 2 and "what is finished is kept" in ran.err
    server.counter.reset()
    with monkeypatch.context() as patched:
        patched.setattr(uploading, "quantize", None)
        ran = alphaq(*command)
    assert ran.code == 0, ran.err
    assert ran.json["out"] == "s3://out/models/tiny"
    system = server.system()
    there = {path.rpartition("/")[2]: system.cat_file(path) for path in system.find("out/models/tiny")}
    assert there.keys() == contents(tmp_path / "tiny").keys()
    for name, data in there.items():
        assert data == (tmp_path / "tiny" / name).read_bytes(), name
    assert {path.name for path in tmp_path.iterdir()} == {"tiny"}
    again = alphaq(*command)
    assert again.code == 2 and "already exists" in again.err
    assert publishing.MARKER_NAME in there


def test_parts_that_may_not_be_listed_are_told_before_any_work(
    store: Store, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(bucket: str) -> None:
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(store.system, "list_multipart_uploads", refuse)
    with pytest.raises(OutputError, match="AccessDenied"):
        claim(store, "job")


@pytest.mark.usefixtures("knows_tiny")
def test_two_runs_into_one_address_do_not_mix(
    server: objectstore.Server, tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even with --restart, which would remove what the other is at."""
    options = ("--bits", "2.5", "--method", "uniform", "--workers", "1")
    command = ("quantize", tiny, "-o", "s3://out/models/twice", "--scratch", tmp_path, *options)
    seen = []

    def quantize(*_: object, **__: object) -> None:
        seen.append(alphaq(*command, "--restart"))
        raise OutputError("stopped")

    monkeypatch.setattr(uploading, "quantize", quantize)
    assert "stopped" in alphaq(*command).err
    assert len(seen) == 1 and seen[0].code == 2 and "Another alphaq is at work" in seen[0].err
