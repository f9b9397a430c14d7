"""What torch computes while a model reads one token, as a list of operations on memory that stays where it is.

Views are operations of no cost: all that is recorded of a tensor is where it lies. What does not lead to the logits or
into the cache is dropped, and so is what depends on nothing but itself: such constants were computed for good. Two
recordings at two lengths of the same text must be the same in everything but the cache; what a model does by the
length, by values or by chance is thereby seen, and not run from a recording.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
CAT = torch.ops.aten.cat.default
ASKS = {  # which no tag tells
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero_numpy.default,
    torch.ops.aten.repeat_interleave.self_Tensor,
    torch.ops.aten.tensor_split.tensor_indices_or_sections,
    torch.ops.aten.where.default,
}
TAKES = "__array__ __bool__ __dlpack__ __float__ __index__ __int__ __repr__ data_ptr item new_tensor numpy tolist"
READS = {torch.as_tensor, torch.asarray, torch.tensor, *(getattr(Tensor, name) for name in TAKES.split())}
"""What Python takes numbers with; some of it no operation tells of."""
NO_CHANGE = ("aten::detach_", "aten::lift_fresh")  # say that they write, and change no number
LARGEST_CONSTANT = 1 << 16  # numbers


class NotRecorded(Exception):
    """Why a step cannot be run from a recording."""


@dataclass(frozen=True)
class Call:
    """One operation as torch was asked for it."""

    function: Any
    args: tuple[Any, ...]
    kwargs: Any
    result: Any

    @property
    def inputs(self) -> list[Tensor]:
        """Tensors that it is given."""
        return [one for one in tree_leaves((self.args, self.kwargs)) if isinstance(one, Tensor)]

    @property
    def outputs(self) -> list[Tensor]:
        """Tensors that it gives."""
        return [one for one in tree_leaves(self.result) if isinstance(one, Tensor)]

    @property
    def changed(self) -> list[Tensor]:
        """Inputs whose numbers it changes."""
        schema = self.function._schema
        if schema.name in NO_CHANGE:
            return []
        given = {argument.name: value for argument, value in zip(schema.arguments, self.args, strict=False)}
        given |= self.kwargs
        written = [one.name for one in schema.arguments if one.alias_info is not None and one.alias_info.is_write]
        return [one for name in written for one in tree_leaves(given.get(name)) if isinstance(one, Tensor)]

    @property
    def asks(self) -> bool:
        """Whether numbers decide what Python gets, or a shape."""
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        return self.function in ASKS or bool(tags & set(self.function.tags))

    @property
    def by_chance(self) -> bool:
        """Whether it draws random numbers."""
        return torch.Tag.nondeterministic_seeded in self.function.tags and self.function is not ATTENTION


class Reads(TorchFunctionMode):
    """Keeps every tensor whose numbers Python takes."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.tensors += [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Keeps every call, and thereby every tensor where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            result = func(*args, **(kwargs or {}))
        self.calls.append(Call(func, tuple(args), dict(kwargs or {}), result))
        return result


def memory_of(tensor: Tensor) -> int:
    """What tells the memory of tensors apart, while they live."""
    return int(tensor.untyped_storage()._cdata)


