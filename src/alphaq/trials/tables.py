"""What `alphaq compare` and `alphaq demo` print."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from alphaq.report.tables import begun, human_bytes, plain_table
from alphaq.trials.demo import DemoRow
from alphaq.trials.results import REFERENCE, Row


def comparison_table(rows: Sequence[Row]) -> Table:
    """Methods side by side, budget by budget; the least perplexity of each budget in bold."""
    texts = list(next((row.perplexity for row in rows if row.perplexity), {}))
    several = len({row.quantizer for row in rows} - {""}) > 1
    table = plain_table(
        "Methods at the same bytes" + begun(next((row.windows_begin_with for row in rows), "")),
        *("method", *(["quantizer"] if several else []), "bits", "bytes", *texts, "mean", "against uniform (95 %)"),
        *("KL", "EAR", "top-1", "plan", "quantize"),
    )
    best: dict[float, float] = {}
    for row in rows:
        if row.mean_perplexity:
            best[row.bits] = min(row.mean_perplexity, best.get(row.bits, row.mean_perplexity))
    last = None
    for row in rows:
        if last not in (None, row.bits):
            table.add_section()
        last = row.bits
        name = f"{row.method} (uniform taken)" if row.taken == "uniform" else row.method
        names = (name, *([row.quantizer] if several else []))
        figures = ["no plan", *("–" for _ in range(len(texts) + 7))] if row.error else _figures(row, texts)
        is_best = not row.error and row.mean_perplexity == best.get(row.bits) and row.method != REFERENCE
        table.add_row(*names, f"{row.bits:g}", *figures, style="bold" if is_best else "")
    return table


def _figures(row: Row, texts: Sequence[str]) -> list[str]:
    """Of a row that has some."""
    assert row.perplexity is not None and row.top1 is not None
    against = "–"
    if row.difference is not None:
        assert row.difference_low is not None and row.difference_high is not None
        against = f"{100 * row.difference:+.2f} % ({100 * row.difference_low:+.2f} … {100 * row.difference_high:+.2f})"
    return [
        f"{row.size_bytes:,}",
        *(f"{row.perplexity[text]:.3f}" for text in texts),
        f"{row.mean_perplexity:.3f}",
        against,
        f"{row.kl:.4f}",
        f"{row.ear:.4f}",
        f"{100 * row.top1:.1f} %",
        *("–" if seconds is None else f"{seconds:.1f} s" for seconds in (row.seconds_to_plan, row.seconds_to_quantize)),
    ]


def demo_table(rows: Sequence[DemoRow]) -> Table:
    """The runs of the demo beside one another."""
    names = list(rows[0].fidelity.texts)
    table = plain_table("Perplexity on held-out text", "model", "bits", "bpw", "size", *names, "mean", "KL")
    for row in rows:
        table.add_row(
            row.run.label,
            f"{row.average_bits:.2f}",
            f"{row.bits_per_weight:.2f}",
            human_bytes(row.size_bytes),
            *(f"{row.fidelity.texts[name].perplexity:.2f}" for name in names),
            f"{row.fidelity.geomean_perplexity:.2f}",
            f"{row.fidelity.mean_kl:.4f}",
            style="bold" if row.run.label.startswith("AlphaQ") else "",
        )
    return table
