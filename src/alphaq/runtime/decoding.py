"""A model's forward pass that reads single tokens from a recording, so that no Python runs between its operations.

A step of a small model takes a tenth as long as the Python around it. The third token that is read alone with a cache
is recorded as it is computed, the fourth again; from then on such tokens are read by `programs.Program`. Whatever else
is asked of the model, and models that compute otherwise by length or by values, run as they were.

A recording is used only if it gave what the model gave for the fourth token. Keys and values are the cache's own: each
layer's are the first of a longer stretch of memory, in which nothing that was given out changes.
"""

from __future__ import annotations

import copy
import inspect
import logging
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.cache_utils import DynamicCache, DynamicLayer

from alphaq.errors import AlphaQError
from alphaq.runtime.packed import PackedWeights
from alphaq.runtime.programs import Program
from alphaq.runtime.recording import NotRecorded, Reads, Recorder, Step

DOUBTS = 2  # tokens in a row that may differ from the model's own before a recording is given up
VAIN, USEFUL = 3, 64  # recordings in a row of which fewer tokens were read, before a model is not recorded any more
UNUSED = 2  # tokens that are read alone before recording: who reads but these need not wait for it
LEAST_ROOM = 256  # tokens
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
ASKED_FOR = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "return_dict",
}
EXTRAS = ("output_attentions", "output_hidden_states", "output_router_logits")
FULL = "full_attention"
ROPES = {"default", "linear", "llama3", "yarn"}  # others turn otherwise from some length on
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """A step that can be recorded or run."""

    token: Tensor
    position: Tensor | None
    cache: Any
    length: int

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Token and position, int64 [1, 1], in memory of their own."""
        position = torch.full((1, 1), self.length) if self.position is None else self.position.clone()
        return self.token.clone(), position


@dataclass
class Caches:
    """Keys and values of the cache that was used last: memory with room, and what the cache has of it."""

    room: list[Tensor]
    given: list[Tensor]
    owner: weakref.ref[Any] | None = None
    """Of the cache, with which the memory goes."""

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Caches:
        """Copies with room for a quarter more: nobody else writes to them."""
        length = tensors[0].shape[-2]
        room = []
        for one in tensors:
            _, heads, _, width = one.shape
            room.append(one.new_zeros(1, heads, length + max(LEAST_ROOM, length // 4), width))
            room[-1][:, :, :length] = one
        return cls(room, list(tensors))

    def fits(self, tensors: Sequence[Tensor], length: int) -> bool:
        """Whether a cache is this one, and has room."""
        same = all(one is other for one, other in zip(tensors, self.given, strict=False))
        return same and len(tensors) == len(self.given) and all(length < one.shape[2] for one in self.room)

    def grown(self, length: int) -> list[Tensor]:
        """What the cache has after a token more."""
        self.given = [one[:, :, :length] for one in self.room]
        return self.given


class Stepwise:
    """A model's `forward`: its own, or a recording of it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._start()

    def _start(self) -> None:
        self.lock = threading.Lock()
        self.first = next(iter(self.__signature__.parameters))
        self.length = 0
        self.result: type | None = None
        self.refused = ""
        """Why the model is not run from a recording; empty if it may be."""
        self.doubts, self.known = 0, (0, 0)
        """Tokens in a row that differed from the model's own; the least and the greatest length that did not."""
        self.ran, self.vain = 0, 0
        self._start_again()

    def __getstate__(self) -> dict[str, object]:
        """Copies record for themselves."""
        return {"model": self.model}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.model = state["model"]
        self._start()

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._own)

    @property
    def _own(self) -> Any:
        return type(self.model).forward.__get__(self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's class computes."""
        if torch.compiler.is_compiling() or self.refused or len(args) > 1:
            return type(self.model).forward(self.model, *args, **kwargs)
        if args:
            kwargs = {self.first: args[0], **kwargs}
        if not self._may_be(kwargs) or not self.lock.acquire(blocking=False):
            return self._own(**kwargs)
        try:
            asked = self._asked(kwargs)
            if asked is None:
                return self._own(**kwargs)
            if self.program is None or not self._same():
                return self._recorded(asked, kwargs)
            if any(self.hooks) or not self._has_room(asked):
                return self._own(**kwargs)
            unsure = self.doubts or not self.known[0] // 2 < asked.length < 2 * self.known[1]
            return self._confirmed(asked, kwargs) if unsure else self._run(asked)
        finally:
            self.lock.release()

    def _may_be(self, kwargs: Any) -> bool:
        """What is quick to see: one token."""
        token = kwargs.get("input_ids")
        single = isinstance(token, Tensor) and token.shape == (1, 1)
        return single and type(kwargs.get("past_key_values")) is DynamicCache

    def _asked(self, kwargs: Any) -> Asked | None:
        """The step, if it is one of a text of its own on the CPU and nothing but logits are wanted."""
        given = {name: value for name, value in kwargs.items() if value is not None}
        caching = given.get("use_cache", getattr(self.model.config, "use_cache", True))
        if given.keys() - ASKED_FOR or not caching or not given.get("return_dict", True):
            return None
        keep, cache, token = given.get("logits_to_keep", 0), given["past_key_values"], given["input_ids"]
        if not isinstance(keep, int) or token.dtype != torch.int64 or not token.is_cpu or self._wanted_otherwise():
            return None
        if not _plain(cache):
            return None
        length = cache.get_seq_length()
        mask, position = given.get("attention_mask"), given.get("position_ids")
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (1, length + 1) or not bool(mask.all())):
            return None
        if position is not None and position.shape != (1, 1):
            return None
        return Asked(token, position, cache, length)

    def _wanted_otherwise(self) -> bool:
        """Whether somebody wants more than logits, or to see how they come about."""
        config = self.model.config
        if self.model.training or torch.is_grad_enabled() or not getattr(config, "return_dict", True):
            return True
        seen = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or _has_any_global_hook()
        return bool(seen) or torch.is_autocast_enabled("cpu") or any(getattr(config, one, False) for one in EXTRAS)

    def _same(self) -> bool:
        """Whether the model still is what was recorded, its numbers where they were; if not, it is recorded again."""
        try:
            same = self.state == self.known_state and not any(self.empty)
        except (RuntimeError, ValueError):  # another tensor or array, which is not compared so
            same = False
        same = same and all(
            (one := owner.get(name)) is not None and _place(one) == place for owner, name, place in self.parameters
        )
        same = same and all(module.table is table for module, table in self.tables)
        if not same:
            self.vain = 0 if self.ran > USEFUL else self.vain + 1
            self._start_again()
            if self.vain > VAIN:
                self._refuse("its parts or settings change again and again")
        return same

    def _start_again(self) -> None:
        self.alone = 0
        self.step: Step | None = None
        self.program: Program | None = None
        self.caches: Caches | None = None
        self.modules: list[Any] = []
        self.hooks: list[dict[int, Any]] = []
        self.parameters: list[tuple[Any, str, tuple[int, torch.Size]]] = []
        self.tables: list[tuple[PackedWeights, Tensor]] = []
        self.state: list[dict[str, object]] = []
        self.known_state: list[dict[str, object]] = []
        self.empty: list[dict[str, object]] = []

    def _has_room(self, asked: Asked) -> bool:
        """Whether the cache has room for a token, which it is given if it is one of this model."""
        assert self.program is not None  # it was recorded
        tensors = _tensors(asked.cache)
        if self.caches is not None and self.caches.fits(tensors, asked.length):
            return True
        if not self.program.takes(tensors):
            return False
        self.caches = Caches.of(tensors)
        self.caches.owner = weakref.ref(asked.cache, self._let_go)
        self.program.keep(self.caches.room)
        return True

    def _let_go(self, owner: weakref.ref[Any]) -> None:
        """A cache is gone."""
        if self.caches is not None and self.caches.owner is owner:
            self.caches = None

    def _run(self, asked: Asked) -> Any:
        """A step from the recording."""
        self.ran += 1
        caches = self.caches
        assert self.program is not None and caches is not None and self.result is not None  # see `_has_room`
        logits = self.program.run(asked.token, asked.position, asked.length, caches.grown(asked.length + 1))
        for layer, keys, values in zip(asked.cache.layers, caches.given[::2], caches.given[1::2], strict=True):
            layer.keys, layer.values = keys, values
        return self.result(logits=logits, past_key_values=asked.cache)

    def _confirmed(self, asked: Asked, kwargs: Any) -> Any:
        """A step by the model and by the recording, which is given up if they differ: some change with their length."""
        twin = _twin(asked.cache)
        found = self._run(Asked(asked.token, asked.position, twin, asked.length)).logits
        result = self._own(**kwargs)
        if _distance(found, result.logits) <= CLOSE.get(found.dtype, 0.0):
            self.doubts, self.known = 0, (min(self.known[0], asked.length), max(self.known[1], asked.length))
            return result
        self.doubts += 1  # in 16 bits two experts that are nearly equal may change places
        if self.doubts > DOUBTS:
            self._refuse(f"at {asked.length} tokens it computes otherwise than when it was recorded")
        return result

    def _refuse(self, why: str) -> None:
        self._start_again()
        self.refused = why
        _log.warning("%s is not run from a recording: %s. It runs as before.", type(self.model).__name__, why)

    def _recorded(self, asked: Asked, kwargs: Any) -> Any:
        """The model's own step, recorded if it is time to."""
        if self.refused:
            return self._own(**kwargs)
        self.alone += 1
        again = self.step is not None and self.length == asked.length  # which would not show what lengths change
        if self.alone <= UNUSED or again or self._watched():
            return self._own(**kwargs)
        before, result = _twin(asked.cache), None
        token, position = inputs = asked.inputs()
        try:
            self._check()
            # In inference mode torch names whole operations.
            with torch.inference_mode(), Recorder() as recorder, Reads() as reads:
                cache = asked.cache
                result = self._own(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
            logits = result.logits
            _as_computed_here(result, cache)
            if result.keys() != {"logits", "past_key_values"}:
                raise NotRecorded("it gives more than logits")
            step = Step.of(recorder.calls, reads.tensors, inputs, _tensors(before), logits)
            if self.step is None:
                self.step, self.length = step, asked.length
            else:
                self._accept(step, asked, _tensors(before), self._own(**{**kwargs, "past_key_values": before}))
        except NotRecorded as reason:
            self._refuse(str(reason))
        return self._own(**kwargs) if result is None else result

    def _watched(self) -> bool:
        """Whether hooks want to see what goes on inside."""
        self.modules = list(self.model.modules())
        self.hooks = [hooks for one in self.modules for hooks in (one._forward_hooks, one._forward_pre_hooks)]
        return any(self.hooks)

    def try_out(self) -> None:
        """Say at once if the model cannot be recorded, as far as that is known before it runs."""
        self.modules = list(self.model.modules())
        try:
            self._check()
        except NotRecorded as reason:
            self._refuse(str(reason))

    def _check(self) -> None:
        """Raise NotRecorded for models whose modules do more than compute."""
        config = self.model.config
        if config.get_text_config() is not config or "position_ids" not in self.__signature__.parameters:
            raise NotRecorded("it reads more than text, or no positions")
        if config._attn_implementation != "sdpa":
            raise NotRecorded("attention is not torch's scaled_dot_product_attention")
        if any(_changes_with_length(config)):
            raise NotRecorded("from some length on it computes otherwise")
        if any(hasattr(one, "_hf_hook") for one in self.modules):
            raise NotRecorded("what it computes with is brought when it is needed")
        if any(one.device.type != "cpu" for one in self.model.parameters()):
            raise NotRecorded("not all of it is on the CPU")

    def _accept(self, step: Step, asked: Asked, before: Sequence[Tensor], result: Any) -> None:
        """Make a program of the second recording, if it is the first one's like, and computes the same.

        before: keys and values before the step; result: what the model gave for it.
        """
        assert self.step is not None  # the first
        if self.step.form() != step.form():
            raise NotRecorded("it computes otherwise at another length")
        self._remember(step)
        program = Program(step)
        wanted = result.logits.detach().clone()
        room = Caches.of(before)
        program.keep(room.room)
        found = program.run(asked.token, asked.position, asked.length, room.grown(asked.length + 1))
        distance = _distance(found, wanted)
        if not distance <= CLOSE.get(wanted.dtype, 0.0):
            raise NotRecorded(f"the recording gives other logits, {distance:.2g} from its own")
        self.step, self.program, self.result = None, program, type(result)
        self.doubts, self.known = 0, (asked.length, asked.length)

    def _remember(self, step: Step) -> None:
        """What the recording takes for granted. Raises NotRecorded for a tensor that the model does not own."""
        self.tables = [(one, one.table) for one in self.modules if isinstance(one, PackedWeights)]
        configs = [one.config for one in self.modules if hasattr(one, "config")]
        held = [*map(vars, [*self.modules, *configs]), *(one._modules for one in self.modules)]
        distinct = {id(one): one for one in held}.values()
        self.state, self.empty = [one for one in distinct if one], [one for one in distinct if not one]
        self.known_state = [dict(one) for one in self.state]
        owned = [
            (tensors, name, tensor)
            for module in self.modules
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        used = {one.untyped_storage().data_ptr() for one in step.outside()}
        self.parameters = [
            (tensors, name, _place(tensor))
            for tensors, name, tensor in owned
            if tensor.untyped_storage().data_ptr() in used
        ]
        known = {tensor.untyped_storage().data_ptr() for _, _, tensor in owned}
        known |= {table.untyped_storage().data_ptr() for _, table in self.tables}
        if used - known:
            raise NotRecorded("it computes with tensors that are neither parameters nor buffers")


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    """Where a tensor's numbers are."""
    return tensor.data_ptr(), tensor.shape


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).float().norm() / wanted.float().norm())


