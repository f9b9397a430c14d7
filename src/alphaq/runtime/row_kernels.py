"""Rows of a step in memory: where things are in one, what operations there are, and where its tensors' lines begin."""

from __future__ import annotations

from alphaq.simd.vectors import kernel

# Places in a row.
OP, EXTENTS, TENSORS, OWN = 0, 1, 5, 29
ADDRESS, KIND, STRIDES = range(3)  # of a tensor, which takes TENSOR places
TENSOR, ROW = 6, 40
PREPARED = OWN + 9  # of a packed product: whether the one before has made whole numbers of the same inputs
FLOAT32, BFLOAT16, FLOAT16, INT64, BOOL = range(5)

OUTSIDE, EMBED, PACKED, DENSE, APPEND, ATTEND, SUM, MEAN, SOFTMAX, TOP = range(10)
FIRST_PLAIN = 10  # from here on one number at a time
(COPY, NEGATE, RELU, SQUARE) = range(10, 14)
(SILU, SIGMOID, RSQRT, EXP, COS, SIN, TANH, GELU, GELU_TANH, SOFTPLUS, SQRT) = range(14, 25)
(ADD, SUBTRACT, MULTIPLY, DIVIDE) = range(25, 29)
(NE, EQ, LT, LE, GT, GE, MAXIMUM, MINIMUM) = range(29, 37)
CLAMP, MASK, WHERE = range(37, 40)
LONG = 1 << 22  # products of an attention from which torch's threads are worth asking
MANY = 1 << 30
MOST_TOKENS = 64  # lines that one token makes, one for each of its experts; more are not few


@kernel
def item_bytes(kind):
    """Bytes of a number."""
    if kind == FLOAT32:
        return 4
    if kind == INT64:
        return 8
    return 1 if kind == BOOL else 2


@kernel
def kind_of(row, tensor):
    return row[TENSORS + TENSOR * tensor + KIND]


@kernel
def stride_of(row, tensor):
    """Of the last axis."""
    return row[TENSORS + TENSOR * tensor + STRIDES + 3]


@kernel
def line_of(row, tensor, first, second, third):
    """Address of a line of a tensor, along the last axis."""
    at = TENSORS + TENSOR * tensor
    steps = first * row[at + STRIDES] + second * row[at + STRIDES + 1] + third * row[at + STRIDES + 2]
    return row[at + ADDRESS] + steps * item_bytes(row[at + KIND])
