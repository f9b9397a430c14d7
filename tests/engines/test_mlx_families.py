"""Families that MLX is written for by tables alone: mlx-lm itself computes what their files stand for."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from changed import MIXED, RUN, Change, changes, difference, model_of, saved

from alphaq.checkpoint.families.architecture import architectures
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.assumptions.tables import engine_table
from alphaq.engines.mlx.profile import ENGINE
from alphaq.engines.settings import require_settings
from alphaq.errors import ArchitectureError, PlanError
from conftest import FAMILIES, MORE_FAMILIES
from families import ONE_LAYOUT, UNLOADABLE, random_family, save_layout

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

EXACT = 1e-4
"""Relative to the largest logit: what sums in another order make of float32."""
OFTEN = {"dots1", "lfm2_moe", "gemma4", "qwen3_5_moe"}
"""Names, dense layers by other names, a model inside another, and norms that mlx-lm changes."""


@pytest.mark.parametrize(
    "model_type", [pytest.param(one, marks=() if one in OFTEN else pytest.mark.slow) for one in RUN]
)
def test_mlx_lm_computes_with_a_mixed_plan_what_its_files_stand_for(tmp_path: Path, model_type: str) -> None:
    assert difference(saved(tmp_path / "source", model_type), tmp_path, MIXED) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(RUN.keys() - ONE_LAYOUT - UNLOADABLE - {"kimi_k25"}))
def test_names_of_transformers_own_modules_are_written_as_those_of_the_hub(tmp_path: Path, model_type: str) -> None:
    source = save_layout(model_of(model_type), tmp_path / "source", published=False)
    assert difference(source, tmp_path, MIXED) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("model_type", RUN)
def test_every_setting_of_the_class_is_followed_or_refused(tmp_path: Path, model_type: str) -> None:
    """What the class itself refuses, or cannot run, is passed over; a wrapper's are those of what it wraps."""
    wrong = {}
    for number, change in enumerate(changes(model_type)):
        folder = tmp_path / str(number)
        folder.mkdir()
        if (found := _difference(folder, model_type, change)) >= EXACT:
            wrong[str(change)] = found
    assert not wrong


def _difference(folder: Path, model_type: str, change: Change) -> float:
    """0 for a change that is refused or cannot be."""
    try:
        source = saved(folder / "source", model_type, **copy.deepcopy(change.settings))
        require_settings(open_checkpoint(source), "mlx")
    except Exception:  # whatever a class does with a config that means nothing
        return 0.0
    try:
        return difference(source, folder, ("8g32",), "16")
    except RuntimeError:
        return 0.0  # of torch: the class builds a model that it cannot run


def test_every_family_of_the_table_is_run() -> None:
    """By a model of each; one of some is inside another."""
    known, families = {kind: one.name for kind, one in architectures().items()}, engine_table("mlx").families
    run = {kind if kind in families else known[kind] for kind in RUN if kind in known}
    assert run | FAMILIES.keys() | MORE_FAMILIES.keys() == families.keys()


@pytest.mark.parametrize("family", engine_table("mlx").refused)
def test_what_mlx_lm_computes_otherwise_is_refused_with_the_reason(tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(save_layout(random_family(family), tmp_path / "source", published=True))
    with pytest.raises(PlanError, match=engine_table("mlx").refused[family]):
        ENGINE.layout(checkpoint, {})


@pytest.mark.slow
def test_gemma_s_heads_of_full_attention_are_told_as_published(tmp_path: Path) -> None:
    """By names of its own; transformers saves them by layer, which mlx-lm does not read."""
    heads = dict(attention_k_eq_v=True, global_head_dim=32, num_global_key_value_heads=1)
    source = saved(tmp_path / "source", "gemma4_text", **heads)
    with pytest.raises(ArchitectureError, match="per_layer_config"):
        require_settings(open_checkpoint(source), "mlx")
    config = json.loads((source / "config.json").read_text())
    del config["per_layer_config"]
    (source / "config.json").write_text(json.dumps(config | heads))
    assert difference(source, tmp_path, MIXED) < EXACT


def test_settings_must_lie_where_mlx_lm_looks_for_them(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "gemma4")
    config = json.loads((source / "config.json").read_text())
    config["llm_config"] = config.pop("text_config")
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArchitectureError, match="elsewhere than under text_config"):
        ENGINE.layout(open_checkpoint(source), {})
