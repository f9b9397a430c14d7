"""Bytes of weights that a token reads, and how long that takes: what decides how fast a model writes.

A token reads every weight of attention, shared experts, routers and the head, those experts that its router chooses,
and one row of the embedding, which counts as nothing unless the head is tied to it. Nothing of what images and sound go
through is read for text:

    seconds per token = Σ share·bytes ÷ rate + layers·c + d,   share = chosen ÷ experts, or what the prior expects,

with the rate of the format that a matrix is stored in (`nouns.rates`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from alphaq.allocation.problem import Times
from alphaq.calibration.traffic import Expert, ExpertUse
from alphaq.checkpoint.families.architecture import NUMBERED_LAYER
from alphaq.checkpoint.families.prefixes import language_prefix
from alphaq.checkpoint.families.routing import experts_in, experts_per_token
from alphaq.checkpoint.families.wrappers import OTHER_PARTS
from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.export import Entry, Layout
from alphaq.errors import BudgetError
from alphaq.formats.kept import KEPT
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.nouns.plan import Reads
from alphaq.nouns.rates import SECOND_NS, Rates
from alphaq.planning.costs import data_table
from alphaq.planning.scope import Scope
from alphaq.sensitivity.base import Evidence

KEPT_NAME = str(KEPT)
_LOOKED_UP = re.compile(r"(?:.*\.)?(?:embed_tokens_per_layer|per_layer_token_embd|nextn\.embed_tokens)\.weight")
"""Tables of which a token reads a row, and that no head is tied to."""


@dataclass(frozen=True)
class Reading:
    """Which share of each matrix or tensor a token reads. matrices: by name; tensors: those that matrices lie in.

    layers: how many it goes through. held: types of the tensors of a GGUF file that the model
    comes from.
    """

    matrices: Mapping[str, float]
    tensors: Mapping[str, float]
    layers: int
    held: Mapping[str, str]

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
        unread = dict.fromkeys(_unread(checkpoint), 0.0)
        return cls(matrices, unread | tensors, architecture.layers(config), _held(checkpoint))

    def share(self, source: MatrixRef | str) -> float:
        """Of what an entry of a layout holds."""
        return self.tensors.get(source, 1.0) if isinstance(source, str) else self.matrices[source.name]

    def reads(self, layout: Layout, without: frozenset[str] = frozenset()) -> Reads:
        """What a token reads of files, rounded up. without: names of matrices that do not count."""
        read: dict[MatrixRef | str, tuple[float, str]] = {}
        for entry in layout.entries:  # a tied embedding is written twice where llama.cpp insists, and read once
            name = entry.source if isinstance(entry.source, str) else entry.source.name
            if name not in without:
                nbytes = sum(place.nbytes for place in entry.places) * self.share(entry.source)
                read[entry.source] = max(read.get(entry.source, (0.0, "")), (nbytes, self._stored_as(entry)))
        by_choice: dict[str, list[float]] = {}
        for nbytes, choice in read.values():
            by_choice.setdefault(choice, []).append(nbytes)
        sums = {choice: math.ceil(math.fsum(by_choice[choice])) for choice in sorted(by_choice)}
        return Reads(by_choice={choice: nbytes for choice, nbytes in sums.items() if nbytes}, layers=self.layers)

    def _stored_as(self, entry: Entry) -> str:
        """The choice as which an entry is read: what is copied stays what it is in a GGUF file, where 16 bits are
        BF16 unless they are called F16."""
        if entry.form.raw and isinstance(entry.source, str):
            held = self.held.get(entry.source, KEPT_NAME)
            return KEPT_NAME if held == "BF16" else held
        return KEPT_NAME if entry.choice is None else str(entry.choice)


def _held(checkpoint: Checkpoint) -> dict[str, str]:
    """Types of a GGUF file's tensors, which may be copied."""
    return {} if checkpoint.gguf is None else {name: checkpoint.gguf_tensor(name).type for name in checkpoint.shard_of}


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


def times_of(scope: Scope, evidence: Evidence | None) -> Times | None:
    """Nanoseconds that each matrix adds to a token's, and what is left for them; None without --min-speed."""
    config = scope.request.config
    if config.token_limit_ns is None or config.bandwidth is None:
        return None
    reading = Reading.of(scope.checkpoint, known_uses(scope, evidence))
    shares = np.array([reading.matrices[matrix.name] for matrix in scope.matrices])
    ns_per_byte = np.array([SECOND_NS / config.bandwidth.of(str(choice)) for choice in scope.request.choices])
    table = np.ceil(np.ceil(data_table(scope, None) * shares[:, None]) * ns_per_byte).astype(np.int64)
    kept = {**scope.fixed, **{matrix.name: Choice(16) for matrix in scope.matrices}}
    layout = scope.request.profile.writer.layout(scope.checkpoint, kept)
    rest = reading.reads(layout, frozenset(matrix.name for matrix in scope.matrices))
    rest_ns = config.bandwidth.token_time_ns(rest.by_choice, rest.layers)
    return Times(table, config.token_limit_ns - rest_ns, rest_ns)


def too_slow(times: Times, least: int, rates: Rates) -> BudgetError:
    """The error of a speed that no choices reach. least: nanoseconds that what is planned takes at its fastest."""
    fastest = SECOND_NS / (times.rest + least)
    return BudgetError(
        f"--min-speed cannot be reached: at {rates.words} even the fastest choices give "
        f"{math.floor(100 * fastest) / 100:g} tokens per second. Lower it, allow other --choices, or give fewer bits "
        "to what every token reads (--head-bits, --attention-bits)."
    )
