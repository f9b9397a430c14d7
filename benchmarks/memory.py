"""The memory that llama.cpp takes against what `--memory` counts.

    python benchmarks/memory.py MODEL [MODEL ...] [--only CHOICE] [--scratch DIR]

Each model is quantized for llama.cpp (`--method distortion --noise analytic --bits 3`; `--only Q4_0` for what is quick
to write). For every way to run it, what `--memory` counts is laid out as `alphaq plan` does, added to the file's bytes,
and set beside the largest resident memory of a process that loads the file with the same options and fills the whole
context of every sequence.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import SCRATCH, markdown_table, parser, save

from alphaq.engines.gguf import library
from alphaq.formats.ggml import GGML_TYPES

TITLE = "Memory of llama.cpp"
WAYS = ((512, 1, "f16"), (4096, 1, "f16"), (4096, 1, "q8_0"), (1024, 4, "f16"), (8192, 1, "q4_0"))
BATCH = 512
MIB = 2**20


def main() -> None:
    """Measure, print, and keep the result."""
    options = parser(__doc__)
    options.add_argument("models", nargs="*", type=Path)
    options.add_argument("--scratch", type=Path, default=SCRATCH)
    options.add_argument("--only", metavar="CHOICE", help="quantize everything so, instead of a mix of 3 bits")
    options.add_argument("--run", nargs=4, metavar=("FILE", "CONTEXT", "PARALLEL", "TYPE"), help="measure in this one")
    arguments = options.parse_args()
    if arguments.run:
        file, context, parallel, kind = arguments.run
        sys.stdout.write(f"{filled(Path(file), int(context), int(parallel), kind)}\n")
        return
    rows: list[dict[str, Any]] = [
        row for model in arguments.models for row in compared(model, arguments.scratch, arguments.only)
    ]
    table = markdown_table(list(rows[0]), [list(row.values()) for row in rows])
    save("memory", TITLE, rows, table, arguments.quick)


def compared(model: Path, scratch: Path, only: str | None) -> Iterator[dict[str, Any]]:
    """Counted and resident bytes of every way to run one model."""
    from alphaq.checkpoint.reader import open_checkpoint  # torch, which a process that is measured must not load
    from alphaq.nouns.serving import Serving
    from alphaq.planning.memory import memory_of

    out = scratch / f"memory-{model.name}"
    command = ["-m", "alphaq", "quantize", str(model), "--engine", "llama.cpp", "--method", "distortion"]
    command += ["--bits", "3"] if only is None else ["--bpw", "16", "--choices", only]
    if not out.exists():
        subprocess.run([sys.executable, *command, "--noise", "analytic", "-o", str(out)], check=True)
    file, checkpoint = out / "model.gguf", open_checkpoint(model)
    for context, parallel, kind in WAYS:
        serving = Serving(memory_bytes=2**50, context=context, parallel=parallel, kv_type=kind)
        counted = file.stat().st_size + memory_of(checkpoint, "llama.cpp", serving).kept.total
        asked = [__file__, "--run", str(file), str(context), str(parallel), kind]
        told = subprocess.run([sys.executable, *asked], check=True, capture_output=True, text=True)
        resident = int(told.stdout)
        yield {
            "model": model.name,
            "context": f"{parallel} × {context:,}",
            "cache": kind,
            "counted, MiB": round(counted / MIB, 1),
            "resident, MiB": round(resident / MIB, 1),
            "resident / counted": round(resident / counted, 3),
        }


def filled(file: Path, context: int, parallel: int, kind: str) -> int:
    """Largest resident bytes of this process after it has filled every sequence with random tokens."""
    llama = library.opened()
    model_params, params = llama.llama_model_default_params(), llama.llama_context_default_params()
    model_params.n_gpu_layers, model_params.use_extra_bufts = 0, False
    params.n_ctx, params.n_seq_max, params.swa_full = context * parallel, parallel, False
    params.type_k = params.type_v = GGML_TYPES[kind.upper()].number
    model = llama.llama_model_load_from_file(str(file).encode(), model_params)
    held = llama.llama_init_from_model(model, params)
    words = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    random = np.random.default_rng(0)
    for sequence in range(parallel):
        for begin in range(0, context, BATCH):
            count = min(BATCH, context - begin)
            owners, ones, wanted = (
                np.full(count, sequence, np.int32),
                np.ones(count, np.int32),
                np.zeros(count, np.int8),
            )
            wanted[-1] = 1
            arrays = dict(
                token=random.integers(0, words, count, dtype=np.int32),
                pos=np.arange(begin, begin + count, dtype=np.int32),
                n_seq_id=ones,
                seq_id=owners.ctypes.data + 4 * np.arange(count, dtype=np.uintp),
                logits=wanted,
            )
            batch = library.Batch(n_tokens=count, **{name: array.ctypes.data for name, array in arrays.items()})
            if llama.llama_decode(held, batch):
                raise SystemExit("llama.cpp does not compute the batch")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
