"""`alphaq recode` and plans with a codec: smaller files, the same weights, exactly the promised bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alphaq import pipeline
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.checkpoint.safetensors_format import read_header
from alphaq.engines.output import MANIFEST_NAME, Output
from alphaq.errors import AlphaQError, BudgetError, CheckpointError, OutputError, PlanError, VerificationError
from alphaq.formats.coding import is_coded
from alphaq.formats.versions import CODECS
from alphaq.measuring import measurement
from alphaq.measuring.cache import Cache
from alphaq.measuring.resources import Resources
from alphaq.nouns.plan import Plan
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import resolve
from alphaq.runtime.replace import Packer, stored_tensors
from alphaq.work.workers import Workers
from alphaq.writing import quantizing, sinks
from alphaq.writing.recoding import recode
from conftest import DATA
from contents import contents
from injection import Job, Place, run

METHOD = "alphaq"  # which needs no forward pass
FEW = "2,3,@2.5,@3.5"


def plan_of(source: Path, workers: int = 1, cache: Cache | None = None, **config: Any) -> Plan:
    checkpoint = open_checkpoint(source)
    request = resolve(PlanConfig.model_validate({"method": METHOD, "codec": "zstd", **config}))
    with Workers(workers, checkpoint) as pool:
        return pipeline.make_plan(
            checkpoint, request, pipeline.measure_for_plan(checkpoint, request, resources=Resources(pool, cache))
        )


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(ids).logits


@pytest.fixture(scope="module")
def coded(tiny_quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model at 2.5 bits, coded afterwards."""
    out = tmp_path_factory.mktemp("coded") / "out"
    recode(tiny_quantized, out, "zstd")
    return out


