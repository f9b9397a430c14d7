"""The tokenizer as a GGUF file holds it: byte-level BPE (llama.cpp's `gpt2`) or SentencePiece (its `llama`).

Source: llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from alphaq.checkpoint.files import open_file, read_json
from alphaq.checkpoint.gguf.values import GgufValue
from alphaq.engines.gguf.package import package, special_tokens
from alphaq.engines.gguf.pre_tokenizer import parts_of, recognised
from alphaq.errors import CheckpointError, MissingExtraError
from alphaq.work.untrusted import JsonObject

# Some families do not declare these special, but all mean them so.
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s*")
MAX_LINE_BYTES = 1000
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0  # llama.cpp's converter's; nothing is merged into these
_NO_SCORE = -1e6  # below every merge's


def tokenizer_metadata(folder: Path, vocab_size: int, pre_tokenizer: str | None = None) -> dict[str, GgufValue]:
    """The keys `tokenizer.*`, for a vocabulary filled up with unused tokens to `vocab_size`.

    pre_tokenizer: llama.cpp's name for the rule that cuts a text into words; None recognises it. Raises
    CheckpointError if the folder holds no tokenizer that llama.cpp has, or if its rule has no known name.
    """
    tokenizer = _json(folder / "tokenizer.json")
    try:
        model = tokenizer.get("model", {})
        if model.get("type") == "BPE" and not model.get("byte_fallback"):
            return {
                "tokenizer.ggml.model": GgufValue.of("string", "gpt2"),
                "tokenizer.ggml.pre": GgufValue.of("string", pre_tokenizer or recognised(tokenizer, folder)),
                **_bpe(tokenizer, vocab_size).metadata(),
                **special_tokens(folder, vocab_size, merges=True),
            }
        if model.get("type") == "BPE":
            vocabulary = _bpe(tokenizer, vocab_size)
        elif not tokenizer and (folder / "tokenizer.model").is_file():
            vocabulary = _sentencepiece(folder, vocab_size)
        else:
            raise _no_tokenizer(folder)
        return {
            "tokenizer.ggml.model": GgufValue.of("string", "llama"),
            "tokenizer.ggml.pre": GgufValue.of("string", pre_tokenizer or "default"),
            **vocabulary.metadata(scores=True),
            **special_tokens(folder, vocab_size, merges=False),
            **_space_prefix(folder, tokenizer),
        }
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: the tokenizer's files are damaged ({type(error).__name__}: {error}). Download them again."
        ) from None


def tokens_left_out(folder: Path, rows: int) -> list[str]:
    """Tokens that were added to a tokenizer without a row of the embedding, so that no GGUF file can hold them."""
    return [text for position, text, _ in _added(folder, _json(folder / "tokenizer.json")) if position >= rows]


def _no_tokenizer(folder: Path) -> CheckpointError:
    tiktoken = [path for pattern in ("*.tiktoken", "tiktoken.model") for path in sorted(folder.glob(pattern))]
    if tiktoken:
        return _only_tiktoken(tiktoken[0])
    return CheckpointError(
        f"{folder} has no tokenizer that llama.cpp can be given: neither a tokenizer.json of type BPE nor, "
        "alone, SentencePiece's tokenizer.model. Save the model's tokenizer there with save_pretrained."
    )


def _only_tiktoken(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a tiktoken vocabulary, which is made llama.cpp's by the model's own code only, and that is not run "
        "here. Put a tokenizer.json beside it: another repository of the model may have one, or make it with "
        "convert_tiktoken_to_fast of transformers.integrations.tiktoken. The other engines take the folder as it is."
    )


class _Vocabulary:
    """Tokens by id; an id that no token takes is an unused one."""

    def __init__(self, size: int) -> None:
        self.types = package().TokenType
        self.texts = [f"[PAD{position}]" for position in range(size)]
        self.kinds = [int(self.types.UNUSED)] * size
        self.scores = [_UNUSED_SCORE] * size

    def put(self, position: int, text: str, kind: int, score: float) -> None:
        """Place a token. Raises CheckpointError if the model has no row for it."""
        if not 0 <= position < len(self.texts):
            raise CheckpointError(
                f"The tokenizer gives {text!r} the id {position}, but the model's embedding has {len(self.texts)} "
                "rows. Use the tokenizer that belongs to the model, or give the model a row for every token with "
                "resize_token_embeddings of transformers."
            )
        self.texts[position], self.kinds[position], self.scores[position] = text, int(kind), score

    def add(self, position: int, text: str, special: bool) -> None:
        """Place a token that was added to the vocabulary, or say more of one that is there.

        One without a row is left out: the model cannot read it, and could not be trained to write it.
        """
        if position >= len(self.texts):
            return
        if special or _LOOKS_SPECIAL.fullmatch(text):
            self.put(position, text, self.types.CONTROL, _ADDED_SCORE)
        else:  # llama.cpp looks for these in the text as it is, where spaces are spaces
            self.put(position, text.replace("▁", " "), self.types.USER_DEFINED, _ADDED_SCORE)

    def metadata(self, scores: bool = False) -> dict[str, GgufValue]:
        """The lists of tokens."""
        lists = {"tokenizer.ggml.tokens": GgufValue.array("string", self.texts)}
        if scores:
            lists["tokenizer.ggml.scores"] = GgufValue.array("float32", self.scores)
        return lists | {"tokenizer.ggml.token_type": GgufValue.array("int32", self.kinds)}


def _bpe(tokenizer: JsonObject, vocab_size: int) -> _Vocabulary:
    """The vocabulary of a tokenizer.json.

    Scores are for one that was converted from SentencePiece. That merges the pair whose result has the best score,
    tokenizer.json the pair listed first; so the place in the list serves as the score.
    """
    model = tokenizer["model"]
    vocabulary = _Vocabulary(vocab_size)
    pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])
    rank = {text: position for position, text in enumerate(dict.fromkeys("".join(pair) for pair in pairs))}
    added = list(_added(None, tokenizer))
    left_out = {text for position, text, _ in added if position >= vocab_size}
    for text, position in model["vocab"].items():
        if text in left_out:
            continue
        byte = model.get("byte_fallback") and _BYTE.fullmatch(text)
        kind = vocabulary.types.BYTE if byte else vocabulary.types.NORMAL
        vocabulary.put(position, text, kind, -float(rank[text]) if text in rank else _NO_SCORE)
    for token in added:
        vocabulary.add(*token)
    return vocabulary


def _added(folder: Path | None, tokenizer: JsonObject) -> Iterator[tuple[int, str, bool]]:
    """Id, text and whether it is special of each token that was added to a vocabulary.

    folder: where SentencePiece's model may have such tokens beside it; None for a tokenizer.json alone.
    """
    for token in tokenizer.get("added_tokens", []):
        yield token["id"], token["content"], token["special"]
    if tokenizer or folder is None:
        return
    for text, position in _json(folder / "added_tokens.json").items():
        yield position, text, False
    for number, token in _json(folder / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
        yield int(number), token["content"], token.get("special", False)


def _sentencepiece(folder: Path, vocab_size: int) -> _Vocabulary:
    """SentencePiece's own file, and the tokens that were added to it."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise MissingExtraError("gguf", f"Reading {folder / 'tokenizer.model'} needs sentencepiece") from None
    try:
        pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    except (OSError, RuntimeError):
        with open_file(folder / "tokenizer.model") as file:
            first = file.readline(MAX_LINE_BYTES)
        if _TIKTOKEN_LINE.fullmatch(first):
            raise _only_tiktoken(folder / "tokenizer.model") from None
        raise CheckpointError(
            f"{folder / 'tokenizer.model'} is not a SentencePiece model. Download it again."
        ) from None
    vocabulary = _Vocabulary(vocab_size)
    types = vocabulary.types
    for position in range(pieces.vocab_size()):
        kinds = (
            (pieces.IsUnknown, types.UNKNOWN),
            (pieces.IsControl, types.CONTROL),
            (pieces.IsUnused, types.UNUSED),
            (pieces.IsByte, types.BYTE),
        )
        kind = next((kind for is_kind, kind in kinds if is_kind(position)), types.NORMAL)
        vocabulary.put(position, pieces.IdToPiece(position), kind, pieces.GetScore(position))
    for token in _added(folder, {}):
        vocabulary.add(*token)
    return vocabulary


def _space_prefix(folder: Path, tokenizer: JsonObject) -> dict[str, GgufValue]:
    """Whether a text is given a space in front; SentencePiece does unless it is told not to."""
    prefix = _json(folder / "tokenizer_config.json").get("add_prefix_space")
    if not isinstance(prefix, bool):
        rules = [*parts_of(tokenizer.get("normalizer")), *parts_of(tokenizer.get("pre_tokenizer"))]
        prefix = not tokenizer or any(
            rule["type"] == "Prepend" or (rule["type"] == "Metaspace" and rule.get("prepend_scheme") != "never")
            for rule in rules
        )
        if prefix:
            return {}
    return {"tokenizer.ggml.add_space_prefix": GgufValue.of("bool", prefix)}


def _json(path: Path) -> JsonObject:
    """An object, empty if the file does not exist."""
    return read_json(path) if path.is_file() else {}
