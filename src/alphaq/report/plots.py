"""Figures for papers and slides, drawn by matplotlib (extra `plot`): what the AlphaQ paper shows, for one's own model.

Each function returns a figure; `save` writes it as PNG, SVG or PDF by the name's ending.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alphaq.errors import AlphaQError, MissingExtraError
from alphaq.measuring.density import Density
from alphaq.registry import unknown
from alphaq.report.curve import Curve
from alphaq.report.places import Place
from alphaq.report.runs import ComparedRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":", "-.")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#8a7d00", "#cc79a7", "#56b4e9", "#e69f00", "#4a525b")
LABEL_SHARE = 0.1  # of the width of a curve's figure, which a machine's label takes
METRICS = {"kl": "KL divergence (nats per token)", "perplexity": "perplexity"}
_ORDER = ("gate", "up", "down")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
    "svg.hashsalt": "alphaq",  # the same bytes every time
}


def require_matplotlib() -> None:
    """Raise MissingExtraError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("plot", "Plots need matplotlib") from None


def check_format(path: Path) -> str:
    """The format that the name asks for. Raises AlphaQError."""
    ending = path.suffix.removeprefix(".").lower()
    if ending not in FORMATS:
        raise AlphaQError(f"{unknown('ending of the figure', ending, FORMATS)} Write for example -o figure.pdf.")
    return ending


def save(figure: Figure, path: Path, kind: str, dpi: int) -> None:
    """Write the figure without a date, so that equal figures give equal bytes."""
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    with _style():
        figure.savefig(path, format=kind, dpi=dpi, metadata=metadata)


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **options)
    return figure, list(axes[0])


def spectrum_figure(densities: Sequence[tuple[str, Density]]) -> Figure:
    """Eigenvalue densities with their fitted tails, a panel for each matrix (the paper's figure 3)."""
    with _style():
        figure, panels = _figure(3.3 * len(densities), 2.9, len(densities), sharey=True)
        for number, (axes, (name, density)) in enumerate(zip(panels, densities, strict=True)):
            edges = 10 ** np.linspace(density.low, density.high, len(density.counts) + 1)
            heights = density.counts / density.count / np.diff(edges)
            seen = heights > 0
            centres = np.sqrt(edges[:-1] * edges[1:])
            axes.loglog(centres[seen], heights[seen], "o", ms=3, color=COLOURS[0], label="eigenvalues")
            if density.alpha is not None:
                tail = np.geomspace(density.start, edges[-1], 50)
                label = f"power law, α = {density.alpha:.2f}"
                axes.loglog(tail, density.fitted(tail), color=COLOURS[1], lw=2, label=label)
                axes.axvline(density.start, color="0.6", lw=0.8, ls=":")
            axes.set(xlabel="eigenvalue λ", title=_short(name))
            if number == 0:
                axes.set_ylabel("density")
            axes.legend(loc="lower left", fontsize=8)
    return figure


def _short(name: str) -> str:
    return name.removesuffix(".weight").removeprefix("model.")


def _grids(values: Mapping[str, float], places: Mapping[str, Place]) -> dict[str, tuple[np.ndarray, list[int]]]:
    """By projection a grid [layers, experts], NaN where there is nothing, and the layers' numbers."""
    cells: dict[str, dict[tuple[int, int], float]] = {}
    for name, value in values.items():
        place = places[name]
        if place.layer is not None and place.expert is not None:
            cells.setdefault(place.projection, {})[place.layer, place.expert] = value
    if not cells:
        raise AlphaQError("No matrix has a layer and an expert, so there is no map to draw. Is the model dense?")
    grids = {}
    for title in sorted(cells, key=lambda one: (_ORDER.index(one) if one in _ORDER else len(_ORDER), one)):
        layers = sorted({layer for layer, _ in cells[title]})
        row_of = {layer: row for row, layer in enumerate(layers)}
        experts = sorted({expert for _, expert in cells[title]})
        column_of = {expert: column for column, expert in enumerate(experts)}
        grid = np.full((len(layers), len(experts)), np.nan)
        for (layer, expert), value in cells[title].items():
            grid[row_of[layer], column_of[expert]] = value
        grids[title] = grid, layers
    return grids


def _map(axes: Any, grid: np.ndarray, layers: Sequence[int], title: str, **colours: Any) -> Any:
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", **colours)
    every = math.ceil(len(layers) / 12)
    axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    axes.set(title=title, xlabel="expert")
    axes.spines[:].set_visible(False)
    return image


