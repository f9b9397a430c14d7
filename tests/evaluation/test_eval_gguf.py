"""Texts scored with GGUF files in llama.cpp, against the same files' restored weights in transformers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from alphaq import pipeline
from alphaq.checkpoint.gguf.format import read_gguf
from alphaq.checkpoint.gguf.values import GgufValue
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.gguf import forward
from alphaq.engines.gguf.forward import LlamaModel
from alphaq.engines.gguf.gathering import Sample, gather
from alphaq.engines.gguf.library import Llama, listen, opened
from alphaq.errors import AlphaQError
from alphaq.evaluation import loading, room
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Plan
from alphaq.nouns.scoring import Scoring
from alphaq.work.workers import silent
from conftest import DATA, Ran
from runnable import VOCAB, byte_level, save_runnable, save_tokenizer

pytestmark = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp comes with `pip install xllamacpp`")

TYPE = "Q3_K"


def written(source: Path, out: Path, choice: str) -> Path:
    """A model as GGUF, each expert in one type and the rest in 16 bits."""
    checkpoint = open_checkpoint(source)
    choices = {matrix.name: choice for matrix in checkpoint.with_role(Role.EXPERT)}
    pipeline.quantize(checkpoint, Plan(engine="llama.cpp", choices=choices), out)
    return out / "model.gguf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def full(folder: Path, tiny: Path) -> Path:
    return written(tiny, folder / "full", "16")


@pytest.fixture(scope="module")
def quantized(folder: Path, tiny: Path) -> Path:
    return written(tiny, folder / "quantized", TYPE)


@pytest.fixture(scope="module")
def scoring(folder: Path) -> Scoring:
    text = folder / "text.txt"
    text.write_text((DATA / "texts" / "tech.txt").read_text()[:5000])
    return Scoring(texts=(text,), window=256, max_tokens=600, dtype="auto")


def figures(model: Path, scoring: Scoring, reference: Path | None) -> Any:
    return pipeline.evaluate(model, scoring, reference)


def test_llama_cpp_and_restored_weights_agree(full: Path, quantized: Path, scoring: Scoring, tiny: Path) -> None:
    ours = figures(quantized, scoring, full)
    restored = figures(quantized, scoring.model_copy(update={"dtype": "float32"}), tiny)
    assert ours.run_by == ("llama.cpp", "llama.cpp") and restored.run_by == ("transformers", "transformers")
    (mine,), (other,) = ours.texts.values(), restored.texts.values()
    assert mine.tokens == other.tokens
    assert mine.perplexity == pytest.approx(other.perplexity, rel=0.005)
    assert mine.kl == pytest.approx(other.kl, rel=0.1, abs=6e-4)
    assert mine.kl_median == pytest.approx(other.kl_median, rel=0.1, abs=6e-4)
    assert mine.kl_p99 == pytest.approx(other.kl_p99, rel=0.25)
    assert mine.ear == pytest.approx(other.ear, abs=0.005)
    assert mine.top1 == pytest.approx(other.top1, abs=0.01)


def test_a_reference_in_transformers_is_run_there(full: Path, scoring: Scoring, tiny: Path) -> None:
    """In 16 bits only the rounding of activations is left."""
    found = figures(full, scoring, tiny)
    assert found.run_by == ("llama.cpp", "transformers")
    (text,) = found.texts.values()
    assert 0 <= text.kl_median <= text.kl < 1e-4 and text.kl < text.kl_p99 < 1e-3
    assert text.perplexity == pytest.approx(pipeline.evaluate(tiny, scoring).geomean_perplexity, rel=0.002)


def test_a_reference_may_stay_on_disk(full: Path, scoring: Scoring, tiny: Path) -> None:
    """As one that is too large for memory does."""
    found = figures(full, scoring.model_copy(update={"stream": True}), tiny)
    assert found.run_by == ("llama.cpp", "transformers, layer by layer")
    ((one,), (its,)) = found.texts.values(), figures(full, scoring, tiny).texts.values()
    assert one.perplexity == pytest.approx(its.perplexity, rel=1e-6)
    assert one.kl == pytest.approx(its.kl, rel=0.01)


def test_streaming_is_not_for_what_llama_cpp_runs(
    full: Path, scoring: Scoring, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference beside it is loaded in float32, and is counted so."""
    with pytest.raises(AlphaQError, match="--stream is for models in transformers"):
        figures(full, scoring.model_copy(update={"stream": True}), None)
    monkeypatch.setattr(room, "free_bytes", lambda: int(1.3 / 0.8 * room.bytes_in_memory(tiny, "bfloat16")))
    assert not loading.settled(scoring, tiny)[0].stream and loading.settled(scoring, full, tiny)[0].stream
    assert room.with_stream(scoring, [full, full])[0].stream and not loading.settled(scoring, full, full)[0].stream


def test_a_file_agrees_with_itself(quantized: Path, scoring: Scoring) -> None:
    (text,) = figures(quantized, scoring, quantized).texts.values()
    assert text.kl == pytest.approx(0, abs=1e-6) and text.top1 == 1


def test_a_window_counts_as_in_a_model_that_has_seen_no_other(quantized: Path) -> None:
    ids = torch.randint(4096, (3, 100), generator=torch.Generator().manual_seed(0))
    with LlamaModel(quantized, 128) as model:
        model(ids[:1, :70])  # of another length, which must be forgotten
        together = model(ids).logits
        assert together.shape == (3, 100, model.config.vocab_size)
    with LlamaModel(quantized, 128) as fresh:
        assert torch.equal(fresh(ids[2:]).logits[0], together[2])
    assert not torch.allclose(together[0], together[2], atol=0.1)