@pytest.fixture(scope="module")
def planned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model by a plan with a codec."""
    out = tmp_path_factory.mktemp("planned") / "out"
    pipeline.quantize(open_checkpoint(tiny), plan_of(tiny, budget=Budget(bpw=3.0), choices=FEW), out)
    return out


# -- recode ---------------------------------------------------------------------------------------


def test_coding_and_decoding_gives_the_same_weight_files(tiny_quantized: Path, coded: Path, tmp_path: Path) -> None:
    assert weight_bytes(coded) < 0.95 * weight_bytes(tiny_quantized)
    found = recode(coded, tmp_path / "plain", "none")
    assert found.size_bytes == weight_bytes(tiny_quantized)
    for path in tiny_quantized.glob("*.safetensors"):
        assert (tmp_path / "plain" / path.name).read_bytes() == path.read_bytes()
    assert contents(tmp_path / "plain").keys() == contents(tiny_quantized).keys()


def test_a_decoded_checkpoint_says_that_any_reader_can_read_it(
    tiny_quantized: Path, coded: Path, tmp_path: Path
) -> None:
    recode(coded, tmp_path / "plain", "none")
    versions = [
        json.loads((folder / "config.json").read_text())["quantization_config"]["format_version"]
        for folder in (tiny_quantized, coded, tmp_path / "plain")
    ]
    assert versions == [1, 2, 1]


def test_coding_again_changes_nothing(coded: Path, tmp_path: Path) -> None:
    recode(coded, tmp_path / "again", "zstd")
    assert contents(tmp_path / "again") == contents(coded)


@pytest.mark.slow
def test_workers_do_not_change_the_bytes(tiny_quantized: Path, coded: Path, tmp_path: Path) -> None:
    with Workers(2, None) as pool:
        recode(tiny_quantized, tmp_path / "out", "zstd", pipeline.Resources(pool))
    assert contents(tmp_path / "out") == contents(coded)


def test_sizes_are_those_of_the_files(alphaq: Callable[..., Any], tiny_quantized: Path, tmp_path: Path) -> None:
    found = alphaq("recode", tiny_quantized, "-o", tmp_path / "out", "--workers", 1, "--json").json
    assert found["size_bytes"] == weight_bytes(tmp_path / "out") == Output(tmp_path / "out").plan.size_bytes
    assert found["source_bytes"] == weight_bytes(tiny_quantized)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    headers = [read_header(path)[0] for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert index["metadata"]["total_size"] == sum(info.nbytes for header in headers for info in header.values())
    assert index["weight_map"].keys() == {name for header in headers for name in header}


@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize("codec", CODECS)
def test_verify_finds_it_correct(tiny: Path, coded: Path, tmp_path: Path, codec: str, with_source: bool) -> None:
    folder = coded
    if codec == "none":
        folder = tmp_path / "plain"
        recode(coded, folder, codec)
    found = pipeline.verify(folder, open_checkpoint(tiny) if with_source else None)
    assert found.against_source is with_source
    assert found.tensors == len(Output(folder).stored)


def test_logits_are_those_of_the_uncoded_model_to_the_bit(tiny_quantized: Path, coded: Path) -> None:
    assert torch.equal(logits(coded), logits(tiny_quantized))


@pytest.mark.parametrize("share", [0.15, 0.5, 0.85])
def test_a_changed_byte_is_named_by_verify_and_by_loading(planned: Path, tmp_path: Path, share: float) -> None:
    shutil.copytree(planned, tmp_path / "bad")
    path = sorted((tmp_path / "bad").glob("*.safetensors"))[0]
    infos = read_header(path)[0]
    data = bytearray(path.read_bytes())
    chosen = Output(planned).plan.every_choice()  # transformers itself converts the others, and says what failed
    coded = [info for info in infos.values() if data[info.begin : info.begin + 2] == b"AZ"]
    blocks = [info for info in coded if info.name in chosen]
    victim = blocks[int(share * len(blocks))]
    data[(victim.begin + victim.end) // 2] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(VerificationError, match=victim.name):
        pipeline.verify(tmp_path / "bad")
    with pytest.raises(CheckpointError, match=victim.name):
        logits(tmp_path / "bad")
    with pytest.raises((CheckpointError, VerificationError), match=victim.name):
        recode(tmp_path / "bad", tmp_path / "plain", "none")
    assert not (tmp_path / "plain").exists()


def test_what_another_wrote_with_a_right_checksum_is_checked_against_the_source(
    tiny: Path, coded: Path, tmp_path: Path
) -> None:
    """One matrix in the place of another of its shape, and its checksum too."""
    recode(coded, tmp_path / "bad", "zstd")
    opened = Output(tmp_path / "bad")
    sizes: dict[int, str] = {}
    for name in opened.plan.choices:
        place = opened.stored[name].place
        other = sizes.setdefault(place.nbytes, name)
        if other != name and opened.plan.choices[name] == opened.plan.choices[other]:
            break
    file = tmp_path / "bad" / place.file
    source = opened.stored[other].place
    taken = (tmp_path / "bad" / source.file).read_bytes()[source.begin : source.begin + source.nbytes]
    data = bytearray(file.read_bytes())
    data[place.begin : place.begin + place.nbytes] = taken
    file.write_bytes(data)
    manifest = json.loads((tmp_path / "bad" / MANIFEST_NAME).read_text())
    manifest["tensors"][name]["blake2b"] = manifest["tensors"][other]["blake2b"]
    (tmp_path / "bad" / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match=name):
        pipeline.verify(tmp_path / "bad", open_checkpoint(tiny))


@pytest.mark.parametrize("engine", [pytest.param("llama.cpp", marks=pytest.mark.slow), "vllm"])
def test_files_of_another_engine_are_refused_by_name(
    alphaq: Callable[..., Any], tiny: Path, tmp_path: Path, engine: str
) -> None:
    if engine == "llama.cpp":
        pytest.importorskip("xllamacpp")
    options = ("--bits", 4.5, "--engine", engine, "--method", "uniform", "--workers", 1)
    assert alphaq("quantize", tiny, *options, "-o", tmp_path / "other").code == 0
    ran = alphaq("recode", tmp_path / "other", "-o", tmp_path / "out")
    assert ran.code == 2
    assert f"is for {engine}" in ran.err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_recoded_is_refused_in_one_line(
    alphaq: Callable[..., Any], tiny: Path, tiny_quantized: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    for arguments, words in (
        ((tiny_quantized, "-o", tmp_path / "out"), "exists"),
        ((tiny, "-o", tmp_path / "new"), "plan.json"),
        ((tmp_path / "nothing", "-o", tmp_path / "new"), "No folder"),
        ((tiny_quantized, "-o", tmp_path / "new", "--codec", "zip"), "zstd"),
    ):
        ran = alphaq("recode", *arguments)
        assert ran.code == 2
        assert words in ran.err
        assert "Traceback" not in ran.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
    assert not (tmp_path / "new").exists()


# -- plans with a codec ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"budget": Budget(bpw=2.8), "choices": "@2,@2.75,@3.5"},
        pytest.param({"budget": Budget(bpw=4.1), "choices": "2,3,4,16"}, marks=pytest.mark.slow),
        {"budget": Budget(bits=3.0), "choices": "2g128-nest,4g128-nest,@3,16", "attention_bits": 16},
    ],
    ids=["rates", "plain", "all kinds"],
)
def test_files_have_exactly_the_promised_size(tiny: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    plan = plan_of(tiny, **config)
    found = pipeline.quantize(open_checkpoint(tiny), plan, tmp_path / "out")
    assert found.size_bytes == weight_bytes(tmp_path / "out") == plan.size_bytes
    assert Output(tmp_path / "out").plan.choices == plan.choices
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("fused", [False, True])
def test_files_of_small_matrices_that_partly_stay_uncoded_have_the_promised_size(
    save_family: Callable[..., Path], tmp_path: Path, fused: bool
) -> None:
    source = save_family("qwen2_moe", fused)
    plan = plan_of(source, choices="1,2,4,8,16", budget=Budget(bits=4.0), group_size=32)
    pipeline.quantize(open_checkpoint(source), plan, tmp_path / "out")
    assert weight_bytes(tmp_path / "out") == plan.size_bytes
    coded = []
    for path in (tmp_path / "out").glob("*.safetensors"):
        raw = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        coded += [is_coded(raw[info.begin : info.end]) for info in read_header(path)[0].values()]
    assert {True, False} == set(coded)


def test_a_size_is_never_exceeded_and_used_up(tiny: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    config = PlanConfig(budget=Budget(bpw=8.0), method=METHOD, codec="zstd", choices=FEW)
    found = pipeline.measure_for_plan(checkpoint, resolve(config))

    def within(budget: Budget) -> Plan:
        return pipeline.make_plan(checkpoint, resolve(config.model_copy(update={"budget": budget})), found)

    high = within(Budget(bpw=8.0)).size_bytes
    assert high is not None
    with pytest.raises(BudgetError, match="--size") as caught:
        within(Budget(size_bytes=1000))
    low = int(str(caught.value).partition("--size ")[2].split()[0])
    for size in (low, low + 1, (low + high) // 2, (low + 3 * high) // 4, high):
        plan = within(Budget(size_bytes=size))
        assert plan.size_bytes is not None
        assert plan.budget_slack == size - plan.size_bytes >= 0
        assert plan.size_bytes > 0.999 * size
    pipeline.quantize(checkpoint, plan := within(Budget(size_bytes=(low + high) // 2)), tmp_path / "out")
    assert weight_bytes(tmp_path / "out") == plan.size_bytes


def test_a_coded_model_loads_and_is_verified_against_its_source(tiny: Path, planned: Path) -> None:
    assert pipeline.verify(planned, open_checkpoint(tiny)).against_source
    assert torch.isfinite(logits(planned)).all()
    assert json.loads((planned / "config.json").read_text())["quantization_config"]["codec"] == "zstd"


def test_rates_lose_less_than_groups_in_as_many_bytes(tiny: Path) -> None:
    rated, plain = (
        plan_of(tiny, budget=Budget(bpw=3.0), method="distortion", choices=choices)
        for choices in ("@2,@2.5,@3,@3.5", "2,3,4")
    )
    assert rated.objective is not None
    assert plain.objective is not None
    assert rated.objective < 0.8 * plain.objective


def test_a_second_plan_measures_nothing_and_is_the_same(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny)

    def plan(budget: Budget) -> Plan:
        with Cache(tmp_path / "cache", {"checkpoint": checkpoint.fingerprint}) as cache:
            return plan_of(tiny, budget=budget, cache=cache, choices="2,3,4")

    first, other = plan(Budget(bits=3.0)), plan(Budget(bits=2.5))
    for name in ("measure_one", "coded_bytes"):
        monkeypatch.setattr(measurement, name, _never)
    monkeypatch.setattr("alphaq.planning.coded.coded_bytes", _never)
    assert plan(Budget(bits=3.0)) == first
    assert plan(Budget(bits=2.5)) == other
    assert first.size_bytes != other.size_bytes


def _never(*_: Any) -> Any:
    raise AssertionError("measured again")


@pytest.mark.slow
def test_workers_do_not_change_plan_or_files(tiny: Path, planned: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    plan = plan_of(tiny, 2, budget=Budget(bpw=3.0), choices=FEW)
    with Workers(2, checkpoint) as pool:
        pipeline.quantize(checkpoint, plan, tmp_path / "out", resources=pipeline.Resources(pool))
    assert contents(tmp_path / "out") == contents(planned)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--codec", "zstd", "--engine", "llama.cpp"), "reads no coded tensors"),
        (("--codec", "zstd", "--engine", "mlx"), "reads no coded tensors"),
        (("--codec", "zstd", "--noise", "analytic"), "--noise analytic"),
        (("--codec", "zstd", "--unweighted"), "--unweighted"),
        (("--codec", "zip"), "zstd"),
        (("--choices", "@2.5,@3"), "--codec zstd"),
        (("--choices", "2,@3.1", "--codec", "zstd"), "cannot store"),
    ],
    ids=str,
)
def test_a_codec_that_cannot_be_planned_for_is_refused(
    alphaq: Callable[..., Any], tiny: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    ran = alphaq("plan", tiny, "--bits", 3, *options, "-o", tmp_path / "plan.json")
    assert ran.code == 2
    assert words in ran.err
    assert not (tmp_path / "plan.json").exists()


def test_a_rate_that_is_pinned_without_a_codec_is_refused(
    alphaq: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    ran = alphaq("plan", tiny, "--bits", 3, "--pin", "down=@2.5", "-o", tmp_path / "plan.json")
    assert ran.code == 2
    assert "--codec zstd" in ran.err


def test_stats_alone_cannot_tell_coded_bytes(alphaq: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    assert alphaq("analyze", tiny, "-o", tmp_path / "stats.csv").code == 0
    ran = alphaq("plan", "--stats", tmp_path / "stats.csv", "--bits", 3, "--codec", "zstd")
    assert ran.code == 2
    assert "--codec needs the weights" in ran.err


@pytest.mark.parametrize("quantizer", ["hqq", "learned"])
def test_codes_of_unknown_bytes_are_refused(
    alphaq: Callable[..., Any], tiny: Path, tmp_path: Path, quantizer: str
) -> None:
    choices = {matrix.name: "2g128" for matrix in open_checkpoint(tiny).planned}
    (tmp_path / "plan.json").write_text(Plan(choices=choices, config={"codec": "zstd"}).to_json())
    text = sorted((tiny.parent / "texts").glob("*.txt"))[0]
    options = ("--plan", tmp_path / "plan.json", "--quantizer", quantizer)
    if quantizer == "learned":
        options += ("--calibration", text)
    ran = alphaq("quantize", tiny, *options, "-o", tmp_path / "out")
    assert ran.code == 2
    assert "alphaq recode" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_files_larger_than_promised_are_refused(tiny: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny, budget=Budget(bits=3.0), choices="2,3,4")
    assert plan.size_bytes is not None
    with pytest.raises(PlanError, match="more than the"):
        pipeline.quantize(
            open_checkpoint(tiny), plan.model_copy(update={"size_bytes": plan.size_bytes - 1}), tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


# -- killed ---------------------------------------------------------------------------------------

CODED = Job(
    "", f"quantize {DATA / 'tiny'} --bits 2.5 --method alphaq --choices 2,3 --codec zstd --workers 1 -o {{out}}"
)


def kills_before(module: Any, name: str) -> Callable[[], None]:
    """What makes a run kill itself where a module would call a function."""

    def arm() -> None:
        def die(*_: Any, **__: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(module, name, die)

    return arm


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forks")
def test_a_run_killed_before_or_amid_coding_resumes_to_identical_bytes(tiny: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        undisturbed, place = (Place(tmp_path / name, tiny) for name in ("a", "b"))
        for one in (undisturbed, place):
            one.out.parent.mkdir(parents=True)
        assert run(CODED, undisturbed).code == 0
        for moment in ((sinks, "create_file"), (sinks, "say_codec"), (quantizing, "write_manifest")):
            assert run(CODED, place, kills_before(*moment)).code == -signal.SIGKILL
            assert (place.out.parent / ".out.partial" / sinks.SPOOL_NAME).is_file()
            assert not place.out.exists()
        assert run(CODED, place).code == 0
        assert contents(place.out) == contents(undisturbed.out)
        assert [path.name for path in place.out.parent.iterdir()] == ["out"]
    finally:
        torch.set_num_threads(threads)


def test_an_unfinished_coded_run_of_another_plan_is_not_mixed_with_this_one(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, out = open_checkpoint(tiny), tmp_path / "out"
    earlier, plan = (plan_of(tiny, budget=Budget(bits=2.5), choices="2,3", seed=seed) for seed in (0, 1))
    pipeline.quantize(checkpoint, plan, tmp_path / "good")

    def fail(*_: Any) -> Any:
        raise OSError("No space left")

    with monkeypatch.context() as patched:
        patched.setattr(sinks, "create_file", fail)
        with pytest.raises(OutputError, match="No space left"):
            pipeline.quantize(checkpoint, earlier, out)
    with pytest.raises(OutputError, match="its plan changed since"):
        pipeline.quantize(checkpoint, plan, out)
    pipeline.quantize(checkpoint, plan, out, pipeline.WriteOptions(restart=True))
    assert contents(out) == contents(tmp_path / "good")


def test_a_damaged_byte_between_quantizing_and_coding_is_named(tiny_quantized: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_quantized, copy)
    path = sorted(copy.glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerificationError, match="does not have its checksum"):
        recode(copy, tmp_path / "out", "zstd")
    assert not (tmp_path / "out").exists()


# -- what a runtime holds -------------------------------------------------------------------------


def test_every_tensor_is_read_as_what_the_uncoded_file_holds(tiny_quantized: Path, coded: Path) -> None:
    held = [
        stored_tensors([str(path) for path in sorted(folder.glob("*.safetensors"))])
        for folder in (tiny_quantized, coded)
    ]
    assert held[0].keys() == held[1].keys()
    packers = [Packer(one) for one in held]
    for name in held[0]:
        infos = [one[name][1] for one in held]
        assert (infos[0].dtype, infos[0].shape) == (infos[1].dtype, infos[1].shape)
        assert torch.equal(*(packer._tensor(name) for packer in packers))


def test_a_codec_that_is_not_known_is_refused(tiny: Path, coded: Path, tmp_path: Path) -> None:
    shutil.copytree(coded, tmp_path / "new")
    plan = json.loads((tmp_path / "new" / "plan.json").read_text())
    plan["config"]["codec"] = "zip9"
    (tmp_path / "new" / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(AlphaQError, match="zip9"):
        pipeline.verify(tmp_path / "new", open_checkpoint(tiny))
