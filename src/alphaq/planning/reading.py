"""Bytes of weights that a token reads: what decides how fast a model writes where memory is slower than arithmetic.

A token reads every weight of attention, shared experts, routers and the head, those experts that its router chooses,
and one row of the embedding, which counts as nothing unless the head is tied to it. Nothing of what images and sound go
through is read for text:

    tokens per second = bandwidth ÷ Σ share·bytes,   share = chosen ÷ experts, or what the routing prior expects.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from alphaq.allocation.problem import Reads
from alphaq.calibration.traffic import Expert, ExpertUse
from alphaq.checkpoint.families.architecture import NUMBERED_LAYER
from alphaq.checkpoint.families.prefixes import language_prefix
from alphaq.checkpoint.families.routing import experts_in, experts_per_token
from alphaq.checkpoint.families.wrappers import OTHER_PARTS
from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.export import Layout
from alphaq.errors import BudgetError
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.planning.costs import data_table
from alphaq.planning.scope import Scope
from alphaq.sensitivity.base import Evidence

_LOOKED_UP = re.compile(r"(?:.*\.)?(?:embed_tokens_per_layer|per_layer_token_embd|nextn\.embed_tokens)\.weight")
"""Tables of which a token reads a row, and that no head is tied to."""


@dataclass(frozen=True)
class Reading:
    """Which share of each matrix or tensor a token reads. matrices: by name; tensors: those that matrices lie in."""

    matrices: Mapping[str, float]
    tensors: Mapping[str, float]

    @classmethod
    def of(cls, checkpoint: Checkpoint, prior: Mapping[Expert, ExpertUse] | None = None) -> Reading:
        """prior: how often each expert is used, where that is known."""
        chosen = experts_per_token(checkpoint.architecture, checkpoint.config)
        architecture, config = checkpoint.architecture, checkpoint.config
        layers = architecture.moe_layers(config)
        usual = {layer: chosen / experts_in(architecture, config, layer) for layer in layers}
        tied = not checkpoint.with_role(Role.HEAD)

        def share(matrix: MatrixRef) -> float:
            if matrix.role is Role.EMBEDDING:
                return 1.0 if tied and not _LOOKED_UP.fullmatch(matrix.name) else 0.0
            if matrix.role is not Role.EXPERT:
                return 1.0
            known = None if prior is None else prior.get((matrix.layer or 0, matrix.expert or 0))
            return usual[matrix.layer or 0] if known is None else min(1.0, chosen * known.frequency)

        matrices = {matrix.name: share(matrix) for matrix in checkpoint.matrices}
        tensors = {
            matrix.tensor: usual.get(matrix.layer or 0, 1.0) if matrix.index is not None else matrices[matrix.name]
            for matrix in checkpoint.matrices
        }
        return cls(matrices, dict.fromkeys(_unread(checkpoint), 0.0) | tensors)

    def share(self, source: MatrixRef | str) -> float:
        """Of what an entry of a layout holds."""
        return self.tensors.get(source, 1.0) if isinstance(source, str) else self.matrices[source.name]

    def total(self, layout: Layout, without: frozenset[str] = frozenset()) -> int:
        """Bytes of weights in files that a token reads, rounded up. without: names of matrices that do not count."""
        read: dict[MatrixRef | str, float] = {}
        for entry in layout.entries:  # a tied embedding is written twice where llama.cpp insists, and read once
            name = entry.source if isinstance(entry.source, str) else entry.source.name
            if name not in without:
                nbytes = sum(place.nbytes for place in entry.places)
                read[entry.source] = max(read.get(entry.source, 0.0), nbytes * self.share(entry.source))
        return math.ceil(math.fsum(read.values()))


def _unread(checkpoint: Checkpoint) -> Iterator[str]:
    """Stored tensors that no token of text reads: of images and sound, of layers that foretell further tokens, and
    tables that rows are looked up in."""
    architecture = checkpoint.architecture
    prefix, layers = language_prefix(architecture, checkpoint.shard_of), architecture.layers(checkpoint.config)
    for name, role in checkpoint.roles.items():
        if role is not Role.OTHER:
            continue
        numbered = NUMBERED_LAYER.fullmatch(name)
        beyond = numbered is not None and int(numbered[1]) >= layers
        part = name.removeprefix(prefix).split(".")[0].lower()
        if not name.startswith(prefix) or beyond or OTHER_PARTS.search(part) or _LOOKED_UP.fullmatch(name):
            yield name


def known_uses(scope: Scope, evidence: Evidence | None) -> Mapping[Expert, ExpertUse] | None:
    """How often experts are used, where the method goes by it: what others measured changes no plan."""
    return None if evidence is None or "prior" not in scope.request.method.needs else evidence.prior


def reads_of(scope: Scope, evidence: Evidence | None) -> Reads | None:
    """What each matrix adds to the bytes that a token reads, and what is left for them; None without --min-speed.

    Raises BudgetError if even the narrowest choices are read too slowly.
    """
    config = scope.request.config
    if config.read_limit is None:
        return None
    reading = Reading.of(scope.checkpoint, known_uses(scope, evidence))
    shares = np.array([reading.matrices[matrix.name] for matrix in scope.matrices])
    table = np.ceil(data_table(scope, None) * shares[:, None]).astype(np.int64)
    kept = {**scope.fixed, **{matrix.name: Choice(16) for matrix in scope.matrices}}
    layout = scope.request.profile.writer.layout(scope.checkpoint, kept)
    rest = reading.total(layout, frozenset(matrix.name for matrix in scope.matrices))
    return Reads(table, config.read_limit - rest, rest)


def too_slow(reads: Reads, least: int, bandwidth: int) -> BudgetError:
    """The error of a speed that no choices reach. least: bytes that the narrowest read of what is planned."""
    fastest = bandwidth / (reads.rest + least)
    return BudgetError(
        f"--min-speed cannot be reached: at {bandwidth / 1e9:.4g} GB/s even the narrowest choices give "
        f"{math.floor(100 * fastest) / 100:g} tokens per second, {reads.rest + least:,} bytes read for each. Lower "
        "it, allow narrower --choices, or give fewer bits to what every token reads (--head-bits, --attention-bits)."
    )
