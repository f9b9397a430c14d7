"""Running models: ours packed in transformers, the same in 16 bits, and llama.cpp on our GGUF of the same size.

    python benchmarks/runtime.py [MODEL ...] [--cases trained mixtral qwen] [--bits 2 t2 3.5] [--rounds 3]

Every contestant is a process of its own (runtime_contestant.py) that has its model loaded and waits; they are asked
in turn, so that a slow moment of the machine hits all of them alike. Ratios are medians over the rounds of the
quotient within a round.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from pathlib import Path
from random import Random
from typing import Any

from common import HERE, PAUSE_S, SCRATCH, markdown_table, parser, results_folder, save

from alphaq.formats.ggml import GGML_BLOCKS

TITLE = "Running quantized models on the CPU"
DEMO_MODEL = HERE.parent / "src" / "alphaq" / "data" / "tiny"
CASES = {
    "trained": "Trained models",
    "mixtral": "One layer of Mixtral 8x7B's shape (8 experts, 2 chosen, of 4096 × 14336)",
    "qwen": "One layer of Qwen1.5-MoE-A2.7B's shape (60 experts, 4 chosen, of 2048 × 1408, and a shared one)",
}
TRAINED_BITS = ("2", "2.5", "3", "4")
LAYER_BITS = ("2", "t2", "2.5", "3", "t3", "3.5", "4")
VOCABULARY = 4096
PREFILL, PROMPT, SEQUENCES = 512, 16, 8
LENGTH = 512  # of llama.cpp's sequences
BASELINE = "bf16"
K_TYPES = ("Q2_K", "Q3_K", "Q4_K")  # in order of size; rows of multiples of 256
SHORT_TYPES = ("Q4_0", "Q5_0")  # of multiples of 32
SMALL_TYPES = ("IQ2_XXS", "IQ2_XXS", "IQ2_XS")  # of gate, up and down: as many bytes as native 2 bits
PARTS = ("gate", "up", "down")
RECORDED = ", recorded"
TRAINED_TARGETS = tuple(("decode", f"{bits}{RECORDED}", "llama.cpp", 0.6) for bits in TRAINED_BITS)
LAYER_TARGETS = (  # measure, bits, against, least quotient
    *(("prefill", bits, BASELINE, 1.0) for bits in LAYER_BITS),
    *(("prefill", bits, "llama.cpp", 0.4) for bits in LAYER_BITS),
)
MIXTRAL_TARGETS = (
    ("decode", "2", BASELINE, 1.7),
    ("decode", "3.5", BASELINE, 1.3),
    ("decode", "t2", BASELINE, 2.0),
    ("decode", "t2", "native 2", 0.6),
    *(("decode", bits, "llama.cpp", 0.7) for bits in LAYER_BITS),
)
MEASURES = {"decode": "decode, 1 sequence", "decode_many": f"decode, {SEQUENCES} sequences", "prefill": "prefill"}
ABOUT = """\
Tokens per second. *bf16*: transformers, as `from_pretrained` gives the model, with its default way to run experts;
*native*: the same call on what `alphaq quantize` wrote, weights packed in memory; *llama.cpp*: on the GGUF file that
`alphaq quantize --engine llama.cpp` wrote with experts of the same size, as nearly as its types allow, with a 16-bit
cache and its own choice of attention. Attention and shared experts have about 4 bits, embedding and head are kept in 16
bits, in both. Threads of each: {threads}. Decoding begins after 16 tokens; prefill is a prompt of 512 tokens, with
the logits of each. *recorded*: small models' tokens after the prompt by a list of operations (`--record`). Trained
models decode greedily; layers of random weights get random tokens, as their own would repeat. bits/weight is what an
expert's weight takes in the file, scales included; "×" is a quotient of speeds: more than 1 is faster.

*native t2* are trellis codes, which llama.cpp has not; on layers they were drawn at random, as were llama.cpp's: they
take minutes to find, and as long as any others to multiply with. There llama.cpp has its K types,
which it runs fastest, and at 2 bits, where those are too large, IQ2. Rows
of Qwen's down projections (1408) are no multiples of 256; Q4_0 is the smallest type for them, so that its files are
larger than ours.

