"""Token ids that are run through a model: a text's, random ones, and what the model itself makes of these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphaq.calibration.head import Head
from alphaq.calibration.stream import HollowModel, stream_forward
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import AlphaQError, CheckpointError, PassError, first_line

HEAD_TOKENS = 256  # whose logits are held at once: 155 MB with 152 000 words
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
Prefix = tuple[int, ...]


def text_prefix(tokenizer: Any) -> Prefix:
    """Special tokens that a tokenizer puts before every text: usually BOS, or none."""
    whole, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    starts = (start for start in range(len(whole)) if whole[start : start + len(plain)] == plain)
    return tuple(whole[: next(starts, 0)])


def model_prefix(checkpoint: Checkpoint) -> Prefix:
    """The same of a checkpoint's tokenizer; none of a checkpoint that has no tokenizer."""
    if checkpoint.gguf is not None:
        metadata = {
            key: value.value for key, value in checkpoint.gguf.metadata.items() if key.startswith("tokenizer.ggml")
        }
        adds = metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.model") == "llama")
        begin = metadata.get("tokenizer.ggml.bos_token_id")
        return (begin,) if adds and isinstance(begin, int) else ()
    return _folder_prefix(checkpoint.folder)[0]


def tokenizer_fault(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint's tokenizer cannot be asked what it puts before a text; None if it can, or there is none."""
    return None if checkpoint.gguf is not None else _folder_prefix(checkpoint.folder)[1]


def _folder_prefix(folder: Path) -> tuple[Prefix, str | None]:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return (), None
    try:
        return text_prefix(folder_tokenizer(folder)), None
    except Exception as error:  # whatever a tokenizer of strangers does to its library: passes work on ids alone
        return (), first_line(error)[:200]


def folder_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder. Raises CheckpointError if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise CheckpointError(
            f"transformers cannot load the tokenizer of {folder} ({reason}). Restore tokenizer.json and "
            "tokenizer_config.json."
        ) from error


def read_windows(tokenizer_folder: str | Path, text: str, length: int, max_tokens: int, bos: bool = True) -> Tensor:
    """A text's first tokens as int64 [windows, length], whole windows only.

    bos: each window begins with what the tokenizer puts before a text. Raises CheckpointError if the tokenizer cannot
    be loaded, AlphaQError if there is not one whole window.
    """
    tokenizer = folder_tokenizer(tokenizer_folder)
    prefix = text_prefix(tokenizer) if bos else ()
    ids = tokenizer(text, return_tensors="pt", verbose=False, add_special_tokens=False)["input_ids"][0, :max_tokens]
    own = length - len(prefix)
    count = len(ids) // own if own > 0 else 0
    if not count:
        raise AlphaQError(
            f"The text gives {len(ids)} tokens (at most {max_tokens} are taken), fewer than one window of {length}. "
            "Give a longer text, more tokens or shorter windows."
        )
    return prefixed(ids[: count * own].long().view(count, own), prefix)


def prefixed(ids: Tensor, prefix: Prefix) -> Tensor:
    """Windows [windows, length] with the same tokens before each."""
    return torch.cat([torch.tensor(prefix, dtype=ids.dtype).expand(len(ids), -1), ids], dim=1) if prefix else ids


def random_windows(vocabulary: int, windows: int, length: int, seed: int = 0, prefix: Prefix = ()) -> Tensor:
    """Uniformly random tokens, int64 [windows, length]: hidden states of the model without any text.

    prefix: what each window begins with instead.
    """
    ids = torch.randint(vocabulary, (windows, length), generator=torch.Generator().manual_seed(seed))
    return prefixed(ids[:, len(prefix) :], prefix)


def rewritten(checkpoint: Checkpoint, ids: Tensor, seed: int = 0, keep: int = 1) -> Tensor:
    """Each token of a window but the first `keep` replaced by a sample of what the model expects after those before it.

    One pass turns random tokens into ones that the model itself would write after them, all positions at once: no
    text, but frequencies and neighbours closer to it. Memory: as `stream_forward`, and the head's weights.
    """
    hollow = HollowModel(checkpoint)
    head = Head(hollow, by_rows=True)
    states = stream_forward(checkpoint, ids, lambda traffic: None, hollow)[:, keep - 1 : -1]
    draws = torch.rand(*states.shape[1::-1], 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    written = [ids[:, :keep]]
    with head:
        # Many positions at once, because each product reads the whole head; not all, because chances are wide.
        step = max(1, HEAD_TOKENS // len(ids))
        for part, drawn in zip(states.split(step, dim=1), draws.transpose(0, 1).split(step, dim=1), strict=True):
            rows = zip(part.split(HEAD_TOKENS), drawn.split(HEAD_TOKENS), strict=True)
            written.append(torch.cat([draw(head(some).softmax(-1), numbers) for some, numbers in rows]))
    return torch.cat(written, dim=1)


@torch.no_grad()
def written(checkpoint: Checkpoint, windows: int, length: int, prefix: Prefix = (), seed: int = 0) -> Tensor:
    """What the model writes by itself, token by token, int64 [windows, length].

    prefix: what each window begins with; a random token where there is none. Memory: the whole model in float32, and
    the keys and values of all windows. Raises as `HollowModel` does, and PassError if the class cannot go on from what
    it keeps of earlier tokens.
    """
    hollow = HollowModel(checkpoint)
    for name in hollow.parts:
        hollow.fill(name)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(checkpoint.text_config["vocab_size"])
    ids = torch.tensor([prefix] * windows, dtype=torch.int64).view(windows, -1)
    if not prefix:
        ids = torch.randint(vocabulary, (windows, 1), generator=generator)
    kept, new = None, ids
    try:
        with Head(hollow) as head:
            while ids.shape[1] < length:
                output = hollow.base(input_ids=new, use_cache=True, past_key_values=kept)
                kept = output.past_key_values
                numbers = torch.rand(windows, 1, 1, generator=generator, dtype=torch.float64)
                new = draw(head(output.last_hidden_state[:, -1:]).softmax(-1), numbers)
                ids = torch.cat([ids, new], dim=1)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError, ValueError) as error:
        raise PassError(
            f"{type(hollow.base).__name__} of {checkpoint.name} cannot write token by token ({str(error)[:200]})."
        ) from error
    return ids


def draw(chances: Tensor, numbers: Tensor) -> Tensor:
    """A token for each of some chances [windows, positions, words], by float64 numbers [windows, positions, 1] below 1.

    A position at a time, since float64 is wide.
    """
    drawn = torch.empty(chances.shape[:2], dtype=torch.int64)
    for position in range(chances.shape[1]):
        sums = chances[:, position].cumsum(-1, dtype=torch.float64)
        places = torch.searchsorted(sums, (numbers[:, position] * sums[..., -1:]).contiguous())
        drawn[:, position] = places.squeeze(-1).clamp(max=sums.shape[-1] - 1)
    return drawn
