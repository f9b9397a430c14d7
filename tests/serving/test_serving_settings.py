"""vLLM follows every setting that its export does not refuse: flipped one by one, and compared with transformers.

Run by `make test-vllm`. Matrices keep 16 bits, which every machine can run; the config is what is looked at.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from alphaq import pipeline
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Plan

sys.path.append(str(Path(__file__).parents[1] / "engines"))
sys.path.append(str(Path(__file__).parent))

from flips import FLIPS, refusal, save_flipped
from test_vllm_serving import LATENT, answers_of, assert_same, transformers_of

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make test-vllm)")

# Sizes that vLLM's kernels for CPUs have.
SIZES: dict[str, dict[str, Any]] = {
    "mixtral": dict(hidden_size=128, head_dim=64),
    "qwen2_moe": dict(hidden_size=128),
    "qwen3_moe": dict(hidden_size=128, head_dim=64),
    "olmoe": dict(hidden_size=128),
    "deepseek_v3": LATENT,
    "granitemoe": dict(hidden_size=128),
}
LATENT_FLIPS = ("norm_topk_prob", "routed_scaling_factor", "n_group", "q_lora_rank", "rope yarn, mscale")


def cases() -> list[tuple[str, str | None]]:
    return [
        (family, flip)
        for family in SIZES
        for flip in (None, *FLIPS[family])
        if family != "deepseek_v3" or flip in (None, *LATENT_FLIPS)
    ]


@pytest.mark.parametrize(("family", "flip"), cases())
def test_vllm_follows_what_is_not_refused(tmp_path: Path, family: str, flip: str | None) -> None:
    source = save_flipped(tmp_path / "source", family, flip, **SIZES[family])
    if (why := refusal(source, "vllm")) is not None:
        pytest.skip(why)
    checkpoint = open_checkpoint(source)
    kept = {matrix.name: "16" for matrix in checkpoint.with_role(Role.EXPERT)}
    pipeline.quantize(checkpoint, Plan(engine="vllm", choices=kept), tmp_path / "out")
    assert_same(answers_of(tmp_path / "out"), transformers_of(source))
