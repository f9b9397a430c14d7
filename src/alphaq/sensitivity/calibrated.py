"""Rules that need a text: what its tokens do to each expert, as the literature weighs it.

- `pmq` (MC-MoE, arXiv 2410.06270): φₑ · wₑ^1.5 · εₑ(b), with φ the activation frequency, w the mean routing
  weight, both normalised over the layer's experts, and ε the Frobenius error of the block's output when the
  whole expert is stored at b bits.
- `baq` (arXiv 2506.05664): c·2^(−2b), c from the squared range and the inverse Hessian's diagonal. Its closed
  form, equal marginal loss everywhere, is the relaxation of what the exact solver minimises here.
- `hessian`: routing-weighted trace of XᵀX per column × Σ(w − ŵ)².
- `mse-output`: squared error of the block's output with only this matrix rounded.
"""

from __future__ import annotations

import numpy as np

from alphaq.calibration.traffic import Calibration
from alphaq.formats.table import code_bits
from alphaq.sensitivity.base import Evidence

WEIGHT_EXPONENT = 1.5


def _text_pass(evidence: Evidence) -> Calibration:
    assert evidence.calibration is not None  # methods that call this ask for it
    return evidence.calibration


def pmq(evidence: Evidence) -> np.ndarray:
    """The expert's loss, shared equally by its matrices; float64 [matrices, choices]."""
    of_text = _text_pass(evidence)
    totals: dict[int, float] = {}
    for (number, _), use in of_text.experts.items():
        totals[number] = totals.get(number, 0.0) + use.mean_weight
    members: dict[object, int] = {}
    keys = [(matrix.layer, matrix.expert or 0) for matrix in evidence.matrices]
    for key in keys:
        members[key] = members.get(key, 0) + 1
    rows = []
    for key in keys:
        layer, expert = key
        assert layer is not None  # what is planned lies in layers
        use = of_text.experts[layer, expert]
        weight = use.mean_weight / totals[layer] if totals[layer] else 0.0
        errors = of_text.block_errors[layer, expert]
        share = use.frequency * weight**WEIGHT_EXPONENT / members[key]
        rows.append([share * errors[choice] for choice in evidence.choices])
    return np.array(rows)


def baq(evidence: Evidence) -> np.ndarray:
    """c·2^(−2b), float64 [matrices, choices]."""
    of_text = _text_pass(evidence)
    constants = np.array([of_text.matrices[name].baq for name in evidence.names])
    return constants[:, None] * np.array([0.0 if c.kept else 4.0 ** -code_bits(c) for c in evidence.choices])


def hessian(evidence: Evidence) -> np.ndarray:
    """trace(H) / columns · Σ(w − ŵ)², float64 [matrices, choices]."""
    of_text = _text_pass(evidence)
    return np.array([of_text.matrices[name].hessian_trace for name in evidence.names])[:, None] * evidence.errors


def output_error(evidence: Evidence) -> np.ndarray:
    """Σ w²‖y − ŷ‖² per token, float64 [matrices, choices]."""
    of_text = _text_pass(evidence)
    return np.array(
        [[of_text.matrices[name].output_errors[choice] for choice in evidence.choices] for name in evidence.names]
    )
