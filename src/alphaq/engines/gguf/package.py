"""What is borrowed from llama.cpp's own Python package, `gguf`: labels of the model, and special tokens.

The package collects metadata in a writer. Here the writer has no file; what it collected is handed on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from alphaq.checkpoint.files import check_link, is_file, read_json
from alphaq.checkpoint.gguf.values import GgufValue
from alphaq.checkpoint.side_files import MOST_SIDE_BYTES, TEMPLATE_FOLDER
from alphaq.errors import MissingExtraError
from alphaq.work.untrusted import JsonObject, read_bounded

MOST_SETTING = 1e6


def package() -> ModuleType:
    """The package. Raises MissingExtraError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "Writing a GGUF file needs the package of that name") from None
    logging.getLogger("gguf").setLevel(logging.ERROR)  # its warnings are meant for those who write converters
    return gguf


def general_metadata(
    folder: Path, name: str, config: JsonObject, parameters: tuple[int, int, int], experts: int
) -> dict[str, GgufValue]:
    """The model's labels (`general.*`), from its model card and its name.

    name: as a folder or on the hub. parameters: total, shared by all tokens, and of one expert of every layer.
    experts: per layer.
    """
    metadata = package().Metadata

    sampling = _sampling(folder)

    def labels(card: JsonObject) -> dict[str, GgufValue]:
        found = metadata.apply_metadata_heuristic(metadata(), card, config, Path(name), parameters[0])
        for key, value in sampling.items():
            setattr(found, key, value)
        found.name = found.name or name
        found.size_label = found.size_label or package().size_label(*parameters, experts)
        return _collected(found.set_gguf_meta_model)

    try:
        return labels(metadata.load_model_card(folder))
    except OSError:  # which is no fault of the card, and would come and go
        raise
    except Exception:  # strangers write model cards by hand; whatever is wrong with one, it only costs labels
        return labels({})


def _sampling(folder: Path) -> dict[str, float]:
    """How the model is to be sampled unless a user says otherwise, if its generation config wants it sampled."""
    path = folder / "generation_config.json"
    config = read_json(path) if is_file(path) else {}
    known = {"sampling_temp": "temperature", "sampling_top_k": "top_k", "sampling_top_p": "top_p"}
    if config.get("do_sample") is not True:
        return {}
    values = ((key, config.get(name)) for key, name in (known | {"sampling_min_p": "min_p"}).items())
    return {key: value for key, value in values if isinstance(value, int | float) and 0 <= value < MOST_SETTING}


def special_tokens(folder: Path, vocab_size: int, merges: bool) -> dict[str, GgufValue]:
    """Ids of special tokens, which of them are added to every text, chat templates and, if asked for, the merges."""
    found = package().SpecialVocab(folder, load_merges=merges, n_vocab=vocab_size)
    found.chat_template = _templates(folder) or found.chat_template
    collected = _collected(lambda writer: found.add_to_gguf(writer, quiet=True))
    names = package().Keys.Tokenizer.CHAT_TEMPLATES
    listed = collected[names].value if names in collected else None
    if isinstance(listed, tuple):  # of a set, whose order is another in each process
        collected[names] = GgufValue.array("string", sorted(map(str, listed)))
    return collected


def _templates(folder: Path) -> str | list[dict[str, str]] | None:
    """Chat templates that lie in files of their own, which transformers prefers to the tokenizer's config."""
    default = folder / "chat_template.jinja"
    more = sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    files = {"default": default} if is_file(default) else {}
    texts = {}
    for name, path in (files | {path.stem: path for path in more}).items():
        check_link(path, folder)
        texts[name] = read_bounded(path, MOST_SIDE_BYTES).decode(errors="replace")
    if texts.keys() <= {"default"}:
        return texts.get("default")
    return [{"name": name, "template": text} for name, text in texts.items()]


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
