"""`plan --dry-run` says from shapes alone what a plan will then take, and refuses what planning would refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from alphaq.checkpoint.files import PlainFile
from conftest import Ran

QUICK = ("--method", "uniform", "--noise", "analytic", "--workers", 1)


@pytest.mark.parametrize(
    "options",
    [("--bits", 2.5), ("--bpw", 3, "--pin", "down=4"), ("--size", "8MB"), ("--bits", 5, "--engine", "llama.cpp")],
    ids=str,
)
def test_a_plan_takes_what_its_outline_says(
    options: tuple[object, ...], tiny: Path, alphaq: Callable[..., Ran]
) -> None:
    outline = alphaq("plan", tiny, *options, *QUICK, "--dry-run", "--json")
    plan = alphaq("plan", tiny, *options, *QUICK, "--json")
    assert outline.code == plan.code == 0, outline.err + plan.err
    assert outline.json["least_bytes"] <= plan.json["size_bytes"] <= outline.json["most_bytes"]
    assert plan.json["size_bytes"] > 0.97 * outline.json["most_bytes"]
    assert outline.json["matrices"] == len(plan.json["assignment"])


def test_no_weight_is_read(tiny: Path, alphaq: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlainFile, "read_into", lambda *_: pytest.fail("read"))
    ran = alphaq("plan", tiny, "--bits", 2.5, "--dry-run")
    assert ran.code == 0 and "from shapes alone" in ran.out
    assert "weight files at most" in ran.out


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--size", "1MiB"), "below the least these choices can reach, --size"),
        (("--bits", 3, "--pin", "nothing=4"), "names no matrix"),
        (("--bits", 3, "-o", "plan.json"), "--dry-run needs MODEL and makes no plan"),
        (("--bits", 3, "--codec", "zstd"), "only known when they have been coded"),
    ],
)
def test_what_planning_refuses_is_refused(
    options: tuple[object, ...], why: str, tiny: Path, alphaq: Callable[..., Ran]
) -> None:
    ran = alphaq("plan", tiny, *options, "--dry-run")
    assert ran.code == 2 and why in ran.err
