"""The Fisher information of every matrix on the model's own writing: what a change of its weights costs, in nats.

For a small change ΔW of a matrix, the KL divergence per token is ½·E[(Σₜ gₜᵀ·ΔW·xₜ)²], with x its inputs and g the
gradients of the drawn tokens' log chances at its outputs, summed over a window of T tokens and divided by T. Tokens and
labels are the model's own, so nothing of a dataset enters. Of E[G²], G = Σₜ gₜ·xₜᵀ of a window, the sums over rows and
over columns are kept: errors of rounding are nearly independent of each other but not of place, and a product of both
says of a matrix of SmolLM2 what all of E[G²] says (docs/research/log.md).

An expert that few tokens reach is known poorly. How poorly is told by two halves of the windows: what they agree on is
kept, the rest goes to what all experts of the layer's projection have in common, times the routing prior.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from alphaq.calibration.backward import stream_scores
from alphaq.calibration.gradients import Seen
from alphaq.calibration.traffic import Expert, ExpertUse
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import StatsError
from alphaq.nouns.matrix import MatrixRef, Role

FISHER_VERSION = 4  # raise it whenever the same windows would give other numbers


@dataclass(frozen=True, eq=False)
class MatrixFisher:
    """Of one matrix [m, n].

    mean: E[G²] averaged over its weights, per token: twice the nats that one weight's squared change costs. rows,
    columns: float32 [m] and [n], how it spreads over them; both have mean 1. windows: float32, the mean as each window
    alone has it, over that of all.
    """

    mean: float
    rows: np.ndarray
    columns: np.ndarray
    windows: np.ndarray


@dataclass(frozen=True, eq=False)
class Fisher:
    """What one backward pass found, by the matrix' name.

    entropy: of the model's chances, in nats per token. tokens: ids that went through the model, by window. swaps: κ by
    layer, what tokens that change their expert cost (calibration/swaps.py).
    """

    matrices: Mapping[str, MatrixFisher] = field(default_factory=dict)
    entropy: float = 0.0
    tokens: tuple[tuple[int, ...], ...] = ()
    swaps: Mapping[int, float] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """What tells it from others."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """One line; numbers lose what float16 cannot hold, relative to a vector's mean."""
        data = {
            "version": FISHER_VERSION,
            "entropy": self.entropy,
            "tokens": self.tokens,
            "swaps": list(self.swaps.items()),
            "matrices": {
                name: [one.mean, *map(_packed, (one.rows, one.columns, one.windows))]
                for name, one in self.matrices.items()
            },
        }
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "fisher") -> Fisher:
        """The inverse of `to_json`. Raises StatsError naming `where` if the text is anything else."""
        try:
            data = json.loads(text)
            if data["version"] != FISHER_VERSION:
                raise ValueError(f"version {data['version']} is not {FISHER_VERSION}")
            return cls(
                {
                    name: MatrixFisher(float(mean), *map(_unpacked, vectors))
                    for name, (mean, *vectors) in data["matrices"].items()
                },
                float(data["entropy"]),
                tuple(tuple(map(int, window)) for window in data["tokens"]),
                {int(layer): float(cost) for layer, cost in data["swaps"]},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StatsError(f"{where} holds no Fisher information ({error!r}). Delete it and plan again.") from error


def _packed(vector: np.ndarray) -> str:
    return base64.b64encode(np.minimum(vector, 60_000.0).astype("<f2").tobytes()).decode("ascii")


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), "<f2").astype(np.float32)


def gather_fisher(checkpoint: Checkpoint, ids: Tensor, prior: Mapping[Expert, ExpertUse], context: int = 1) -> Fisher:
    """Run token ids [windows, length], whose first `context` are given, through the model and back.

    prior: how often a router uses its experts. Memory and errors as `stream_scores`; of each matrix two vectors.
    """
    layers: dict[int | None, list[MatrixRef]] = {}
    for matrix in checkpoint.planned:
        layers.setdefault(matrix.layer, []).append(matrix)
    windows, length = ids.shape
    tallies = _Tallies(windows, length, layers)
    found: dict[str, MatrixFisher] = {}
    predicted = windows * (length - context + 1)

    outside = _Tallies(windows, length, {})  # embedding and head come last and first, and may be one matrix

    def see(seen: Seen) -> None:
        if seen.matrix.layer is None:
            outside.add(seen)
            return
        if tallies.layer not in (None, seen.matrix.layer):
            found.update(tallies.close(prior, predicted))
        tallies.add(seen)

    drawn = stream_scores(checkpoint, ids, see, context)
    for one in (tallies, outside):
        found.update(one.close(prior, predicted))
    return Fisher(found, drawn.entropy, tuple(map(tuple, ids.tolist())), drawn.swaps)


