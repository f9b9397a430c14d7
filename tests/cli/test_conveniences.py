import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Ran

Run = Callable[..., Ran]
FAST = ("--bits", 3, "--method", "uniform")


def test_quiet_leaves_notes_out_and_errors_in(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    wide = ("plan", tiny, "--bits", 4, "--choices", "2,3", "--method", "uniform")
    assert "no choice offered is wider" in alphaq(*wide, "-o", tmp_path / "a.json").err
    quiet = alphaq(*wide, "-o", tmp_path / "b.json", "--quiet")
    assert quiet.err == "" and "Plan for native" in quiet.out
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert alphaq("plan", tiny, "--bits", 99, "--quiet").err.startswith("error: --bits 99")
    assert "no choice offered is wider" in alphaq(*wide).err  # not quiet any longer


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_and_completes_commands(shell: str) -> None:
    told = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "alphaq", "--show-completion", shell]
    ran = subprocess.run(command, capture_output=True, text=True, env=told)
    assert ran.returncode == 0 and "_ALPHAQ_COMPLETE" in ran.stdout


def test_what_is_typed_is_completed() -> None:
    told = os.environ | {"_ALPHAQ_COMPLETE": "complete_bash", "COMP_WORDS": "alphaq pl", "COMP_CWORD": "1"}
    ran = subprocess.run([sys.executable, "-m", "alphaq"], capture_output=True, text=True, env=told)
    assert ran.stdout.split() == ["plan", "plot"], ran.stderr


def test_the_cache_tells_its_size_and_is_cleared(
    alphaq: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ALPHAQ_CACHE", str(folder))
    empty = {"path": str(folder), "entries": 0, "size_bytes": 0, "removed": 0, "removed_bytes": 0}
    assert alphaq("cache", "--json").json == empty
    assert alphaq("plan", tiny, *FAST).code == 0
    (folder / "mine.txt").write_text("not AlphaQ's")
    (folder / ("0" * 32)).mkdir()  # of the form of a name, but no entry
    full = alphaq("cache", "--json").json
    assert full["entries"] == 1 and full["size_bytes"] > 1000
    assert "measurements of 1 models" in alphaq("cache").out
    cleared = alphaq("cache", "--clear", "--json").json
    assert cleared == empty | {"removed": 1, "removed_bytes": full["size_bytes"]}
    assert sorted(path.name for path in folder.iterdir()) == ["0" * 32, "mine.txt"]
    assert alphaq("cache", "--json").json == empty


def test_a_cache_that_is_in_use_stays(alphaq: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alphaq.measuring.cache import Cache

    monkeypatch.setenv("ALPHAQ_CACHE", str(tmp_path))
    with Cache(tmp_path, {"of": "another run"}):
        ran = alphaq("cache", "--clear", "--json")
    assert ran.json["entries"] == 1 and ran.json["removed"] == 0
    assert "in use by another run" in ran.err


def test_generate_draws_only_if_asked_and_by_its_seed(alphaq: Run, tiny: Path) -> None:
    def text(*options: object) -> str:
        return str(alphaq("generate", tiny, "def main", "--max-new-tokens", 12, *options, "--json").json["completion"])

    likeliest = text()
    assert text("--seed", 5) == likeliest
    assert text("--temperature", 1, "--top-k", 1) == likeliest
    drawn = {seed: text("--temperature", 2, "--seed", seed) for seed in (1, 2)}
    assert drawn[1] != drawn[2] and text("--temperature", 2, "--seed", 1) == drawn[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--top-p", 0.9), "Add --temperature 0.7"),
        (("--temperature", -1), "is not between 0 and 100"),
        (("--temperature", 1, "--top-p", 0), "is not between 0 and 1"),
        (("--temperature", 1, "--top-k", 0), "--top-k"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(
    alphaq: Run, tiny: Path, options: tuple[object, ...], said: str
) -> None:
    ran = alphaq("generate", tiny, "def", *options)
    assert ran.code == 2 and said in ran.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("verify", "out", "--source", "model"), "--source is called --reference now"),
        (("card", "out", "--source", "model"), "--source is called --reference now"),
        (("report", "out", "--model", "model"), "--model is called --reference now"),
    ],
)
def test_the_original_model_s_earlier_names_are_told_the_new_one(
    alphaq: Run, words: tuple[str, ...], said: str
) -> None:
    ran = alphaq(*words)
    assert ran.code == 2 and said in ran.err


@pytest.mark.parametrize("device", ["cuda:99", "nowhere"])
def test_generate_refuses_a_device_that_is_not_there(alphaq: Run, tiny: Path, device: str) -> None:
    ran = alphaq("generate", tiny, "def main", "--device", device)
    assert ran.code == 2 and f"--device {device} cannot be used" in ran.err and "Traceback" not in ran.err
