"""Modules by name: which choice each has, and few patterns that match just some of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from alphaq.checkpoint.reader import Checkpoint
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role

KEPT = Choice(16)
LINEAR = (Role.EXPERT, Role.SHARED_EXPERT, Role.ATTENTION, Role.MIXER, Role.DENSE_MLP, Role.ROUTER, Role.HEAD)
_MODULE = re.compile(r"(?P<stem>.*\blayers\.)(?P<layer>\d+)\.(?P<block>.*?)(experts\.(?P<expert>\d+)\.)?(?P<leaf>\w+)")


def module_name(tensor: str) -> str:
    """The module that a weight belongs to."""
    return tensor.removesuffix(".weight")


def module_of(checkpoint: Checkpoint, matrix: MatrixRef) -> str:
    """The module that a matrix belongs to, as the checkpoint names it."""
    return module_name(matrix.name)


def as_published(checkpoint: Checkpoint, tensor: str) -> str:
    """A tensor's name as the family's own checkpoints have it: transformers 5 calls every MoE block `mlp`."""
    block = checkpoint.architecture.expert_name.partition(".experts.")[0].rpartition(".")[2]
    return tensor if block == "{layer}" else tensor.replace(".mlp.", f".{block}.")  # some have both beside each other


def linear_choices(
    checkpoint: Checkpoint, choices: Mapping[str, Choice], called: Callable[[Checkpoint, MatrixRef], str]
) -> dict[str, Choice]:
    """The choice of every linear module by what it is `called`, 16 for those that the plan does not quantize."""
    linear = (matrix for matrix in checkpoint.matrices if matrix.role in LINEAR)
    return {called(checkpoint, matrix): choices.get(matrix.name, KEPT) for matrix in linear}


def module_patterns(modules: Iterable[str], known: Iterable[str]) -> list[str]:
    r"""Few regular expressions that match, of the known modules' names, just the given ones.

    Layers are listed, and experts unless all of a layer are meant: `model\.layers\.(0|3)\.mlp\.experts\.\d+\.up_proj`.
    """
    given, everything = _experts_by_cell(modules), _experts_by_cell(known)
    layers: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for cell, experts in given.items():
        stem, layer, block, leaf = cell
        if experts:
            numbers = r"\d+" if experts == everything[cell] else _either(sorted(experts, key=int))
            block += rf"experts\.{numbers}\."
        layers[stem, block, leaf].append(layer)
    leaves: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (stem, block, leaf), listed in layers.items():
        leaves[stem + (_either(sorted(listed, key=int)) + r"\." if stem else ""), block].append(leaf)
    return [before + block + _either(names) for (before, block), names in leaves.items()]


def _experts_by_cell(modules: Iterable[str]) -> dict[tuple[str, str, str, str], set[str]]:
    """Experts by (what comes before the layer, layer, what comes before the experts, projection), escaped."""
    cells: dict[tuple[str, str, str, str], set[str]] = defaultdict(set)
    for module in modules:
        match = _MODULE.fullmatch(module)
        place = ("", "", "", module) if match is None else match.group("stem", "layer", "block", "leaf")
        stem, layer, block, leaf = map(re.escape, place)
        cells[stem, layer, block, leaf].update([match["expert"]] if match and match["expert"] else [])
    return cells


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"({'|'.join(names)})"
