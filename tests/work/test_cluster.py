"""Work on a Ray cluster gives the bytes of one machine, also when nodes are lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'alphaq[ray]'")

import raycluster
from alphaq.errors import AlphaQError, DeviceError, QuantizationError, WorkerError
from alphaq.work.batches import BATCH_BYTES, BATCH_TASKS, Node, batches, choose, limited
from alphaq.work.cluster import RayWorkers, parse_cluster
from conftest import Ran
from contents import contents

ALL: frozenset[str] = frozenset()
OPTIONS = ("--bits", "2.5", "--method", "alphaq")


@pytest.fixture(scope="session")
def nodes() -> Iterator[raycluster.Nodes]:
    """Two nodes of one core."""
    started = raycluster.Nodes(2)
    yield started
    started.stop()


# -- decisions, without a cluster -----------------------------------------------------------------


def test_batches_hold_consecutive_tasks_of_the_same_files_up_to_their_bytes() -> None:
    made = list(batches(range(10_000), lambda task: 1 << 20, lambda task: frozenset({str(task // 5000)}), 2))
    assert [task for batch in made for task in batch.tasks] == list(range(10_000))
    assert max(batch.nbytes for batch in made) == BATCH_BYTES
    assert all(len({task // 5000 for task in batch.tasks}) == 1 for batch in made)
    assert [len(batch.tasks) for batch in made[:4]] == [1, 1, 2, 2]  # small at first, so that all get some


def test_tiny_tasks_are_counted_and_a_huge_one_travels_alone() -> None:
    assert max(len(batch.tasks) for batch in batches(range(9999), lambda _: 1, lambda _: ALL, 1)) == BATCH_TASKS
    sizes = [1, BATCH_BYTES * 3, 1]
    assert [len(batch.tasks) for batch in batches(sizes, lambda size: size, lambda _: ALL, 1)] == [1, 1, 1]


def test_work_goes_where_its_files_are_and_there_is_room() -> None:
    near, far = Node("a", "a", 4, files=frozenset({"1", "2"})), Node("b", "b", 8, files=frozenset({"2"}))
    assert choose([near, far], {}, frozenset({"2"}), False) == far
    assert choose([near, far], {"b": 8}, frozenset({"2"}), False) == near
    assert choose([near, far], {}, frozenset({"1"}), False) == near
    assert choose([near, far], {"a": 5}, frozenset({"1"}), False) is None  # four at work and one waiting
    assert choose([near, far], {}, frozenset({"3"}), False) is None


def test_spectra_for_a_card_go_to_nodes_with_one_and_the_rest_to_all() -> None:
    plain, with_card = Node("a", "a", 64), Node("b", "b", 8, cards=2)
    assert choose([plain, with_card], {}, ALL, on_card=True) == with_card
    assert choose([plain, with_card], {"b": 3}, ALL, on_card=True) is None
    assert choose([plain, with_card], {"a": 60}, ALL, on_card=False) == with_card
    assert choose([plain], {}, ALL, on_card=True) is None


def test_device_of_a_cluster_is_any_card_and_must_be_there() -> None:
    workers = RayWorkers("auto", None)
    workers.nodes = [Node("a", "a", 4)]
    with pytest.raises(DeviceError, match=r"No node .* has a GPU"):
        workers.require_card("cuda")
    workers.nodes.append(Node("b", "b", 4, cards=1))
    workers.require_card("cuda")
    with pytest.raises(DeviceError, match="write cuda"):
        workers.require_card("cuda:1")


def test_fewer_cores_are_taken_evenly() -> None:
    nodes = [Node("a", "a", 8), Node("b", "b", 1), Node("c", "c", 8)]
    assert [node.cores for node in limited(nodes, 7)] == [3, 1, 3]
    assert limited(nodes, None) == nodes and limited(nodes, 100) == nodes


def test_address_is_checked() -> None:
    assert (parse_cluster("ray"), parse_cluster("ray:10.0.0.1:6379")) == ("auto", "10.0.0.1:6379")
    with pytest.raises(AlphaQError, match="--cluster"):
        parse_cluster("dask:1.2.3.4")


def test_without_ray_the_flag_says_what_to_install(
    tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    ran = alphaq("analyze", tiny, "-o", tmp_path / "stats.csv", "--cluster", "ray", "--no-cache")
    assert ran.code == 2 and "pip install 'alphaq[ray]'" in ran.err
    assert alphaq("analyze", tiny, "-o", tmp_path / "stats.csv", "--workers", "1", "--no-cache").code == 0


# -- on a cluster ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_results_come_in_order_while_little_is_out(nodes: raycluster.Nodes) -> None:
    with RayWorkers(nodes.address, 3) as workers:
        assert workers.count == 2
        assert list(workers.map(raycluster.slow_square, range(60))) == [3 * task * task for task in range(60)]
        assert workers.told.most_out <= 2 * 2 + 3
        assert len([name for name, count in workers.told.nodes.items() if count]) == 2
        with pytest.raises(QuantizationError, match="task 5 cannot be"):
            list(workers.map(raycluster.fails, range(60)))
        with pytest.raises(ZeroDivisionError):
            list(workers.map(raycluster.defect, range(3)))


@pytest.mark.slow
def test_lost_process_is_told_and_made_up_for_a_few_times(nodes: raycluster.Nodes, tmp_path: Path) -> None:
    told: list[str] = []
    for times in (1, 99):
        (tmp_path / str(times)).mkdir()
    with RayWorkers(nodes.address, tmp_path / "1", log=told.append) as workers:
        assert list(workers.map(raycluster.killed, range(20))) == list(range(20))
    assert len(told) == 1 and "again, after a loss" in told[0] and "WorkerCrashedError" in told[0]
    with (
        RayWorkers(nodes.address, tmp_path / "99", log=told.append) as workers,
        pytest.raises(WorkerError, match="were lost 4 times"),
    ):
        list(workers.map(raycluster.killed, range(20)))


@pytest.mark.slow
def test_cluster_quantizes_to_the_bytes_of_one_machine(
    nodes: raycluster.Nodes, tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    plan = tmp_path / "plan.json"
    flags = ("--cluster", f"ray:{nodes.address}")
    assert alphaq("plan", tiny, "-o", tmp_path / "one.json", *OPTIONS, "--workers", "1", "--no-cache").code == 0
    assert alphaq("plan", tiny, "-o", plan, *OPTIONS, *flags, "--no-cache").code == 0
    assert plan.read_bytes() == (tmp_path / "one.json").read_bytes()
    assert alphaq("quantize", tiny, "-o", tmp_path / "one", "--plan", plan, "--workers", "1").code == 0
    ran = alphaq("quantize", tiny, "-o", tmp_path / "many", "--plan", plan, *flags)
    assert ran.code == 0, ran.err
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


@pytest.mark.slow
def test_nodes_without_the_output_s_folder_send_the_bytes(
    nodes: raycluster.Nodes, tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "plan.json"
    assert alphaq("plan", tiny, "-o", plan, *OPTIONS, "--workers", "1").code == 0
    assert alphaq("quantize", tiny, "-o", tmp_path / "one", "--plan", plan, "--workers", "1").code == 0
    flags = ("--cluster", f"ray:{nodes.address}")
    monkeypatch.setattr(RayWorkers, "shares", lambda self, folder: False)
    ran = alphaq("quantize", tiny, "-o", tmp_path / "apart", "--plan", plan, *flags)
    assert ran.code == 0, ran.err
    assert contents(tmp_path / "apart") == contents(tmp_path / "one")


def test_no_cluster_is_one_line(tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran]) -> None:
    ran = alphaq("analyze", tiny, "-o", tmp_path / "s.csv", "--cluster", "ray:127.0.0.1:1", "--no-cache")
    assert ran.code == 2 and "No Ray cluster can be joined" in ran.err


@pytest.mark.slow
def test_node_killed_in_the_middle_changes_no_byte(tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran]) -> None:
    """Of a cluster of its own, whose nodes are separate processes; another node joins later."""
    own = raycluster.Nodes(2)
    try:
        plan = tmp_path / "plan.json"
        assert alphaq("plan", tiny, "-o", plan, *OPTIONS, "--workers", "1").code == 0
        assert alphaq("quantize", tiny, "-o", tmp_path / "one", "--plan", plan, "--workers", "1").code == 0
        from alphaq import pipeline
        from alphaq.checkpoint.reader import open_checkpoint
        from alphaq.nouns.plan import Plan

        told: list[str] = []
        checkpoint = open_checkpoint(tiny)
        with RayWorkers(own.address, checkpoint, log=told.append) as workers:
            seen = []

            def wrap(items: Any, total: int, label: str) -> Iterator[Any]:
                for item in items:
                    seen.append(label)
                    if label == "quantize" and seen.count(label) == 12:
                        own.kill(own.nodes[0])
                    yield item

            pipeline.quantize(
                checkpoint, Plan.read(plan), tmp_path / "many", resources=pipeline.Resources(workers, wrap=wrap)
            )
        assert any("again, after a loss" in line for line in told), told
        assert contents(tmp_path / "many") == contents(tmp_path / "one")
    finally:
        own.stop()


@pytest.mark.slow
def test_killed_driver_resumes_on_the_cluster(
    nodes: raycluster.Nodes, tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    plan, journal = tmp_path / "plan.json", tmp_path / ".many.partial" / "journal.jsonl"
    assert alphaq("plan", tiny, "-o", plan, *OPTIONS, "--workers", "1").code == 0
    assert alphaq("quantize", tiny, "-o", tmp_path / "one", "--plan", plan, "--workers", "1").code == 0
    command = [sys.executable, "-m", "alphaq", "quantize", str(tiny), "-o", str(tmp_path / "many")]
    command += ["--plan", str(plan), "--cluster", f"ray:{nodes.address}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not (journal.is_file() and journal.read_bytes().count(b"\n") > 20):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "many").exists()
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


@pytest.mark.slow
def test_work_for_a_card_runs_on_the_node_that_has_one(nodes: raycluster.Nodes) -> None:
    """A card in name only: where work goes is what is looked at."""
    with_card = nodes.add(1, num_gpus=1)
    try:
        with RayWorkers(nodes.address, None) as workers:
            ids = {node.id for node in workers.nodes if node.cards}
            assert set(workers.map(raycluster.where, range(20), on_card=True)) == ids
            assert len(set(workers.map(raycluster.where, range(60)))) > 1
    finally:
        nodes.kill(with_card)


@pytest.mark.slow
def test_node_that_cannot_read_the_checkpoint_is_left_out(nodes: raycluster.Nodes, tiny: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from alphaq.checkpoint.files import Stamp
    from alphaq.checkpoint.reader import open_checkpoint

    checkpoint = open_checkpoint(tiny)
    other = replace(checkpoint, stamps=dict.fromkeys(checkpoint.stamps, Stamp(1, 1)))
    told: list[str] = []
    with pytest.raises(WorkerError, match="cannot read the weights"), RayWorkers(nodes.address, other, log=told.append):
        pass


@pytest.mark.slow
def test_node_that_joins_without_the_output_s_folder_is_left_out(nodes: raycluster.Nodes, tmp_path: Path) -> None:
    told: list[str] = []
    with RayWorkers(nodes.address, None, log=told.append) as workers:
        assert workers.shares(tmp_path)
        before = {node.id for node in workers.nodes}
        workers._seeing = lambda folder, asked: 0  # as if the new one had another disk
        late = nodes.add(1)
        try:
            workers._refresh()
            assert {node.id for node in workers.nodes} == before
            assert any(f"cannot write into {tmp_path}" in line for line in told), told
            assert set(workers.map(raycluster.where, range(20))) <= before
        finally:
            nodes.kill(late)
