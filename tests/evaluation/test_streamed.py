"""Models scored layer by layer from disk: the same figures as of models in memory, and what is held meanwhile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alphaq import pipeline
from alphaq.calibration.stream import HollowModel, model_class
from alphaq.checkpoint import files
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import AlphaQError, CheckpointError
from alphaq.evaluation import room
from alphaq.evaluation.fidelity import Remembered, WindowScore, score_texts
from alphaq.evaluation.loading import streamed_pair
from alphaq.evaluation.room import bytes_in_memory, with_stream
from alphaq.evaluation.streamed import StreamedModel, opened_for_scoring
from alphaq.nouns.fidelity import Fidelity
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Plan
from alphaq.nouns.scoring import Scoring
from alphaq.trials.compare import as_begun
from alphaq.trials.trial import settled
from conftest import DATA, Ran
from families import FAMILIES, random_family, save_layout

Run = Callable[..., Ran]
OFTEN = {"mixtral", "deepseek_v2", "gemma2", "gpt_oss", "qwen3_next"}
NO_WORDS = {"openai_privacy_filter"}  # its head is for classes of tokens
NOT_RUN = {"jetmoe", "llama4", "llama4_text", "muse_spark", "zaya"}
TEXTS = {"one": "The quick brown fox jumps over it, and over it again.", "two": "Something else, and shorter."}
SCORING = Scoring(window=16)


def letters(text: str, **_: Any) -> dict[str, torch.Tensor]:
    """Token ids of a text for models without a tokenizer."""
    return {"input_ids": torch.tensor([[3 + ord(letter) % 100 for letter in text]])}


def scored(model: Any, reference: Any | None = None, wrap: Any = None) -> list[WindowScore]:
    more = {} if wrap is None else {"wrap": wrap}
    return [one for _, scores in score_texts(model, letters, TEXTS, SCORING, reference, **more) for one in scores]


@pytest.fixture(autouse=True)
def _no_prefix(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "alphaq" not in request.fixturenames:
        monkeypatch.setattr("alphaq.evaluation.fidelity.text_prefix", lambda tokenizer: ())


@pytest.mark.parametrize(
    "family",
    [pytest.param(one, marks=() if one in OFTEN else pytest.mark.slow) for one in FAMILIES if one not in NO_WORDS],
)
def test_figures_are_those_of_the_model_in_memory(family: str, tmp_path: Path) -> None:
    """Windows of two texts and several lengths, beside a reference that differs."""
    source = open_checkpoint(save_layout(random_family(family), tmp_path / "model", published=True))
    if family in NOT_RUN:
        with pytest.raises(CheckpointError, match=r"cannot be run layer by layer: .* with --no-stream"):
            scored(StreamedModel(source))
        return
    other = random_family(family)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 0.1 * torch.rand(parameter.shape))
    folder = save_layout(other, tmp_path / "other", published=True)
    whole = [
        model_class(other.config).from_pretrained(one, dtype=torch.float32).eval() for one in (source.folder, folder)
    ]
    expected = scored(whole[1], whole[0])
    found = scored(StreamedModel(open_checkpoint(folder)), StreamedModel(source))
    assert len({one.tokens for one in found}) > 1 and len(found) == len(expected)
    for one, its in zip(found, expected, strict=True):
        assert one.sums == pytest.approx(its.sums, rel=1e-4, abs=1e-3)
        assert one.kl_by_token == pytest.approx(its.kl_by_token, rel=1e-3, abs=1e-5)


@pytest.fixture(scope="module")
def written(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The bundled model for an engine, every role quantized that may be, made once."""
    made: dict[tuple[str, str, bool], Path] = {}

    def make(engine: str, choice: str, vocabulary: bool = False) -> Path:
        if (key := (engine, choice, vocabulary)) not in made:
            source, out = open_checkpoint(tiny), tmp_path_factory.mktemp(engine) / "out"
            roles = [Role.EXPERT, Role.ATTENTION, *([Role.EMBEDDING, Role.HEAD] if vocabulary else [])]
            choices = {one.name: choice for role in roles for one in source.with_role(role)}
            pipeline.quantize(source, Plan(engine=engine, choices=choices), out, pipeline.WriteOptions(check=False))
            made[key] = out
        return made[key]

    return make


