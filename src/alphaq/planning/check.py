"""A default plan is tried before it is handed out: beside uniform bits in the same bytes, on the model's own writing.

Tokens of the pass that measured the signal go through the model once more, layer by layer from disk, in three groups:
one sees the model as it is, one as planned, one with uniform bits. What counts is KL to the first. Of a model too large
for that, the plans' summed moves of the stream are compared instead, which are known already.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alphaq.calibration.head import Head
from alphaq.calibration.inputs import linears
from alphaq.calibration.stream import HollowModel, LayerTraffic, run_experts, stream_forward
from alphaq.calibration.tokens import model_prefix
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import BudgetError, StatsError
from alphaq.measuring.measurement import restored
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef
from alphaq.nouns.plan import Plan, PlanCheck
from alphaq.planning.measured import Measurements
from alphaq.planning.plan import make_plan
from alphaq.planning.request import Request
from alphaq.quantizers.base import QUANTIZERS
from alphaq.sensitivity.methods import method
from alphaq.work.resources import USUAL, Resources

CHECKED = "auto"
BASELINE = "uniform"
WINDOWS = 2  # of those that the signal was measured with
MOST_WEIGHTS = 2 * 10**9  # of a model that is run; half a minute on two cores
MARGIN = 1.25
"""How many times uniform bits' figure a plan's must be to be given up. Less may be chance: on Gemma 3 270M at 3.5 bits
a plan that is a sixth better on texts is a twelfth worse on 510 tokens of the model's own writing (docs/LOG.md)."""
HEAD_TOKENS = 128
CHECK_VERSION = 1  # raise it whenever the same plans would be compared otherwise
Restore = Callable[[MatrixRef], Tensor]


def checked_plan(
    checkpoint: Checkpoint | None,
    request: Request,
    measurements: Measurements,
    resources: Resources = USUAL,
) -> Plan:
    """`make_plan`; of the default method the better of its plan and uniform bits, with what was compared on record.

    Raises what `make_plan` and `stream_forward` do.
    """
    plan = make_plan(checkpoint, request, measurements)
    if checkpoint is None or request.config.method != CHECKED or not request.config.check:
        return plan
    try:
        uniform = _uniform(checkpoint, request, measurements)
    except BudgetError as error:
        return plan.model_copy(update={"unchecked": f"there are no uniform bits to compare with ({error})"})
    if uniform.choices == plan.choices:
        return plan
    weights = sum(matrix.parameters for matrix in checkpoint.matrices)
    affordable = weights <= MOST_WEIGHTS and checkpoint.store is None  # which would be read three times over a network
    if not affordable and request.joint:  # whose other roles the signal does not know
        return plan.model_copy(
            update={"unchecked": "the model is too large to be run for it, and roles share the budget"}
        )
    check = (
        _by_divergence(checkpoint, request, measurements, (plan, uniform), resources)
        if affordable
        else _by_moves(measurements, (plan, uniform))
    )
    if check.taken == "plan":
        return plan.model_copy(update={"check": check})
    return uniform.model_copy(update={"config": plan.config, "check": check})


def _uniform(checkpoint: Checkpoint, request: Request, measurements: Measurements) -> Plan:
    """Uniform bits of the same choices and budget. Raises BudgetError where there is no such plan."""
    if request.config.per_layer:
        raise BudgetError("Uniform bits know no budget for each layer.")
    config = request.config.model_copy(update={"method": BASELINE})
    rates = [choice for choice in request.offered if choice.rate]
    ladder = tuple(sorted(rates, key=lambda choice: choice.rate)) if rates else request.ladder
    return make_plan(checkpoint, replace(request, config=config, method=method(BASELINE), ladder=ladder), measurements)


def _verdict(by: Literal["kl", "moves"], values: Sequence[float], tokens: int | None) -> PlanCheck:
    planned, uniform = (float(f"{value:.4g}") for value in values)
    worse = not planned <= MARGIN * uniform  # NaN is worse
    return PlanCheck(by=by, tokens=tokens, plan=planned, uniform=uniform, taken="uniform" if worse else "plan")


def _by_moves(measurements: Measurements, plans: Sequence[Plan]) -> PlanCheck:
    """Σ signal × relative error: how far the layers' outputs move, each by itself."""
    synthetic = measurements.evidence.synthetic
    assert synthetic is not None  # the default method has asked for it
    signals = {name: use.signal for name, use in synthetic.matrices.items() if math.isfinite(use.signal)}
    sums = [sum(signals.get(name, 0.0) * error for name, error in plan.expected_error.items()) for plan in plans]
    return _verdict("moves", sums, None)


def _by_divergence(
    checkpoint: Checkpoint,
    request: Request,
    measurements: Measurements,
    plans: Sequence[Plan],
    resources: Resources,
) -> PlanCheck:
    """KL of both to the model itself."""
    synthetic = measurements.evidence.synthetic
    assert synthetic is not None  # the default method has asked for it
    ids = torch.tensor(synthetic.tokens[:WINDOWS])
    context = max(1, len(model_prefix(checkpoint)) if request.config.bos else 0)
    quantizer = request.profile.quantizer

    def run() -> str:
        rounding = partial(restored, checkpoint, quantizer=quantizer, importance=measurements.importance)
        return json.dumps(divergences(checkpoint, ids, [plan.every_choice() for plan in plans], rounding, context))

    rounded_by = [CHECK_VERSION, request.profile.name, quantizer, QUANTIZERS[quantizer].version, request.config.imatrix]
    depends_on = [*(one.choices for one in plans), ids.tolist(), context, checkpoint.settings_digest(), *rounded_by]
    key = f"check-{hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:24]}.json"
    cache = resources.cache
    for _ in resources.wrap([key], 1, "check"):
        values = _parsed(run()) if cache is None else cache.kept(key, run, _parsed)
    return _verdict("kl", values, ids[:, context:].numel())


