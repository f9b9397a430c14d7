"""Several requests measured together, so that each gets what it would measure alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from alphaq.checkpoint.reader import Checkpoint
from alphaq.measuring.resources import Resources
from alphaq.planning.evidence import measure_for_plan
from alphaq.planning.measured import Measurements, PlanInputs
from alphaq.planning.request import Request


def measure_for_plans(
    checkpoint: Checkpoint,
    requests: Mapping[str, Request],
    inputs: PlanInputs = PlanInputs(),
    resources: Resources = Resources(),
    check_budget: bool = True,
) -> dict[str, Measurements]:
    """What each request would measure by itself, with everything that they share measured once."""
    alike: dict[tuple[str | bool | None, ...], dict[str, Request]] = {}
    for name, request in requests.items():
        config = request.config
        how = config.noise, config.spectrum, config.tail, request.method.needs_fisher, str(request.method.otherwise)
        alike.setdefault(how, {})[name] = request
    measurements: dict[str, Measurements] = {}
    for members in alike.values():
        several = list(members.values())
        together = replace(
            next((request for request in several if request.joint), several[0]),
            choices=tuple(sorted({choice for request in several for choice in request.choices})),
            offered=frozenset().union(*(request.offered for request in several)),
        )
        needs = {need for request in several for need in request.method.needs}
        of_all = measure_for_plan(checkpoint, together, inputs, resources, needs, check_budget, settle=False)
        measurements |= {name: of_all.of(request) for name, request in members.items()}
    return measurements