def alpha_figure(alphas: Mapping[str, float], places: Mapping[str, Place]) -> Figure:
    """α by layer and expert, a map for each projection, and its spread by layer (the paper's figure 4)."""
    grids = _grids(alphas, places)
    every = [value for grid, _ in grids.values() for value in grid[~np.isnan(grid)]]
    limits = {"vmin": min(every), "vmax": max(every), "cmap": "cividis_r"}
    with _style():
        figure, panels = _figure(2.4 * len(grids) + 3.2, 3.0, len(grids) + 1)
        for axes, (title, (grid, layers)) in zip(panels, grids.items(), strict=False):
            image = _map(axes, grid, layers, title, **limits)
        panels[0].set_ylabel("layer")
        figure.colorbar(image, ax=panels[: len(grids)], label="α (small: heavy tail)", shrink=0.9)
        for number, (title, (grid, layers)) in enumerate(grids.items()):
            medians = np.nanmedian(grid, axis=1)
            low, high = np.nanquantile(grid, [0.25, 0.75], axis=1)
            look = {"color": COLOURS[number % len(COLOURS)]}
            panels[-1].plot(layers, medians, LINES[number % 4], marker=MARKERS[number % 8], ms=4, label=title, **look)
            panels[-1].fill_between(layers, low, high, alpha=0.15, lw=0, **look)
        panels[-1].set(xlabel="layer", ylabel="α", title="median, quartiles")
        panels[-1].legend(fontsize=8)
    return figure


def bits_figure(bits: Mapping[str, float], places: Mapping[str, Place]) -> Figure:
    """Chosen bits by layer and expert, a map for each projection (the paper's figure 11)."""
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm

    grids = _grids({name: float(value) for name, value in bits.items()}, places)
    used = sorted(set(bits.values()))
    whole = list(range(math.floor(used[0]), math.ceil(min(used[-1], 8)) + 1)) + ([16] if used[-1] == 16 else [])
    parts = 4 if any(bits % 1 for bits in used) else 1  # fractions are quarters
    steps = [step + part / parts for step in whole for part in range(parts)]
    with _style():
        norm = BoundaryNorm([*(step - 0.5 / parts for step in steps), steps[-1] + 0.5 / parts], 256)
        figure, panels = _figure(2.6 * len(grids) + 0.8, 3.0, len(grids))
        for axes, (title, (grid, layers)) in zip(panels, grids.items(), strict=True):
            image = _map(axes, grid, layers, title, cmap=colormaps["viridis"], norm=norm)
            if grid.shape[1] <= 20 and grid.shape[0] <= 20:
                for row, column in np.argwhere(~np.isnan(grid)):
                    position = float(norm(grid[row, column])) / 256
                    ink = "black" if position > 0.6 else "white"
                    axes.text(column, row, f"{grid[row, column]:g}", ha="center", va="center", size=6, color=ink)
        panels[0].set_ylabel("layer")
        bar = figure.colorbar(image, ax=panels, label="bits", ticks=whole, shrink=0.9)
        bar.minorticks_off()
    return figure


def _metric(row: ComparedRow, metric: str) -> float | None:
    return row.kl if metric == "kl" else row.mean_perplexity


