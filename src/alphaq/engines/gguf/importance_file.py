"""Write what was gathered as llama.cpp's own importance matrix, which `llama-quantize --imatrix` reads too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alphaq.checkpoint.writer import atomic_file
from alphaq.engines.gguf.gathering import Gathered
from alphaq.engines.gguf.package import package


def write_imatrix(path: Path, gathered: Gathered, datasets: Sequence[str]) -> None:
    """Σx² and counts of every weight, and where they come from. Raises OutputError where it cannot be written."""
    with atomic_file(path) as partial:
        writer = package().GGUFWriter(str(partial), "imatrix")
        count, length = gathered.ids.shape
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(datasets))
        writer.add_uint32("imatrix.chunk_count", count)
        writer.add_uint32("imatrix.chunk_size", length)
        for name, moments in sorted(gathered.seen.moments.items()):
            writer.add_tensor(f"{name}.in_sum2", moments.squares.astype(np.float32))
            writer.add_tensor(f"{name}.counts", moments.tokens.astype(np.float32)[:, None])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
