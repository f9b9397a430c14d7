"""One model in one engine, in a process of its own that does what it is told: what `runtime.py` lets take turns.

    python benchmarks/runtime_contestant.py {transformers,llama.cpp} MODEL '{"threads": 2, …}'

It answers on standard output: first with what loading took of memory, then to every line of JSON with seconds.
Memory counts from a moment at which a small model of the same kind had been loaded, run and dropped, so that
libraries, compiled kernels and thread stacks are not taken for the model's.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

READ_BYTES = 512 << 20  # more than caches hold
SEED = 0


class Engine(Protocol):
    """What a contestant can do. ids: int64 [sequences, tokens]."""

    def prefill(self, ids: np.ndarray) -> float:
        """Seconds to read a prompt and give the logits after each of its tokens.

        Of the last alone, llama.cpp would run the last layer's experts for one token, and some models have one layer.
        """

    def decode(self, prompts: np.ndarray, steps: int, forced: np.ndarray | None) -> float:
        """Seconds of so many steps after the prompts: greedy, or with the tokens of forced, [sequences, steps]."""

    def facts(self) -> dict[str, Any]:
        """What there is to say of the loaded model."""

    def close(self) -> None:
        """Let go of it."""


class Transformers:
    """A model as `from_pretrained` gives it: in 16 bits, or packed if the folder holds our native format."""

    def __init__(self, folder: Path, threads: int, recorded: bool = False, **_: Any) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        import alphaq  # noqa: F401 - teaches transformers the native format

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.threads = threads
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        if recorded:
            from alphaq.runtime.decoding import record_tokens

            record_tokens(self.model)

    @torch.inference_mode()
    def prefill(self, ids: np.ndarray) -> float:
        """As the protocol says."""
        tokens = torch.from_numpy(ids)
        start = time.perf_counter()
        self.model(tokens, use_cache=True)
        return time.perf_counter() - start

    @torch.inference_mode()
    def decode(self, prompts: np.ndarray, steps: int, forced: np.ndarray | None) -> float:
        """As the protocol says."""
        given = None if forced is None else torch.from_numpy(forced)
        out = self.model(torch.from_numpy(prompts), use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for step in range(steps):
            likeliest = out.logits[:, -1:].argmax(-1)
            tokens = likeliest if given is None else given[:, step : step + 1]
            out = self.model(tokens, past_key_values=out.past_key_values, use_cache=True)
        return time.perf_counter() - start

    def facts(self) -> dict[str, Any]:
        """Bytes of packed matrices and of ordinary parameters, and how transformers runs its own experts."""
        from alphaq.runtime.packed import PackedWeights

        packed = sum(module.nbytes for module in self.model.modules() if isinstance(module, PackedWeights))
        plain = sum(parameter.nbytes for parameter in self.model.parameters())
        for parameter in self.model.parameters():
            parameter.sum()  # what is mapped counts as resident once it is read
        return {"packed_bytes": packed, "plain_bytes": plain, "experts": self.model.config._experts_implementation}

    def close(self) -> None:
        """As the protocol says."""
        del self.model

    @torch.inference_mode()
    def block(self, calls: int) -> dict[str, float]:
        """Seconds and bytes of weights per token of the first layer's experts, a token at a time.

        Every call takes the next experts in turn, so that none is left in a cache from before.
        """
        names = [name for name, _ in self.model.named_modules() if name.endswith(".experts")]
        experts: Any = self.model.get_submodule(names[0])
        config = self.model.config
        chosen = config.num_experts_per_tok
        sizes = self._expert_bytes(experts)
        generator = torch.Generator().manual_seed(SEED)
        hidden = torch.randn(calls, 1, config.hidden_size, generator=generator).to(self.model.dtype)
        weights = torch.full((1, chosen), 1 / chosen, dtype=self.model.dtype)
        places = torch.arange(calls * chosen).remainder(len(sizes)).view(calls, 1, chosen)
        order = torch.randperm(len(sizes), generator=generator)
        touched = sum(sizes[expert] for expert in order[places].flatten().tolist())
        start = time.perf_counter()
        for call in range(calls):
            experts(hidden[call], order[places[call]], weights)
        taken = time.perf_counter() - start
        return {"seconds": taken / calls, "bytes": touched / calls}

    def _expert_bytes(self, experts: Any) -> list[int]:
        """Bytes of each expert's matrices."""
        if hasattr(experts, "packed_down"):
            both = (experts.packed_first, experts.packed_down)
            count = len(experts.packed_down.names[0])
            return [
                sum(weights.tensors()[row[expert]].nbytes for weights in both for row in weights.names)
                for expert in range(count)
            ]
        return [experts.gate_up_proj[0].nbytes + experts.down_proj[0].nbytes] * len(experts.down_proj)