@dataclass
class Step:
    """A recorded step. inputs: token and position, int64 [1, 1]; caches: keys and values of each layer before it.

    calls: those that count, in order. appended, attended: of these, the slots that a call is about, by its place.
    """

    inputs: Sequence[Tensor]
    caches: Sequence[Tensor]
    logits: Tensor
    calls: list[Call] = field(default_factory=list)
    appended: dict[int, int] = field(default_factory=dict)
    attended: dict[int, tuple[int, int]] = field(default_factory=dict)
    constants: dict[int, int] = field(default_factory=dict)
    """Memory → a digest of the calls that filled it."""
    made: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        calls: Sequence[Call],
        reads: Sequence[Tensor],
        inputs: Sequence[Tensor],
        caches: Sequence[Tensor],
        logits: Tensor,
    ) -> Step:
        """reads: tensors whose numbers Python took. Raises NotRecorded."""
        step = cls(inputs, caches, logits)
        step._find_constants(calls)
        if any(memory_of(one) not in step.constants for one in reads):
            raise NotRecorded("Python decides by numbers")
        slots = {memory_of(one): slot for slot, one in enumerate(caches)}
        grown: dict[int, int] = {}  # memory → slot
        for call in calls:
            if call.function is CAT and call.inputs and memory_of(call.inputs[0]) in slots:
                axis = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)
                if len(call.inputs) != 2 or call.inputs[1].shape[-2] != 1 or axis not in (-2, 2):
                    raise NotRecorded("a cache grows by more than a token")
                grown[memory_of(call.result)] = slots[memory_of(call.inputs[0])]
        wanted = {memory_of(logits)}
        kept: list[Call] = []
        found: set[int] = set()
        for call in reversed(calls):
            outputs = {memory_of(one) for one in call.outputs}
            if slot := _slot_of(call, grown):
                found.add(slot - 1)
            elif not (outputs | {memory_of(one) for one in call.changed}) & wanted or outputs <= step.constants.keys():
                continue
            if call.by_chance:
                raise NotRecorded(f"{call.function} draws random numbers")
            kept.append(call)
            wanted |= {memory_of(one) for one in call.inputs}
        if found != set(range(len(caches))):
            raise NotRecorded("some layers keep nothing of the token")
        step._take(reversed(kept), grown)
        return step

    def _find_constants(self, calls: Sequence[Call]) -> None:
        """Memory that no input, parameter or cache has a part in, and that nothing changes afterwards."""
        changed = {memory_of(one) for call in calls for one in call.changed}
        for call in calls:
            outputs = {memory_of(one) for one in call.outputs}
            lifted = call.function._schema.name == "aten::lift_fresh"  # a tensor that Python made of numbers
            fresh = lifted or all(memory_of(one) in self.constants for one in call.inputs)
            if not fresh and call.asks:
                raise NotRecorded(f"{call.function} lets Python decide by numbers")
            if fresh and not call.by_chance and not outputs & changed:
                given = tree_map(self._origin, (call.args, call.kwargs))
                self.constants |= dict.fromkeys(outputs - self.constants.keys(), hash(f"{call.function} {given}"))

    def _origin(self, value: Any) -> str:
        """What a constant was made of, so that a number which grows with the text is seen before it counts."""
        if not isinstance(value, Tensor):
            return str(value)
        made = self.constants.get(memory_of(value))
        return f"{made} {_numbers(value)}" if made is None else str(made)

    def _take(self, calls: Iterable[Call], grown: dict[int, int]) -> None:
        caches = {memory_of(one) for one in self.caches}
        for call in calls:
            place, inputs = len(self.calls), {memory_of(one) for one in call.inputs}
            if not call.changed and {memory_of(one) for one in call.outputs} <= inputs:
                continue  # a view
            if any(memory_of(one) not in self.made for one in call.changed):
                raise NotRecorded(f"{call.function} changes what stays beyond a step")
            if slot := _slot_of(call, grown):
                self.appended[place] = slot - 1
            elif inputs & (grown.keys() | caches):
                self.attended[place] = _attention(call, grown)
            for one in call.outputs:
                self.made.setdefault(memory_of(one), place)
            self.calls.append(call)

    def form(self) -> list[object]:
        """What must be the same at every length."""
        forms: list[object] = []
        for place, call in enumerate(self.calls):
            if place in self.appended:
                forms.append((self.appended[place], self._form(call.inputs[1])))
            elif place in self.attended:
                options = str((call.args[3:], call.kwargs))
                forms.append((self.attended[place], options, self._form(call.args[0]), self._form(call.result)))
            else:
                forms.append((str(call.function), tree_map(self._form, (call.args, call.kwargs, call.result))))
        return [*forms, self._form(self.logits)]

    def _form(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return str(value)
        memory = memory_of(value)
        if memory in self.constants:
            return self.constants[memory], _numbers(value)
        where: object = value.data_ptr()  # of parameters
        if memory in self.made:
            where = self.made[memory], value.storage_offset()
        for number, one in enumerate(self.inputs):
            if memory == memory_of(one):
                where = f"input {number}"
        return where, tuple(value.shape), value.stride(), value.dtype

    def outside(self) -> Iterator[Tensor]:
        """Tensors that are neither made by the step nor given to it."""
        own = {memory_of(one) for one in (*self.inputs, *self.caches)} | self.made.keys() | self.constants.keys()
        for place, call in enumerate(self.calls):
            if place not in self.attended:
                yield from (one for one in call.inputs if memory_of(one) not in own)


def _numbers(constant: Tensor) -> str:
    if constant.numel() > LARGEST_CONSTANT:
        raise NotRecorded("a constant is large")
    return str(constant.tolist())


def _slot_of(call: Call, grown: dict[int, int]) -> int:
    """1 + the slot that a call adds a token to; 0 of other calls."""
    if call.function is CAT and (slot := grown.get(memory_of(call.result))) is not None:
        return slot + 1
    return 0


def _attention(call: Call, grown: dict[int, int]) -> tuple[int, int]:
    """The slots of keys and values of an attention to all of them. Raises NotRecorded for anything else."""
    options = {name: value for name, value in call.kwargs.items() if value is not None}
    plain = not any(one is not None and (isinstance(one, Tensor) or one) for one in call.args[3:])
    plain = plain and options.keys() <= {"scale", "enable_gqa", "dropout_p", "is_causal"}
    plain = plain and not options.get("dropout_p") and not options.get("is_causal")
    if call.function is not ATTENTION or not plain:
        raise NotRecorded(f"{call.function} reads the cache")
    query, keys, values = call.args[:3]
    slots = [grown.get(memory_of(one)) for one in (keys, values)]
    whole = all(
        one.is_contiguous() and one.numel() * one.itemsize == one.untyped_storage().nbytes() for one in (keys, values)
    )
    if None in slots or not whole or memory_of(query) in grown or query.ndim != 4 or len(query) != 1:
        raise NotRecorded("attention is not to all keys of a layer")
    return slots[0], slots[1]  # type: ignore[return-value] # none is None
