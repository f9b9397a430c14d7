"""Entropy coders on code planes: zstd's Huffman coder, which files use, beside constriction's ANS; and whole tensors.

python benchmarks/coding.py [--quick]
"""

from __future__ import annotations

from typing import Any

from common import alternate, markdown_table, parser, save

from alphaq.formats.table import parse_choice

TITLE = "Entropy coding"
ABOUT = """\
Codes of 1408 × 2048 Gaussian weights, as `alphaq quantize` stores them (`3g128`) and as it rounds them for coded files
(`@2.75`). MB/s are of the fixed-length block, codes, zero points and scales together; `decode` is `decode_tensor`, from
the coded tensor to the block that kernels read, on 8 tensors and all cores. The codes alone, one core: zstd as files
use it, and an ANS coder with a fixed model (`constriction`), whose symbols are single codes."""
SHAPE, QUICK_SHAPE = (1408, 2048), (256, 512)
CHOICES = ("2g128", "3g128", "4g128", "@1.75", "@2.75", "@3.75")
COPIES = 8


def run(name: str, shape: tuple[int, int]) -> dict[str, Any]:
    """One choice."""
    import constriction
    import numpy as np
    import torch
    import zstandard

    from alphaq.formats.blocks import encode
    from alphaq.formats.coding import _block_planes, decode_tensor, encode_tensor
    from alphaq.formats.packing import unpack
    from alphaq.quantizers.base import rounder_of
    from alphaq.simd.sums import in_threads

    torch.manual_seed(0)
    choice = parse_choice(name)
    matrix = rounder_of("debiased")(torch.randn(shape), choice)
    block = encode(matrix)
    coded = encode_tensor(block)
    codes = unpack(matrix.codes.numpy(), choice.bits, shape[1]).reshape(-1).astype(np.int32)
    counts = np.bincount(codes, minlength=2**choice.bits) / codes.size
    seen = counts[counts > 0]
    plane = _block_planes(block.numpy())[1]
    frame = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(plane.data)
    model = constriction.stream.model.Categorical(np.maximum(counts, 1e-9).astype(np.float32), perfect=False)
    encoder = constriction.stream.stack.AnsCoder()
    encoder.encode_reverse(codes, model)
    words = encoder.get_compressed()
    planes, _ = alternate(
        {
            "zstd": lambda: zstandard.ZstdDecompressor().decompress(frame),
            "constriction": lambda: constriction.stream.stack.AnsCoder(words).decode(model, codes.size),
        },
        rounds=5,
    )
    whole, _ = alternate(
        {
            "decode": lambda: in_threads(decode_tensor, [coded] * COPIES),
            "encode": lambda: in_threads(encode_tensor, [block] * COPIES),
        },
        rounds=5,
    )
    weights, packed = shape[0] * shape[1], matrix.codes.numel()
    return {
        "choice": name,
        "fixed_bits": 8 * block.numel() / weights,
        "coded_bits": 8 * coded.numel() / weights,
        "entropy": float(-(seen * np.log2(seen)).sum()),
        "zstd_bits": 8 * len(frame) / weights,
        "ans_bits": 32 * len(words) / weights,
        "decode_mb_s": COPIES * block.numel() / whole["decode"].median_s / 1e6,
        "encode_mb_s": COPIES * block.numel() / whole["encode"].median_s / 1e6,
        "zstd_mb_s": packed / planes["zstd"].median_s / 1e6,
        "ans_mb_s": packed / planes["constriction"].median_s / 1e6,
        "times": planes["constriction"].ratio,
    }


def render(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    header = ["choice", "bits/weight", "coded", "decode MB/s", "encode MB/s", "entropy of codes", "zstd", "ANS"]
    header += ["zstd MB/s", "ANS MB/s", "zstd is faster by"]
    table = [
        [
            f"`{row['choice']}`",
            *(f"{row[key]:.3f}" for key in ("fixed_bits", "coded_bits")),
            *(f"{row[key]:,.0f}" for key in ("decode_mb_s", "encode_mb_s")),
            *(f"{row[key]:.3f}" for key in ("entropy", "zstd_bits", "ans_bits")),
            *(f"{row[key]:,.0f}" for key in ("zstd_mb_s", "ans_mb_s")),
            f"{row['times']:.1f} ×",
        ]
        for row in rows
    ]
    return f"{ABOUT}\n\n{markdown_table(header, table)}"


def main() -> None:
    """Run, show and keep."""
    given = parser(__doc__).parse_args()
    rows = []
    for name in CHOICES:
        rows.append(run(name, QUICK_SHAPE if given.quick else SHAPE))
        save("coding", TITLE, rows, render(rows), given.quick)


if __name__ == "__main__":
    main()
