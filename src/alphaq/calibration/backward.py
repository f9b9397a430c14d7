"""A backward pass through a model that need not fit into memory: layers are read once more, from last to first.

The forward pass keeps what each decoder layer takes in and, in 16 bits, what its experts put out. For the gradient each
layer is filled from disk again, run on its input with a graph, and emptied; its routed experts are read one at a time
then (gradients.py). So all is read twice. Windows that measure swaps (swaps.py) go along forward.
Whoever looks on is shown, for every matrix, its inputs and the gradient at its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alphaq.calibration.gradients import Kept, See, Seen, known_output
from alphaq.calibration.head import Head
from alphaq.calibration.inputs import linears, stored_matrices
from alphaq.calibration.libraries import map_large_tensors
from alphaq.calibration.stream import HollowModel, run_experts, traffic_of
from alphaq.calibration.swaps import SwapMeter
from alphaq.calibration.tokens import draw
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import PassError
from alphaq.nouns.matrix import MatrixRef

HEAD_TOKENS = 256  # whose chances are held at once


class _Recomputed(torch.autograd.Function):
    """Runs without a graph, and what comes first of it again with one when its gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[bool, Tensor], Tensor], first: int, inputs: Tensor) -> Tensor:
        """run: called with whether a gradient is about to be taken, and with the inputs, or the first of them then."""
        ctx.run = run
        # A part of a tensor would keep the whole.
        ctx.save_for_backward(inputs if first == len(inputs) else inputs[:first].clone())
        with torch.no_grad():
            return run(False, inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        inputs = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.run(True, inputs)
        (found,) = torch.autograd.grad(output, inputs, gradient[: len(inputs)])
        others = found.new_zeros(len(gradient) - len(found), *found.shape[1:])
        return None, None, torch.cat([found, others]) if len(others) else found


@dataclass(frozen=True, eq=False)
class Drawn:
    """What was drawn, and what swaps were found to cost.

    tokens: int64 [windows, positions]. entropy: of the model's chances there, mean, in nats. swaps: κ by layer
    (swaps.py).
    """

    tokens: Tensor
    entropy: float
    swaps: Mapping[int, float]


def stream_scores(
    checkpoint: Checkpoint,
    ids: Tensor,
    see: See,
    context: int = 1,
    seed: int = 0,
    watch: Callable[[HollowModel], None] = lambda hollow: None,
    swaps: bool = True,
) -> Drawn:
    """Show every matrix's inputs and the gradients of log p(y | what came before) at its outputs, y drawn by the model.

    ids: int64 [windows, length], whose first `context` tokens are given. A y is drawn at each position from the last
    given one on. Layers come from last to first, between what lies after them and what lies before.
    watch: may look at more of the model's modules; called before it runs. swaps: whether to measure what swaps cost.

    Memory: as `stream_forward`, what every layer takes in and its experts put out, and of one layer what its gradient
    needs. Raises as it does, and PassError where gradients do not pass through the model's class.
    """
    map_large_tensors()
    hollow = HollowModel(checkpoint)
    flow = _Flow(hollow, see, len(ids), SwapMeter.of(hollow, ids) if swaps else None)
    for layer in hollow.experts:
        _watch_experts(flow, layer)
    watch(hollow)
    for name, matrices in linears(hollow).items():
        _watch_linear(hollow.model.get_submodule(name), matrices, see)
    _watch_embedding(flow)  # before it is emptied
    for name in hollow.parts:
        part = hollow.model.get_submodule(name)
        if name in hollow.layers:
            _recompute(flow, name, part)
        else:
            hollow.come_and_go(name)
    try:
        with torch.enable_grad():
            all_ids = ids if flow.meter is None else flow.meter.beside(ids)
            states = hollow.base(input_ids=all_ids, use_cache=False).last_hidden_state
        gradient, drawn = _score(flow, states.detach(), context, seed)
        states.backward(gradient)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError, ValueError, LookupError) as error:
        raise PassError(
            f"The gradient of {type(hollow.base).__name__} ({checkpoint.name}) cannot be taken layer by layer "
            f"({str(error)[:200]})."
        ) from error
    return drawn


