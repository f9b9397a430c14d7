"""What makes a tiny random model one that llama.cpp can run: settings that it takes for granted, and a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

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


def save_sentencepiece(folder: Path) -> None:
    """A SentencePiece model of 330 pieces with tokens beyond them."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.Train(
        input=str(DATA / "texts" / "tech.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        input_sentence_size=200,
        shuffle_input_sentence=False,  # else each run learns other pieces
        num_threads=1,
        minloglevel=2,
    )
    added = {
        0: dict(content="<unk>", special=True),
        1: dict(content="<s>", special=True),
        2: dict(content="</s>", special=True),
        330: dict(content="<|im_start|>", special=False),
        331: dict(content="two▁words", special=False),
    }
    config = dict(tokenizer_class="LlamaTokenizer", add_bos_token=True, add_prefix_space=True, unk_token="<unk>")
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": added}))


def save_llama_bpe(folder: Path) -> None:
    """Llama's kind of tokenizer.json, pairs over words with bytes for what is in none, of VOCAB tokens."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"etaoinshr", "th", "▁th"]
    tokens += [chr(0x4E00 + place) for place in range(VOCAB - len(tokens))]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    model = models.BPE(vocabulary, [("t", "h"), ("▁", "th")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
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
