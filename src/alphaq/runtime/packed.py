"""Native blocks in memory as they lie in the file, and where kernels find them.

Kernels get addresses, not tensors: experts of one projection have blocks of different lengths, which may lie in
different files. A table says of each where it is and how it is coded; the block itself says the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alphaq.errors import CheckpointError
from alphaq.formats.blocks import decode, dequantize, native_format, read_block_header
from alphaq.formats.kept import KEPT as SIXTEEN_BITS
from alphaq.formats.native import HEADER_BYTES
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import Shape
from alphaq.runtime.block_kernels import HALVES, RESTORED, SYMMETRIC, TRELLIS
from alphaq.runtime.lookup import BlockForm, restored_rows

ADDRESS, BITS, GROUP_SIZE, FLAGS = range(4)  # columns of a table; bits of a trellis are quarters, see `block_kernels`
FIELDS = 4
FLOAT16 = 1  # flag of matrices of 16 bits, which are bfloat16 otherwise
RESTORING_DEVICES = ("cpu",)  # where matrices without a kernel can be multiplied
KEPT = (torch.bfloat16, torch.float16)


class PackedWeights(nn.Module):
    """The same projections of some experts, each [rows, columns]: blocks, or matrices kept in 16 bits.

    names: of the tensors in the checkpoint, [projections][experts]; a plain linear layer is one projection of one
    expert. The tensors are buffers of bytes, so that `.to` moves them and never casts them; on the CPU they may be the
    file itself. They are no part of the state_dict, which has no place for an expert's own name. dtype: what restored
    matrices have; `.to` changes it.
    """

    table: Tensor
    """int64 [projections, experts, FIELDS], on the blocks' device."""
    form: BlockForm | None
    """Where things are in the first block; None if its rows cannot be looked up one by one."""

    def __init__(self, names: Sequence[Sequence[str]], shape: Shape, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.names = tuple(tuple(row) for row in names)
        self.shape = shape
        self.dtype = dtype
        self.kept: dict[str, torch.dtype] = {}
        self._is_hf_initialized = True  # transformers would draw random weights

    def reserve(self, nbytes: int) -> None:
        """Stand for so many bytes until filled: what decides about devices asks for sizes first."""
        self.register_buffer("reserved", torch.empty(nbytes, dtype=torch.uint8, device="meta"), persistent=False)

    def fill(self, tensors: Sequence[Sequence[Tensor]]) -> None:
        """Take the tensors, [projections][experts]: blocks, uint8 [bytes], or bfloat16 or float16 [rows, columns].

        Raises CheckpointError by name if one has another shape.
        """
        if hasattr(self, "reserved"):
            del self.reserved
        for projection, (names, row) in enumerate(zip(self.names, tensors, strict=True)):
            for expert, (name, tensor) in enumerate(zip(names, row, strict=True)):
                if tensor.dtype in KEPT:
                    self.kept[name] = tensor.dtype
                    if tuple(tensor.shape) != self.shape:
                        raise _of_another_shape(name, tuple(tensor.shape), self.shape)
                held = tensor.reshape(-1).view(torch.uint8)
                self.register_buffer(f"block_{projection}_{expert}", held, persistent=False)
        self._index()

    def _index(self) -> None:
        """Make the table of where everything is now."""
        fields = [
            [self._fields(self._block(projection, expert), name) for expert, name in enumerate(names)]
            for projection, names in enumerate(self.names)
        ]
        self.table = torch.tensor(fields, dtype=torch.int64).to(self._block(0, 0).device)
        first = self.choice(0, 0)
        self.form = BlockForm.of(first, self.shape) if not first.kept and native_format(first).looked_up else None

    def _block(self, projection: int, expert: int) -> Tensor:
        return self._buffers[f"block_{projection}_{expert}"]  # type: ignore[return-value]

    def _fields(self, block: Tensor, name: str) -> tuple[int, int, int, int]:
        if kind := self.kept.get(name):
            return block.data_ptr(), SIXTEEN_BITS.bits, 0, FLOAT16 if kind == torch.float16 else 0
        choice, found = read_block_header(block, name)
        if found != self.shape:
            raise _of_another_shape(name, found, self.shape)
        form, parts = native_format(choice), native_format(choice).parts(choice, found)
        end = HEADER_BYTES + parts.codes + parts.offsets + parts.scales
        begin = end - parts.scales - (parts.offsets if form.means else 0)
        if not bool(torch.isfinite(block[begin:end].clone().view(torch.float16)).all()):
            raise CheckpointError(f"{name} has scales that are not finite. Quantize the model again.")
        whole_rows = not form.quarters(choice) or choice.groups(found[1]) == 1
        if not (form.fused and whole_rows):
            if block.device.type not in RESTORING_DEVICES:
                raise _without_kernel(name, choice, block.device)
            decode(block, name)  # refuses what nothing else looks at
            return block.data_ptr(), choice.bits, choice.group_size, RESTORED
        if quarters := form.quarters(choice):
            return block.data_ptr(), quarters, choice.group_size, TRELLIS
        return block.data_ptr(), choice.bits, choice.group_size, SYMMETRIC * choice.symmetric | HALVES * form.halves

    @property
    def device(self) -> torch.device:
        """Where the blocks are; "meta" until filled."""
        return self.table.device if hasattr(self, "table") else torch.device("meta")

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def choice(self, projection: int, expert: int) -> Choice:
        """How one matrix is stored."""
        name = self.names[projection][expert]
        return SIXTEEN_BITS if name in self.kept else read_block_header(self._block(projection, expert), name)[0]

    @torch.compiler.disable
    def dequantized(self, projection: int, expert: int, dtype: torch.dtype | None = None) -> Tensor:
        """One matrix, [rows, columns]."""
        dtype = dtype or self.dtype
        name, block = self.names[projection][expert], self._block(projection, expert)
        if name in self.kept:
            return block.view(self.kept[name]).view(self.shape).to(dtype)
        return dequantize(decode(block.cpu(), name), dtype).to(block.device)

    def rows(self, numbers: Tensor) -> Tensor:
        """Some rows of the first matrix, which must be packed: int64 [n] → [n, columns], where the numbers are."""
        block = self._block(0, 0)
        if self.form is None:
            found = self.dequantized(0, 0).index_select(0, numbers.to(block.device))
        else:
            found = restored_rows(block, self.form, numbers.to(block.device))
        return found.to(numbers.device, self.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Everything under its name in the checkpoint, as it is stored there."""
        found = {}
        for projection, names in enumerate(self.names):
            for expert, name in enumerate(names):
                block = self._block(projection, expert)
                found[name] = block.view(self.kept[name]).view(self.shape) if name in self.kept else block
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `.to` calls."""
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if hasattr(self, "table"):
            self._index()
        return self

    def __setstate__(self, state: dict[str, object]) -> None:
        """Copies and what is read from a pickle lie elsewhere."""
        super().__setstate__(state)
        if hasattr(self, "table"):
            self._index()

    def extra_repr(self) -> str:
        """Shapes and mean width, for `print(model)`."""
        size = f"{len(self.names)} × {len(self.names[0])} × {list(self.shape)}"
        if not hasattr(self, "table"):
            return size
        bits, flags = self.table[..., BITS].double(), self.table[..., FLAGS]
        return f"{size}, {torch.where(flags & TRELLIS > 0, bits / 4, bits).mean():.2f} bits"


def _without_kernel(name: str, choice: Choice, device: torch.device) -> CheckpointError:
    return CheckpointError(
        f"{name} is stored as {choice}, for which there is no kernel for {device.type} (mixes of widths, and rows of "
        "trellis codes over 65535 columns). Run it on the CPU, or quantize again with other --choices, such as 1,2,3,4."
    )


def _of_another_shape(name: str, found: tuple[int, ...], expected: Shape) -> CheckpointError:
    return CheckpointError(
        f"{name} has shape {list(found)}, the model's class expects {list(expected)}. "
        "Quantize the model again or correct config.json."
    )
