"""A model that need not fit into memory, called as those of transformers are: it is run layer by layer from disk.

The layers run as in calibration/stream.py. What a call gives are final hidden states; logits are made of them a few
positions at a time, by the head a few rows at a time. So neither layers nor head nor a text's logits are held whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from alphaq.calibration.head import Head
from alphaq.calibration.stream import HollowModel, stream_forward
from alphaq.checkpoint.files import free_bytes, memory_bytes
from alphaq.checkpoint.gguf.source import find_gguf
from alphaq.checkpoint.hub import expanded, resolve_folder
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.engines.output import MANIFEST_NAME, PLAN_NAME, Output
from alphaq.errors import CheckpointError, PassError
from alphaq.evaluation.restored import restored_alone
from alphaq.nouns.matrix import Role

ACTIVATION_BYTES = 1 << 28, 1 << 30
"""Of all windows in one layer, at least, and what they are where the system does not tell how much memory there is."""
MEMORY_SHARE = 24
"""Into which activations go as often: a machine with 24 GB gives them one."""
FREE_SHARE = 4
"""Into what is free they go at least as often."""
COPIES = 8
"""How many times a layer holds its widest activations at once: inputs, products, sums, those of narrower ones."""
IN_MEMORY = "Run it with --no-stream where it fits into memory."
Tick = Callable[[], object]


def opened_for_scoring(model: str | Path) -> Checkpoint:
    """What a folder, a GGUF file or a hub id holds, restored as it is read. Raises CheckpointError."""
    if find_gguf(expanded(model)) is not None:
        return open_checkpoint(model, quantized=True)
    folder = resolve_folder(str(model))
    if (folder / PLAN_NAME).is_file() and (folder / MANIFEST_NAME).is_file():
        return restored_alone(Output(folder))
    return open_checkpoint(folder)


@lru_cache(maxsize=1)  # a reference that is remembered must meet the same groups of windows again
def activation_bytes() -> int:
    """What activations may take, by the machine's memory and by what was free of it at first."""
    least, usual = ACTIVATION_BYTES
    shares = (memory_bytes() // MEMORY_SHARE, free_bytes() // FREE_SHARE)
    return max(least, min((share for share in shares if share), default=usual))


class StreamedLogits:
    """Logits [windows, positions, words], made of final hidden states [windows, positions, hidden] when they are asked
    for by a window's number and a slice of positions."""

    def __init__(self, model: StreamedModel, states: Tensor) -> None:
        self._model, self._states = model, states
        self.nbytes = states.nbytes

    def __getitem__(self, place: tuple[int, slice]) -> Tensor:
        """Float32 [positions, words]."""
        window, positions = place
        return self._model.logits(self._states[None, window, positions])[0]

    def at(self, windows: Tensor, positions: Tensor) -> Tensor:
        """Float32 [places, words] at places in several windows, int64 [places] each, by one reading of the head."""
        return self._model.logits(self._states[None, windows, positions])[0]


class StreamedModel:
    """A checkpoint's own class, in float32 on the processor, a layer in memory at a time.

    layers: how many there are. name: what the user calls it. Raises CheckpointError for a model that transformers does
    not know or whose layers cannot be run so; remedy: what to do then.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, checkpoint: Checkpoint, name: str = "", remedy: str = IN_MEMORY) -> None:
        self._checkpoint, self.name, self._remedy = checkpoint, name or checkpoint.name, remedy
        self._hollow = self._made()
        self.config: Any = self._hollow.model.config
        self.layers = len(self._hollow.layers)

    @torch.no_grad()
    def __call__(self, ids: Tensor, tick: Tick = lambda: None) -> SimpleNamespace:
        """`logits` of token ids int64 [windows, length]. tick: called after each layer."""
        hollow = self._made()  # hooks are for one pass
        for layer in hollow.layers:
            hollow.model.get_submodule(layer).register_forward_hook(partial(_ticked, tick=tick))
        try:
            states = stream_forward(self._checkpoint, ids, lambda traffic: None, hollow)
        except PassError as error:
            raise self._refused(error) from error
        return SimpleNamespace(logits=StreamedLogits(self, states))

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """Of final hidden states [windows, positions, hidden], float32 [windows, positions, words].

        Memory: those, and rows of the head; all of it where its class does more than multiply.
        """
        try:
            with Head(self._hollow, by_rows=True) as head:  # emptied again: that of another model comes next
                return head(states)
        except PassError as error:
            raise self._refused(error) from error

    def windows_at_once(self, length: int) -> int:
        """How many windows of so many tokens have room for their activations."""
        matrices = (one for one in self._checkpoint.matrices if one.role not in (Role.EMBEDDING, Role.HEAD))
        numbers = max(max(matrix.shape) for matrix in matrices)
        config = self.config.get_text_config()
        if config._attn_implementation == "eager":  # holds one for each pair of tokens
            heads = config.num_attention_heads
            numbers += length * (max(heads) if isinstance(heads, list | tuple) else heads)
        return int(max(1, activation_bytes() // (4 * COPIES * numbers * length)))

    def _made(self) -> HollowModel:
        try:
            return HollowModel(self._checkpoint)
        except PassError as error:
            raise self._refused(error) from error

    def _refused(self, error: PassError) -> CheckpointError:
        return CheckpointError(f"{self.name} cannot be run layer by layer: {error.reason} {self._remedy}")


def _ticked(module: Any, args: Any, output: Any, tick: Tick) -> None:
    tick()
