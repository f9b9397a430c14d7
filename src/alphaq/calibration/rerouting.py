"""Where a layer's tokens go when its router may not choose some experts: asked of the family's own class.

While the router computes, what its matrix gives for a banned expert is replaced by next to −∞, and so is what a
correction of the choice adds. All else, softmax, sigmoid, groups, renormalising, is the class's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from alphaq.calibration.stream import HollowModel, Keywords, LayerTraffic, traffic_of
from alphaq.errors import PassError
from alphaq.nouns.matrix import Role

NEVER = -1e30
_PRODUCTS = (linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)
_SUMS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)


class Banning(TorchFunctionMode):
    """Within it a router never chooses some experts.

    counting: the router's tensors that have a row for each expert. banned: bool [tokens, experts].
    """

    def __init__(self, counting: Sequence[Tensor], banned: Tensor) -> None:
        super().__init__()
        self.matrices = {one.data_ptr() for one in counting if sum(side != 1 for side in one.shape) > 1}
        self.corrections = {one.data_ptr() for one in counting} - self.matrices
        self.banned = banned
        self.met = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        ours = self.matrices if func in _PRODUCTS else self.corrections if func in _SUMS else ()
        if not ours or not isinstance(result, Tensor):
            return result
        given = (one.data_ptr() for one in (*args, *(kwargs or {}).values()) if isinstance(one, Tensor))
        if ours.isdisjoint(given) or result.numel() // result.shape[-1] != len(self.banned):
            return result
        self.met = True
        idle = result.shape[-1] - self.banned.shape[-1]  # choices that have no weights come last
        banned = torch.nn.functional.pad(self.banned, (0, idle)) if idle > 0 else self.banned
        return result.masked_fill(banned.view(result.shape), NEVER)


def counting(hollow: HollowModel, layer: int) -> list[str]:
    """Parameters of a layer's router that have a row for each expert."""
    names = hollow.model.get_submodule(hollow.layers[layer]).state_dict(prefix=f"{hollow.layers[layer]}.")
    match = hollow.checkpoint.architecture.first_match
    rules = {name: match(sources[0])[0] for name in names if (sources := hollow.sources(name))}
    return [name for name, rule in rules.items() if rule and rule.per_expert and rule.role is Role.ROUTER]


def _is_shared(hollow: HollowModel, name: str, module: Any) -> bool:
    """Whether a module is an expert that all tokens go to."""
    sources = [hollow.sources(f"{name}.{own}") for own, _ in module.named_parameters()]
    roles = {hollow.checkpoint.roles[source[0]] for source in sources if source}
    return roles == {Role.SHARED_EXPERT} and len(sources) > 1


@contextmanager
def _bypassed(modules: Sequence[Any]) -> Iterator[None]:
    """Within it these modules give what they get: shared experts have no say in routing, and take most of the time."""
    before = [one.__dict__.get("forward") for one in modules]
    for one in modules:
        one.forward = lambda states, *_, **__: states
    try:
        yield
    finally:
        for one, own in zip(modules, before, strict=True):
            if own is None:
                del one.forward  # the class has its own
            else:
                one.forward = own


class _Asked(Exception):
    """Carries the routing out of the block, whose remaining weights need not be there."""

    def __init__(self, traffic: LayerTraffic) -> None:
        self.traffic = traffic


def _are_banned(banned: Tensor, chosen: Tensor) -> Tensor:
    """bool [n, top_k]: which of the chosen experts are banned; those beyond have no weights and are not."""
    return banned.gather(1, chosen.clamp(max=banned.shape[1] - 1)) & (chosen < banned.shape[1])


class Router:
    """Of one layer of a hollow model that is being run. To be made before it runs."""

    def __init__(self, hollow: HollowModel, layer: int) -> None:
        self.hollow, self.layer = hollow, layer
        name = hollow.experts[layer]
        self.block: Any = hollow.model.get_submodule(name.rpartition(".")[0])
        self.inputs: Tensor | None = None
        self._asking = False
        around = name.rpartition(".")[0]
        self._shared = [one for own, one in self.block.named_children() if _is_shared(hollow, f"{around}.{own}", one)]
        self.block.register_forward_pre_hook(self._see, with_kwargs=True)
        hollow.model.get_submodule(name).register_forward_pre_hook(self._stop, with_kwargs=True)

    def _see(self, module: Any, args: tuple[Any, ...], kwargs: Keywords) -> None:
        if not self._asking and torch.is_grad_enabled():  # the layer is run again, to be asked once its gradient comes
            self.inputs = (*args, *kwargs.values())[0].detach().flatten(0, -2)

    def _stop(self, module: Any, args: tuple[Any, ...], kwargs: Keywords) -> None:
        if self._asking:
            raise _Asked(traffic_of(self.hollow, self.layer, args, kwargs))

    def forget(self) -> None:
        """Drop what the layer took in: as much as all that the pass keeps of it."""
        self.inputs = None

    @torch.no_grad()
    def ask(self, tokens: Tensor, banned: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and weights [n, top_k] of some tokens [n], each with its own banned experts, bool [n, experts].

        The layer's weights must be there. Raises PassError where the class cannot be asked.
        """
        assert self.inputs is not None  # the layer has run
        state = self.hollow.model.state_dict(keep_vars=True)
        mode = Banning([state[name] for name in counting(self.hollow, self.layer)], banned)
        self._asking = True
        try:
            with mode, _bypassed(self._shared):
                self.block(self.inputs[tokens][None])
        except _Asked as asked:
            chosen, weights = asked.traffic.experts, asked.traffic.weights
            if mode.met and not bool((_are_banned(banned, chosen) & (weights != 0)).any()):
                return chosen, weights
        except (TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
            raise PassError(f"{self._where} cannot be asked where tokens go ({str(error)[:100]}).") from error
        finally:
            self._asking = False
        raise PassError(f"{self._where} chooses its experts in a way of its own, so none can be banned.")

    @property
    def _where(self) -> str:
        return f"The router of layer {self.layer} of {self.hollow.checkpoint.name} ({type(self.block).__name__})"
