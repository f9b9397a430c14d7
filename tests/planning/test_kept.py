"""Roles of what mixes tokens, and what a plan leaves in 16 bits, as a user sees them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import Role
from alphaq.nouns.settings import Budget, PlanConfig, Rule
from alphaq.planning import Scope, resolve
from alphaq.planning.kept import LEAST_SHARE, kept_shares
from families import random_family, save_layout


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model with state-space layers."""
    return open_checkpoint(save_layout(random_family("granitemoehybrid"), tmp_path_factory.mktemp("hybrid"), True))


def fixed(source: Checkpoint, engine: str = "native", **settings: Any) -> dict[str, Choice]:
    request = resolve(PlanConfig(budget=Budget(bits=4.0), engine=engine, method="alphaq", **settings))
    return dict(Scope.of(source, request).fixed)


def bits(source: Checkpoint, chosen: dict[str, Choice], role: Role) -> set[int]:
    return {chosen[matrix.name].bits if matrix.name in chosen else 16 for matrix in source.with_role(role)}


def test_mixers_are_quantized_like_attention_and_have_pins_of_their_own(hybrid: Checkpoint) -> None:
    assert {matrix.projection or matrix.name.split(".")[-2] for matrix in hybrid.with_role(Role.MIXER)} == {
        "in_proj",
        "out_proj",
    }
    assert bits(hybrid, fixed(hybrid), Role.MIXER) == {4}
    both = fixed(hybrid, attention_bits=8)
    assert bits(hybrid, both, Role.MIXER) == bits(hybrid, both, Role.ATTENTION) == {8}
    apart = fixed(hybrid, pins=(Rule(pattern="mixer", value="6"),))
    assert (bits(hybrid, apart, Role.MIXER), bits(hybrid, apart, Role.ATTENTION)) == ({6}, {4})


@pytest.mark.parametrize("engine", ["vllm", "mlx", "gptqmodel"])
def test_mixers_stay_in_16_bits_where_no_writer_holds_them(hybrid: Checkpoint, engine: str) -> None:
    assert bits(hybrid, fixed(hybrid, engine), Role.MIXER) == {16}


def test_what_is_not_named_is_less_than_the_least_share(hybrid: Checkpoint) -> None:
    chosen = fixed(hybrid) | {matrix.name: Choice(3, 128) for matrix in hybrid.planned}
    kept = kept_shares(hybrid, chosen)
    total = sum(math.prod(info.shape) for tensors in hybrid.shards.values() for info in tensors.values())
    left = 1 - sum(matrix.parameters for matrix in hybrid.matrices if matrix.name in chosen) / total
    assert 0 <= left - sum(kept.values()) < LEAST_SHARE
    assert all(share >= LEAST_SHARE for share in kept.values())
    assert list(kept.values()) == sorted(kept.values(), reverse=True)
    without = kept_shares(hybrid, {})
    assert sum(without.values()) == pytest.approx(1, abs=LEAST_SHARE)
    assert "model.layers.*.mamba.in_proj.weight" in without
    assert "model.layers.*.mamba.in_proj.weight" not in kept


@pytest.mark.usefixtures("knows_tiny")
def test_plan_and_explain_name_what_stays_in_16_bits(tiny: Path, alphaq: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    planned = alphaq("plan", tiny, "--bits", 4, "--method", "distortion", "--attention-bits", 16, "-o", out)
    named = json.loads(out.read_text())["kept"]
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.*.self_attn.q_proj.weight"} <= named.keys()
    explained = alphaq("explain", out)
    for output in (planned.out, explained.out):
        assert "in 16 bits, of all parameters" in output
        assert "lm_head.weight" in output
    assert alphaq("explain", out, "--json").json["kept"] == named
