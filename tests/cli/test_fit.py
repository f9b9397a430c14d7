"""`alphaq fit`: what fits, and the command that makes it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from alphaq.report.curve import Curve, read_curve
from conftest import Ran

pytest.importorskip("xllamacpp")
QUICK = ("--method", "distortion", "--noise", "analytic", "--choices", "Q2_K,Q4_0,Q8_0", "--bandwidth", "10GB/s")


def test_what_is_told_is_what_the_command_makes(tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran]) -> None:
    out = tmp_path / "out"
    ran = alphaq("fit", tiny, *QUICK, "--memory", "64MiB", "--context", "256", "--json", "-o", tmp_path / "fit.json")
    assert ran.code == 0, ran.err
    asked, *machines = ran.json["fits"]
    assert asked["size_bytes"] <= asked["weights_bytes"] < asked["memory_bytes"] == 64 * 2**20
    assert (
        asked["tokens_per_second_full"]
        < asked["tokens_per_second"]
        == pytest.approx(1e10 / asked["read_bytes"], rel=1e-4)
    )
    assert [one["memory_bytes"] for one in machines] == [gib * 7 * 2**27 for gib in (8, 12, 16, 24, 32, 48, 64)]
    assert all(one["objective"] < asked["objective"] for one in machines)
    assert Curve.model_validate(ran.json["curve"]) == read_curve(tmp_path / "fit.json")
    assert ran.json["curve"]["points"][0]["lost"] > asked["objective"] > ran.json["curve"]["points"][-1]["lost"]
    words = shlex.split(ran.json["command"])
    assert words[words.index("--memory") + 1] == "64MiB"
    assert words[:3] == ["alphaq", "quantize", str(tiny)] and words[-2:] == ["-o", "OUT"]
    made = alphaq(*words[1:-1], str(out))
    assert made.code == 0, made.err
    assert (out / "model.gguf").stat().st_size == asked["size_bytes"]


def test_where_nothing_is_lost_there_is_no_curve(tiny: Path, alphaq: Callable[..., Ran]) -> None:
    ran = alphaq("fit", tiny, *QUICK[:4], "--choices", "16", *QUICK[-2:], "--memory", "160MiB", "--context", "256")
    assert ran.code == 0, ran.err
    rows = [line.split()[:2] for line in ran.out.splitlines() if " GB " in line]
    assert rows == [[f"{gib}", "GB"] for gib in (8, 12, 16, 24, 32, 48, 64)]
    assert "there is no curve" in ran.out and "Make it: alphaq quantize" in ran.out


@pytest.mark.slow
def test_it_is_carried_out_when_told_to(tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran]) -> None:
    out = tmp_path / "out"
    ran = alphaq("fit", tiny, *QUICK, "--choices", "Q4_0", "--memory", "1GiB", "--write", str(out))
    assert ran.code == 0, ran.err
    assert (out / "model.gguf").is_file()
    again = alphaq("fit", tiny, *QUICK, "--write", str(out))
    assert again.code and "exists" in again.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--memory", "60MiB", "--context", "256"), "the narrowest choices need"),
        (("--memory", "16GiB", "--context", "10000000"), "that the model was made for"),
        (("--memory", "1MiB"), "leave nothing for weights"),
        (("--engine", "native"), "of native that is not known"),
        (("--memory", "1GiB", "--min-speed", "1e9"), "even the fastest choices give"),
    ],
)
def test_what_does_not_fit_is_told_with_the_least_that_would(
    tiny: Path, alphaq: Callable[..., Ran], options: tuple[str, ...], words: str
) -> None:
    failed = alphaq("fit", tiny, *QUICK, *options)
    assert failed.code and words in " ".join(failed.err.split())
