"""An output on an object store: quantized in scratch space, uploaded, and removed there."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import alphaq
from alphaq.checkpoint.publishing import claim, publish
from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.remote import Store
from alphaq.errors import OutputError
from alphaq.measuring.resources import USUAL, Resources
from alphaq.nouns.plan import Plan
from alphaq.work.journal import Journal
from alphaq.writing.quantizing import quantize
from alphaq.writing.records import AS_USUAL, QuantizeResult, WriteOptions
from alphaq.writing.rounding import Rounding

UPLOADED_NAME = "uploaded.jsonl"


def quantize_to_store(
    checkpoint: Checkpoint,
    plan: Plan,
    store: Store,
    scratch: Path,
    options: WriteOptions = AS_USUAL,
    resources: Resources = USUAL,
) -> QuantizeResult:
    """`quantize` into a folder in `scratch`, then upload it, then remove it there.

    Started again with the same checkpoint and plan, an interrupted run goes on where it was, be it while quantizing or
    while uploading. Raises OutputError if another job is unfinished there, unless told to restart.
    """
    job = _digest(checkpoint, plan, options)
    staging = scratch / f".{store.name}.upload-{hashlib.sha256(store.url.encode()).hexdigest()[:12]}"
    with _staging(staging, store, job, options.restart) as run:
        claim(store, job, options.restart)
        out = staging / store.name
        done = next((line["result"] for line in run.entries if "result" in line), None)
        if done is None or not out.exists():
            if out.exists():  # the process was killed between the two
                shutil.rmtree(out)
            # What was to be discarded went with all that was staged.
            local = quantize(checkpoint, plan, out, replace(options, restart=False), resources)
            result = _of_store(local, store)
            run.append({"result": result.model_dump(mode="json")})
        else:
            result = QuantizeResult.model_validate(done)
        publish(out, store, job, staging / UPLOADED_NAME, resources.wrap)
        shutil.rmtree(staging, ignore_errors=True)
    return result


def _digest(checkpoint: Checkpoint, plan: Plan, options: WriteOptions) -> str:
    """What tells a job from others; it is written into the claim."""
    facts = [
        *(checkpoint.fingerprint, checkpoint.contents(options.hash_contents), checkpoint.settings_digest()),
        *(plan.to_json(), alphaq.__version__, str(options.rounding or Rounding.of(plan.engine))),
        "" if options.imatrix is None else options.imatrix.digest,
    ]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


@contextmanager
def _staging(staging: Path, store: Store, job: str, restart: bool) -> Iterator[Journal]:
    """The folder of an upload's run, with its journal; no other run may be at work there."""
    try:
        staging.mkdir(exist_ok=True)
        journal = Journal(staging / "run.jsonl")
    except OSError as error:
        raise OutputError(f"Cannot write {staging}: {error.strerror or error}. Choose another --scratch.") from error
    with journal as run:
        earlier = next((line["job"] for line in run.entries if "job" in line), job)
        if earlier != job and not restart:
            raise OutputError(
                f"An unfinished run for {store.url} is in {staging}, of another checkpoint or plan. Repeat the earlier "
                "command to finish it, or add --restart to discard it."
            )
        if earlier != job or restart:
            _empty(staging)
            run.clear()
        if not run.entries:
            run.append({"job": job})
        yield run


def _empty(staging: Path) -> None:
    """Remove what a discarded run has left, but for the journal that is open."""
    for path in staging.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name == UPLOADED_NAME:
            path.unlink()


def _of_store(result: QuantizeResult, store: Store) -> QuantizeResult:
    """The result with addresses in place of paths."""
    files = tuple(f"{store.url}/{Path(file).name}" for file in result.files)
    return result.model_copy(update={"files": files, "out": store.url})
