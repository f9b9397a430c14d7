"""Codes that may stay or move by one, learned by Adam while the heat falls; rounds of that and of polish."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from alphaq.quantizers.learning.levels import TINY, Levels
from alphaq.quantizers.learning.polish import polished

NOISE_OFFSETS = 1 << 16
MOMENTA = (0.8, 0.99)  # Adam's


@dataclass(frozen=True)
class LearnedSettings:
    """How long and how fast to learn; the defaults are the best of those tried on trained experts at 2 to 4 bits.

    steps: of Adam, in each round; one costs little more than a product of the matrix with H. rounds: at most; one that
    lowers E by less than `tolerance`, relatively, is the last. hot, cold: heat at a round's first and last step; it
    falls geometrically. stay: how far the logits of moving begin below that of staying. code_rate, scale_rate: Adam's,
    of the logits and of the logarithms of steps. sweeps: of each polish, at most.
    """

    steps: int = 150
    rounds: int = 4
    tolerance: float = 0.01
    hot: float = 12.0
    cold: float = 1.0
    stay: float = 20.0
    code_rate: float = 1.2
    scale_rate: float = 0.008
    sweeps: int = 8


def refined(
    weight: torch.Tensor, levels: Levels, moments: torch.Tensor, settings: LearnedSettings, generator: torch.Generator
) -> Levels:
    """Rounds of annealing and polish, the best of each row so far being where the next one begins."""

    def with_errors(found: Levels) -> tuple[Levels, torch.Tensor]:
        found = polished(weight, found, moments, settings.sweeps)
        miss = found.values() - weight
        return found, (miss * (miss @ moments)).sum(1)

    best, least = with_errors(levels)
    for _ in range(settings.rounds):
        before = float(least.double().sum())
        if not before > 0:
            break
        found, errors = with_errors(annealed(weight, best, moments, least, settings, generator))
        better = errors < least
        best, least = best.or_else_rows(found, better), torch.where(better, errors, least)
        if float(least.double().sum()) > before * (1 - settings.tolerance):
            break
    return best


def annealed(
    weight: torch.Tensor,
    levels: Levels,
    moments: torch.Tensor,
    errors: torch.Tensor,
    settings: LearnedSettings,
    generator: torch.Generator,
) -> Levels:
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
