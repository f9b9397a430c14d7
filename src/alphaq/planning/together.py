"""Several requests measured together, so that each gets what it would measure alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alphaq.checkpoint.reader import Checkpoint
from alphaq.planning.evidence import measure_for_plan
from alphaq.planning.measured import Measurements
from alphaq.planning.request import Request


def measure_for_plans(
    checkpoint: Checkpoint, requests: Mapping[str, Request], **settings: Any
) -> dict[str, Measurements]:
    """What each request would measure by itself, with everything that they share measured once.

    settings: those of `measure_for_plan`.
    """
    kinds: dict[tuple[str | None, ...], dict[str, Request]] = {}
    for name, request in requests.items():
        config = request.config
        kinds.setdefault((config.noise, config.spectrum, config.tail), {})[name] = request
    found: dict[str, Measurements] = {}
    for members in kinds.values():
        several = list(members.values())
        together = replace(
            next((request for request in several if request.joint), several[0]),
            choices=tuple(sorted({choice for request in several for choice in request.choices})),
            offered=frozenset().union(*(request.offered for request in several)),
        )
        needs = {need for request in several for need in request.method.needs}
        measured = measure_for_plan(checkpoint, together, needs=needs, **settings)
        found |= {name: measured.of(request) for name, request in members.items()}
    return found