def _changes_with_length(config: Any) -> Iterator[bool]:
    """What of a model's config makes it compute otherwise from some length on, which two tokens do not show."""
    yield bool(set(getattr(config, "layer_types", None) or [FULL]) - {FULL})
    yield bool(getattr(config, "sliding_window", None)) and bool(getattr(config, "use_sliding_window", True))
    yield getattr(config, "attention_chunk_size", None) is not None
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = [ropes] if "rope_type" in ropes else [one for one in ropes.values() if isinstance(one, dict)]
    yield any(one.get("rope_type", "default") not in ROPES for one in kinds)


def _tensors(cache: Any) -> list[Tensor]:
    """Keys and values of each layer in turn."""
    return [one for layer in cache.layers for one in (layer.keys, layer.values)]


def _as_computed_here(result: Any, cache: Any) -> None:
    """Tensors of inference mode may not be used where gradients are: copies, of the mode that the caller is in."""
    result.logits = result.logits.clone()
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()


def _plain(cache: Any) -> bool:
    """Whether every layer keeps every token of one text, and has some."""
    layers = cache.layers
    if not layers or getattr(cache, "offloading", False):
        return False
    if any(type(one) is not DynamicLayer or not one.is_initialized for one in layers):
        return False
    if any(one.keys.ndim != 4 for one in layers):
        return False
    length = layers[0].keys.shape[2]
    return length > 0 and all(
        one.keys.shape[0] == 1 and one.keys.shape[2] == one.values.shape[2] == length for one in layers
    )


def _twin(cache: Any) -> Any:
    """A cache of the same keys and values, which goes on for itself: layers exchange these and do not change them."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def record_tokens(model: Any) -> None:
    """From now on, read single tokens from a recording, where the model can be recorded.

    model: what `from_pretrained` made of a native checkpoint. Raises AlphaQError for anything else.
    """
    if not isinstance(model, nn.Module) or not any(isinstance(one, PackedWeights) for one in model.modules()):
        raise AlphaQError(
            "--record is for native checkpoints with packed matrices, which AlphaQ's own kernels run. Quantize the "
            "model with --engine native, or drop the option."
        )
    if "forward" not in model.__dict__:
        forward = model.__dict__["forward"] = Stepwise(model)
        forward.try_out()


def forget_tokens(model: Any) -> None:
    """Undo `record_tokens`."""
    if isinstance(model.__dict__.get("forward"), Stepwise):
        del model.__dict__["forward"]
