"""The commands that make a plan again, from what the plan records."""

from __future__ import annotations

import shlex
from typing import Any

from alphaq.config import PlanConfig
from alphaq.errors import PlanError
from alphaq.records import Plan, first_fault
from alphaq.sensitivity.methods import METHODS

_DEFAULTS: dict[str, Any] = {
    "engine": "native",
    "method": "auto",
    "spectrum": "farms",
    "tail": "hill",
    "seed": 0,
}
_PLAIN = (
    *("engine", "method", "noise", "choices", "group_size", "attention_bits", "shared_bits", "embedding_bits"),
    *("head_bits", "spectrum", "tail", "calibration"),
)
_FLAGS = ("symmetric", "per_layer", "unweighted")
_RULES = (("pins", "pin"), ("min_bits", "min-bits"), ("max_bits", "max-bits"))


def reproduce(plan: Plan, stats: str | None = None) -> list[tuple[str, str]]:
    """Pairs of what a step does and its command line, in order; empty for a plan that records no budget.

    Names of files that the plan only knows by their name (a text, an importance matrix) are repeated as they are.
    Raises PlanError if the settings are none.
    """
    if "budget" not in plan.config:
        return []
    try:
        settings = PlanConfig.model_validate(plan.config)
    except ValueError as error:
        raise PlanError(
            f"The plan's config is not one of `alphaq plan`: {first_fault(error)}. Make it again."
        ) from None
    method = METHODS.get(settings.method)
    preset = {} if method is None else method.preset
    given = settings.model_dump(mode="json")
    config = {key: value for key, value in given.items() if key not in preset or value != preset[key]}
    budget = given["budget"]
    # Where the numbers of a plan came from no checkpoint, they came from a file.
    source = [plan.source.name] if plan.source else ["--stats", stats or "stats.csv"]
    words = ["alphaq", "plan", *source]
    for key, option in (("bits", "--bits"), ("bpw", "--bpw"), ("size_bytes", "--size")):
        if budget.get(key) is not None:
            words += [option, f"{budget[key]}"]
    for key in _PLAIN:
        value = config.get(key)
        if value is not None and value != _DEFAULTS.get(key) and not (key == "noise" and value == _usual_noise(plan)):
            words += [f"--{key.replace('_', '-')}", f"{value}"]
    if config.get("method") in ("alphaq", "paper") and config.get("gamma") not in (None, "auto"):
        words += ["--gamma", repr(config["gamma"])]
    if config.get("method") == "random":
        words += ["--seed", f"{config.get('seed', 0)}"]
    if config.get("min_sqnr_db") is not None:
        words += ["--min-sqnr", f"{config['min_sqnr_db']}dB"]
    if config.get("imatrix"):
        words += ["--imatrix", config["imatrix"].rpartition(" ")[0]]
    words += [f"--{key.replace('_', '-')}" for key in _FLAGS if config.get(key)]
    for key, option in _RULES:
        for rule in config.get(key) or ():
            words += [f"--{option}", f"{rule['pattern']}={rule['value']}"]
    steps = [("Plan", shlex.join([*words, "-o", "plan.json"]))]
    if plan.source is not None:
        model = shlex.quote(plan.source.name)
        steps += [
            ("Quantize", f"alphaq quantize {model} --plan plan.json -o OUT"),
            ("Check what was written", f"alphaq verify OUT --source {model}"),
            ("This report", f"alphaq report OUT --model {model} -o report.html"),
        ]
    else:
        steps.append(("This report", f"alphaq report plan.json --stats {stats or 'stats.csv'} -o report.html"))
    return steps


def _usual_noise(plan: Plan) -> str:
    return "measured" if plan.source is not None else "analytic"