class Here:
    """Stands for another process and does everything in this one."""

    held: Any = None

    def __init__(self, path: Path) -> None: ...

    def hold(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.held = function(*arguments)

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.held, *arguments)

    def close(self) -> None:
        self.held.close()


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What llama.cpp logs in this process."""
    lines: list[str] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    def log(level: int, text: bytes, _: int | None) -> None:
        lines.append(text.decode(errors="replace"))

    opened().llama_log_set(log, None)
    yield lines
    opened().llama_log_set(listen, None)


def test_quantized_weights_are_run_where_they_lie_in_the_file(
    folder: Path, tiny: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp may copy weights of some types, laid out for speed: then a file larger than memory cannot be run."""
    model = written(tiny, folder / "repacked", "Q4_0")
    Llama(model, 32).close()
    if not any("REPACK" in line for line in said):
        pytest.skip("this build of llama.cpp copies no weights on this processor")
    said.clear()
    monkeypatch.setattr(forward, "Apart", Here)
    with LlamaModel(model, 32) as running:
        running(torch.arange(10, 20)[None])
    gather(model, Sample(tokens=32, window=16), 1, silent)
    assert any("buffer size" in line for line in said) and not any("REPACK" in line for line in said)


def test_vocabularies_of_other_sizes_are_told(full: Path, folder: Path, scoring: Scoring) -> None:
    save_tokenizer(save_runnable(folder / "other", "qwen2_moe"), byte_level())
    other = written(folder / "other", folder / "small", "16")
    for pair in ((full, other), (full, folder / "other")):
        with pytest.raises(AlphaQError, match=rf"a vocabulary of 4096 tokens and .* one of {VOCAB}, so no KL"):
            figures(pair[0], scoring, pair[1])


def test_tokens_of_another_spelling_are_told(full: Path, folder: Path, scoring: Scoring) -> None:
    """One token's name is changed in place: the header keeps its length."""
    tokens = read_gguf(full).metadata["tokenizer.ggml.tokens"]
    name = tokens.value[loading.SAMPLED].encode()
    changed = folder / "changed.gguf"
    data = full.read_bytes()
    whole = GgufValue.of("string", tokens.value[loading.SAMPLED])
    stored = len(name).to_bytes(8, "little") + name
    assert whole.value and data.count(stored) >= 1
    place = data.index(stored, data.index(b"tokenizer.ggml.tokens"))
    changed.write_bytes(data[: place + 8] + b"~" * (len(name) - 1) + b"|" + data[place + 8 + len(name) :])
    with pytest.raises(AlphaQError, match=rf"different vocabularies: id {loading.SAMPLED} is .* in the second, so no"):
        figures(full, scoring, changed)


def test_other_tokens_of_a_text_are_told(full: Path, scoring: Scoring, tiny: Path) -> None:
    class Other:
        def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
            return {"input_ids": [1, 2]}

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [f"t{id}" for id in ids]

    with LlamaModel(full, 256) as model:
        one = loading.Runner("a", model, model.tokenizer, "llama.cpp")
        other = loading.Runner("b", model, Other(), "transformers")
        with pytest.raises(AlphaQError, match=r"text 'x', token 0 is .* in the first and t1 \(1\) in the second"):
            loading._require_alike(one, other, {"x": "def main():"})


def test_what_llama_cpp_cannot_load_is_told_in_its_words(full: Path, folder: Path, scoring: Scoring) -> None:
    broken = folder / "broken.gguf"
    broken.write_bytes(b"GGUF and no more")
    with pytest.raises(AlphaQError, match=r"llama.cpp cannot load .*broken.gguf") as caught:
        figures(broken, scoring, None)
    assert "--dtype" not in str(caught.value)  # nor can transformers
    broken.write_bytes(full.read_bytes().replace(b"tokenizer.ggml.model", b"tokenizer.ggml.modem"))
    with pytest.raises(AlphaQError, match=r"llama.cpp cannot load .*broken.gguf(.|\n)*--dtype float32"):
        figures(broken, scoring, None)


def test_a_short_text_is_told(full: Path, folder: Path, scoring: Scoring) -> None:
    short = folder / "short.txt"
    short.write_text("")
    with pytest.raises(AlphaQError, match="'short' has fewer than two tokens"):
        figures(full, scoring.model_copy(update={"texts": (short,)}), None)


@pytest.fixture
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(loading, "shared_object", lambda: None)
    yield


def test_without_llama_cpp_restored_weights_are_run_with_a_note(
    full: Path, scoring: Scoring, alphaq: Callable[..., Ran], without_llama_cpp: None
) -> None:
    ran = alphaq("eval", full, "--text", scoring.texts[0], "--max-tokens", 100, "--json")
    assert ran.code == 0, ran.err
    assert "llama.cpp is not installed (pip install 'alphaq[gguf]')" in ran.err
    assert ran.json["run_by"] == ["transformers"]


def test_the_command_prints_what_tokens_differ_by(
    full: Path, quantized: Path, scoring: Scoring, alphaq: Callable[..., Ran]
) -> None:
    asked = ("eval", quantized, "--reference", full, "--text", scoring.texts[0], "--max-tokens", 100)
    shown = alphaq(*asked)
    assert shown.code == 0, shown.err
    assert "median KL" in shown.out and "99 % below" in shown.out
    assert not shown.err
