"""The table of quantizers, and the names that they had before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alphaq.engines.output import QuantizeOptions
from alphaq.engines.profiles import ENGINES
from alphaq.quantizers.base import DEFAULT, FORMERLY, QUANTIZERS, looks_at_inputs, offered
from alphaq.report.runs import read_comparison
from alphaq.trials.results import Job, Row, write
from conftest import Ran


def test_every_quantizer_is_listed_with_the_engines_it_works_for(alphaq: Callable[..., Ran]) -> None:
    rows = {row["quantizer"]: row for row in alphaq("quantizers", "--json").json}
    assert list(rows) == list(QUANTIZERS)
    for name, row in rows.items():
        assert name in alphaq("quantizers").out
        assert row["engines"] == [engine.name for engine in ENGINES.values() if name in offered(engine.quantizer)]
        assert (row["looks_at"] == "inputs") == looks_at_inputs(name)
    usual = {engine: name for name, row in rows.items() for engine in row["usual_for"]}
    assert usual == {engine.name: engine.quantizer for engine in ENGINES.values()}


def test_one_may_stand_for_another_of_the_same_storage_and_inputs_improve_all_that_is_ours() -> None:
    assert offered("debiased") == ("debiased", "mse", "rtn", "hqq", "gptq", "learned")
    assert offered("affine") == ("affine", "gptq", "learned")
    assert offered("ggml") == ("ggml",)


@pytest.mark.parametrize(
    ("before", "now"),
    [("clipped", "mse"), ("minmax", "rtn"), ("hqq", "hqq"), ("gptq", "gptq"), ("rtn", "rtn"), (None, None)],
)
def test_manifests_of_before_name_quantizers_as_today(before: str | None, now: str | None) -> None:
    assert QuantizeOptions(quantizer=before).quantizer == now  # none of before said rtn: the default has no name there


@pytest.mark.parametrize(("version", "names"), [(4, ("debiased", "rtn", "hqq")), (5, ("rtn", "minmax", "hqq"))])
def test_comparisons_of_before_name_quantizers_as_today(tmp_path: Path, version: int, names: tuple[str, ...]) -> None:
    rows = [{"method": "auto", "bits": 2, "quantizer": one} for one in ("rtn", "minmax", "hqq")]
    (tmp_path / "comparison.json").write_text(json.dumps({"job": {"format_version": version}, "rows": rows}))
    assert tuple(row.quantizer for row in read_comparison(tmp_path)) == names


def test_old_names_are_no_names_of_today_but_for_rtn() -> None:
    assert FORMERLY.keys().isdisjoint(QUANTIZERS) and set(FORMERLY.values()) <= QUANTIZERS.keys()
    assert DEFAULT in QUANTIZERS


def test_a_comparison_of_today_keeps_the_names_of_its_quantizers(tmp_path: Path) -> None:
    job = Job(
        checkpoint="",
        contents="",
        model_settings="",
        texts={},
        calibration=None,
        settings={},
        window=32,
        max_tokens=None,
        skip_tokens=0,
        dtype="float32",
        layer_by_layer=False,
    )
    rows = [Row("uniform", 3.0, 1, quantizer=name) for name in ("rtn", "debiased")]
    write(tmp_path, rows, job)
    assert [row.quantizer for row in read_comparison(tmp_path)] == ["rtn", "debiased"]
