"""Windows begin with what the model's tokenizer puts before a text, in evaluation, passes and calibration."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from typer.testing import CliRunner

from alphaq import pipeline
from alphaq.calibration.text import SELF, Text, own_writing
from alphaq.calibration.tokens import model_prefix, read_windows, text_prefix
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.cli.app import app
from alphaq.evaluation.fidelity import score_windows, windows
from alphaq.nouns.scoring import Scoring
from runnable import byte_level, save_runnable, save_tokenizer

TEXT = "The router decides which experts see a token. " * 12
BOS, NAME = 0, "<|end|>"  # which no text holds


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer puts a token before every text."""
    folder = save_runnable(tmp_path_factory.mktemp("bos") / "model", "qwen2_moe")
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{NAME} $A", special_tokens=[(NAME, BOS)])
    save_tokenizer(folder, tokenizer)
    return folder


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_every_window_begins_with_it_and_all_text_is_scored(beginning: Path) -> None:
    tokenizer = tokenizer_of(beginning)
    assert text_prefix(tokenizer) == (BOS,)
    plain = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    cut = windows(tokenizer, TEXT, 16, None)
    assert cut.context == 1 and all(int(part[0, 0]) == BOS for part in cut.parts)
    assert [token for part in cut.parts for token in part[0, 1:].tolist()] == plain
    assert max(part.shape[1] for part in cut.parts) == 16
    without = windows(tokenizer, TEXT, 16, None, bos=False)
    assert without.context == 1
    assert [token for part in without.parts for token in part[0].tolist()] == plain[: len(plain) // 16 * 16 + 16]


def test_tokens_of_the_beginning_are_given_and_not_scored() -> None:
    class Fixed:
        device, calls = torch.device("cpu"), 0

        def __call__(self, ids: torch.Tensor) -> Any:
            logits = torch.zeros(*ids.shape, 4)
            return type("Output", (), {"logits": logits})()

    ids = torch.tensor([[3, 3, 1, 2, 0]])
    for context, scored in ((1, 4), (2, 3), (3, 2)):
        [score] = score_windows(Fixed(), None, ids, context)
        assert score.tokens == scored and score.negative_log_likelihood == pytest.approx(scored * math.log(4))


def test_eval_says_what_windows_begin_with_and_no_bos_leaves_it_out(beginning: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    command = ["eval", str(beginning), "--text", str(tmp_path / "text.txt"), "--window", "32", "--json"]
    found = [json.loads(CliRunner().invoke(app, [*command, *more]).stdout) for more in ([], ["--no-bos"])]
    assert [one["windows_begin_with"] for one in found] == [NAME, ""]
    assert found[0]["geomean_perplexity"] != found[1]["geomean_perplexity"]
    shown = CliRunner().invoke(app, command[:-1])
    assert "each window after <|end|>" in shown.output


def test_certificate_says_it(beginning: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    made = [
        pipeline.certify(beginning, beginning, Scoring(texts=(tmp_path / "text.txt",), window=32, bos=bos))
        for bos in (True, False)
    ]
    assert [one.settings.begins_with for one in made] == [NAME, ""]


def test_passes_and_calibration_begin_with_it(beginning: Path, tmp_path: Path) -> None:
    source = open_checkpoint(beginning)
    assert model_prefix(source) == (BOS,)
    written = own_writing(source, windows=3, length=12)
    assert written.shape == (3, 12) and written[:, 0].tolist() == [BOS] * 3
    assert not (own_writing(source, 3, 12, bos=False)[:, 0] == BOS).all()
    (tmp_path / "text.txt").write_text(TEXT)
    text = Text(tmp_path / "text.txt", tokens=32)
    ids = text.windows(source)
    assert (ids[:, 0] == BOS).all() and ids.shape[1] == 32
    assert str(text) != str(Text(tmp_path / "text.txt", tokens=32, bos=False))
    assert Text(SELF, bos=False) != Text(SELF)
    plain = read_windows(beginning, TEXT, length=8, max_tokens=100, bos=False)
    assert not (plain == BOS).any()


def test_model_whose_tokenizer_puts_nothing_there_is_scored_as_before(tiny: Path) -> None:
    tokenizer = tokenizer_of(tiny)
    assert text_prefix(tokenizer) == () == model_prefix(open_checkpoint(tiny))
    with_bos, without = (windows(tokenizer, TEXT, 16, None, bos=bos) for bos in (True, False))
    assert all(map(torch.equal, with_bos.parts, without.parts)) and with_bos.context == without.context