def evaluated(model: Path, reference: Path, stream: bool, text: Path | None = None) -> Fidelity:
    text = text or DATA / "texts" / "tech.txt"
    scoring = Scoring(texts=(text,), window=128, max_tokens=300, dtype="float32", stream=stream)
    return pipeline.evaluate(model, scoring, reference)


@pytest.mark.parametrize(("engine", "choice", "near"), [("native", "3g64", 1), ("vllm", "4g64s", 20)])
def test_quantized_beside_its_original(
    written: Callable[..., Path], tiny: Path, engine: str, choice: str, near: int
) -> None:
    """What transformers makes of files for vLLM it rounds to 16 bits once more."""
    if engine == "vllm":
        pytest.importorskip("compressed_tensors")
    found, expected = (evaluated(written(engine, choice, engine == "native"), tiny, way) for way in (True, False))
    assert found.run_by == ("transformers, layer by layer",) * 2 and set(expected.run_by) == {"transformers"}
    ((one,), (its,)) = found.texts.values(), expected.texts.values()
    assert (one.tokens, one.perplexity) == (its.tokens, pytest.approx(its.perplexity, rel=near * 1e-5))
    assert one.kl == pytest.approx(its.kl, rel=near * 1e-3) and one.kl > 0.001
    assert (one.ear, one.top1) == (pytest.approx(its.ear, rel=near * 1e-5), pytest.approx(its.top1, abs=0.01))


@pytest.mark.parametrize("engine", ["mlx", "gptqmodel"])
def test_folders_that_transformers_does_not_load(written: Callable[..., Path], tiny: Path, engine: str) -> None:
    (text,) = evaluated(written(engine, "4g64"), tiny, True).texts.values()
    (like,) = evaluated(written("native", "4g64"), tiny, False).texts.values()
    assert text.kl == pytest.approx(like.kl, rel=0.5)


