"""Measure matrices one at a time, and keep the result as a CSV that other tools can read."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from alphaq.errors import QuantizationError, SpectrumError, StatsError
from alphaq.nouns.matrix import MatrixRef, Role, Shape
from alphaq.nouns.spectrum import Spectrum
from alphaq.simd.sums import slices, sums
from alphaq.simd.vectors import flat
from alphaq.spectra.eigenvalues import largest_eigenvalues, largest_of_blocks
from alphaq.spectra.farms import corners
from alphaq.spectra.tail import tail_count, tail_exponent

COLUMNS = (
    "name",
    "layer",
    "expert",
    "projection",
    "role",
    "rows",
    "columns",
    "dtype",
    "alpha",
    "variance",
    "mean_square",
    "largest_eigenvalue",
    "eigenvalue_count",
    "tail_count",
    "reason",
)


LARGEST = 1e77  # the square of a float32
PANEL_VALUES = 1 << 23  # a larger matrix is read in pieces of about this many weights


def spectrum(weight: torch.Tensor, name: str) -> Spectrum:
    """Measure a [rows, columns] matrix. `name` seeds the block sampling.

    Raises QuantizationError if the matrix holds NaN or infinity.
    """
    mean, mean_square = moments(weight, name)
    return describe(mean, mean_square, *largest_eigenvalues(weight, name, mean_square))


def streamed_spectrum(read: Callable[[slice], torch.Tensor], shape: Shape, name: str) -> Spectrum:
    """`spectrum` of a matrix too large to hold: `read` returns some of its rows, each is asked for once."""
    rows, columns = shape
    cut = corners(rows, columns, name)
    if cut is None:  # a few columns, and very many rows
        return spectrum(read(slice(0, rows)), name)
    starts, size = cut
    parts: list[tuple[float, float]] = []
    tiles: torch.Tensor | None = None  # made once: small pieces between large ones would keep the heap from shrinking
    for part in slices(rows, max(1, PANEL_VALUES // (columns * size)) * size):
        panel = read(part)
        parts.append(sums(panel))
        if tiles is None:
            tiles = torch.empty(len(starts), size, size, dtype=panel.dtype)
        for number in np.flatnonzero((starts >= part.start * columns) & (starts < part.stop * columns)).tolist():
            row, column = divmod(int(starts[number]), columns)
            tiles[number] = panel[row - part.start :, column:][:size, :size]
    total, squares = (math.fsum(column) for column in zip(*parts, strict=True))
    mean, mean_square = _moments(total, squares, rows * columns, name)
    assert tiles is not None  # there are rows
    places = np.arange(len(starts)) * size**2
    return describe(mean, mean_square, *largest_of_blocks(flat(tiles), size, places, size, mean_square))


def moments(weight: torch.Tensor, name: str) -> tuple[float, float]:
    """Mean and mean square of a matrix. Raises QuantizationError if it holds NaN or infinity."""
    return _moments(*sums(weight), weight.numel(), name)


def _moments(total: float, squares: float, count: int, name: str) -> tuple[float, float]:
    if not math.isfinite(squares):
        raise QuantizationError(f"{name} holds NaN or infinite weights. The checkpoint is damaged.")
    return total / count, squares / count


def describe(mean: float, mean_square: float, largest: torch.Tensor, count: int) -> Spectrum:
    """The record of what was measured: moments, and the tail of `count` eigenvalues, ascending."""
    alpha, reason = None, ""
    try:
        alpha = tail_exponent(largest, count)
    except SpectrumError as error:
        reason = str(error)
    return Spectrum(
        alpha=alpha,
        tail_count=tail_count(count),
        eigenvalue_count=count,
        variance=max(0.0, mean_square - mean * mean),
        mean_square=mean_square,
        largest_eigenvalue=float(largest[-1]),
        reason=reason,
    )


def write_stats(path: Path, rows: Iterable[tuple[MatrixRef, Spectrum]]) -> None:
    """Write the CSV of `COLUMNS`; numbers keep every digit, an undefined α is empty with its reason."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for matrix, spectrum in rows:
            cells = {
                "name": matrix.name,
                "layer": matrix.layer,
                "expert": matrix.expert,
                "projection": matrix.projection,
                "role": matrix.role.value,
                "rows": matrix.shape[0],
                "columns": matrix.shape[1],
                "dtype": matrix.dtype,
                **asdict(spectrum),
            }
            writer.writerow(["" if cells[column] is None else cells[column] for column in COLUMNS])