Memory is what a process grew by, counted from when a small model of the same kind had been loaded and dropped:
*loading* its peak while loading, *resident* after one forward pass over 512 tokens. For native models, *packed* are the
bytes of all packed matrices, and the quotient is everything resident but the other parameters by them: what the pass
holds, 15 to 80 MiB here, counts, so that it says nothing for small models."""
LAYER_ABOUT = """\
The block alone: one token at a time through the experts of its layer, every call with the next ones, so that nothing
is left in a cache. GB/s are bytes of the chosen experts' weights by time."""


@dataclass(frozen=True)
class Case:
    """A model and what is done with it.

    trained: tokens are the model's own; otherwise weights are random and llama.cpp gets the types that it runs fastest.
    short_down: rows of its down projections are no multiples of 256. planned: widths are AlphaQ's plan; otherwise as
    even as can be.
    """

    name: str
    source: Path
    trained: bool
    bits: tuple[str, ...]
    steps: int
    steps_many: int
    block_calls: int = 0
    planned: bool = False
    short_down: bool = False


@dataclass
class Contestant:
    """A process with a model in it. bits_per_weight: stored, of experts; kind: bf16, native or llama.cpp."""

    label: str
    kind: str
    bits: str
    folder: Path
    bits_per_weight: float
    file_bytes: int
    recorded: bool = False
    memory: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None

    def start(self, small: Path, threads: int) -> None:
        """Load the model and wait until it is."""
        engine = "llama.cpp" if self.kind == "llama.cpp" else "transformers"
        options = {"threads": threads, "length": LENGTH, "recorded": self.recorded}
        request = {"options": options, "prompt": random_tokens(1, PREFILL)[0], "small": str(small)}
        command = [sys.executable, str(HERE / "runtime_contestant.py"), engine, str(self.folder), json.dumps(request)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.memory = self._answer()

    def ask(self, do: str, **values: Any) -> Any:
        """Have it do something and wait."""
        assert self.process is not None and self.process.stdin is not None  # it was started
        self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process is not None and self.process.stdout is not None  # it was started
        if not (line := self.process.stdout.readline()):
            sys.exit(f"{self.label} ended with {self.process.wait()}; its error is above.")
        return json.loads(line)

    def stop(self) -> None:
        """End it."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


def random_tokens(sequences: int, tokens: int) -> list[list[int]]:
    """The same for all contestants, without the special token 0."""
    return [[Random(f"{row} {place}").randrange(1, VOCABULARY) for place in range(tokens)] for row in range(sequences)]


def alphaq(*arguments: str | Path) -> dict[str, Any]:
    """The command line of the installed package; returns what it prints as JSON."""
    command = [sys.executable, "-m", "alphaq", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def quantized(source: Path, out: Path, *options: str) -> dict[str, Any]:
    """A checkpoint's quantized folder, made if missing, and what was printed of it."""
    printed = out.with_name(f"{out.name}.json")
    if not printed.is_file():
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        found = alphaq("quantize", source, "-o", out, *options)
        kept = {key: found[key] for key in ("bits_per_weight", "size_bytes")}
        printed.write_text(json.dumps(kept), encoding="utf-8")
        sys.stderr.write(f"{out.name}: quantized in {time.perf_counter() - start:.0f} s\n")
    return json.loads(printed.read_bytes())


def nearest_types(bits_per_weight: float, bits: str, short_down: bool) -> tuple[str, ...]:
    """Types of gate, up and down whose mean is nearest, from those that llama.cpp runs fastest."""
    mixes: list[tuple[str, ...]] = [SMALL_TYPES] if bits == "2" else list(combinations_with_replacement(K_TYPES, 3))
    if short_down:
        mixes = [(gate, up, down) for gate, up, _ in mixes for down in SHORT_TYPES]
    return min(mixes, key=lambda mix: abs(statistics.mean(map(stored_bits, mix)) - bits_per_weight))


def stored_bits(name: str) -> float:
    """Bits per weight of a ggml type."""
    _, weights, nbytes = GGML_BLOCKS[name]
    return 8 * nbytes / weights


def drawn(source: Path, out: Path, *options: str) -> dict[str, Any]:
    """`quantized` for types whose codes take minutes to find: they are drawn at random instead."""
    printed = out.with_name(f"{out.name}.json")
    if not printed.is_file():
        plan = out.with_name(f"{out.name}.plan")
        shutil.rmtree(out, ignore_errors=True)
        found = alphaq("plan", source, "-o", plan, *options)
        script = [sys.executable, str(HERE / "runtime_random.py"), str(source), str(out), "--plan", str(plan)]
        subprocess.run(script, check=True)
        kept = {key: found[key] for key in ("bits_per_weight", "size_bytes")}
        printed.write_text(json.dumps(kept), encoding="utf-8")
    return json.loads(printed.read_bytes())


LLAMA_KEPT = ("--embedding-bits", "16", "--head-bits", "16")


def contestants(case: Case, work: Path) -> Iterator[Contestant]:
    """Quantize the model at every width and for both engines."""
    size = sum(path.stat().st_size for path in case.source.glob("*.safetensors"))
    yield Contestant("bf16", BASELINE, "16", case.source, 16.0, size)
    method = () if case.planned else ("--method", "uniform")
    for bits in case.bits:
        ours, rate = work / f"{case.name}-native-{bits}", bits.removeprefix("t")
        trellis = bits != rate
        codes = ("--choices", bits) if trellis else ("--fast",)
        make = drawn if trellis and not case.trained else quantized
        found = make(case.source, ours, "--bits", rate, *codes, *method)
        bpw = found["bits_per_weight"]
        yield Contestant(f"native {bits}", "native", bits, ours, bpw, found["size_bytes"])
        if case.trained:
            label = f"native {bits}{RECORDED}"
            yield Contestant(label, "native", bits, ours, bpw, found["size_bytes"], recorded=True)
        if trellis:  # llama.cpp has no such codes
            continue
        theirs = work / f"{case.name}-llama.cpp-{bits}"
        engine = ("--engine", "llama.cpp", *LLAMA_KEPT, *method)
        if case.trained:
            found = quantized(case.source, theirs, *engine, "--bpw", f"{bpw:.4f}")
        else:
            mix = nearest_types(bpw, bits, case.short_down)
            pins = [word for part, name in zip(PARTS, mix, strict=True) for word in ("--pin", f"{part}={name}")]
            found = drawn(
                case.source, theirs, *engine, *pins, "--bpw", f"{statistics.mean(map(stored_bits, mix)) + 1e-3:.4f}"
            )
        label = f"llama.cpp {bits}"
        yield Contestant(label, "llama.cpp", bits, theirs, found["bits_per_weight"], found["size_bytes"])


def measured(case: Case, runners: Sequence[Contestant], rounds: int) -> dict[str, Any]:
    """Seconds per token of every measure, contestant and round; a round before them is not counted."""
    steps = {"decode": (1, case.steps), "decode_many": (SEQUENCES, case.steps_many)}
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in (*MEASURES, "block")}
    touched: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name in (*MEASURES, *(["block"] if case.block_calls else [])):
            for runner in runners:
                if name == "block" and runner.kind == "llama.cpp":
                    continue
                time.sleep(PAUSE_S)
                if name == "prefill":
                    taken = runner.ask("prefill", ids=random_tokens(1, PREFILL)) / PREFILL
                elif name == "block":
                    found = runner.ask("block", calls=case.block_calls)
                    taken, touched[runner.label] = found["seconds"], found["bytes"]
                else:
                    sequences, count = steps[name]
                    count = count if turn else 2
                    prompts = random_tokens(sequences, PROMPT)
                    forced = (
                        None if case.trained else [row[PROMPT:] for row in random_tokens(sequences, PROMPT + count)]
                    )
                    taken = runner.ask("decode", prompts=prompts, steps=count, forced=forced) / (sequences * count)
                if turn:
                    seconds[name].setdefault(runner.label, []).append(taken)
        sys.stderr.write(f"{case.name}: round {turn} of {rounds}\n")
    return {"seconds": seconds, "touched": touched}


