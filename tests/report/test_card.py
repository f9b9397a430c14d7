import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from alphaq import pipeline
from alphaq.nouns.scoring import Scoring
from conftest import DATA, Ran

Run = Callable[..., Ran]
ORIGINAL = """---
license: other
license_name: tiny-licence
license_link: LICENSE
language: en
tags:
- moe
library_name: transformers
base_model: someone/before
model-index:
- name: tiny
  results: []
---
# Tiny

Its own words, with ```` in them.
"""


@pytest.fixture
def out(tiny_quantized: Path, tmp_path: Path) -> Path:
    """A quantized model of one's own, with the card of the original."""
    folder = tmp_path / "tiny-2.5bit"
    shutil.copytree(tiny_quantized, folder)
    (folder / "README.md").write_text(ORIGINAL)
    return folder


def test_card_has_valid_metadata_and_carries_the_licence_over(alphaq: Run, out: Path) -> None:
    ran = alphaq("card", out, "--base-model", "someone/tiny", "--json")
    assert ran.code == 0, ran.err
    text = (out / "README.md").read_text()
    assert ran.json["card"] == text
    data = ModelCard(text).data.to_dict()
    assert data == ran.json["metadata"]
    assert (data["base_model"], data["base_model_relation"]) == ("someone/tiny", "quantized")
    assert [data[key] for key in ("license", "license_name", "license_link")] == ["other", "tiny-licence", "LICENSE"]
    assert data["library_name"] == "alphaq" and data["language"] == "en"
    assert data["tags"][0] == "moe" and {"alphaq", "quantized"} <= set(data["tags"])
    assert "model-index" not in data  # those results are the original's
    assert data["alphaq"]["size_bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))


def test_card_shows_the_plan_and_how_to_run_and_repeat_it(alphaq: Run, out: Path) -> None:
    text = alphaq("card", out, "--base-model", "someone/tiny", "-o", "-").out
    assert (out / "README.md").read_text() == ORIGINAL
    assert "| expert | 96 |" in text and "attention" in text and "t4" in text
    assert "alphaq quantize someone/tiny --plan plan.json -o tiny-2.5bit" in text
    assert 'alphaq generate tiny-2.5bit "def main"' in text
    assert "Not measured" in text and "tiny-licence" in text


def test_original_card_is_kept_as_it_was_and_a_second_run_changes_nothing(alphaq: Run, out: Path) -> None:
    for _ in range(2):
        assert alphaq("card", out, "--base-model", "someone/tiny").code == 0
    first = (out / "README.md").read_text()
    assert alphaq("card", out, "--base-model", "someone/tiny").code == 0
    assert (out / "README.md").read_text() == first
    _, _, body = ORIGINAL.partition("---\n# Tiny")
    assert first.endswith(f"# Tiny{body}") and first.count("Its own words") == 1
    assert "base_model: someone/before" in first  # within the original's metadata, below


def test_edited_card_is_not_replaced_without_force(alphaq: Run, out: Path) -> None:
    assert alphaq("card", out).code == 0
    edited = (out / "README.md").read_text().replace("## Size", "My own remark.\n\n## Size")
    (out / "README.md").write_text(edited)
    ran = alphaq("card", out)
    assert ran.code == 2 and "was edited" in ran.err
    assert (out / "README.md").read_text() == edited
    assert alphaq("card", out, "--force").code == 0
    text = (out / "README.md").read_text()
    assert "My own remark" not in text and "Its own words" in text


def test_certificate_is_quoted_only_if_it_is_of_these_weights(alphaq: Run, out: Path, tiny: Path) -> None:
    texts = sorted((DATA / "texts").glob("*.txt"))[:2]
    made = pipeline.certify(out, tiny, Scoring(texts=texts, window=32, max_tokens=96), command="alphaq certify X")
    made.write(out / "certificate.json")
    text = alphaq("card", out, "-o", "-").out
    assert f"{made.overall.ear.value:.4f} ({made.overall.ear.low:.4f}–{made.overall.ear.high:.4f})" in text
    assert "    alphaq certify X" in text and "EAR of at least 0.99: no" in text
    other = made.model_copy(update={"model": made.model.model_copy(update={"manifest": "0" * 64})})
    other.write(out / "certificate.json")
    ran = alphaq("card", out, "-o", "-")
    assert "of other weights" in ran.err and "Not measured" in ran.out


@pytest.mark.parametrize(
    ("content", "licence"), [("\n   Apache License\n  Version 2.0", "apache-2.0"), ("Do as we say", "other")]
)
def test_licence_comes_from_its_file_where_no_card_names_it(alphaq: Run, out: Path, content: str, licence: str) -> None:
    (out / "README.md").unlink()
    (out / "LICENSE").write_text(content)
    ran = alphaq("card", out, "--json")
    assert ran.json["metadata"]["license"] == licence and "in `LICENSE`" in ran.json["card"]


def test_card_and_licence_of_the_source_serve_an_output_that_has_none(alphaq: Run, out: Path, tmp_path: Path) -> None:
    (out / "README.md").unlink()
    ran = alphaq("card", out, "--json", "-o", tmp_path / "a.md")
    assert "no licence was found" in ran.err and "license" not in ran.json["metadata"]
    assert "base_model is left out" in ran.err and "base_model" not in ran.json["metadata"]
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "README.md").write_text(ORIGINAL)
    ran = alphaq("card", out, "--reference", tmp_path / "source", "--json")
    assert ran.json["metadata"]["license_name"] == "tiny-licence" and "Its own words" in ran.json["card"]


@pytest.mark.parametrize("front", ["license: [", "- a\n- b", "model-index: 3"])
def test_damaged_metadata_is_named_and_nothing_is_written(alphaq: Run, out: Path, front: str) -> None:
    (out / "README.md").write_text(f"---\n{front}\n---\nText\n")
    ran = alphaq("card", out)
    assert ran.code == 2 and "README.md" in ran.err and "Traceback" not in ran.err
    assert (out / "README.md").read_text() == f"---\n{front}\n---\nText\n"


def test_wrong_arguments_are_refused(alphaq: Run, out: Path, tiny: Path) -> None:
    assert "not a hub id" in alphaq("card", out, "--base-model", "tiny").err
    assert "plan.json" in alphaq("card", tiny).err
    assert "cannot be read" in alphaq("card", out, "--certificate", out / "none.json").err