class LlamaCpp:
    """A GGUF file in llama.cpp, with its own choice of cache and attention; a context for each number of sequences."""

    def __init__(self, folder: Path, threads: int, length: int = 512, **_: Any) -> None:
        from alphaq.engines.gguf import library as llama  # the C functions, typed

        self.llama, self.library = llama, llama.opened()
        self.threads, self.length = threads, length
        self.contexts: dict[int, Any] = {}
        [path] = folder.glob("*.gguf")
        params = self.library.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = self.library.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise llama._refusal(f"llama.cpp cannot load {path}:")
        self.vocab_size = self.library.llama_vocab_n_tokens(self.library.llama_model_get_vocab(self.model))

    def prefill(self, ids: np.ndarray) -> float:
        """As the protocol says."""
        self._context(len(ids))
        start = time.perf_counter()
        self._append(ids, 0, every=True)
        return time.perf_counter() - start

    def decode(self, prompts: np.ndarray, steps: int, forced: np.ndarray | None) -> float:
        """As the protocol says."""
        self._context(len(prompts))
        logits = self._append(prompts, 0)
        start = time.perf_counter()
        for step in range(steps):
            likeliest = logits.argmax(1)[:, None]
            tokens = likeliest if forced is None else forced[:, step : step + 1]
            logits = self._append(tokens, prompts.shape[1] + step)
        return time.perf_counter() - start

    def facts(self) -> dict[str, Any]:
        """Nothing that llama.cpp tells."""
        return {}

    def close(self) -> None:
        """Free the model."""
        for context in self.contexts.values():
            self.library.llama_free(context)
        self.library.llama_model_free(self.model)

    def _context(self, sequences: int) -> None:
        """An empty context of so many sequences."""
        if sequences not in self.contexts:
            params = self.library.llama_context_default_params()
            params.n_ctx, params.n_seq_max = sequences * self.length, sequences
            params.n_threads = params.n_threads_batch = self.threads
            self.contexts[sequences] = self.library.llama_init_from_model(self.model, params)
            if not self.contexts[sequences]:
                raise self.llama._refusal(f"llama.cpp cannot make a context of {sequences} × {self.length} tokens:")
        self.library.llama_memory_clear(self.library.llama_get_memory(self.contexts[sequences]), True)

    def _append(self, ids: np.ndarray, place: int, every: bool = False) -> np.ndarray:
        """Put ids [sequences, tokens] at a place of their sequences; logits after the last or every one [n, vocab]."""
        sequences, tokens = ids.shape
        flat = np.ascontiguousarray(ids, np.int32).ravel()
        positions = np.tile(np.arange(place, place + tokens, dtype=np.int32), sequences)
        numbers = np.repeat(np.arange(sequences, dtype=np.int32), tokens)
        counts = np.ones(flat.size, np.int32)
        pointers = numbers.ctypes.data + numbers.itemsize * np.arange(flat.size, dtype=np.int64)
        wanted = np.full((sequences, tokens), every, np.int8)
        wanted[:, -1] = 1
        batch = self.llama.Batch(
            n_tokens=flat.size,
            token=flat.ctypes.data,
            pos=positions.ctypes.data,
            n_seq_id=counts.ctypes.data,
            seq_id=pointers.ctypes.data,
            logits=wanted.ctypes.data,
        )
        context = self.contexts[sequences]
        if code := self.library.llama_decode(context, batch):
            raise self.llama._refusal(f"llama_decode returned {code} for {flat.size} tokens:")
        rows = [self.library.llama_get_logits_ith(context, int(index)) for index in np.flatnonzero(wanted)]
        return np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)) for row in rows])


