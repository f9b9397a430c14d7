"""The llama.cpp profile: one ggml type for a projection of all a layer's experts, stored as one 3-D tensor.

A type stores whole blocks of a row, and a GGUF file pads each tensor to 32 bytes. The rest of the file
(header, metadata, tokenizer) is not counted here. Source: the `gguf` package, which the tests compare.
"""

from __future__ import annotations

from alphaq.engines.profile import Profile
from alphaq.errors import ChoiceError
from alphaq.ggml import GGML_BLOCKS
from alphaq.records import Choice, MatrixRef, Shape

ALIGNMENT_BYTES = 32

# Σ(w − ŵ)²/Σw² by `str(choice)`, of 512×1024 standard normal weights (NumPy's default_rng(0), float32) quantized
# by llama.cpp's own ggml_quantize_chunk (xllamacpp 2026.10) with an importance matrix of ones. The scale of the
# weights does not matter. Without an importance matrix the error of some types is larger: 0.339 for IQ1_M.
GAUSSIAN_ERROR: dict[str, float] = {
    "IQ1_S": 0.236,
    "IQ1_M": 0.204,
    "IQ2_XXS": 0.118,
    "IQ2_XS": 0.0897,
    "IQ2_S": 0.0619,
    "Q2_K": 0.0718,
    "IQ3_XXS": 0.0330,
    "IQ3_S": 0.0188,
    "Q3_K": 0.0209,
    "IQ4_XS": 0.00571,
    "IQ4_NL": 0.00561,
    "Q4_0": 0.00665,
    "Q4_1": 0.00488,
    "Q4_K": 0.00500,
    "Q5_0": 0.00164,
    "Q5_1": 0.00114,
    "Q5_K": 0.00125,
    "Q6_K": 0.000299,
    "Q8_0": 0.0000287,
    "16": 0.0,
}

TYPE_OF_BITS = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0", 16: "16"}


def with_bits(bits: int) -> Choice:
    """The K type of that width, Q8_0, or 16. Raises ChoiceError for any other."""
    if bits not in TYPE_OF_BITS:
        available = ", ".join(f"{width} ({name})" for width, name in TYPE_OF_BITS.items() if width != 16)
        raise ChoiceError(
            f"{bits} bits name no usual type of llama.cpp. Available: {available}, 16 (kept). Or name a ggml type."
        )
    return Choice.parse(TYPE_OF_BITS[bits])


def storage_bytes(choice: Choice, shape: Shape) -> int:
    """Bytes of a matrix's blocks, padded to GGUF's alignment. Rows must be whole blocks (see `obstacle`).

    Exact for a tensor of its own. A 3-D tensor is padded once, not once per expert, so its experts' sum is an
    upper bound (below 32 bytes of excess each); it is exact if a matrix has a multiple of 16 blocks, as it has
    whenever its rows are a multiple of 16, because every block has an even number of bytes.
    """
    rows, columns = shape
    size = (
        rows * (columns // choice.group_size) * GGML_BLOCKS[choice.scheme][2] if choice.scheme else 2 * rows * columns
    )
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def obstacle(choice: Choice, matrix: MatrixRef) -> str | None:
    """llama.cpp stores no partial blocks."""
    columns = matrix.shape[1]
    if choice.scheme and columns % choice.group_size:
        return f"rows of {columns} weights are not whole {choice.scheme} blocks of {choice.group_size}"
    return None


def _is_beaten(name: str) -> bool:
    """Whether another type is at least as small, as exact and as fine-grained, and better in one of them."""
    merits = {other: (size / block, GAUSSIAN_ERROR[other], block) for other, (_, block, size) in GGML_BLOCKS.items()}
    return any(
        merit != merits[name] and all(mine >= theirs for mine, theirs in zip(merits[name], merit, strict=True))
        for merit in merits.values()
    )


PROFILE = Profile(
    name="llama.cpp",
    summary="GGUF: any ggml type (1.56 to 8.5 bits), one per layer and projection",
    unit="layer × projection",
    choices=(*map(Choice.parse, GGML_BLOCKS), Choice(16)),
    # Types with blocks of 32 stay in: many experts have rows that are no multiple of 256 (1408 in Qwen1.5-MoE).
    defaults=tuple(Choice.parse(name) for name in GGML_BLOCKS if not _is_beaten(name)),
    with_bits=with_bits,
    storage_bytes=storage_bytes,
    obstacle=obstacle,
)
