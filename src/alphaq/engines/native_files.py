"""Write and check native checkpoints: safetensors, config, tokenizer, plan and manifest.

The manifest holds a checksum per tensor and the relative squared error per quantized matrix, so that
`verify` can tell damage from the loss that was agreed to.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from alphaq.checkpoint.files import PlainFile
from alphaq.checkpoint.reader import INDEX_NAME, Checkpoint, read_config, read_shards
from alphaq.checkpoint.safetensors_format import TORCH_DTYPES, TensorInfo, TensorSpec, read_header
from alphaq.checkpoint.writer import create_shard
from alphaq.engines.native import shard_specs
from alphaq.errors import CheckpointError, VerificationError
from alphaq.quantizers.packing import decode, dequantize, read_block_header
from alphaq.records import Choice, Plan, first_fault

PLAN_NAME = "plan.json"
MANIFEST_NAME = "alphaq_manifest.json"
QUANT_METHOD = "alphaq"


def create_shards(
    folder: Path, checkpoint: Checkpoint, choices: Mapping[str, Choice]
) -> dict[str, dict[str, TensorInfo]]:
    """Make every weight file at its full size, data still missing; returns file name → tensor → place."""
    return {name: create_shard(folder / name, specs) for name, specs in shard_specs(checkpoint, choices).items()}


def write_rest(
    folder: Path, checkpoint: Checkpoint, plan: Plan, manifest: Mapping[str, TensorRecord], weight_map: dict[str, str]
) -> None:
    """Everything beside the weight files: config, index, manifest, plan, tokenizer."""
    quantization_config = {
        "quant_method": QUANT_METHOD,
        "format_version": 1,
        "average_bits": plan.average_bits,
        "bits_per_weight": plan.bits_per_weight,
    }
    total = sum(info.nbytes for shard in set(weight_map.values()) for info in read_header(folder / shard)[0].values())
    _write_json(folder / "config.json", checkpoint.config | {"quantization_config": quantization_config})
    _write_json(
        folder / INDEX_NAME,
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )
    (folder / MANIFEST_NAME).write_text(
        Manifest(tensors=dict(sorted(manifest.items()))).model_dump_json(indent=1, exclude_none=True) + "\n",
        encoding="utf-8",
    )
    (folder / PLAN_NAME).write_text(plan.to_json(), encoding="utf-8")
    for path in checkpoint.side_files():
        shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


class TensorRecord(BaseModel):
    """A manifest entry: checksum of a tensor's bytes, and Σ(w − ŵ)²/Σw² if it was quantized."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    blake2b: str
    relative_error: float | None = None


class Manifest(BaseModel):
    """What `alphaq_manifest.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    tensors: dict[str, TensorRecord]


def read_manifest(path: Path) -> dict[str, TensorRecord]:
    """The entries by tensor name. Raises CheckpointError naming the first fault."""
    try:
        return Manifest.model_validate_json(path.read_bytes()).tensors
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({first_fault(error)}). Copy the files again, or quantize again."
        ) from None


class NativeFiles:
    """A native checkpoint opened for reading: plan, manifest and tensors one at a time."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(f"No folder {folder}. Point to the output of `alphaq quantize`.")
        config = read_config(folder) if (folder / "config.json").is_file() else {}
        if config.get("quantization_config", {}).get("quant_method") != QUANT_METHOD:
            raise CheckpointError(f"{folder} is not an alphaq checkpoint. Point to the output of `alphaq quantize`.")
        for name in (PLAN_NAME, MANIFEST_NAME):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder} has no {name}. Complete the copy, or quantize again.")
        self.folder = folder
        self.plan = Plan.from_json((folder / PLAN_NAME).read_bytes(), str(folder / PLAN_NAME))
        self.shards, _ = read_shards(folder)
        self.manifest = read_manifest(folder / MANIFEST_NAME)

    def tensors(self) -> Iterable[tuple[TensorInfo, torch.Tensor]]:
        """Every stored tensor with its raw bytes, in file order."""
        for shard, infos in self.shards.items():
            file = PlainFile(self.folder / shard)
            for info in infos.values():
                yield info, file.read(info.begin, info.nbytes)


def restore(info: TensorInfo, raw: torch.Tensor, quantized: bool) -> torch.Tensor:
    """Values of a stored tensor: a block dequantized to float32, anything else in its own dtype."""
    if quantized:
        return dequantize(decode(raw, info.name))
    return raw.view(TORCH_DTYPES[info.dtype]).view(info.shape)


def fault_of(info: TensorInfo, raw: torch.Tensor, choice: Choice, expected: TensorSpec | None) -> str | None:
    """What is wrong with a planned matrix's shape or form, or None."""
    if expected is not None and (info.dtype, info.shape) != (expected.dtype, expected.shape):
        return f"{info.name} is {info.dtype} {list(info.shape)}, the plan says {expected.dtype} {list(expected.shape)}"
    if choice.bits == 16:
        return None if info.dtype in ("BF16", "F16") else f"{info.name} is {info.dtype}, the plan keeps 16 bits"
    try:
        stored, _ = read_block_header(raw, info.name)
    except CheckpointError as error:
        return str(error)
    return None if stored == choice else f"{info.name} is stored as {stored}, the plan says {choice}"


def check_complete(files: NativeFiles) -> list[str]:
    """Faults that show without reading data: missing tensors, and a total size other than promised."""
    found = {name for infos in files.shards.values() for name in infos}
    faults = [f"{name} is missing" for name in sorted((set(files.manifest) | set(files.plan.choices)) - found)]
    real = sum((files.folder / shard).stat().st_size for shard in files.shards)
    if files.plan.size_bytes is not None and real != files.plan.size_bytes:
        faults.append(f"the weight files have {real} bytes, the plan promises {files.plan.size_bytes}")
    return faults


def raise_faults(folder: Path, faults: list[str]) -> None:
    """VerificationError with the first fault and the count, if there is any."""
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise VerificationError(f"{folder}: {faults[0]}{more}. Copy the files again, or quantize again.")
