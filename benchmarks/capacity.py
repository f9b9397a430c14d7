"""How long a cluster takes, and what that costs: a formula, a simulation of the scheduler, and what was measured.

    python benchmarks/capacity.py

The rates of a core are those of benchmarks/results/end_to_end.json. What could not be measured (store, network, price)
is an assumption, named in `ASSUMED`. The simulation runs the scheduler's own `batches` and `choose`. Writes
benchmarks/results/capacity.json.
"""

from __future__ import annotations

import heapq
import json
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

from alphaq.work.batches import Node, batches, choose

HERE = Path(__file__).parent
ASSUMED = {
    "cores_per_node": 8,
    "node_bytes_per_s": 1.25e9,  # 10 Gbit/s
    "store_bytes_per_s": 100e9 / 8,  # of all nodes together
    "request_s": 0.03,
    "dollars_per_core_hour": 0.05,
    "dollars_per_1000_reads": 0.0004,
    "start_s": 20.0,  # a process on each core imports torch
    "driver_s_per_batch": 0.003,
    "driver_s_per_matrix": 0.0003,
}
STAGES = {"analyze": 1, "plan": 1, "quantize": 2}
"""How often each reads the weights: `quantize` checks what it wrote against the source."""


@dataclass(frozen=True)
class Model:
    """A checkpoint: parameters, bytes on disk, matrices of experts and weights in each."""

    name: str
    parameters: float
    source_bytes: float
    matrices: int
    weights: int


MODELS = (
    Model("Mixtral-8x7B", 46.7e9, 93.4e9, 32 * 8 * 3, 4096 * 14336),
    Model("DeepSeek-V3 (FP8)", 671e9, 689e9, 58 * 256 * 3, 2048 * 7168),
    Model("Kimi-K2 (bf16)", 1.03e12, 2.06e12, 60 * 384 * 3, 2048 * 7168),
)
CORES = (1, 8, 64, 512)


def rates() -> dict[str, float]:
    """Weights in a second on a core, of whole commands, from the largest model measured."""
    sizes = json.loads((HERE / "results" / "end_to_end.json").read_text())["rows"]["sizes"]
    largest = max(sizes, key=lambda size: size["parameters"])
    cpu = {"analyze": "analyze", "plan": "plan, 2.5 bits", "quantize": "quantize"}
    return {stage: largest["parameters"] / largest["usages"][usage]["cpu_s"] for stage, usage in cpu.items()}


