"""What llama.cpp is seen to compute is what transformers computes, and is written as its importance matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from llama import Llama, in_float32

from alphaq.calibration.fisher import Fisher, gather_fisher
from alphaq.calibration.inputs import Inputs, stream_inputs
from alphaq.checkpoint.gguf.format import read_gguf
from alphaq.checkpoint.gguf.imatrix import read_imatrix
from alphaq.checkpoint.gguf.values import GgufValue
from alphaq.checkpoint.pruned import without_experts
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.cli.inputs import Inputs as FileInputs
from alphaq.cli.inputs import Own
from alphaq.engines.gguf import gathering
from alphaq.engines.gguf.gathering import Sample, gather
from alphaq.engines.gguf.importance import importance_of
from alphaq.engines.gguf.library import Running
from alphaq.engines.gguf.model import gguf_tensors
from alphaq.engines.gguf.passes import Passing
from alphaq.engines.gguf.watching import Node
from alphaq.errors import AlphaQError, PassError, PlanError
from alphaq.measuring.cache import Cache
from alphaq.measuring.resources import Resources
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Plan
from alphaq.planning.passes import PASSES, PassRun, fisher
from alphaq.work.workers import silent
from alphaq.writing import observing
from alphaq.writing.observing import in_16_bits
from alphaq.writing.planned import check_importance
from conftest import DATA, Ran
from runnable import VOCAB, save_runnable

pytestmark = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp comes with `pip install xllamacpp`")

SHORT = Sample(tokens=128, window=32)
TEXT = DATA / "texts" / "code.txt"


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model, and a random one with a shared expert, biases, and experts that are seldom reached."""
    folder = tmp_path_factory.mktemp("models")
    return {"tiny": tiny, "qwen2_moe": save_runnable(folder / "random", "qwen2_moe")}


