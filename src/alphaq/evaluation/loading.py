"""The models that texts are scored with: a GGUF file in llama.cpp, every other in transformers.

llama.cpp runs a file of any architecture from its memory map. Its kernels round activations, as they will for whoever
uses the file. `--dtype` and `--device` are transformers' own: with one of them, or without llama.cpp, the weights of a
GGUF file are restored and its family's class is run. What would not fit into memory is run layer by layer from disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphaq.checkpoint.config import read_config
from alphaq.checkpoint.gguf.format import first_part
from alphaq.checkpoint.gguf.source import find_gguf
from alphaq.checkpoint.hub import resolve_folder
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.gguf.forward import LlamaModel, LlamaTokenizer
from alphaq.engines.gguf.library import LlamaError
from alphaq.engines.output import Output
from alphaq.errors import AlphaQError, ArchitectureError, CheckpointError
from alphaq.evaluation.room import usual_dtype, with_stream
from alphaq.evaluation.streamed import IN_MEMORY, StreamedModel, opened_for_scoring
from alphaq.formats.ggml_library import shared_object
from alphaq.nouns.scoring import Scoring
from alphaq.runtime.loading import load_model, load_pair, load_tokenizer, shared_tokenizer

LLAMA_CPP, TRANSFORMERS, STREAMED = "llama.cpp", "transformers", "transformers, layer by layer"
SAMPLED = 997  # ids between two tokens whose spelling is compared; a prime, so that it hits no regular pattern
UNLIKE = "so no KL is defined. Compare like with like."


@dataclass(frozen=True)
class Runner:
    """What runs a model: named as the user named it, its tokenizer, and by what."""

    name: str
    model: Any
    tokenizer: Any
    by: str

    @property
    def rows(self) -> int:
        """Tokens that it gives a chance."""
        return int(self.model.config.get_text_config().vocab_size)

    def ids(self, text: str) -> list[int]:
        """Tokens of a text alone."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def spelled(self, ids: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary spells them."""
        return list(map(str, self.tokenizer.convert_ids_to_tokens(list(ids))))


def gguf_of(model: str | Path) -> Path | None:
    """The GGUF file that a model means, if any: of a split one the first part, which llama.cpp asks for."""
    found = find_gguf(Path(model).expanduser())
    return None if found is None else first_part(found)


def transformers_note(models: Sequence[str | Path | None], scoring: Scoring) -> str | None:
    """What to say where llama.cpp would run a model and is not installed."""
    named = next((model for model in models if model is not None and gguf_of(model) is not None), None)
    if named is None or shared_object() is not None or not _undecided(scoring):
        return None
    return (
        f"llama.cpp is not installed (pip install 'alphaq[gguf]'), so the weights of {named} are restored and run in "
        f"transformers{'' if scoring.stream else ', which needs them in memory in float32'}"
    )


def _undecided(scoring: Scoring) -> bool:
    """Whether no option asks for transformers."""
    return scoring.dtype == "auto" and scoring.device is None


def settled(
    scoring: Scoring, model: str | Path, reference: str | Path | None = None, whole_for: str | None = None
) -> tuple[Scoring, str | None]:
    """The scoring with `stream` decided for a model and its reference, GGUF files in llama.cpp where it is there.

    See `room.with_stream`. Raises AlphaQError too where llama.cpp runs all that `stream` would leave on disk.
    """
    named = [one for one in (model, reference) if one is not None]
    if not _by_llama_cpp(named, scoring):
        return with_stream(scoring, named, whole_for=whole_for)
    others = [one for one in named if gguf_of(one) is None]
    if scoring.stream and not others:
        raise AlphaQError(
            f"--stream is for models in transformers, and llama.cpp runs {model} from its memory map. Drop --stream, "
            "or add --dtype float32 to run restored weights."
        )
    return with_stream(scoring, others, whole_for=whole_for, loaded_in=usual_dtype(scoring.dtype, named))


def _by_llama_cpp(models: Sequence[str | Path], scoring: Scoring) -> bool:
    """Whether llama.cpp runs the GGUF files among some models."""
    return _undecided(scoring) and shared_object() is not None and any(map(gguf_of, models))


def streamed_pair(model: str | Path, reference: str | Path | None) -> tuple[Any, Any, Any]:
    """Model, reference (None without one) and the tokenizer of both, their weights left on disk.

    Raises AlphaQError as `StreamedModel` and `shared_tokenizer` do.
    """
    loaded, tokenizer = _streamed(model), load_tokenizer(model)
    against = other = None
    if reference is not None:
        against, other = _streamed(reference), load_tokenizer(reference)
    return loaded, against, shared_tokenizer((model, tokenizer), (reference, other))


