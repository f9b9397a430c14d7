"""The vLLM profile: compressed-tensors `pack-quantized`, one choice for all experts of a layer.

Marlin's fused experts take symmetric 4 and 8 bit with groups of 32, 64 and 128 if the hidden size is a multiple
of 128; other hidden sizes fall back to Triton. On CPU only ZenDNN's kernel takes groups of 32, and none takes
8 bits in groups. Under tensor parallelism the group size must also divide each rank's share of the intermediate
size, which depends on the server, not the file. Source: vLLM 0.32.
"""

from __future__ import annotations

from alphaq.engines.profile import Profile
from alphaq.errors import ChoiceError
from alphaq.records import GROUP_SIZES, Choice, MatrixRef, Shape

CHOICE_OF_BITS = {4: Choice(4, 128, symmetric=True), 8: Choice(8, 128, symmetric=True), 16: Choice(16)}
WEIGHT_SHAPE_BYTES = 16  # int64[2]


def with_bits(bits: int) -> Choice:
    """Symmetric with groups of 128, or 16. Raises ChoiceError unless bits is 4, 8 or 16."""
    if bits not in CHOICE_OF_BITS:
        raise ChoiceError(f"vLLM's fused experts have no {bits}-bit kernel. Available: 4, 8, 16 (kept).")
    return CHOICE_OF_BITS[bits]


def storage_bytes(choice: Choice, shape: Shape) -> int:
    """Exact bytes of `weight_packed` int32 [out, ⌈in·b/32⌉], `weight_scale` 16-bit [out, in/g] and `weight_shape`."""
    if choice.bits == 16:
        return 2 * shape[0] * shape[1]
    return sum(choice.parts(shape)) + WEIGHT_SHAPE_BYTES


def obstacle(choice: Choice, matrix: MatrixRef) -> str | None:
    """vLLM refuses ragged groups."""
    columns = matrix.shape[1]
    if choice.bits != 16 and columns % choice.group_size:
        return f"{columns} columns are not divisible by the group size {choice.group_size}"
    return None


_QUANTIZED = tuple(Choice(bits, group_size, symmetric=True) for bits in (4, 8) for group_size in GROUP_SIZES)

PROFILE = Profile(
    name="vllm",
    summary="compressed-tensors: 4 and 8 bit symmetric, one choice per layer",
    unit="layer",
    choices=(*_QUANTIZED, Choice(16)),
    defaults=_QUANTIZED,
    with_bits=with_bits,
    storage_bytes=storage_bytes,
    obstacle=obstacle,
)
