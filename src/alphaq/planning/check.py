"""A default plan is tried before it is handed out: beside uniform bits in the same bytes, on the model's own writing.

Tokens of the pass that measured the signal go through the model once more, layer by layer from disk, in three groups:
one sees the model as it is, one as planned, one with uniform bits. What counts is KL to the first. Of a model too large
for that, the plans' summed moves of the stream are compared instead, which are known already.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch

from alphaq.calibration.divergence import divergences
from alphaq.calibration.text import MOST_HELD
from alphaq.calibration.tokens import model_prefix
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import BudgetError, StatsError
from alphaq.formats.table import rate_of
from alphaq.measuring.measurement import restored
from alphaq.measuring.resources import Resources
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Plan, PlanCheck
from alphaq.planning.dropping import plan_with_drops
from alphaq.planning.measured import Measurements
from alphaq.planning.plan import make_plan
from alphaq.planning.request import Request
from alphaq.quantizers.base import QUANTIZERS
from alphaq.sensitivity.methods import method

CHECKED = "auto"
BASELINE = "uniform"
TOKENS = 512  # of those that the losses were measured with
MOST_WEIGHTS = 2 * 10**9  # of a model that is run; half a minute on two cores
MOST_PREDICTED = MOST_HELD
"""The same where the plan's KL is predicted: every matrix is rounded twice for the check, which above this takes longer
than all else that the plan needs, and in no case so far did it take uniform bits then (docs/research/log.md)."""
MARGIN = 1.25
"""How many times uniform bits' figure a plan's must be to be given up. Less may be chance: on Gemma 3 270M at 3.5 bits
a plan that is a sixth better on texts is a twelfth worse on 510 tokens of the model's own writing
(docs/research/log.md)."""
CHECK_VERSION = 1  # raise it whenever the same plans would be compared otherwise


def checked_plan(
    checkpoint: Checkpoint | None,
    request: Request,
    measurements: Measurements,
    resources: Resources = Resources(),
) -> Plan:
    """`make_plan`; of the default method the better of its plan and uniform bits, with what was compared on record.

    Raises what `make_plan` and `stream_forward` do.
    """
    if request.config.drop and checkpoint is not None:
        plan = plan_with_drops(checkpoint, request, measurements)
        if plan.dropped is not None and plan.dropped.experts:
            return plan.model_copy(update={"unchecked": "it has fewer experts than the model"})
    else:
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
    # Those of a store would be read three times over a network, and those of a plain file only its engine can run.
    most = MOST_WEIGHTS if plan.prediction is None else MOST_PREDICTED
    affordable = weights <= most and checkpoint.store is None and not checkpoint.plain
    if not affordable and plan.prediction is not None:
        return plan.model_copy(update={"unchecked": "the model is too large to be run for it; see its predicted KL"})
    if not affordable and request.joint:  # whose other roles the signal does not know
        why = "transformers cannot run the file" if checkpoint.plain else "the model is too large to be run for it"
        return plan.model_copy(update={"unchecked": f"{why}, and roles share the budget"})
    check = (
        _by_divergence(checkpoint, request, measurements, (plan, uniform), resources)
        if affordable
        else _by_moves(measurements, (plan, uniform))
    )
    if check.taken == "plan":
        return plan.model_copy(update={"check": check})
    return uniform.model_copy(update={"config": plan.config, "check": check, "dropped": plan.dropped})


def _uniform(checkpoint: Checkpoint, request: Request, measurements: Measurements) -> Plan:
    """Uniform bits of the same choices and budget. Raises BudgetError where there is no such plan."""
    if request.config.per_layer:
        raise BudgetError("Uniform bits cannot have a budget for each layer.")
    if request.config.min_speed is not None:
        raise BudgetError("Uniform bits cannot be made for a speed.")
    config, own = request.config.model_copy(update={"method": BASELINE}), method(BASELINE)
    # Roles that share the plan's bytes share those of uniform bits too. Where each has a usual width, down to the head,
    # it keeps that: so are stock mixes made, and they are harder to beat.
    alike = replace(own, joint=request.method.joint and Role.HEAD not in request.profile.role_bits)
    rates = [choice for choice in request.offered if rate_of(choice)]
    ladder = tuple(sorted(rates, key=rate_of)) if rates else request.ladder
    return make_plan(checkpoint, replace(request, config=config, method=alike, ladder=ladder), measurements)


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
    passed = measurements.evidence.fisher or measurements.evidence.synthetic
    assert passed is not None  # the default method has asked for one of them
    ids = torch.tensor(passed.tokens[: max(1, TOKENS // len(passed.tokens[0]))])
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
        values = _parsed(run()) if cache is None else cache.recall(key, run, _parsed)
    return _verdict("kl", values, ids[:, context:].numel())


def _parsed(text: str) -> list[float]:
    """Two divergences. Raises StatsError if the text holds anything else."""
    try:
        planned, uniform = map(float, json.loads(text))
    except (ValueError, TypeError) as error:
        raise StatsError(f"The cache holds no check ({error}). It is made again.") from error
    return [planned, uniform]