def methods_figure(runs: Sequence[tuple[str, Sequence[ComparedRow]]], metric: str = "kl") -> Figure:
    """Perplexity or KL against stored bits for each method (the paper's figure 8), a panel for each comparison."""
    with _style():
        figure, panels = _figure(3.9 * len(runs) + 1.2, 3.2, len(runs))
        for axes, (name, rows) in zip(panels, runs, strict=True):
            series = _series(rows, metric, lambda row: row.bits_per_weight)
            if not series:
                raise AlphaQError(f"{name} holds no {METRICS[metric]} of a method. Run `alphaq compare` to its end.")
            for number, (label, points) in enumerate(series.items()):
                look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[(number + number // 8) % 8]}
                line = LINES[(number + number // 8) % 4]  # no two of 32 look alike, in grey either
                axes.plot(*zip(*points, strict=True), line, ms=4, label=label, **look)
            _reference(axes, rows, metric)
            axes.set(xlabel="stored bits per weight", title=name if len(runs) > 1 else "")
            values = [value for points in series.values() for _, value in points]
            if min(values) > 0 and max(values) / min(values) > 3:
                axes.set_yscale("log")
        panels[0].set_ylabel(METRICS[metric])
        panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    return figure


def gamma_figure(runs: Sequence[tuple[str, Sequence[ComparedRow]]], metric: str = "kl") -> Figure:
    """Perplexity or KL against γ of method alphaq, a line for each budget (the paper's figure 12)."""
    with _style():
        figure, panels = _figure(3.5 * len(runs) + 0.6, 3.0, len(runs))
        for axes, (name, rows) in zip(panels, runs, strict=True):
            lines: dict[float, list[tuple[float, float]]] = {}
            for row in rows:
                gamma, value = gamma_of(row.method), _metric(row, metric)
                if gamma is not None and value is not None:
                    lines.setdefault(row.bits, []).append((gamma, value))
            if not any(len(points) > 1 for points in lines.values()):
                raise AlphaQError(
                    f"{name} has no two γ of one budget. Run `alphaq compare MODEL --text FILE -o FOLDER --methods "
                    "alphaq:gamma=0,alphaq:gamma=1,alphaq:gamma=2`."
                )
            for number, (bits, points) in enumerate(sorted(lines.items())):
                look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
                at, values = zip(*sorted(points), strict=True)
                axes.plot(at, values, LINES[number % 4], ms=4, label=f"{bits:g} bits", **look)
                best = int(np.argmin(values))
                axes.plot(at[best], values[best], "o", ms=9, mfc="none", mec=look["color"])
            everything = [value for points in lines.values() for _, value in points]
            if min(everything) > 0 and max(everything) / min(everything) > 3:
                axes.set_yscale("log")
            axes.set(xlabel="γ (circle: least)", title=name if len(runs) > 1 else "")
            axes.legend(fontsize=8)
        panels[0].set_ylabel(METRICS[metric])
    return figure


def gamma_of(method: str) -> float | None:
    """γ in a method's name as `compare` writes it, `alphaq:gamma=2`; None for others, also with further settings."""
    name, separator, text = method.partition(":gamma=")
    if name != "alphaq" or not separator:
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _series(rows: Sequence[ComparedRow], metric: str, across: Any) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        at, value = across(row), _metric(row, metric)
        if row.method != "reference" and at is not None and value is not None:
            series.setdefault(row.label, []).append((at, value))
    return {label: sorted(points) for label, points in series.items()}


def _reference(axes: Any, rows: Sequence[ComparedRow], metric: str) -> None:
    value = next((_metric(row, metric) for row in rows if row.method == "reference"), None)
    if value:  # the reference's KL to itself is 0, which no log scale has
        axes.axhline(value, color="0.5", lw=0.8, ls="--", label="unquantized")


def curve_figure(curve: Curve) -> Figure:
    """Size of the weight files against what is lost, with the machines that leave room for a point."""
    with _style():
        figure, (axes,) = _figure(5.2, 3.4)
        unit, name = (2**30, "GiB") if curve.points[-1].size_bytes >= 2**30 else (2**20, "MiB")
        sizes = [one.size_bytes / unit for one in curve.points]
        axes.plot(sizes, [one.lost for one in curve.points], "-", marker="o" if len(sizes) < 40 else "", markersize=3.5)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"weight files ({name})")
        axes.set_ylabel(curve.unit)
        rows = _label_rows(curve)
        axes.set_title(curve.model, loc="left", pad=6 + 10 * len(set(rows)))
        ticks = _ticks(sizes[0], sizes[-1])
        axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.minorticks_off()
        for mark, row in zip(curve.drawn_marks, rows, strict=True):
            axes.axvline(mark.weights_bytes / unit, color="#8a8f94", linewidth=0.8, linestyle=":")
            axes.annotate(
                f"{mark.gib:g} GB", (mark.weights_bytes / unit, 1.0), (0, 2 + 9 * row),
                xycoords=("data", "axes fraction"), textcoords="offset points",
                ha="center", va="bottom", fontsize=7, color="#4a525b",
            )  # fmt: skip
    return figure


def _label_rows(curve: Curve) -> list[int]:
    """The row, 0 or 1, in which each mark's label stands so that none covers its neighbour."""
    span = math.log(curve.points[-1].size_bytes / curve.points[0].size_bytes) or 1.0
    rows: list[int] = []
    last = -math.inf
    for mark in curve.drawn_marks:
        near = math.log(mark.weights_bytes) - last < LABEL_SHARE * span
        rows.append(1 - rows[-1] if near else 0)
        last = math.log(mark.weights_bytes)
    return rows


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis, or its ends and what is between."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    several = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high < 20 * low else (1.0, 2.0, 5.0)
    ticks = [part * 10.0**power for power in decades for part in several if low <= part * 10.0**power <= high]
    return ticks if len(ticks) > 2 else np.geomspace(low, high, 4).tolist()
