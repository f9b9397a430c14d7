"""Bytes that an S3-compatible server on this machine serves, beside the bytes that are needed.

    python benchmarks/object_store.py

Writes benchmarks/results/object_store.json.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def main() -> None:
    import objectstore

    server = objectstore.start()
    os.environ.update(server.environment(), ALPHAQ_CACHE=tempfile.mkdtemp())
    url = server.upload(ROOT / "src" / "alphaq" / "data" / "tiny", "models", "tiny")
    from alphaq.checkpoint.reader import open_checkpoint
    from alphaq.cli.app import main as run

    checkpoint = open_checkpoint(url)
    matrices = sum(checkpoint.stored_bytes(matrix) for matrix in checkpoint.matrices)
    experts = sum(checkpoint.stored_bytes(matrix) for matrix in checkpoint.planned)
    scratch = Path(tempfile.mkdtemp())
    plan = str(scratch / "plan.json")
    rows = {}
    for name, needed, arguments in (
        ("analyze", matrices, ["-o", str(scratch / "stats.csv")]),
        ("plan", experts, ["--bits", "2.5", "--method", "alphaq", "-o", plan]),
        ("quantize", 2 * checkpoint.nbytes, ["--plan", plan, "-o", str(scratch / "out")]),
    ):
        server.counter.reset()
        try:
            run([name, url, *arguments, "--workers", "1", *(["--no-cache"] if name != "quantize" else []), "--json"])
        except SystemExit as stop:
            if stop.code:
                raise
        served = server.counter.served
        rows[name] = {
            "needed_bytes": needed,
            "served_bytes": served,
            "ratio": served / needed,
            "requests": len(server.counter.requests),
        }
    result = {
        "benchmark": "object_store",
        "date": time.strftime("%Y-%m-%d"),
        "source_bytes": checkpoint.nbytes,
        "rows": rows,
    }
    (ROOT / "benchmarks" / "results" / "object_store.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.stderr.write(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
