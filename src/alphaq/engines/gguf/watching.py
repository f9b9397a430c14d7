"""Look at what llama.cpp computes while it computes it: every intermediate tensor, of every architecture.

llama.cpp shows each node of its graph to a callback (`cb_eval`), first to ask whether it is wanted, then with its
values. Nodes carry names by convention ("ffn_moe_down-3", "l_out-3"), and what multiplies a weight is its second
input. Source: ggml.h and tools/imatrix of llama.cpp. The layout of `ggml_tensor` is no promise of the library's, so
the first node's name is asked of the library too and must lie where the layout says.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from alphaq.errors import AlphaQError

_BF16 = 30
_TYPES: dict[int, np.dtype[Any]] = {  # ggml's numbers of those that graphs compute in
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    26: np.dtype(np.int32),
    _BF16: np.dtype(np.uint16),  # the upper half of a float32
}
_MATRIX_PRODUCTS = ("MUL_MAT", "MUL_MAT_ID")

EVAL = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
"""Type of `cb_eval`: (node, whether it only asks, its user data) → whether the node is wanted, or to go on."""


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int32),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the graph, or an input of one. op: as ggml describes it, "MUL_MAT"."""

    address: int
    op: str

    @property
    def _tensor(self) -> _Tensor:
        return _Tensor.from_address(self.address)

    @property
    def name(self) -> str:
        """Its name: a weight's is that in the file."""
        name: bytes = self._tensor.name
        return name.decode(errors="replace")

    @property
    def shape(self) -> tuple[int, ...]:
        """As NumPy has it, of four dimensions."""
        return tuple(reversed(self._tensor.ne))

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product."""
        return self.op in _MATRIX_PRODUCTS

    @property
    def readable(self) -> bool:
        """Whether its values are of a type that `values` knows, which blocks of quantized ones are not."""
        return self._tensor.type in _TYPES

    def source(self, number: int) -> Node | None:
        """One of its inputs."""
        address = self._tensor.src[number]
        return Node(address, "") if address else None

    def values(self) -> NDArray[Any]:
        """Its values [d3, d2, d1, d0], without a copy but for BF16; valid only while the callback runs."""
        tensor = self._tensor
        dtype = _TYPES[tensor.type]
        if 0 in tensor.ne:
            return np.empty(self.shape, dtype)
        nbytes = sum((n - 1) * step for n, step in zip(tensor.ne, tensor.nb, strict=True)) + dtype.itemsize
        flat = np.frombuffer((ctypes.c_byte * nbytes).from_address(tensor.data), np.uint8)
        first = flat[: dtype.itemsize].view(dtype)
        values = np.lib.stride_tricks.as_strided(first, self.shape, tuple(reversed(tensor.nb)), writeable=False)
        return (values.astype(np.uint32) << 16).view(np.float32) if tensor.type == _BF16 else values


class NoNumber(Exception):
    """Where values are NaN or infinite, in words, told by what knows a model's nodes but not its file."""


class Watch(Protocol):
    """Who looks. Raises NoNumber for values that it cannot add up."""

    def wants(self, node: Node) -> bool:
        """Whether the values of a node that will be computed are wanted."""

    def sees(self, node: Node) -> None:
        """A wanted node, just computed."""


class Callback:
    """What llama.cpp calls for a watch. An error of the watch's ends the pass, and is kept for `raise_error`."""

    def __init__(self, watch: Watch, library: ctypes.CDLL) -> None:
        self._watch, self._library = watch, library
        self._error: BaseException | None = None
        self._known = False
        self.function = EVAL(self._show)

    def raise_error(self) -> None:
        """Raise what the watch raised since the last time, which no C code can pass on."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _show(self, address: int, asked: bool, _: int | None) -> bool:
        if self._error is not None:
            return asked  # wanting the next node, and then not going on, ends the pass
        try:
            node = Node(address, self._library.ggml_op_desc(address).decode())
            self._check(node)
            if asked:
                return self._watch.wants(node)
            self._watch.sees(node)
        except BaseException as error:  # an interrupt too
            self._error = error
            return asked
        return True

    def _check(self, node: Node) -> None:
        """Raise AlphaQError where nodes are laid out in another way than `_Tensor`."""
        if not self._known and self._library.ggml_get_name(node.address) != node._tensor.name:
            raise AlphaQError(
                "This build of llama.cpp lays ggml_tensor out in another way, so what it computes cannot be read. "
                "Install the version of xllamacpp that this AlphaQ was tested with, or give an importance matrix of "
                "llama-imatrix."
            )
        self._known = True
