"""The real llama.cpp on a GGUF file, through the C API that the `xllamacpp` wheel's shared object exports.

It runs on the CPU, without flash attention and with a float32 KV cache, so that what separates it from another
engine is the weights and the kernels that multiply with them. Those kernels round the activations: to the weights'
own type for F16 and BF16, to blocks of eight-bit integers (Q8_0, Q8_1, Q8_K) for quantized weights; only F32
weights meet float32 activations.

Positions of the fields below are those of llama.h in 2026 and no promise of the wheel's, so the defaults that
llama.cpp returns are checked before any field is set. A failed call raises with llama.cpp's own last words.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphaq.engines.gguf.watching import EVAL, Callback, Watch
from alphaq.errors import AlphaQError, MissingEngineError
from alphaq.formats.ggml_library import shared_object

GGML_F32, GGML_F16 = 0, 1
FLASH_ATTENTION_AUTO, FLASH_ATTENTION_OFF = -1, 0
WARNING, ERROR = 3, 4
RESERVE = 512  # bytes past the declared fields, more than llama.cpp's structures take


def _fields(kind: type[Any], *names: str) -> Iterator[tuple[str, type[Any]]]:
    return ((name, kind) for name in names)


_REST = ("_rest", ctypes.c_ubyte * RESERVE)


class _ModelParams(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_void_p, "devices", "tensor_buft_overrides"),
        *_fields(ctypes.c_int32, "n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu"),
        *_fields(ctypes.c_void_p, "tensor_split", "progress_callback", "progress_callback_user_data", "kv_overrides"),
        *_fields(ctypes.c_bool, "vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp"),
        _REST,
    )


class _ContextParams(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_uint32, "n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq"),
        *_fields(ctypes.c_uint32, "n_outputs_max", "n_outputs_max_per_seq"),
        *_fields(ctypes.c_int32, "n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type"),
        *_fields(ctypes.c_int32, "pooling_type", "attention_type", "flash_attn_type"),
        *_fields(ctypes.c_float, "rope_freq_base", "rope_freq_scale", "yarn_ext_factor"),
        *_fields(ctypes.c_float, "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        ("cb_eval", EVAL),
        ("cb_eval_user_data", ctypes.c_void_p),
        *_fields(ctypes.c_int32, "type_k", "type_v"),
        *_fields(ctypes.c_void_p, "abort_callback", "abort_callback_data", "_other"),
        *_fields(ctypes.c_bool, "embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified"),
        _REST,
    )


class Batch(ctypes.Structure):
    """Tokens with their places and sequences, arrays of so many. logits: int8, 1 where they are wanted."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        *_fields(ctypes.c_void_p, "token", "embd", "pos", "n_seq_id", "seq_id", "logits"),
    )


MODEL_DEFAULTS = {"devices": None, "tensor_buft_overrides": None, "n_gpu_layers": -1}
REPACKING = {"split_mode": 1, "lazy_mode": 1, "main_gpu": 0, "vocab_only": False, "check_tensors": False}
REPACKING |= {"use_extra_bufts": True, "no_host": False, "no_alloc": False, "load_mtp": False}
"""Defaults where llama.cpp can be told to leave weights as they are in the file; other builds decide for themselves."""
WINDOWED = {"embeddings": False, "offload_kqv": True, "no_perf": True, "op_offload": True, "swa_full": True}
WINDOWED |= {"kv_unified": False}
"""Defaults where llama.cpp can be told to keep no more of a window than is looked at, as llama-server does."""
CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_threads": 4,
    "flash_attn_type": FLASH_ATTENTION_AUTO,
    "yarn_ext_factor": -1.0,
    "defrag_thold": -1.0,
    "type_k": GGML_F16,
    "type_v": GGML_F16,
}

_words: list[str] = []
_echoed = False


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def listen(level: int, text: bytes, _: int | None) -> None:
    """Keep warnings and errors for `_refusal`; print nothing, unless told to."""
    if level in (WARNING, ERROR):
        _words.append(text.decode(errors="replace").strip())
        if _echoed:
            os.write(2, text)


