"""How fast llama.cpp multiplies one token with weights of each type, by its own library.

The graph is what experts are when a token is decoded: of a stack of matrices a few at a time are chosen, until all
were. The stack lies where llama.cpp would put it, laid out anew for the types that it does that for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.metadata import version as installed
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alphaq.engines.gguf.apart import Wrap, run_apart
from alphaq.engines.gguf.library import Llama, LlamaError, last_of, opened
from alphaq.errors import MissingEngineError
from alphaq.formats.ggml import GGML_TYPES
from alphaq.formats.ggml_library import shared_object
from alphaq.nouns.choice import Choice
from alphaq.quantizers.ggml import blocks_of
from alphaq.work.timing import usual_seconds
from alphaq.work.workers import silent

ROWS, COLUMNS, CHOSEN = 1024, 2048, 4
"""Of a matrix of the stack, and how many of them a token is multiplied with at a time."""
KEPT_TYPE = "BF16"
CPU, CONTEXT_BYTES = 0, 1 << 20
STEPS = 16


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@cache
def _library() -> ctypes.CDLL:
    """The shared object with what builds and runs graphs typed. Raises MissingEngineError, LlamaError."""
    library = opened()
    pointer, integer, long, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
    signatures: dict[str, tuple[Any, ...]] = {  # name: (result, *arguments)
        "ggml_init": (pointer, _InitParams),
        "ggml_free": (None, pointer),
        "ggml_new_tensor_2d": (pointer, pointer, integer, long, long),
        "ggml_new_tensor_3d": (pointer, pointer, integer, long, long, long),
        "ggml_mul_mat_id": (pointer, *[pointer] * 4),
        "ggml_new_graph": (pointer, pointer),
        "ggml_build_forward_expand": (None, pointer, pointer),
        "ggml_backend_cpu_init": (pointer,),
        "ggml_backend_free": (None, pointer),
        "ggml_backend_cpu_set_n_threads": (None, pointer, integer),
        "ggml_backend_cpu_buffer_type": (pointer,),
        "ggml_backend_dev_by_type": (pointer, integer),
        "ggml_backend_dev_backend_reg": (pointer, pointer),
        "ggml_backend_reg_get_proc_address": (pointer, pointer, ctypes.c_char_p),
        "ggml_backend_dev_supports_op": (ctypes.c_bool, pointer, pointer),
        "ggml_backend_alloc_ctx_tensors": (pointer, pointer, pointer),
        "ggml_backend_alloc_ctx_tensors_from_buft": (pointer, pointer, pointer),
        "ggml_backend_tensor_set": (None, pointer, pointer, size, size),
        "ggml_backend_graph_compute": (integer, pointer, pointer),
        "ggml_backend_buffer_free": (None, pointer),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(library, name, None)
        if function is None:
            raise LlamaError(f"This build of llama.cpp has no {name}. Install another version of xllamacpp.")
        function.restype, function.argtypes = result, arguments
    return library


def version() -> str:
    """Of what is timed. Raises MissingEngineError."""
    if shared_object() is None:
        raise MissingEngineError("llama.cpp", "'alphaq[gguf]'")
    return f"xllamacpp {installed('xllamacpp')}"


def kernel_rates(choices: Sequence[Choice], nbytes: int, threads: int, shown: Wrap) -> list[float]:
    """Bytes per second of each choice, of stacks of at most so many bytes.

    In a process of its own, as threads of other libraries slow llama.cpp's. Raises MissingEngineError, LlamaError.
    """
    return run_apart(Path("random weights"), _kernel_rates, choices, nbytes, threads, shown=shown)


def _kernel_rates(choices: Sequence[Choice], nbytes: int, threads: int, wrap: Wrap) -> list[float]:
    numbers = wrap(range(len(choices)), len(choices), "measure llama.cpp's kernels")
    return [_kernel_rate(choices[number], nbytes, threads) for number in numbers]


def _kernel_rate(choice: Choice, nbytes: int, threads: int) -> float:
    name = KEPT_TYPE if choice.kept else str(choice)
    codes = _codes(name)
    stack = np.tile(codes, (max(CHOSEN, nbytes // codes.nbytes // CHOSEN * CHOSEN), 1, 1))
    for place in _buffer_types():
        with _product(name, stack, place, threads) as compute:
            if compute is not None:
                return stack.nbytes / usual_seconds(compute)
    raise LlamaError(f"llama.cpp multiplies no {name} on this processor.")


def _codes(name: str) -> np.ndarray:
    """A matrix of random weights, uint8 [ROWS, bytes per row]."""
    weights = np.random.default_rng(0).standard_normal((64, COLUMNS), np.float32)
    if name == KEPT_TYPE:
        codes = torch.from_numpy(weights).bfloat16().view(torch.uint8).numpy()
    else:
        codes = np.empty((len(weights), GGML_TYPES[name].storage_bytes((1, COLUMNS))), np.uint8)
        blocks_of(weights, name, np.ones(COLUMNS, np.float32), codes)
    return np.tile(codes, (ROWS // len(codes), 1))


def _buffer_types() -> list[int]:
    """Where weights may lie: what llama.cpp prefers first."""
    library = _library()
    device = library.ggml_backend_dev_by_type(CPU)
    registry = library.ggml_backend_dev_backend_reg(device)
    address = library.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return [library.ggml_backend_cpu_buffer_type()]
    listed = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
    extra = takewhile(bool, (listed[place] for place in count()))
    return [*extra, library.ggml_backend_cpu_buffer_type()]


@contextmanager
def _product(name: str, stack: np.ndarray, place: int, threads: int) -> Iterator[Callable[[], None] | None]:
    """What multiplies a token with every matrix of a stack, uint8 [matrices, ROWS, bytes per row]; None where the
    processor does not do that with weights that lie in such a place."""
    library, device = _library(), _library().ggml_backend_dev_by_type(CPU)
    with ExitStack() as held:
        weights, rest = (_context(held), _context(held))
        matrices = library.ggml_new_tensor_3d(weights, GGML_TYPES[name].number, COLUMNS, ROWS, len(stack))
        token = library.ggml_new_tensor_2d(rest, GGML_TYPES["F32"].number, COLUMNS, 1)
        chosen = [library.ggml_new_tensor_2d(rest, GGML_TYPES["I32"].number, CHOSEN, 1) for _ in stack[::CHOSEN]]
        products = [library.ggml_mul_mat_id(rest, matrices, token, few) for few in chosen]
        held.callback(
            library.ggml_backend_buffer_free, library.ggml_backend_alloc_ctx_tensors_from_buft(weights, place)
        )
        if not library.ggml_backend_dev_supports_op(device, products[0]):
            yield None
            return
        backend = library.ggml_backend_cpu_init()
        held.callback(library.ggml_backend_free, backend)
        library.ggml_backend_cpu_set_n_threads(backend, threads)
        held.callback(library.ggml_backend_buffer_free, library.ggml_backend_alloc_ctx_tensors(rest, backend))
        graph = library.ggml_new_graph(rest)
        for product in products:
            library.ggml_build_forward_expand(graph, product)
        order = np.random.default_rng(0).permutation(len(stack)).astype(np.int32).reshape(-1, CHOSEN)
        values = {matrices: stack, token: np.ones(COLUMNS, np.float32)} | dict(zip(chosen, order, strict=True))
        for tensor, held_values in values.items():
            library.ggml_backend_tensor_set(tensor, held_values.ctypes.data, 0, held_values.nbytes)

        def compute() -> None:
            if code := library.ggml_backend_graph_compute(backend, graph):
                raise LlamaError(f"ggml_backend_graph_compute returned {code} for {name}.")

        yield compute


def _context(held: ExitStack) -> int:
    """Room for descriptions of tensors, whose values lie elsewhere."""
    context: int = _library().ggml_init(_InitParams(CONTEXT_BYTES, None, True))
    held.callback(_library().ggml_free, context)
    return context


def step_seconds(folder: Path, threads: int) -> float:
    """Seconds of a token that follows few others, of the model in an output folder."""
    [path] = folder.glob("*.gguf")
    return run_apart(path, _step_seconds, path, threads, shown=silent)


def _step_seconds(path: Path, threads: int, _: Wrap) -> float:
    token = np.zeros((1, 1), np.int32)
    with Llama(path, 2 + STEPS, threads) as model:

        def decode() -> None:
            model.logits([0])
            for place in range(1, STEPS + 1):
                model.step(token, place, last_of(token))

        return usual_seconds(decode) / (STEPS + 1)
