"""What a plan leaves in 16 bits, by name, so that nothing large is forgotten in silence.

Numbers in names become `*`, but for those of layers after the last one, which predict further tokens. A name that holds
too little by itself is counted with its neighbours, under what they have in common, so that what is not named is less
than the least share of the model, all of it together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from alphaq.checkpoint.families.architecture import NUMBERED_LAYER
from alphaq.checkpoint.reader import Checkpoint
from alphaq.nouns.choice import Choice

LEAST_SHARE = 0.005  # of a model's parameters


def kept_shares(checkpoint: Checkpoint, choices: Mapping[str, Choice]) -> dict[str, float]:
    """Share of the model's parameters that each kind of tensor keeps in 16 bits, largest first.

    choices: of the matrices that are quantized; 16 is as good as none.
    """
    quantized = Counter[str]()
    for matrix in checkpoint.matrices:
        if (choice := choices.get(matrix.name)) is not None and choice.bits < 16:
            quantized[matrix.tensor] += matrix.parameters
    left, total = Counter[tuple[str, ...]](), 0
    layers = checkpoint.architecture.layers(checkpoint.config)
    for tensors in checkpoint.shards.values():
        for name, info in tensors.items():
            parameters = math.prod(info.shape)
            total += parameters
            left[_without_numbers(name, layers)] += parameters - quantized[name]
    shares = {name: count / total for name, count in _named(left, LEAST_SHARE * total).items()}
    return {name: float(f"{shares[name]:.4g}") for name in sorted(shares, key=lambda name: (-shares[name], name))}


def _without_numbers(name: str, layers: int) -> tuple[str, ...]:
    numbered = NUMBERED_LAYER.fullmatch(name)
    after = numbered[1] if numbered is not None and int(numbered[1]) >= layers else None
    return tuple("*" if part.isdigit() and part != after else part for part in name.split("."))


def _named(left: Mapping[tuple[str, ...], int], least: float) -> dict[str, int]:
    """Counts by name, each at least `least`; of the smaller ones the sum under what their names begin with."""
    named: dict[str, int] = {}
    open_counts, deepest = Counter(left), max(map(len, left), default=0)
    for depth in range(deepest, -1, -1):
        for parts in [parts for parts in open_counts if len(parts) == depth]:
            count = open_counts.pop(parts)
            if count >= least > 0:
                named[".".join(parts if parts in left else (*parts, "*"))] = count
            elif depth:
                open_counts[parts[:-1]] += count
    return named
