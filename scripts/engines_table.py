"""Which engine runs which family of experts: write the table in docs/models.md.

A cell says "verified" where the family is in the engine's table (`src/alphaq/engines/assumptions/ENGINE.toml`), each
of which is run by `make test`, `make test-vllm` or `make test-gptqmodel`: a cell that fails is a test that fails.
llama.cpp's are those of docs/engines/gguf-families.md.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from alphaq.checkpoint.families.architecture import Architecture, architectures
from alphaq.engines.assumptions.tables import engine_table

ROOT = Path(__file__).parents[1]
PAGE, GGUF = ROOT / "docs" / "models.md", ROOT / "docs" / "engines" / "gguf-families.md"
BEGIN, END = "<!-- engines: begin -->\n", "<!-- engines: end -->\n"
HEAD = """| family | llama.cpp | MLX | vLLM | GPTQModel |
|---|---|---|---|---|
"""
YES, NONE, LATER = "verified", "no such model", "not yet"
_GPTQMODEL = """
    afmoe axk2 bailing_hybrid bailing_moe cohere2_moe dbrx deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32
    deepseek_v4 deepseek_vl_v2 dots1 ernie4_5_moe gemma4 glm4_moe glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa gpt_oss
    granitemoe hunyuan_v1_moe hy_v3 inkling jamba kimi_k25 laguna lfm2_moe llama4 longcat_flash mimo_v2_flash minimax
    minimax_m2 minimax_m3_vl mixtral nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe qwen3_moe qwen3_next qwen3_omni_moe
    qwen3_vl_moe qwen4_exp solar_open unlimited_ocr"""
GPTQMODEL = frozenset(_GPTQMODEL.split())
"""Families that GPTQModel 7.7.0 has a definition of (`MODEL_MAP` in gptqmodel/models/auto.py)."""
_VLLM = """
    afmoe aria axk1 axk2 bailing_hybrid bailing_moe cohere2_moe dbrx deepseek deepseek_ocr2 deepseek_v2 deepseek_v3
    deepseek_v32 deepseek_v4 deepseek_vl_v2 dots1 dots3_note ernie4_5_moe exaone_moe flex_olmo gemma4 glm4_moe
    glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa gpt_oss granitemoe hunyuan_v1_moe hy_v3 hy_v4 inkling jamba jetmoe
    kimi_k25 kimi_linear laguna lfm2_moe llama4 longcat_flash mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl
    mistral4 mixtral nemotron_h olmoe openai_privacy_filter phimoe qwen2_moe qwen3_5_moe qwen3_moe qwen3_next
    qwen3_omni_moe qwen3_vl_moe qwen4_exp solar_open step3p7 unlimited_ocr zaya"""
VLLM = frozenset(_VLLM.split())
"""Families that vLLM 0.32.0 has a class of (vllm/model_executor/models/registry.py), or transformers 5.19, which vLLM
allows and whose classes it can take."""
MLX_NAMES = {"hunyuan_v1_moe": "hunyuan", "minimax_m2": "minimax", "step3p7": "step3p5", "minimax": ""}
"""What mlx-lm calls those that it calls otherwise, "" where a module of the same name is of another family."""


def llama_cpp() -> dict[str, str]:
    """Cells by `model_type`, as `make gguf-families` found them."""
    text = GGUF.read_text(encoding="utf-8")
    found = dict.fromkeys(re.findall(r"^\| (\w+) \|.*\| (?:ok|kept as stored: .*) \|$", text, re.M), YES)
    missing = re.search(r"^The converter has no such model: (.*)\.$", text, re.M)
    return found | dict.fromkeys(missing[1].split(", ") if missing else [], NONE)


def tried(engine: str, family: str) -> str | None:
    """The cell of a family that the engine has been asked for; None of another."""
    table = engine_table(engine)
    if family in table.families:
        return f"{YES}, {table.notes[family]}" if family in table.notes else YES
    return f"refused: it {table.refused[family]}" if family in table.refused else None


def mlx(family: str) -> str:
    """The cell of MLX."""
    module = MLX_NAMES.get(family, family)
    has = module and find_spec(f"mlx_lm.models.{module}") is not None
    return tried("mlx", family) or (LATER if has else NONE)


def vllm(family: str) -> str:
    """The cell of vLLM."""
    return tried("vllm", family) or (LATER if family in VLLM else NONE)


def gptqmodel(family: str) -> str:
    """The cell of GPTQModel."""
    return tried("gptqmodel", family) or (LATER if family in GPTQMODEL else NONE)


def row(one: Architecture, converted: dict[str, str]) -> str:
    """The line of a family."""
    names = [name for name in (*one.model_types, one.name) if name in converted]
    cells = [
        min((converted[name] for name in names), key=[YES, LATER, NONE].index, default=LATER),
        mlx(one.name),
        vllm(one.name),
        gptqmodel(one.name),
    ]
    return f"| {one.name} | {' | '.join(cells)} |"


def table() -> str:
    """The whole table, with its counts."""
    known = {one.name: one for one in architectures().values() if one.num_experts_keys}
    converted = llama_cpp()
    rows = [row(known[name], converted) for name in sorted(known)]
    columns = list(zip(*(line.strip("| ").split(" | ") for line in rows), strict=True))[1:]
    counts = " | ".join(f"{sum(cell.startswith(YES) for cell in column)}" for column in columns)
    return HEAD + "\n".join(rows) + f"\n| **verified** | {counts} |\n"


def main() -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")
    print(f"mlx-lm {version('mlx-lm')}")


if __name__ == "__main__":
    main()
