"""What the AlphaQ paper (arXiv 2606.04980) gives for its three models, to stand beside ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Figures = Mapping[float, float]
"""By bits of an expert weight; 16 are the model as it was."""
ByMethod = Mapping[str, Figures]


@dataclass(frozen=True)
class Published:
    """One model's figures by method. perplexity: on WikiText-2; tasks: mean accuracy of six zero-shot tasks in per
    cent; memory_gb; speed: of decoding, against bfloat16. Rounded by GPTQ in groups of 128."""

    perplexity: ByMethod = field(default_factory=dict)
    tasks: ByMethod = field(default_factory=dict)
    memory_gb: ByMethod = field(default_factory=dict)
    speed: ByMethod = field(default_factory=dict)


PUBLISHED = {
    "deepseek-v2-lite": Published(
        {
            "reference": {16: 6.31},
            "uniform": {2.5: 8.14, 3.5: 6.83},
            "pmq": {2.5: 6.95, 3.5: 6.57},
            "paper": {2.5: 6.64, 3.5: 6.44},
        },
        {
            "reference": {16: 71.01},
            "uniform": {2.5: 65.15, 3.5: 69.09},
            "pmq": {2.5: 65.75, 3.5: 69.75},
            "paper": {2.5: 66.74, 3.5: 70.07},
        },
    ),
    "qwen1.5-moe-a2.7b": Published(
        {
            "reference": {16: 7.22},
            "uniform": {2.5: 10.36, 3.5: 8.13},
            "pmq": {2.5: 9.01, 3.5: 7.42},
            "paper": {2.5: 8.14, 3.5: 7.38},
        },
        {
            "reference": {16: 67.93},
            "uniform": {2.5: 51.99, 3.5: 65.94},
            "pmq": {2.5: 62.18, 3.5: 67.75},
            "paper": {2.5: 65.17, 3.5: 68.04},
        },
        {"reference": {16: 28.9}, "paper": {2.5: 6.4, 3.5: 7.6}},
    ),
    "mixtral-8x7b-v0.1": Published(
        {
            "reference": {16: 3.84},
            "uniform": {2.5: 6.16, 3.5: 4.29},
            "pmq": {2.5: 5.32, 3.5: 4.25},
            "paper": {2.5: 5.17, 3.5: 4.23},
        },
        {
            "reference": {16: 77.36},
            "uniform": {2.5: 67.86, 3.5: 73.81},
            "pmq": {2.5: 70.38, 3.5: 73.32},
            "paper": {2.5: 70.76, 3.5: 74.29},
        },
        {"reference": {16: 96.8}, "paper": {2: 13.4, 2.5: 16.3, 3: 19.1, 3.5: 22.0}},
        {"paper": {2: 1.68, 2.5: 1.49, 3: 1.31, 3.5: 1.17}},
    ),
}


def published_of(name: str) -> Published:
    """What the paper gives for a model of exactly this name; nothing for others, such as its chat version."""
    return PUBLISHED.get(name.lower(), Published())


def cell(figures: ByMethod, method: str, bits: float, digits: int = 2) -> str:
    """A figure of the paper, or a dash."""
    own = figures.get(method, {})
    return f"{own[bits]:.{digits}f}" if bits in own else "–"