def test_neither_layers_nor_vocabulary_are_held(
    written: Callable[..., Path], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a quantized embedding and head some rows are restored at a time; their codes are read once in each pass."""
    folder, held, most = written("native", "3g64", True), set(), set()
    fill, empty = HollowModel.fill, HollowModel.empty

    def filling(self: HollowModel, name: str, without: Any = ()) -> None:
        held.add(name)
        most.add(len(held))
        assert self.planned_role in without or "layers" not in name
        fill(self, name, without)

    def emptying(self: HollowModel, name: str) -> None:
        held.discard(name)
        empty(self, name)

    monkeypatch.setattr(HollowModel, "fill", filling)
    monkeypatch.setattr(HollowModel, "empty", emptying)
    seen: list[str] = []
    artifact = opened_for_scoring(folder)
    opened = type(artifact)._opened  # type: ignore[attr-defined]
    monkeypatch.setattr(type(artifact), "_opened", lambda self, one: (seen.append(one.name), opened(self, one))[1])
    scored(StreamedModel(artifact), StreamedModel(open_checkpoint(tiny)))
    assert most == {1} and not held
    assert seen == ["model.embed_tokens.weight", "lm_head.weight"] * 3  # windows have three lengths


def test_rows_of_an_artifact_are_those_of_the_whole_matrix(written: Callable[..., Path], tmp_path: Path) -> None:
    plain = written("native", "3g64", True)
    coded = tmp_path / "coded"
    pipeline.recode(plain, coded, "zstd")
    for folder in (plain, coded):
        artifact = opened_for_scoring(folder)
        for matrix in artifact.matrices[::23]:
            part = slice(3, matrix.shape[0] - 2)
            assert torch.equal(artifact.read_rows(matrix, part), artifact.read(matrix)[part]), matrix.name


def test_passes_share_the_windows_and_show_their_layers(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A remembered reference is run once for each group of windows."""
    shown: list[tuple[int, int, str]] = []

    def wrap(items: Iterable[Any], total: int, label: str) -> Iterator[Any]:
        count = 0
        for item in items:
            yield item
            count += 1
        shown.append((count, total, label))

    monkeypatch.setattr(StreamedModel, "windows_at_once", lambda self, length: 3)
    model = StreamedModel(open_checkpoint(tiny))
    reference = Remembered(StreamedModel(open_checkpoint(tiny)))
    passes: list[int] = []
    run = StreamedModel.__call__
    monkeypatch.setattr(
        StreamedModel, "__call__", lambda self, ids, *more: (passes.append(len(ids)), run(self, ids, *more))[1]
    )
    first = scored(model, reference, wrap)
    assert passes == [3, 3, 1, 1, 1, 1, 1, 1] and len(first) == 6  # four of 16 tokens, one of 14, one of 5
    total = 4 * 2 * model.layers + len(first)
    assert shown == [(total, total, "evaluate")]
    assert scored(model, reference) == first and passes[8:] == [3, 1, 1, 1]
    assert all(one.kl == pytest.approx(0, abs=1e-5) for one in first)


def test_what_does_not_fit_is_streamed_and_said(
    alphaq: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text((DATA / "texts" / "code.txt").read_text()[:1500])
    size = bytes_in_memory(tiny, "auto")
    assert bytes_in_memory(tiny, "float32") == pytest.approx(2 * size, rel=0.01)
    monkeypatch.setattr(room, "free_bytes", lambda: int(1.1 * size))
    ran = alphaq("eval", tiny, "--text", text, "--json")
    assert ran.json["run_by"] == ["transformers, layer by layer"]
    assert "0.0 GB are free, so they are run layer by layer from disk, in float32 (--no-stream: in memory)" in ran.err
    assert alphaq("eval", tiny, "--text", text, "--no-stream", "--json").json["run_by"] == ["transformers"]
    assert alphaq("eval", tiny, "--text", text, "--dtype", "bfloat16", "--json").json["run_by"] == ["transformers"]
    out = tmp_path / "certificate.json"
    ran = alphaq("certify", tiny, "--reference", tiny, "--text", text, "--window", "64", "-o", out)
    assert ran.code == 0, ran.err
    settings = json.loads(out.read_text())["settings"]
    assert settings["layer_by_layer"] and settings["computed_in"] == "float32"


@pytest.mark.slow
def test_comparing_layer_by_layer_gives_the_same_rows(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    common = ("--methods", "uniform", "--bits", "2", "--window", "64", "--max-tokens", "256")
    text = DATA / "texts" / "code.txt"
    found, expected = (
        alphaq("compare", tiny, "--text", text, *common, way, "-o", tmp_path / way, "--json").json
        for way in ("--stream", "--no-stream")
    )
    for one, its in zip(found, expected, strict=True):
        assert (one["layer_by_layer"], its["layer_by_layer"]) == (True, False)
        assert one["size_bytes"] == its["size_bytes"]
        assert one["mean_perplexity"] == pytest.approx(its["mean_perplexity"], rel=1e-4)
        assert one["kl"] == pytest.approx(its["kl"], rel=1e-3, abs=1e-6)
    more = ("--methods", "uniform,random", *common[2:], "--text", text, "--json")
    ran = alphaq("compare", tiny, *more, "--no-stream", "-o", tmp_path / "--stream")
    assert ran.code and "run layer by layer from disk, whose figures differ" in ran.err
    rows = alphaq("compare", tiny, *more, "-o", tmp_path / "--stream").json
    assert len(rows) == 3 and all(row["layer_by_layer"] for row in rows)


def test_an_unfinished_comparison_goes_on_as_it_began(tmp_path: Path) -> None:
    assert as_begun(Scoring(), tmp_path).stream is None
    (tmp_path / "results.jsonl").write_text(json.dumps({"job": {"dtype": "float32", "layer_by_layer": True}}) + "\n")
    assert as_begun(Scoring(), tmp_path).stream is True
    assert as_begun(Scoring(stream=False), tmp_path).stream is False  # which is refused then
    assert as_begun(Scoring(dtype="bfloat16"), tmp_path).stream is None


@pytest.mark.parametrize(
    ("settings", "whole_for", "message"),
    [
        ({"stream": True, "dtype": "bfloat16"}, None, "--stream computes in float32, not in bfloat16"),
        ({"stream": True, "device": "cuda"}, None, "on the processor, not on cuda"),
        ({"stream": True}, "--skip-experts", "--skip-experts needs models in memory, and --stream leaves them on disk"),
        ({}, "--skip-experts", "GB are free: --skip-experts needs models in memory. Leave it out"),
    ],
)
def test_what_cannot_be_done_layer_by_layer_is_refused(
    settings: dict[str, Any], whole_for: str | None, message: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda: 1000)
    with pytest.raises(AlphaQError, match=message):
        with_stream(Scoring(**settings), [tiny], whole_for=whole_for)


def test_what_loading_takes_is_counted_by_weights(
    written: Callable[..., Path], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes of others are decoded by transformers, native ones are not; a dtype may stand in text_config alone."""
    whole = bytes_in_memory(tiny, "float32")
    assert bytes_in_memory(written("vllm", "4g64s"), "float32") == whole
    native = written("native", "3g64")
    stored = [one for path in native.glob("*.safetensors") for one in load_file(path).values()]
    kept = sum(one.numel() for one in stored if one.dtype == torch.bfloat16)
    grown = bytes_in_memory(native, "float32") - bytes_in_memory(native, "auto")
    assert grown == pytest.approx(2 * kept, rel=0.05) and grown > 10**6
    config = json.loads((tiny / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    nested = tmp_path / "nested"
    shutil.copytree(tiny, nested)
    (nested / "config.json").write_text(json.dumps(config))
    assert bytes_in_memory(nested, "float32") == whole == 2 * bytes_in_memory(nested, "auto")
    assert bytes_in_memory(tmp_path, "auto") == 0
    monkeypatch.setattr(room, "free_bytes", lambda: int(1.7 / room.USABLE * whole))
    assert not settled(Scoring(), open_checkpoint(tiny), 2.5)[0].stream  # most weights stand there in few bits
    assert settled(Scoring(), open_checkpoint(tiny))[0].stream


def test_the_place_is_named_and_a_foreign_folder_s_remedy(
    written: Callable[..., Path], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r"transformers cannot load .* With --stream its weights are restored"):
        evaluated(written("mlx", "4g64"), tiny, False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (1000, 2000))
    scoring, why = with_stream(Scoring(), [tiny])
    assert scoring.stream and why is not None and "free on the GPU" in why and "--device cpu" in why


def test_files_of_an_unknown_tool_are_left_to_transformers(tiny: Path, tmp_path: Path) -> None:
    """So no streaming is chosen for them, and where it is asked for the other way is named."""
    folder = tmp_path / "gptq"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert bytes_in_memory(folder, "auto") == 0
    with pytest.raises(CheckpointError, match=r"already quantized by GPTQ .* with --no-stream"):
        streamed_pair(folder, None)


def test_a_group_s_use_is_not_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("2500\n")
    (tmp_path / "memory.stat").write_text("anon 2000\ninactive_file 400\n")
    monkeypatch.setattr(files, "_groups", lambda: [tmp_path])
    monkeypatch.setattr(files, "_number_in", lambda path, key, own=files._number_in: own(path, key) or 10**6)
    assert files.free_bytes() == 3000 - (2500 - 400)


def test_a_search_is_refused_before_anything_is_measured(
    alphaq: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some words.")
    monkeypatch.setattr("alphaq.cli.search.measurements", lambda *_, **__: pytest.fail("measured"))
    ran = alphaq("plan", tiny, "--ear", "0.9", "--text", text, "--stream", "--dtype", "bfloat16", "-o", tmp_path / "p")
    assert ran.code and "--stream computes in float32, not in bfloat16" in ran.err
