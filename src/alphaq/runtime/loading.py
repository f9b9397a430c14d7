"""Load any model that transformers can, native checkpoints included, and run it."""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from alphaq.calibration.stream import HollowModel, model_class
from alphaq.calibration.text import check_ids
from alphaq.calibration.tokens import folder_tokenizer
from alphaq.checkpoint.config import read_config
from alphaq.checkpoint.files import is_file
from alphaq.checkpoint.gguf.source import find_gguf
from alphaq.checkpoint.hub import resolve_folder
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.checkpoint.weights import read_weights
from alphaq.errors import AlphaQError, CheckpointError, first_line
from alphaq.nouns.sampling import GREEDY, Sampling
from alphaq.runtime.skipping import skip_experts
from alphaq.spectra.device import unusable


def load_model(model: str | Path, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Model in eval mode and tokenizer, from a folder, a GGUF file or a hub id. Never runs code from the checkpoint.

    A GGUF file's tokenizer is None if transformers cannot make it. Raises CheckpointError in one line if transformers
    cannot load the model, DeviceError if torch cannot use the device.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    target = usual_device(device)
    _check_device(target)
    if (path := find_gguf(Path(model).expanduser())) is not None:
        loaded, tokenizer = _load_gguf(path, dtype)
        return loaded.to(target), tokenizer
    source = resolve_folder(str(model))
    _check_folder(source)
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        cls = model_class(AutoConfig.from_pretrained(source, trust_remote_code=False))
        loaded, report = cls.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        read_weights(source)  # says more of files that hold no weights than transformers does
        raise CheckpointError(
            f"transformers cannot load {model} ({first_line(error)}). Check it with `alphaq verify` or "
            "`alphaq inspect`."
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{model} stores nothing for {missing[0]} ({len(missing)} parameters of {cls.__name__} are missing). "
            "Complete the download, or check it with `alphaq verify` or `alphaq inspect`."
        )
    return loaded.to(target).eval(), tokenizer


def usual_device(asked: str | None) -> str:
    """Where models are loaded to: as asked for; else a card where there is one."""
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def _check_device(device: str) -> None:
    """Raise DeviceError for a device that cannot hold a model, before one is read."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise unusable(device, error) from None


def _check_folder(folder: Path) -> None:
    """Raise CheckpointError unless transformers would load of a folder what every other command reads."""
    read_config(folder)  # refuses what transformers would fetch code for
    read_weights(folder)
    if is_file(folder / "adapter_config.json") and find_spec("peft") is not None:
        raise CheckpointError(
            f"{folder} holds an adapter beside the weights, which transformers adds where peft is installed. Merge it "
            "(merge_and_unload in peft), or move adapter_config.json out of the folder."
        )


def load_pair(
    model: str | Path, reference: str | Path | None, dtype: str = "auto", device: str | None = None
) -> tuple[Any, Any, Any]:
    """Model, reference (None without one) and the tokenizer of both.

    dtype: `auto` is float32 where one of them is a GGUF file, so that both are alike, and as restored. Raises
    AlphaQError if their tokenizers differ, or there is none.
    """
    if dtype == "auto" and any(one and find_gguf(Path(one).expanduser()) for one in (model, reference)):
        dtype = "float32"
    loaded, tokenizer = load_model(model, dtype, device)
    against = other = None
    if reference is not None:
        against, other = load_model(reference, dtype, device)
    return loaded, against, shared_tokenizer((model, tokenizer), (reference, other))


def shared_tokenizer(own: tuple[str | Path, Any], reference: tuple[str | Path | None, Any]) -> Any:
    """The tokenizer of a model and its reference, each given with its own or None.

    Raises AlphaQError if they differ, or there is none.
    """
    (model, tokenizer), (against, other) = own, reference
    if tokenizer is not None and other is not None and other.get_vocab() != tokenizer.get_vocab():
        raise AlphaQError(
            f"{model} and {against} have different tokenizers, so no KL is defined. Compare like with like."
        )
    if (found := tokenizer or other) is None:
        raise AlphaQError(f"transformers cannot make the tokenizer of {model}. Add --reference, whose will be used.")
    return found


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a folder, a GGUF file or a hub id; None if transformers cannot make a GGUF file's.

    Raises CheckpointError if a folder's cannot be loaded.
    """
    if (path := find_gguf(Path(model).expanduser())) is not None:
        return _gguf_tokenizer(path)
    return folder_tokenizer(resolve_folder(str(model)))


def _load_gguf(path: Path, dtype: str) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file of any type, its weights restored; None for a tokenizer that cannot be had."""
    hollow = HollowModel(open_checkpoint(path, quantized=True))
    names = [name for name, _ in hollow.model.named_children()]
    for name in sorted(names, key=hollow.stores, reverse=True):
        if not hollow.stores(name):  # tied: the head is the embedding
            hollow.model.tie_weights()
        hollow.fill(name)
    tokenizer = _gguf_tokenizer(path)
    if tokenizer is not None:
        hollow.model.generation_config.eos_token_id = tokenizer.eos_token_id
        hollow.model.generation_config.pad_token_id = tokenizer.pad_token_id
    return hollow.model.to(torch.float32 if dtype == "auto" else getattr(torch, dtype)), tokenizer


def _gguf_tokenizer(path: Path) -> Any:
    """None if it cannot be had."""
    from transformers import AutoTokenizer

    with suppress(OSError, ValueError, KeyError, NotImplementedError):  # of families that transformers does not know
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    return None


def generate_text(
    model: str | Path,
    prompt: str,
    max_new_tokens: int,
    device: str | None = None,
    sampling: Sampling = GREEDY,
    skipped_share: float = 0,
    record: bool = False,
) -> str:
    """Continuation of a prompt, without the prompt. skipped_share: see `runtime.skipping.skip_experts`. record: see
    `runtime.decoding.record_tokens`."""
    loaded, tokenizer = load_model(model, device=device)
    skip_experts(loaded, skipped_share)
    if record:
        from alphaq.runtime.decoding import record_tokens

        record_tokens(loaded)
    if tokenizer is None:
        raise CheckpointError(f"transformers cannot make the tokenizer of {model}. Run the file with llama.cpp.")
    inputs = tokenizer(prompt, return_tensors="pt").to(loaded.device)
    if inputs["input_ids"].shape[1] == 0:
        raise CheckpointError("The prompt has no tokens. Give at least one word.")
    check_ids(inputs["input_ids"], loaded.config.get_text_config().vocab_size, "The prompt")
    torch.manual_seed(sampling.seed)
    with torch.inference_mode():
        output = loaded.generate(**inputs, max_new_tokens=max_new_tokens, **_drawn(sampling))
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _drawn(sampling: Sampling) -> dict[str, object]:
    """What transformers calls it; what is not asked for is off, whatever the model's own generation config says."""
    if not sampling.temperature:
        return {"do_sample": False}
    top_p, top_k = sampling.top_p or 1.0, sampling.top_k or 0
    return {"do_sample": True, "temperature": sampling.temperature, "top_p": top_p, "top_k": top_k}
