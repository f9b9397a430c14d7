"""Which files of a model's folder hold its weights, and what lies in them: one rule for all commands.

It is the rule of transformers (`_get_resolved_checkpoint_files`), so that what is quantized is what is loaded:

1. the file or index that config.json names as `transformers_weights`, where it names one;
2. `model.safetensors`, whatever lies beside it;
3. the shards that `model.safetensors.index.json` names; of a tensor in several of them the last one by name counts.

Nothing else is read, and what is left over is told. Pickles are refused: they run code when they are loaded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from alphaq.checkpoint.files import PlainFile, SourceFile, Stamp, check_link, is_file, read_json
from alphaq.checkpoint.incomplete import check_stubs
from alphaq.checkpoint.remote import Store
from alphaq.checkpoint.safetensors_format import parse_header, read_header
from alphaq.checkpoint.tensors import TensorInfo
from alphaq.errors import CheckpointError
from alphaq.work.untrusted import JsonObject, shown

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
NAMED_KEY = "transformers_weights"  # of config.json
_INDEX_SUFFIX = ".safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth")
_OWN_FORMAT = "consolidated"
"""What Mistral and others call the same weights in their own format, which nobody takes for these."""
_VARIANT = re.compile(r"model\.\w+(-\d{5}-of-\d{5})?\.safetensors")
"""Another precision of the same weights, which transformers loads on request only."""
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")

Shards = dict[str, dict[str, TensorInfo]]


@dataclass(frozen=True)
class WeightFiles:
    """Which files are read.

    places: the file of every tensor, as the index has it; empty without one. index: the index's name, if one is read.
    left: other weight files and indexes that are there.
    """

    names: tuple[str, ...]
    places: Mapping[str, str]
    index: str | None
    left: tuple[str, ...]

    def notes(self) -> tuple[str, ...]:
        """What a user should know of the choice."""
        if not self.left:
            return ()
        others = f" and {len(self.left) - 1} more" if len(self.left) > 1 else ""
        return (
            f"the weights are read from {self.index or self.names[0]}, as transformers does; {self.left[0]}{others} "
            f"{'are' if others else 'is'} not read. Remove what is out of date",
        )


@dataclass(frozen=True)
class Weights:
    """Checked headers of every weight file, a fingerprint over names, sizes and headers, and notes for the user."""

    shards: Shards
    fingerprint: str
    notes: tuple[str, ...]


def weight_files(folder: Path, present: Collection[str] | None = None) -> WeightFiles:
    """The files that hold a model's weights. Raises CheckpointError if there are none that can be read.

    present: names of the files that are there, where the weights are not in the folder itself.
    """
    names = {path.name for path in folder.iterdir() if is_file(path)} if present is None else set(present)
    if distributed := sorted(filter(_DISTRIBUTED.fullmatch, names)):
        raise CheckpointError(
            f"{folder} holds parts of a distributed checkpoint ({distributed[0]}), which transformers loads before all "
            "else. Load it there, and save it with save_pretrained on one process."
        )
    named = _named(folder)
    index = named if named is not None and named.endswith(_INDEX_SUFFIX) else None
    single = named if index is None else None
    if named is None:
        single = SINGLE_NAME if SINGLE_NAME in names else None
        index = INDEX_NAME if single is None and INDEX_NAME in names else None
    if index is not None:
        places = shard_index(folder / index)
        files = tuple(dict.fromkeys(places.values()))
    elif single is not None:
        places, files = {}, (single,)
    else:
        raise _without_weights(folder, names)
    return WeightFiles(files, places, index, _left_over(folder, names, {*files, index}))


def _named(folder: Path) -> str | None:
    """What the config names as its weights. Raises CheckpointError if that is no file of the folder."""
    path = folder / "config.json"
    name = read_json(path).get(NAMED_KEY) if is_file(path) else None
    if name is None:
        return None
    if not isinstance(name, str) or not re.fullmatch(r"[\w.\-]{1,240}\.safetensors(\.index\.json)?", name):
        raise CheckpointError(
            f"{path}: {NAMED_KEY} is {shown(name)}, which is not a safetensors file or index of this folder. "
            "Correct the name, or remove the line."
        )
    return name


def _left_over(folder: Path, names: Collection[str], used: Collection[str | None]) -> tuple[str, ...]:
    left = {
        name
        for name in names
        if name.endswith((".safetensors", _INDEX_SUFFIX))
        and name not in used
        and not (name.startswith(_OWN_FORMAT) or _VARIANT.fullmatch(name))
    }
    if INDEX_NAME in left:  # many publish one beside a single file
        index: JsonObject = {}
        with suppress(CheckpointError):  # whatever it is, nobody reads it
            index = _weight_map(folder / INDEX_NAME)
        if index and set(_checked(folder / INDEX_NAME, index).values()) <= set(used):
            left.remove(INDEX_NAME)
    return tuple(sorted(left))


def _without_weights(folder: Path, names: Collection[str]) -> CheckpointError:
    if pickles := sorted(name for name in names if name.endswith(_PICKLES)):
        return CheckpointError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when loaded. "
            "Convert them to safetensors first (`save_pretrained` in transformers does)."
        )
    others = sorted(name for name in names if name.endswith(".safetensors"))
    gguf = min((name for name in names if name.endswith(".gguf")), default=None)
    variant = next((name for name in others if _VARIANT.fullmatch(name)), None)
    remedy = "Complete the download."
    if variant is not None:
        remedy = f"{variant} is a variant, which nothing loads by itself: if it is the model, call it {SINGLE_NAME}."
    elif gguf is not None and not others:
        remedy = f"It holds GGUF files: name one on this machine, such as {gguf}."
    elif others and all(name.startswith(_OWN_FORMAT) for name in others):
        remedy = f"{others[0]} has the weights in another format. Download those for transformers."
    return CheckpointError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}. {remedy}")


def shard_index(path: Path) -> dict[str, str]:
    """Tensor name → shard file, as an index says. Shards must lie in its folder."""
    return _checked(path, _weight_map(path))


def _weight_map(path: Path) -> JsonObject:
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{path} has no weight_map. Download the index again.")
    return index


def _checked(path: Path, index: JsonObject) -> dict[str, str]:
    for name, shard in index.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.\-]{1,240}\.safetensors", shard):
            raise CheckpointError(
                f"{path.name} places {shown(name)} in {shown(shard)}, which is not a safetensors file of this folder. "
                "Do not use this checkpoint; its index may be hostile."
            )
    return index


def read_shards(
    folder: Path, stamps: Mapping[str, Stamp] | None = None, store: Store | None = None
) -> tuple[Shards, str]:
    """The headers and the fingerprint of `read_weights`."""
    weights = read_weights(folder, stamps, store)
    return weights.shards, weights.fingerprint


def read_weights(folder: Path, stamps: Mapping[str, Stamp] | None = None, store: Store | None = None) -> Weights:
    """Open every weight file of a folder. Raises CheckpointError.

    store: where the weights are, if not in the folder; then `stamps` says which files it has.
    """
    files = weight_files(folder, None if store is None else stamps)
    shards: Shards = {}
    digest = hashlib.sha256()
    for shard, (nbytes, tensors, raw) in zip(files.names, _headers(folder, files, stamps or {}, store), strict=True):
        shards[shard] = tensors
        digest.update(f"{shard}\0{nbytes}\0".encode() + raw)
    check_stubs(shards)

    def opened(shard: str) -> SourceFile:
        return PlainFile(folder / shard) if store is None else store.file(shard, (stamps or {})[shard])

    repeated = _without_repeats(shards, files, opened)
    stored = {name for tensors in shards.values() for name in tensors} if files.places else set()
    for name in files.places:
        if name not in stored:
            raise CheckpointError(
                f"{files.index} places {shown(name)} in {files.places[name]}, but it is not there. "
                "Download the shard again."
            )
    return Weights(shards, digest.hexdigest(), (*files.notes(), *repeated))


def _without_repeats(shards: Shards, files: WeightFiles, opened: Callable[[str], SourceFile]) -> tuple[str, ...]:
    """Leave each tensor in the one shard whose value counts; what a user should know of it.

    Raises CheckpointError if the index names another shard than transformers takes, and their values differ.
    """
    owner: dict[str, str] = {}
    repeats: dict[str, list[str]] = {}
    for shard, tensors in shards.items():
        for name in tensors:
            if (first := owner.setdefault(name, shard)) != shard:
                repeats.setdefault(name, [first]).append(shard)
    for name, holders in repeats.items():
        last = max(holders)
        said = files.places.get(name, last)
        if said in holders and said != last:
            _require_equal(name, {shard: shards[shard][name] for shard in (said, last)}, files, opened)
        for shard in holders:
            if shard != last:
                del shards[shard][name]
    for shard in [shard for shard, tensors in shards.items() if not tensors and repeats]:
        del shards[shard]
    if not repeats:
        return ()
    name = min(repeats)
    more = f" and {len(repeats) - 1} more" if len(repeats) > 1 else ""
    return (f"{name}{more} lies in several shards; {max(repeats[name])}, the last by name, counts, as in transformers",)


def _require_equal(
    name: str, infos: Mapping[str, TensorInfo], files: WeightFiles, opened: Callable[[str], SourceFile]
) -> None:
    (said, one), (last, other) = infos.items()
    same = (one.dtype, one.shape) == (other.dtype, other.shape) and all(
        left == right
        for left, right in zip(
            opened(said).chunks(one.begin, one.nbytes), opened(last).chunks(other.begin, other.nbytes), strict=True
        )
    )
    if not same:
        raise CheckpointError(
            f"Tensor {name!r} is in both {said} and {last}, with different values: {files.index} names the first, "
            f"transformers loads the last. Keep one of them and correct {files.index}."
        )


def _headers(
    folder: Path, files: WeightFiles, stamps: Mapping[str, Stamp], store: Store | None
) -> Iterator[tuple[int, dict[str, TensorInfo], bytes]]:
    """Size, checked header and its bytes of each weight file."""
    whose = "config" if files.index is None else "index"
    if store is not None:
        if missing := [name for name in files.names if name not in stamps]:
            raise CheckpointError(f"{store.url} lacks {missing[0]}, which its {whose} names. Complete the upload.")
        yield from store.map(files.names, lambda name: _remote_header(store, name, stamps[name]))
        return
    for name in files.names:
        path = folder / name
        if not is_file(path):
            raise CheckpointError(f"{folder} lacks {name}, which its {whose} names. Complete the download.")
        check_link(path)
        yield path.stat().st_size, *read_header(path)


def _remote_header(store: Store, name: str, stamp: Stamp) -> tuple[int, dict[str, TensorInfo], bytes]:
    file = store.file(name, stamp)
    header = parse_header(name, stamp.nbytes, lambda begin, nbytes: file.read(begin, nbytes).numpy().tobytes())
    return stamp.nbytes, *header