@pytest.fixture(scope="module")
def exact(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model's GGUF file with its weights in float32, which meet float32 activations in llama.cpp."""
    made: dict[str, Path] = {}

    def file(name: str) -> Path:
        if name not in made:
            scratch = tmp_path_factory.mktemp(name)
            whole = in_16_bits(open_checkpoint(models[name]), scratch)
            made[name] = in_float32(whole, scratch / "f32.gguf")
        return made[name]

    return file


def expected(checkpoint: Checkpoint, ids: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
    """Σx² and tokens of every matrix of the layers, by transformers' own classes in float32."""
    seen: dict[str, tuple[np.ndarray, int]] = {}

    def visit(inputs: Inputs) -> list[torch.Tensor]:
        squares = inputs.values.double().square().sum(dim=0).numpy()
        seen.update({matrix.name: (squares, len(inputs.values)) for matrix in inputs.matrices})
        return [checkpoint.read(matrix).float() for matrix in inputs.matrices]

    stream_inputs(checkpoint, torch.from_numpy(ids).long(), visit)
    return seen


@pytest.mark.parametrize("name", ["tiny", "qwen2_moe"])
def test_moments_and_counts_are_those_of_transformers(
    name: str, models: dict[str, Path], exact: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(models[name])
    gathered = gather(exact(name), SHORT, 1, silent)
    truth = expected(checkpoint, gathered.ids)
    compared = 0
    for recipe in gguf_tensors(checkpoint):
        if recipe.name in gathered.seen.moments and recipe.matrices and recipe.matrices[0].name in truth:
            moments = gathered.seen.moments[recipe.name]
            assert len(moments.tokens) == len(recipe.matrices)
            for matrix, squares, tokens in zip(recipe.matrices, moments.squares, moments.tokens, strict=True):
                assert tokens == truth[matrix.name][1], matrix.name
                assert np.allclose(squares, truth[matrix.name][0], rtol=1e-3), matrix.name
                compared += 1
    assert compared == len(truth)


def test_a_batch_more_and_fewer_logits_change_only_what_the_last_layer_sees(
    exact: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, sample = exact("qwen2_moe"), Sample((TEXT,), 128, 32)
    whole = gather(file, sample, 1, silent).seen
    monkeypatch.setattr(gathering, "PASS_BYTES", 1)
    monkeypatch.setattr(gathering, "LOGIT_BYTES", 4 * VOCAB * 8)  # of eight tokens
    parts = gather(file, sample, 1, silent).seen
    assert parts.moments.keys() == whole.moments.keys()
    for name, moments in whole.moments.items():
        if "blk.2" not in name and name.startswith("blk."):
            assert np.array_equal(parts.moments[name].tokens, moments.tokens), name
            assert np.allclose(parts.moments[name].squares, moments.squares, rtol=1e-3), name
    assert parts.moments["output.weight"].tokens.tolist() == [32]  # 8 of each of 4 batches
    assert whole.moments["output.weight"].tokens.tolist() == [128]


def test_latent_attention_s_heads_are_told_apart(tmp_path: Path) -> None:
    folder = save_runnable(tmp_path / "model", "deepseek_v3")
    seen = gather(in_16_bits(open_checkpoint(folder), tmp_path), SHORT, 1, silent).seen
    assert seen.moments["blk.1.attn_k_b.weight"].squares.shape == (4, 16)
    assert seen.moments["blk.1.attn_v_b.weight"].tokens.tolist() == [128.0] * 4
    assert len(seen.stream) == 3 and not seen.skipped


def test_heads_whose_importance_cannot_be_used_are_named(
    alphaq: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = dict(qk_nope_head_dim=32, v_head_dim=32, kv_lora_rank=32)
    model = in_16_bits(open_checkpoint(save_runnable(tmp_path / "model", "deepseek_v3", **wide)), tmp_path)
    monkeypatch.setattr(observing, "OWN_SAMPLE", SHORT)
    asked = ("--engine", "llama.cpp", "--bits", "5", "--choices", "Q4_0,Q5_1,Q8_0", "--method", "distortion")
    ran = alphaq("plan", model, *asked, "--imatrix", "self", "--no-cache")
    assert ran.code == 0, ran.err
    said = "each head of blk.0.attn_k_b.weight, blk.0.attn_v_b.weight, blk.1.attn_k_b.weight and 3 more has inputs"
    assert said in " ".join(ran.err.split())


@pytest.mark.parametrize("size", ["usual", "large"])
def test_own_writing_is_the_same_for_a_seed_and_any_number_of_threads(
    size: str, exact: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if size == "large":
        monkeypatch.setattr(gathering, "WRITTEN_BYTES", exact("qwen2_moe").stat().st_size - 1)
    runs = [gather(exact("qwen2_moe"), Sample(tokens=64, window=16, seed=seed), n, silent) for seed, n in seeds()]
    assert {one.way for one in runs} == {"written" if size == "usual" else "rewritten"}
    first, again, other = (one.seen.moments["blk.1.ffn_down_exps.weight"].squares for one in runs)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_how_a_model_writes_depends_on_its_file_and_not_on_the_machine(
    exact: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for memory in (1 << 40, 1 << 34, 8 << 20):
        monkeypatch.setattr(gathering, "memory_bytes", lambda memory=memory: memory)
        found.append(gather(exact("qwen2_moe"), Sample(tokens=32, window=16), 1, silent))
    assert {one.way for one in found} == {"written"}
    assert all(np.array_equal(one.ids, found[0].ids) for one in found)


def seeds() -> list[tuple[int, int]]:
    return [(0, 1), (0, 2), (1, 1)]


class Failing(Passing):
    def sees(self, node: Node) -> None:
        raise AlphaQError(f"cannot see {node.name}")


def test_an_error_of_a_watch_s_ends_the_pass_and_is_raised(exact: Callable[[str], Path]) -> None:
    ids = np.zeros((1, 4), np.int32)
    with (
        Llama(exact("qwen2_moe"), 16, 1, running=Running(Failing())) as model,
        pytest.raises(AlphaQError, match="cannot see"),
    ):
        model.run(ids, ids == 0)


@pytest.mark.parametrize("number, dtype", [(1, np.float16), (26, np.int32), (30, np.uint16)])
def test_inputs_of_other_types_are_read_and_others_left(number: int, dtype: Any) -> None:
    import ctypes

    from alphaq.engines.gguf.watching import _Tensor

    values = np.arange(6, dtype=dtype) if number != 30 else (np.arange(6, dtype=np.float32).view(np.uint32) >> 16)
    stored = np.ascontiguousarray(values.astype(dtype))
    tensor = _Tensor(type=number, ne=(3, 2, 1, 1), data=stored.ctypes.data, name=b"x")
    tensor.nb[:] = (stored.itemsize, 3 * stored.itemsize, 6 * stored.itemsize, 6 * stored.itemsize)
    node = Node(ctypes.addressof(tensor), "")
    assert node.readable and np.array_equal(node.values()[0, 0], np.arange(6).reshape(2, 3))
    tensor.type = 8  # blocks of eight-bit integers
    assert not node.readable


def test_sizes_in_a_file_s_header_are_not_believed(exact: Callable[[str], Path]) -> None:
    file = read_gguf(exact("qwen2_moe"))
    for value in (GgufValue.of("uint64", 2**64 - 1), GgufValue.of("int32", -5), GgufValue.of("float32", float("inf"))):
        wrong = {key: value if key.startswith("qwen2moe.") else one for key, one in file.metadata.items()}
        sizes = gathering._Sizes.of(replace(file, metadata=wrong))
        assert sizes.token_bytes(256) > 0 and sizes.layers <= 10_000 and sizes.outputs > 0
        assert sizes.enough_tokens <= gathering.MOST_TOKENS


# -- the command ----------------------------------------------------------------------------------


def test_imatrix_of_a_text_is_what_llama_cpp_writes_and_reads(
    alphaq: Callable[..., Ran], models: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "i.gguf"
    ran = alphaq("imatrix", models["qwen2_moe"], "-o", out, "--text", TEXT, "--tokens", 96, "--window", 32, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["windows"] == 3 and ran.json["way"] == "text"
    reader = gguf.GGUFReader(out)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix" and fields["imatrix.datasets"] == [TEXT.name]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (3, 32)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert tensors["blk.0.ffn_down_exps.weight.in_sum2"].shape == (4, 32)
    counts = tensors["blk.0.ffn_down_exps.weight.counts"]
    assert counts.shape == (4, 1) and counts.sum() == 96 * 2
    assert read_imatrix(out).tensors["blk.0.attn_q.weight"].shape == (1, 64)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--text", "none.txt"), "No text file none.txt"),
        (("--text", "{short}"), "less than a window of 64"),
        (("--text", "{bytes}"), "is not UTF-8 text"),
        (("--window", "2", "--tokens", "8"), ""),
    ],
)
def test_what_cannot_be_run_is_said(
    alphaq: Callable[..., Ran], exact: Callable[[str], Path], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "short").write_text("short")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfd")
    typed = [one.format(short=tmp_path / "short", bytes=tmp_path / "bytes") for one in arguments]
    ran = alphaq("imatrix", exact("qwen2_moe"), "-o", tmp_path / "i.gguf", *typed)
    assert ran.code == (2 if said else 0) and said in " ".join(ran.err.split())


@pytest.mark.slow
def test_a_damaged_file_is_refused(alphaq: Callable[..., Ran], exact: Callable[[str], Path], tmp_path: Path) -> None:
    whole = exact("qwen2_moe").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"GGUF" + whole[:100], whole.replace(b"qwen2moe", b"qwen2mow")):
        (tmp_path / "m.gguf").write_bytes(damaged)
        ran = alphaq("imatrix", tmp_path / "m.gguf", "-o", tmp_path / "i.gguf")
        assert ran.code == 2 and "error: " in ran.err and not (tmp_path / "i.gguf").exists()


def few_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the backward pass."""
    monkeypatch.setattr("alphaq.planning.passes.MOST_WINDOWS", 4)
    monkeypatch.setattr("alphaq.planning.passes.FISHER_LENGTH", 32)


def no_backward_pass(run: PassRun) -> Fisher:
    raise PassError("The layers cannot be run backward.")


def test_importance_is_what_the_errors_of_a_column_cost(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same pass as the plan, a row for each expert; nothing where it cannot be run."""
    few_windows(monkeypatch)
    checkpoint = open_checkpoint(models["qwen2_moe"])
    with Cache(tmp_path / "cache", {"model": "one"}) as cache:
        own = observing.importance_by_losses(checkpoint, Resources(cache=cache))
        costs = fisher(PassRun(checkpoint, True, None, (), Resources(cache=cache))).matrices
        assert len(list(cache.path.glob("fisher-*"))) == 1
    assert own.digest == observing.own_matrix(observing.LOSSES, own.tensors).digest
    columns = importance_of(checkpoint, own).columns
    assert columns.keys() >= {matrix.name for matrix in checkpoint.matrices if matrix.role is not Role.ROUTER}
    for name, found in columns.items():
        assert np.allclose(found, np.maximum(costs[name].columns, 1e-6), rtol=1e-3, atol=1e-3), name
    monkeypatch.setattr(observing, "fisher", no_backward_pass)
    with pytest.raises(PassError):
        observing.importance_by_losses(checkpoint)


def test_the_digest_of_an_own_importance_matrix_is_of_its_way_and_values() -> None:
    values = {"a": np.ones((1, 4), np.float32), "b": np.ones((2, 2), np.float32)}
    own = observing.own_matrix("losses", values)
    assert own.digest == observing.own_matrix("losses", dict(reversed(values.items()))).digest
    others = [
        observing.own_matrix("inputs", values),
        observing.own_matrix("losses", values | {"a": np.float32([[1, 1, 1, 1.0001]])}),
        observing.own_matrix("losses", values | {"b": np.ones((1, 4), np.float32)}),
    ]
    assert len({own.digest, *(other.digest for other in others)}) == 4


def test_where_the_backward_pass_gives_way_that_is_said_and_plans_by_it_are_refused(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"a": np.ones((1, 4), np.float32)}
    monkeypatch.setattr(observing, "fisher", no_backward_pass)
    monkeypatch.setattr(observing, "importance_by_inputs", lambda *given: observing.own_matrix("inputs", values))
    asked = FileInputs(own=Own.ASKED)
    made = asked.made_for(open_checkpoint(models["qwen2_moe"]), Resources(), tmp_path)
    told = " ".join(capsys.readouterr().err.split())
    assert "goes by the columns' inputs, not by what their errors cost: The layers cannot be run backward." in told
    assert made.imatrix is not None and made.names["imatrix"] == f"self {made.imatrix.digest}"
    own = observing.own_matrix("losses", values)
    plan = Plan(engine="llama.cpp", choices={"a": "Q4_0"}, config={"imatrix": f"self {own.digest}"})
    check_importance(plan, own)
    with pytest.raises(
        PlanError, match=r"matrix self losses-\w+, not with self inputs-\w+\. .*Make the plan again here"
    ):
        check_importance(plan, made.imatrix)
    with pytest.raises(PlanError, match="Give --imatrix self"):
        check_importance(plan, None)
    again = FileInputs(own=Own.USUAL).of_plan(plan)
    with pytest.raises(PlanError, match=r"cannot be had here: The layers cannot be run backward\. Make the plan again"):
        again.made_for(open_checkpoint(models["qwen2_moe"]), Resources(), tmp_path)
    by_inputs = Plan(engine="llama.cpp", choices={"a": "Q4_0"}, config={"imatrix": "self inputs-0"})
    assert FileInputs(own=Own.USUAL).of_plan(by_inputs).own is None


@pytest.mark.slow
def test_a_plan_by_one_own_importance_matrix_is_not_quantized_by_another(
    alphaq: Callable[..., Ran], models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the backward pass gives way, that is said with its reason, and the remedy works."""
    few_windows(monkeypatch)
    monkeypatch.setattr(observing, "OWN_SAMPLE", SHORT)
    model, plan, out = models["qwen2_moe"], tmp_path / "plan.json", tmp_path / "out"
    asked = ("--engine", "llama.cpp", "--bits", "5", "--choices", "Q4_0,Q8_0", "--method", "distortion")
    making = ("plan", model, *asked, "--imatrix", "self", "-o", plan)
    ran = alphaq(*making)
    assert ran.code == 0 and "by the columns' inputs" not in ran.err, ran.err
    monkeypatch.setattr(observing, "fisher", no_backward_pass)
    ran = alphaq("quantize", model, "--plan", plan, "--imatrix", "self", "-o", out)
    told = " ".join(ran.err.split())
    assert ran.code == 2 and not out.exists()
    assert "goes by the columns' inputs, not by what their errors cost: The layers cannot be run backward." in told
    assert "importance matrix self losses-" in told and "not with self inputs-" in told
    assert "Make the plan again here" in told
    assert alphaq(*making).code == 0
    ran = alphaq("quantize", model, "--plan", plan, "--imatrix", "self", "-o", out)
    assert ran.code == 0, ran.err


def test_quantize_makes_and_uses_its_own_and_the_plan_makes_it_again(
    alphaq: Callable[..., Ran], models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_windows(monkeypatch)
    model, plan = models["qwen2_moe"], tmp_path / "plan.json"
    asked = ("--engine", "llama.cpp", "--bits", "5", "--choices", "Q4_0,Q5_1,Q8_0", "--method", "distortion")
    ran = alphaq("plan", model, *asked, "--imatrix", "self", "-o", plan)
    assert ran.code == 0, ran.err
    assert (Plan.read(plan).imatrix or "").startswith("self losses-")
    ran = alphaq("quantize", model, *asked, "--imatrix", "self", "-o", tmp_path / "one")
    assert ran.code == 0, ran.err
    assert alphaq("quantize", model, "--plan", plan, "--imatrix", "self", "-o", tmp_path / "two").code == 0
    assert alphaq("quantize", model, *asked, "--imatrix", "none", "-o", tmp_path / "ones").code == 0
    assert alphaq("quantize", model, *asked, "-o", tmp_path / "usual").code == 0
    ran = alphaq("quantize", model, "--plan", plan, "-o", tmp_path / "three")
    assert ran.code == 0, ran.err
    names = ("one", "two", "three", "ones", "usual")
    first, second, third, ones, usual = ((tmp_path / name / "model.gguf").read_bytes() for name in names)
    assert first == second == third != ones == usual
    ran = alphaq("quantize", model, "--plan", plan, "--imatrix", "none", "-o", tmp_path / "four")
    assert ran.code == 2 and "Give --imatrix self" in " ".join(ran.err.split())
    ran = alphaq("plan", model, "--bits", "3", "--imatrix", "self")
    assert ran.code == 2 and "--imatrix is for llama.cpp" in " ".join(ran.err.split())


@pytest.mark.parametrize("source", ["folder", pytest.param("gguf", marks=pytest.mark.slow)])
def test_the_default_method_uses_what_its_own_pass_tells(
    alphaq: Callable[..., Ran],
    models: dict[str, Path],
    exact: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
) -> None:
    """Without a pass more, even with nothing kept; and the plan makes it again."""
    few_windows(monkeypatch)
    passes: list[object] = []

    def counted(*given: Any) -> Fisher:
        passes.append(given)
        return gather_fisher(*given)

    monkeypatch.setattr("alphaq.planning.passes.gather_fisher", counted)
    model, plan = models["qwen2_moe"] if source == "folder" else exact("qwen2_moe"), tmp_path / "plan.json"
    asked = ("--engine", "llama.cpp", "--bits", "5", "--choices", "Q4_0,Q5_1,Q8_0", "--no-bos")
    ran = alphaq("quantize", model, *asked, "--no-cache", "-o", tmp_path / "usual")
    assert ran.code == 0 and len(passes) == 1, ran.err
    assert "self losses-" in ran.out
    assert alphaq("plan", model, *asked, "-o", plan).code == 0
    assert (Plan.read(plan).imatrix or "").startswith("self losses-")
    assert alphaq("quantize", model, "--plan", plan, "--workers", "2", "-o", tmp_path / "planned").code == 0
    assert len(passes) == 2  # the cache has it
    ran = alphaq("quantize", model, *asked, "--imatrix", "none", "-o", tmp_path / "ones")
    assert ran.code == 0 and "none: all columns count alike" in ran.out
    usual, planned, ones = ((tmp_path / name / "model.gguf").read_bytes() for name in ("usual", "planned", "ones"))
    assert usual == planned != ones


def test_without_a_backward_pass_the_default_is_no_importance_matrix(
    alphaq: Callable[..., Ran], models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no file of the whole model is written for one that nobody asked for."""
    monkeypatch.setitem(PASSES, "fisher", no_backward_pass)
    monkeypatch.setattr(observing, "in_16_bits", None)
    asked = ("--engine", "llama.cpp", "--bits", "5", "--choices", "Q4_0,Q8_0")
    ran = alphaq("plan", models["qwen2_moe"], *asked, "-o", tmp_path / "plan.json")
    told = " ".join(ran.err.split())
    assert ran.code == 0 and "no importance matrix is used" in told and "--imatrix self makes one" in told, ran.err
    assert Plan.read(tmp_path / "plan.json").imatrix is None
    ran = alphaq("quantize", models["qwen2_moe"], "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err


def test_a_model_s_own_serves_plans_without_some_experts(models: dict[str, Path]) -> None:
    whole = open_checkpoint(models["qwen2_moe"])
    layers = whole.architecture.moe_layers(whole.config)
    left = without_experts(whole, dict.fromkeys(layers, (1,)))
    rows = {
        recipe.name: np.arange(1, 1 + len(recipe.matrices), dtype=np.float32)[:, None].repeat(recipe.shape[-1], 1)
        for recipe in gguf_tensors(whole)
        if recipe.is_stack
    }
    found = importance_of(left, observing.own_matrix("losses", rows)).columns
    experts = [(matrix.expert, found[matrix.name][0]) for matrix in left.with_role(Role.EXPERT)]
    assert {(number, float(value)) for number, value in experts} == {(0, 1.0), (1, 3.0), (2, 4.0)}


def test_a_model_s_own_is_made_once_and_again_where_the_cache_is_damaged(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Sample] = []

    def counted(path: Path, sample: Sample, *rest: Any) -> Any:
        made.append(sample)
        return gather(path, SHORT, *rest)

    monkeypatch.setattr(observing, "gather_apart", counted)
    checkpoint = open_checkpoint(models["qwen2_moe"])
    found = []
    for damage in (None, None, b"GGUF", b"no imatrix"):
        with Cache(tmp_path / "cache", {"model": "one"}) as cache:
            for path in cache.path.glob("imatrix-*") if damage else ():
                path.write_bytes(damage or b"")
            found.append(observing.importance_by_inputs(checkpoint, tmp_path, Resources(cache=cache)))
    assert len(made) == 3 and len({one.digest for one in found}) == 1


def test_the_whole_model_is_written_where_the_plan_would_be_and_its_size_said(
    alphaq: Callable[..., Ran], models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--engine", "llama.cpp", "--bits", "5", "--method", "distortion", "--imatrix", "self", "--no-cache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(observing, "OWN_SAMPLE", SHORT)
    monkeypatch.setattr(observing, "fisher", no_backward_pass)
    places: list[Path] = []

    def seen(checkpoint: Checkpoint, scratch: Path, *rest: Any) -> Path:
        places.append(scratch)
        return in_16_bits(checkpoint, scratch, *rest)

    monkeypatch.setattr(observing, "in_16_bits", seen)
    ran = alphaq("plan", models["qwen2_moe"], *asked)
    assert ran.code == 0, ran.err
    assert [place.absolute().parent for place in places] == [tmp_path] and list(tmp_path.iterdir()) == []
    size = observing.bytes_in_16_bits(open_checkpoint(models["qwen2_moe"]))
    assert f"{size / 1024:.2f} KiB in {tmp_path}, removed afterwards" in " ".join(ran.err.split())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=size - 1))
    ran = alphaq("imatrix", models["qwen2_moe"], "-o", tmp_path / "i.gguf")
    assert ran.code == 2 and f"takes {size:,} bytes" in " ".join(ran.err.split())
