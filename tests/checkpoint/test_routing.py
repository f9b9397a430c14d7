"""Routers, and what else counts experts, must agree with the experts that are there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from alphaq.checkpoint.families.architecture import architectures
from alphaq.checkpoint.families.routing import OWN_COUNTS, check_routing
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.checkpoint.tensors import TensorInfo
from alphaq.errors import ArchitectureError
from conftest import EXPERTS, FAMILIES

FEWER = EXPERTS - 1


def changed_config(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_pruned_without_their_router_are_refused(
    save_family: Callable[..., Path], family: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(save_family(family), tmp_path / "pruned"))
    keys = [
        key
        for key in architectures()[family].num_experts_keys
        if key in json.loads((folder / "config.json").read_text())
    ]
    changed_config(folder, **dict.fromkeys(keys, FEWER))
    (folder / "model.safetensors.index.json").unlink()
    tensors = {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}
    for path in folder.glob("*.safetensors"):
        path.unlink()
    left = {name: one for name, one in tensors.items() if f".experts.{FEWER}." not in name}
    save_file(left, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ArchitectureError, match=rf"gate\.\w+ has {EXPERTS} rows for {FEWER} experts.*remove their rows too"
    ):
        open_checkpoint(folder)
    pruned = {
        name: one[:FEWER].clone() if ".mlp.gate." in name or "moe.gate." in name else one for name, one in left.items()
    }
    save_file(pruned, folder / "model.safetensors", {"format": "pt"})
    assert open_checkpoint(folder).architecture.name == family


def test_correction_bias_of_more_experts_than_there_are_is_refused(
    save_family: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(save_family("deepseek_v3"), tmp_path / "model"))
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        biases = {name: one.repeat(2) for name, one in tensors.items() if name.endswith("e_score_correction_bias")}
        save_file(tensors | biases, path, {"format": "pt"})
    with pytest.raises(
        ArchitectureError, match=rf"e_score_correction_bias has {2 * EXPERTS} rows for {EXPERTS} experts"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize("counts", [{"0": EXPERTS + 1}, {"0": 0}, {"7": 1}, {"0": True}, [2]])
def test_counts_of_layers_that_cannot_be_are_refused(
    save_family: Callable[..., Path], counts: object, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(save_family("qwen2_moe"), tmp_path / "model"))
    with pytest.raises(ArchitectureError, match=f"{OWN_COUNTS} is .* not 1 to {EXPERTS} experts for layers"):
        open_checkpoint(changed_config(folder, **{OWN_COUNTS: counts}))


def test_layers_must_have_as_many_experts_as_is_said_of_each(save_family: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(save_family("qwen2_moe"), tmp_path / "model"))
    with pytest.raises(ArchitectureError, match=r"not promised by config\.json: layer 1, expert 3"):
        open_checkpoint(changed_config(folder, **{OWN_COUNTS: {"1": EXPERTS - 1}}))


@pytest.mark.parametrize("chosen", [0, -1, EXPERTS + 1])
def test_more_experts_to_a_token_than_there_are_is_refused(
    save_family: Callable[..., Path], chosen: int, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(save_family("qwen2_moe"), tmp_path / "model"))
    with pytest.raises(ArchitectureError, match=rf"num_experts_per_tok is {chosen}, but a layer has {EXPERTS} experts"):
        open_checkpoint(changed_config(folder, num_experts_per_tok=chosen))


def checked(family: str, *shapes: tuple[int, ...], **config: Any) -> None:
    architecture = architectures()[family]
    config = dict.fromkeys(architecture.num_experts_keys, 8) | {"num_hidden_layers": 1} | config
    check_routing(architecture, config, [TensorInfo("router", "F32", shape, 0, 0) for shape in shapes])


@pytest.mark.parametrize("shape", [(8, 64), (8,), (1, 8), (8, 1, 1)])
def test_experts_may_be_counted_along_any_first_side(shape: tuple[int, ...]) -> None:
    checked("qwen3_moe", shape)


@pytest.mark.parametrize(
    ("family", "shape", "config"),
    [
        ("longcat_flash", (12, 64), dict(zero_expert_num=4, moe_topk=12)),  # experts without weights
        ("inkling_mm_model", (10, 64), dict(n_shared_experts=2)),  # shared ones have rows, but no correction
        ("inkling_mm_model", (8,), dict(n_shared_experts=2)),
        ("zaya", (9,), {}),  # a token may go to none
        ("hunyuan_v1_moe", (8, 64), dict(moe_topk=[2, 8])),
        ("deepseek_v2", (8, 64), dict(n_group=3, topk_group=1, topk_method="greedy", num_experts_per_tok=6)),
        ("deepseek_v3", (8, 64), dict(n_group=4, topk_group=2, num_experts_per_tok=4)),
        ("deepseek_v3", (8, 64), dict(n_group=None, topk_group=None, num_experts_per_tok=8)),
        ("qwen3_moe", (8, 64), dict(top_k=50)),  # how words are drawn
    ],
)
def test_routers_that_agree_are_accepted(family: str, shape: tuple[int, ...], config: dict[str, Any]) -> None:
    checked(family, shape, **config)


@pytest.mark.parametrize(
    ("family", "shape", "config", "words"),
    [
        ("longcat_flash", (10, 64), dict(zero_expert_num=4), "10 rows for 8 experts"),
        ("longcat_flash", (12, 64), dict(zero_expert_num=4, moe_topk=13), "moe_topk is 13, but a layer has 12"),
        ("hunyuan_v1_moe", (8, 64), dict(moe_topk=[2, 9]), "moe_topk is 9"),
        ("dbrx", (8, 64), dict(ffn_config=dict(moe_num_experts=8, moe_top_k=9)), "moe_top_k is 9"),
        ("deepseek_v3", (8, 64), dict(n_group=3, topk_group=1, num_experts_per_tok=2), "8 experts in 3 groups"),
        ("deepseek_v3", (8, 64), dict(n_group=4, topk_group=5, num_experts_per_tok=2), "of which 5"),
        ("deepseek_v3", (8, 64), dict(n_group=4, topk_group=1, num_experts_per_tok=4), "cannot give 4"),
    ],
)
def test_what_no_engine_can_route_is_refused(
    family: str, shape: tuple[int, ...], config: dict[str, Any], words: str
) -> None:
    with pytest.raises(ArchitectureError, match=words):
        checked(family, shape, **config)
