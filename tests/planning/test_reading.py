"""Bytes that a token reads, and the speed that a plan is to reach."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from safetensors.torch import save_file

from alphaq import planning
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.formats.table import format_of, parse_choice
from alphaq.nouns.matrix import Role
from alphaq.nouns.rates import Rates
from alphaq.planning.reading import Reading
from conftest import Ran
from families import EXPERTS, random_family, save_layout

SaveFamily: TypeAlias = Callable[..., Path]

QUICK = ("--method", "distortion", "--noise", "analytic", "--engine", "native")


def planned(alphaq: Callable[..., Ran], model: Path, *options: str) -> dict[str, object]:
    ran = alphaq("plan", model, *QUICK, *options, "--json")
    assert ran.code == 0, ran.err
    told: dict[str, object] = ran.json
    return told


def test_a_token_reads_the_experts_it_goes_to_and_all_else_but_the_embedding(
    tiny: Path, alphaq: Callable[..., Ran]
) -> None:
    plan = planned(alphaq, tiny, "--size", "14MB", "--choices", "4", "--attention-bits", "16", "--shared-bits", "16")
    config = json.loads((tiny / "config.json").read_text())
    checkpoint, expected = open_checkpoint(tiny), 0.0
    share = config["num_experts_per_tok"] / config["num_experts"]
    choices: dict[str, str] = plan["choices"]  # type: ignore[assignment]
    for matrix in checkpoint.matrices:
        choice = parse_choice(choices.get(matrix.name, "16"))
        nbytes = format_of(choice).storage_bytes(choice, matrix.shape)
        tied = not checkpoint.with_role(Role.HEAD)
        factor = share if matrix.role is Role.EXPERT else 0.0 if matrix.role is Role.EMBEDDING and not tied else 1.0
        expected += factor * nbytes
    assert expected <= plan["read_bytes"] < expected * 1.02  # type: ignore[operator]  # norms and the like


@pytest.mark.parametrize(
    ("family", "settings"), [("dbrx", {}), ("hunyuan_v1_moe", {"moe_topk": [2, 2, 2]}), ("qwen3_vl_moe", {})]
)
def test_experts_that_a_token_goes_to_are_found_where_families_say_so(
    tmp_path: Path, family: str, settings: dict[str, object]
) -> None:
    checkpoint = open_checkpoint(save_layout(random_family(family, **settings), tmp_path / "model", published=False))
    reading = Reading.of(checkpoint)
    shares = {matrix.role: reading.share(matrix) for matrix in checkpoint.matrices}
    assert shares[Role.EXPERT] == 2 / EXPERTS and shares[Role.ATTENTION] == 1.0
    of_images = {name for name in checkpoint.shard_of if "visual" in name}
    unread = {name for name, role in checkpoint.roles.items() if role is Role.OTHER and reading.share(name) == 0.0}
    assert unread == of_images and bool(of_images) == (family == "qwen3_vl_moe")


def test_rows_of_a_table_and_layers_beyond_the_last_are_not_read(tmp_path: Path, save_family: SaveFamily) -> None:
    folder = Path(shutil.copytree(save_family("qwen3_moe"), tmp_path / "model"))
    unread = ["model.embed_tokens_per_layer.weight", "model.layers.3.self_attn.q_proj.weight", "mtp.fc.weight"]
    read = "model.per_layer_model_projection.weight"
    save_file({name: torch.zeros(8, 8) for name in (*unread, read)}, folder / "more.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys((*unread, read), "more.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    reading = Reading.of(open_checkpoint(folder))
    assert [reading.share(name) for name in (*unread, read)] == [0.0, 0.0, 0.0, 1.0]


def test_a_speed_is_a_second_budget(tiny: Path, alphaq: Callable[..., Ran]) -> None:
    free = planned(alphaq, tiny, "--size", "7500KB")
    limit = int(0.9 * free["read_bytes"])  # type: ignore[call-overload]
    fast = planned(alphaq, tiny, "--size", "7500KB", "--min-speed", "1000", "--bandwidth", f"{1000 * limit}B/s")
    assert fast["read_bytes"] <= limit and fast["size_bytes"] <= 7_500_000  # type: ignore[operator]
    assert fast["objective"] > free["objective"]  # type: ignore[operator]
    gap = fast["objective"] - fast["lower_bound"]  # type: ignore[operator]
    assert gap <= 1e-9 * fast["objective"]  # type: ignore[operator]
    assert fast["config"]["bandwidth"] == f"{1000 * limit}B/s"  # type: ignore[index]


def test_what_is_faster_than_narrower_choices_is_taken(tiny: Path, alphaq: Callable[..., Ran]) -> None:
    """Three bits are twice as slow as eight here: a speed that only eight bits reach is no reason for fewer."""
    rates = Rates(memory=10**9, formats=(("3g128", 10**8), ("8g128", 10**9)), layer_ns=2000, token_ns=5000)
    options = ("--choices", "3g128,8g128", "--roles", "fixed", "--size", "15MB")
    slow = planned(alphaq, tiny, *options, "--min-bits", "3", "--max-bits", "3")
    fast = planned(alphaq, tiny, *options)
    times = [
        rates.token_time_ns(plan["reads"]["by_choice"], plan["reads"]["layers"])  # type: ignore[index]
        for plan in (slow, fast)
    ]
    assert times[1] < times[0] and fast["read_bytes"] > slow["read_bytes"]  # type: ignore[operator]
    speed = ("--min-speed", f"{10**9 / (times[1] + 100_000)}", "--bandwidth", str(rates))
    again = planned(alphaq, tiny, *options, *speed)
    assert again["choices"] == fast["choices"] and again["config"]["bandwidth"] == str(rates)  # type: ignore[index]
    failed = alphaq("plan", tiny, *QUICK, *options, *speed, "--max-bits", "3")
    assert failed.code and "even the fastest choices give" in " ".join(failed.err.split())


def test_a_speed_means_nothing_without_the_matrices(tmp_path: Path, alphaq: Callable[..., Ran]) -> None:
    (tmp_path / "stats.csv").write_text("name,alpha,variance\na,2,1\nb,3,1\n")
    from_stats = ("plan", "--stats", tmp_path / "stats.csv", *QUICK[:4], "--bits", "3")
    assert alphaq(*from_stats).code == 0
    failed = alphaq(*from_stats, "--min-speed", "1e12", "--bandwidth", "1GB/s")
    assert failed.code and "need to know the matrices" in " ".join(failed.err.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--min-speed", "1e9", "--bandwidth", "1GB/s"), "even the fastest choices give"),
        (("--min-speed", "10", "--bandwidth", "fast"), "is no rate of memory"),
        (("--min-speed", "10", "--bandwidth", "1GB/h"), "is no rate of memory"),
        (("--min-speed", "10", "--bandwidth", "1GB/s,2g128"), "is no rate of memory"),
        (("--min-speed", "10", "--bandwidth", "1GB/s,2g128=1GB/s,2g128=2GB/s"), "names a format twice"),
        (("--min-speed", "10", "--bandwidth", "1GB/s,layer=5"), "is no rate of memory"),
        (("--min-speed", "0", "--bandwidth", "1GB/s"), "min_speed"),
        (("--min-speed", "10", "--bandwidth", "1GB/s", "--per-layer"), "not solved together"),
        (("--min-speed", "10", "--bandwidth", "1GB/s", "--method", "uniform"), "needs losses"),
        (("--min-speed", "10", "--bandwidth", "1GB/s", "--codec", "zstd"), "Drop --codec"),
    ],
)
def test_speeds_that_cannot_be_are_refused(
    tiny: Path, alphaq: Callable[..., Ran], options: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "fastest" not in words:
        monkeypatch.setattr(planning, "measure_for_plan", lambda *_, **__: pytest.fail("something was measured"))
    failed = alphaq("plan", tiny, *QUICK, "--size", "7500KB", *options)
    assert failed.code and words in " ".join(failed.err.split())
