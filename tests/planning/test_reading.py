"""Bytes that a token reads, and the speed that a plan is to reach."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Ran

QUICK = ("--method", "distortion", "--noise", "analytic", "--engine", "native")


def planned(alphaq: Callable[..., Ran], model: Path, *options: str) -> dict[str, object]:
    ran = alphaq("plan", model, *QUICK, *options, "--json")
    assert ran.code == 0, ran.err
    told: dict[str, object] = ran.json
    return told


def test_a_token_reads_the_experts_it_goes_to_and_all_else_but_the_embedding(
    tiny: Path, alphaq: Callable[..., Ran]
) -> None:
    plan = planned(alphaq, tiny, "--size", "14MB", "--choices", "4", "--attention-bits", "16", "--shared-bits", "16")
    config = json.loads((tiny / "config.json").read_text())
    from alphaq.checkpoint.reader import open_checkpoint
    from alphaq.formats.table import format_of, parse_choice
    from alphaq.nouns.matrix import Role

    checkpoint, expected = open_checkpoint(tiny), 0.0
    share = config["num_experts_per_tok"] / config["num_experts"]
    choices: dict[str, str] = plan["choices"]  # type: ignore[assignment]
    for matrix in checkpoint.matrices:
        choice = parse_choice(choices.get(matrix.name, "16"))
        nbytes = format_of(choice).storage_bytes(choice, matrix.shape)
        tied = not checkpoint.with_role(Role.HEAD)
        factor = share if matrix.role is Role.EXPERT else 0.0 if matrix.role is Role.EMBEDDING and not tied else 1.0
        expected += factor * nbytes
    assert expected <= plan["read_bytes"] < expected * 1.02  # type: ignore[operator]  # norms and the like


def test_a_speed_is_a_second_budget(tiny: Path, alphaq: Callable[..., Ran]) -> None:
    free = planned(alphaq, tiny, "--size", "7500KB")
    limit = int(0.9 * free["read_bytes"])  # type: ignore[call-overload]
    fast = planned(alphaq, tiny, "--size", "7500KB", "--min-speed", "1000", "--bandwidth", f"{1000 * limit}B/s")
    assert fast["read_bytes"] <= limit and fast["size_bytes"] <= 7_500_000  # type: ignore[operator]
    assert fast["objective"] > free["objective"]  # type: ignore[operator]
    gap = fast["objective"] - fast["lower_bound"]  # type: ignore[operator]
    assert gap <= 1e-9 * fast["objective"]  # type: ignore[operator]
    assert fast["config"]["bandwidth"] == 1000 * limit  # type: ignore[index]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--min-speed", "1e9", "--bandwidth", "1GB/s"), "even the narrowest choices give"),
        (("--min-speed", "10", "--bandwidth", "fast"), "is no rate of memory"),
        (("--min-speed", "10", "--bandwidth", "1GB/h"), "is no rate of memory"),
        (("--min-speed", "0", "--bandwidth", "1GB/s"), "min_speed"),
        (("--min-speed", "10", "--bandwidth", "1GB/s", "--per-layer"), "not solved together"),
        (("--min-speed", "10", "--bandwidth", "1GB/s", "--method", "uniform"), "needs losses"),
        (("--min-speed", "10", "--bandwidth", "1GB/s", "--codec", "zstd"), "Drop --codec"),
    ],
)
def test_speeds_that_cannot_be_are_refused(
    tiny: Path, alphaq: Callable[..., Ran], options: tuple[str, ...], words: str
) -> None:
    failed = alphaq("plan", tiny, *QUICK, "--size", "7500KB", *options)
    assert failed.code and words in " ".join(failed.err.split())
