"""What lies in a folder in place of what should: pointers of a clone without Git LFS, stubs of partitioned training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from alphaq.checkpoint.files import is_file, open_file
from alphaq.checkpoint.tensors import TensorInfo
from alphaq.errors import CheckpointError
from alphaq.work.untrusted import MAX_POINTER_BYTES

FLOATS = ("F64", "F32", "F16", "BF16")


def check_fetched(folder: Path, patterns: Iterable[str]) -> None:
    """CheckpointError if a file that such a pattern names is a Git LFS pointer, before another library reads it."""
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        if is_file(path) and path.stat().st_size <= MAX_POINTER_BYTES:
            open_file(path).close()


def check_stubs(shards: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """CheckpointError if weights are empty, as DeepSpeed leaves them where every process holds a part.

    Its ZeRO-3 replaces each parameter by a tensor of shape [0]; saved as it is, the model is a list of names.
    """
    floats = [(shard, info) for shard, held in shards.items() for info in held.values() if info.dtype in FLOATS]
    empty = [(shard, info) for shard, info in floats if info.shape == (0,)]
    if empty:
        shard, first = empty[0]
        raise CheckpointError(
            f"{shard}: {first.name} is empty (shape [0]), one of {len(empty)} such tensors of {len(floats)}: DeepSpeed "
            "ZeRO-3 saved stubs, the weights lie in its own checkpoint. Run the zero_to_fp32.py beside that, or save "
            "again with stage3_gather_16bit_weights_on_model_save."
        )
