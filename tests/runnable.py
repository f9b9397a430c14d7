"""What makes a tiny random model one that llama.cpp can run: settings that it takes for granted, and a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from conftest import DATA, random_model

VOCAB = 340

# llama.cpp runs these families with such settings whatever a config says.
LOADABLE: dict[str, dict[str, Any]] = {
    "qwen3_moe": dict(mlp_only_layers=[], norm_topk_prob=True),
    "olmoe": dict(num_key_value_heads=4),
}


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([(DATA / "texts" / "code.txt").read_text()[:4000]], trainer)
    tokenizer.add_tokens([AddedToken("<|looks special|>", normalized=False), AddedToken("added▁one", normalized=False)])
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer, **settings: Any) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<|end|>", eos_token="<|end|>", **settings)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def save_runnable(folder: Path, family: str, fused: bool = False, **overrides: Any) -> Path:
    """A family's random model in bf16 with its tokenizer; large weights, so that every part of it matters."""
    model = random_model(family, vocab_size=VOCAB, **LOADABLE.get(family, {}), **overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
            else:
                parameter.normal_(1 if "norm" in name else 0, 0.5)
    model.bfloat16().save_pretrained(folder, save_original_format=not fused)
    save_tokenizer(folder, byte_level(), add_bos_token=False)
    return folder
