"""Ray beside one process: wall time on 1 and 2 nodes, bytes, a killed node, and the driver's memory as matrices grow.

    python benchmarks/cluster.py [--scratch DIR]

Every node is a group of processes of its own (`ray.cluster_utils.Cluster`). Writes benchmarks/results/cluster.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

RESULTS = Path(__file__).parent / "results" / "cluster.json"
SIDE = 32  # of a tiny expert matrix


def model(folder: Path, layers: int, experts: int, hidden: int, width: int) -> Path:
    """A checkpoint of the Qwen2-MoE family with random weights, bf16, a shard for each layer."""
    import torch
    from safetensors.torch import save_file

    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal((rows, columns), dtype=np.float32) * 0.02).bfloat16()

    index: dict[str, str] = {}

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    for layer in range(layers):
        stem = f"model.layers.{layer}"
        tensors = {
            f"{stem}.input_layernorm.weight": torch.ones(hidden).bfloat16(),
            f"{stem}.post_attention_layernorm.weight": torch.ones(hidden).bfloat16(),
            f"{stem}.mlp.gate.weight": weight(experts, hidden),
            **{f"{stem}.self_attn.{part}_proj.weight": weight(hidden, hidden) for part in "qkvo"},
        }
        for expert in range(experts):
            own = f"{stem}.mlp.experts.{expert}"
            tensors |= {f"{own}.{part}_proj.weight": weight(width, hidden) for part in ("gate", "up")}
            tensors[f"{own}.down_proj.weight"] = weight(hidden, width)
        shard(f"model-{layer:05d}.safetensors", tensors)
    ends = {"model.embed_tokens.weight": weight(128, hidden), "lm_head.weight": weight(128, hidden)}
    shard("model-ends.safetensors", ends | {"model.norm.weight": torch.ones(hidden).bfloat16()})
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "head_dim": hidden // 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": layers,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": width,
        "intermediate_size": width,
        "vocab_size": 128,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def private_mib() -> float:
    """Memory of this process alone now, without what it shares with Ray's object store."""
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(fields[name].split()[0]) for name in ("Private_Clean", "Private_Dirty")) / 1024