@dataclass(frozen=True, eq=False)
class _Flow:
    """A pass. windows: whose gradients are taken; those of the meter come after them and go forward alone."""

    hollow: HollowModel
    see: See
    windows: int
    meter: SwapMeter | None

    @property
    def total(self) -> int:
        """Windows that go forward."""
        return self.windows if self.meter is None else self.meter.total

    def first(self, values: Tensor) -> Tensor:
        """What belongs to the windows whose gradients are taken, of values that have all windows, or their tokens, in
        their first dimension."""
        return values[: len(values) // self.total * self.windows]

    def of_first(self, values: Any) -> Any:
        """The same of every such tensor in nested containers; others are for all windows alike."""
        if isinstance(values, Tensor):
            return values[: self.windows] if values.ndim > 1 and len(values) == self.total else values
        if isinstance(values, Mapping):
            return {key: self.of_first(one) for key, one in values.items()}
        return type(values)(map(self.of_first, values)) if type(values) in (tuple, list) else values


def _watch_embedding(flow: _Flow) -> None:
    """Show the embedding as a product with the tokens' unit vectors, of which `Seen.inputs` holds the numbers."""
    hollow = flow.hollow
    module: Any = hollow.base.get_input_embeddings()
    name = next(name for name, one in hollow.model.named_modules() if one is module)
    matrices = stored_matrices(hollow, name)

    def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        ids, lengths = args[0].flatten(), leaf.detach().flatten(0, -2).norm(dim=-1)
        longest = int(lengths.argmax())  # padding may have none
        token = int(ids[longest])
        if module.weight.is_meta:  # its rows were looked up, of the one matrix that is its weight
            row = hollow.checkpoint.read_rows(matrices[0], slice(token, token + 1)).float()
        else:
            row = module.weight[token].detach()
        scale = float(lengths[longest] / row.norm().clamp(min=1e-30))

        def show(gradient: Tensor) -> None:
            own, pulled = flow.first(ids), flow.first(gradient.float().flatten(0, -2))
            for matrix in matrices:
                flow.see(Seen(matrix, own, scale * pulled, torch.arange(len(own))))

        leaf.register_hook(show)
        return leaf

    module.register_forward_hook(hook)


def _recompute(flow: _Flow, name: str, layer: nn.Module) -> None:
    """Have a decoder layer keep its input only, and take its gradient by that.

    Raises PassError, when it runs, if tensors reach it or leave it beside its first argument and first output with a
    gradient that would be lost.
    """
    forward, hollow = layer.forward, flow.hollow

    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        rest: tuple[Any, ...] | None = None

        def whole(graph: bool, states: Tensor) -> Tensor:
            nonlocal rest
            hollow.fill(name, without=(hollow.planned_role,))
            others = flow.of_first((args, kwargs)) if graph else (args, kwargs)
            output = forward(states, *others[0], **others[1])
            if not graph:
                hollow.empty(name)
            if isinstance(output, tuple):
                output, *others = output
                rest = tuple(others)
            return output

        output = _Recomputed.apply(whole, len(flow.first(hidden)), hidden)
        arriving = any(one.requires_grad for one in _tensors((args, kwargs)))
        if arriving or any(one.is_floating_point() for one in _tensors(rest)):
            raise PassError(
                f"{name} of {hollow.checkpoint.name} ({type(layer).__name__}) hands on more than one stream, so its "
                "gradient cannot be taken layer by layer."
            )
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: hollow.empty(name))
        return output if rest is None else (output, *rest)

    layer.forward = run


def _tensors(values: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, tuple | list):
        for one in values:
            yield from _tensors(one)


