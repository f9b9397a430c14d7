"""Look at what llama.cpp computes while it computes it: every intermediate tensor, of every architecture.

llama.cpp shows each node of its graph to a callback (`cb_eval`), first to ask whether it is wanted, then with its
values. Nodes carry names by convention ("ffn_moe_down-3", "l_out-3"), and what multiplies a weight is its second
input. Source: ggml.h and tools/imatrix of llama.cpp. The layout of `ggml_tensor` is no promise of the library's, so
each node's name is asked of the library too and must lie where the layout says.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_TYPES = {0: np.dtype(np.float32), 26: np.dtype(np.int32)}  # ggml's numbers of those that graphs compute in
_MATRIX_PRODUCTS = ("MUL_MAT", "MUL_MAT_ID")


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
        return self._tensor.name.decode(errors="replace")

    @property
    def shape(self) -> tuple[int, ...]:
        """As NumPy has it, of four dimensions."""
        return tuple(reversed(self._tensor.ne))

    def source(self, number: int) -> Node | None:
        """One of its inputs."""
        address = self._tensor.src[number]
        return Node(address, "") if address else None

    def values(self) -> NDArray[Any]:
        """Its values, [d3, d2, d1, d0] without a copy; valid only while the callback runs."""
        tensor = self._tensor
        dtype = _TYPES[tensor.type]
        if 0 in tensor.ne:
            return np.empty(self.shape, dtype)
        begin = ctypes.c_byte * (sum((n - 1) * s for n, s in zip(tensor.ne, tensor.nb, strict=True)) + dtype.itemsize)
        flat = np.frombuffer(begin.from_address(tensor.data), np.uint8)
        return np.lib.stride_tricks.as_strided(
            flat[: dtype.itemsize].view(dtype), self.shape, tuple(reversed(tensor.nb)), writeable=False
        )

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product."""
        return self.op in _MATRIX_PRODUCTS


class Watch(Protocol):
    """Who looks."""

    def wants(self, node: Node) -> bool:
        """Whether the values of a node that will be computed are wanted."""

    def sees(self, node: Node) -> None:
        """A wanted node, just computed."""


def callback(watch: Watch, library: ctypes.CDLL) -> Any:
    """What `cb_eval` calls. An error of the watch's stops the pass and is kept as `callback.error`."""

    @ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
    def show(address: int, asked: bool, _: int | None) -> bool:
        try:
            node = Node(address, library.ggml_op_desc(address).decode())
            if asked:
                return watch.wants(node)
            watch.sees(node)
        except Exception as error:
            show.error = show.error or error  # type: ignore[attr-defined]
            return False
        return True

    show.error = None  # type: ignore[attr-defined]
    return show
