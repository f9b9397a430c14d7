"""Spectra on a GPU: blocks of many matrices to a launch, the next ones gathered and copied meanwhile."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import DeviceError
from alphaq.nouns.matrix import MatrixRef
from alphaq.nouns.spectrum import Spectrum
from alphaq.spectra.eigenvalues import block_eigenvalues, near_one
from alphaq.spectra.farms import blocks
from alphaq.spectra.measure import describe, moments
from alphaq.spectra.tail import tail_count

PARAMETERS_AT_ONCE = 64 << 20  # of a task of its own, on another machine
BLOCKS_AT_ONCE = 4096  # of 128 × 128 in float32: 256 MiB, and as much again for their Gram matrices


@dataclass(frozen=True)
class _Batch:
    """Blocks of one shape on the device, with the matrices they come from."""

    blocks: torch.Tensor
    scales: torch.Tensor
    counts: list[int]
    moments: list[tuple[float, float]]


@dataclass(frozen=True)
class DeviceTask:
    """Consecutive matrices of one tensor's file whose spectra a machine with a card is to find."""

    matrices: tuple[MatrixRef, ...]
    device: str

    @property
    def tensor(self) -> str:
        """The tensor that holds the first, and whose file holds all."""
        return self.matrices[0].tensor

    @property
    def nbytes(self) -> int:
        """Bytes held while the task runs."""
        return 2 * sum(matrix.parameters for matrix in self.matrices)


def device_tasks(checkpoint: Checkpoint, matrices: Iterable[MatrixRef], device: str) -> Iterator[DeviceTask]:
    """Consecutive matrices of the same files, up to `PARAMETERS_AT_ONCE`."""
    group: list[MatrixRef] = []
    for matrix in matrices:
        full = sum(one.parameters for one in group) + matrix.parameters > PARAMETERS_AT_ONCE
        if group and (full or checkpoint.shards_under(matrix.tensor) != checkpoint.shards_under(group[0].tensor)):
            yield DeviceTask(tuple(group), device)
            group = []
        group.append(matrix)
    if group:
        yield DeviceTask(tuple(group), device)


def device_batch(checkpoint: Checkpoint, task: DeviceTask) -> list[Spectrum]:
    """The spectra of a task's matrices."""
    return list(device_spectra(checkpoint, task.matrices, task.device))


def check_device(device: str) -> torch.device:
    """A device that torch can use. Raises DeviceError otherwise."""
    try:
        target = torch.device(device)
        torch.linalg.eigvalsh(torch.eye(2, device=target))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise unusable(device, error) from None
    return target


def unusable(device: str, error: BaseException) -> DeviceError:
    """What to raise when torch cannot compute on a device."""
    reason = str(error).splitlines()[0]
    return DeviceError(f"--device {device} cannot be used ({reason}). Use cpu, or a device of this machine.")


def device_spectra(checkpoint: Checkpoint, matrices: Iterable[MatrixRef], device: str) -> Iterator[Spectrum]:
    """Spectra of many matrices in order, eigenvalues by torch on `device`.

    A thread reads, gathers and starts the copies two batches ahead of the eigenvalues.
    """
    target = check_device(device)
    ready: queue.Queue[_Batch | BaseException | None] = queue.Queue(maxsize=2)
    stopped = threading.Event()

    def put(item: _Batch | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def gather() -> None:
        try:
            for batch in _batches(checkpoint, matrices, target):
                if not put(batch):
                    return
            put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            put(error)

    threading.Thread(target=gather, daemon=True).start()
    try:
        while (batch := ready.get()) is not None:
            if isinstance(batch, RuntimeError):
                raise unusable(device, batch) from batch
            if isinstance(batch, BaseException):
                raise batch
            try:
                eigenvalues = block_eigenvalues(batch.blocks, batch.scales)
            except RuntimeError as error:
                raise unusable(device, error) from None
            for own, (mean, mean_square) in zip(eigenvalues.split(batch.counts), batch.moments, strict=True):
                count = own.numel()
                largest = own.flatten().topk(tail_count(count) + 1).values.flip(0) if count > 1 else own.flatten()
                yield describe(mean, mean_square, largest.cpu().double() / near_one(mean_square) ** 2, count)
    finally:
        stopped.set()


def _batches(checkpoint: Checkpoint, matrices: Iterable[MatrixRef], target: torch.device) -> Iterator[_Batch]:
    """Consecutive matrices whose blocks have one shape, up to a launch's worth."""
    pending: list[torch.Tensor] = []
    moments_of: list[tuple[float, float]] = []
    stream = torch.cuda.Stream(target) if target.type == "cuda" else None

    def launch() -> _Batch:
        gathered = torch.cat(pending)
        if stream is None:
            moved = gathered.to(target)
        else:
            with torch.cuda.stream(stream):
                moved = gathered.pin_memory().to(target, non_blocking=True)
            stream.synchronize()  # in this thread: the other one computes meanwhile
        counts = [len(part) for part in pending]
        scales = [near_one(mean_square) for _, mean_square in moments_of]
        of_blocks = torch.tensor(scales).repeat_interleave(torch.tensor(counts)).to(target)
        return _Batch(moved, of_blocks, counts, list(moments_of))

    for matrix in matrices:
        weight = checkpoint.read(matrix)
        tiles = blocks(weight, matrix.name)
        same = not pending or (tiles.shape[1:] == pending[0].shape[1:] and tiles.dtype == pending[0].dtype)
        if pending and (not same or sum(map(len, pending)) + len(tiles) > BLOCKS_AT_ONCE):
            yield launch()
            pending, moments_of = [], []
        pending.append(tiles)
        moments_of.append(moments(weight, matrix.name))
    if pending:
        yield launch()
