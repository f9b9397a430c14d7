"""The benchmark's stock mixes are those that llama.cpp's own quantizer wrote.

The golden types are read from files that `llama_model_quantize` of llama.cpp v0.5.0 made from our two trained
models: `tiny` (4 layers, 8 experts) and `moe22m` (6 layers, 16 experts), 2 heads per key-value head.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "stock_mixes.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="the benchmarks are not part of this copy")

WIDTH, VOCABULARY = 256, 4096
PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")

# (layers, experts), recipe: the type of most tensors, and of the others by layer.
EIGHT = {"attn_k": "Q8_0", "attn_v": "Q8_0", "attn_output": "Q5_K"}
GOLDEN: dict[tuple[int, int], dict[str, tuple[str, dict[str, str]]]] = {
    (4, 8): {
        "Q2_K": ("Q2_K", {**EIGHT, "ffn_down": "Q3_K"}),
        "Q3_K_S": ("Q3_K", EIGHT),
        "Q3_K_M": ("Q3_K", {**EIGHT, "ffn_down": "Q4_K"}),
        "Q4_K_S": ("Q4_K", EIGHT),
        "Q4_K_M": ("Q4_K", {**EIGHT, "ffn_down": "Q4_K Q4_K Q6_K Q6_K"}),
        "Q5_K_M": ("Q5_K", {**EIGHT, "ffn_down": "Q5_K Q5_K Q6_K Q6_K"}),
        "Q6_K": ("Q6_K", {**EIGHT, "attn_output": "Q6_K"}),
        "IQ4_XS": ("IQ4_XS", EIGHT),
    },
    (6, 16): {
        "Q2_K": ("Q2_K", {"attn_v": "Q3_K", "attn_output": "Q3_K", "ffn_down": "Q3_K"}),
        "Q3_K_S": ("Q3_K", {}),
        "Q3_K_M": ("Q3_K", {"attn_v": "Q5_K Q5_K Q4_K Q4_K Q4_K Q4_K", "attn_output": "Q4_K", "ffn_down": "Q4_K"}),
        "Q4_K_S": ("Q4_K", {"attn_v": "Q5_K Q5_K Q5_K Q5_K Q4_K Q4_K"}),
        "Q4_K_M": ("Q4_K", dict.fromkeys(("attn_v", "ffn_down"), "Q4_K Q4_K Q6_K Q4_K Q4_K Q6_K")),
        "Q5_K_M": ("Q5_K", dict.fromkeys(("attn_v", "ffn_down"), "Q5_K Q5_K Q6_K Q5_K Q5_K Q6_K")),
        "Q6_K": ("Q6_K", {}),
        "IQ4_XS": ("IQ4_XS", {}),
    },
}


@pytest.fixture(scope="module")
def stock_types() -> Callable[..., dict[str, str]]:
    return runpy.run_path(str(SCRIPT))["stock_types"]


def model_shapes(layers: int, experts: int, expert_width: int = WIDTH) -> dict[str, tuple[int, ...]]:
    """A Qwen2-MoE's tensors, as `gguf` names them."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCABULARY, WIDTH),
        "output.weight": (VOCABULARY, WIDTH),
        "output_norm.weight": (WIDTH,),
    }
    for layer in range(layers):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{layer}.{part}.weight"] = (WIDTH if part in ("attn_q", "attn_output") else 128, WIDTH)
        for part, shape in {
            "ffn_gate": (expert_width, WIDTH),
            "ffn_up": (expert_width, WIDTH),
            "ffn_down": (WIDTH, expert_width),
        }.items():
            shapes[f"blk.{layer}.{part}_exps.weight"] = (experts, *shape)
            shapes[f"blk.{layer}.{part}_shexp.weight"] = shape
        shapes[f"blk.{layer}.attn_q.bias"] = shapes[f"blk.{layer}.ffn_norm.weight"] = (WIDTH,)
        shapes[f"blk.{layer}.ffn_gate_inp.weight"] = (experts, WIDTH)
        shapes[f"blk.{layer}.ffn_gate_inp_shexp.weight"] = (1, WIDTH)
    return shapes


@pytest.mark.parametrize(
    ("layers", "experts", "recipe"), [(*size, recipe) for size, recipes in GOLDEN.items() for recipe in recipes]
)
def test_types_are_those_of_the_real_quantizer(
    stock_types: Callable[..., dict[str, str]], layers: int, experts: int, recipe: str
) -> None:
    base, exceptions = GOLDEN[layers, experts][recipe]
    expected = {"token_embd.weight": base, "output.weight": "Q6_K"}
    for part in PARTS:
        types = exceptions.get(part, base).split()
        for layer in range(layers):
            for kind in ("",) if part.startswith("attn") else ("_exps", "_shexp"):
                expected[f"blk.{layer}.{part}{kind}.weight"] = types[layer % len(types)]
    assert stock_types(recipe, model_shapes(layers, experts), experts, heads_per_kv_head=2) == expected


@pytest.mark.parametrize(("width", "down"), [(1408, "Q8_0"), (40, "F16")])  # Qwen1.5-MoE's width; no type's
def test_rows_of_broken_blocks_get_a_substitute(
    stock_types: Callable[..., dict[str, str]], width: int, down: str
) -> None:
    types = stock_types("Q4_K_M", model_shapes(4, 16, width), 16, heads_per_kv_head=2)
    assert types["blk.3.ffn_down_exps.weight"] == down
    assert types["blk.3.ffn_up_exps.weight"] == "Q4_K"


def test_a_tied_embedding_is_treated_as_the_output(stock_types: Callable[..., dict[str, str]]) -> None:
    shapes = model_shapes(4, 16)
    del shapes["output.weight"]
    assert stock_types("Q2_K", shapes, 16, heads_per_kv_head=2)["token_embd.weight"] == "Q6_K"


def test_an_unknown_recipe_is_refused_with_the_known_ones(stock_types: Callable[..., dict[str, str]]) -> None:
    with pytest.raises(ValueError, match=r"Unknown recipe 'Q4_K'.*Q4_K_M"):
        stock_types("Q4_K", model_shapes(4, 8), 8, heads_per_kv_head=2)
