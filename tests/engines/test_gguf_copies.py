"""What of a GGUF file is not to change comes out bit for bit, whatever its type; unknown tensors are kept and named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from alphaq.checkpoint.gguf.format import layout, read_gguf
from alphaq.checkpoint.gguf.values import GgufValue
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.gguf.profile import FILE_NAME
from alphaq.errors import CheckpointError
from alphaq.formats.ggml import GGML_BLOCKS
from alphaq.nouns.plan import Plan
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.pipeline import make_plan, measure_for_plan, quantize
from alphaq.planning import resolve
from alphaq.quantizers.ggml import blocks_of

pytest.importorskip("xllamacpp")

METADATA = {
    "general.architecture": GgufValue.of("string", "newest"),
    "newest.block_count": GgufValue.of("uint32", len(GGML_BLOCKS)),
    "newest.expert_count": GgufValue.of("uint32", 2),
}
ROWS, COLUMNS = 4, 256
UNKNOWN = "blk.0.unheard_of.weight"


def stored(type: str, rows: int, chance: np.random.Generator) -> bytes:
    """Rows of values in a type."""
    values = chance.standard_normal((rows, COLUMNS), np.float32)
    if type == "F32":
        return values.tobytes()
    if type == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    _, weights, nbytes = GGML_BLOCKS[type]
    codes = np.empty((rows, COLUMNS // weights * nbytes), np.uint8)
    blocks_of(values, type, np.ones(COLUMNS, np.float32), codes)
    return codes.tobytes()


def write(path: Path, types: dict[str, tuple[str, tuple[int, ...]]]) -> Path:
    header, places, nbytes = layout(METADATA, types)
    whole = bytearray(nbytes)
    whole[: len(header)] = header
    chance = np.random.default_rng(0)
    for name, (type, shape) in types.items():
        whole[places[name].begin : places[name].end] = stored(type, int(np.prod(shape[:-1])), chance)
    path.write_bytes(whole)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer of each type: experts, attention, and one tensor of an unknown name."""
    types: dict[str, tuple[str, tuple[int, ...]]] = {"token_embd.weight": ("Q6_K", (8, COLUMNS))}
    for layer, type in enumerate(GGML_BLOCKS):
        types[f"blk.{layer}.attn_q.weight"] = type, (ROWS, COLUMNS)
        types[f"blk.{layer}.attn_norm.weight"] = "F32", (1, COLUMNS)
        types[f"blk.{layer}.ffn_up_exps.weight"] = type, (2, ROWS, COLUMNS)
    types[UNKNOWN] = "MXFP4", (ROWS, COLUMNS)
    return write(tmp_path_factory.mktemp("copies") / "source.gguf", types)


def bytes_of(path: Path) -> dict[str, tuple[str, bytes]]:
    whole = path.read_bytes()
    return {one.name: (one.type, whole[one.begin : one.end]) for one in read_gguf(path).tensors.values()}


@pytest.mark.slow
def test_what_need_not_change_is_copied_whatever_its_type(source: Path, tmp_path: Path) -> None:
    """Where there is room for everything as it is, nothing is coded again: it would lose.

    Weights of three values each are the exception, which the other type for these holds without loss in fewer bytes.
    """
    checkpoint = open_checkpoint(source, quantized=True)
    room, kept = Budget(size_bytes=source.stat().st_size + 9999), dict(attention_bits=16, embedding_bits=16)
    request = resolve(PlanConfig(engine="llama.cpp", method="distortion", budget=room, **kept))
    request = request.with_stored(checkpoint)
    plan = make_plan(checkpoint, request, measure_for_plan(checkpoint, request))
    quantize(checkpoint, plan, tmp_path / "out")
    before, after = bytes_of(source), bytes_of(tmp_path / "out" / FILE_NAME)
    assert after.keys() == before.keys()
    assert {(before[name][0], after[name][0]) for name in before if before[name] != after[name]} == {("TQ2_0", "TQ1_0")}
    assert max(plan.expected_error.values()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("type", GGML_BLOCKS)
def test_a_type_that_is_asked_for_and_there_is_copied(type: str, source: Path, tmp_path: Path) -> None:
    """One layer keeps its type, all others become Q4_0: these change, but for Q4_0's own."""
    checkpoint = open_checkpoint(source, quantized=True)
    own = f"blk.{list(GGML_BLOCKS).index(type)}."
    choices = {one.name: type if one.name.startswith(own) else "Q4_0" for one in checkpoint.planned}
    result = quantize(checkpoint, Plan(engine="llama.cpp", choices=choices), tmp_path / "out")
    before, after = bytes_of(source), bytes_of(tmp_path / "out" / FILE_NAME)
    for name, held in before.items():
        changed = "exps" in name and not name.startswith(own) and held[0] != "Q4_0"
        assert (after[name] != held) == changed, name
    assert result.verified is not None and result.verified.quantized == len(choices)


@pytest.mark.slow
def test_what_is_kept_without_a_reason_of_llama_cpp_s_is_named(source: Path) -> None:
    checkpoint = open_checkpoint(source, quantized=True)
    assert checkpoint.notes == (f"kept as stored: {UNKNOWN} (a name that is not known)",)


@pytest.mark.parametrize("type", ["I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"])
def test_weights_of_types_that_no_weights_have_are_read_or_told(type: str, tmp_path: Path) -> None:
    shape = (2, ROWS, COLUMNS)
    tensors = {"blk.0.ffn_up_exps.weight": (type, shape)}
    header, _, nbytes = layout(METADATA, tensors)
    (tmp_path / "odd.gguf").write_bytes(header.ljust(nbytes, b"\0"))
    checkpoint = open_checkpoint(tmp_path / "odd.gguf", quantized=True)
    if type == "Q8_1":  # of activations only
        with pytest.raises(CheckpointError, match=r"stored as Q8_1 cannot be decoded\. Start from"):
            checkpoint.read(checkpoint.matrices[0])
        return
    assert not checkpoint.read(checkpoint.matrices[0]).any()