@dataclass(eq=False)
class _Tally:
    """Sums over the windows of one matrix.

    energy: Σ G² by window. rows, columns: the same by row and by column, [2, m] and [2, n], of even and odd windows.
    """

    matrix: MatrixRef
    energy: np.ndarray
    rows: Tensor
    columns: Tensor
    tokens: int = 0


class _Tallies:
    """Of the matrices of one layer, or of what lies outside the layers."""

    def __init__(self, windows: int, length: int, planned: Mapping[int | None, Sequence[MatrixRef]]) -> None:
        self.windows, self.length, self.planned = windows, length, planned
        self.layer: int | None = None
        self._of: dict[str, _Tally] = {}

    def add(self, seen: Seen) -> None:
        """Take in what a matrix saw: some of its tokens, in order."""
        self.layer = seen.matrix.layer
        tally = self._tally(seen.matrix)
        tally.tokens += len(seen.positions)
        counts = torch.bincount(seen.positions // self.length, minlength=self.windows).tolist()
        parts = zip(seen.inputs.split(counts), seen.gradients.split(counts), strict=True)
        for window, (inputs, gradients) in enumerate(parts):
            if not len(inputs):
                continue
            if inputs.ndim == 2:
                rows, columns = tally.rows[window % 2], tally.columns[window % 2]
                tally.energy[window] += _add_products(gradients, inputs, rows, columns, seen.independent)
            else:  # an embedding, whose rows are the tokens
                numbers, which = inputs.unique(return_inverse=True)
                rows = torch.zeros(len(numbers))
                units = torch.nn.functional.one_hot(which).float()
                tally.energy[window] += _add_products(units, gradients, rows, tally.columns[window % 2], False)
                tally.rows[window % 2, numbers] += rows

    def _tally(self, matrix: MatrixRef) -> _Tally:
        if matrix.name not in self._of:
            rows, columns = matrix.shape
            none = np.zeros(self.windows), torch.zeros(2, rows), torch.zeros(2, columns)
            self._of[matrix.name] = _Tally(matrix, *none)
        return self._of[matrix.name]

    def close(self, prior: Mapping[Expert, ExpertUse], predicted: int) -> dict[str, MatrixFisher]:
        """What was found of the layer's matrices; the next layer begins."""
        for matrix in self.planned.get(self.layer, ()) if self._of else ():
            self._tally(matrix)  # no token may have reached it
        groups: dict[object, list[_Tally]] = {}
        for name, tally in self._of.items():
            routed = tally.matrix.role is Role.EXPERT and tally.matrix.expert is not None
            groups.setdefault(tally.matrix.projection if routed else name, []).append(tally)
        found: dict[str, MatrixFisher] = {}
        for members in groups.values():
            found.update(_of_group(members, prior, predicted))
        self._of, self.layer = {}, None
        return found


def _add_products(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor, independent: bool) -> float:
    """Σ G² of G = leftᵀ·right, [n, m] and [n, k], and what it adds to the sums by row [m] and column [k].

    By pairs of tokens, which is cheaper than G itself with its m·k entries. independent: as if each token had its
    own G.
    """
    if independent:
        of_left, of_right = left.square().sum(1), right.square().sum(1)
        rows += of_right @ left.square()
        columns += of_left @ right.square()
        return float((of_left * of_right).sum(dtype=torch.float64))
    alike_left, alike_right = left @ left.T, right @ right.T
    rows += (left * (alike_right @ left)).sum(0)
    columns += (right * (alike_left @ right)).sum(0)
    return float((alike_left * alike_right).sum(dtype=torch.float64))


def _of_group(members: Sequence[_Tally], prior: Mapping[Expert, ExpertUse], predicted: int) -> dict[str, MatrixFisher]:
    """Of matrices that have much in common: one projection of a layer's experts, or a single matrix."""
    counts = np.array([one.tokens for one in members], dtype=float)
    rows = torch.stack([one.rows for one in members]).double().numpy()
    columns = torch.stack([one.columns for one in members]).double().numpy()
    if len(members) > 1:  # one side is the stream, which is the same for all; the other an expert's own neurons
        if members[0].matrix.projection == "down":
            rows = np.broadcast_to(rows.sum(0), rows.shape)
        else:
            columns = np.broadcast_to(columns.sum(0), columns.shape)
    shared = np.full(len(counts), counts.sum())  # what all have is known by the tokens of all
    by_down = len(members) > 1 and members[0].matrix.projection == "down"
    of_rows = _shrunk(rows, shared if by_down else counts)
    of_columns = _shrunk(columns, shared if len(members) > 1 and not by_down else counts)
    energies = np.array([one.energy for one in members])
    totals = _shrunk_totals(energies, counts, _expected_shares(members, prior))
    found = {}
    for number, one in enumerate(members):
        sums = energies[number] if energies[number].any() else energies.sum(0)
        windows = sums / sums.mean() if sums.any() else np.ones_like(sums)
        shape = rows.shape[2] * columns.shape[2]
        mean = float(f"{totals[number] / (predicted * shape):.6g}")
        vectors = (vector.astype(np.float32) for vector in (of_rows[number], of_columns[number], windows))
        found[one.matrix.name] = MatrixFisher(mean, *vectors)
    return found


def _expected_shares(members: Sequence[_Tally], prior: Mapping[Expert, ExpertUse]) -> np.ndarray:
    """What each is expected to have of all, by the routing prior alone; mean 1."""
    places = [(one.matrix.layer or 0, one.matrix.expert or 0) for one in members]
    uses = np.array([prior[place].mean_square_weight if place in prior else 0.0 for place in places])
    return uses / uses.mean() if uses.any() else np.ones(len(members))


def _shrunk_totals(energies: np.ndarray, counts: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """ΣG² of each member [members, windows] → [members], drawn to its expected share by how much is known."""
    totals = energies.sum(1)
    if len(totals) == 1 or not totals.any():
        return totals
    base = expected * (totals.sum() / expected.sum())
    safe = np.where(base > 0, base, 1.0)
    halves = np.stack([2 * energies[:, parity::2].sum(1) / safe for parity in (0, 1)], axis=1)
    weight = _kept_share(halves[None] - 1.0, np.array([counts.mean()]), counts)
    return base + weight * (totals - base)


def _shrunk(halves: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums [members, 2, size] of two halves of the windows → [members, size] with mean 1, drawn to flat."""
    means = halves.mean(2, keepdims=True)
    relative = np.where(means > 0, halves / np.where(means > 0, means, 1.0), 1.0) - 1.0
    whole = halves.sum(1)
    total = whole.mean(1, keepdims=True)
    flat = np.where(total > 0, whole / np.where(total > 0, total, 1.0), 1.0) - 1.0
    weight = _kept_share(relative.transpose(0, 2, 1), counts, counts)
    return 1.0 + weight[:, None] * flat


def _kept_share(halves: np.ndarray, seen: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How much of what was seen is kept of members with so many tokens, [members], from deviations [groups, size, 2].

    The correlation ρ of the halves gives that of the whole with the truth, 2ρ / (1 + ρ) (Spearman and Brown), at the
    mean number of tokens; with n of them it is n / (n + k).
    """
    by_tokens = seen / seen.sum() if seen.sum() > 0 else np.full(len(seen), 1 / len(seen))
    even, odd = halves[..., 0], halves[..., 1]
    products = ((even * odd).mean(1), (even * even).mean(1), (odd * odd).mean(1))
    both, first, second = (float(by_tokens @ one) for one in products)
    correlation = both / np.sqrt(first * second) if first > 0 and second > 0 else 0.0
    whole = float(np.clip(2 * correlation / (1 + correlation) if correlation > 0 else 0.0, 0.0, 1.0))
    if whole == 0.0:
        return np.zeros(len(counts))
    typical = float(by_tokens @ seen) if len(seen) == len(counts) else float(counts.mean())
    unknown = typical * (1 - whole) / whole
    return np.where(counts > 0, counts / np.maximum(counts + unknown, 1e-30), 0.0)
