"""`--ear`: the smallest plan that keeps an expected acceptance rate, as `plan` and `quantize` search it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

from alphaq.cli.inputs import Inputs
from alphaq.cli.means import Means
from alphaq.cli.options import Asked, Shown
from alphaq.cli.planning import measurements, note_plan
from alphaq.errors import BudgetError
from alphaq.nouns.option import Option
from alphaq.nouns.plan import Plan
from alphaq.nouns.scoring import Scoring
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.nouns.target import SEARCH, Target
from alphaq.terminal import note, tell

if TYPE_CHECKING:
    from alphaq.checkpoint.reader import Checkpoint
    from alphaq.measuring.resources import Resources
    from alphaq.trials.search import Curve, Point
    from alphaq.writing.rounding import Rounding

ANY_BUDGET = Budget(bpw=32.0)  # stands for the one that a search will find


class Wanted(Target):
    """A target, and the file that is to have every budget that was tried."""

    curve: Annotated[Path | None, Option("JSON file for every budget that was tried.", SEARCH)] = None


WantedOptions: TypeAlias = Annotated[Asked[Wanted], Shown(defaults={"ear": None})]
ScoringOptions: TypeAlias = Annotated[Asked[Scoring], Shown(without=("bos", "device"), panel=SEARCH)]


@dataclass(frozen=True)
class Search:
    """A search that was asked for."""

    wanted: Wanted
    scoring: Scoring

    @classmethod
    def of(
        cls, wanted: Asked[Wanted], scoring: Asked[Scoring], asked: Asked[PlanConfig], means: Means
    ) -> Search | None:
        """None without --ear. Raises BudgetError for a second budget, a missing text, and options without --ear."""
        if wanted.values["ear"] is None:
            if stray := sorted((*wanted.typed.values(), *scoring.typed.values())):
                raise BudgetError(f"{', '.join(stray)} is for a search. Add --ear 0.99, or drop it.")
            return None
        from alphaq.evaluation.room import check_stream

        _require_sense(asked)
        if not scoring.values["texts"]:
            raise BudgetError(
                "--ear is measured on texts. Give some that are like what the model is for, with --text FILE."
            )
        built = scoring.build(bos=asked.values["bos"], device=means.device)
        check_stream(built)
        return cls(wanted.build(), built)


def _require_sense(asked: Asked[PlanConfig]) -> None:
    """BudgetError for settings of a plan that leave nothing to search, or what is not searched."""
    from alphaq.engines.profiles import profile
    from alphaq.formats.versions import CODECS
    from alphaq.nouns.option import settings_of
    from alphaq.trials.search import require_searchable

    for name, setting in settings_of(Budget).items():
        if asked.values[name] is not None:
            raise BudgetError(f"--ear searches the budget that {setting.flag} states. Give one of them.")
    if asked.values["share"] is not None:
        raise BudgetError("--ear runs the model, all of it, and --share goes by few rows. Drop one or the other.")
    require_searchable(profile(asked.values["engine"]))
    if asked.values["codec"] not in (None, CODECS[0]):
        raise BudgetError(
            "--ear searches plans of fixed-length files. Drop --codec, and code what comes of it with `alphaq recode`."
        )
    if asked.values["unweighted"]:
        raise BudgetError("--unweighted counts matrices, and --ear searches bytes. Drop one or the other.")


def search_plan(
    checkpoint: Checkpoint,
    config: PlanConfig,
    inputs: Inputs,
    search: Search,
    resources: Resources,
    rounding: Rounding | None = None,
    scratch: Path | None = None,
) -> Plan:
    """The smallest plan that reaches the target; says on stderr what every budget gave. scratch: folder of trials."""
    from alphaq.trials import search as searching
    from alphaq.trials.trial import settled
    from alphaq.writing.planned import check_source

    check_source(checkpoint, config.engine)
    if config.drop:
        raise BudgetError("--drop weighs experts under a budget, and --ear searches for one. Drop one of them.")
    if checkpoint.store is not None:
        raise BudgetError(
            f"--ear runs the model, and {checkpoint.store.url} is not on this machine. Download it first."
        )
    quantizer = None if rounding is None else rounding.by_inputs
    request, measured = measurements(checkpoint, config, inputs, resources, quantizer, settle=False)
    if resources.cache is not None:
        resources.cache.close()  # others may measure while this one evaluates
    bits = searching.widest_bits(checkpoint, request, measured, search.wanted)
    scoring, why = settled(search.scoring, checkpoint, bits)
    if why:
        note(why)
    trying = searching.Trying(scoring, rounding, search.wanted.curve, scratch, _tell_point)
    plan, curve = searching.search(checkpoint, request, measured, search.wanted, trying, resources)
    _tell_curve(curve, search.wanted)
    note_plan(plan)
    return plan


def _tell_point(point: Point) -> None:
    low = "" if point.reached else ", too low"
    tell(f"{point.budget_bpw:g} bits per weight, {point.size_bytes:,} bytes: EAR {point.ear}{low}")


def _tell_curve(curve: Curve, target: Target) -> None:
    chosen, failed = curve.chosen, curve.failed
    assert chosen is not None  # search has raised otherwise
    below = "no smaller budget is feasible" if failed is None else f"the next smaller step has {failed.ear}"
    verdict = {"yes": "lies above", "undecided": "contains", "no": "lies below"}[chosen.ear.verdict(target.ear)]
    widths = f"--attention-bits {chosen.attention_bits} --shared-bits {chosen.shared_bits}"
    tell(
        f"smallest: --bpw {chosen.budget_bpw:g} {widths}, EAR {chosen.ear}, whose interval {verdict} {target.ear:g}; "
        f"{below}"
    )
