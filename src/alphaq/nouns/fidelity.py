"""How a model does on texts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

CERTIFICATE_NAME = "certificate.json"  # what a model's fidelity was, which says nothing of another's


@dataclass(frozen=True)
class TextFidelity:
    """How a model does on one text. KL, top-1 and EAR are against a reference model, else None.

    kl in nats, the mean over tokens, with their median and 99th percentile; ear = mean over tokens of Σᵥ min(p, q);
    interval is 95 % for perplexity.
    """

    perplexity: float
    perplexity_interval: tuple[float, float]
    tokens: int
    kl: float | None = None
    top1: float | None = None
    ear: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None


@dataclass(frozen=True)
class Fidelity:
    """Fidelity over several texts. begins_with: special tokens put before each window, in words.

    run_by: what computed with the model, and with the reference if there is one.
    """

    texts: dict[str, TextFidelity] = field(default_factory=dict)
    begins_with: str = ""
    run_by: tuple[str, ...] = ()

    @property
    def geomean_perplexity(self) -> float:
        """Geometric mean of the texts' perplexities."""
        return math.exp(sum(math.log(text.perplexity) for text in self.texts.values()) / len(self.texts))

    @property
    def mean_kl(self) -> float | None:
        """Mean of the texts' KL divergences, None without a reference."""
        values = [text.kl for text in self.texts.values() if text.kl is not None]
        return sum(values) / len(values) if values else None
