"""What comes along beside the weights: tokenizer, templates, processors, code, licence, and all that these refer to.

Copying is not running: code files (`auto_map`) are data here, and only those that a config names come along. Files come
from within the model's folder only, in bounded number and size; what is referred to and does not come along is told.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from alphaq.checkpoint.encoded.announced import QUANTIZER_FILES
from alphaq.checkpoint.files import check_link, is_file
from alphaq.nouns.fidelity import CERTIFICATE_NAME
from alphaq.work.untrusted import MAX_JSON_BYTES, parse_json, read_bounded, shown

SIDE_FILES = (
    *("*.json", "*.txt", "*.model", "*.model.v*", "*.jinja", "*.tiktoken", "*.spm", "*.bpe", "*.codes", "*.vocab"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*", "README.md"),
)
"""Those that come along whether something refers to them or not; they lie in the folder itself."""
CODE_FILES = ("*.py",)
"""Those that come along if something refers to them."""
TEMPLATE_FOLDER = "additional_chat_templates/"
NOT_CARRIED = {
    *("config.json", "plan.json", "alphaq_manifest.json", CERTIFICATE_NAME),  # every output has its own
    *("adapter_config.json", *QUANTIZER_FILES),
}
"""Files that say something of the source's weights."""
MOST_SIDE_FILES, MOST_SIDE_BYTES = 1000, MAX_JSON_BYTES
MOST_NOTES = 20
MOST_SCANNED_BYTES = 1_000_000
"""Of a config or a code file that is searched for names of other files; vocabularies are larger and name none."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_NAMES_FOLDERS = re.compile(r"dir|path|folder|file|template", re.IGNORECASE)
_PATH = re.compile(r"[\w\-. +@/]{1,240}")
_AUTO_CLASS = re.compile(r"([\w/]+)\.\w+")
_OUTSIDE = re.compile(r"[/~\\].*|[A-Za-z]:.*|(?:.*[/\\])?\.\.(?:[/\\].*)?")
_IMPORTED = re.compile(r"^\s*from\s+\.([\w.]+)\s+import\b", re.MULTILINE)
_QUOTED = re.compile(r"""["']([\w\-./]+)["']""")


@dataclass(frozen=True)
class SideFiles:
    """Names relative to the folder, with forward slashes; and what does not come along, and why."""

    names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def is_small(name: str) -> bool:
    """Whether a file in the folder itself is small by its name: configs and indexes, and what is carried over."""
    return any(fnmatchcase(name, pattern) for pattern in (*SIDE_FILES, *CODE_FILES))


def is_carried(name: str) -> bool:
    """Whether a file in the folder itself comes along by its name, even if nothing refers to it."""
    return _may_be_carried(name) and any(fnmatchcase(name, pattern) for pattern in SIDE_FILES)


def side_files(folder: Path) -> SideFiles:
    """The files to carry over from a folder. Raises CheckpointError for a link out of it."""
    entries = {path.name for path in folder.iterdir()}
    wanted = References.of(folder, entries)
    names = {name for name in entries | wanted.files if is_carried(name) or ("/" not in name and name in wanted)}
    for top in sorted(wanted.tops()):
        names.update(name for name in files_below(folder, top) if name in wanted)
    notes = [
        f"{shown(name)}, which {by} names, lies outside of the folder" for name, by in sorted(wanted.outside.items())
    ]
    kept = []
    for name in sorted(names, key=lambda name: ("/" in name, name)):
        if not _may_be_carried(name) or not is_file(folder / name):
            continue
        check_link(folder / name, folder)
        if reason := _obstacle(folder / name):
            notes.append(f"{name} {reason}")
        else:
            kept.append(name)
    if len(kept) > MOST_SIDE_FILES:
        notes.append(f"{len(kept) - MOST_SIDE_FILES} of {len(kept)} small files, more than {MOST_SIDE_FILES}")
    return SideFiles(tuple(kept[:MOST_SIDE_FILES]), tuple(f"not copied: {note}" for note in notes))


def _may_be_carried(name: str) -> bool:
    """Whether a file is neither the model's weights, which are written anew, nor says something of them."""
    return "/" in name or (name not in NOT_CARRIED and not name.endswith((".index.json", ".safetensors", ".gguf")))


def _obstacle(path: Path) -> str | None:
    if path.name.endswith(_WEIGHTS):
        return "holds weights"
    nbytes = path.stat().st_size
    return f"has {nbytes} bytes, more than the {MOST_SIDE_BYTES} of a small file" if nbytes > MOST_SIDE_BYTES else None


def files_below(folder: Path, top: str = "") -> Iterator[str]:
    """Files under the folder or one of its own, by their names relative to the former; hidden ones are left out.

    Links to folders are not followed, but for `top` itself. Raises CheckpointError for a link out of the folder.
    """
    if top and (folder / top).is_symlink():
        check_link(folder / top, folder)
    waiting, seen = [folder / top], 0
    while waiting:
        here = waiting.pop()
        for path in sorted(here.iterdir()) if here.is_dir() else ():
            seen += 1
            if seen > 10 * MOST_SIDE_FILES:
                return
            if path.name.startswith((".", "__pycache__")):
                continue
            if not path.is_dir():
                yield path.relative_to(folder).as_posix()
            elif path.is_symlink():
                check_link(path, folder)
            else:
                waiting.append(path)


@dataclass(frozen=True)
class References:
    """What configs and code files refer to: names of files, and of folders with a slash at the end.

    outside: files out of the folder, with the file that names each.
    """

    files: frozenset[str]
    folders: frozenset[str]
    outside: dict[str, str]

    def __contains__(self, name: str) -> bool:
        parents = (name[: at + 1] for at, character in enumerate(name) if character == "/")
        return name in self.files or any(parent in self.folders for parent in parents)

    def tops(self) -> set[str]:
        """What lies in the folder and holds something that is referred to."""
        return {name.partition("/")[0] for name in (*self.files, *self.folders) if "/" in name}

    def among(self, names: Iterable[str]) -> list[str]:
        """Of the files that lie somewhere else, those below a folder that are referred to."""
        nested = (name for name in names if "/" in name and name in self and not name.endswith(_WEIGHTS))
        return sorted(nested)[:MOST_SIDE_FILES]

    @classmethod
    def of(cls, folder: Path, entries: Collection[str]) -> References:
        """What configs in a folder refer to, and code that they name, of what the folder has (`entries`)."""
        files: set[str] = set()
        folders = {TEMPLATE_FOLDER} if TEMPLATE_FOLDER[:-1] in entries else set()
        outside: dict[str, str] = {}
        waiting = sorted(name for name in entries if name.endswith(".json") and name != "tokenizer.json")
        while waiting:
            by = waiting.pop()
            for text, of_folder in _named_in(folder / by):
                name = posixpath.normpath(posixpath.join(posixpath.dirname(by), text) if by.endswith(".py") else text)
                if _OUTSIDE.fullmatch(name):
                    own = posixpath.basename(name) in entries  # which is what others find under that name
                    if not own and len(outside) < MOST_NOTES and is_file(folder / name):
                        outside.setdefault(text, by)
                elif name.partition("/")[0] in entries and _PATH.fullmatch(name):
                    if of_folder or "/" in text:
                        folders.add(f"{name}/")
                    if name.endswith(".py") and name not in files:
                        waiting.append(name)
                    files.add(name)
        return cls(frozenset(files), frozenset(folders), outside)


def _named_in(path: Path) -> Iterator[tuple[str, bool]]:
    """What may be a path in a file, and whether it may be one of a folder."""
    if not is_file(path) or path.stat().st_size > MOST_SCANNED_BYTES:
        return
    raw = read_bounded(path, MOST_SCANNED_BYTES)
    if path.suffix == ".py":
        text = raw.decode(errors="replace")
        yield from ((one, False) for one in _QUOTED.findall(text))
        for module in _IMPORTED.findall(text):
            yield f"{module.replace('.', '/')}.py", False
            yield module.partition(".")[0], True
        return
    try:
        data = parse_json(raw)
    except ValueError:
        return
    yield from _strings(data, "")


def _strings(data: Any, key: str) -> Iterator[tuple[str, bool]]:
    waiting: list[tuple[str, Any]] = [(key, data)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, one) for one in value]
        elif isinstance(value, str) and value:
            yield value, _NAMES_FOLDERS.search(key) is not None
            if match := _AUTO_CLASS.fullmatch(value):
                yield f"{match[1]}.py", False
                yield match[1].rpartition("/")[0], True
