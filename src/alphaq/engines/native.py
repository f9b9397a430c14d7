"""The native profile: every expert and projection chooses alone, files are safetensors.

A matrix becomes one self-describing uint8 block under its own name, so that transformers' conversions apply
unchanged. Output shards mirror the source's, tensor by tensor, whatever the plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from alphaq.checkpoint.families.routing import own_counts
from alphaq.checkpoint.reader import NATIVE_METHOD, Checkpoint
from alphaq.checkpoint.safetensors_format import TensorSpec
from alphaq.engines.export import Export, Layout, Part, Rows, Run, Stored
from alphaq.engines.profile import ROLE_BITS, Profile
from alphaq.engines.running import run_in_transformers
from alphaq.engines.safetensors.folder import write_model_folder
from alphaq.engines.safetensors.layout import added_bytes, kept_fault, kept_part, safetensors_layout, safetensors_stored
from alphaq.errors import CheckpointError
from alphaq.formats.blocks import decode, dequantized_rows, encode, read_block_header
from alphaq.formats.table import format_of, formats, plain_choice, storage_bytes, stored_choice
from alphaq.formats.trellis import FORMAT as TRELLIS
from alphaq.formats.versions import NATIVE_FORMAT_VERSION, UNEVEN
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role, Shape
from alphaq.nouns.plan import Plan


def part(matrix: MatrixRef, choice: Choice) -> Part:
    """A block of bytes, or 16-bit values."""
    if choice.kept:
        return kept_part(matrix, matrix.name)
    return Part(matrix.name, TensorSpec("U8", (storage_bytes(choice, matrix.shape),)))


def layout(checkpoint: Checkpoint, choices: Mapping[str, Choice]) -> Layout:
    """Every tensor of every output shard. Matrices in `choices` are stored so, all others verbatim."""
    return safetensors_layout(checkpoint, choices, lambda matrix, choice: (part(matrix, choice),))


def reader(parts: Sequence[torch.Tensor], choice: Choice, shape: Shape, name: str) -> Rows:
    """Rows of a block. Raises CheckpointError if it is damaged or of another choice."""
    if why := fault(name, choice, (), parts):
        raise CheckpointError(f"{why}. Quantize the model again.")
    matrix = decode(parts[0], name)
    return lambda rows: dequantized_rows(matrix, rows)


def fault(name: str, choice: Choice, stored: Sequence[Stored], parts: Sequence[torch.Tensor]) -> str | None:
    """Why a block is not what the plan says, or None."""
    if choice.kept:
        return kept_fault(name, stored)
    try:
        found, _ = read_block_header(parts[0], name)
    except CheckpointError as error:
        return str(error)
    return None if found == stored_choice(choice) else f"{name} is stored as {found}, the plan says {choice}"


def write_rest(folder: Path, checkpoint: Checkpoint, plan: Plan, written: Layout) -> None:
    """Config, index and tokenizer."""
    quantization = {
        "quant_method": NATIVE_METHOD,
        "format_version": NATIVE_FORMAT_VERSION,
        "average_bits": plan.average_bits,
        "bits_per_weight": plan.bits_per_weight,
    }
    if own_counts(checkpoint.architecture, checkpoint.config):  # which vLLM is not told of elsewhere
        quantization[UNEVEN] = True
    write_model_folder(folder, checkpoint, written.entries, {"quantization_config": quantization})


_CHOICES = tuple(choice for form in formats() if not form.foreign for choice in form.choices())
_PLAIN = tuple(choice for choice in _CHOICES if not (choice.name or choice.kept or choice.symmetric))

PROFILE = Profile(
    name="native",
    summary="safetensors for our own runtime: 1 to 4 bit in quarters, 5 to 8, each expert and projection on its own",
    unit="matrix",
    choices=_CHOICES,
    defaults=tuple(
        choice for choice in _CHOICES if format_of(choice) is TRELLIS or (choice in _PLAIN and choice.bits > 4)
    ),
    fast=_PLAIN,
    with_bits=plain_choice,
    storage_bytes=storage_bytes,
    file_bytes=lambda checkpoint, matrix, choice: added_bytes((part(matrix, choice),)),
    obstacle=lambda choice, matrix: None,
    quantizer="debiased",
    searchable=True,
    uneven=True,
    on_request=frozenset({Role.EMBEDDING, Role.HEAD}),
    role_bits=ROLE_BITS | {Role.MIXER: 4},
    export=Export(
        layout=layout,
        encode=lambda matrix: (encode(matrix),),
        reader=reader,
        stored=safetensors_stored,
        usage='Try it: alphaq generate {out} "def main"',
        write_rest=write_rest,
        fault=fault,
        run=Run("our runtime in transformers", run_in_transformers, tolerance=0.01),
        codable=True,
        holds_codes=True,
    ),
)