def echo_words() -> None:
    """Print from now on what llama.cpp warns of, at once: it may be the last that is heard of this process."""
    global _echoed
    _echoed = True


class LlamaError(AlphaQError):
    """llama.cpp refused."""


def no_number(path: Path, where: str) -> LlamaError:
    """Which file's values are NaN or infinite, where that was seen, and what to do about it."""
    return LlamaError(
        f"llama.cpp computes NaN or infinity: {where} of {path}. The file is damaged, or values overflow: those that "
        "meet F16 weights are rounded to 16 bits and must stay below 65,504. Download the file again, or convert the "
        "model to BF16 instead of F16."
    )


def _refusal(what: str) -> LlamaError:
    """An error that ends with what llama.cpp logged last."""
    return LlamaError("\n  ".join((what, *_words[-5:])))


@cache
def opened() -> ctypes.CDLL:
    """The shared object with its functions typed and its log silenced.

    Raises MissingEngineError without the wheel, and LlamaError if a structure's defaults are not the known ones.
    """
    path = shared_object()
    if path is None:
        raise MissingEngineError("llama.cpp", "'alphaq[gguf]'")
    library = ctypes.CDLL(str(path))
    pointer, integer, text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
    signatures: dict[str, tuple[Any, ...]] = {  # name: (result, *arguments)
        "llama_log_set": (None, type(listen), pointer),
        "llama_backend_init": (None,),
        "llama_model_default_params": (_ModelParams,),
        "llama_context_default_params": (_ContextParams,),
        "llama_model_load_from_file": (pointer, text, _ModelParams),
        "llama_model_free": (None, pointer),
        "llama_model_get_vocab": (pointer, pointer),
        "llama_vocab_n_tokens": (integer, pointer),
        "llama_init_from_model": (pointer, pointer, _ContextParams),
        "llama_free": (None, pointer),
        "llama_get_memory": (pointer, pointer),
        "llama_memory_clear": (None, pointer, ctypes.c_bool),
        "llama_tokenize": (
            *(integer, pointer, text, integer, ctypes.POINTER(integer), integer),
            *(ctypes.c_bool, ctypes.c_bool),
        ),
        "llama_decode": (integer, pointer, Batch),
        "llama_model_n_ctx_train": (integer, pointer),
        "llama_vocab_get_text": (text, pointer, integer),
        "llama_vocab_bos": (integer, pointer),
        "llama_vocab_get_add_bos": (ctypes.c_bool, pointer),
        "ggml_get_name": (text, pointer),
        "ggml_op_desc": (text, pointer),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), pointer, integer),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(listen, None)
    library.llama_backend_init()
    _check(library.llama_model_default_params(), MODEL_DEFAULTS)
    _check(library.llama_context_default_params(), CONTEXT_DEFAULTS)
    return library


def _check(params: ctypes.Structure, defaults: Mapping[str, float | None]) -> None:
    """Raise LlamaError if a field does not hold its known default: then the structure has changed."""
    if found := changed(params, defaults):
        raise LlamaError(
            f"This build of llama.cpp fills {type(params).__name__} in another way: {found}. Compare its llama.h."
        )


def changed(params: ctypes.Structure, defaults: Mapping[str, float | None]) -> str:
    """What is not as it is known, in words; empty if all is."""
    found = {name: getattr(params, name) for name in defaults}
    return ", ".join(
        f"{name} {found[name]} instead of {default}" for name, default in defaults.items() if found[name] != default
    )


@dataclass(frozen=True)
class Running:
    """How a model is run.

    watch: is shown every intermediate tensor, see watching.py. outputs: of so many tokens of a batch are logits
    wanted at most; 0 for all, which takes as much memory. mapped: compute with the weights where they lie in the
    memory-mapped file, and never with copies that are laid out for speed. bos: whether `prefix` is what the file's
    tokenizer puts before a text, or nothing.
    """

    watch: Watch | None = None
    outputs: int = 0
    mapped: bool = False
    bos: bool = True


