"""Outputs on object stores, which have no rename: a folder is uploaded file by file, what makes it a model last.

A claim, `alphaq_upload.json`, is the first file there and the last to go. While it lies there without the marker (the
config, or the one file of a GGUF), an upload is unfinished, and no loader takes the folder for a model. Only the job
that made a claim goes on with it. Each file is one object, which a store shows whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alphaq.checkpoint.files import Stamp
from alphaq.checkpoint.remote import Store
from alphaq.errors import AlphaQError, OutputError
from alphaq.work.journal import Journal
from alphaq.work.untrusted import parse_json
from alphaq.work.workers import Wrap, silent

CLAIM_NAME = "alphaq_upload.json"
MARKER_NAME = "config.json"
MOST_CLAIM_BYTES = 1 << 20


@contextmanager
def storing(url: str) -> Iterator[None]:
    """Tell what a store refuses meanwhile as an OutputError, whatever kind of error its client raises."""
    try:
        yield
    except AlphaQError:
        raise
    except Exception as error:  # clients of stores have hierarchies of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OutputError(
            f"{url} cannot be written ({reason}). Check the address, the credentials and the network, and repeat the "
            "command: what is finished is kept."
        ) from error


def claim(store: Store, job: str, restart: bool = False) -> None:
    """Take a folder for a job, before any work: also to see that it can be written to, and parts of uploads listed.

    Raises OutputError if it has files of anyone else; with `restart`, what an unfinished upload left is removed.
    """
    with storing(store.url):
        there = _present(store)
        if CLAIM_NAME in there:
            owner = _owner(store, there[CLAIM_NAME])
            if owner == job:
                _abort_parts(store)
                return
            if MARKER_NAME in there or not restart:
                raise OutputError(
                    f"{store.url} holds an unfinished upload of another job. Repeat the earlier command to finish it, "
                    "choose another output, or add --restart to remove it."
                )
            for name in sorted(there, key=lambda name: name == CLAIM_NAME):
                store.system.rm_file(store.at(name))
        elif there:
            raise OutputError(f"{store.url} already exists. Remove it or choose another output.")
        store.system.pipe_file(store.at(CLAIM_NAME), json.dumps({"job": job}).encode())
        _abort_parts(store)


def publish(folder: Path, store: Store, job: str, journal: Path, wrap: Wrap = silent) -> None:
    """Upload a complete folder to where the job has its claim. journal: a local file that tells what was uploaded.

    Files that an interrupted upload has finished are not sent again. Raises OutputError.
    """
    claim(store, job)
    files = (path for path in folder.rglob("*") if not path.is_dir())
    names = upload_order(path.relative_to(folder).as_posix() for path in files)
    with Journal(journal) as lines, storing(store.url):
        sent = {line["name"]: Stamp(int(line["size"]), line["version"]) for line in lines.entries}
        there = _present(store)
        for name in wrap(names, len(names), "upload"):
            if name in sent and there.get(name) == sent[name]:
                continue
            path = folder / name
            if "/" in name:
                store.system.makedirs(store.at(name).rpartition("/")[0], exist_ok=True)
            store.system.put_file(str(path), store.at(name))
            arrived = _present(store).get(name)
            if arrived is None or arrived.nbytes != path.stat().st_size:
                raise OutputError(f"{store.url}/{name} did not arrive whole. Repeat the command.")
            lines.append({"name": name, "size": arrived.nbytes, "version": arrived.version})
        store.system.rm_file(store.at(CLAIM_NAME))


def upload_order(names: Iterator[str]) -> list[str]:
    """Names so that what makes the folder a model comes last: its config, else its weights."""

    def rank(name: str) -> tuple[int, str]:
        return (2 if name == MARKER_NAME else 1 if name.endswith(".gguf") else 0), name

    return sorted(names, key=rank)


def _present(store: Store) -> dict[str, Stamp]:
    """Files by their names relative to the folder, those in folders of it too."""
    with suppress(FileNotFoundError):
        store.system.invalidate_cache()
        return store.listing_below()
    return {}


def _owner(store: Store, stamp: Stamp) -> str | None:
    if stamp.nbytes > MOST_CLAIM_BYTES:
        return None
    try:
        claimed: Mapping[str, Any] = parse_json(store.system.cat_file(store.at(CLAIM_NAME)))
        return str(claimed["job"])
    except (ValueError, KeyError, TypeError):
        return None


def _abort_parts(store: Store) -> None:
    """Drop parts of files that a killed upload left: a store does not show them, but charges for them."""
    system = store.system
    if not hasattr(system, "list_multipart_uploads"):  # only S3 has them to be dropped
        return
    bucket, _, prefix = store.path.partition("/")
    for upload in system.list_multipart_uploads(bucket):
        if upload["Key"].startswith(f"{prefix}/"):
            system.abort_mpu(bucket, upload["Key"], upload["UploadId"])
