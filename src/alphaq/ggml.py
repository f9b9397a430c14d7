"""Storage types of llama.cpp: how many weights share a block, and how many bytes a block takes.

Source: the constants of the `gguf` package (GGML_QUANT_SIZES); a test compares them. Rows must be whole blocks.
"""

from __future__ import annotations

GGML_BLOCKS: dict[str, tuple[int, int, int]] = {
    # name: (bits in the name, weights per block, bytes per block)
    "IQ1_S": (1, 256, 50),
    "IQ1_M": (1, 256, 56),
    "IQ2_XXS": (2, 256, 66),
    "IQ2_XS": (2, 256, 74),
    "IQ2_S": (2, 256, 82),
    "Q2_K": (2, 256, 84),
    "IQ3_XXS": (3, 256, 98),
    "IQ3_S": (3, 256, 110),
    "Q3_K": (3, 256, 110),
    "IQ4_XS": (4, 256, 136),
    "IQ4_NL": (4, 32, 18),
    "Q4_0": (4, 32, 18),
    "Q4_1": (4, 32, 20),
    "Q4_K": (4, 256, 144),
    "Q5_0": (5, 32, 22),
    "Q5_1": (5, 32, 24),
    "Q5_K": (5, 256, 176),
    "Q6_K": (6, 256, 210),
    "Q8_0": (8, 32, 34),
}