def drive(address: str, folder: Path, apart: bool) -> dict[str, Any]:
    """Measure and quantize all matrices of a checkpoint on the cluster; this process's memory at each stage."""
    from alphaq import pipeline
    from alphaq.checkpoint.reader import open_checkpoint
    from alphaq.measuring.resources import Resources
    from alphaq.nouns.settings import Budget, PlanConfig
    from alphaq.planning import resolve
    from alphaq.work.cluster import RayWorkers

    before = private_mib()
    checkpoint = open_checkpoint(folder)
    opened = private_mib()
    seen: dict[str, list[float]] = {}

    def wrap(items: Any, total: int, label: str) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number % max(1, total // 50) == 0:
                seen.setdefault(label, []).append(private_mib())
            yield item

    with RayWorkers(address, checkpoint) as workers:
        if apart:
            workers.shares = lambda folder: False  # type: ignore[method-assign]
        joined = private_mib()
        request = resolve(PlanConfig(budget=Budget(bits=3), method="uniform", fast=True))
        plan = pipeline.make_plan(
            checkpoint, request, pipeline.measure_for_plan(checkpoint, request, resources=Resources(workers))
        )
        planned = private_mib()
        out = folder.parent / f"out-{os.getpid()}"
        begin = time.perf_counter()
        pipeline.quantize(checkpoint, plan, out, resources=pipeline.Resources(workers, wrap=wrap))
        seconds = time.perf_counter() - begin
        told = workers.told
    shutil.rmtree(out)
    return {
        "matrices": len(checkpoint.matrices),
        "private_mib": {"imported": before, "opened": opened, "joined": joined, "planned": planned},
        "growth_while_quantizing_mib": {label: max(values) - values[0] for label, values in seen.items()},
        "peak_resident_mib": peak_mib(),
        "seconds_to_quantize": seconds,
        "batches_out_at_most": told.most_out,
        "bytes_came_back_to_the_driver": apart,
    }


def stream(address: str, counts: list[int], nbytes: int) -> list[dict[str, Any]]:
    """The driver's memory while so many results of `nbytes` each pass through it."""
    import raycluster
    from alphaq.work.cluster import RayWorkers

    rows = []
    for count in counts:
        with RayWorkers(address, nbytes) as workers:
            first, most = 0.0, 0.0
            for number, _ in enumerate(workers.map(raycluster.array_of, range(count), lambda _: nbytes)):
                if number % 500 == 0:
                    now = private_mib()
                    first, most = first or now, max(most, now)
            rows.append(
                {
                    "results": count,
                    "mib_through_the_driver": count * nbytes / 2**20,
                    "private_mib_at_first": first,
                    "private_mib_at_most": most,
                    "batches_out_at_most": workers.told.most_out,
                }
            )
    return rows


def digest(folder: Path) -> str:
    """Of the names and bytes of a folder's files."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        found.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def killed(folder: Path) -> dict[str, Any]:
    """Quantize on two nodes, one of which is killed in the middle; the lines that tell of it, and both outputs."""
    import raycluster

    nodes = raycluster.Nodes(2)
    plan, base = folder.parent / "killed.json", [sys.executable, "-m", "alphaq"]
    one, many = folder.parent / "killed-one", folder.parent / "killed-many"
    for out in (one, many):
        shutil.rmtree(out, ignore_errors=True)
    try:
        subprocess.run([*base, "plan", folder, "--bits", "3", "--fast", "--method", "uniform", "-o", plan], check=True)
        quantize = [*base, "quantize", folder, "--plan", plan, "-o"]
        subprocess.run([*quantize, one, "--workers", "1"], check=True, stdout=subprocess.DEVNULL)
        journal = folder.parent / f".{many.name}.partial" / "journal.jsonl"
        run = subprocess.Popen(
            [*quantize, many, "--cluster", f"ray:{nodes.address}"], stderr=subprocess.PIPE, text=True
        )
        while run.poll() is None and not (journal.is_file() and journal.read_bytes().count(b"\n") > 40):
            time.sleep(0.01)
        noted = journal.read_bytes().count(b"\n")
        nodes.kill(nodes.nodes[0])
        told = run.communicate()[1]
        return {
            "entries_noted_when_killed": noted,
            "exit_code": run.returncode,
            "lines": [line for line in told.splitlines() if "again, after a loss" in line],
            "identical": digest(one) == digest(many),
        }
    finally:
        nodes.stop()


def child(*arguments: str) -> dict[str, Any]:
    ran = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(ran.stderr)
    return json.loads(ran.stdout.splitlines()[-1])


def timed(address: str | None, folder: Path, workers: int) -> dict[str, float]:
    """Seconds of `analyze` and `quantize --plan` as a user runs them, on the cluster or with processes."""
    how = ["--workers", str(workers)] + ([] if address is None else ["--cluster", f"ray:{address}"])
    plan, out = folder.parent / "timed.json", folder.parent / "timed-out"
    base = [sys.executable, "-m", "alphaq"]
    if not plan.exists():
        subprocess.run([*base, "plan", folder, "--bits", "3", "--fast", "--method", "uniform", "-o", plan], check=True)
    found = {}
    for name, rest in {
        "analyze": ["analyze", folder, "-o", folder.parent / "timed.csv", "--no-cache"],
        "quantize": ["quantize", folder, "--plan", plan, "-o", out],
    }.items():
        begin = time.perf_counter()
        subprocess.run([*base, *rest, *how], check=True, stdout=subprocess.DEVNULL)
        found[name] = time.perf_counter() - begin
    shutil.rmtree(out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, default=Path("bench-cluster"))
    parser.add_argument("--drive", nargs=3, metavar=("ADDRESS", "FOLDER", "APART"))
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 10_000, 70_000])
    parser.add_argument("--only", choices=("memory", "times", "killed"), nargs="+")
    given = parser.parse_args()
    if given.drive:
        address, folder, apart = given.drive
        sys.stdout.write(json.dumps(drive(address, Path(folder), apart == "apart")) + "\n")
        return
    import raycluster

    only = given.only or ("memory", "times", "killed")
    result: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"benchmark": "cluster"}
    result |= {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count()}

    def note(name: str, value: Any) -> None:
        result[name] = {"load_before": os.getloadavg()[0], "found": value}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        sys.stderr.write(f"{name}: {json.dumps(value)}\n")

    if "killed" in only:
        note("killed", killed(model(given.scratch / "small" / "m", 2, 60, 512, 352)))
    nodes = raycluster.Nodes(2)
    try:
        if "memory" in only:
            note("stream", stream(nodes.address, given.counts, 4096))
            rows = []
            for count in given.counts:
                folder = model(given.scratch / f"tiny-{count}" / "m", 8, round(count / 24), SIDE, SIDE)
                for apart in ("shared", "apart"):
                    rows.append(child("--drive", nodes.address, str(folder), apart))
                    note("driver", rows)
        if "times" in only:
            folder = model(given.scratch / "medium" / "m", 2, 60, 2048, 1408)
            times = {f"{n} processes": timed(None, folder, n) for n in (1, 2)}
            times |= {f"{n} nodes": timed(nodes.address, folder, n) for n in (1, 2)}
            source = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            note("times", {"source_bytes": source, **times})
    finally:
        nodes.stop()


if __name__ == "__main__":
    main()