def nodes_of(cores: int) -> list[Node]:
    each = min(cores, ASSUMED["cores_per_node"])
    return [Node(str(index), str(index), int(each)) for index in range(max(1, cores // int(each)))]


def predicted(model: Model, stage: str, cores: int, rate: float) -> float:
    """Seconds: start, then the slowest of reading and computing in turn on each core, the store, and the driver."""
    read = model.source_bytes * STAGES[stage]
    nodes = len(nodes_of(cores))
    link = min(nodes * ASSUMED["node_bytes_per_s"], ASSUMED["store_bytes_per_s"])
    passes = STAGES[stage]
    # A core reads, at the speed of its node's link, then computes; the link itself is a bound of its own.
    reading = read / ASSUMED["node_bytes_per_s"] + passes * model.matrices * ASSUMED["request_s"]
    work = (model.parameters / rate + reading) / cores
    batch = max(1, (64 << 20) // (2 * model.weights))
    driver = passes * model.matrices * (ASSUMED["driver_s_per_matrix"] + ASSUMED["driver_s_per_batch"] / batch)
    return ASSUMED["start_s"] + max(work, read / link, driver)


def simulated(model: Model, stage: str, cores: int, rate: float) -> float:
    """Seconds by events: the scheduler's batches, its choice of nodes, its window, and links that serve in turn.

    The whole model is taken to be expert matrices of one size, in number and bytes those of the model.
    """
    nodes = nodes_of(cores)
    slots = sum(node.cores for node in nodes)
    passes = STAGES[stage]
    count = max(1, round(model.parameters / model.weights)) * passes
    nbytes = model.source_bytes * passes / count
    compute = model.parameters / count / rate
    each = batches(range(count), lambda _: round(2 * model.weights), lambda _: frozenset(), slots)
    idle = {node.id: node.cores for node in nodes}
    assigned: dict[str, int] = {}
    held: dict[str, deque[int]] = {node.id: deque() for node in nodes}
    link_free = {node.id: ASSUMED["start_s"] for node in nodes}
    store_free = ASSUMED["start_s"]
    events: list[tuple[float, int, str]] = []
    out: deque[tuple[int, int]] = deque()  # in order: number, tasks
    done: set[int] = set()
    now = driver = ASSUMED["start_s"]
    number = 0
    more = True

    def begin(node: str, batch: int, tasks: int, at: float) -> None:
        nonlocal store_free
        size = nbytes * tasks
        link_free[node] = max(link_free[node], at) + size / ASSUMED["node_bytes_per_s"]
        store_free = max(store_free, at) + size / ASSUMED["store_bytes_per_s"]
        read = max(link_free[node], store_free, at + tasks * ASSUMED["request_s"])
        heapq.heappush(events, (read + tasks * compute, batch, node))

    tasks_of: dict[int, int] = {}
    while out or more:
        while more and len(out) < 2 * slots + len(nodes):
            place = choose(nodes, assigned, frozenset(), False)
            if place is None and out:
                break
            batch = next(each, None)
            if batch is None:
                more = False
                break
            assert place is not None
            driver = max(driver, now) + ASSUMED["driver_s_per_batch"]
            tasks_of[number] = len(batch.tasks)
            out.append((number, len(batch.tasks)))
            assigned[place.id] = assigned.get(place.id, 0) + 1
            if idle[place.id]:
                idle[place.id] -= 1
                begin(place.id, number, len(batch.tasks), driver)
            else:
                held[place.id].append(number)
            number += 1
        if out and out[0][0] in done:
            first, tasks = out.popleft()
            done.remove(first)
            driver = max(driver, now) + tasks * ASSUMED["driver_s_per_matrix"]
            continue
        if not events:
            break
        now, finished, where = heapq.heappop(events)
        done.add(finished)
        assigned[where] -= 1
        if held[where]:
            following = held[where].popleft()
            begin(where, following, tasks_of[following], now)
        else:
            idle[where] += 1
    return max(now, driver)


def main() -> None:
    rate = rates()
    rows = []
    for model in MODELS:
        for cores in CORES:
            row = {"model": model.name, "cores": cores}
            total = {"predicted_s": 0.0, "simulated_s": 0.0}
            for stage in ("plan", "quantize"):
                found = {
                    "predicted_s": predicted(model, stage, cores, rate[stage]),
                    "simulated_s": simulated(model, stage, cores, rate[stage]),
                }
                row[stage] = found
                total = {key: total[key] + found[key] for key in total}
            reads = 3 * model.parameters / model.weights * max(1, 2 * model.weights / (8 << 20))
            hours = total["predicted_s"] / 3600
            row |= total | {
                "dollars": hours * cores * ASSUMED["dollars_per_core_hour"]
                + reads / 1000 * ASSUMED["dollars_per_1000_reads"]
            }
            rows.append(row)
            sys.stderr.write(f"{row}\n")
    sizes = json.loads((HERE / "results" / "end_to_end.json").read_text())["rows"]["sizes"]
    real = [
        {
            "model": size["model"],
            "command": usage,
            "measured_s": size["usages"][usage]["wall_s"],
            "two_cores_at_the_rate_of_the_largest_s": size["parameters"] / rate[stage] / 2,
        }
        for size in sizes
        for stage, usage in {"analyze": "analyze", "plan": "plan, 2.5 bits", "quantize": "quantize"}.items()
    ]
    result = {
        "benchmark": "capacity",
        "date": time.strftime("%Y-%m-%d"),
        "assumed": ASSUMED,
        "models": [asdict(model) for model in MODELS],
        "weights_per_core_second": rate,
        "rows": rows,
        "two_processes": real,
    }
    (HERE / "results" / "capacity.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
