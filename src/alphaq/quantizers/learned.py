"""Learned grids: the codes of a matrix and the steps of its groups, found together by gradient descent.

A layer's output moves by (w − ŵ)·x for each row w, so with H the mean of x·xᵀ over its inputs the error is

    E = Σ over rows of (w − ŵ)·H·(w − ŵ)ᵀ,        ŵ = step·(code − zero) + mean.

Rounding to nearest ignores that errors of correlated inputs can cancel; GPTQ decides on one column after another and
never comes back. Here each code may stay or move by one, with the probabilities softmax((logits + noise) / heat), and
Adam lowers E of the expected codes by the logits and by the logarithm of every step. The noise is Gumbel's: without the
heat the largest sum is a draw from softmax(logits). Heat falls until the codes are all but decided. The likeliest codes
are then polished: column after column takes the code that minimises E with all others held, each group the step that
does, until little changes. Rounds of both follow until one lowers E by less than a tolerance.

Without H, or with its diagonal alone, columns do not interact: the nearest code is the best, and steps and zero points
are searched instead. The same search, weighted by the diagonal of H, also gives levels for GPTQ, and learning begins
from each row's better one of that and what is given. Rows never interact, so the best of each is kept.

Source: GSQ (arXiv 2604.18556). Tried here and left out, as they gain nothing or lose: more than three codes to choose
from, even at 2 bits; drawn codes in place of expected ones (straight-through); no noise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from alphaq.errors import QuantizationError
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.debiased import quantize_debiased
from alphaq.quantizers.gptq import quantize_gptq
from alphaq.quantizers.packing import pack, unpack
from alphaq.quantizers.rows import FP16_MAX, too_large
from alphaq.simd.sums import slices
from alphaq.work.workers import Wrap, silent

WEIGHTS_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 23}  # learning takes some 250 bytes for each
NOISE_OFFSETS = 1 << 16
STRETCHES = (0.85, 0.925, 1.0, 1.075, 1.15)  # of the step, in the search
REFITS = 3
JUDGED_COLUMNS = 512  # of H in float64 at a time
MOMENTA = (0.8, 0.99)  # Adam's
SETTLED = 1e-4  # a sweep that lowers E by less, relatively, is the last of its polish
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class LearnedSettings:
    """How long and how fast to learn; the defaults are the best of those tried on trained experts at 2 to 4 bits."""

    steps: int = 150
    """Of Adam, in each round; one costs little more than a product of the matrix with H."""
    rounds: int = 4
    """At most."""
    tolerance: float = 0.01
    """A round that lowers E by less, relatively, is the last."""
    hot: float = 12.0
    """Heat at a round's first step; it falls geometrically."""
    cold: float = 1.0
    """Heat at a round's last step."""
    stay: float = 20.0
    """How far the logits of moving begin below that of staying."""
    code_rate: float = 1.2
    """Adam's, of the logits."""
    scale_rate: float = 0.008
    """Adam's, of the logarithms of steps."""
    sweeps: int = 8
    """Of each polish, at most."""