def _streamed(model: str | Path) -> StreamedModel:
    try:
        checkpoint = opened_for_scoring(model)
    except CheckpointError as error:
        if isinstance(error, ArchitectureError) or _announces_codes(model):  # of which transformers may know more
            raise CheckpointError(f"{error} {IN_MEMORY}") from error
        raise
    return StreamedModel(checkpoint, str(model))


def _announces_codes(model: str | Path) -> bool:
    with suppress(CheckpointError):
        return "quantization_config" in read_config(resolve_folder(str(model)))
    return False


def pair_of(model: str | Path, reference: str | Path | None, scoring: Scoring) -> tuple[Any, Any, Any]:
    """Model, reference (None without one) and the tokenizer of both, in memory or, with `stream`, on disk."""
    if scoring.stream:
        return streamed_pair(model, reference)
    try:
        return load_pair(model, reference, scoring.dtype, scoring.device)
    except CheckpointError as error:
        if any(one is not None and _for_other_engines(one) for one in (model, reference)):
            raise CheckpointError(f"{error} With --stream its weights are restored, and run layer by layer.") from error
        raise


def _for_other_engines(model: str | Path) -> bool:
    """Whether AlphaQ wrote a folder that transformers may not load: it holds no native codes."""
    with suppress(AlphaQError):
        return not Output(Path(model).expanduser()).profile.writer.holds_codes
    return False


@contextmanager
def opened_models(
    model: str | Path, reference: str | Path | None, scoring: Scoring, texts: Mapping[str, str]
) -> Iterator[tuple[Runner, Runner | None]]:
    """The model and its reference, if there is one, ready to run; both have the model's tokenizer.

    texts: those to be scored, of which both must make the same tokens. Raises AlphaQError if they do not, or a model
    cannot be loaded.
    """
    named = [one for one in (model, reference) if one is not None]
    if not _by_llama_cpp(named, scoring):
        loaded, against, tokenizer = pair_of(model, reference, scoring)
        by = STREAMED if scoring.stream else TRANSFORMERS
        runners = [Runner(str(name), one, tokenizer, by) for name, one in zip(named, (loaded, against), strict=False)]
        yield runners[0], runners[1] if len(runners) > 1 else None
        return
    with ExitStack() as stack:
        runners = [_runner(one, scoring, stack) for one in named]
        if len(runners) > 1:
            _require_alike(runners[0], runners[1], texts)
        yield runners[0], runners[1] if len(runners) > 1 else None


def _runner(name: str | Path, scoring: Scoring, stack: ExitStack) -> Runner:
    """One model in what runs it; beside a GGUF file, others are in float32."""
    path = gguf_of(name)
    if path is None and scoring.stream:
        model, _, tokenizer = streamed_pair(name, None)
        return Runner(str(name), model, tokenizer, STREAMED)
    if path is None:
        model, tokenizer = load_model(name, "float32")
        return Runner(str(name), model, tokenizer, TRANSFORMERS)
    try:
        running = stack.enter_context(LlamaModel(path, scoring.window))
    except LlamaError as error:
        remedy = "" if _is_plain(path) else "\nWith --dtype float32 transformers runs the file's restored weights."
        raise LlamaError(f"{error}{remedy}") from error
    return Runner(str(name), running, running.tokenizer, LLAMA_CPP)


def _is_plain(path: Path) -> bool:
    """Whether no class in transformers is known for a file."""
    try:
        return open_checkpoint(path, quantized=True).plain
    except CheckpointError:
        return True


def _require_alike(one: Runner, other: Runner, texts: Mapping[str, str]) -> None:
    """Raise AlphaQError unless both give a chance to as many tokens and read the texts as the same ones."""
    if one.rows != other.rows:
        raise AlphaQError(
            f"{one.name} has a vocabulary of {one.rows} tokens and {other.name} one of {other.rows}, {UNLIKE}"
        )
    if isinstance(one.tokenizer, LlamaTokenizer) and isinstance(other.tokenizer, LlamaTokenizer):
        sample = range(0, one.rows, SAMPLED)
        _require_same(one, other, sample, "id", one.spelled(sample), other.spelled(sample))
    for name, text in texts.items():
        left, right = one.ids(text), other.ids(text)
        if left != right:
            places = range(max(len(left), len(right)))
            _require_same(one, other, places, f"text {name!r}, token", _some(one, left), _some(other, right))
            raise AlphaQError(f"{one.name} and {other.name} have different vocabularies, {UNLIKE}")


def _some(runner: Runner, ids: list[int]) -> list[str]:
    return [f"{text} ({id})" for text, id in zip(runner.spelled(ids), ids, strict=True)]


def _require_same(
    one: Runner, other: Runner, places: Sequence[int], what: str, left: list[str], right: list[str]
) -> None:
    for place, mine, theirs in zip(places, left, right, strict=False):
        if mine != theirs:
            raise AlphaQError(
                f"{one.name} and {other.name} have different vocabularies: {what} {place} is {mine} in the first and "
                f"{theirs} in the second, {UNLIKE}"
            )
