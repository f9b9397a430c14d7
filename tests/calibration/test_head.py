"""Logits from streamed hidden states are those of the family's own class, caps and scales included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alphaq.calibration.head import Head
from alphaq.calibration.stream import HollowModel, model_class, stream_forward
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import CheckpointError
from calibration.test_every_family import NOT_RUN
from calibration.test_signal import DENSE
from families import FAMILIES, random_family, save_layout

IDS = torch.arange(3, 35).view(2, 16)
HEADLESS = {"openai_privacy_filter"}
"""Families whose class has no head for words."""
OFTEN = {"gemma2", "granitemoe", "cohere", "qwen3_vl_moe", "llama"}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(one, marks=() if one in OFTEN else pytest.mark.slow)
        for one in [*FAMILIES, *DENSE]
        if one not in NOT_RUN
    ],
)
def test_logits_are_those_of_the_class(family: str, tmp_path: Path) -> None:
    model = random_family(family, **DENSE.get(family, {}))
    source = open_checkpoint(save_layout(model, tmp_path, published=True))
    hollow = HollowModel(source)
    if family in HEADLESS:
        with pytest.raises(CheckpointError, match="has no head for words"):
            Head(hollow)
        return
    loaded = model_class(model.config).from_pretrained(tmp_path, dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        expected = loaded.eval()(input_ids=IDS, use_cache=False).logits
    states = stream_forward(source, IDS, lambda traffic: None, hollow)
    for by_rows in (False, True):
        with Head(hollow, by_rows) as head:
            found = torch.cat([head(part) for part in states.split(5, dim=1)], dim=1)
        assert float((found - expected).abs().max()) < 1e-4


def test_by_rows_neither_embedding_nor_head_is_held(tmp_path: Path) -> None:
    source = open_checkpoint(save_layout(random_family("qwen2_moe"), tmp_path, published=True))
    hollow = HollowModel(source)
    embedding = hollow.base.get_input_embeddings()
    held = []
    embedding.register_forward_hook(lambda module, args, output: held.append(module.weight.is_meta))
    states = stream_forward(source, IDS, lambda traffic: None, hollow)
    with Head(hollow, by_rows=True) as head:
        assert head(states).shape == (*IDS.shape, embedding.num_embeddings)
        held.append(head.module.weight.is_meta)
    assert held == [True, True]