def run_case(case: Case, work: Path, small: dict[str, Path], rounds: int, threads: int) -> dict[str, Any]:
    """All contestants on one model."""
    runners = list(contestants(case, work))
    try:
        for runner in runners:
            runner.start(small[runner.kind], threads)
        found = measured(case, runners, rounds)
        found["ceilings"] = runners[0].ask("ceilings")
    finally:
        for runner in runners:
            runner.stop()
    rows = [
        {key: getattr(runner, key) for key in ("label", "kind", "bits", "bits_per_weight", "file_bytes", "memory")}
        for runner in runners
    ]
    return {"case": case.name, "trained": case.trained, "contestants": rows, **found}


def quotient(result: dict[str, Any], measure: str, label: str, other: str) -> float | None:
    """How many times as fast as another a contestant is, or None without the other."""
    seconds = result["seconds"][measure]
    if label not in seconds or other not in seconds or label == other:
        return None
    return statistics.median(theirs / own for theirs, own in zip(seconds[other], seconds[label], strict=True))


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def speeds(result: dict[str, Any]) -> str:
    """One table of a case: sizes and speeds."""
    header = ["", "bits/weight", "file MB"]
    for name in MEASURES.values():
        header += [name, "× bf16", "× llama.cpp"]
    rows = []
    for one in result["contestants"]:
        row = [one["label"], f"{one['bits_per_weight']:.2f}", f"{one['file_bytes'] / 1e6:,.1f}"]
        for measure in MEASURES:
            rate = 1 / statistics.median(result["seconds"][measure][one["label"]])
            theirs = f"llama.cpp {one['bits']}"
            row += [
                f"{rate:,.1f}" if rate < 1000 else f"{rate:,.0f}",
                _times(quotient(result, measure, one["label"], BASELINE)),
                _times(quotient(result, measure, one["label"], theirs) if one["kind"] == "native" else None),
            ]
        rows.append(row)
    return markdown_table(header, rows)