def _watch_linear(module: Any, matrices: Sequence[MatrixRef], see: See) -> None:
    def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
        rows = [one.shape[0] for one in matrices]
        if not isinstance(output, Tensor) or not output.requires_grad or output.shape[-1] != sum(rows):
            return  # a class of its own, which does more than multiply
        inputs = args[0].detach().float().flatten(0, -2)
        places = torch.arange(len(inputs))

        def show(gradient: Tensor) -> None:
            whole = gradient.float().flatten(0, -2)
            for matrix, part in zip(matrices, whole.split(rows, dim=1), strict=True):
                see(Seen(matrix, inputs, part, places))

        output.register_hook(show)

    module.register_forward_hook(hook)


def _watch_experts(flow: _Flow, layer: int) -> None:
    """Run a layer's experts when tokens go forward, and keep what they put out until gradients come by."""
    hollow = flow.hollow
    experts: Any = hollow.model.get_submodule(hollow.experts[layer])
    kept: list[Kept] = []

    def run(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        traffic = traffic_of(hollow, layer, (states, *args), kwargs)
        if torch.is_grad_enabled():
            return known_output(hollow, traffic, kept.pop(0), flow.see).view_as(states)
        output = run_experts(hollow, traffic if flow.meter is None else flow.meter.routed(traffic))
        kept.append(Kept.of(flow.first(output)))
        return output.view_as(states)

    experts.forward = run


def _score(flow: _Flow, states: Tensor, context: int, seed: int) -> tuple[Tensor, Drawn]:
    """Gradient of the drawn tokens' summed log chances by the final states, and what was drawn."""
    gradient, entropy, tokens = torch.zeros_like(states), 0.0, []
    own, others = states[: flow.windows], states[flow.windows :]
    generator = torch.Generator().manual_seed(seed)
    step = max(1, HEAD_TOKENS // len(own))
    with Head(flow.hollow, by_rows=True) as head:
        matrices = stored_matrices(flow.hollow, head.filled)
        places = torch.arange(own[..., 0].numel()).view(own.shape[:2])
        for start in range(context - 1, states.shape[1], step):
            part = slice(start, start + step)
            some = own[:, part].clone().requires_grad_()
            watch = head.module.register_forward_hook(
                partial(_show_head, matrices, places[:, part].flatten(), flow.see)
            )
            with torch.enable_grad():
                logits = head.with_graph(some)
            watch.remove()
            drawn, change, nats = _drawn(logits.detach(), generator)
            tokens.append(drawn)
            entropy += nats
            (gradient[: flow.windows, part],) = torch.autograd.grad(logits, some, change)
            if flow.meter is not None:
                plain = logits.detach()[: flow.meter.count].clone()
                del logits, change  # chances are wide
                flow.meter.compare(plain, head(others[:, part]))
    drawn = torch.cat(tokens, dim=1)
    swaps = {} if flow.meter is None else flow.meter.costs()
    return gradient, Drawn(drawn, entropy / drawn.numel(), swaps)


def _drawn(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Of logits [windows, positions, words]: a token for each position, the gradient of their summed log chances, and
    the chances' summed entropy."""
    numbers = torch.rand(*logits.shape[1::-1], 1, generator=generator, dtype=torch.float64).transpose(0, 1)
    chances = logits.softmax(-1)
    tokens = draw(chances, numbers)
    surprise = logits.logsumexp(-1) - torch.linalg.vecdot(chances, logits)
    change = chances.neg_()
    change.scatter_add_(-1, tokens[..., None], torch.ones(*tokens.shape, 1))
    return tokens, change, float(surprise.sum(dtype=torch.float64))


def _show_head(
    matrices: Sequence[MatrixRef], places: Tensor, see: See, module: Any, args: tuple[Any, ...], output: Tensor
) -> None:
    inputs = args[0].detach().float().flatten(0, -2)

    def show(gradient: Tensor) -> None:
        for matrix in matrices:
            see(Seen(matrix, inputs, gradient.float().flatten(0, -2), places, independent=True))

    output.register_hook(show)
