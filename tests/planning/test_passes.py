"""What methods ask for by name, and who finds it."""

from pathlib import Path

import pytest

from alphaq.checkpoint.reader import open_checkpoint
from alphaq.measuring.probes import PROBES
from alphaq.planning import passes
from alphaq.planning.passes import PASSES
from alphaq.sensitivity.methods import METHODS

ALWAYS = {"errors", "alpha", "places"}
OF_TEXT = {"outputs"}


def test_every_need_of_a_method_is_met() -> None:
    needs = {need for method in METHODS.values() for need in method.needs}
    assert needs | {"drops"} == ALWAYS | OF_TEXT | PASSES.keys() | PROBES.keys()  # --drop needs it, no method
    assert not PASSES.keys() & PROBES.keys()
    assert all("text" in method.needs for method in METHODS.values() if OF_TEXT & {*method.needs})


def test_a_model_too_large_to_write_takes_as_many_tokens_as_its_experts_need(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny)  # two experts of eight for a token
    assert passes.fisher_shape(checkpoint)[1] == passes.FISHER_LENGTH
    monkeypatch.setattr(passes, "writes", lambda checkpoint: False)
    assert passes.fisher_shape(checkpoint) == (8, 32)
    monkeypatch.setattr(passes, "EXPERT_TOKENS", 200)  # 800 tokens in all
    assert passes.fisher_shape(checkpoint) == (8, 4 * 32)
