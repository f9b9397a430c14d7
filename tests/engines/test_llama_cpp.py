"""Files for llama.cpp: what the gguf package reads in them, and what the real llama.cpp computes with them."""

from __future__ import annotations

import ctypes
import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from llama import Llama, in_float32, values_in, write_gguf
from safetensors.torch import save_file

from alphaq import pipeline
from alphaq.checkpoint.gguf.format import read_gguf
from alphaq.checkpoint.gguf.values import GgufValue
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.engines.gguf import profile as llama_cpp
from alphaq.engines.gguf.model import gguf_metadata, gguf_tensors, transformed
from alphaq.engines.gguf.profile import FILE_NAME, OF_ONE_FILE, PROFILE
from alphaq.engines.output import MANIFEST_NAME, PLAN_NAME, read_manifest
from alphaq.errors import CheckpointError, MissingExtraError, PlanError, VerificationError
from alphaq.formats import ggml_library
from alphaq.formats.ggml_library import restore_rows
from alphaq.formats.table import parse_choice
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.nouns.plan import Plan
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import Scope, make_plan, measure_for_plan, resolve
from alphaq.quantizers import ggml
from alphaq.quantizers.base import QUANTIZERS
from alphaq.quantizers.ggml import quantize_ggml
from alphaq.runtime.loading import load_model
from conftest import DATA, FAMILIES, Ran, read_back
from runnable import save_runnable

pytestmark = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp comes with `pip install xllamacpp`")

FAST = "Q2_K,Q3_K,Q4_K,Q6_K,Q8_0"  # the others search for seconds
SMALL = ("Q4_0", "Q8_0", "Q5_1", "IQ4_NL")  # blocks of 32
GREEDY_STEPS = 64
TEXTS = [path.read_text(encoding="utf-8") for path in sorted((DATA / "texts").glob("*.txt"))]


def plan_of(checkpoint: Checkpoint, **settings: object) -> Plan:
    """A plan from a formula, by a method that needs no forward pass, unless told otherwise."""
    asked = {"engine": "llama.cpp", "method": "alphaq", "choices": FAST, "noise": "analytic", **settings}
    request = resolve(PlanConfig.model_validate(asked))
    return make_plan(checkpoint, request, measure_for_plan(checkpoint, request))


def made_by_hand(checkpoint: Checkpoint, type_of: Callable[[MatrixRef], str]) -> Plan:
    """A type for each expert matrix."""
    return Plan(engine="llama.cpp", choices={one.name: type_of(one) for one in checkpoint.with_role(Role.EXPERT)})


def bytes_in(path: Path) -> dict[str, bytes]:
    """Every tensor's stored bytes."""
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}


def expected_values(checkpoint: Checkpoint, choices: dict[str, Choice]) -> Iterator[tuple[str, torch.Tensor]]:
    """What each tensor of the file is to stand for, by llama.cpp's own quantizers and their inverses."""

    def through(matrix: MatrixRef, transform: str) -> torch.Tensor:
        weight = transformed(transform, checkpoint.read(matrix), checkpoint.config)
        choice = choices.get(matrix.name, Choice(16))
        if not choice.name:
            return weight.float()
        return torch.from_numpy(restore_rows(quantize_ggml(weight, choice).codes.numpy(), str(choice), weight.shape[1]))

    for recipe in gguf_tensors(checkpoint):
        if recipe.vector:
            yield recipe.name, checkpoint.tensor(recipe.vector).float()
        else:
            values = [through(matrix, recipe.transform) for matrix in recipe.matrices]
            yield recipe.name, torch.stack(values) if "_exps" in recipe.name else values[0]


# -- the file -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def out(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model between 3 and 4 bits, by the command line."""
    from alphaq.cli.app import main

    folder = tmp_path_factory.mktemp("llama.cpp") / "out"
    arguments = ("quantize", tiny, "--engine", "llama.cpp", "--bits", 3.4, "--method", "alphaq", "--choices", FAST)
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in (*arguments, "-o", folder)])
    assert not stop.value.code
    return folder


