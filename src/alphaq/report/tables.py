"""Terminal tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from alphaq.formats.table import parse_choice
from alphaq.nouns.fidelity import Fidelity
from alphaq.nouns.plan import MOST_PREDICTABLE, Dropping, Plan, PlanCheck, Prediction, Refinement
from alphaq.nouns.rates import SECOND_NS
from alphaq.nouns.serving import Memory, Placement
from alphaq.nouns.skipping import SkipCurve

if TYPE_CHECKING:  # else a table would load torch
    from alphaq.checkpoint.summary import Summary
    from alphaq.engines.profile import Profile
    from alphaq.evaluation.certificate import Certificate, Estimate, Figures
    from alphaq.planning.outline import Outline
    from alphaq.sensitivity.base import Method


def human_bytes(count: float) -> str:
    """A size as people read it: 9.54 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def plain_table(title: str, *columns: str) -> Table:
    """A table with a bold title; the first column left, the others right."""
    table = Table(title=Text(title, style="bold"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right", no_wrap=True)
    return table


def inspect_table(summary: Summary) -> Table:
    """Roles of a checkpoint."""
    fewest, most = summary.fewest_experts_per_layer, summary.experts_per_layer
    counted = f"{most}" if fewest == most else f"{fewest} to {most}"
    experts = f" × {counted} experts" if most else ""
    title = (
        f"{summary.model}: {summary.architecture}, {summary.layers} layers{experts}, {summary.parameters:,} parameters"
    )
    table = plain_table(title, "role", "matrices", "parameters", "size")
    for role, counts in summary.roles.items():
        table.add_row(role, f"{counts.matrices:,}", f"{counts.parameters:,}", human_bytes(counts.bytes))
    table.add_section()
    matrices = sum(counts.matrices for counts in summary.roles.values())
    table.add_row("all", f"{matrices:,}", f"{summary.parameters:,}", human_bytes(summary.bytes))
    return table


def outline_table(outline: Outline) -> Table:
    """What is known of a plan before any weight is read."""
    table = plain_table(f"Plan for {outline.engine} ({outline.method}, {outline.budget}), from shapes alone", "", "")
    table.add_row("matrices to plan", f"{outline.matrices:,} with {outline.parameters:,} weights")
    table.add_row("planning reads", f"{human_bytes(outline.planned_bytes)} of {human_bytes(outline.source_bytes)}")
    table.add_row("weight files at least", f"{human_bytes(outline.least_bytes)} ({outline.least_bytes:,} bytes)")
    if outline.most_bytes is not None:
        table.add_row("weight files at most", f"{human_bytes(outline.most_bytes)} ({outline.most_bytes:,} bytes)")
    return table


def memory_words(memory: Memory) -> str:
    """What memory to run in is for."""
    serving, kept, card = memory.serving, memory.kept, memory.placement
    beside = "" if serving.vram_bytes is None else f" and {human_bytes(serving.vram_bytes)} of a card"
    placed = "" if card is None else _placed_words(card)
    at_once = f"{serving.parallel} × " if serving.parallel > 1 else ""
    return (
        f"memory {human_bytes(serving.memory_bytes)}{beside}: {human_bytes(kept.cache_bytes)} for {at_once}"
        f"{serving.context:,} tokens of cache ({serving.kv_type}), {human_bytes(kept.buffer_bytes)} to compute in, "
        f"{human_bytes(kept.engine_bytes)} of the engine's own; {human_bytes(memory.weights)} for weight files{placed}"
    )


def _placed_words(card: Placement) -> str:
    return (
        f"; {human_bytes(card.card_bytes)} on the card, {human_bytes(card.host_bytes)} in memory, with the experts of "
        f"the first {card.host_layers} layers"
    )


def speed_words(plan: Plan) -> str:
    """What a token reads, and how fast that is where it is known how fast formats are read."""
    assert plan.read_bytes is not None  # the caller knows
    read, rates = human_bytes(plan.read_bytes), None if plan.config is None else plan.config.bandwidth
    if rates is None or plan.reads is None:  # an earlier version did not tell formats apart
        return f"{read} of weights"
    taken = max(1, rates.token_time_ns(plan.reads.by_choice, plan.reads.layers))
    return f"{read} of weights: {SECOND_NS / taken:.3g} tokens per second at {rates.among(plan.reads.by_choice).words}"


def plan_table(plan: Plan) -> Table:
    """A plan in all three units, and its histogram."""
    from alphaq.engines.profiles import profile

    engine = profile(plan.engine)
    table = plain_table(f"Plan for {plan.engine}: {len(plan.assignment):,} matrices", "", "")
    table.add_row("average bits per weight (codes)", f"{plan.average_bits:.4f}")
    if plan.bits_per_weight is not None:
        table.add_row("stored bits per weight", f"{plan.bits_per_weight:.4f}")
    if plan.size_bytes is not None:
        table.add_row("weight files", f"{human_bytes(plan.size_bytes)} ({plan.size_bytes:,} bytes)")
    if plan.memory is not None:
        table.add_row("made for", memory_words(plan.memory))
    if plan.config is not None and plan.config.share is not None:
        table.add_row("read of the matrices", f"rows of {100 * plan.config.share:.6g} % of their bytes")
    if plan.read_bytes is not None:
        table.add_row("a token reads", speed_words(plan))
    table.add_row("expected loss (objective)", f"{plan.objective:.6g}")
    if plan.prediction is not None:
        table.add_row("predicted KL, nats per token", predicted_words(plan.prediction))
    if plan.unpredicted is not None:
        table.add_row("predicted KL", f"none, losses are those of the signal: {plan.unpredicted}")
    if plan.config is not None and engine.importance is not None:
        table.add_row("importance matrix", plan.imatrix or "none: all columns count alike")
    if plan.lower_bound is not None:
        table.add_row("proven gap to the best plan", "0" if plan.gap < 1e-9 else f"{100 * plan.gap:.2g} %")
    if (against := plan.rate_distortion) is not None and against.times_bound is not None:
        steps = against.whole_widths
        rounding = against.times_bound / steps
        table.add_row(
            "loss against the Gaussian bound at these bytes",
            f"{against.times_bound:.2f} × ({rounding:.2f} × by rounding, {steps:.3f} × by steps between widths)",
        )
    if plan.sampling_error:
        table.add_row("standard error of the errors", f"at most {100 * plan.sampling_error:.2g} %")
    if plan.check is not None:
        table.add_row("beside uniform bits in these bytes", check_words(plan.check))
    if plan.dropped is not None:
        table.add_row("experts dropped", dropped_words(plan.dropped))
    if plan.refined is not None:
        table.add_row("refined", refined_words(plan.refined))
    if plan.budget_slack is not None:
        unused = f"{plan.budget_slack:,.0f}"
        table.add_row("left of the budget", unused if plan.source is None else f"{unused} {plan.cost_unit}")
    table.add_section()
    counts = Counter(plan.choices[name] for name in plan.assignment)
    for choice in sorted(counts, key=parse_choice):
        point = plan.rate_distortion.points.get(choice) if plan.rate_distortion else None
        beside = f"   error {point[1]:.4f} at {point[0]:.3f} bits, {point[2]:.2f} × 2^−2R" if point else ""
        table.add_row(f"matrices at {choice}", f"{counts[choice]:,}{beside}")
    if plan.kept:
        table.add_row("stay in 16 bits, of all parameters", kept_text(plan.kept, "\n"))
    if plan.unplanned:
        table.add_row("not planned (see unplanned)", f"{len(plan.unplanned):,}")
    if plan.neutral:
        table.add_row("α undefined (see neutral)", f"{len(plan.neutral):,}")
    return table


def predicted_words(prediction: Prediction) -> str:
    """The KL that a plan is expected to have, or that it is beyond what can be foretold."""
    if prediction.beyond:
        return f"above {MOST_PREDICTABLE:g}, where losses no longer add up: expect a damaged model"
    return f"{prediction.kl:.4g} ({prediction.low:.3g} to {prediction.high:.3g})"


def dropped_words(dropped: Dropping) -> str:
    """How many experts are gone, what they cost, and why."""
    proven = f"; no other numbers are better by more than {dropped.gap:.2g}, relative" if dropped.gap > 1e-6 else ""
    if not dropped.experts:
        alone = dropped.refused and len(dropped.totals) == 1 and dropped.lower_bound is None
        refused = ", as their losses are above the limit" if alone else ""
        return f"none{refused or ', as none paid for its bytes' if dropped.totals else ''}{proven}"
    layers = {len(experts) for experts in dropped.experts.values()}
    own = dropped.lower_bound is not None or len(layers) > 1
    counted = f"up to {max(layers)} in a" if own else f"{max(layers)} in each"
    kept = dropped.totals.get(0)
    instead = "as all do not fit" if kept is None else f"instead of {kept:.4g}"
    expected = "" if dropped.total is None else f"; expected loss {dropped.total:.4g} in all {instead}"
    return (
        f"{dropped.count} ({counted} layer), at {dropped.loss:.3g} (at most {dropped.bound:.3g}) nats{expected}{proven}"
    )


def check_words(check: PlanCheck) -> str:
    """What the plan and uniform bits were found to do, and which was taken."""
    what = "summed moves of the stream" if check.by == "moves" else f"KL on {check.tokens:,} tokens of its own writing"
    taken = "" if check.taken == "plan" else "; uniform taken"
    return f"{what}: {check.plan:.4g}, uniform {check.uniform:.4g}{taken}"


def refined_words(refined: Refinement) -> str:
    """What exchanging choices did to the measured KL."""
    what = f"KL on {refined.tokens:,} tokens of its own writing"
    if not refined.moved:
        return f"{what}: {refined.before:.4g}; nothing better was found"
    return f"{what}: {refined.before:.4g} → {refined.after:.4g}, {refined.moved:,} units changed"


def kept_text(kept: Mapping[str, float], between: str = ", ") -> str:
    """What stays in 16 bits and its share of all parameters."""
    return between.join(f"{name} {100 * share:.1f} %" for name, share in kept.items())


def begun(begins_with: str) -> str:
    """How a title says what each window begins with."""
    return f", each window after {begins_with}" if begins_with else ""


def fidelity_table(fidelity: Fidelity) -> Table:
    """One row per text."""
    table = plain_table(
        "Fidelity" + begun(fidelity.begins_with),
        *("text", "tokens", "perplexity", "95 % interval", "KL", "median KL", "99 % below", "top-1", "EAR"),
    )
    for name, text in fidelity.texts.items():
        low, high = text.perplexity_interval
        divergences = ["–" if value is None else f"{value:.4f}" for value in (text.kl, text.kl_median, text.kl_p99)]
        shares = ["–"] * 2 if text.ear is None else [f"{100 * (text.top1 or 0):.1f} %", f"{text.ear:.4f}"]
        against = [*divergences, *shares]
        table.add_row(name, f"{text.tokens:,}", f"{text.perplexity:.3f}", f"{low:.2f}–{high:.2f}", *against)
    table.add_section()
    kl = "–" if fidelity.mean_kl is None else f"{fidelity.mean_kl:.4f}"
    table.add_row("mean", "", f"{fidelity.geomean_perplexity:.3f}", "", kl, "", "", "", "")
    return table


def skip_table(curve: SkipCurve) -> Table:
    """One row for each threshold."""
    table = plain_table(
        f"Leaving out experts; KL over {curve.tokens:,} tokens against {curve.against}",
        *("--skip-experts", "left out", "KL", "top-1", "perplexity", "tokens/s", "CPU ms/token", "speed"),
    )
    for point in curve.points:
        table.add_row(
            f"{point.share:g}",
            f"{100 * point.left_out:.1f} %",
            f"{point.kl:.5f}",
            f"{100 * point.top1:.1f} %",
            f"{point.perplexity:.3f}",
            f"{point.tokens_per_s:,.1f}",
            f"{point.cpu_ms:,.2f}",
            f"{point.speedup:.2f} ×",
        )
    return table


def engines_table(engines: Iterable[Profile]) -> Table:
    """Engines and what each lets a plan choose."""
    table = plain_table("Engines that a plan can be made for", "engine", "one choice for each", "writes", "choices")
    table.columns[3].justify = "left"
    table.columns[3].no_wrap = False
    for engine in engines:
        table.add_row(engine.name, engine.unit, "plan only" if engine.export is None else "yes", engine.summary)
    return table


def methods_table(methods: Mapping[str, Method]) -> Table:
    """Allocators by name, and what each needs."""
    table = plain_table("Methods", "method", "needs", "goes by")
    table.columns[2].justify = "left"
    for name, method in methods.items():
        table.add_row(name, "text" if method.needs_text else "nothing", method.summary)
    return table


def certificate_tables(certificate: Certificate) -> list[Any]:
    """Figures by text with intervals, tasks, and the verdicts in words."""
    share = f"{100 * certificate.settings.confidence:g} %"
    table = plain_table(
        f"{certificate.model.name} against {certificate.reference.name}, with {share} intervals"
        + begun(certificate.settings.begins_with),
        *("text", "tokens", "EAR", "KL", "top-1", "perplexity", "of the reference", "ratio"),
    )
    for text in certificate.texts:
        table.add_row(text.name, f"{text.tokens:,}", *figure_cells(text))
    table.add_section()
    tokens = sum(text.tokens for text in certificate.texts)
    table.add_row("all texts", f"{tokens:,}", *figure_cells(certificate.overall), style="bold")
    tables: list[Any] = [table]
    if certificate.tasks is not None:
        tasks = plain_table(
            "Tasks", *("task", "metric", "documents", "model", "reference", f"difference ({share})", "lossless")
        )
        for one in certificate.tasks.results:
            interval = "no interval" if one.low is None else f"{one.low:+.4f} … {one.high:+.4f}"
            tasks.add_row(
                one.task,
                one.metric if one.filter == "none" else f"{one.metric} ({one.filter})",
                f"{one.documents:,}",
                f"{one.value:.4f}",
                f"{one.reference:.4f}",
                f"{one.difference:+.4f} ({interval}){'' if one.paired else ', not paired'}",
                one.lossless,
            )
        tables.append(tasks)
    return [*tables, "\n".join(verdict_lines(certificate))]


def figure_cells(figures: Figures) -> list[str]:
    """EAR, KL, top-1, perplexity, the reference's and the ratio, each with its interval."""

    def cell(estimate: Estimate, digits: int) -> str:
        return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f}–{estimate.high:.{digits}f})"

    names = {"ear": 4, "kl": 4, "top1": 4, "perplexity": 2, "reference_perplexity": 2, "perplexity_ratio": 4}
    return [cell(getattr(figures, name), digits) for name, digits in names.items()]


def verdict_lines(certificate: Certificate) -> list[str]:
    """What a certificate says, in a sentence for each verdict."""
    ear, threshold = certificate.overall.ear, certificate.threshold
    place = {"yes": "lies above", "undecided": "contains", "no": "lies below"}[certificate.distribution_lossless]
    lines = [
        f"EAR of at least {threshold:g}: {certificate.distribution_lossless}; the interval "
        f"{ear.low:.4f} … {ear.high:.4f} {place} it"
    ]
    if certificate.tasks is not None:
        meaning = {
            "yes": "no metric is worse beyond sampling error",
            "undecided": "a metric has no interval",
            "no": "a metric is worse beyond sampling error",
        }[certificate.tasks.lossless]
        lines.append(f"Task-lossless within sampling error: {certificate.tasks.lossless}; {meaning}")
    return lines
