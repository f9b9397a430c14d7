"""What is borrowed from llama.cpp's own Python package, `gguf`: labels of the model, and special tokens.

The package collects metadata in a writer. Here the writer has no file; what it collected is handed on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from alphaq.checkpoint.gguf_format import GgufValue
from alphaq.errors import MissingExtraError


def package() -> ModuleType:
    """The package. Raises MissingExtraError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "Writing a GGUF file needs the package of that name") from None
    logging.getLogger("gguf").setLevel(logging.ERROR)  # its warnings are meant for those who write converters
    return gguf


def general_metadata(
    folder: Path, name: str, config: Mapping[str, Any], parameters: tuple[int, int, int], experts: int
) -> dict[str, GgufValue]:
    """The model's labels (`general.*`), from its model card and its name.

    name: as a folder or on the hub. parameters: total, shared by all tokens, and of one expert of every layer.
    experts: per layer.
    """
    metadata = package().Metadata

    def labels(card: Mapping[str, Any]) -> dict[str, GgufValue]:
        found = metadata.apply_metadata_heuristic(metadata(), card, config, Path(name), parameters[0])
        found.name = found.name or name
        found.size_label = found.size_label or package().size_label(*parameters, experts)
        return _collected(found.set_gguf_meta_model)

    try:
        return labels(metadata.load_model_card(folder))
    except OSError:  # which is no fault of the card, and would come and go
        raise
    except Exception:  # strangers write model cards by hand; whatever is wrong with one, it only costs labels
        return labels({})


def special_tokens(folder: Path, vocab_size: int, merges: bool) -> dict[str, GgufValue]:
    """Ids of special tokens, which of them are added to every text, the chat template and, if asked for, the merges."""
    found = package().SpecialVocab(folder, load_merges=merges, n_vocab=vocab_size)
    return _collected(lambda writer: found.add_to_gguf(writer, quiet=True))


def _collected(fill: Callable[[Any], None]) -> dict[str, GgufValue]:
    gguf = package()
    writer = gguf.GGUFWriter(None, arch="")
    fill(writer)
    held = {key: value for key, value in writer.kv_data[0].items() if key != gguf.Keys.General.ARCHITECTURE}
    return {key: _typed(gguf, value.value, value.type, value.sub_type) for key, value in held.items()}


def _typed(gguf: ModuleType, value: Any, type: Any, element: Any) -> GgufValue:
    if type is not gguf.GGUFValueType.ARRAY:
        return GgufValue.of(type.name.lower(), value)
    element = element or gguf.GGUFValueType.get_type(value[0])
    return GgufValue.array(element.name.lower(), value)
