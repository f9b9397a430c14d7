"""A backward pass through a model that need not fit into memory: layers are read once more, from last to first.

The forward pass keeps what each decoder layer takes in, nothing else. For the gradient each layer is filled from disk
again, run on its input with a graph, and emptied; its routed experts are read one at a time then, and once more for
the gradient at their inputs.
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

from alphaq.calibration.head import Head
from alphaq.calibration.inputs import linears, stored_matrices
from alphaq.calibration.libraries import map_large_tensors
from alphaq.calibration.products import Room, product
from alphaq.calibration.stream import HollowModel, LayerTraffic, traffic_of
from alphaq.calibration.tokens import draw
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import PassError
from alphaq.nouns.matrix import MatrixRef

HEAD_TOKENS = 256  # whose chances are held at once


@dataclass(frozen=True, eq=False)
class Seen:
    """What went through one matrix, and what the score makes of it.

    inputs: float32 [n, columns], or of the embedding int64 [n], the numbers of its rows. gradients: float32 [n, rows],
    of the summed log chances of the drawn tokens, by the matrix's outputs. positions: int64 [n], ascending, each
    row's place among the tokens of all windows in row-major order.
    independent: whether each drawn token's chance depends on its own row alone, as at the head.
    """

    matrix: MatrixRef
    inputs: Tensor
    gradients: Tensor
    positions: Tensor
    independent: bool = False


See = Callable[[Seen], None]


class _Recomputed(torch.autograd.Function):
    """Runs without a graph, and again with one when its gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """run: called with the inputs, and with whether its gradient is about to be taken."""
        ctx.run = run
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            return run(False, *inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [one.detach().requires_grad_(one.is_floating_point()) for one in ctx.saved_tensors]
        wanted = [one for one in inputs if one.requires_grad]
        with torch.enable_grad():
            output = ctx.run(True, *inputs)
        found = iter(torch.autograd.grad(output, wanted, gradient, allow_unused=True))
        return None, *(next(found) if one.requires_grad else None for one in inputs)


@dataclass(frozen=True, eq=False)
class Drawn:
    """What was drawn. tokens: int64 [windows, positions]. entropy: of the model's chances there, mean, in nats."""

    tokens: Tensor
    entropy: float


def stream_scores(
    checkpoint: Checkpoint,
    ids: Tensor,
    see: See,
    context: int = 1,
    seed: int = 0,
    watch: Callable[[HollowModel], None] = lambda hollow: None,
) -> Drawn:
    """Show every matrix's inputs and the gradients of log p(y | what came before) at its outputs, y drawn by the model.

    ids: int64 [windows, length], whose first `context` tokens are given. A y is drawn at each position from the last
    given one on. Layers come from last to first, between what lies after them and what lies before.
    watch: may look at more of the model's modules; called before it runs.

    Memory: as `stream_forward`, what every layer takes in, and of one layer what its gradient needs. Raises as it does,
    and PassError where gradients do not pass through the model's class.
    """
    map_large_tensors()
    hollow = HollowModel(checkpoint)
    for layer in hollow.experts:
        _watch_experts(hollow, layer, see)
    watch(hollow)
    for name, matrices in linears(hollow).items():
        _watch_linear(hollow.model.get_submodule(name), matrices, see)
    _watch_embedding(hollow, see)  # before it is emptied
    for name in hollow.parts:
        part = hollow.model.get_submodule(name)
        if name in hollow.layers:
            _recompute(hollow, name, part)
        else:
            hollow.come_and_go(name)
    try:
        with torch.enable_grad():
            states = hollow.base(input_ids=ids, use_cache=False).last_hidden_state
        gradient, drawn = _score(hollow, states.detach(), context, seed, see)
        states.backward(gradient)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError, ValueError, LookupError) as error:
        raise PassError(
            f"The gradient of {type(hollow.base).__name__} ({checkpoint.name}) cannot be taken layer by layer "
            f"({str(error)[:200]})."
        ) from error
    return drawn


