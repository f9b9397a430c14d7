"""`alphaq price`: what is read of a store is what is told, once, and what it says of sizes and losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("moto", reason="moto is not installed: pip install 'alphaq[dev]'")
pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'alphaq[s3]'")

import hubserver
import objectstore
from alphaq.nouns.plan import Plan
from alphaq.report.curve import read_curve
from conftest import Ran

QUICK = ("--choices", "2,3,4", "--workers", "1")


@pytest.fixture
def hosted(server: objectstore.Server, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return server.upload(tiny, "models", "tiny")


@pytest.fixture
def hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hubserver.Hub]:
    with hubserver.the_hub(tiny, tmp_path / "cache", monkeypatch) as started:
        yield started


@pytest.mark.slow
def test_bytes_are_those_that_are_told_and_none_are_read_twice(
    server: objectstore.Server, hosted: str, tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    served, told = [], []
    for number in (1, 2):
        server.counter.reset()
        engines = "--engine", "native", "--engine", "mlx"
        ran = alphaq("price", hosted, *QUICK, *engines, "--json", "-o", tmp_path / f"{number}.json")
        assert ran.code == 0, ran.err
        served.append(server.counter.served)
        told.append(ran.json)
    read = told[0]["read"]
    assert 0.009 * read["matrices"] < read["rows"] <= 0.01 * read["matrices"]
    assert served[0] - served[1] == read["rows"] + read["whole"] == read["missing"]
    assert told[1]["read"]["missing"] == 0 and told[1]["engines"] == told[0]["engines"]
    local = alphaq("price", tiny, *QUICK, "--json")
    assert local.json["engines"] == told[0]["engines"][:1]

    points = told[0]["engines"][0]["points"]
    assert all(a["size_bytes"] < b["size_bytes"] and a["lost"] > b["lost"] for a, b in pairwise(points))
    assert all(0 < point["sampling_error"] < 0.1 for point in points)
    assert [one.lost for one in read_curve(tmp_path / "1.json").points] == [point["lost"] for point in points]

    server.counter.reset()
    plan = tmp_path / "plan.json"
    ran = alphaq("plan", hosted, *QUICK, "--share", "1%", "--size", points[6]["size_bytes"], "-o", plan)
    assert ran.code == 0, ran.err
    assert server.counter.served <= served[1]  # the rows that were priced by are here
    assert Plan.read(plan).size_bytes <= points[6]["size_bytes"]
    assert Plan.read(plan).objective == pytest.approx(points[6]["lost"] * 96 * 2**16, rel=1e-6)


def test_of_a_hub_model_headers_and_rows_are_read(hub: hubserver.Hub, tiny: Path, alphaq: Callable[..., Ran]) -> None:
    ran = alphaq("price", "org/model", *QUICK, "--json")
    assert ran.code == 0, ran.err
    read = ran.json["read"]
    served = hub.served["model.safetensors"]
    assert read["rows"] + read["whole"] <= served <= read["rows"] + read["whole"] + 2 * read["headers"]
    assert ran.json["engines"] == alphaq("price", tiny, *QUICK, "--json").json["engines"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--share", "0%"), "is no share"),
        (("--share", "250%"), "is no share"),
        (("--method", "auto", "--share", "one"), "is no share"),
        (("--method", "fisher"), "needs all weights (fisher)"),
        (("--engine", "nativ"), "Did you mean"),
    ],
)
def test_what_cannot_be_priced_is_told(
    tiny: Path, alphaq: Callable[..., Ran], options: tuple[str, ...], words: str
) -> None:
    failed = alphaq("price", tiny, *options)
    assert failed.code and words in " ".join(failed.err.split())
