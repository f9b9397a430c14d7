"""The pass layer by layer, and what the prior takes for the router's input, against each family's own class."""

from pathlib import Path
from typing import Any

import pytest
import torch

from alphaq.calibration.prior import routing_prior
from alphaq.calibration.stream import HollowModel, model_class, stream_forward
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import CheckpointError
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import resolve
from alphaq.planning.evidence import measure_for_plan
from families import FAMILIES, random_family, save_layout

NOT_RUN = {
    "jetmoe", "llama4", "llama4_text", "muse_spark", "zaya",
}  # fmt: skip
"""Families whose experts or layers compute something of their own."""
NO_PRIOR = {"deepseek_v4", "flex_olmo", "gemma4", "gemma4_text", "qwen4_exp", "qwen4_exp_text"}
"""Families whose router sees more than the output of a norm, so that uses are seen in the pass."""
OFTEN = {
    "mixtral",
    "gpt_oss",
    "afmoe",
    "nemotron_h",
    "qwen3_vl_moe",
    "inkling_text",
    "longcat_flash",
    "llama",
    "phimoe",
}
IDS = torch.arange(3, 35)[None]


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family in OFTEN else pytest.mark.slow) for family in FAMILIES]
)
def test_pass_equals_the_class_and_the_prior_starts_where_it_does(family: str, tmp_path: Path) -> None:
    model = random_family(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # gains and biases that differ
                parameter.copy_((1 if "norm" in name and "bias" not in name else 0) + 0.5 * torch.rand(parameter.shape))
    source = open_checkpoint(save_layout(model, tmp_path, published=True))
    if family in NOT_RUN:
        with pytest.raises(CheckpointError, match="--method alphaq"):
            stream_forward(source, IDS, lambda traffic: None)
        return
    hollow = HollowModel(source)
    model = (
        model_class(model.config).from_pretrained(tmp_path, dtype=torch.float32, experts_implementation="eager").eval()
    )
    seen: dict[str, torch.Tensor] = {}

    def keep(key: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
            found = output if output is not None else (*args, *kwargs.values())[0]
            seen[key] = (found[0] if isinstance(found, tuple) else found).detach().reshape(-1)

        return hook

    layer, experts = max(hollow.experts.items())
    norm = f"{hollow.layers[layer]}.{source.architecture.router_norm}"
    model.get_submodule(experts.rpartition(".")[0]).register_forward_pre_hook(keep("block"), with_kwargs=True)
    if family not in NO_PRIOR:
        model.get_submodule(norm).register_forward_hook(keep("norm"), with_kwargs=True)
    base = next(name for name, module in hollow.model.named_modules() if module is hollow.base)
    with torch.no_grad():
        expected = model.get_submodule(base)(input_ids=IDS, use_cache=False).last_hidden_state
    assert float((stream_forward(source, IDS, lambda traffic: None, hollow) - expected).abs().max()) < 1e-4
    if family in NO_PRIOR:
        assert not source.architecture.router_norm
        with pytest.raises(CheckpointError, match="has no norm before its router"):
            routing_prior(source)
    elif source.architecture.experts_per_layer(source.config):
        assert torch.equal(seen["norm"], seen["block"])


def test_uses_are_seen_in_the_pass_where_no_norm_feeds_the_router(tmp_path: Path) -> None:
    source = open_checkpoint(save_layout(random_family("gemma4_text"), tmp_path, published=True))
    request = resolve(PlanConfig(budget=Budget(bits=2.5), group_size=32))
    found = measure_for_plan(source, request).evidence
    assert found.prior is not None
    assert found.synthetic is not None
    assert found.prior.keys() == found.synthetic.experts.keys()
    for expert, use in found.prior.items():
        assert use.mean_square_weight == found.synthetic.experts[expert].mean_square_weight ** 0.5
    alone = measure_for_plan(source, resolve(PlanConfig(budget=Budget(bits=2.5), group_size=32, method="router")))
    assert alone.evidence.prior == found.prior
