"""Quantize models for every engine and by every quantizer, and print a digest of each output's weights.

    python scripts/same_bytes.py MODEL... > before.txt     # in one version
    python scripts/same_bytes.py MODEL... | diff before.txt -   # in another

Two versions write the same bytes if the digests are the same. Each line names a case, the digest of its weight files
and that of its plan's choices. Names that differ between versions can be mapped: --rename old=new, on the arguments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

PLANS = {
    # case: options of `alphaq plan`
    "native auto": "--bits 2.5 --no-check",
    "native alphaq": "--bits 3 --method alphaq",
    "native uniform 2g32s": "--bits 2 --method uniform --choices 2g32s --group-size 32",
    "native slim": "--bits 2.5 --method alphaq --choices 1g128,2g128-slim,3g128-slim,4g128s",
    "native salient": "--bits 2 --method alphaq --choices 1g128-pb4,1g128-pb8,2g128,3g64s",
    "native nested": "--bits 3 --method alphaq --choices 2g128-nest,3g128-nest,4g128-nest,1g128s",
    "native 16": "--bits 6 --method alphaq --choices 2,4,8,16 --attention-bits 8 --shared-bits 16 --head-bits 8",
    "native coded": "--bits 3 --method alphaq --codec zstd",
    "native rated": "--bits 3 --method alphaq --codec zstd --choices @1.5,@2.5,@3.5,@4.5",
    "llama.cpp": "--bits 3.5 --method alphaq --engine llama.cpp",
    "llama.cpp size": "--size {half} --method alphaq --engine llama.cpp",
    "vllm": "--bits 4 --method alphaq --engine vllm",
    "mlx": "--bits 4 --method alphaq --engine mlx",
    "gptqmodel": "--bits 4 --method alphaq --engine gptqmodel",
}
QUANTIZERS = ("rtn", "clipped", "minmax", "hqq", "gptq", "learned")
ROUNDED = {"native alphaq": QUANTIZERS, "gptqmodel": ("gptq",), "native coded": ("gptq",)}
CALIBRATED = ("gptq", "learned")


def alphaq(*arguments: str, rename: dict[str, str]) -> None:
    words = [rename.get(word, word) for word in arguments]
    subprocess.run([sys.executable, "-m", "alphaq", *words], check=True, capture_output=True, text=True)


def digest(paths: list[Path]) -> str:
    state = hashlib.sha256()
    for path in sorted(paths):
        state.update(path.name.encode())
        state.update(path.read_bytes())
    return state.hexdigest()[:24]


def weights(folder: Path) -> str:
    found = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf")]
    assert found, folder
    return digest(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--rename", nargs="*", default=[], help="old=new")
    parser.add_argument("--only", default="", help="cases that begin so")
    given = parser.parse_args()
    rename = dict(pair.split("=") for pair in given.rename)
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    for model in given.models:
        half = sum(path.stat().st_size for path in model.glob("*.safetensors")) * 2 // 5
        with TemporaryDirectory() as scratch:
            for case, options in PLANS.items():
                if not case.startswith(given.only):
                    continue
                plan, out = Path(scratch) / "plan.json", Path(scratch) / "out"
                words = options.format(half=half).split()
                alphaq("plan", str(model), *words, "-o", str(plan), rename=rename)
                choices = json.loads(plan.read_text())["choices"]
                chosen = hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:16]
                for quantizer in ("", *ROUNDED.get(case, ())):
                    more = ["--quantizer", quantizer] if quantizer else []
                    if quantizer in CALIBRATED:
                        more += ["--calibration", "self", "--calibration-tokens", "2048"]
                    alphaq("quantize", str(model), "--plan", str(plan), "-o", str(out), *more, rename=rename)
                    print(f"{model.name} | {case} | {quantizer} | {weights(out)} | {chosen}", flush=True)
                    if case == "native nested":
                        cut = Path(scratch) / "cut"
                        alphaq("slice", str(out), "--bits", "2.5", "--method", "alphaq", "-o", str(cut), rename=rename)
                        print(f"{model.name} | slice | | {weights(cut)}", flush=True)
                        subprocess.run(["rm", "-r", str(cut)], check=True)
                    if case == "native slim":
                        coded = Path(scratch) / "coded"
                        alphaq("recode", str(out), "-o", str(coded), rename=rename)
                        print(f"{model.name} | recode | | {weights(coded)}", flush=True)
                        subprocess.run(["rm", "-r", str(coded)], check=True)
                    subprocess.run(["rm", "-r", str(out)], check=True)


if __name__ == "__main__":
    main()
