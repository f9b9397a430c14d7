"""What the tokens of a text do to each expert, reduced at once to a few numbers per matrix.

A routed expert computes y = D·(act(G·x) ⊙ U·x), or what its family makes of that, and the layer adds w·y for
each of its tokens, so an error of y counts w² times its square. Every sum over tokens below is weighted so, and
divided by the tokens of the whole layer, which makes experts comparable: one that is rarely chosen matters little.

BAQ's constant (arXiv 2506.05664): a weight that is off by δ costs δ² / (2·[H⁻¹]ⱼⱼ) after the columns
not yet rounded have made up for it, with H the Hessian of the layer's squared error. A uniform
quantizer with range R has δ² = R²·2^(−2b) / 12 on average, so the matrix costs c·2^(−2b) with
c = Σᵢ Rᵢ² · Σⱼ 1 / [H⁻¹]ⱼⱼ / 24. As in the paper's code, Rᵢ is the range of row i, zero included: the
range of a group would tie c to one group size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from alphaq.calibration.passage import Passage
from alphaq.calibration.stream import HollowModel, LayerTraffic, stream_forward
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import ChoiceError, QuantizationError, StatsError
from alphaq.formats.blocks import dequantize
from alphaq.formats.table import format_of, parse_choice
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef
from alphaq.quantizers.base import DEFAULT, rounder_of, sixteen_bits
from alphaq.simd.sums import squared_distance, squared_norm

DAMPING = 0.01  # of the mean diagonal of H, as in GPTQ
FORMAT_VERSION = 5
PROBE = Choice(2, 128)
"""The rounding at which `signal` is measured; being relative, it hardly depends on it."""
SIGNAL_EXPERTS = 16
"""Of a layer, those that do most: for the others the signal follows from how they are used. It is theirs for the most
part, within 6 % of the mean over all 128 experts of a layer (docs/research/log.md)."""

Expert = tuple[int, int]
"""Layer and number of a routed expert."""


@dataclass(frozen=True)
class ExpertUse:
    """How a layer's router uses one expert. All are 0 for an expert without tokens."""

    frequency: float
    """Share of the layer's (token, slot) pairs, 0 to 1; sums to 1 over the layer."""
    mean_weight: float
    """Mean routing weight over its own tokens."""
    mean_square_weight: float
    """Mean of the squared routing weight over all tokens, 0 where the expert is not chosen."""
    tokens: int


@dataclass(frozen=True)
class MatrixUse:
    """What one expert matrix sees and what rounding it does. All are 0 for an expert without tokens; of one that only
    the signal is wanted of, and that `SIGNAL_EXPERTS` leaves out, all but the signal."""

    input_mean_square: float
    """Mean of x² over the expert's tokens and the matrix's columns."""
    hessian_trace: float
    """Σ w²‖x‖² over the expert's tokens, per token of the layer and per column."""
    baq: float
    """BAQ's c, a squared output error per token of the layer; 0 if not asked for."""
    output_errors: dict[Choice, float]
    """Σ w²‖y − ŷ‖² per token of the layer, with only this matrix of the expert stored at the choice."""
    signal: float = 0.0
    """Σ ‖h − ĥ‖² / ‖h‖² per token of the layer, h the stream behind it, per relative squared error of the matrix; 0 if
    not asked for, NaN if no expert that tells of it can be rounded."""


