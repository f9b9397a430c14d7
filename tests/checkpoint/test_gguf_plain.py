"""GGUF files of architectures that no table describes, opened by the names of their tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_gguf_source import write_small

from alphaq.checkpoint.gguf.plain import kind_of
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import CheckpointError
from alphaq.nouns.matrix import Role

gguf = pytest.importorskip("gguf")
COUNTS = dict(block_count=2, context_length=64, embedding_length=32, expert_count=4, expert_used_count=2)
TENSORS: dict[str, Any] = {
    "token_embd.weight": ((6, 32), "F16"),
    "blk.0.attn_q.weight": ((16, 32), "F16"),
    "blk.0.attn_k_b.weight": ((2, 8, 32), "F16"),
    "blk.0.attn_sinks.weight": ((4,), "F32"),
    "blk.0.ffn_gate_inp.weight": ((4, 32), "F32"),
    "blk.0.ffn_down_exps.weight": ((4, 32, 64), "BF16"),
    "blk.0.ffn_down_exps.bias": ((4, 32), "F32"),
    "blk.1.ffn_up_exps.weight": ((4, 40, 32), "BF16"),
    "blk.1.ffn_down_exps.weight": ((4, 32, 40), "BF16"),
    "blk.1.ssm_conv1d.weight": ((64, 4), "F32"),
    "blk.1.ssm_a": ((64, 16), "F32"),
    "blk.1.unheard_of.weight": ((64, 32), "F32"),
    "blk.1.table.weight": ((64, 32), "I32"),
}


def test_matrices_and_roles_follow_from_names(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_small(tmp_path / "x.gguf", "newest", TENSORS, **COUNTS))
    assert checkpoint.plain and checkpoint.architecture.name == "newest"
    found = {one.name: (one.role, one.projection, one.layer, one.expert, one.shape) for one in checkpoint.matrices}
    experts = {f"blk.0.ffn_down_exps.{n}.weight": (Role.EXPERT, "down", 0, n, (32, 64)) for n in range(4)}
    assert found == {
        "token_embd.weight": (Role.EMBEDDING, None, None, None, (6, 32)),
        "blk.0.attn_q.weight": (Role.ATTENTION, "q_proj", 0, None, (16, 32)),
        "blk.0.attn_k_b.weight": (Role.ATTENTION, "k_b_proj", 0, None, (16, 32)),
        **experts,
        **{f"blk.1.ffn_up_exps.{n}.weight": (Role.EXPERT, "up", 1, n, (40, 32)) for n in range(4)},
    }
    assert checkpoint.planned_role is Role.EXPERT
    assert checkpoint.roles["blk.0.ffn_gate_inp.weight"] is Role.ROUTER


def test_what_is_kept_although_it_is_large_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_small(tmp_path / "x.gguf", "newest", TENSORS, **COUNTS))
    assert checkpoint.notes == (
        "kept as stored: blk.1.ffn_down_exps.weight (rows of 40 weights, which are no whole blocks of 32)",
        "kept as stored: blk.1.unheard_of.weight, blk.1.table.weight (a name that is not known)",
    )
    assert checkpoint.info("blk.1.ffn_down_exps.weight").shape == (4, 32, 40)


def test_an_expert_is_its_part_of_the_stack(tmp_path: Path) -> None:
    path = write_small(tmp_path / "x.gguf", "newest", TENSORS, **COUNTS)
    place = open_checkpoint(path).gguf_tensor("blk.0.ffn_down_exps.2.weight")
    values = torch.randn(4, 32, 64).bfloat16()
    raw = bytearray(path.read_bytes())
    raw[place.begin : place.end] = values.view(torch.uint8).numpy().tobytes()
    path.write_bytes(raw)
    checkpoint = open_checkpoint(path)
    for number in range(4):
        matrix = next(one for one in checkpoint.planned if one.layer == 0 and one.expert == number)
        assert torch.equal(checkpoint.read(matrix), values[number])


def test_a_known_family_with_an_unknown_tensor_is_read_by_names(tmp_path: Path) -> None:
    counts = COUNTS | dict(feed_forward_length=32, attention__head_count=2, attention__layer_norm_rms_epsilon=0)
    checkpoint = open_checkpoint(write_small(tmp_path / "x.gguf", "olmoe", TENSORS, **counts))
    assert checkpoint.plain
    assert "is not a known tensor of a olmoe model" in checkpoint.notes[0]


@pytest.mark.parametrize(
    ("tensors", "counts", "message"),
    [
        ({}, COUNTS | dict(block_count=0), "newest.block_count is no count of layers"),
        ({}, COUNTS | dict(expert_count=10**6), "newest.expert_count is 1000000"),
        (
            {"blk.0.ffn_up_exps.weight": ((2, 32, 32), "F16"), "blk.0.ffn_up_exps.1.weight": ((32, 32), "F16")},
            COUNTS,
            "are the same",
        ),
        ({"output.weight": ((4, 256), "Q4_K")}, COUNTS, "already quantized to Q4_K.*--requantize"),
    ],
)
def test_what_cannot_be_a_model_is_refused(tmp_path: Path, tensors: Any, counts: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_small(tmp_path / "x.gguf", "newest", tensors, **counts))


@pytest.mark.parametrize("type", ["Q4_K", "MXFP4", "IQ2_XS", "NVFP4"])
def test_what_is_quantized_is_read_if_it_may_be(type: str, tmp_path: Path) -> None:
    from alphaq.formats.ggml import GGML_TYPES
    from alphaq.quantizers.ggml import blocks_of

    values = np.random.default_rng(0).standard_normal((8, 256), np.float32)
    kind = GGML_TYPES[type]
    codes = np.empty((8, 256 // kind.block_weights * kind.block_bytes), np.uint8)
    blocks_of(values, type, np.ones(256, np.float32), codes)
    path = write_small(tmp_path / "x.gguf", "newest", {"blk.0.ffn_up.weight": ((8, 256), type)}, **COUNTS)
    place = open_checkpoint(path, quantized=True).gguf_tensor("blk.0.ffn_up.weight")
    raw = bytearray(path.read_bytes())
    raw[place.begin : place.end] = codes.tobytes()
    path.write_bytes(raw)
    checkpoint = open_checkpoint(path, quantized=True)
    restored = checkpoint.read(checkpoint.matrices[0]).numpy()
    assert np.square(restored - values).sum() < 0.3 * np.square(values).sum()


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        ("blk.0.attn_q_norm.weight", (64, 64), "a norm"),
        ("blk.0.ffn_gate_inp_shexp.weight", (64, 64), "it decides which experts a token goes to"),
        ("blk.0.attn_q.bias", (64, 64), "no weight"),
        ("blk.0.attn_q.weight", (1, 64), "a vector"),
        ("blk.0.attn_q.weight", (64, 64), ""),
        ("blk.0.shortconv.in_proj.weight", (64, 64), ""),
        ("blk.0.shortconv.conv.weight", (64, 64), "a short convolution, which has no kernel for quantized weights"),
    ],
)
def test_the_predicate_says_why(name: str, shape: tuple[int, ...], why: str) -> None:
    assert kind_of(name, shape).why == why
