"""Which ggml type llama.cpp's own `llama-quantize` gives each tensor of a Mixture-of-Experts model.

A stock recipe such as Q4_K_M is a base type with exceptions: the output head, attention values and outputs, and
the down projections get more bits, some of them in some layers only; a model of exactly eight experts (Mixtral's
number) gets 8-bit keys and values. Described here: the recipes that need no importance matrix, run without one.

Source: `llama_tensor_get_type` in llama.cpp's src/llama-quant.cpp (2026). Compared, type by type, with what the
quantizer of llama.cpp v0.5.0 wrote: our two test models, and 1,200 files of random shapes (124 thousand tensors,
five architectures, 1 to 48 layers, 2 to 16 experts), without a difference. Left out, because no Mixture-of-Experts
model meets them: the exceptions for Falcon and for dense models of 80 layers.

The bytes are reproduced too, if `ggml_quantize_chunk` gets no importance matrix; with one of ones it weighs errors
alike and leaves less squared error (Q2_K: 0.072 instead of 0.088), so the stock file is not made with one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from alphaq.formats.ggml import GGML_BLOCKS

BASE: dict[str, str] = {
    **dict.fromkeys(("Q3_K_S", "Q3_K_M", "Q3_K_L"), "Q3_K"),
    **dict.fromkeys(("Q4_K_S", "Q4_K_M"), "Q4_K"),
    **dict.fromkeys(("Q5_K_S", "Q5_K_M"), "Q5_K"),
    **dict.fromkeys(("IQ3_S", "IQ3_M"), "IQ3_S"),
    **{name: name for name in ("Q2_K", "Q6_K", "IQ4_NL", "IQ4_XS", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")},
}

# For rows that are not whole blocks of 256. (Older releases took IQ4_NL for Q2_K and Q3_K.)
FALLBACK = {
    **dict.fromkeys(("Q2_K", "Q3_K"), "Q4_0"),
    **dict.fromkeys(("IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
}

EIGHT_EXPERTS_OUTPUT = {"Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS"}


def stock_types(
    recipe: str, shapes: Mapping[str, Sequence[int]], experts: int, heads_per_kv_head: int
) -> dict[str, str]:
    """The ggml type of each tensor that `llama-quantize recipe` would quantize, by its GGUF name.

    `shapes` holds all of the model's tensors, rows last ([experts, out, in], as PyTorch and `gguf`'s data have
    them, unlike its `shape`), with experts stacked. Tensors absent from the answer keep the type they have: norms,
    biases, routers. F16 stands for rows that no type fits. Raises ValueError for a recipe that is not in `BASE`.
    """
    if recipe not in BASE:
        raise ValueError(f"Unknown recipe {recipe!r}. Available: {', '.join(BASE)}.")
    layers = 1 + max(map(_layer, shapes))
    values = sorted(filter(_is_value, shapes), key=lambda name: (_layer(name), name))
    tied = "output.weight" not in shapes
    types: dict[str, str] = {}
    for name, shape in shapes.items():
        if not _is_quantized(name, shape):
            continue
        if name == "output.weight" or (tied and name == "token_embd.weight"):
            chosen = "Q8_0" if recipe == "Q8_0" or shape[-1] % GGML_BLOCKS[BASE[recipe]][1] else "Q6_K"
        elif _is_value(name):
            chosen = _value(recipe, values.index(name), len(values), experts, heads_per_kv_head)
        elif "attn_k.weight" in name:
            chosen = "Q8_0" if experts == 8 else BASE[recipe]
        elif "attn_output.weight" in name:
            chosen = _attention_output(recipe, experts)
        elif "ffn_down" in name:
            chosen = _down(recipe, _layer(name), layers, experts)
        else:
            chosen = BASE[recipe]
        types[name] = _fitting(chosen, shape[-1])
    return types


def _layer(name: str) -> int:
    """The layer of a tensor, −1 for one outside the layers."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _is_value(name: str) -> bool:
    return any(part in name for part in ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight"))


def _is_quantized(name: str, shape: Sequence[int]) -> bool:
    """Only matrices, and of those no norms and no routers."""
    dimensions = len(shape) - next((place for place, size in enumerate(shape) if size != 1), len(shape))
    return (
        dimensions >= 2
        and name.endswith("weight")
        and not name.endswith("_norm.weight")
        and "ffn_gate_inp.weight" not in name
    )


def _gets_more(place: int, count: int) -> bool:
    """The first and last eighth, and every third in between."""
    return place < count // 8 or place >= 7 * count // 8 or (place - count // 8) % 3 == 2


def _value(recipe: str, place: int, count: int, experts: int, heads_per_kv_head: int) -> str:
    if experts == 8:
        return "Q8_0"
    shared_widely = heads_per_kv_head >= 4
    match recipe:
        case "Q2_K":
            return "Q4_K" if shared_widely else "Q3_K"
        case "Q3_K_M":
            return "Q5_K" if place < 2 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "Q4_K_S" if place < 4:
            return "Q5_K"
        case "Q4_K_M" | "Q5_K_M" if _gets_more(place, count):
            return "Q6_K"
        case "IQ3_S" if shared_widely:
            return "Q4_K"
        case "IQ3_M":
            return "Q4_K"
        case "IQ4_NL" | "IQ4_XS" if shared_widely:
            return "Q5_K"
    return BASE[recipe]


def _attention_output(recipe: str, experts: int) -> str:
    if experts == 8:
        return "Q5_K" if recipe in EIGHT_EXPERTS_OUTPUT else BASE[recipe]
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}.get(recipe, BASE[recipe])


def _down(recipe: str, layer: int, layers: int, experts: int) -> str:
    """Down projections, of experts, shared experts and dense layers alike."""
    match recipe:
        case "Q2_K":
            return "Q3_K"
        case "Q3_K_M":
            return "Q5_K" if layer < layers // 16 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "Q4_K_S" | "IQ4_NL" | "IQ4_XS" if layer < layers // 8:
            return "Q5_K"
        case "Q4_K_M" | "Q5_K_M" if _gets_more(layer, layers):
            return "Q6_K"
        case "IQ3_M" if layer < layers // 8 or (experts == 8 and _gets_more(layer, layers)):
            return "Q4_K"
    return BASE[recipe]


def _fitting(chosen: str, columns: int) -> str:
    """The type itself if rows are whole blocks, else one with blocks of 32, else F16."""
    if columns % GGML_BLOCKS[chosen][1] == 0:
        return chosen
    return FALLBACK.get(chosen, chosen) if columns % 32 == 0 else "F16"
