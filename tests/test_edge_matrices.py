"""Matrices that models seldom hold: dead, constant, of equal eigenvalues, tiny, huge. No stage may make NaN of one."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaq.calibration.text import Text
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.profiles import ENGINES
from alphaq.errors import BudgetError, QuantizationError, SpectrumError
from alphaq.formats.table import format_of
from alphaq.formats.trellis import Trellis
from alphaq.measuring.cache import Cache
from alphaq.measuring.resources import Resources
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.nouns.settings import Blocks, Budget, PlanConfig, Tail
from alphaq.nouns.spectrum import Spectrum
from alphaq.planning import PlanInputs, make_plan, measure_for_plan, resolve
from alphaq.quantizers.base import rounder_of
from alphaq.quantizers.debiased import quantize_debiased
from alphaq.quantizers.rows import FP16_MAX
from alphaq.research.alpha_ratio import completed
from alphaq.research.statistics import weight_statistics
from alphaq.research.tails import variant_exponent, variant_spectrum
from alphaq.sensitivity.methods import METHODS
from alphaq.simd.sums import sums
from alphaq.spectra.device import device_spectra
from alphaq.spectra.measure import spectrum
from alphaq.spectra.variants import SpectrumVariant
from conftest import DATA, Ran, read_back
from runnable import save_runnable

Run = Callable[..., Ran]
VARIANTS = [SpectrumVariant(blocks, tail) for blocks in get_args(Blocks) for tail in get_args(Tail)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def with_one(weight: torch.Tensor, value: float) -> torch.Tensor:
    weight = weight.clone()
    weight[weight.shape[0] // 2, weight.shape[1] // 3] = value
    return weight


def only(rows: int, columns: int, row: slice, column: slice) -> torch.Tensor:
    weight = torch.zeros(rows, columns)
    weight[row, column] = gaussian(rows, columns)[row, column]
    return weight


def hadamard(rows: int, columns: int) -> torch.Tensor:
    bits = torch.arange(rows)[:, None] & torch.arange(columns)
    return 1.0 - 2.0 * sum((bits >> place) & 1 for place in range(16)).remainder(2)


EDGES: dict[str, Callable[[int, int], torch.Tensor]] = {
    "zeros": torch.zeros,
    "constant": lambda r, c: torch.full((r, c), 0.296875),
    "negative constant": lambda r, c: torch.full((r, c), -0.296875),
    "rank one": lambda r, c: gaussian(r, 1) @ gaussian(1, c, 1),
    "one live row": lambda r, c: only(r, c, slice(r // 2, r // 2 + 1), slice(None)),
    "one live column": lambda r, c: only(r, c, slice(None), slice(c // 2, c // 2 + 1)),
    "one live weight": lambda r, c: with_one(torch.zeros(r, c), 0.625),
    "one huge outlier": lambda r, c: with_one(0.02 * gaussian(r, c), 3e4),
    "identity": torch.eye,
    "orthogonal": lambda r, c: torch.linalg.qr(gaussian(r, c))[0] if r >= c else torch.linalg.qr(gaussian(c, r))[0].T,
    "hadamard": hadamard,
    "few eigenvalues": lambda r, c: gaussian(r, 3) @ gaussian(3, c, 1),
    "below float16": lambda r, c: 1e-12 * gaussian(r, c),
    "denormal squares": lambda r, c: 1e-22 * gaussian(r, c),
    "denormal": lambda r, c: 1e-40 * gaussian(r, c),
    "large": lambda r, c: 4e4 * gaussian(r, c).tanh(),
}
SHAPES = [(1, 1), (2, 2), (3, 5), (1, 40), (40, 1), (2, 20_000), (20_000, 2), (15, 300), (64, 128), (256, 192)]


def assert_finite(found: Any, name: str) -> None:
    """No number anywhere in a record, or in what a JSON document holds, is NaN or infinite."""
    if isinstance(found, float):
        assert math.isfinite(found), name
    elif isinstance(found, Mapping):
        for key, value in found.items():
            assert_finite(value, f"{name}.{key}")
    elif isinstance(found, list | tuple):
        for value in found:
            assert_finite(value, name)
    elif is_dataclass(found):
        assert_finite({one.name: getattr(found, one.name) for one in fields(found)}, name)


def check_spectrum(found: Spectrum, name: str) -> None:
    assert_finite(found, name)
    assert (found.alpha is None) == bool(found.reason), name
    assert found.alpha is None or 1 < found.alpha < 1e6, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("edge", EDGES)
def test_alpha_is_defined_or_told_to_be_undefined(edge: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = EDGES[edge](*shape).to(dtype)
        fast = spectrum(weight, edge)
        check_spectrum(fast, f"{edge} {shape}")
        for variant in VARIANTS if max(shape) < 1000 and dtype != torch.float16 else VARIANTS[:1]:
            found = variant_spectrum(weight, edge, variant)
            check_spectrum(found, f"{edge} {shape} {variant}")
            if str(variant) == "farms-hill":
                assert (found.alpha is None) == (fast.alpha is None), (shape, found, fast)
                assert found.alpha is None or fast.alpha == pytest.approx(found.alpha, rel=2e-2), shape
        assert_finite(weight_statistics(weight, edge), edge)


@pytest.mark.parametrize("edge", ["zeros", "constant", "rank one", "identity", "orthogonal", "hadamard"])
def test_what_has_no_tail_has_none_by_any_estimator(edge: str) -> None:
    weight = EDGES[edge](256, 256)
    for variant in VARIANTS:
        if edge != "orthogonal" or variant.blocks == "whole":  # blocks of a random orthogonal matrix are not orthogonal
            assert variant_spectrum(weight, edge, variant).alpha is None, variant
    if edge != "orthogonal":
        assert spectrum(weight, edge).alpha is None


def test_eigenvalues_that_differ_in_their_last_digit_are_equal() -> None:
    eigenvalues = torch.full((200,), 7.0, dtype=torch.float64)
    eigenvalues[100:] = np.nextafter(7.0, 8.0)
    for tail in get_args(Tail):
        with pytest.raises(SpectrumError, match="spread"):
            variant_exponent(eigenvalues, tail)


@pytest.mark.parametrize("shape", [(30, 40), (64, 96)], ids=str)
@pytest.mark.parametrize("exponent", [-144, -126, -110, -75, -60, 0, 30, 60, 64, 100, 123])
def test_spectra_and_statistics_do_not_depend_on_scale_anywhere_in_float32(
    shape: tuple[int, int], exponent: int
) -> None:
    # Whole numbers of a few bits keep every digit, down to float32's smallest number.
    weight = (gaussian(*shape) * 4).round()
    scaled = weight * 2.0**exponent
    plain, found = spectrum(weight, "x"), spectrum(scaled, "x")
    assert plain.alpha is not None
    assert found.alpha == pytest.approx(plain.alpha, rel=1e-5)
    factor = 4.0**exponent
    assert found.mean_square == pytest.approx(plain.mean_square * factor, rel=1e-5)
    assert found.largest_eigenvalue == pytest.approx(plain.largest_eigenvalue * factor, rel=1e-5)
    before, after = weight_statistics(weight, "x"), weight_statistics(scaled, "x")
    for ratio in ("kurtosis", "outlier", "stable_rank"):
        assert getattr(after, ratio) == pytest.approx(getattr(before, ratio), rel=1e-4), ratio


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_hold_squares_that_float32_cannot(dtype: torch.dtype) -> None:
    for scale in (1e-40, 1e-22, 1e-12, 1e4, 1e21, 1e37):
        values = (gaussian(1, 777) * scale).to(dtype)
        if values.isfinite().all():
            exact = values.double()
            expected = (float(exact.sum()), float((exact * exact).sum()))
            assert sums(values) == pytest.approx(expected, rel=1e-4), scale
    for bad in (math.nan, math.inf):
        assert not math.isfinite(sums(with_one(gaussian(2, 500), bad).to(dtype))[1])
    assert sums(torch.zeros(5, dtype=dtype)) == (0.0, 0.0)


@pytest.mark.parametrize("shape", [(2, 20_000), (3, 900), (9, 500)], ids=str)
def test_stable_rank_is_right_where_few_singular_values_crowd(shape: tuple[int, int]) -> None:
    weight = gaussian(*shape)
    exact = float((torch.linalg.matrix_norm(weight.double()) / torch.linalg.matrix_norm(weight.double(), 2)) ** 2)
    assert weight_statistics(weight, "x").stable_rank == pytest.approx(exact, rel=1e-4)


def test_alphas_are_completed_with_their_median() -> None:
    nan = math.nan
    assert completed(np.array([2.0, nan, 4.0, 3.0])).tolist() == [2.0, 3.0, 4.0, 3.0]
    assert completed(np.array([nan, nan])).tolist() == [1.0, 1.0]


class Read:
    """As much of a checkpoint as a device's spectra need."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights

    def read(self, matrix: MatrixRef) -> torch.Tensor:
        return self.weights[matrix.name]

    @property
    def matrices(self) -> list[MatrixRef]:
        return [
            MatrixRef(name, tuple(weight.shape), "F32", 0, 0, "up", Role.EXPERT, name)
            for name, weight in self.weights.items()
        ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_device_s_spectra_are_those_of_the_kernel(dtype: torch.dtype) -> None:
    weights = {f"{edge} {shape}": make(*shape).to(dtype) for edge, make in EDGES.items() for shape in SHAPES}
    weights["beyond"] = 3e38 * gaussian(64, 128).clamp(-1, 1) if dtype != torch.float16 else gaussian(64, 128)
    source = Read(weights)
    for matrix, found in zip(source.matrices, device_spectra(source, source.matrices, "cpu"), strict=True):
        check_spectrum(found, matrix.name)
        expected = spectrum(weights[matrix.name], matrix.name)
        assert found.mean_square == expected.mean_square
        assert found.largest_eigenvalue == pytest.approx(expected.largest_eigenvalue, rel=1e-4), matrix.name
        if found.alpha is not None and expected.alpha is not None:
            assert 1 / (found.alpha - 1) == pytest.approx(1 / (expected.alpha - 1), rel=2e-2, abs=1e-5), matrix.name


# -- quantizers -----------------------------------------------------------------------------------
OURS = [(engine, choice) for engine in ("native", "mlx", "vllm", "gptqmodel") for choice in ENGINES[engine].choices]
GGML = [("llama.cpp", choice) for choice in ENGINES["llama.cpp"].choices]
SLOW_TABLES = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"}  # llama.cpp builds them for seconds


def trellis(choice: Choice) -> bool:
    return isinstance(format_of(choice), Trellis)


def stored(weight: torch.Tensor, engine: str, choice: Choice, name: str) -> torch.Tensor:
    """A matrix as an engine's files give it back; checks the error that was promised."""
    profile = ENGINES[engine]
    found = rounder_of(profile.quantizer)(weight, choice, name)
    values = profile.writer.reader(profile.writer.encode(found), choice, weight.shape, name)(slice(0, len(weight)))
    exact = float((values.double() - weight.double()).square().sum())
    assert found.squared_error == pytest.approx(exact, rel=1e-3, abs=1e-6 * sums(weight)[1] + 1e-37), name
    return values


@pytest.mark.parametrize(
    ("engine", "choice"),
    [
        pytest.param(engine, choice, marks=pytest.mark.slow if str(choice) in SLOW_TABLES else ())
        for engine, choice in OURS + GGML
        if choice.bits != 16
    ],
    ids=str,
)
def test_every_quantizer_stores_edge_matrices(engine: str, choice: Choice) -> None:
    shape = (32 if engine == "gptqmodel" else 2, 256)
    for dtype in (torch.bfloat16, torch.float16):
        for edge, make in EDGES.items():
            weight = make(*shape).to(dtype)
            values = stored(weight, engine, choice, edge)
            assert values.isfinite().all(), edge
            assert values.to(dtype).isfinite().all(), edge
            if edge == "zeros":
                assert not values.any()
            if "constant" in edge and engine != "llama.cpp" and not trellis(choice):  # whose grids have no step for it
                assert torch.equal(values.to(dtype), weight), edge


@pytest.mark.parametrize("choice", [Choice(3, 32), Choice(2, 128, symmetric=True), Choice(8, 64)], ids=str)
def test_weights_of_one_value_beside_zeros_are_exact(choice: Choice) -> None:
    for value in (0.1875, -0.1875, 2.0**-24, -4096.0):
        for share in (0.01, 0.5, 1.0):
            weight = torch.where(torch.rand(4, 200, generator=torch.Generator().manual_seed(1)) <= share, value, 0.0)
            assert quantize_debiased(weight, choice).squared_error == 0, (value, share)


@pytest.mark.parametrize(("engine", "choice"), [(e, c) for e, c in OURS + GGML if c.bits in (2, 4)], ids=str)
def test_what_no_scale_can_hold_is_refused_by_name(engine: str, choice: Choice) -> None:
    for value in (math.nan, math.inf, -math.inf, 1e5, 1e30, 3.3e38):
        weight = with_one(0.02 * gaussian(4, 256), value)
        with pytest.raises(QuantizationError, match=r"layers\.9\.up .* --pin 'layers\.9\.up=16'"):
            rounder_of(ENGINES[engine].quantizer)(weight, choice, "layers.9.up")


def test_weights_near_the_largest_float16_come_back_as_float16_or_are_refused() -> None:
    for share in (0.5, 0.74, 0.76, 1.0):
        weight = (FP16_MAX * share * gaussian(4, 256).sign()).half()
        for _, choice in OURS[: len(ENGINES["native"].choices)]:
            if choice.bits != 16:
                if share > 0.75 and not trellis(choice):  # whose scales end where float16 does
                    with pytest.raises(QuantizationError, match="too large"):
                        quantize_debiased(weight, choice)
                else:
                    assert stored(weight, "native", choice, "x").half().isfinite().all(), choice


# -- from a checkpoint to its quantized files, by the command line ---------------------------------
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
SOURCES = ["bf16", "fp16", "fp32", "fp8"]


def save(folder: Path, source: str, matrices: Mapping[str, torch.Tensor] | None = None) -> Path:
    """A tiny OLMoE whose experts are edge matrices, two of them alike, or those given."""
    save_runnable(folder, "olmoe", num_experts=8, num_hidden_layers=2)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    edges = cycle(EDGES.values())
    experts = sorted(name for name in tensors if ".experts." in name)
    for name in experts:
        tensors[name] = next(edges)(*tensors[name].shape)
    for name in experts:
        if ".experts.7." in name:
            tensors[name] = tensors[name.replace(".experts.7.", ".experts.3.")].clone()
    tensors.update(matrices or {})
    dtype = {"fp16": torch.float16, "fp32": torch.float32}.get(source, torch.bfloat16)
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    if source == "fp8":
        config["quantization_config"] = FP8
        for name in experts:
            scale = (tensors[name].float().abs().max() / 448).clamp_min(torch.finfo(torch.float32).tiny)
            tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


def succeeded(ran: Ran) -> Any:
    assert ran.code == 0, ran.err
    found = ran.json
    assert_finite(found, "answer")
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_edge_matrices_go_through_every_stage(alphaq: Run, tmp_path: Path, source: str) -> None:
    folder = save(tmp_path / "model", source)
    stats, plan, out = (tmp_path / name for name in ("stats.csv", "plan.json", "out"))
    succeeded(alphaq("analyze", folder, "-o", stats, "--json"))
    with stats.open() as file:
        rows = [row for row in csv.DictReader(file) if row["role"] == "expert"]
    for row in rows:
        assert_finite(
            [float(row[name] or 0) for name in ("alpha", "variance", "mean_square", "largest_eigenvalue")], ""
        )
        assert bool(row["alpha"]) != bool(row["reason"])
    undefined = {row["name"] for row in rows if not row["alpha"]}
    assert 0 < len(undefined) < len(rows)
    succeeded(alphaq("plan", folder, "--bits", "3", "--method", "alphaq", "-o", plan, "--json"))
    written = json.loads(plan.read_text())
    assert_finite(written, "plan")
    assert set(written["neutral"]) == undefined
    succeeded(alphaq("quantize", folder, "--plan", plan, "-o", out, "--json"))
    assert succeeded(alphaq("verify", out, "--reference", folder, "--json"))["ok"]
    checkpoint = open_checkpoint(folder)
    originals = {matrix.name: checkpoint.read(matrix).float() for matrix in checkpoint.matrices}
    for name, values in read_back(out, checkpoint).items():
        assert values.isfinite().all(), name
        if name in undefined and not originals[name].any():
            assert not values.any(), name


@pytest.fixture(scope="module")
def edges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("edges") / "model", "bf16")