@dataclass(frozen=True)
class Stats:
    """A stats file: spectra by name, parameter counts where shapes are given, and rows left out with the reason."""

    spectra: dict[str, Spectrum]
    parameters: dict[str, int]
    left_out: dict[str, str]


def read_stats(path: Path) -> Stats:
    """Read a stats CSV: ours, or anybody's with columns `name, alpha, variance`.

    Rows without α or variance are left out, and so are rows whose `role` is given and is not expert.
    Raises StatsError naming the line.
    """
    if not path.is_file():
        raise StatsError(f"No stats file {path}. Make one with `alphaq analyze MODEL -o {path.name}`.")
    stats = Stats({}, {}, {})
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = {"name", "alpha", "variance"} - set(reader.fieldnames or ())
            if missing:
                raise StatsError(
                    f"{path} lacks the column(s) {', '.join(sorted(missing))}. Add them to its first line."
                )
            for row in reader:
                _read_row(row, f"{path}, line {reader.line_num}", stats)
    except OSError as error:
        raise StatsError(f"{path} cannot be read: {error.strerror}. Check its permissions and the disk.") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise StatsError(f"{path} is not a CSV file ({error}). Write it again.") from None
    if not stats.spectra:
        raise StatsError(f"{path} holds no matrix with an alpha and a variance. Check its columns.")
    return stats


def _read_row(row: dict[str, str], where: str, stats: Stats) -> None:
    name = row["name"]
    if not name or name in stats.spectra or name in stats.left_out:
        raise StatsError(f"{where}: the name {name!r} is empty or appears twice. Remove the row.")

    def number(column: str) -> float | None:
        return _number(row.get(column), column, where)

    alpha, variance, mean_square, largest = map(number, ("alpha", "variance", "mean_square", "largest_eigenvalue"))
    if row.get("role") not in (None, "", Role.EXPERT.value):
        stats.left_out[name] = f"role {row['role']}, not an expert"
        return
    if variance is None or (alpha is None and not row.get("reason")):
        absent = [key for key, value in (("alpha", alpha), ("variance", variance)) if value is None]
        stats.left_out[name] = f"no {' and no '.join(absent)}"
        return
    if (alpha is not None and alpha <= 0) or variance < 0:
        raise StatsError(f"{where}: alpha must be positive and variance not negative. Correct {name!r}.")
    stats.spectra[name] = Spectrum(
        alpha=alpha,
        tail_count=int(number("tail_count") or 0),
        eigenvalue_count=int(number("eigenvalue_count") or 0),
        variance=variance,
        mean_square=variance if mean_square is None else mean_square,
        largest_eigenvalue=largest or 0.0,
        reason=row.get("reason") or "",
    )
    rows, columns = number("rows"), number("columns")
    if rows is not None and columns is not None:
        if not all(side.is_integer() and 0 < side < 2**31 for side in (rows, columns)):
            raise StatsError(f"{where}: rows and columns must be positive whole numbers. Correct {name!r}.")
        stats.parameters[name] = int(rows) * int(columns)


def _number(text: str | None, column: str, where: str) -> float | None:
    if not text or text.lower() == "nan":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.inf
    if not math.isfinite(value):
        raise StatsError(f"{where}: {column} {text!r} is not a finite number. Correct the row.")
    if abs(value) > LARGEST:
        raise StatsError(f"{where}: {column} {text!r} cannot come from float32 weights. Correct the row.")
    return value