@dataclass(frozen=True)
class Calibration:
    """One pass's numbers: experts by (layer, expert), matrices by name.

    block_errors: √Σ w²‖y − ŷ‖² with the expert's matrices at one choice, PMQ's ε (arXiv 2410.06270). tokens: ids that
    went through the model, by window. notes: what could not be seen, and what stands for it.
    """

    experts: dict[Expert, ExpertUse] = field(default_factory=dict)
    matrices: dict[str, MatrixUse] = field(default_factory=dict)
    block_errors: dict[Expert, dict[Choice, float]] = field(default_factory=dict)
    tokens: tuple[tuple[int, ...], ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Indented JSON with a final newline; every float comes back as it was."""
        data = {
            "format_version": FORMAT_VERSION,
            "experts": {_key(expert): vars(use) for expert, use in self.experts.items()},
            "matrices": {
                name: vars(use) | {"output_errors": _named(use.output_errors)} for name, use in self.matrices.items()
            },
            "block_errors": {_key(expert): _named(errors) for expert, errors in self.block_errors.items()},
            "tokens": self.tokens,
            "notes": self.notes,
        }
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "calibration") -> Calibration:
        """The inverse of `to_json`. Raises StatsError naming `where` if the text is anything else."""
        try:
            data = json.loads(text)
            if data["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format_version {data['format_version']} is not {FORMAT_VERSION}")
            return cls(
                {_expert(key): ExpertUse(**use) for key, use in data["experts"].items()},
                {
                    name: MatrixUse(**use | {"output_errors": _parsed(use["output_errors"])})
                    for name, use in data["matrices"].items()
                },
                {_expert(key): _parsed(errors) for key, errors in data["block_errors"].items()},
                tuple(tuple(map(int, window)) for window in data["tokens"]),
                tuple(map(str, data["notes"])),
            )
        except (ValueError, KeyError, TypeError, AttributeError, ChoiceError) as error:
            raise StatsError(f"{where} holds no calibration ({error!r}). Delete it and calibrate again.") from error


def _key(expert: Expert) -> str:
    return f"{expert[0]}.{expert[1]}"


def _expert(key: str) -> Expert:
    layer, expert = key.split(".")
    return int(layer), int(expert)


def _named(errors: Mapping[Choice, float]) -> dict[str, float]:
    return {str(choice): error for choice, error in errors.items()}


def _parsed(errors: Mapping[str, float]) -> dict[Choice, float]:
    return {parse_choice(name): error for name, error in errors.items()}


def gather(
    checkpoint: Checkpoint,
    ids: Tensor,
    choices: tuple[Choice, ...] = (),
    with_baq: bool = False,
    with_signal: bool = False,
) -> Calibration:
    """Run token ids [windows, length] through the model and measure every routed expert.

    Memory: that of `stream_forward`, and one expert's matrices and activations; with the signal also
    what the modules of a layer take and give, and where the way to the stream does more than multiply (`LayerSignal`) a
    float32 [top_k, tokens, hidden] for each projection. Raises ChoiceError for a
    choice that round-to-nearest cannot store, QuantizationError for weights that it cannot, and what
    `stream_forward` raises.
    """
    for choice in choices:
        if format_of(choice).foreign:
            raise ChoiceError(f"{choice} is not rounded to nearest here. Give bits and a group size, such as 3g64.")
    hollow = HollowModel(checkpoint)
    calibration = Calibration(tokens=tuple(map(tuple, ids.tolist())))

    def visit(traffic: LayerTraffic) -> None:
        experts = hollow.matrices[traffic.layer]
        uses = expert_uses(traffic.experts, traffic.weights, len(experts))
        signal = None if traffic.passage is None else LayerSignal(traffic, traffic.passage)
        looked_into = busiest(uses, SIGNAL_EXPERTS if with_signal and not (choices or with_baq) else len(uses))
        for number, use in enumerate(uses):
            expert = _Expert(checkpoint, experts[number], traffic, number)
            if use.tokens and number in looked_into:
                matrices, block_errors = expert.measure(choices, with_baq, signal)
            else:
                matrices, block_errors = expert.unseen(choices)
            calibration.experts[traffic.layer, number] = use
            calibration.matrices.update(matrices)
            calibration.block_errors[traffic.layer, number] = block_errors
        strengths = {} if signal is None else signal.strengths()
        for part in traffic.form.parts if strengths else ():
            names = [experts[number][part].name for number in range(len(uses))]
            told = [strengths.get(name, 0.0 if at in looked_into else None) for at, name in enumerate(names)]
            of_part = of_all_experts(told, uses)
            for name, strength in zip(names, of_part, strict=True):
                calibration.matrices[name] = replace(calibration.matrices[name], signal=strength)

    stream_forward(checkpoint, ids, visit, hollow, with_passages=with_signal)
    return calibration


def expert_uses(experts: Tensor, weights: Tensor, count: int) -> list[ExpertUse]:
    """Uses of a layer's `count` experts from indices and weights [tokens, top_k]."""
    slots, weight = experts.reshape(-1), weights.reshape(-1).double()
    tokens = torch.bincount(slots, minlength=count).tolist()
    sums = torch.bincount(slots, weight, count).tolist()
    squares = torch.bincount(slots, weight.square(), count).tolist()
    return [
        ExpertUse(n / len(slots), total / max(n, 1), square / len(experts), n)
        for n, total, square in zip(tokens, sums, squares, strict=True)
    ]


def busiest(uses: Sequence[ExpertUse], count: int) -> set[int]:
    """Numbers of the `count` experts whose outputs weigh most."""
    return set(sorted(range(len(uses)), key=lambda number: -uses[number].mean_square_weight)[:count])


def of_all_experts(strengths: Sequence[float | None], uses: Sequence[ExpertUse]) -> list[float]:
    """The signal of one projection of every expert: as measured, or, where it was not (None), as much of it per squared
    routing weight as those have together that were."""
    pairs = list(zip(strengths, (use.mean_square_weight for use in uses), strict=True))
    seen = [(one, weight) for one, weight in pairs if one is not None and math.isfinite(one)]
    weight = math.fsum(weight for _, weight in seen)
    rate = math.fsum(one for one, _ in seen) / weight if weight > 0 else math.nan
    return [(rate * weight if weight > 0 else 0.0) if one is None else one for one, weight in pairs]


class LayerSignal:
    """How rounding each matrix of a layer's experts moves the stream behind the layer.

    Where the way there only multiplies, a change of an expert's output counts at once. Elsewhere the changes of a layer
    are put together, float32 [top_k, tokens, hidden] for each projection, and the layer is run with them.
    """

    def __init__(self, traffic: LayerTraffic, passage: Passage) -> None:
        self.traffic, self.passage = traffic, passage
        self.gains = passage.gains()
        self.undefined: set[str] = set()
        self._found: dict[str, float] = {}
        self._waiting: dict[str, tuple[int, int, float]] = {}
        self._changes: dict[int, Tensor] = {}

    def add(self, name: str, expert: int, part: int, change: Tensor, scale: float) -> None:
        """Take in how an expert's output [n, hidden] changes by a matrix rounded to 1 / scale of its energy."""
        token, slot = torch.where(self.traffic.experts == expert)
        change = change * self.traffic.weights[token, slot, None]
        if self.gains is not None:
            self._found[name] = scale * _weighted(self.gains[token], change) / len(self.gains)
            return
        if part not in self._changes:
            self._changes[part] = torch.zeros(self.traffic.experts.shape[1], *self.passage.output.shape)
        self._changes[part][slot, token] = change
        self._waiting[name] = expert, part, scale

    def strengths(self) -> dict[str, float]:
        """Σ ‖h − ĥ‖² / ‖h‖² per token of the layer and relative squared error, by matrix."""
        moved = {part: torch.stack([*map(self.passage.moved, slots)]) for part, slots in self._changes.items()}
        for name, (expert, part, scale) in self._waiting.items():
            token, slot = torch.where(self.traffic.experts == expert)
            self._found[name] = scale * float(moved[part][slot, token].sum()) / len(self.traffic.experts)
        return self._found | dict.fromkeys(self.undefined, math.nan)


class _Expert:
    """One expert's tokens of a layer, and what its matrices make of them.

    inputs: [n, hidden]. square_weights: float64 [n], squared routing weights over the layer's tokens.
    """

    def __init__(self, checkpoint: Checkpoint, refs: dict[str, MatrixRef], traffic: LayerTraffic, number: int) -> None:
        token, slot = torch.where(traffic.experts == number)
        self.checkpoint, self.refs = checkpoint, refs
        self.form, self.number = traffic.form, number
        self.inputs = traffic.inputs[token]
        self.square_weights = traffic.weights[token, slot].double().square() / len(traffic.inputs)
        self.all_tokens = len(traffic.inputs)

    def unseen(self, choices: tuple[Choice, ...]) -> tuple[dict[str, MatrixUse], dict[Choice, float]]:
        """What `measure` would tell if nothing was to be seen."""
        none = dict.fromkeys(choices, 0.0)
        return {self.refs[part].name: MatrixUse(0.0, 0.0, 0.0, none.copy()) for part in self.form.parts}, none

    def measure(
        self, choices: tuple[Choice, ...], with_baq: bool, signal: LayerSignal | None
    ) -> tuple[dict[str, MatrixUse], dict[Choice, float]]:
        """Uses of the matrices by name, their signal left to `signal`, and the errors of the expert as a whole."""
        parts = self.form.parts
        misses = {choice: self._misses(choice) for choice in choices}
        block_errors = {choice: math.sqrt(one["block"] * self.all_tokens) for choice, one in misses.items()}
        if signal is not None:
            self._tell(signal)
        inputs = dict.fromkeys(self.form.first, self.inputs) | {"down": self.hidden}
        curvatures = self._curvatures() if with_baq else dict.fromkeys(parts, 0.0)
        uses = {
            self.refs[part].name: MatrixUse(
                input_mean_square=float(inputs[part].square().mean(dtype=torch.float64)),
                hessian_trace=_weighted(self.square_weights, inputs[part]) / inputs[part].shape[1],
                baq=squared_row_ranges(self.weights[part]) * curvatures[part] / 24 if with_baq else 0.0,
                output_errors={choice: one[part] for choice, one in misses.items()},
            )
            for part in parts
        }
        return uses, block_errors

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The matrices as they are stored, by projection."""
        return {part: self.checkpoint.read(self.refs[part]) for part in self.form.parts}

    @cached_property
    def products(self) -> dict[str, Tensor]:
        """Outputs of the first projections, [n, width] each."""
        return {part: self.inputs @ self.weights[part].float().T for part in self.form.first}

    @cached_property
    def hidden(self) -> Tensor:
        """Inputs of the last projection, [n, width]."""
        return self._hidden(self.products)

    def _moved(self, choice: Choice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Rounded matrices, and how each alone moves the output."""
        hidden, down = self.hidden, self.weights["down"].float()
        rounded = {part: self._rounded(part, self.weights[part], choice) for part in self.form.parts}
        moves = {
            part: (self._hidden(self.products | {part: self.inputs @ rounded[part].T}) - hidden) @ down.T
            for part in self.form.first
        }
        moves["down"] = hidden @ (rounded["down"] - down).T
        return rounded, moves

    def _misses(self, choice: Choice) -> dict[str, float]:
        """Σ w²‖y − ŷ‖² per token of the layer with one matrix at the choice, by its projection; "block" with all."""
        if choice.kept and all(sixteen_bits(matrix) is matrix for matrix in self.weights.values()):
            return dict.fromkeys((*self.form.parts, "block"), 0.0)  # kept as it is, so nothing moves
        rounded, moves = self._moved(choice)
        changed = {part: self.inputs @ rounded[part].T for part in self.form.first}
        moves["block"] = self._hidden(changed) @ rounded["down"].T - self.hidden @ self.weights["down"].float().T
        return {part: _weighted(self.square_weights, miss) for part, miss in moves.items()}

    def _curvatures(self) -> dict[str, float]:
        """Of each projection's inputs; the first ones share theirs."""
        of_first = curvature(self.inputs, self.square_weights)
        return dict.fromkeys(self.form.first, of_first) | {"down": curvature(self.hidden, self.square_weights)}

    def _tell(self, signal: LayerSignal) -> None:
        """Tell how rounding each matrix to `PROBE` moves the expert's output."""
        names = {part: self.refs[part].name for part in self.form.parts}
        try:
            rounded, moves = self._moved(PROBE)
        except QuantizationError:  # which may be pinned to 16 bits
            signal.undefined.update(names.values())
            return
        for order, (part, name) in enumerate(names.items()):
            weight = self.weights[part]
            error, energy = squared_distance(weight, rounded[part]), squared_norm(weight)
            if error:
                signal.add(name, self.number, order, moves[part], energy / error)

    def _hidden(self, products: Mapping[str, Tensor]) -> Tensor:
        return self.form.hidden([products[part] for part in self.form.first], self.number)

    def _rounded(self, part: str, weight: Tensor, choice: Choice) -> Tensor:
        if choice.kept:
            return sixteen_bits(weight).float()
        return dequantize(rounder_of(DEFAULT)(weight, choice, self.refs[part].name))


def _weighted(weights: Tensor, values: Tensor) -> float:
    """Σ weight·‖v‖² over rows [n, anything]; weights float64 [n]."""
    return float(weights @ values.square().sum(1, dtype=torch.float64))


def squared_row_ranges(weight: Tensor) -> float:
    """Σᵢ (max(wᵢ, 0) − min(wᵢ, 0))² over the rows of a matrix."""
    low, high = weight.double().aminmax(dim=1)
    return float((high.clamp(min=0) - low.clamp(max=0)).square().sum())


def curvature(inputs: Tensor, square_weights: Tensor) -> float:
    """Σⱼ 1 / [H⁻¹]ⱼⱼ with H = 2·Σ w²·x·xᵀ over rows x of inputs [n, columns], plus 1 % of its mean diagonal.

    square_weights: [n]. 0 if the inputs are. With AᵀA = H before damping λ, an expert with fewer tokens
    than columns is solved in the space of its tokens: H⁻¹ = (1 − Aᵀ(λ + AAᵀ)⁻¹A) / λ.
    """
    scaled = inputs.double() * (2 * square_weights).sqrt()[:, None]
    tokens, columns = scaled.shape
    damping = DAMPING * float(scaled.square().sum()) / columns
    if damping == 0:
        return 0.0
    gram = scaled @ scaled.T if tokens < columns else scaled.T @ scaled
    gram.diagonal().add_(damping)
    factor = torch.linalg.cholesky(gram)
    if tokens < columns:
        explained = torch.linalg.solve_triangular(factor, scaled, upper=False).square().sum(0)
        diagonal = (1 - explained) / damping
    else:
        diagonal = torch.cholesky_inverse(factor).diagonal()
    return float((1 / diagonal).sum())
