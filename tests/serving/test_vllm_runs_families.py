"""vLLM computes with a mixed plan's files what they stand for, for every family that they are written for.

Run by `make test-vllm` (test_vllm_serving.py says how). vLLM loads each model itself; kernels of this folder restore
its packed weights, since vLLM's for CPUs are few, and round (decoding_kernels.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "engines"))
sys.path.append(str(Path(__file__).parent))

from exported import cycled_plan
from test_vllm_serving import ENVIRONMENT
from vllm_families import RUN, model_of
from vllm_worker import MARK

from alphaq import pipeline
from alphaq.checkpoint.families.architecture import architectures
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.assumptions.tables import engine_table
from families import logits, plain_copy, save_layout

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make test-vllm)")

PROMPT = list(range(3, 19))  # that of `families.logits`
MIXED = ("4g32s", "8g64s", "16", "4g64s", "8g32s")
EXACT = 1e-4
"""Relative to the largest logit: what sums in another order make of float32."""

Ask = Callable[[Path, str], Any]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Of a folder and a type to compute in: log-probabilities [places, words] of PROMPT, by vLLM."""
    environment = os.environ | ENVIRONMENT | dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", TORCHDYNAMO_DISABLE="1")
    script = Path(__file__).with_name("vllm_worker.py")
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as worker:

        def answer(folder: Path, dtype: str) -> Any:
            assert worker.stdin is not None
            assert worker.stdout is not None
            asked = dict(folder=str(folder), prompts=[PROMPT], arguments=dict(dtype=dtype))
            worker.stdin.write(json.dumps(asked) + "\n")
            worker.stdin.flush()
            found = next((line for line in worker.stdout if line.startswith(MARK)), None)
            assert found is not None, "vLLM's process has ended"
            return json.loads(found.removeprefix(MARK))

        yield answer
        worker.kill()


@needs_vllm
@pytest.mark.parametrize("model_type", RUN)
def test_vllm_computes_with_a_mixed_plan_what_its_files_stand_for(tmp_path: Path, ask: Ask, model_type: str) -> None:
    source = open_checkpoint(save_layout(model_of(model_type), tmp_path / "source", published=True))
    plan = cycled_plan(source, "vllm", MIXED, None)
    assert len(set(plan.choices.values())) > 2
    pipeline.quantize(source, plan, tmp_path / "out")
    expected = logits(plain_copy(source, tmp_path / "out", tmp_path / "plain"))[0].log_softmax(-1)[:-1]
    found = ask(tmp_path / "out", "float32")
    assert "error" not in found, found
    difference = (torch.tensor(found[0]) - expected).abs() / expected.sub(expected.mean(-1, True)).abs().max()
    assert difference.max() < EXACT


def test_every_family_of_the_table_is_run() -> None:
    """By a model of each; of some as the language model of a larger one, too."""
    known, families = {kind: one.name for kind, one in architectures().items()}, engine_table("vllm").families
    run = {kind if kind in families else known[kind] for kind in RUN}
    assert run == families.keys()
