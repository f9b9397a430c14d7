"""Leave out experts that hardly count for a token, while a model runs (MC-MoE's rule, arXiv 2410.06270).

Of the routing weights w of a token's experts, those with w < share · max w are set to zero and their experts are not
multiplied. Where the family divides the weights by their sum, the rest is scaled up so that the sum stays what it was;
elsewhere the others' weights stay as they are, as if the token had gone to fewer experts. Where a scale for each expert
multiplies them afterwards (Gemma 4), weights without it are compared and added up: they are what the router chose by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alphaq.checkpoint.families.architecture import architecture_of
from alphaq.checkpoint.families.routing import experts_per_token, renormalises
from alphaq.errors import AlphaQError
from alphaq.runtime.modules import PackedExperts

CALL = ("hidden_states", "top_k_index", "top_k_weights")  # what a layer gives its experts
NOBODY = -1  # an expert that no table has: kernels leave zeros for it at once
_HANDLE = "_alphaq_skipping"


@dataclass(frozen=True)
class Skipping:
    """A hook before a layer's experts. share: of a token's largest routing weight. renormalise: see the module.

    scale: [experts], which weights were multiplied by at the end; None for none.
    """

    share: float
    renormalise: bool
    scale: Tensor | None = None

    def __call__(
        self, module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> tuple[tuple[()], dict[str, Tensor]]:
        """What the experts get instead."""
        call = dict(zip(CALL, args, strict=False)) | kwargs
        index, weights = call["top_k_index"], call["top_k_weights"]
        probable = weights if self.scale is None else _unscaled(weights, self.scale[index])
        left_out = _too_light(module, index, probable, self.share)
        call["top_k_index"] = index.masked_fill(left_out, NOBODY)
        rest = weights.masked_fill(left_out, 0)
        if self.renormalise:
            rest = (rest * _growth(probable, left_out)).to(weights.dtype)
        call["top_k_weights"] = rest
        return (), call


def _unscaled(weights: Tensor, scale: Tensor) -> Tensor:
    """Weights before they were multiplied; an expert whose scale is 0 adds nothing, whatever it had: 0."""
    return torch.where(scale != 0, weights / scale, 0)


def _growth(weights: Tensor, left_out: Tensor) -> Tensor:
    """The sum of all weights of a token by that of the rest, [tokens, 1]: 1 to the bit where none is left out."""
    whole = weights.sum(-1, keepdim=True, dtype=torch.float32)
    rest = weights.masked_fill(left_out, 0).sum(-1, keepdim=True, dtype=torch.float32)
    return torch.where(rest != 0, whole / rest, 1)  # all weights of a token may be 0


def _too_light(module: Any, index: Tensor, weights: Tensor, share: float) -> Tensor:
    """Which of a token's experts are left out, bool [tokens, k]. index, weights: [tokens, k].

    The largest stays, also below 0. Experts without weights of their own (LongCat's), numbered after the others, cost
    nothing and stay.
    """
    largest = weights.amax(-1, keepdim=True)
    light = (weights < share * largest) & (weights < largest)
    return light & (index < len(module.packed_down.names[0])) if getattr(module, "zero_expert_num", 0) else light


def packed_experts(model: nn.Module) -> Iterator[tuple[str, PackedExperts]]:
    """The modules of a model whose experts can be left out, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedExperts))


def skip_experts(model: Any, share: float) -> None:
    """From now on, leave out experts whose routing weight is below a share (0 to 1) of the largest of their token.

    model: what `from_pretrained` made of a native checkpoint. 0 undoes it: the model runs as it was loaded. Layers
    whose experts the checkpoint keeps in 16 bits run all of them. Raises AlphaQError for a share that is none, and for
    models whose routing cannot be changed.
    """
    check_share(share)
    if share:
        check_skippable(model)
    for name, module in packed_experts(model) if isinstance(model, nn.Module) else ():
        handle: RemovableHandle | None = module.__dict__.pop(_HANDLE, None)
        if handle is not None:
            handle.remove()
        if share:
            rule = _rule(model, name, share)
            module.__dict__[_HANDLE] = module.register_forward_pre_hook(rule, with_kwargs=True)


def check_share(share: float) -> float:
    """The same share. Raises AlphaQError."""
    if not 0 <= share <= 1:
        raise AlphaQError(
            f"--skip-experts {share:g} is not between 0 and 1: it is a share of a token's largest routing weight. "
            "Try --skip-experts 0.3."
        )
    return share


def check_skippable(model: Any) -> None:
    """Raise AlphaQError with the reason, where experts of a model cannot be left out."""
    config = getattr(model, "config", None)
    name = type(model).__name__
    if not isinstance(model, nn.Module) or config is None:
        raise AlphaQError(
            "--skip-experts is for native checkpoints, which AlphaQ's own kernels run. What runs this model routes by "
            "itself. Quantize it with --engine native, or drop the option."
        )
    described = config.to_dict()
    architecture = architecture_of(described)
    if not architecture.experts_per_layer(described):
        raise AlphaQError(f"{name} has no experts that a router chooses, so none can be left out. Drop --skip-experts.")
    if experts_per_token(architecture, described) == 1:
        raise AlphaQError(
            f"{name} sends each token to one expert, so none can be left out. Drop --skip-experts, or load another "
            "model."
        )
    if not any(packed_experts(model)):
        raise AlphaQError(
            f"No experts of {name} are packed: it is no native checkpoint, keeps them in 16 bits, or its class "
            f"multiplies with them itself ({architecture.name}). Quantize a model of another family with --engine "
            "native, or drop --skip-experts."
        )


def _rule(model: nn.Module, experts: str, share: float) -> Skipping:
    """For the experts of that name, by what the family's file says of it."""
    described = model.config.to_dict()  # type: ignore[operator,union-attr]
    architecture = architecture_of(described)
    scale = None
    if architecture.expert_scale:
        around = model.get_submodule(experts.rpartition(".")[0])
        scale = around.get_parameter(architecture.expert_scale)  # itself, which follows the model to a device
    return Skipping(share, renormalises(architecture, described), scale)
