"""A GGUF file that llama.cpp runs, called as a model and a tokenizer of transformers are.

So texts are cut into the same windows, and the same tokens of them are scored, whatever runs a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from alphaq.engines.gguf.apart import Apart
from alphaq.engines.gguf.library import Facts, Llama, Running, no_number
from alphaq.work.cores import available_cores


@dataclass(frozen=True)
class LlamaConfig:
    """What a scorer asks of a config."""

    vocab_size: int
    max_position_embeddings: int

    def get_text_config(self) -> LlamaConfig:
        """Itself: a GGUF file holds the language model alone."""
        return self


class LlamaTokenizer:
    """The file's own vocabulary; special tokens that a text spells out are read as such."""

    def __init__(self, llama: Apart, facts: Facts) -> None:
        self._llama, self._facts = llama, facts

    def __call__(
        self, text: str, add_special_tokens: bool = True, return_tensors: str | None = None, verbose: bool = False
    ) -> dict[str, list[int] | torch.Tensor]:
        """`input_ids` of a text: a list, or int64 [1, tokens] if tensors are to be returned."""
        ids = [*(self._facts.prefix if add_special_tokens else ()), *self._llama.ask(Llama.tokenize, text, True)]
        return {"input_ids": ids if return_tensors is None else torch.tensor([ids], dtype=torch.int64)}

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """As the vocabulary spells them."""
        return self._llama.ask(Llama.spelled, list(ids))

    def decode(self, ids: Sequence[int]) -> str:
        """The same in one."""
        return "".join(self.convert_ids_to_tokens(ids))


class LlamaModel:
    """A file's model, memory-mapped and run on all cores in a process of its own. Close it, or use `with`.

    Windows are run one by one: beside others llama.cpp rounds otherwise where weights are quantized, and at 512 tokens
    it is no faster. window: tokens of the longest. Raises LlamaError if llama.cpp cannot load the file.
    """

    device = torch.device("cpu")

    def __init__(self, path: Path, window: int) -> None:
        self._llama, self._path = Apart(path), path
        try:
            self._llama.hold(Llama, path, window, available_cores(), 1, Running(mapped=True))
            facts = self._llama.ask(Llama.facts)
        except BaseException:
            self._llama.close()
            raise
        self.config = LlamaConfig(facts.vocab_size, facts.trained_context)
        self.tokenizer = LlamaTokenizer(self._llama, facts)

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(self, *raised: object) -> None:
        self._llama.close()

    def __call__(self, ids: torch.Tensor) -> SimpleNamespace:
        """`logits`, float32 [windows, tokens, vocabulary], of windows [windows, tokens].

        Raises LlamaError for those that are no numbers; minus infinity is one, of a token that never comes.
        """
        logits = np.stack([self._llama.ask(Llama.logits, window) for window in ids.tolist()])
        if not np.isfinite(logits.max(axis=-1)).all():
            raise no_number(self._path, "in the logits")
        return SimpleNamespace(logits=torch.from_numpy(logits))
