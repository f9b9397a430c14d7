import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alphaq.report.places import place_by_name
from alphaq.report.plots import bits_figure, gamma_of
from conftest import Ran

pytest.importorskip("matplotlib", reason="the extra plot is not installed")
Run = Callable[..., Ran]
MAGIC = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.fixture
def compared(tmp_path: Path) -> Path:
    """A comparison with two methods and three γ at two budgets; one without a plan."""
    rows: list[dict[str, Any]] = [
        {"method": "reference", "bits": 16.0, "kl": 0.0, "mean_perplexity": 10.0, "bits_per_weight": None}
    ]
    for bits in (2.0, 3.0):
        for number, method in enumerate(("uniform", "auto", "alphaq:gamma=0", "alphaq:gamma=1", "alphaq:gamma=5")):
            figures = {"kl": 0.1 * (1 + number) / bits, "mean_perplexity": 11.0 + number, "bits_per_weight": bits + 0.2}
            rows.append({"method": method, "bits": bits, "size_bytes": int(1e6 * bits), **figures})
    rows.append({"method": "mint", "bits": 2.0, "error": "no plan"})
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "comparison.json").write_text(json.dumps({"job": {}, "rows": rows}))
    return tmp_path / "results"


def words(path: Path) -> str:
    """Text of an SVG, which keeps its text as text."""
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("form", MAGIC)
def test_every_format_is_written(form: str, alphaq: Run, compared: Path, tmp_path: Path) -> None:
    ran = alphaq("plot", "methods", compared, "-o", tmp_path / f"f.{form}", "--json")
    assert ran.json["kind"] == "methods"
    assert (tmp_path / f"f.{form}").read_bytes().startswith(MAGIC[form])


def test_equal_figures_give_equal_bytes(alphaq: Run, compared: Path, tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        assert alphaq("plot", "gamma", compared, "-o", tmp_path / name).code == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_methods_are_named_and_the_reference_is_a_line(alphaq: Run, compared: Path, tmp_path: Path) -> None:
    assert alphaq("plot", "methods", compared, "--metric", "perplexity", "-o", tmp_path / "f.svg").code == 0
    text = words(tmp_path / "f.svg")
    for label in ("uniform", "auto", "alphaq:gamma=5", "unquantized", "perplexity", "stored bits per weight"):
        assert label in text
    assert "mint" not in text


def test_gamma_has_a_line_for_each_budget(alphaq: Run, compared: Path, tmp_path: Path) -> None:
    assert alphaq("plot", "gamma", compared, "-o", tmp_path / "f.svg").code == 0
    text = words(tmp_path / "f.svg")
    assert "2 bits" in text
    assert "3 bits" in text
    assert "KL divergence" in text


def test_gamma_is_read_from_plain_names_only() -> None:
    names = (
        "alphaq:gamma=2",
        "alphaq:gamma=0.5",
        "alphaq",
        "paper:gamma=2",
        "alphaq:gamma=2:tail=ks",
        "alphaq:gamma=x",
    )
    assert [gamma_of(name) for name in names] == [2.0, 0.5, None, None, None, None]


def test_maps_show_a_plan_and_its_alpha(alphaq: Run, tiny_quantized: Path, tmp_path: Path) -> None:
    for kind in ("bits", "alpha"):
        ran = alphaq("plot", kind, tiny_quantized, "-o", tmp_path / f"{kind}.svg", "--json")
        assert ran.json["matrices"] == 96
        text = words(tmp_path / f"{kind}.svg")
        assert all(part in text for part in ("gate", "up", "down", "layer", "expert", kind if kind == "bits" else "α"))


def test_fractions_of_bits_have_colours_of_their_own() -> None:
    drawn = {f"layers.0.mlp.experts.{number}.up.weight": bits for number, bits in enumerate((2, 2.25, 2.5, 4))}
    axes = bits_figure(drawn, {name: place_by_name(name) for name in drawn}).axes[0]
    assert len({axes.images[0].norm(bits) for bits in drawn.values()}) == 4
    assert {one.get_text() for one in axes.texts} == {"2", "2.25", "2.5", "4"}


def test_a_stats_file_gives_the_same_alpha_figure(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    assert alphaq("analyze", tiny, "-o", tmp_path / "s.csv").code == 0
    assert alphaq("plot", "alpha", tmp_path / "s.csv", "-o", tmp_path / "f.png", "--json").json["matrices"] == 96


def test_spectra_show_the_extremes_or_what_is_named(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    found = alphaq("plot", "spectrum", tiny, "-o", tmp_path / "f.svg", "--json").json["matrices"]
    alphas = list(found.values())
    assert len(alphas) == 2
    assert alphas[0] < alphas[1]
    assert f"α = {alphas[0]:.2f}" in words(tmp_path / "f.svg")
    named = alphaq(
        "plot", "spectrum", tiny, "--matrix", "layers.0.*experts.1.up_proj", "-o", tmp_path / "g.png", "--json"
    )
    assert list(named.json["matrices"]) == ["model.layers.0.mlp.experts.1.up_proj.weight"]
    assert min(alphas) <= next(iter(named.json["matrices"].values())) <= max(alphas)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("spectra", "x", "-o", "f.png"), "Did you mean 'spectrum'"),
        (("methods", "{run}", "-o", "f.gif"), "gif"),
        (("methods", "{run}", "-o", "f.png", "--metric", "ppl"), "--metric"),
        (("methods", "nowhere", "-o", "f.png"), "alphaq compare"),
        (("bits", "nowhere.json", "-o", "f.png"), "No plan file"),
        (("bits", "a", "b", "-o", "f.png"), "one run"),
        (("bits", "a", "--matrix", "b", "-o", "f.png"), "--matrix"),
        (("spectrum", "{tiny}", "--matrix", "nothing", "-o", "f.png"), "Names look like"),
        (("spectrum", "{tiny}", "--matrix", "*", "-o", "f.png"), "room for 6"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: tuple[str, ...],
    fault: str,
    alphaq: Run,
    compared: Path,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = alphaq("plot", *(part.format(run=compared, tiny=tiny) for part in arguments))
    assert ran.code == 2
    assert fault in ran.err
    assert len(ran.err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("f.*"))


def test_a_comparison_without_gamma_says_how_to_get_one(alphaq: Run, compared: Path, tmp_path: Path) -> None:
    found = json.loads((compared / "comparison.json").read_text())
    found["rows"] = [row for row in found["rows"] if "gamma" not in row["method"]]
    (compared / "comparison.json").write_text(json.dumps(found))
    ran = alphaq("plot", "gamma", compared, "-o", tmp_path / "f.png")
    assert ran.code == 2
    assert "--methods alphaq:gamma=0" in ran.err


def test_a_damaged_comparison_is_refused(alphaq: Run, compared: Path, tmp_path: Path) -> None:
    (compared / "comparison.json").write_text('{"rows": [{"method": 1}]}')
    ran = alphaq("plot", "methods", compared, "-o", tmp_path / "f.png")
    assert ran.code == 2
    assert "is not a comparison" in ran.err


def test_without_matplotlib_the_extra_is_named(
    alphaq: Run, compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **given: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **given)

    monkeypatch.setattr(builtins, "__import__", without)
    ran = alphaq("plot", "methods", compared, "-o", tmp_path / "f.png")
    assert ran.code == 2
    assert "pip install 'alphaq[plot]'" in ran.err
