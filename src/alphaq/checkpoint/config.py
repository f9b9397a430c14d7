"""Read config.json, which decides what transformers would run."""

from __future__ import annotations

from pathlib import Path

from alphaq.checkpoint.files import is_file, read_json
from alphaq.checkpoint.incomplete import check_fetched
from alphaq.checkpoint.side_files import SIDE_FILES
from alphaq.errors import CheckpointError
from alphaq.work.untrusted import JsonObject, shown

_IMPLEMENTATIONS = {"attn_implementation", "_attn_implementation", "experts_implementation"}
"""Keys by which transformers lets a config choose kernels, also those of any repository."""


def read_config(folder: Path) -> JsonObject:
    """The checkpoint's config.json as a dict. Raises CheckpointError."""
    path = folder / "config.json"
    if not is_file(path):
        raise CheckpointError(f"{folder} has no config.json. Point to a Hugging Face model folder.")
    check_fetched(folder, SIDE_FILES)
    config = read_json(path)
    if not isinstance(config.get("quantization_config"), (dict, type(None))):
        raise CheckpointError(f"{path}: quantization_config is not an object. Restore the file.")
    parts: list[JsonObject] = [config]
    while parts:  # of a multi-modal model each has settings of its own
        part = parts.pop()
        parts += [value for value in part.values() if isinstance(value, dict)]
        for key in sorted(_IMPLEMENTATIONS & part.keys()):
            if "/" in str(part[key]):
                raise CheckpointError(f"{path}: {key} asks for code from the hub, {shown(part[key])}. Remove the line.")
    return config
