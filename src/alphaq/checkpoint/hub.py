"""Models of the Hugging Face hub: of each just what is needed, in the cache that its other users share.

The small files are fetched first. They and the list of the model's files say which files hold the weights, by the rule
that holds for folders; `original/`, `consolidated.safetensors` and weights in other formats stay where they are.
Weights that are only looked at stay there altogether: their headers are read by ranges.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from alphaq.checkpoint.files import is_file
from alphaq.checkpoint.remote import Store
from alphaq.checkpoint.side_files import CODE_FILES, SIDE_FILES, References
from alphaq.checkpoint.weights import weight_files
from alphaq.errors import CheckpointError, first_line

LISTING_TIMEOUT_S = 20


def resolve_folder(model: str, revision: str | None = None) -> Path:
    """A local folder, or the hub cache's with the files of a hub id. Raises CheckpointError."""
    return local_folder(model) or _download(model, revision)


def local_folder(model: str | Path) -> Path | None:
    """A local folder; None for a hub id. Raises CheckpointError for what is neither."""
    folder = expanded(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{model} is a file. Point to the model's folder instead.")
    if not re.fullmatch(r"[\w\-][\w.\-]*/[\w.\-]+", str(model)) or ".." in str(model):
        raise CheckpointError(f"No folder {model}. Check the path, or give a hub id such as Qwen/Qwen3-30B-A3B.")
    return None


def expanded(model: str | Path) -> Path:
    """The path that a user means. Raises CheckpointError if there can be none."""
    try:
        path = Path(model).expanduser()
        path.is_dir()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{model} is not a path ({error}). Check it.") from None
    return path


def small_files(model: str, revision: str | None) -> tuple[Path, Store | None]:
    """The folder with a hub model's small files, and where its weights are: None if the folder has them too."""
    folder, names = _small_files(model, revision)
    if names is None or all(is_file(folder / name) for name in weight_files(folder, names).names):
        return folder, None
    return folder, Store.of(f"hf://{model}@{_commit(folder) or revision or 'main'}")


def _download(model: str, revision: str | None) -> Path:
    """The folder with all that is needed of a hub model."""
    folder, names = _small_files(model, revision)
    return _complete(model, revision, folder, weight_files(folder, names).names)


def _small_files(model: str, revision: str | None) -> tuple[Path, Collection[str] | None]:
    """The folder with the small files, and the names of all files at the top; None for these if nobody tells."""
    folder = _snapshot(model, revision, (*SIDE_FILES, *CODE_FILES), ("*/*",))
    names = _listing(model, _commit(folder) or revision)
    if names is None:
        return folder, None
    below = References.of(folder, {name.partition("/")[0] for name in names}).among(names)
    folder = _complete(model, revision, folder, below)
    return folder, {*(name for name in names if "/" not in name), *(path.name for path in folder.iterdir())}


def _complete(model: str, revision: str | None, folder: Path, names: Collection[str]) -> Path:
    """The folder with some more files."""
    if all(is_file(folder / name) for name in names):
        return folder
    return _snapshot(model, _commit(folder) or revision, [glob.escape(name) for name in names])


def model_name(folder: Path) -> str:
    """The folder's name; of a model from the hub, whose folder in the cache is a commit, the model's."""
    whole = folder.absolute()
    return whole.name if _commit(whole) is None else whole.parents[1].name.split("--")[-1]


def _commit(folder: Path) -> str | None:
    """The commit that a folder of the hub's cache holds."""
    return folder.name if folder.parent.name == "snapshots" else None


def _snapshot(model: str, revision: str | None, wanted: Collection[str], ignored: Collection[str] = ()) -> Path:
    """The cache's folder, with the files of some names or patterns."""
    from huggingface_hub import snapshot_download

    with _asking(model):
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(ignored) or None
            )
        )


def _listing(model: str, revision: str | None) -> list[str] | None:
    """Names of all files of a model; None if the hub cannot be reached, as then the cache must do."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        siblings = HfApi().model_info(model, revision=revision, timeout=LISTING_TIMEOUT_S).siblings
    except (HfHubHTTPError, HFValidationError) as error:
        raise _unreachable(model, error) from None
    except Exception:  # its client for HTTP, whose errors are its own, changes from version to version
        return None
    return [file.rfilename for file in siblings or ()]


@contextmanager
def _asking(model: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _unreachable(model, error) from None


def _unreachable(model: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{model} is no local folder and could not be fetched from the hub ({first_line(error)}). "
        "Check the name, the network and, for gated models, `hf auth login`."
    )