def resident(one: dict[str, Any]) -> float | None:
    """What a native model holds beside its other parameters, by the bytes of its packed matrices."""
    memory = one["memory"]
    if one["kind"] != "native":
        return None
    return (memory["resident_bytes"] - memory["plain_bytes"]) / memory["packed_bytes"]


def memories(result: dict[str, Any]) -> str:
    """One table of a case: memory."""
    rows = [
        [
            one["label"],
            f"{one['memory']['peak_loading_bytes'] / 2**20:,.1f}",
            f"{one['memory']['resident_bytes'] / 2**20:,.1f}",
            f"{one['memory']['packed_bytes'] / 2**20:,.1f}" if one["kind"] == "native" else "",
            _times(resident(one)),
        ]
        for one in result["contestants"]
    ]
    return markdown_table(["", "loading MiB", "resident MiB", "packed MiB", "resident ÷ packed"], rows)


def blocks(result: dict[str, Any]) -> str:
    """One table of a case: the experts alone."""
    ceiling = result["ceilings"]
    rows = []
    for label, taken in result["seconds"]["block"].items():
        speed = result["touched"][label] / statistics.median(taken)
        rows.append(
            [
                label,
                f"{1e3 * statistics.median(taken):,.2f}",
                f"{result['touched'][label] / 1e6:,.1f}",
                f"{speed / 1e9:,.1f}",
                f"{100 * speed / ceiling['read']:.0f} %",
                _times(quotient(result, "block", label, BASELINE)),
            ]
        )
    text = f"Reading memory, and doing nothing else, goes at {ceiling['read'] / 1e9:.1f} GB/s here; copying, at "
    text += f"{ceiling['copy'] / 1e9:.1f} GB/s read and written together."
    header = ["experts alone", "ms per token", "MB per token", "GB/s", "of reading", "× bf16"]
    return f"{LAYER_ABOUT} {text}\n\n{markdown_table(header, rows)}"


def targets(result: dict[str, Any]) -> str:
    """What was to be reached, and what was."""
    rows = []
    asked = TRAINED_TARGETS if result["trained"] else LAYER_TARGETS
    for measure, bits, against, least in asked + (MIXTRAL_TARGETS if result["case"] == "mixtral" else ()):
        other = f"{against} {bits.removesuffix(RECORDED)}" if against == "llama.cpp" else against
        if (found := quotient(result, measure, f"native {bits}", other)) is not None:
            met = "yes" if found >= least else "**no**"
            rows.append([f"{MEASURES[measure]}, native {bits} by {other}", f"≥ {least}", f"{found:.2f}", met])
    for one in result["contestants"]:
        if not result["trained"] and (share := resident(one)) is not None:
            met = "yes" if share <= 1.05 else "**no**"
            rows.append([f"resident ÷ packed, {one['label']}", "≤ 1.05", f"{share:.3f}", met])
    return markdown_table(["target", "", "measured", "met"], rows)


