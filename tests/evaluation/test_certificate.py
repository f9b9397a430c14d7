import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from alphaq import pipeline
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import AlphaQError, CheckpointError
from alphaq.evaluation.certificate import Certificate, Estimate, figures
from alphaq.evaluation.fidelity import WindowScore
from alphaq.nouns.scoring import Scoring
from conftest import DATA, Ran

Run = Callable[..., Ran]
TEXTS = sorted((DATA / "texts").glob("*.txt"))[:2]
QUICK = ("--max-tokens", 192, "--window", 48)


@pytest.fixture(scope="module")
def certified(tiny: Path, tiny_quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the quantized model with its certificate, made by the command line."""
    from alphaq.cli.app import main

    out = tmp_path_factory.mktemp("certified") / "out"
    shutil.copytree(tiny_quantized, out)
    command = ["certify", out, "--reference", tiny, "--text", *TEXTS, *QUICK, "--json"]
    with pytest.raises(SystemExit) as stop:
        main([str(part) for part in command])
    assert not stop.value.code
    return out


def test_certificate_says_the_same_as_eval(certified: Path, alphaq: Run, tiny: Path) -> None:
    made = Certificate.read(certified / "certificate.json")
    plain = alphaq(
        "eval", certified, "--reference", tiny, "--text", *TEXTS, *QUICK, "--dtype", "float32", "--json"
    ).json["texts"]
    for text in made.texts:
        for name in ("ear", "kl", "top1", "perplexity"):
            assert getattr(text, name).value == pytest.approx(plain[text.name][name], rel=1e-9)
        assert text.tokens == plain[text.name]["tokens"] == 4 * 47
    own = alphaq("eval", tiny, "--text", *TEXTS, *QUICK, "--dtype", "float32", "--json").json
    assert made.overall.reference_perplexity.value == pytest.approx(own["geomean_perplexity"], rel=1e-6)
    ratio = made.overall.perplexity.value / made.overall.reference_perplexity.value
    assert made.overall.perplexity_ratio.value == pytest.approx(ratio)
    assert made.distribution_lossless == "no" and made.overall.ear.high < 0.99


def test_certificate_records_what_it_takes_to_repeat_it(certified: Path, tiny: Path) -> None:
    import hashlib

    made = Certificate.read(certified / "certificate.json")
    assert [text.sha256 for text in made.texts] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in TEXTS]
    assert made.reference.fingerprint == made.model.source == open_checkpoint(tiny).fingerprint
    assert made.command.startswith("alphaq certify ") and "--window 48" in made.command
    assert (made.settings.window, made.settings.max_tokens, made.settings.computed_in) == (48, 192, "float32")
    assert {"alphaq", "torch", "transformers", "python"} <= made.versions.keys()
    assert made.belongs_to(certified) and not made.belongs_to(tiny)


def test_output_with_a_certificate_still_verifies_and_a_new_output_gets_none(
    certified: Path, alphaq: Run, tiny: Path, tmp_path: Path
) -> None:
    assert alphaq("verify", certified, "--json").json["ok"]
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    shutil.copy(certified / "certificate.json", source)
    assert "certificate.json" not in {path.name for path in open_checkpoint(source).side_files()}
    assert "tokenizer.json" in {path.name for path in open_checkpoint(source).side_files()}


def test_model_against_itself_loses_nothing(tiny: Path) -> None:
    made = pipeline.certify(tiny, tiny, Scoring(texts=TEXTS[:1], window=32, max_tokens=96))
    assert made.overall.ear.low == pytest.approx(1, abs=1e-5) and made.overall.kl.high == pytest.approx(0, abs=1e-5)
    assert made.overall.perplexity_ratio.value == pytest.approx(1) and made.distribution_lossless == "yes"


def test_other_source_is_noted(certified: Path, alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    (other / "model-00001-of-00001.safetensors").unlink(missing_ok=True)
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny / "model.safetensors")
    (other / "model.safetensors").unlink()
    save_file(weights, other / "model.safetensors", {"format": "pt", "changed": "header"})
    ran = alphaq(
        "certify", certified, "--reference", other, "--text", TEXTS[0], *QUICK, "-o", tmp_path / "c.json", "--json"
    )
    assert ran.code == 0 and "quantized from another checkpoint" in ran.err
    assert ran.json == json.loads((tmp_path / "c.json").read_text())


@pytest.mark.parametrize(
    ("estimate", "verdict"),
    [((0.995, 0.991, 0.998), "yes"), ((0.99, 0.985, 0.993), "undecided"), ((0.98, 0.97, 0.9899), "no")],
)
def test_verdict_is_where_the_interval_lies(estimate: tuple[float, float, float], verdict: str) -> None:
    value, low, high = estimate
    assert Estimate(value=value, low=low, high=high).verdict(0.99) == verdict


def test_interval_holds_the_truth_nineteen_times_in_twenty() -> None:
    """Of 200 samples of two texts of 12 windows, at least 90 % of the intervals hold the true mean."""
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        scores = {
            text: [WindowScore(100, 1.0, 0.0, 0.0, 100 * ear, 1.0) for ear in generator.normal(centre, 0.02, 12)]
            for text, centre in (("a", 0.95), ("b", 0.91))
        }
        ear = figures(scores)[0].ear
        held += ear.low <= 0.93 <= ear.high
    assert 180 <= held <= 199


def test_ratio_of_perplexities_is_paired() -> None:
    """Windows differ by far more than the models: the ratio's interval is narrow all the same."""
    hard = np.random.default_rng(0).uniform(1, 5, 20)
    scores = {"a": [WindowScore(100, 100 * (x + 0.01), 0, 0, 100, 100 * x) for x in hard]}
    found = figures(scores)[0]
    assert found.perplexity_ratio.value == pytest.approx(math.exp(0.01))
    assert found.perplexity_ratio.high - found.perplexity_ratio.low < 1e-9
    assert found.perplexity.high / found.perplexity.low > 1.5


def test_single_window_has_no_interval(tiny: Path) -> None:
    with pytest.raises(AlphaQError, match="single window"):
        pipeline.certify(tiny, tiny, Scoring(texts=TEXTS[:1], window=64, max_tokens=64))


def test_figures_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(AlphaQError, match="NaN"):
        figures({"a": [WindowScore(10, math.nan), WindowScore(10, 1.0)]})


def test_damaged_certificate_is_named(tmp_path: Path) -> None:
    (tmp_path / "certificate.json").write_text('{"format_version": 2}')
    with pytest.raises(CheckpointError, match="not a valid certificate"):
        Certificate.read(tmp_path / "certificate.json")


def test_options_that_cannot_work_end_before_the_model_is_loaded(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    fixed = ("certify", tiny, "--reference", tiny, "--text", TEXTS[0])
    assert "only with --tasks" in alphaq(*fixed, "--limit", 5).err
    assert "is a folder" in alphaq(*fixed, "-o", tmp_path).err
    assert "not a folder or file" in alphaq("certify", "owner/name", *fixed[2:]).err
    assert "Did you mean" in alphaq(*fixed, "--dtype", "float3").err
