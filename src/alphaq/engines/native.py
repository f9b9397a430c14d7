"""The native profile: every expert and projection chooses alone, files are safetensors.

Which bytes a plan will write is decided here and nowhere else, so that the size a plan promises is
the size of the files. Output shards mirror the source's, tensor by tensor, whatever the plan.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import TensorSpec, stored_bytes, total_bytes
from alphaq.engines.profile import Profile
from alphaq.records import CHOICE_BITS, GROUP_SIZES, Choice, MatrixRef, Role, Shape


def matrix_spec(matrix: MatrixRef, choice: Choice) -> TensorSpec:
    """How a matrix is stored: a uint8 block, or 16-bit values in the source's shape."""
    if choice.bits == 16:
        return TensorSpec("BF16" if matrix.dtype == "F32" else matrix.dtype, matrix.shape)
    return TensorSpec("U8", (choice.storage_bytes(matrix.shape),))


def shard_specs(checkpoint: Checkpoint, choices: Mapping[str, Choice]) -> dict[str, dict[str, TensorSpec]]:
    """Every tensor of every output shard. Matrices in `choices` are stored so, all others verbatim."""
    within = checkpoint.matrices_by_tensor(choices)
    return {
        output_name(position, len(checkpoint.shards)): {
            name: spec
            for stored, info in tensors.items()
            for name, spec in (
                [(matrix.name, matrix_spec(matrix, choices[matrix.name])) for matrix in within[stored]]
                if stored in within
                else [(stored, TensorSpec(info.dtype, info.shape))]
            )
        }
        for position, tensors in enumerate(checkpoint.shards.values(), start=1)
    }


def output_name(position: int, count: int) -> str:
    """Shard file name by the Hugging Face convention."""
    return f"model-{position:05d}-of-{count:05d}.safetensors"


def size_bytes(checkpoint: Checkpoint, choices: Mapping[str, Choice]) -> int:
    """Exact total size of the weight files, headers included."""
    return sum(total_bytes(specs.items()) for specs in shard_specs(checkpoint, choices).values())


def planned_matrices(checkpoint: Checkpoint) -> list[MatrixRef]:
    """Matrices that the budget decides on: every routed expert's projections."""
    return checkpoint.with_role(Role.EXPERT)


def byte_tables(matrices: list[MatrixRef], choices: tuple[Choice, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of each matrix at each choice, int64 [matrices, choices]: the block alone, and what it
    adds to a file (block and header entry)."""
    known: dict[tuple[Shape, str, int, Choice], tuple[int, int]] = {}  # a header entry depends on the name's length

    def sizes(matrix: MatrixRef, choice: Choice) -> tuple[int, int]:
        key = (matrix.shape, matrix.dtype, len(json.dumps(matrix.name)), choice)
        if key not in known:
            in_file = stored_bytes(matrix.name, matrix_spec(matrix, choice))
            known[key] = choice.storage_bytes(matrix.shape), in_file
        return known[key]

    table = np.array([[sizes(matrix, choice) for choice in choices] for matrix in matrices], dtype=np.int64)
    return table[:, :, 0], table[:, :, 1]


_ASYMMETRIC = tuple(Choice(bits, group_size) for bits in CHOICE_BITS for group_size in GROUP_SIZES)
_SYMMETRIC = tuple(Choice(bits, group_size, symmetric=True) for bits in CHOICE_BITS for group_size in GROUP_SIZES)

PROFILE = Profile(
    name="native",
    summary="safetensors for our own runtime: 1 to 8 bit, each expert and projection on its own",
    unit="matrix",
    choices=(*_ASYMMETRIC, *_SYMMETRIC, Choice(16)),
    defaults=_ASYMMETRIC,
    with_bits=lambda bits: Choice(bits, 0 if bits == 16 else 128),
    storage_bytes=Choice.storage_bytes,
    obstacle=lambda choice, matrix: None,
    exports=True,
)