@dataclass(frozen=True)
class _Levels:
    """Codes [rows, columns] and the grids [rows, groups] of some rows, all float32; see `values`."""

    choice: Choice
    stored: torch.dtype
    """What steps and means are rounded to."""
    free_mean: bool
    codes: torch.Tensor
    step: torch.Tensor
    zero: torch.Tensor
    mean: torch.Tensor

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.choice.bits - 1

    @property
    def scales_per_step(self) -> int:
        """A binary matrix stores half the distance of its two levels."""
        return 2 if self.choice.bits == 1 else 1

    def spread(self, per_group: torch.Tensor) -> torch.Tensor:
        """[rows, groups] → [rows, columns]; the last group may be ragged."""
        spread = per_group[:, :, None].expand(-1, -1, self.choice.group_size)
        return spread.reshape(len(per_group), -1)[:, : self.codes.shape[1]]

    def gathered(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over each group: [rows, columns] → [rows, groups]."""
        size = self.choice.group_size
        return pad(values, (0, -values.shape[1] % size)).view(len(values), -1, size).sum(2)

    def distances(self) -> torch.Tensor:
        """Of the codes from their zero points, in steps; [rows, columns]."""
        return self.codes - self.spread(self.zero)

    def values(self) -> torch.Tensor:
        """ŵ = step·(code − zero) + mean, [rows, columns]."""
        return self.spread(self.step) * self.distances() + self.spread(self.mean)

    def nearest(self, weight: torch.Tensor) -> _Levels:
        """With the codes nearest to the weights."""
        step = self.spread(self.step)
        places = (weight - self.spread(self.mean)) / step.clamp_min(TINY) + self.spread(self.zero)
        return replace(self, codes=torch.where(step > 0, places.round().clamp(0, self.top), self.codes))

    def rounded(self, step: torch.Tensor, mean: torch.Tensor) -> _Levels:
        """With the nearest steps and means that can be stored; the old step where the new one is not above 0."""
        scale = _as_stored(step / self.scales_per_step, self.stored) * self.scales_per_step
        return replace(self, step=torch.where(scale > 0, scale, self.step), mean=_as_stored(mean, self.stored))

    def or_else(self, other: _Levels, where: torch.Tensor) -> _Levels:
        """These levels, but the other ones in some groups, bool [rows, groups]."""
        return replace(
            self,
            codes=torch.where(self.spread(where), other.codes, self.codes),
            step=torch.where(where, other.step, self.step),
            zero=torch.where(where, other.zero, self.zero),
            mean=torch.where(where, other.mean, self.mean),
        )

    def or_else_rows(self, other: _Levels, where: torch.Tensor) -> _Levels:
        """These levels, but the other ones in some rows, bool [rows]."""
        return self.or_else(other, where[:, None].expand_as(self.step))


def quantize_learned(
    weight: torch.Tensor,
    choice: Choice,
    name: str = "matrix",
    hessian: torch.Tensor | None = None,
    start: QuantizedMatrix | None = None,
    device: str | torch.device | None = None,
    settings: LearnedSettings = LearnedSettings(),
    progress: Wrap = silent,
) -> QuantizedMatrix:
    """Quantize a [rows, columns] matrix whose inputs x have the second moments `hessian`, any multiple of E[x·xᵀ].

    hessian: float32 [columns, columns], symmetric; or [columns], its diagonal; or None for the identity. It is taken
    at its word: one of few inputs wants a larger diagonal first. start: a quantized form to begin from, that of
    `quantize_debiased` if None; no row of the result has a larger error (w − ŵ)·H·(w − ŵ)ᵀ. device: torch's; a CUDA one
    if None and there is one. On the CPU equal arguments give equal bytes, whatever the number of threads; the name
    seeds the noise. progress: is shown the parts of the matrix. Raises QuantizationError naming the matrix if it cannot
    be stored, or if the moments are not those of its inputs.
    """
    _check(weight, choice, name, hessian)
    start = start or quantize_debiased(weight, choice, name)
    if (start.choice, start.shape) != (choice, tuple(weight.shape)):
        raise QuantizationError(f"{name}: learning cannot begin from {start.choice} {start.shape}. Pass its own form.")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    moments = (torch.ones(weight.shape[1]) if hessian is None else hessian).to(place, torch.float32)
    importance = moments if moments.ndim == 1 else moments.diagonal()

    def searched(part: slice) -> QuantizedMatrix:
        rows, begin = weight[part].to(place).float(), _levels(start, part, place)
        found = _searched(rows, begin, importance)
        if moments.ndim == 1:
            found = _best(rows, begin, found, moments)
        return _matrix(rows, found)

    parts = slices(len(weight), max(1, WEIGHTS_AT_ONCE["cuda" if place.type == "cuda" else "cpu"] // weight.shape[1]))
    if moments.ndim == 1:
        return _in_parts(searched, parts, place, progress, name)
    other = quantize_gptq(weight, choice, name, hessian, _in_parts(searched, parts, place, silent, name))

    def learned(part: slice) -> QuantizedMatrix:
        rows, given = weight[part].to(place).float(), _levels(start, part, place)
        begin = _best(rows, given, _levels(other, part, place), moments)
        found = _learned(rows, begin, moments, settings, _generator(f"{name}:{part.start}", place))
        return _matrix(rows, _best(rows, begin, found, moments))

    return _in_parts(learned, parts, place, progress, name)


def _check(weight: torch.Tensor, choice: Choice, name: str, hessian: torch.Tensor | None) -> None:
    if choice.scheme:
        raise QuantizationError(f"{name}: {choice} is rounded by llama.cpp's own code. Give it an --imatrix instead.")
    if choice.kept or choice.mix:
        raise QuantizationError(f"{name}: {choice} has no one grid of codes to learn. Use --quantizer debiased for it.")
    if not torch.isfinite(weight).all():
        raise too_large(name, FP16_MAX)
    columns = weight.shape[1]
    if hessian is None:
        return
    if hessian.shape not in ((columns,), (columns, columns)) or not torch.isfinite(hessian).all():
        raise QuantizationError(
            f"{name}: second moments of shape {list(hessian.shape)} are not finite numbers for {columns} columns. "
            "Calibrate with another text, or use --quantizer hqq, which needs none."
        )


def _in_parts(
    work: Callable[[slice], QuantizedMatrix], parts: list[slice], place: torch.device, progress: Wrap, name: str
) -> QuantizedMatrix:
    """The matrix whose rows `work` quantizes, part by part, each with a single thread: sums never depend on threads."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads if place.type == "cpu" else 1, "alphaq", torch.set_num_threads, (1,))
    try:
        found = list(progress(pool.map(work, parts), len(parts), name))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # threads to come take after the last one set
    return QuantizedMatrix(
        found[0].choice,
        (sum(part.shape[0] for part in found), found[0].shape[1]),
        torch.cat([part.codes for part in found]),
        torch.cat([part.scales for part in found]),
        None if found[0].offsets is None else torch.cat([part.offsets for part in found]),
        math.fsum(part.squared_error or 0.0 for part in found),
    )


def _generator(seed: str, place: torch.device) -> torch.Generator:
    digest = hashlib.sha256(seed.encode()).digest()
    return torch.Generator(place).manual_seed(int.from_bytes(digest[:7], "little"))


def _levels(matrix: QuantizedMatrix, part: slice, place: torch.device) -> _Levels:
    """What some rows of a matrix stand for, whichever engine's it is."""
    choice, offsets = matrix.choice, matrix.offsets
    codes = torch.from_numpy(unpack(matrix.codes[part].numpy(), choice.bits, matrix.shape[1]))
    scale = matrix.scales[part].to(place).float()
    free_mean = offsets is not None and offsets.is_floating_point()
    if choice.bits == 1:
        zero = torch.full_like(scale, 0.5)
    elif offsets is None:
        zero = torch.full_like(scale, 2.0 ** (choice.bits - 1))
    else:
        zero = torch.zeros_like(scale) if free_mean else offsets[part].to(place).float()
    mean = offsets[part].to(place).float() if offsets is not None and free_mean else torch.zeros_like(scale)
    step = 2 * scale if choice.bits == 1 else scale
    return _Levels(choice, matrix.scales.dtype, free_mean, codes.to(place).float(), step, zero, mean)


def _matrix(weight: torch.Tensor, levels: _Levels) -> QuantizedMatrix:
    """Levels of some rows as they are stored."""
    choice = levels.choice
    offsets = None if choice.symmetric else levels.zero.to(torch.uint8).cpu()
    return QuantizedMatrix(
        choice,
        (weight.shape[0], weight.shape[1]),
        torch.from_numpy(pack(levels.codes.to(torch.uint8).cpu().numpy(), choice.bits)),
        (levels.step / levels.scales_per_step).to(levels.stored).cpu(),
        levels.mean.to(levels.stored).cpu() if levels.free_mean else offsets,
        float((levels.values() - weight).double().square().sum()),
    )


def _as_stored(values: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    most = torch.finfo(stored).max
    return values.clamp(-most, most).to(stored).float()


def _best(weight: torch.Tensor, first: _Levels, second: _Levels, moments: torch.Tensor) -> _Levels:
    """Of each row the levels of less error; the first if equal."""
    return first.or_else_rows(second, _errors(weight, second, moments) < _errors(weight, first, moments))


def _errors(weight: torch.Tensor, levels: _Levels, moments: torch.Tensor) -> torch.Tensor:
    """(w − ŵ)·H·(w − ŵ)ᵀ of each row, float64 [rows]; H is made float64 a few columns at a time."""
    miss = levels.values().double() - weight.double()
    if moments.ndim == 1:
        return miss.square() @ moments.double()
    total = miss.new_zeros(len(miss))
    for block in slices(len(moments), JUDGED_COLUMNS):
        total += ((miss @ moments[:, block].double()) * miss[:, block]).sum(1)
    return total


def _searched(weight: torch.Tensor, levels: _Levels, importance: torch.Tensor) -> _Levels:
    """Steps and zero points near the given ones of least Σ importance·(w − ŵ)² per group, with the nearest codes."""

    def errors(found: _Levels) -> torch.Tensor:
        return found.gathered((found.values() - weight).square() * importance)

    best, least = levels, errors(levels)
    fixed_zero = levels.choice.symmetric or levels.free_mean
    for shift in (0,) if fixed_zero else (-1, 0, 1):
        for stretch in STRETCHES:
            zero = levels.zero if fixed_zero else (levels.zero + shift).clamp(0, levels.top)
            found = _fitted(weight, replace(levels, step=levels.step * stretch, zero=zero), importance)
            better = (error := errors(found)) < least
            best, least = best.or_else(found, better), torch.where(better, error, least)
    return best


def _fitted(weight: torch.Tensor, levels: _Levels, importance: torch.Tensor) -> _Levels:
    """Codes nearest to the weights and least-squares steps for the codes, in turn (Lloyd's iteration)."""
    total = levels.gathered(importance.expand_as(weight)).clamp_min(TINY)
    for _ in range(REFITS):
        levels = levels.nearest(weight)
        distances, mean = levels.distances(), levels.mean
        product = levels.gathered((weight - levels.spread(mean)) * distances * importance)
        step = product / levels.gathered(distances.square() * importance).clamp_min(TINY)
        if levels.free_mean:
            mean = levels.gathered((weight - levels.spread(step) * distances) * importance) / total
        levels = levels.rounded(step, mean)
    return levels.nearest(weight)


def _learned(
    weight: torch.Tensor, levels: _Levels, moments: torch.Tensor, settings: LearnedSettings, generator: torch.Generator
) -> _Levels:
    """Rounds of annealing and polish, the best of each row so far being where the next one begins."""

    def polished(found: _Levels) -> tuple[_Levels, torch.Tensor]:
        found = _polished(weight, found, moments, settings.sweeps)
        miss = found.values() - weight
        return found, (miss * (miss @ moments)).sum(1)

    best, least = polished(levels)
    for _ in range(settings.rounds):
        before = float(least.double().sum())
        if not before > 0:
            break
        found, errors = polished(_annealed(weight, best, moments, least, settings, generator))
        better = errors < least
        best, least = best.or_else_rows(found, better), torch.where(better, errors, least)
        if float(least.double().sum()) > before * (1 - settings.tolerance):
            break
    return best


def _annealed(
    weight: torch.Tensor,
    levels: _Levels,
    moments: torch.Tensor,
    errors: torch.Tensor,
    settings: LearnedSettings,
    generator: torch.Generator,
) -> _Levels:
    """Codes and grids learned by one fall of the heat. errors: of the rows before it, the unit of their gradients."""
    moves = torch.tensor([-1.0, 0.0, 1.0], device=weight.device)[:, None, None]
    reached = levels.codes + moves
    logits = (-settings.stay * moves.abs()).expand_as(reached)
    logits = torch.where((reached < 0) | (reached > levels.top), -torch.inf, logits)
    stretch, shift = torch.zeros_like(levels.step), torch.zeros_like(levels.step)
    learners = [_Adam(logits, settings.code_rate), _Adam(stretch, settings.scale_rate)]
    learners += [_Adam(shift, settings.scale_rate)] if levels.free_mean else []
    unit = weight.shape[1] / errors.clamp_min(1e-6 * float(errors.mean()) + TINY)[:, None]
    noise = _gumbel(logits.numel() + NOISE_OFFSETS, generator)
    offsets = torch.randint(NOISE_OFFSETS, (settings.steps,), generator=generator, device=weight.device).tolist()

    def grid() -> tuple[torch.Tensor, torch.Tensor]:
        return levels.step * stretch.exp(), levels.mean + levels.step * shift

    for number, offset in enumerate(offsets):
        heat = settings.hot * (settings.cold / settings.hot) ** (number / max(1, settings.steps - 1))
        drawn = noise[offset : offset + logits.numel()].view_as(logits)
        shares = torch.softmax((logits + drawn).div_(heat), 0)
        move = shares[2] - shares[0]
        step, mean = grid()
        now = replace(levels, codes=levels.codes + move, step=step, mean=mean)
        pull = ((now.values() - weight) * unit) @ moments
        slopes = [
            shares.mul_(moves - move).mul_(pull * now.spread(step / heat)),
            now.gathered(pull * now.distances()) * step,
            now.gathered(pull) * levels.step,
        ]
        for learner, slope in zip(learners, slopes, strict=False):
            learner.descend(slope)
    codes = (levels.codes + logits.argmax(0) - 1).clamp_(0, levels.top)
    return replace(levels, codes=codes).rounded(*grid())


class _Adam:
    """Adam (arXiv 1412.6980) on one tensor. Torch's own brings 150 MB of compiler along."""

    def __init__(self, value: torch.Tensor, rate: float) -> None:
        self.value, self.rate = value, rate
        self.mean, self.square = torch.zeros_like(value), torch.zeros_like(value)
        self.steps = 0

    def descend(self, slope: torch.Tensor) -> None:
        """One step against the slope, which is of the size of 1 or so."""
        self.steps += 1
        first, second = MOMENTA
        self.mean.lerp_(slope, 1 - first)
        self.square.mul_(second).addcmul_(slope, slope, value=1 - second)
        rate = self.rate * math.sqrt(1 - second**self.steps) / (1 - first**self.steps)
        self.value.addcdiv_(self.mean, self.square.sqrt().add_(1e-8), value=-rate)


def _gumbel(count: int, generator: torch.Generator) -> torch.Tensor:
    """Independent draws of Gumbel's distribution, float32 [count]."""
    uniform = torch.rand(count, generator=generator, device=generator.device)
    return uniform.clamp_(1e-9, 1 - 1e-7).log_().neg_().log_().neg_()


def _polished(weight: torch.Tensor, levels: _Levels, moments: torch.Tensor, sweeps: int) -> _Levels:
    """Each code, then each step (and mean) where it minimises E with all others held; group by group, again and again.

    The gradient (ŵ − w)·H is kept up to date within a group by its own block of H, beyond it when the group is done.
    """
    levels = replace(levels, codes=levels.codes.clone(), step=levels.step.clone(), mean=levels.mean.clone())
    miss = levels.values() - weight
    pull = miss @ moments
    error = float((miss * pull).sum())
    for _ in range(sweeps):
        for group, part in enumerate(slices(weight.shape[1], levels.choice.group_size)):
            own = moments[part, part]
            local = pull[:, part].T.contiguous()
            codes = _best_codes(levels, group, part, own, local)
            _best_grid(levels, group, codes, own, local)
            levels.codes[:, part] = codes.T
            restored = levels.step[:, group] * (codes - levels.zero[:, group]) + levels.mean[:, group]
            changed = restored.T - weight[:, part] - miss[:, part]
            miss[:, part] += changed
            pull.addmm_(changed, moments[part])
        before, error = error, float((miss * pull).sum())
        if not error < before * (1 - SETTLED):
            break
    return levels


def _best_codes(levels: _Levels, group: int, part: slice, own: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Codes [columns, rows] of a group, column by column; `local`, the transposed gradient there, follows them."""
    step = levels.step[:, group]
    curvature = own.diagonal()[:, None] * step
    inverse = torch.where(curvature > TINY, 1 / curvature, 0)
    codes = levels.codes[:, part].T.contiguous()
    for column, code in enumerate(codes):
        better = torch.addcmul(code, local[column], inverse[column], value=-1).round_().clamp_(0, levels.top)
        local.addr_(own[column], (better - code) * step)
        code.copy_(better)
    return codes


def _best_grid(levels: _Levels, group: int, codes: torch.Tensor, own: torch.Tensor, local: torch.Tensor) -> None:
    """Move a group's step, and its mean if it is free, to the exact minimum along each, if what is stored is better."""
    step, zero, mean = levels.step[:, group], levels.zero[:, group], levels.mean[:, group]

    def move(value: torch.Tensor, direction: torch.Tensor, unit: int, above: float) -> None:
        pushed = own @ direction
        slope, curvature = (direction * local).sum(0), (direction * pushed).sum(0)
        best = value - torch.where(curvature > TINY, slope / curvature, 0)
        by = _as_stored(best / unit, levels.stored) * unit - value
        by = torch.where(((2 * slope + by * curvature) * by < 0) & (value + by > above), by, 0)
        value += by
        local.add_(pushed * by)

    move(step, codes - zero, levels.scales_per_step, 0.0)
    if levels.free_mean:
        move(mean, torch.ones_like(codes), 1, -math.inf)