@dataclass(frozen=True)
class Facts:
    """Of a model. trained_context: tokens that the file says it was trained with. prefix: see `Llama.prefix`."""

    vocab_size: int
    trained_context: int
    prefix: tuple[int, ...]


class Llama:
    """A GGUF model in llama.cpp, with `sequences` of up to `context` tokens each. Close it, or use `with`.

    Raises LlamaError if llama.cpp cannot load the file.
    """

    def __init__(
        self, path: Path, context: int = 512, threads: int = 2, sequences: int = 1, running: Running = Running()
    ) -> None:
        self._library = opened()
        self._model = self._context = None
        self._bos = running.bos
        self._callback = None if running.watch is None else Callback(running.watch, self._library)
        _words.clear()
        self._model = self._library.llama_model_load_from_file(str(path).encode(), self._model_params(running))
        if not self._model:
            raise _refusal(f"llama.cpp cannot load {path}:")
        params = self._context_params(context, sequences, running)
        params.n_threads = params.n_threads_batch = threads
        self._context = self._library.llama_init_from_model(self._model, params)
        if not self._context:
            self.close()
            raise _refusal(f"llama.cpp cannot make a context of {context} tokens for {path}:")
        self._vocab = self._library.llama_model_get_vocab(self._model)
        self.vocab_size: int = self._library.llama_vocab_n_tokens(self._vocab)
        self.context, self.sequences = context, sequences
        if self.vocab_size < 1:
            self.close()
            raise LlamaError(f"{path} has no tokens, so it is no language model. Name a model's file.")

    def _model_params(self, running: Running) -> _ModelParams:
        params: _ModelParams = self._library.llama_model_default_params()
        params.n_gpu_layers = 0
        if running.mapped and not changed(params, REPACKING):
            params.use_extra_bufts = False
        return params

    def _context_params(self, context: int, sequences: int, running: Running) -> _ContextParams:
        params: _ContextParams = self._library.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context * sequences
        params.n_seq_max, params.n_outputs_max = sequences, running.outputs
        params.flash_attn_type = FLASH_ATTENTION_OFF
        params.type_k = params.type_v = GGML_F32
        if self._callback is not None:
            params.cb_eval = self._callback.function
        return params

    @property
    def prefix(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text: BOS, or nothing."""
        bos = self._library.llama_vocab_bos(self._vocab)
        added = self._bos and self._library.llama_vocab_get_add_bos(self._vocab) and 0 <= bos < self.vocab_size
        return (bos,) if added else ()

    def facts(self) -> Facts:
        """What is asked of the model before it is run."""
        return Facts(self.vocab_size, int(self._library.llama_model_n_ctx_train(self._model)), self.prefix)

    def spelled(self, ids: Sequence[int]) -> list[str]:
        """Tokens as the file's vocabulary spells them. Raises ValueError for ids that it lacks."""
        if not all(0 <= id < self.vocab_size for id in ids):
            raise ValueError(f"llama.cpp needs ids below {self.vocab_size}.")
        texts = (self._library.llama_vocab_get_text(self._vocab, id) for id in ids)
        return [(text or b"").decode(errors="replace") for text in texts]

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and its context; closing twice is harmless."""
        if self._context:
            self._library.llama_free(self._context)
        if self._model:
            self._library.llama_model_free(self._model)
        self._model = self._context = None

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text, without tokens that the file asks to add; `special` reads `<|…|>` as such tokens."""
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 1))()  # no token is shorter than a byte
        count = self._library.llama_tokenize(self._vocab, raw, len(raw), ids, len(ids), False, special)
        if count < 0:
            raise _refusal(f"llama.cpp cannot tokenize {text[:40]!r}…:")
        return ids[:count]

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits [tokens, vocab] after each of these tokens, seen as one sequence in one batch."""
        return self.windows(_one_row(ids), np.ones((1, len(ids)), np.bool_))

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """The n likeliest next tokens, one at a time with the KV cache (and the kernels for a single row)."""
        self._start(len(ids) + n)
        generated: list[int] = []
        while len(generated) < n:
            begin = len(ids) + len(generated) - 1 if generated else 0
            next_ids = _one_row(generated[-1:] or ids)
            generated.append(int(self.step(next_ids, begin, last_of(next_ids))[0].argmax()))
        return generated

    def windows(self, ids: NDArray[np.int32], wanted: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Logits [wanted, vocab] of windows int32 [windows, tokens], seen side by side in one batch.

        wanted: bool [windows, tokens], of which tokens.
        """
        self.run(ids, wanted)
        return self._logits(wanted)

    def run(self, ids: NDArray[np.int32], wanted: NDArray[np.bool_]) -> None:
        """Compute the same and return nothing of it."""
        count, length = ids.shape
        if count > self.sequences:
            raise ValueError(f"{count} windows in a context of {self.sequences}.")
        self._start(length)
        self._decode(ids, 0, wanted)

    def step(self, ids: NDArray[np.int32], begin: int, wanted: NDArray[np.bool_]) -> NDArray[np.float32]:
        """The same for tokens int32 [windows, tokens] that follow `begin` others of their windows."""
        self._decode(ids, begin, wanted)
        return self._logits(wanted)

    def _start(self, length: int) -> None:
        """Forget the last sequences before some of that many tokens."""
        if not self._context:
            raise LlamaError("This model is closed.")
        if not 0 < length <= self.context:
            raise ValueError(f"{length} tokens in a context of {self.context}: give 1 to {self.context}.")
        _words.clear()
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def _decode(self, ids: NDArray[np.int32], begin: int, wanted: NDArray[np.bool_]) -> None:
        """Append tokens to their sequences. Raises LlamaError, and what the watch raised."""
        if not ids.size or ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"llama.cpp needs ids below {self.vocab_size}, at least one.")
        count, length = ids.shape
        tokens = np.ascontiguousarray(ids, np.int32)
        places = np.tile(np.arange(begin, begin + length, dtype=np.int32), count)
        owners = np.repeat(np.arange(count, dtype=np.int32), length)
        pointers = owners.ctypes.data + owners.itemsize * np.arange(owners.size, dtype=np.uintp)
        ones, marks = np.ones(owners.size, np.int32), wanted.astype(np.int8)
        arrays = dict(token=tokens, pos=places, n_seq_id=ones, seq_id=pointers, logits=marks)
        batch = Batch(n_tokens=owners.size, **{name: array.ctypes.data for name, array in arrays.items()})
        code = self._library.llama_decode(self._context, batch)
        if self._callback is not None:
            self._callback.raise_error()
        if code:
            raise _refusal(f"llama_decode returned {code} for {owners.size} tokens:")

    def rows(self, wanted: NDArray[np.bool_]) -> Iterator[NDArray[np.float32]]:
        """Logits [vocab] of each wanted token of the last run, valid until the next."""
        for place in np.flatnonzero(wanted).tolist():
            yield np.ctypeslib.as_array(self._library.llama_get_logits_ith(self._context, place), (self.vocab_size,))

    def _logits(self, wanted: NDArray[np.bool_]) -> NDArray[np.float32]:
        found = np.empty((int(wanted.sum()), self.vocab_size), np.float32)
        for row, logits in zip(found, self.rows(wanted), strict=True):
            row[:] = logits
        return found


def last_of(ids: NDArray[np.int32]) -> NDArray[np.bool_]:
    """The last token of each window, bool [windows, tokens]."""
    wanted = np.zeros(ids.shape, np.bool_)
    wanted[:, -1] = True
    return wanted


def _one_row(ids: Sequence[int]) -> NDArray[np.int32]:
    return np.array([ids], np.int32)
