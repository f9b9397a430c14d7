"""The MLX profile: affine groups with a scale and a bias each, one choice per layer and projection.

w ≈ scale·q + bias, q unsigned: our asymmetric choice, with 16 bits for the offset instead of a zero point.
Sizes hold for 16-bit scales and biases; `mlx.core.quantize` keeps its input's type, so weights are handed
over in 16 bits. Source: mlx and mlx-lm 0.32.
"""

from __future__ import annotations

from alphaq.engines.profile import Profile
from alphaq.errors import ChoiceError
from alphaq.records import GROUP_SIZES, Choice, MatrixRef, Shape

BITS = (2, 3, 4, 5, 6, 8)
DEFAULT_GROUP_SIZE = 64  # mlx's own


def with_bits(bits: int) -> Choice:
    """Groups of 64, or 16. Raises ChoiceError for a width that MLX lacks."""
    if bits == 16:
        return Choice(16)
    if bits not in BITS:
        raise ChoiceError(f"MLX has no {bits}-bit weights. Available: {', '.join(map(str, BITS))}, 16 (kept).")
    return Choice(bits, DEFAULT_GROUP_SIZE)


def storage_bytes(choice: Choice, shape: Shape) -> int:
    """Exact bytes of `weight` uint32 [out, in·b/32], `scales` and `biases` 16-bit [out, in/g] each."""
    if choice.bits == 16:
        return 2 * shape[0] * shape[1]
    codes, _, scales = choice.parts(shape)
    return codes + 2 * scales


def obstacle(choice: Choice, matrix: MatrixRef) -> str | None:
    """MLX refuses ragged groups. Whole groups are whole words, since 32 divides every group size."""
    columns = matrix.shape[1]
    if choice.bits != 16 and columns % choice.group_size:
        return f"{columns} columns are not divisible by the group size {choice.group_size}"
    return None


_QUANTIZED = tuple(Choice(bits, group_size) for bits in BITS for group_size in GROUP_SIZES)

PROFILE = Profile(
    name="mlx",
    summary="MLX affine: 2, 3, 4, 5, 6, 8 bit, one choice per layer and projection",
    unit="layer × projection",
    choices=(*_QUANTIZED, Choice(16)),
    defaults=_QUANTIZED,
    with_bits=with_bits,
    storage_bytes=storage_bytes,
    obstacle=obstacle,
)
