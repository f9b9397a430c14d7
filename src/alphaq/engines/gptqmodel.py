"""The GPTQModel profile: every expert and projection chooses alone, in the GPTQ v2 layout.

A GPTQ file stores zero points whether or not they are all equal, so a symmetric choice would save nothing: only
asymmetric ones are offered. They are packed as they are (v2); v1 stores the zero point minus one and so has no
place for zero. Source: GPTQModel's TorchLinear, which runs on any device.
"""

from __future__ import annotations

from alphaq.engines.profile import Profile
from alphaq.errors import ChoiceError
from alphaq.records import GROUP_SIZES, Choice, MatrixRef, Shape

BITS = (2, 3, 4, 8)
DEFAULT_GROUP_SIZE = 128  # GPTQModel's own
PACKED_ROWS = 32  # 32 codes fill whole int32 words at every width


def with_bits(bits: int) -> Choice:
    """Groups of 128, or 16. Raises ChoiceError for a width that GPTQModel lacks."""
    if bits == 16:
        return Choice(16)
    if bits not in BITS:
        raise ChoiceError(f"GPTQModel has no {bits}-bit weights. Available: {', '.join(map(str, BITS))}, 16 (kept).")
    return Choice(bits, DEFAULT_GROUP_SIZE)


def storage_bytes(choice: Choice, shape: Shape) -> int:
    """Exact bytes of `qweight` int32 [in·b/32, out], `qzeros` int32 [groups, out·b/32], `scales` float16
    [groups, out] and `g_idx` int32 [in]."""
    if choice.bits == 16:
        return 2 * shape[0] * shape[1]
    return sum(choice.parts(shape)) + 4 * shape[1]


def obstacle(choice: Choice, matrix: MatrixRef) -> str | None:
    """Codes are packed along the columns and zero points along the rows, in whole words; groups are whole too."""
    if choice.bits == 16:
        return None
    rows, columns = matrix.shape
    if rows % PACKED_ROWS or columns % PACKED_ROWS:
        return f"its shape {rows}×{columns} is not in multiples of {PACKED_ROWS}"
    if columns % choice.group_size:
        return f"{columns} columns are not divisible by the group size {choice.group_size}"
    return None


_QUANTIZED = tuple(Choice(bits, group_size) for bits in BITS for group_size in GROUP_SIZES)

PROFILE = Profile(
    name="gptqmodel",
    summary="GPTQ v2: 2, 3, 4, 8 bit, each expert and projection on its own",
    unit="matrix",
    choices=(*_QUANTIZED, Choice(16)),
    defaults=_QUANTIZED,
    with_bits=with_bits,
    storage_bytes=storage_bytes,
    obstacle=obstacle,
)