def test_file_is_complete_and_has_exactly_the_promised_size(out: Path) -> None:
    plan = Plan.from_json((out / PLAN_NAME).read_bytes(), PLAN_NAME)
    assert (out / FILE_NAME).stat().st_size == plan.size_bytes
    assert {path.name for path in out.iterdir()} == {FILE_NAME, PLAN_NAME, MANIFEST_NAME}
    assert len(plan.histogram) > 1  # several types, or the tests below see little


def test_verify_accepts_what_was_written(out: Path, tiny: Path, alphaq: Callable[..., Ran]) -> None:
    ran = alphaq("verify", out, "--reference", tiny, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["against_source"] is True
    assert ran.json["tensors"] == len(read_manifest(out / MANIFEST_NAME).tensors)


def test_every_reader_finds_the_quantizer_s_values(out: Path, tiny: Path) -> None:
    source, written = open_checkpoint(tiny), open_checkpoint(out, quantized=True)
    theirs, ours = values_in(out / FILE_NAME), read_back(out, source)
    choices = Plan.from_json((out / PLAN_NAME).read_bytes(), PLAN_NAME).every_choice()
    expected = dict(expected_values(source, choices))
    assert list(theirs) == list(expected)
    for name, values in expected.items():
        assert np.array_equal(theirs[name], values.numpy()), name
    for matrix in source.matrices:
        tensor = torch.from_numpy(theirs[written.gguf_tensor(matrix.name).name])
        own = tensor if matrix.expert is None else tensor[matrix.expert]
        assert torch.equal(written.tensor(matrix.name).float(), own), matrix.name
        assert torch.equal(ours[matrix.name].float(), own), matrix.name


def test_manifest_holds_the_real_errors(out: Path, tiny: Path) -> None:
    source, written = open_checkpoint(tiny), open_checkpoint(out, quantized=True)
    plan = Plan.from_json((out / PLAN_NAME).read_bytes(), PLAN_NAME)
    records = read_manifest(out / MANIFEST_NAME).tensors
    for matrix in source.matrices:
        weight = source.read(matrix).double()
        error = (written.tensor(matrix.name).double() - weight).square().sum() / weight.square().sum()
        assert (records[matrix.name].relative_error or 0.0) == pytest.approx(float(error), rel=1e-5)
        assert (float(error) > 0) == (matrix.name in plan.choices)


@pytest.fixture
def damaged(out: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(out, tmp_path / "out"))


def test_verify_names_the_expert_of_a_flipped_bit(damaged: Path) -> None:
    stack = read_gguf(damaged / FILE_NAME).tensors["blk.2.ffn_up_exps.weight"]
    data = bytearray((damaged / FILE_NAME).read_bytes())
    data[stack.begin + stack.nbytes * 5 // 8] ^= 1  # the first byte of the sixth of eight
    (damaged / FILE_NAME).write_bytes(data)
    with pytest.raises(VerificationError, match=r"layers\.2\.mlp\.experts\.5\.up_proj\.weight does not have its check"):
        pipeline.verify(damaged)


def test_verify_finds_a_plan_that_is_not_the_file(damaged: Path) -> None:
    plan = json.loads((damaged / PLAN_NAME).read_text())
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    plan["choices"][name], plan["assignment"][name] = "Q5_K", 5
    (damaged / PLAN_NAME).write_text(json.dumps(plan))
    with pytest.raises(VerificationError, match=rf"{name} is stored as Q\d_K, the plan says Q5_K"):
        pipeline.verify(damaged)


def test_verify_finds_a_file_that_is_not_whole(damaged: Path, alphaq: Callable[..., Ran]) -> None:
    (damaged / FILE_NAME).write_bytes((damaged / FILE_NAME).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.gguf .* tensor .* ends at byte"):
        pipeline.verify(damaged)
    (damaged / FILE_NAME).unlink()
    ran = alphaq("verify", damaged)
    assert ran.code == 2
    assert re.search(r"model\.gguf cannot be read: No such file", ran.err)


def test_quantizing_twice_gives_identical_bytes(out: Path, tiny: Path, tmp_path: Path) -> None:
    plan = Plan.from_json((out / PLAN_NAME).read_bytes(), PLAN_NAME)
    pipeline.quantize(open_checkpoint(tiny), plan, tmp_path / "again")
    for path in out.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_interrupted_run_goes_on_where_it_was(
    out: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.from_json((out / PLAN_NAME).read_bytes(), PLAN_NAME)
    stops = iter([*[None] * 60, KeyboardInterrupt])

    def stopping(weight: torch.Tensor, choice: Choice, name: str = "matrix") -> QuantizedMatrix:
        if stop := next(stops):
            raise stop
        return quantize_ggml(weight, choice, name)

    monkeypatch.setitem(QUANTIZERS, "ggml", replace(QUANTIZERS["ggml"], function=stopping))
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(open_checkpoint(tiny), plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    stops = iter([None] * (len(plan.choices) - 60))  # one more would raise StopIteration
    pipeline.quantize(open_checkpoint(tiny), plan, tmp_path / "out")
    assert (tmp_path / "out" / FILE_NAME).read_bytes() == (out / FILE_NAME).read_bytes()


# -- the real llama.cpp ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Distance:
    """How far llama.cpp's next-token distributions are from transformers' on the same weights."""

    kl: torch.Tensor
    largest_log: float
    top1: float


def distance(llama: Llama, model: Any, windows: list[list[int]]) -> Distance:
    """Over every token of some windows; KL in nats by token."""
    kl, logs, agrees = [], [], []
    for ids in windows:
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found = torch.from_numpy(llama.logits(ids)).double()[:, : expected.shape[1]].log_softmax(-1)
        kl.append((expected.exp() * (expected - found)).sum(-1))
        logs.append(float((expected - found).abs().max()))
        agrees.append(expected.argmax(-1) == found.argmax(-1))
    return Distance(torch.cat(kl), max(logs), float(torch.cat(agrees).float().mean()))


def greedy(model: Any, ids: list[int]) -> list[int]:
    """transformers' likeliest continuation."""
    with torch.inference_mode():
        return model.generate(torch.tensor([ids]), max_new_tokens=GREEDY_STEPS, do_sample=False)[0, len(ids) :].tolist()


def check_agreement(source: Path, path: Path, scratch: Path) -> None:
    """llama.cpp is exact with the weights in float32, and with the quantized ones as exact as its kernels are.

    Those round activations to blocks of 8-bit integers, by ε = 0.0105 relative: KL ≈ 1.5 ε² = 1.6e-4 in the median,
    and more where experts nearly tie.
    """
    model, tokenizer = load_model(path, "float32")[0], load_model(source)[1]
    encoded = [tokenizer(text[:4000], add_special_tokens=False)["input_ids"] for text in TEXTS]
    windows = [ids[:256] for ids in encoded]
    with Llama(in_float32(path, scratch / "f32.gguf"), context=512) as llama:
        exact = distance(llama, model, windows)
        assert exact.largest_log <= 1e-3
        assert float(exact.kl.mean()) <= 1e-8
        prompt = windows[0][:32]
        assert llama.greedy(prompt, GREEDY_STEPS) == greedy(model, prompt)
    with Llama(path, context=512) as llama:
        rounded = distance(llama, model, windows)
        assert float(rounded.kl.median()) <= 1e-3
        assert float(rounded.kl.mean()) <= 3e-3
        assert rounded.top1 >= 0.95
        assert [llama.tokenize(text[:4000]) for text in TEXTS] == encoded


def test_llama_cpp_computes_what_transformers_does(out: Path, tiny: Path, tmp_path: Path) -> None:
    check_agreement(tiny, out / FILE_NAME, tmp_path)


@pytest.mark.slow
def test_llama_cpp_computes_a_larger_model_as_transformers_does(shared: Path, tmp_path: Path) -> None:
    source = shared / "models" / "moe22m"
    types = cycle(FAST.split(","))
    of_unit: dict[str, str] = {}
    checkpoint = open_checkpoint(source)
    plan = made_by_hand(checkpoint, lambda matrix: of_unit.setdefault(PROFILE.unit_of(matrix), next(types)))
    pipeline.quantize(checkpoint, plan, tmp_path / "out")
    check_agreement(source, tmp_path / "out" / FILE_NAME, tmp_path)


def test_commands_run_the_file(out: Path, tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXTS[0][:1500], encoding="utf-8")
    ran = alphaq("eval", out, "--reference", tiny, "--text", text, "--dtype", "float32", "--json")
    assert ran.code == 0, ran.err
    # The same weights as a checkpoint of transformers' own.
    source = open_checkpoint(tiny)
    restored = {name: values.contiguous() for name, values in read_back(out, source).items()}
    shutil.copytree(tiny, tmp_path / "restored")
    save_file(restored, tmp_path / "restored" / "model.safetensors", {"format": "pt"})
    other = alphaq("eval", tmp_path / "restored", "--reference", tiny, "--text", text, "--dtype", "float32", "--json")
    assert ran.json["mean_kl"] == pytest.approx(other.json["mean_kl"], rel=1e-4)
    assert ran.json["mean_kl"] > 1e-3
    written = alphaq("generate", out / FILE_NAME, "def main", "--max-new-tokens", 4)
    assert written.code == 0, written.err
    assert written.out == alphaq("generate", tmp_path / "restored", "def main", "--max-new-tokens", 4).out


# -- every family ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A family's model and its file."""

    folder: Path
    source: Checkpoint
    plan: Plan
    out: Path


@pytest.fixture(scope="module")
def write_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Written]:
    """Quantize a family's random model, in types of small blocks that differ by layer, role and projection."""
    written: dict[tuple[str, bool], Written] = {}

    def write(family: str, fused: bool = False, **overrides: Any) -> Written:
        if (family, fused) not in written or overrides:
            folder = save_runnable(tmp_path_factory.mktemp("family") / family, family, fused, **overrides)
            source = open_checkpoint(folder)
            possible = [
                matrix
                for matrix in sorted(source.matrices, key=lambda one: one.place)
                if matrix.role in (Role.EXPERT, *PROFILE.role_bits)
                and PROFILE.obstacle(parse_choice(SMALL[0]), matrix) is None
            ]
            types = dict(zip(dict.fromkeys(map(PROFILE.unit_of, possible)), cycle(SMALL), strict=False))
            plan = Plan(engine="llama.cpp", choices={one.name: types[PROFILE.unit_of(one)] for one in possible})
            pipeline.quantize(source, plan, folder.parent / "out")
            one = Written(folder, source, plan, folder.parent / "out")
            if overrides:
                return one
            written[family, fused] = one
        return written[family, fused]

    return write


every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_every_family_s_file_holds_the_quantizer_s_values(family: str, write_family: Callable[..., Written]) -> None:
    model = write_family(family)
    found = values_in(model.out / FILE_NAME)
    expected = dict(expected_values(model.source, model.plan.every_choice()))
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert np.array_equal(found[name], values.numpy()), name
    assert pipeline.verify(model.out).quantized == len(model.plan.choices)


@every_family
def test_fused_experts_make_the_same_file(family: str, write_family: Callable[..., Written]) -> None:
    split, fused = write_family(family), write_family(family, fused=True)
    assert split.source.shard_of.keys() != fused.source.shard_of.keys()
    assert (split.out / FILE_NAME).read_bytes() == (fused.out / FILE_NAME).read_bytes()


@every_family
def test_llama_cpp_computes_every_family_as_transformers_does(
    family: str, write_family: Callable[..., Written], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = write_family(family)
    if "deepseek" in family:  # no GGUF file gives back its latent attention, which is kept
        values = {name: model.source.tensor(name).float() for name in model.source.shard_of}
        values |= {name: tensor for name, tensor in read_back(model.out, model.source).items() if name in values}
        for name in [name for name in values if "kv_b_proj" in name]:
            values[name] = model.source.tensor(name).float()
        save_file({name: value.float().contiguous() for name, value in values.items()}, tmp_path / "model.safetensors")
        shutil.copy(model.folder / "config.json", tmp_path)
        reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    else:
        reference, _ = load_model(model.out, "float32")
    windows = [torch.randint(320, (48,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(2)]
    with Llama(in_float32(model.out / FILE_NAME, tmp_path / "f32.gguf"), context=64) as llama:
        assert distance(llama, reference, windows).largest_log <= 1e-4
    with Llama(model.out / FILE_NAME, context=64) as llama:
        assert float(distance(llama, reference, windows).kl.median()) <= 1e-3


def test_latent_attention_s_keys_and_values_are_kept_and_taken_apart(write_family: Callable[..., Written]) -> None:
    model = write_family("deepseek_v3")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(model.out / FILE_NAME).tensors}
    kind = gguf.GGMLQuantizationType.BF16
    for name, shape in {"blk.1.attn_k_b.weight": [16, 32, 4], "blk.1.attn_v_b.weight": [32, 16, 4]}.items():
        assert tensors[name].tensor_type == kind
        assert tensors[name].shape.tolist() == shape
    kept = next(matrix.name for matrix in model.source.matrices if "kv_b_proj" in matrix.name)
    plan = Plan(engine="llama.cpp", choices=model.plan.choices | {kept: "Q8_0"})
    with pytest.raises(PlanError, match=rf"cannot store {kept} as Q8_0: .* takes latent attention's keys"):
        llama_cpp.file_layout(model.source, plan.every_choice())


def test_rows_that_fit_no_usual_block_get_the_next_wider_type(write_family: Callable[..., Written]) -> None:
    source = write_family("deepseek_v3").source  # rows of 32 and 64
    fixed = Scope.of(source, resolve(PlanConfig(budget=Budget(bits=4), engine="llama.cpp"))).fixed
    types = {matrix.name: str(fixed[matrix.name]) for matrix in source.matrices if matrix.name in fixed}
    assert {type for name, type in types.items() if "kv_b_proj" in name} == {"16"}
    assert {type for name, type in types.items() if "kv_b_proj" not in name and name != "lm_head.weight"} == {"IQ4_NL"}
    assert types["lm_head.weight"] == "Q8_0"  # 6 bits are usual


def test_tied_embedding_is_quantized_in_both_its_places(write_family: Callable[..., Written]) -> None:
    model = write_family("qwen2_moe", tie_word_embeddings=True)
    stored = bytes_in(model.out / FILE_NAME)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(model.out / FILE_NAME).tensors}
    assert stored["output.weight"] == stored["token_embd.weight"]
    assert types["output.weight"] == types["token_embd.weight"] == model.plan.choices["model.embed_tokens.weight"]
    with Llama(model.out / FILE_NAME, context=64) as llama:
        assert np.isfinite(llama.logits([1, 2, 3])).all()


# -- from a GGUF file -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source_in(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundled model as a GGUF file of one type, with a key that only it has and an alignment of its own."""
    folder = tmp_path_factory.mktemp("sources")

    def write(type: str) -> Path:
        path = folder / f"{type}.gguf"
        if not path.exists():
            checkpoint = open_checkpoint(tiny)
            metadata = gguf_metadata(checkpoint) | {
                "a.key.of.its.own": GgufValue.of("string", "kept"),
                "general.alignment": GgufValue.of("uint32", 128),
            }
            tensors = {name: values.numpy() for name, values in expected_values(checkpoint, {})}
            vectors = {recipe.name for recipe in gguf_tensors(checkpoint) if recipe.type == "F32"}
            write_gguf(path, metadata, tensors, lambda name: "F32" if name in vectors else type)
        return path

    return write


def of_projection(matrix: MatrixRef) -> str:
    return {"gate": "Q3_K", "up": "Q4_K", "down": "Q6_K"}[str(matrix.projection)]


@pytest.mark.parametrize(
    "type", ["BF16", pytest.param("F16", marks=pytest.mark.slow), "Q8_0", pytest.param("F32", marks=pytest.mark.slow)]
)
def test_gguf_source_keeps_its_metadata_and_what_is_not_quantized(
    type: str, source_in: Callable[[str], Path], tmp_path: Path
) -> None:
    source = open_checkpoint(source_in(type))
    assert source.gguf is not None
    pipeline.quantize(source, made_by_hand(source, of_projection), tmp_path / "out")
    written = read_gguf(tmp_path / "out" / FILE_NAME)
    kept = {key: value for key, value in source.gguf.metadata.items() if key not in OF_ONE_FILE}
    assert written.metadata == kept
    assert len(kept["tokenizer.ggml.tokens"].value) == 4096  # type: ignore[arg-type]
    before, after = bytes_in(source_in(type)), bytes_in(tmp_path / "out" / FILE_NAME)
    assert before.keys() == after.keys()
    for name in before:
        if "_exps" not in name:
            assert written.tensors[name].type == source.gguf.tensors[name].type
            assert after[name] == before[name], name


@pytest.mark.slow
def test_gguf_source_and_folder_with_the_same_weights_give_the_same_tensors(
    tiny: Path, source_in: Callable[[str], Path], tmp_path: Path
) -> None:
    stored = []
    for number, model in enumerate((tiny, source_in("BF16"))):
        checkpoint = open_checkpoint(model)
        pipeline.quantize(checkpoint, plan_of(checkpoint, budget=Budget(bits=3.4)), tmp_path / str(number))
        stored.append(bytes_in(tmp_path / str(number) / FILE_NAME))
    assert stored[0] == stored[1]


@pytest.mark.parametrize("type", ["Q8_0", "F32"])
def test_size_budget_counts_what_a_gguf_source_keeps(
    type: str, source_in: Callable[[str], Path], tmp_path: Path
) -> None:
    """Kept matrices are not of 16 bits there."""
    source, limit = open_checkpoint(source_in(type)), 9_000_000
    settings: dict[str, object] = {"choices": f"{FAST},16", "attention_bits": 16}
    made = plan_of(source, budget=Budget(size_bytes=limit), **settings)
    pipeline.quantize(source, made, tmp_path / "out")
    assert (tmp_path / "out" / FILE_NAME).stat().st_size == made.size_bytes
    assert made.size_bytes is not None and made.size_bytes <= limit
    assert made.budget_slack == limit - made.size_bytes


# -- type files for llama-quantize ----------------------------------------------------------------


def test_type_file_names_every_matrix_that_is_not_in_float32(
    tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    options = ("--engine", "llama.cpp", "--choices", FAST, "--noise", "analytic", "--method", "alphaq")
    ran = alphaq("plan", tiny, "--bits", 3.4, *options, "-o", tmp_path / "p", "--write-type-file", tmp_path / "types")
    assert ran.code == 0, ran.err
    lines = (tmp_path / "types").read_text().split()
    assert all(re.fullmatch(r"[^=\s]+=[^=\s]+", line) for line in lines)
    types = dict(line.split("=") for line in lines)
    name_of = ggml_library.library().ggml_type_name
    name_of.restype = ctypes.c_char_p
    assert set(types.values()) <= {name_of(kind).decode().lower() for kind in gguf.GGMLQuantizationType}
    assert alphaq("quantize", tiny, "--plan", tmp_path / "p", "-o", tmp_path / "out").code == 0
    for name, tensor in read_gguf(tmp_path / "out" / FILE_NAME).tensors.items():
        matching = [type for pattern, type in types.items() if re.search(pattern, name)]
        assert matching == ([] if tensor.type == "F32" else [tensor.type.lower()]), name


def test_type_file_is_refused_for_other_engines(tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran]) -> None:
    ran = alphaq("plan", tiny, "--bits", 3, "--write-type-file", tmp_path / "types")
    assert ran.code == 2
    assert "--write-type-file is for llama.cpp" in ran.err
    assert not (tmp_path / "types").exists()


# -- plans that cannot be -------------------------------------------------------------------------

FIRST = "model.layers.0.mlp.experts.0.down_proj.weight"
ROUTER = "model.layers.0.mlp.gate.weight"


@pytest.mark.parametrize(
    ("type", "others", "message"),
    [
        ("4g128", {}, r"experts\.0\.\w+_proj\.weight: 4g128 is not a ggml type. Plan with --engine llama\.cpp"),
        ("Q4_K", {FIRST: "Q6_K"}, r"blk\.0\.ffn_down_exps\.weight is one tensor .* gives its matrices Q4_K, Q6_K"),
        ("Q4_K", {FIRST: "16"}, r"blk\.0\.ffn_down_exps\.weight is one tensor .* gives its matrices 16, Q4_K"),
        ("Q4_K", {ROUTER: "Q8_0"}, rf"blk\.0\.ffn_gate_inp\.weight in F32\. Leave {ROUTER} out"),
    ],
)
def test_plan_that_llama_cpp_could_not_load_is_refused(
    type: str, others: dict[str, str], message: str, tiny: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny)
    plan = made_by_hand(checkpoint, lambda matrix: type)
    with pytest.raises(PlanError, match=message):
        pipeline.quantize(checkpoint, Plan(engine="llama.cpp", choices=plan.choices | others), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_type_whose_blocks_do_not_fit_is_refused(write_family: Callable[..., Written], tmp_path: Path) -> None:
    source = write_family("qwen2_moe").source
    with pytest.raises(PlanError, match=r"cannot store .*: rows of \d+ weights are not whole Q4_K blocks of 256"):
        pipeline.quantize(source, made_by_hand(source, lambda matrix: "Q4_K"), tmp_path / "out")


def test_model_that_no_file_can_hold_is_told_before_measuring(
    save_family: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("alphaq.planning.matrices.measure", never)
    with pytest.raises(CheckpointError, match=r"has no tokenizer that llama\.cpp can be given"):
        plan_of(open_checkpoint(save_family("qwen2_moe")), budget=Budget(bits=4), choices="Q4_0,Q8_0")


def test_tokenizer_longer_than_the_embedding_runs_without_what_has_no_row(
    tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    folder, made = Path(shutil.copytree(tiny, tmp_path / "long")), tmp_path / "out"
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": rows, "content": "[PAD]", "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    options = (
        "--engine",
        "llama.cpp",
        "--bits",
        "16",
        "--choices",
        "16",
        "--attention-bits",
        "16",
        "--shared-bits",
        "16",
    )
    ran = alphaq("quantize", folder, *options, "--embedding-bits", "16", "--head-bits", "16", "-o", made)
    assert ran.code == 0 and f"has {rows} rows, none for the tokenizer's '[PAD]'" in ran.err.replace("\n", " ")
    model, encoder = load_model(tiny, "float32")
    ids = encoder(TEXTS[0][:1000], add_special_tokens=False)["input_ids"][:64]
    with Llama(made / FILE_NAME) as llama:
        assert float(distance(llama, model, [ids]).kl.median()) <= 1e-3
        text = "x [PAD] y"  # to the model these are five letters and signs
        assert llama.tokenize(text, special=True) == encoder(text, add_special_tokens=False)["input_ids"]


# -- packages that the plain install leaves out ---------------------------------------------------

EXTRA = "pip install 'alphaq[gguf]'"


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(llama_cpp, "_known_metadata", {})
    for known in (ggml_library.library, ggml._prepared):
        known.cache_clear()


def test_missing_llama_cpp_is_named_and_a_formula_does_without(
    tiny: Path, alphaq: Callable[..., Ran], nothing_loaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ggml_library, "find_spec", lambda name: None)
    plan = ("plan", tiny, "--bits", 4, "--engine", "llama.cpp", "--choices", FAST, "--method", "alphaq")
    ran = alphaq(*plan, "--workers", 1)
    assert ran.code == 2
    assert EXTRA in ran.err
    assert alphaq(*plan, "--noise", "analytic").code == 0


def test_missing_gguf_is_named_before_measuring(
    tiny: Path, alphaq: Callable[..., Ran], nothing_loaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("alphaq.planning.matrices.measure", lambda *_: pytest.fail("measured"))
    ran = alphaq("plan", tiny, "--bits", 4, "--engine", "llama.cpp", "--choices", FAST, "--method", "alphaq")
    assert ran.code == 2
    assert EXTRA in ran.err


# -- what a review found ----------------------------------------------------------------------------


def test_verify_finds_metadata_that_were_changed(damaged: Path) -> None:
    data = bytearray((damaged / FILE_NAME).read_bytes())
    place = data.index(b"qwen2moe.rope.freq_base") + len(b"qwen2moe.rope.freq_base") + 4
    data[place : place + 4] = np.float32(500_000).tobytes()
    (damaged / FILE_NAME).write_bytes(data)
    with pytest.raises(VerificationError, match=r"header of model\.gguf is not the one that was written"):
        pipeline.verify(damaged)


def test_verify_accepts_a_source_that_was_moved(out: Path, tiny: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(tiny, tmp_path / "a-rather-long-name-for-the-same-model"))
    assert pipeline.verify(out, open_checkpoint(moved)).against_source is True


def test_tied_embedding_is_counted_in_both_its_places(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tied = Path(shutil.copytree(tiny, tmp_path / "tied"))
    tensors = load_file(tied / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tied / "model.safetensors", {"format": "pt"})
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    checkpoint = open_checkpoint(tied)
    plan = plan_of(checkpoint, budget=Budget(size_bytes=4_000_000), method="auto", choices=FAST, noise="analytic")
    assert plan.size_bytes is not None
    assert plan.budget_slack is not None
    assert plan.size_bytes + plan.budget_slack == pytest.approx(4_000_000, abs=4096)
    assert plan.size_bytes <= 4_000_000


@pytest.mark.slow
def test_bounds_hold_for_every_role_of_a_joint_budget(tiny: Path) -> None:
    settings = {"budget": Budget(size_bytes=5_500_000), "method": "auto", "choices": FAST, "noise": "analytic"}
    plan = plan_of(open_checkpoint(tiny), min_sqnr_db=15.0, **settings)
    assert "Q2_K" not in plan.choices.values()
    assert (
        "Q2_K" in plan_of(open_checkpoint(tiny), **settings | {"budget": Budget(size_bytes=4_400_000)}).choices.values()
    )


def test_every_role_of_a_joint_budget_is_measured(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    settings = {"budget": Budget(size_bytes=5_500_000), "method": "auto", "noise": "measured"}
    plan = plan_of(checkpoint, choices="Q3_K,Q4_K,Q6_K", **settings)
    head = next(matrix for matrix in checkpoint.matrices if matrix.role is Role.HEAD)
    weight = checkpoint.read(head).float()
    error = quantize_ggml(weight, plan.choice(head.name)).squared_error
    assert error is not None
    assert plan.expected_error.keys() == plan.assignment.keys()
    assert plan.expected_error[head.name] == pytest.approx(error / float(weight.square().sum()), rel=0.03)


def test_error_of_a_missing_extra_survives_a_worker() -> None:
    error = pickle.loads(pickle.dumps(MissingExtraError("gguf", "Writing needs it")))
    assert "pip install 'alphaq[gguf]'" in str(error)
