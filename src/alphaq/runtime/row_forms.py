"""How each operation of torch's becomes rows; each function raises NotHere for what is left to torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alphaq.runtime import row_kernels as kernels
from alphaq.runtime.block_kernels import RESTORED
from alphaq.runtime.multiply import packed_linear
from alphaq.runtime.packed import FLAGS, FLOAT16
from alphaq.runtime.recording import Call
from alphaq.runtime.rows import FLOATS, KINDS, NotHere, Rows, kind_of
from alphaq.simd.vectors import LANES

aten = torch.ops.aten
SMALL = 1 << 18  # numbers of a plain matrix of float32; torch's threads are for larger ones
LARGE = 1 << 24  # numbers of one of 16 bits, which torch's own library reads as fast

UNARY = {
    aten.neg.default: kernels.NEGATE,
    aten.silu.default: kernels.SILU,
    aten.silu_.default: kernels.SILU,
    aten.sigmoid.default: kernels.SIGMOID,
    aten.rsqrt.default: kernels.RSQRT,
    aten.sqrt.default: kernels.SQRT,
    aten.exp.default: kernels.EXP,
    aten.cos.default: kernels.COS,
    aten.sin.default: kernels.SIN,
    aten.tanh.default: kernels.TANH,
    aten.relu.default: kernels.RELU,
    aten.square.default: kernels.SQUARE,
    aten.clone.default: kernels.COPY,
    aten.contiguous.default: kernels.COPY,
    aten.reshape.default: kernels.COPY,
    aten.flatten.using_ints: kernels.COPY,
    aten.to.dtype: kernels.COPY,
    aten.to.dtype_layout: kernels.COPY,
    aten.to.device: kernels.COPY,
    aten.to.other: kernels.COPY,
    aten.type_as.default: kernels.COPY,
    aten._to_copy.default: kernels.COPY,
}
BINARY = {
    aten.add.Tensor: kernels.ADD,
    aten.add_.Tensor: kernels.ADD,
    aten.sub.Tensor: kernels.SUBTRACT,
    aten.rsub.Scalar: kernels.SUBTRACT,
    aten.mul.Tensor: kernels.MULTIPLY,
    aten.mul_.Tensor: kernels.MULTIPLY,
    aten.div.Tensor: kernels.DIVIDE,
    aten.div_.Tensor: kernels.DIVIDE,
    aten.ne.Tensor: kernels.NE,
    aten.ne.Scalar: kernels.NE,
    aten.eq.Tensor: kernels.EQ,
    aten.eq.Scalar: kernels.EQ,
    aten.lt.Tensor: kernels.LT,
    aten.lt.Scalar: kernels.LT,
    aten.le.Tensor: kernels.LE,
    aten.le.Scalar: kernels.LE,
    aten.gt.Tensor: kernels.GT,
    aten.gt.Scalar: kernels.GT,
    aten.ge.Tensor: kernels.GE,
    aten.ge.Scalar: kernels.GE,
    aten.maximum.default: kernels.MAXIMUM,
    aten.minimum.default: kernels.MINIMUM,
}


def _scalar(value: Any, kind: torch.dtype) -> float:
    """A number as torch takes it beside a tensor."""
    number = float(value)
    return float(np.float32(number)) if kind in FLOATS else number


def _unary(rows: Rows, call: Call) -> None:
    source, target = call.args[0], call.result
    operation = UNARY[call.function]
    if operation != kernels.COPY and source.dtype not in FLOATS:
        raise NotHere
    if operation == kernels.COPY and target.is_contiguous():
        target = target.view(source.shape)  # another shape of as many numbers
    rows.add(operation, (target, source))


def _gelu(rows: Rows, call: Call) -> None:
    kind = kernels.GELU_TANH if call.kwargs.get("approximate") == "tanh" else kernels.GELU
    rows.add(kind, (call.result, call.args[0]))


def _softplus(rows: Rows, call: Call) -> None:
    if len(call.args) != 1 or call.kwargs:
        raise NotHere
    rows.add(kernels.SOFTPLUS, (call.result, call.args[0]))


def _operand(value: Any, kind: torch.dtype) -> tuple[Tensor | None, float]:
    return (value, 0.0) if isinstance(value, Tensor) else (None, _scalar(value, kind))


def _binary(rows: Rows, call: Call) -> None:
    if call.kwargs.get("alpha", 1) != 1 or len(call.args) != 2 or call.kwargs.keys() - {"alpha"}:
        raise NotHere
    tensors = [one for one in call.args if isinstance(one, Tensor)]
    kind = next((one.dtype for one in tensors if one.dtype in FLOATS), tensors[0].dtype)
    comparing = kernels.NE <= BINARY[call.function] <= kernels.GE
    if call.result.dtype not in (*FLOATS, torch.int64) and not comparing:
        raise NotHere
    left, right = (_operand(one, kind) for one in call.args[:: -1 if call.function is aten.rsub.Scalar else 1])
    rows.add(BINARY[call.function], (call.result, left[0], right[0]), (), (left[1], right[1]))


def _square(rows: Rows, call: Call) -> None:
    if call.args[1] != 2 or call.args[0].dtype not in FLOATS:
        raise NotHere
    rows.add(kernels.SQUARE, (call.result, call.args[0]))


def _clamp(rows: Rows, call: Call) -> None:
    source, low, high = [*call.args, None, None][:3]
    low, high = call.kwargs.get("min", low), call.kwargs.get("max", high)
    kind = source.dtype
    limits = [-math.inf if low is None else _scalar(low, kind), math.inf if high is None else _scalar(high, kind)]
    rows.add(kernels.CLAMP, (call.result, source), (), (0.0, 0.0, *limits))


def _mask(rows: Rows, call: Call) -> None:
    source, mask, value = call.args
    rows.add(kernels.MASK, (call.result, source, mask), (), (0.0, 0.0, _scalar(value, source.dtype)))


def _where(rows: Rows, call: Call) -> None:
    condition, left, right = call.args
    if not all(isinstance(one, Tensor) and one.dtype in FLOATS for one in (left, right)):
        raise NotHere
    rows.add(kernels.WHERE, (call.result, condition, left, right))


def _cat(rows: Rows, call: Call) -> None:
    parts, axis = call.args[0], call.args[1] if len(call.args) > 1 else 0
    begin = 0
    if any(part.dtype != call.result.dtype or part.ndim != call.result.ndim for part in parts):
        raise NotHere
    for part in parts:
        rows.add(kernels.COPY, (call.result.narrow(axis, begin, part.shape[axis]), part))
        begin += part.shape[axis]


def _reduced(rows: Rows, call: Call) -> None:
    source, axes, *keep = call.args
    axes = [axes] if isinstance(axes, int) else axes
    if len(axes or ()) != 1 or source.dtype not in FLOATS or call.result.dtype not in FLOATS:
        raise NotHere
    axis = axes[0] % source.ndim
    target = call.result if (keep and keep[0]) or call.kwargs.get("keepdim") else call.result.unsqueeze(axis)
    operation = kernels.SUM if call.function is aten.sum.dim_IntList else kernels.MEAN
    own = (source.shape[axis], source.stride(axis))
    rows.add(operation, (target, source.narrow(axis, 0, 1)), own)
    rows.kept.append(source)


def _last(source: Tensor, axis: int) -> None:
    if axis % source.ndim != source.ndim - 1 or source.dtype not in FLOATS:
        raise NotHere


def _lines(rows: Rows, operation: int, tensors: Sequence[Tensor], source: Tensor, own: Sequence[int] = ()) -> None:
    """A row over lines of the last axis, which stays one however the others merge."""
    for one in tensors:
        if one.ndim != source.ndim or not one.is_contiguous() or one.dtype not in KINDS:
            raise NotHere
    count, lines = source.shape[-1], source.numel() // max(1, source.shape[-1])
    if not source.is_contiguous() or count < 2:
        raise NotHere
    row = np.zeros(kernels.ROW, np.int64)
    row[kernels.OP] = operation
    row[kernels.EXTENTS : kernels.TENSORS] = [1, 1, lines, count]
    for number, one in enumerate((tensors[0], source, *tensors[1:])):
        at = kernels.TENSORS + kernels.TENSOR * number
        row[at : at + kernels.TENSOR] = [one.data_ptr(), kind_of(one), 0, 0, one.shape[-1], 1]
    row[kernels.OWN : kernels.OWN + len(own)] = own
    rows.rows.append(row)
    rows.numbers.append([0.0] * 4)
    rows.kept += [source, *tensors]


def _softmax(rows: Rows, call: Call) -> None:
    source, axis = call.args[:2]
    _last(source, axis)
    kind = call.args[2] if len(call.args) > 2 else call.kwargs.get("dtype")
    if kind not in (None, torch.float32, source.dtype) or call.result.dtype not in FLOATS:
        raise NotHere
    _lines(rows, kernels.SOFTMAX, [call.result], source)


def _top(rows: Rows, call: Call) -> None:
    source, chosen = call.args[:2]
    given = dict(zip(("dim", "largest"), call.args[2:4], strict=False)) | call.kwargs
    axis, largest = given.get("dim", -1), given.get("largest", True)
    _last(source, axis)
    if not largest:
        raise NotHere
    values, places = call.result
    rows.may_stop(call)  # for equal candidates
    _lines(rows, kernels.TOP, [values, places], source, [chosen])


def _embed(rows: Rows, call: Call) -> None:
    table, number = call.args[:2]
    if number.numel() != 1 or number.dtype != torch.int64 or table.dtype not in FLOATS:
        raise NotHere
    rows.may_stop(call)  # which says what is wrong with a number that the table has not
    row = table[:1].view(*([1] * (call.result.ndim - 1)), -1)
    rows.add(kernels.EMBED, (call.result, row), (number.data_ptr(), len(table), table.stride(0)))
    rows.kept += [table, number]


def _linear(rows: Rows, call: Call) -> None:
    inputs, weight, bias = [*call.args, None][:3]
    tokens, (count, columns) = inputs.numel() // max(1, inputs.shape[-1]), weight.shape
    alike = {one.dtype for one in (inputs, weight, call.result) if one is not None} | (
        {bias.dtype} if bias is not None else set()
    )
    lying = all(one.is_contiguous() for one in (inputs, weight, call.result, *([bias] if bias is not None else [])))
    if len(alike) != 1 or not lying or tokens > kernels.MOST_TOKENS:
        raise NotHere
    if inputs.dtype == torch.float32:
        if columns % LANES or weight.numel() > SMALL:
            raise NotHere
        rows.add(kernels.DENSE, (call.result.view(-1), None), (count, columns, tokens))
        for number, one in ((1, inputs), (2, weight), (3, bias)):
            if one is not None:
                rows.rows[-1][kernels.TENSORS + kernels.TENSOR * number] = one.data_ptr()
        rows.kept += [inputs, weight, bias]
        return
    if weight.numel() > LARGE:
        raise NotHere
    coding = torch.tensor([[[weight.data_ptr(), 16, 0, FLOAT16 if weight.dtype == torch.float16 else 0]]])
    every = torch.arange(tokens)
    _products(rows, call, inputs, coding, count, torch.zeros_like(every), every, bias)
    rows.kept += [weight]


def _packed(rows: Rows, call: Call) -> None:
    inputs, table, count, experts, tokens = call.args
    if bool((table[..., FLAGS] & RESTORED).any()) or len(inputs) > kernels.MOST_TOKENS:
        raise NotHere
    lying = all(one.is_contiguous() for one in (inputs, table, experts, tokens, call.result))
    if not lying or experts.dtype != torch.int64 or tokens.dtype != torch.int64:
        raise NotHere
    _products(rows, call, inputs, table, count, experts, tokens, None)


def _products(
    rows: Rows,
    call: Call,
    inputs: Tensor,
    table: Tensor,
    count: int,
    experts: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
) -> None:
    columns = inputs.shape[-1]
    rows.packed_kinds.add(inputs.dtype)
    rows.may_stop(call)
    own = (inputs.numel() // columns, columns, table.data_ptr(), *table.shape[:2], count)
    rows.add(kernels.PACKED, (call.result.view(-1), None), (*own, experts.data_ptr(), tokens.data_ptr(), len(experts)))
    row = rows.rows[-1]
    for number, one in ((1, inputs), (3, bias)):
        if one is not None:
            at = kernels.TENSORS + kernels.TENSOR * number
            row[at : at + 2] = one.data_ptr(), kind_of(one)
    rows.kept += [inputs, table, experts, tokens, bias]


def append(rows: Rows, call: Call, slot: int) -> None:
    new = call.inputs[1]
    row = np.zeros(kernels.ROW, np.int64)
    row[kernels.OP] = kernels.APPEND
    row[kernels.EXTENTS : kernels.TENSORS] = [1, 1, new.shape[1], new.shape[3]]
    at = kernels.TENSORS + kernels.TENSOR
    row[at : at + kernels.TENSOR] = [new.data_ptr(), KINDS[new.dtype], 0, 0, new.stride(1), new.stride(3)]
    row[kernels.OWN] = slot
    rows.rows.append(row)
    rows.numbers.append([0.0] * 4)
    rows.kept.append(new)


def _attend(rows: Rows, call: Call, slots: tuple[int, ...]) -> None:
    query, keys, values = call.args[:3]
    (_, heads, count, width), shared = query.shape, keys.shape[1]
    kinds = {one.dtype for one in (query, keys, values, call.result)}
    whole = heads % shared == 0 and (heads == shared or call.kwargs.get("enable_gqa"))
    if len(kinds) != 1 or width % LANES or values.shape[3] % LANES or values.shape[1] != shared or not whole:
        raise NotHere
    scale = call.kwargs.get("scale")
    row = np.zeros(kernels.ROW, np.int64)
    row[kernels.OP] = kernels.ATTEND
    for number, one in enumerate((call.result, query)):
        at = kernels.TENSORS + kernels.TENSOR * number
        row[at : at + kernels.TENSOR] = [one.data_ptr(), KINDS[one.dtype], 0, *one.stride()[1:]]
    row[kernels.OWN : kernels.OWN + 7] = [*slots, heads, count, width, values.shape[3], shared]
    rows.may_stop(call, slots)
    rows.rows.append(row)
    rows.numbers.append([width**-0.5 if scale is None else scale, 0.0, 0.0, 0.0])
    rows.kept += [query, call.result]


FORMS: dict[Any, Callable[[Rows, Call], None]] = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(BINARY, _binary),
    aten.gelu.default: _gelu,
    aten.softplus.default: _softplus,
    aten.pow.Tensor_Scalar: _square,
    aten.clamp.default: _clamp,
    aten.masked_fill.Scalar: _mask,
    aten.where.self: _where,
    aten.cat.default: _cat,
    aten.sum.dim_IntList: _reduced,
    aten.mean.dim: _reduced,
    aten.softmax.int: _softmax,
    aten.topk.default: _top,
    aten.embedding.default: _embed,
    aten.linear.default: _linear,
    packed_linear._opoverload: _packed,
}


def take(rows: Rows, call: Call, slots: tuple[int, ...] = ()) -> None:
    """Add the rows of a call; slots: of keys and values, of an attention to them."""
    begin = len(rows.rows)
    try:
        if slots:
            _attend(rows, call, slots)
        elif call.function in FORMS:
            FORMS[call.function](rows, call)
        else:
            raise NotHere
    except NotHere:
        del rows.rows[begin:], rows.numbers[begin:]
        rows.leave(call, slots)
