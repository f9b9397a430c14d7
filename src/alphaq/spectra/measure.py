"""Measure matrices one at a time, and keep the result as a CSV that other tools can read."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import QuantizationError, SpectrumError, StatsError
from alphaq.records import MatrixRef, Spectrum
from alphaq.spectra.eigenvalues import pooled_eigenvalues
from alphaq.spectra.farms import blocks
from alphaq.spectra.tail import hill_exponent, tail_count

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


def spectrum(weight: torch.Tensor, name: str) -> Spectrum:
    """Measure a [rows, columns] matrix. `name` seeds the block sampling.

    Raises QuantizationError if the matrix holds NaN or infinity.
    """
    flat = weight.float().flatten()
    mean_square = float(flat.dot(flat)) / flat.numel()
    if not math.isfinite(mean_square):
        raise QuantizationError(f"{name} holds NaN or infinite weights. The checkpoint is damaged.")
    mean = float(flat.mean(dtype=torch.float64))
    eigenvalues = pooled_eigenvalues(blocks(weight, name))
    alpha, reason = None, ""
    try:
        alpha = hill_exponent(eigenvalues)
    except SpectrumError as error:
        reason = str(error)
    return Spectrum(
        alpha=alpha,
        tail_count=tail_count(eigenvalues.numel()),
        eigenvalue_count=eigenvalues.numel(),
        variance=max(0.0, mean_square - mean * mean),
        mean_square=mean_square,
        largest_eigenvalue=float(eigenvalues[-1]),
        reason=reason,
    )


def measure(checkpoint: Checkpoint, matrices: Iterable[MatrixRef]) -> Iterator[tuple[MatrixRef, Spectrum]]:
    """Spectra of many matrices, read one at a time."""
    for matrix in matrices:
        yield matrix, spectrum(checkpoint.read(matrix), matrix.name)


def write_stats(path: Path, rows: Iterable[tuple[MatrixRef, Spectrum]]) -> None:
    """Write the CSV of `COLUMNS`; numbers keep every digit, an undefined α is empty with its reason."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for matrix, found in rows:
            cells = {
                "name": matrix.name,
                "layer": matrix.layer,
                "expert": matrix.expert,
                "projection": matrix.projection,
                "role": matrix.role.value,
                "rows": matrix.shape[0],
                "columns": matrix.shape[1],
                "dtype": matrix.dtype,
                **vars(found),
            }
            writer.writerow(["" if cells[column] is None else cells[column] for column in COLUMNS])


def read_stats(path: Path) -> tuple[dict[str, Spectrum], dict[str, int], dict[str, str]]:
    """Read a stats CSV: ours, or anybody's with columns `name, alpha, variance`.

    Returns the spectra by name, parameter counts by name (only where `rows` and `columns` are given),
    and the rows that cannot be planned with the reason. Raises StatsError naming the line.
    """
    if not path.is_file():
        raise StatsError(f"No stats file {path}. Make one with `alphaq analyze MODEL -o {path.name}`.")
    spectra: dict[str, Spectrum] = {}
    parameters: dict[str, int] = {}
    unusable: dict[str, str] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = {"name", "alpha", "variance"} - set(reader.fieldnames or ())
        if missing:
            raise StatsError(f"{path} lacks the column(s) {', '.join(sorted(missing))}. Add them to its first line.")
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                name = row["name"]
                if not name or name in spectra or name in unusable:
                    raise StatsError(f"{where}: the name {name!r} is empty or appears twice. Remove the row.")
                alpha, variance = (_number(row[key], key, where) for key in ("alpha", "variance"))
                if variance is None or (alpha is None and not row.get("reason")):
                    absent = [key for key, value in (("alpha", alpha), ("variance", variance)) if value is None]
                    unusable[name] = f"no {' and no '.join(absent)} in {path.name}"
                    continue
                if (alpha is not None and alpha <= 0) or variance < 0:
                    raise StatsError(f"{where}: alpha must be positive and variance not negative. Correct {name!r}.")
                mean_square = _number(row.get("mean_square"), "mean_square", where)
                counts = [_number(row.get(key), key, where) for key in ("eigenvalue_count", "tail_count")]
                spectra[name] = Spectrum(
                    alpha=alpha,
                    tail_count=int(counts[1] or 0),
                    eigenvalue_count=int(counts[0] or 0),
                    variance=variance,
                    mean_square=variance if mean_square is None else mean_square,
                    largest_eigenvalue=_number(row.get("largest_eigenvalue"), "largest_eigenvalue", where) or 0.0,
                    reason=row.get("reason") or "",
                )
                rows, columns = (_number(row.get(key), key, where) for key in ("rows", "columns"))
                if rows and columns:
                    parameters[name] = int(rows) * int(columns)
        except (csv.Error, UnicodeDecodeError) as error:
            raise StatsError(f"{path} is not a CSV file ({error}). Write it again.") from None
    return spectra, parameters, unusable


def _number(text: str | None, column: str, where: str) -> float | None:
    if not text or text.lower() == "nan":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.inf
    if not math.isfinite(value):
        raise StatsError(f"{where}: {column} {text!r} is not a finite number. Correct the row.")
    return value
