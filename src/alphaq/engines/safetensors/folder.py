"""What makes safetensors files a Hugging Face model: config, index, tokenizer and other side files."""

from __future__ import annotations

from collections.abc import Iterable, Set
from pathlib import Path

from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.weights import INDEX_NAME
from alphaq.checkpoint.writer import checksum, copy_file
from alphaq.engines.effective import TIED, head_of, says_tied
from alphaq.engines.export import Entry, write_json
from alphaq.nouns.matrix import Role
from alphaq.work.untrusted import JsonObject


def write_model_folder(folder: Path, checkpoint: Checkpoint, entries: Iterable[Entry], config: JsonObject) -> None:
    """What makes safetensors files a Hugging Face model: config, index, tokenizer and other side files."""
    weight_map, total, quantized = {}, 0, set()
    for entry in entries:
        if entry.choice is not None and not entry.choice.kept:
            quantized.add(entry.name)
        for (tensor, _), place in zip(entry.parts, entry.places, strict=True):
            weight_map[tensor] = place.file
            total += place.nbytes
    write_json(folder / "config.json", {**checkpoint.config, **own_head(checkpoint, quantized), **config})
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    for path in checkpoint.side_files():
        copied = folder / path.relative_to(checkpoint.folder)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copy_file(path, copied)


def own_head(checkpoint: Checkpoint, quantized: Set[str]) -> JsonObject:
    """What config.json must say where it calls a head tied that the files hold with other weights: engines differ in
    which of the two they believe. quantized: names of matrices that differ whatever they were."""
    head = head_of(checkpoint)
    embedding = next((name for name, role in checkpoint.roles.items() if role is Role.EMBEDDING), None)
    if head is None or not says_tied(checkpoint):
        return {}
    if embedding and not {head, embedding} & quantized and _same_bytes(checkpoint, head, embedding):
        return {}
    nested = {
        key: {**part, TIED: False} for key, part in checkpoint.config.items() if isinstance(part, dict) and TIED in part
    }
    return {TIED: False, **nested}


def _same_bytes(checkpoint: Checkpoint, one: str, other: str) -> bool:
    first, second = (checkpoint.info(name) for name in (one, other))
    if (first.dtype, first.shape, first.encoding) != (second.dtype, second.shape, second.encoding):
        return False
    files = (checkpoint.file(checkpoint.shard_of[name]) for name in (one, other))
    sums = {checksum(file.chunks(info.begin, info.nbytes)) for file, info in zip(files, (first, second), strict=True)}
    return len(sums) == 1
