"""Which experts a router prefers, from the weights alone.

Hidden states leave a layer's norm as a direction times the norm's weights g, so random directions
h ~ N(0, I), stretched to x = h ⊙ g, stand for the text that is not there. The layer's own MoE block
routes them: softmax, sigmoid, groups and selection biases are what its class makes of them. Only the
norm and the router are read. How far to trust the outcome is another matter: it follows real use in
layers with unbalanced experts and says little about balanced ones.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alphaq.calibration.stream import HollowModel, Keywords, LayerTraffic, traffic_of
from alphaq.calibration.traffic import Calibration, Expert, ExpertUse, expert_uses
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import PassError
from alphaq.nouns.matrix import Role

SAMPLES = 16_384
PRIOR_VERSION = 1  # raise it whenever the same routers would give other uses
FEW_SAMPLES = 4_096  # where the prior only stands in for experts that few tokens reach


class _Routed(Exception):
    """Carries the routing out of the block, whose remaining weights are not there."""

    def __init__(self, traffic: LayerTraffic) -> None:
        self.traffic = traffic


def routing_prior(checkpoint: Checkpoint, samples: int = SAMPLES) -> dict[Expert, ExpertUse]:
    """Uses of every routed expert by (layer, expert), over samples whose seed is the layer's name.

    Empty for a dense model, which has no router. Raises PassError if the norm before the experts cannot be
    found or routing not be seen, and as `HollowModel` does.
    """
    if checkpoint.planned_role is not Role.EXPERT:
        return {}
    hollow = HollowModel(checkpoint)
    uses: dict[Expert, ExpertUse] = {}
    for layer, experts in hollow.experts.items():
        traffic = _route(hollow, layer, experts, samples)
        for number, use in enumerate(expert_uses(traffic.experts, traffic.weights, len(hollow.matrices[layer]))):
            uses[layer, number] = use
    return uses


def seen_uses(calibration: Calibration) -> dict[Expert, ExpertUse]:
    """What stands for the prior where a router sees more than a norm's output: uses by the tokens of a pass.

    Random tokens overstate how experts differ, hence the root (docs/research/log.md).
    """
    return {
        expert: replace(use, mean_square_weight=math.sqrt(use.mean_square_weight))
        for expert, use in calibration.experts.items()
    }


@torch.no_grad()
def _route(hollow: HollowModel, layer: int, experts: str, count: int) -> LayerTraffic:
    """What the router makes of one layer's samples."""
    block_name = experts.rpartition(".")[0]
    block: Any = hollow.model.get_submodule(block_name)
    norm_name, norm = norm_before(hollow, layer)
    hollow.fill(block_name, without=(Role.EXPERT, Role.SHARED_EXPERT), besides=experts)
    for child in block.children():
        state = child.state_dict(keep_vars=True).values()
        if child is not hollow.model.get_submodule(experts) and any(value.is_meta for value in state):
            child.forward = torch.zeros_like  # a shared expert may run before the router, whose input it leaves alone

    def stop(module: Any, args: tuple[Any, ...], kwargs: Keywords) -> None:
        raise _Routed(traffic_of(hollow, layer, args, kwargs))

    hollow.model.get_submodule(experts).register_forward_pre_hook(stop, with_kwargs=True)
    seed = int.from_bytes(hashlib.sha256(block_name.encode()).digest()[:8], "little")
    random = np.random.Generator(np.random.PCG64(seed))
    samples = torch.from_numpy(random.standard_normal((count, hollow.base.config.hidden_size), np.float32))
    hollow.fill(norm_name)
    samples = stretched(norm, samples)
    hollow.empty(norm_name)
    refused = (
        f"{block_name} of {hollow.checkpoint.name} does not lead from hidden states straight to its experts, so its "
        "routing cannot be seen."
    )
    try:
        block(samples[None])
    except _Routed as routed:
        return routed.traffic
    except (TypeError, AttributeError, NotImplementedError) as error:  # it takes more than hidden states
        raise PassError(refused) from error
    finally:
        hollow.empty(block_name)
    raise PassError(refused)


def stretched(norm: Any, samples: Tensor) -> Tensor:
    """Directions [samples, hidden] as a norm puts them out: times its weights, without their mean if it takes that."""
    weights = norm(torch.ones_like(samples[:1]))  # asked of the module: some families store g and some store g − 1
    scales_alone = getattr(norm, "bias", None) is None and bool(weights.any())
    outputs: Tensor = samples * weights if scales_alone else norm(samples)
    return outputs


def norm_before(hollow: HollowModel, layer: int) -> tuple[str, Any]:
    """The norm that feeds a layer's MoE block, and its name."""
    own = hollow.checkpoint.architecture.router_norm
    name = f"{hollow.layers[layer]}.{own}"
    try:
        if own:
            return name, hollow.model.get_submodule(name)
    except AttributeError:
        pass
    raise PassError(
        f"{hollow.checkpoint.name} has no {name if own else 'norm before its router'}, so what the router sees cannot "
        "be guessed from the weights."
    )