def _parsed(text: str) -> list[float]:
    """Two divergences. Raises StatsError if the text holds anything else."""
    try:
        planned, uniform = map(float, json.loads(text))
    except (ValueError, TypeError) as error:
        raise StatsError(f"The cache holds no check ({error}). It is made again.") from error
    return [planned, uniform]


def divergences(
    checkpoint: Checkpoint,
    ids: Tensor,
    choices: Sequence[Mapping[str, Choice]],
    rounding: Callable[[MatrixRef, Choice], Tensor],
    context: int = 1,
) -> list[float]:
    """Mean KL in nats per token of the model with its matrices at each set of choices, to the model itself.

    ids: int64 [windows, length], whose first `context` tokens are given. rounding: what stands in for a matrix at a
    choice, float32 [rows, columns]. Memory: as `stream_forward` for all groups' tokens, and one matrix restored.
    """
    hollow = HollowModel(checkpoint)
    groups: list[Restore] = [lambda matrix: checkpoint.read(matrix).float()]
    for one in choices:

        def restore(matrix: MatrixRef, own: Mapping[str, Choice] = one) -> Tensor:
            choice = own.get(matrix.name)
            return checkpoint.read(matrix).float() if choice is None else rounding(matrix, choice)

        groups.append(restore)
    module = hollow.base.get_input_embeddings()
    embedding = _matrices(hollow, next(name for name, one in hollow.model.named_modules() if one is module))
    touched = {name for one in choices for name in one}
    for name, matrices in [*linears(hollow).items(), *embedding.items()]:
        if any(matrix.name in touched for matrix in matrices):
            _split(hollow, name, matrices, groups)
    states = stream_forward(
        checkpoint, ids.repeat(len(groups), 1), lambda traffic: None, hollow, partial(_experts, groups=groups)
    )
    return _distances(hollow, states[:, context - 1 : -1].chunk(len(groups)), groups, touched)


def _matrices(hollow: HollowModel, module: str) -> dict[str, tuple[MatrixRef, ...]]:
    """The matrices that make up the weight of the embedding or the head, by its module."""
    sources = hollow.sources(f"{module}.weight")
    found = tuple(matrix for matrix in hollow.checkpoint.matrices if matrix.tensor in sources)
    return {module: found} if found else {}


def _split(hollow: HollowModel, name: str, matrices: Sequence[MatrixRef], groups: Sequence[Restore]) -> None:
    """Have a module compute each group's windows with that group's weight, unless it is stored in another order."""
    module: Any = hollow.model.get_submodule(name)
    forward = module.forward

    def run(values: Tensor, *args: Any, **kwargs: Any) -> Any:
        own = module.weight
        plain = torch.cat([groups[0](matrix) for matrix in matrices])
        if len(values) % len(groups) or not torch.equal(plain, own):
            return forward(values, *args, **kwargs)
        found = []
        for part, restore in zip(values.chunk(len(groups)), groups, strict=True):
            module.weight = nn.Parameter(torch.cat([restore(matrix) for matrix in matrices]), False)
            found.append(forward(part, *args, **kwargs))
        module.weight = own
        return torch.cat(found)

    module.forward = run


def _experts(hollow: HollowModel, traffic: LayerTraffic, groups: Sequence[Restore]) -> Tensor:
    """The experts' outputs, each group's tokens with that group's matrices, float32 [tokens, hidden]."""
    parts = zip(*(one.chunk(len(groups)) for one in (traffic.inputs, traffic.experts, traffic.weights)), strict=True)
    return torch.cat(
        [
            run_experts(hollow, replace(traffic, inputs=inputs, experts=experts, weights=weights), restore)
            for (inputs, experts, weights), restore in zip(parts, groups, strict=True)
        ]
    )


def _distances(
    hollow: HollowModel, states: Sequence[Tensor], groups: Sequence[Restore], touched: Container[str]
) -> list[float]:
    """Mean KL of each further group's final hidden states [windows, positions, hidden] to the first's.

    touched: names of the matrices that some group has otherwise.
    """
    sums = [0.0] * (len(groups) - 1)
    step = max(1, HEAD_TOKENS // len(states[0]))
    with Head(hollow) as head:
        own = _matrices(hollow, head.filled).get(head.filled, ())
        weights = [head.module.weight] * len(groups)
        if any(matrix.name in touched for matrix in own):
            weights = [nn.Parameter(torch.cat([restore(one) for one in own]), False) for restore in groups]

        def log_chances(group: int, some: Tensor) -> Tensor:
            head.module.weight = weights[group]
            return head(some).log_softmax(-1)

        for parts in zip(*(one.split(step, dim=1) for one in states), strict=True):
            log_p = log_chances(0, parts[0])
            for number, some in enumerate(parts[1:]):
                log_q = log_chances(number + 1, some)
                sums[number] += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
    positions = states[0].shape[0] * states[0].shape[1]
    return [total / positions for total in sums]
