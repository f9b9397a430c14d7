"""Copies of checkpoints whose matrices are stored in few bits, beside what independent decoders make of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.weights import INDEX_NAME

Tensors = dict[str, Tensor]
Coder = Callable[[str, Tensor], tuple[Tensors, Tensor] | None]
"""Stored tensors by name, and the bf16 values that they stand for, of a weight; None for one that stays as it is."""


@dataclass(frozen=True)
class Pair:
    """The same weights in codes and decoded."""

    coded: Path
    plain: Path


def load(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """Config and tensors of a checkpoint."""
    tensors = {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
    return json.loads((folder / "config.json").read_text()), tensors


def save(folder: Path, config: Mapping[str, Any], shards: Mapping[str, Tensors]) -> Path:
    """A checkpoint of these files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for shard, tensors in shards.items():
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / shard, {"format": "pt"})
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def is_linear(name: str, value: Tensor) -> bool:
    """Whether quantizers change it."""
    kept = ("embed", "lm_head", "mlp.gate.", "norm", "shared_expert_gate")
    return value.ndim >= 2 and not any(part in name for part in kept)


def coded_pair(base: Path, source: Path, code: Coder, config: Mapping[str, Any], **plain: Any) -> Pair:
    """A checkpoint's copies in codes, with these settings in its config, and decoded, with those."""
    own, tensors = load(source)
    coded, decoded = {}, dict(tensors)
    for name, value in tensors.items():
        if is_linear(name, value) and (found := code(name, value)) is not None:
            stored, decoded[name] = found
            coded.update(stored)
        else:
            coded[name] = value
    return Pair(
        save(base / "coded", {**own, **config}, {"model-1.safetensors": coded}),
        save(base / "plain", {**own, **plain}, {"model-1.safetensors": decoded}),
    )


def changed(source: Path, out: Path, change: Callable[[Tensors], object], **settings: object) -> Path:
    """A copy after `change` has worked on its tensors, and these settings on its quantization_config."""
    config, tensors = load(source)
    change(tensors)
    config["quantization_config"] = {**config.get("quantization_config", {}), **settings}
    return save(out, config, {"model-1.safetensors": tensors})


def assert_same_values(found: Checkpoint, expected: Checkpoint) -> None:
    """Both have the same matrices and tensors, to the bit, however they are read."""
    by_name = {matrix.name: matrix for matrix in expected.matrices}
    assert by_name.keys() == {matrix.name for matrix in found.matrices}
    for matrix in found.matrices:
        other = by_name[matrix.name]
        assert (matrix.shape, matrix.dtype, matrix.role) == (other.shape, other.dtype, other.role)
        assert torch.equal(found.read(matrix), expected.read(other)), matrix.name
        rows = slice(3, min(9, matrix.shape[0]))
        assert torch.equal(found.read_rows(matrix, rows), expected.read(other)[rows]), matrix.name
        assert found.read(matrix).is_contiguous()
    assert found.shard_of.keys() == expected.shard_of.keys()
    for name in found.shard_of:
        whole = found.tensor(name)
        assert torch.equal(whole, expected.tensor(name)) and whole.dtype == expected.tensor(name).dtype, name
        assert (found.info(name).dtype, found.info(name).shape) == (expected.info(name).dtype, whole.shape)