def render(results: Sequence[dict[str, Any]], threads: int, quick: bool) -> str:
    """All cases as Markdown."""
    parts = [ABOUT.format(threads=threads)]
    for result in results:
        heading = f"The trained model {result['case']}" if result["trained"] else CASES[result["case"]]
        parts += [f"### {heading}{', TOY SIZES' if quick else ''}", speeds(result), memories(result)]
        if not result["trained"]:
            parts.append(blocks(result))
        if not quick:
            parts.append(targets(result))
    return "\n\n".join(parts)


def layer(name: str, work: Path, quick: bool) -> Path:
    """A checkpoint of one layer of random weights, made if missing, by a process whose memory is not ours."""
    folder = work / f"{name}-source"
    if not folder.exists():
        script = [sys.executable, str(HERE / "runtime_random.py"), name, str(folder)]
        subprocess.run([*script, *(["--quick"] if quick else [])], check=True)
        for path in DEMO_MODEL.glob("tokenizer*"):
            shutil.copy(path, folder)
    return folder


def wanted(given: Any, work: Path) -> Iterator[Case]:
    """The cases that were asked for; a layer's checkpoint is made when its turn comes."""
    quick = given.quick
    trained_bits = tuple(given.bits or (("2",) if quick else TRAINED_BITS))
    layer_bits = tuple(given.bits or (("2", "3.5") if quick else LAYER_BITS))
    many = 4 if quick else 16
    if "trained" in given.cases:
        for model in (DEMO_MODEL, *given.models):
            source, steps = model.resolve(), 16 if quick else 128
            yield Case(source.name, source, True, trained_bits, steps, 2 * many, planned=not quick)
    if "mixtral" in given.cases:
        steps = 8 if quick else 32
        yield Case("mixtral", layer("mixtral", work, quick), False, layer_bits, steps, many, 16)
    if "qwen" in given.cases:
        steps = 8 if quick else 64
        yield Case("qwen", layer("qwen", work, quick), False, layer_bits, steps, many, 60, short_down=not quick)


def earlier(quick: bool) -> dict[str, dict[str, Any]]:
    """Cases of earlier runs by name, which stay until they are run again."""
    path = results_folder(quick) / "runtime.json"
    rows = json.loads(path.read_bytes())["rows"] if path.is_file() else []
    return {row["case"]: row for row in rows}


def main() -> None:
    """Run, show and keep."""
    arguments = parser(__doc__)
    arguments.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="trained ones beside the bundled one")
    arguments.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES), help="all by default")
    arguments.add_argument("--bits", nargs="+", metavar="BITS", help="widths to run, t2 for a trellis; all by default")
    arguments.add_argument("--rounds", type=int, help="5 by default")
    arguments.add_argument("--threads", type=int, default=os.cpu_count(), help="of every contestant; all cores")
    arguments.add_argument("--scratch", type=Path, default=SCRATCH, help="folder for checkpoints, about 12 GB")
    arguments.add_argument("--keep", action="store_true", help="keep the checkpoints for the next run")
    given = arguments.parse_args()
    if sys.platform != "linux":
        sys.exit("This benchmark reads Linux's /proc. Run it on Linux.")
    work: Path = given.scratch.resolve() / ("runtime-quick" if given.quick else "runtime")
    work.mkdir(parents=True, exist_ok=True)
    quantized(DEMO_MODEL, work / "small-native", "--bits", "3", "--fast", "--method", "uniform")
    llama_options = ("--engine", "llama.cpp", "--bits", "3", "--method", "uniform", "--choices", "Q2_K,Q3_K,Q4_K")
    quantized(DEMO_MODEL, work / "small-llama.cpp", *llama_options)
    small = {BASELINE: DEMO_MODEL, "native": work / "small-native", "llama.cpp": work / "small-llama.cpp"}
    results = earlier(given.quick)
    for case in wanted(given, work):
        results[case.name] = run_case(case, work, small, given.rounds or (1 if given.quick else 5), given.threads)
        save(
            "runtime",
            TITLE,
            list(results.values()),
            render(list(results.values()), given.threads, given.quick),
            given.quick,
        )
        if not case.trained and not given.keep:
            for path in work.glob(f"{case.name}-*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main()
