"""Read stored tensors, or rows of one, as the values that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alphaq.checkpoint.encoded.encodings import decode
from alphaq.checkpoint.files import SourceFile
from alphaq.checkpoint.safetensors_format import TORCH_DTYPES
from alphaq.checkpoint.tensors import Encoding, TensorInfo, rows_place, stored_grid
from alphaq.nouns.matrix import MatrixRef


@dataclass(frozen=True)
class TensorReader:
    """Reads what lies in weight files.

    file: opens one by its name. memory: uint8, where rows that lie on disk as they are come to lie, if it holds them.
    """

    file: Callable[[str], SourceFile]
    memory: Tensor | None = None

    def whole(self, shard: str, info: TensorInfo) -> Tensor:
        """A whole tensor in the dtype and shape that its info names."""
        encoding = info.encoding
        if encoding is None:
            return self.file(shard).read(info.begin, info.nbytes).view(TORCH_DTYPES[info.dtype]).view(info.shape)
        if encoding.decoder is not None:
            return self._by_decoder(shard, info, encoding.decoder)
        slices, rows, columns = stored_grid(info)
        sides = (columns, rows) if encoding.turned else (rows, columns)
        whole = torch.empty((slices, *sides), dtype=TORCH_DTYPES[info.dtype])
        for index, part in enumerate(whole):
            on_disk = self.rows(shard, info, index, 0, rows)
            part.copy_(on_disk.T if encoding.turned else on_disk)
        return whole.view(info.shape)

    def rows(self, shard: str, info: TensorInfo, index: int, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a slice as they lie on disk, decoded, [rows, columns]."""
        encoding = info.encoding
        if encoding is not None and encoding.decoder is not None:
            return self._by_decoder(shard, info, encoding.decoder)[start:stop]
        if encoding is not None and encoding.head_rows:
            return self._rows_of_heads(shard, info, encoding, start, stop)
        memory = self.memory if encoding is None else None
        data = self.file(shard).read(*rows_place(info, index, start, stop), memory).view(stop - start, -1)
        if encoding is None or encoding.scheme == "plain":
            return data.view(TORCH_DTYPES[info.dtype])
        apart = replace(self, memory=None)  # parts are wanted together
        parts = {
            name: apart.rows(part.shard, part.info, part.slice_of(index), *part.rows(start, stop))
            for name, part in encoding.parts
        }
        return decode(encoding, data, parts, start)

    def _by_decoder(self, shard: str, info: TensorInfo, decoder: Callable[[Tensor, str], Tensor]) -> Tensor:
        """A tensor of which no part can be read alone."""
        return decoder(self.file(shard).read(info.begin, info.nbytes), info.name).view(info.shape)

    def _rows_of_heads(self, shard: str, info: TensorInfo, encoding: Encoding, start: int, stop: int) -> Tensor:
        """Rows where those of a head's halves lie in turns: whole heads are read and put in order."""
        height = encoding.head_rows
        first, last = start // height * height, -(-stop // height) * height
        turns = self.rows(shard, replace(info, encoding=replace(encoding, head_rows=0)), 0, first, last)
        halves = turns.view(-1, height // 2, 2, turns.shape[1]).transpose(1, 2)
        return halves.reshape(turns.shape)[start - first : stop - first]


def rows_as_stored(info: TensorInfo, matrix: MatrixRef) -> bool:
    """Whether the rows of a matrix are rows on disk."""
    return matrix.transposed == (info.encoding is not None and info.encoding.turned)


def stored_rows(info: TensorInfo, matrix: MatrixRef) -> tuple[int, int]:
    """First row and row after the last, on disk, that hold a matrix; all of its slice if disk has its columns."""
    if rows_as_stored(info, matrix):
        return matrix.row_start, matrix.row_start + (matrix.shape[0] - 1) * matrix.row_step + 1
    return 0, matrix.shape[1]