@pytest.fixture(scope="module")
def undefined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose experts are all rank one or dead: no α is defined."""
    folder = tmp_path_factory.mktemp("undefined") / "model"
    save_runnable(folder, "olmoe", num_experts=8, num_hidden_layers=2)
    tensors = load_file(folder / "model.safetensors")
    for number, name in enumerate(sorted(name for name in tensors if ".experts." in name)):
        tensors[name] = (EDGES["rank one"](*tensors[name].shape) * (number % 5 > 0)).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Cache]]:
    folder = tmp_path_factory.mktemp("measured")
    with Cache(folder, {"model": "edges"}) as one, Cache(folder, {"model": "undefined"}) as other:
        yield {"edges": one, "undefined": other}


WITHOUT_RUNS = [name for name, method in METHODS.items() if not {"text", "synthetic"} & set(method.needs)]


@pytest.mark.parametrize(
    ("model", "method"), [*(("edges", name) for name in METHODS), *(("undefined", name) for name in WITHOUT_RUNS)]
)
def test_every_method_plans_a_model_of_edge_matrices(
    model: str, method: str, caches: dict[str, Cache], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    text = tmp_path / "text.txt"
    text.write_text((DATA / "texts" / "code.txt").read_text()[:2500])
    checkpoint = open_checkpoint(request.getfixturevalue(model))
    # Weights below float16's smallest are stored as zeros: mint, which wants 9 dB of every matrix, has to keep them.
    choices = "2,3,4,16" if method == "mint" and model == "edges" else None
    asked = resolve(PlanConfig(budget=Budget(bits=5 if choices else 3), method=method, choices=choices))
    plans = []
    for _ in range(2):
        found = measure_for_plan(checkpoint, asked, PlanInputs(text=Text(text)), Resources(cache=caches[model]))
        plans.append(make_plan(checkpoint, asked, found))
    assert plans[0] == plans[1]
    assert_finite(json.loads(plans[0].to_json()), method)
    assert json.loads(plans[0].to_json(), parse_constant=pytest.fail)


def test_mint_names_a_matrix_that_no_choice_is_clear_enough_for(edges: Path, caches: dict[str, Cache]) -> None:
    asked = resolve(PlanConfig(budget=Budget(bits=3), method="mint"))
    with pytest.raises(BudgetError, match=r"No choice is left for 'model\.layers\..*16 keeps a matrix"):
        measure_for_plan(open_checkpoint(edges), asked, resources=Resources(cache=caches["edges"]))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_stores_edge_matrices(alphaq: Run, engine: str, edges: Path, tmp_path: Path) -> None:
    options = ("--engine", engine, "--bits", "5", "--method", "alphaq")
    succeeded(alphaq("plan", edges, *options, "-o", tmp_path / "plan.json", "--json"))
    assert_finite(json.loads((tmp_path / "plan.json").read_text()), "plan")
    succeeded(alphaq("quantize", edges, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out", "--json"))
    for name, values in read_back(tmp_path / "out", open_checkpoint(edges)).items():
        assert values.isfinite().all(), name


def test_equal_experts_are_told_apart_alike_in_every_run(undefined: Path, caches: dict[str, Cache]) -> None:
    checkpoint = open_checkpoint(undefined)
    for method in ("alphaq", "uniform", "alpha-ratio"):
        asked = resolve(PlanConfig(budget=Budget(bits=2.5), method=method))
        found = measure_for_plan(checkpoint, asked, resources=Resources(cache=caches["undefined"]))
        plan = make_plan(checkpoint, asked, found)
        assert make_plan(checkpoint, asked, measure_for_plan(checkpoint, asked)).choices == plan.choices
        assert plan.neutral.keys() == plan.assignment.keys()


@pytest.mark.parametrize(("source", "bad"), [("bf16", math.nan), ("fp32", math.inf), ("fp8", math.nan)])
def test_a_weight_that_is_no_number_is_refused_by_name_at_once(
    alphaq: Run, source: str, bad: float, tmp_path: Path
) -> None:
    folder = save(tmp_path / "model", source)
    assert alphaq("plan", folder, "--bits", "3", "--method", "uniform", "-o", tmp_path / "plan.json").code == 0
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    spoiled = f"{name}_scale_inv" if source == "fp8" else name
    tensors[spoiled] = with_one(tensors[spoiled], bad)
    save_file(tensors, folder / "model.safetensors")
    for command in (
        ("analyze", folder, "-o", tmp_path / "stats.csv"),
        ("plan", folder, "--bits", "3", "--method", "alphaq"),
        ("quantize", folder, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out"),
    ):
        ran = alphaq(*command)
        assert ran.code == 2, command
        assert name in ran.err and len(ran.err.splitlines()) == 1, ran.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "stats.csv").exists()


def test_a_matrix_too_large_for_any_scale_can_be_pinned_to_sixteen_bits(alphaq: Run, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    folder = save(tmp_path / "model", "bf16", {name: 3e38 * gaussian(96, 64).clamp(-1, 1)})
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    options = ("--bits", "3", "--method", "alphaq", "-o", plan, "--json")
    refused = alphaq("plan", folder, *options)
    assert refused.code == 2 and f"--pin '{name}=16'" in refused.err
    succeeded(alphaq("plan", folder, "--pin", f"{name}=16", *options))
    succeeded(alphaq("quantize", folder, "--plan", plan, "-o", out, "--json"))
    checkpoint = open_checkpoint(folder)
    original = next(matrix for matrix in checkpoint.matrices if matrix.name == name)
    assert torch.equal(read_back(out, checkpoint)[name], checkpoint.read(original))


@pytest.mark.parametrize(
    ("tensor", "method"),
    [
        ("mlp.gate.weight", "router"),
        ("mlp.gate.weight", "hessian"),
        ("self_attn.q_proj.weight", "auto"),
        ("post_attention_layernorm.weight", "auto"),
    ],
)
def test_a_tensor_that_spoils_a_pass_is_named(tensor: str, method: str, edges: Path, tmp_path: Path) -> None:
    tensors = load_file(edges / "model.safetensors")
    tensors[f"model.layers.0.{tensor}"].view(-1)[3] = math.nan
    folder = Path(shutil.copytree(edges, tmp_path / "model"))
    save_file(tensors, folder / "model.safetensors")
    text = tmp_path / "text.txt"
    text.write_text((DATA / "texts" / "code.txt").read_text()[:2500])
    asked = resolve(PlanConfig(budget=Budget(bits=3), method=method))
    with pytest.raises(QuantizationError, match=rf"layers\.0\.{re.escape(tensor)} holds NaN"):
        measure_for_plan(open_checkpoint(folder), asked, PlanInputs(text=Text(text)))