def _watch_embedding(hollow: HollowModel, see: See) -> None:
    """Show the embedding as a product with the tokens' unit vectors, of which `Seen.inputs` holds the numbers."""
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
            for matrix in matrices:
                see(Seen(matrix, ids, scale * gradient.float().flatten(0, -2), torch.arange(len(ids))))

        leaf.register_hook(show)
        return leaf

    module.register_forward_hook(hook)


def _recompute(hollow: HollowModel, name: str, layer: nn.Module) -> None:
    """Have a decoder layer keep its input only, and take its gradient by that.

    Raises PassError, when it runs, if tensors reach it or leave it beside its first argument and first output with a
    gradient that would be lost.
    """
    forward = layer.forward

    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        rest: tuple[Any, ...] | None = None

        def whole(graph: bool, states: Tensor) -> Tensor:
            nonlocal rest
            hollow.fill(name, without=(hollow.planned_role,))
            output = forward(states, *args, **kwargs)
            if not graph:
                hollow.empty(name)
            if isinstance(output, tuple):
                output, *others = output
                rest = tuple(others)
            return output

        output = _Recomputed.apply(whole, hidden)
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


def _watch_experts(hollow: HollowModel, layer: int, see: See) -> None:
    experts: Any = hollow.model.get_submodule(hollow.experts[layer])

    def run(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _run_experts(hollow, traffic_of(hollow, layer, (states, *args), kwargs), see).view_as(states)

    experts.forward = run


def _run_experts(hollow: HollowModel, traffic: LayerTraffic, see: See) -> Tensor:
    """As `run_experts`, with a graph that reads the experts once more."""
    form, room = traffic.form, Room(hollow.checkpoint)
    reached, put_out = [], []
    for number, matrices in hollow.matrices[traffic.layer].items():
        token, slot = torch.where(traffic.experts == number)
        if not len(token):
            continue
        run = partial(_watched_product, room=room, token=token, see=see)
        inputs = traffic.inputs[token]
        hidden = form.hidden([run(inputs, matrices[part]) for part in form.first], number)
        reached.append(token)
        put_out.append(form.output(run(hidden, matrices["down"]), number) * traffic.weights[token, slot, None])
    return torch.zeros_like(traffic.inputs).index_add(0, torch.cat(reached), torch.cat(put_out))


def _watched_product(inputs: Tensor, matrix: MatrixRef, room: Room, token: Tensor, see: See) -> Tensor:
    """inputs @ matrix.T, shown as what those tokens bring."""
    return product(inputs, lambda: [room.read(matrix)], lambda held, gradient: see(Seen(matrix, held, gradient, token)))


def _score(hollow: HollowModel, states: Tensor, context: int, seed: int, see: See) -> tuple[Tensor, Drawn]:
    """Gradient of the drawn tokens' summed log chances by the final states, and what was drawn."""
    gradient, entropy, tokens = torch.zeros_like(states), 0.0, []
    generator = torch.Generator().manual_seed(seed)
    step = max(1, HEAD_TOKENS // len(states))
    with Head(hollow, by_rows=True) as head:
        matrices = stored_matrices(hollow, head.filled)
        places = torch.arange(states[..., 0].numel()).view(states.shape[:2])
        for start in range(context - 1, states.shape[1], step):
            part = slice(start, start + step)
            some = states[:, part].clone().requires_grad_()
            watch = head.module.register_forward_hook(partial(_show_head, matrices, places[:, part].flatten(), see))
            with torch.enable_grad():
                logits = head.with_graph(some)
            watch.remove()
            drawn, change, nats = _drawn(logits.detach(), generator)
            tokens.append(drawn)
            entropy += nats
            (gradient[:, part],) = torch.autograd.grad(logits, some, change)
    drawn = torch.cat(tokens, dim=1)
    return gradient, Drawn(drawn, entropy / drawn.numel())


def _drawn(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Of logits [windows, positions, words]: a token for each position, the gradient of their summed log chances, and
    the chances' summed entropy. A few positions at a time, since float64 is wide."""
    tokens = torch.empty(logits.shape[:2], dtype=torch.int64)
    for position in range(logits.shape[1]):
        numbers = torch.rand(len(logits), 1, 1, generator=generator, dtype=torch.float64)
        tokens[:, position : position + 1] = draw(logits[:, position : position + 1], numbers)
    chances = logits.softmax(-1)
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