ENGINES: dict[str, Callable[..., Any]] = {"transformers": Transformers, "llama.cpp": LlamaCpp}


def ceilings(threads: int) -> dict[str, float]:
    """Bytes per second of all threads: read and written by a copy, and read by a sum, of memory no cache holds."""
    import numba

    from alphaq.simd.sums import in_threads

    @numba.njit(nogil=True)
    def add(values: np.ndarray) -> int:
        total = 0
        for index in range(values.size):
            total += values[index]
        return total

    source = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    target = torch.zeros_like(source)
    parts = np.array_split(source.numpy(), threads)
    add(parts[0][:1])
    copying, reading = [], []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        copying.append(time.perf_counter() - start)
        start = time.perf_counter()
        in_threads(add, parts)
        reading.append(time.perf_counter() - start)
    return {"copy": 2 * READ_BYTES / float(np.median(copying)), "read": READ_BYTES / float(np.median(reading))}


def memory() -> dict[str, int]:
    """Bytes resident now, of those anonymous ones, and the most that were resident since `reset_peak`."""
    names = {"VmRSS": "resident", "RssAnon": "anonymous", "VmHWM": "peak"}
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    parts = [line.split() for line in lines]
    return {names[part[0][:-1]]: 1024 * int(part[1]) for part in parts if part[0][:-1] in names}


def reset_peak() -> None:
    """Forget the most memory so far."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def settle() -> None:
    """Give back what nothing refers to."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def mapped_bytes(folder: Path) -> int:
    """Resident bytes of maps of the files in a folder."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            inside = f"{folder}/" in line
        elif inside and first == "Rss:":
            total += 1024 * int(line.split()[1])
    return total


def loaded(engine: str, folder: Path, request: dict[str, Any]) -> tuple[Engine, dict[str, Any]]:
    """The model and what it took of memory, by loading and by one forward pass over the prompt."""
    options, prompt = request["options"], np.array([request["prompt"]])
    small = ENGINES[engine](Path(request["small"]), **options)
    small.prefill(prompt)
    small.decode(prompt[:, :2], 1, None)
    small.close()
    del small
    settle()
    reset_peak()
    before = memory()
    start = time.perf_counter()
    model = ENGINES[engine](folder, **options)
    load_s = time.perf_counter() - start
    loading = memory()["peak"]
    model.prefill(prompt)
    facts = model.facts()
    settle()
    after = memory()
    return model, {
        "load_s": load_s,
        "resident_bytes": after["resident"] - before["resident"],
        "anonymous_bytes": after["anonymous"] - before["anonymous"],
        "mapped_bytes": mapped_bytes(folder.resolve()),
        "peak_loading_bytes": loading - before["resident"],
        "peak_bytes": after["peak"] - before["resident"],
        **facts,
    }


def answers(model: Any, threads: int) -> Iterator[Any]:
    """What each line of standard input asks for."""
    for line in sys.stdin:
        asked = json.loads(line)
        kind = asked.pop("do")
        if kind == "ceilings":
            yield ceilings(threads)
        elif kind == "block":
            yield model.block(**asked)
        else:
            arrays = {key: np.array(value) if isinstance(value, list) else value for key, value in asked.items()}
            yield getattr(model, kind)(**arrays)


def main() -> None:
    """Load, then answer."""
    engine, folder, request = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    model, found = loaded(engine, folder, request)
    for answer in (x for part in ([found], answers(model, request["options"]["threads"])) for x in part):
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
