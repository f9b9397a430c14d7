"""Leave out experts that hardly count for a token, while a model runs (MC-MoE's rule, arXiv 2410.06270).

Of the routing weights w of a token's experts, those with w < share · max w are set to zero and their experts are not
multiplied. Where the family divides the weights by their sum, the rest is scaled up so that the sum stays what it was;
elsewhere the others' weights stay as they are, as if the token had gone to fewer experts.
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
    """A hook before a layer's experts. share: of a token's largest routing weight. renormalise: see the module."""

    share: float
    renormalise: bool

    def __call__(
        self, module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> tuple[tuple[()], dict[str, Tensor]]:
        """What the experts get instead."""
        call = dict(zip(CALL, args, strict=False)) | kwargs
        index, weights = call["top_k_index"], call["top_k_weights"]
        left_out = too_light(module, index, weights, self.share)
        call["top_k_index"] = index.masked_fill(left_out, NOBODY)
        call["top_k_weights"] = self._weights(weights, left_out)
        return (), call

    def _weights(self, weights: Tensor, left_out: Tensor) -> Tensor:
        rest = weights.masked_fill(left_out, 0)
        if not self.renormalise:
            return rest
        # Where none is left out the quotient is 1, and weights stay as they are to the bit.
        ratio = weights.sum(-1, keepdim=True, dtype=torch.float32) / rest.sum(-1, keepdim=True, dtype=torch.float32)
        return (rest * ratio).to(weights.dtype)


def too_light(module: Any, index: Tensor, weights: Tensor, share: float) -> Tensor:
    """Which of a token's experts are left out, bool [tokens, k]. index, weights: [tokens, k].

    Experts without weights of their own (LongCat's), numbered after the others, cost nothing and stay.
    """
    light = weights < share * weights.amax(-1, keepdim=True)
    return light & (index < len(module.packed_down.names[0])) if getattr(module, "zero_expert_num", 0) else light


def packed_experts(model: nn.Module) -> Iterator[PackedExperts]:
    """The modules of a model whose experts can be left out."""
    return (module for module in model.modules() if isinstance(module, PackedExperts))


def skip_experts(model: Any, share: float) -> None:
    """From now on, leave out experts whose routing weight is below a share (0 to 1) of the largest of their token.

    model: what `from_pretrained` made of a native checkpoint. 0 undoes it: the model runs as it was loaded. Layers
    whose experts the checkpoint keeps in 16 bits run all of them. Raises AlphaQError for a share that is none, and for
    models whose routing cannot be changed.
    """
    check_share(share)
    if share:
        _check_model(model)
    for module in packed_experts(model) if isinstance(model, nn.Module) else ():
        handle: RemovableHandle | None = module.__dict__.pop(_HANDLE, None)
        if handle is not None:
            handle.remove()
        if share:
            rule = Skipping(share, _renormalises(model))
            module.__dict__[_HANDLE] = module.register_forward_pre_hook(rule, with_kwargs=True)


def check_share(share: float) -> float:
    """The same share. Raises AlphaQError."""
    if not 0 <= share <= 1:
        raise AlphaQError(
            f"--skip-experts {share:g} is not between 0 and 1: it is a share of a token's largest routing weight. "
            "Try --skip-experts 0.3."
        )
    return share


def _check_model(model: Any) -> None:
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


def _renormalises(model: Any) -> bool:
    described = model.config.to_dict()
    return renormalises(architecture_of(described), described)
