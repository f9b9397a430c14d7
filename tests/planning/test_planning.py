"""Plans of the bundled model: what every engine and every method keeps, and what rules do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from alphaq import pipeline, planning
from alphaq.calibration.text import Text
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.engines.profiles import ENGINES
from alphaq.errors import AlphaQError, BudgetError, ChoiceError, StatsError
from alphaq.measuring.cache import Cache
from alphaq.measuring.resources import Resources
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.nouns.plan import Plan
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.nouns.settings import Budget, PlanConfig, Rule
from alphaq.planning import Measurements, PlanInputs, Scope, make_plan, measure_for_plan, nominal_bytes, resolve
from alphaq.quantizers.base import QUANTIZERS
from alphaq.quantizers.ggml import quantize_ggml
from alphaq.sensitivity.importance import SPREAD
from alphaq.sensitivity.methods import METHODS
from conftest import DATA, random_model
from runnable import save_runnable

MakePlan = Callable[..., Plan]
WITHOUT_TEXT = [name for name, method in METHODS.items() if not method.needs_text]
WITH_TEXT = [name for name, method in METHODS.items() if method.needs_text]
BOUNDED = [name for name, method in METHODS.items() if method.kind in ("loss", "expert")]
FIRST = "layers.0.mlp.experts.0.down_proj"
FAST = "Q2_K,Q3_K,Q4_K,Q6_K,Q8_0"  # llama.cpp's other types search for seconds
STACK_BYTES = 4 * 36  # five digits are counted for how many matrices are in each of MLX's stacks


def config_of(**settings: object) -> PlanConfig:
    """2.5 bits by the squared error, unless told otherwise; rules as a user writes them."""
    for option in ("pins", "min_bits", "max_bits"):
        rules = settings.get(option, ())
        settings[option] = tuple(Rule.parse(rule, f"--{option}", "*") for rule in rules)  # type: ignore[attr-defined]
    return PlanConfig.model_validate({"budget": Budget(bits=2.5), "method": "distortion"} | settings)


@pytest.fixture(scope="module", autouse=True)
def _short_passes() -> Iterator[None]:
    """What is tested here does not depend on how many random tokens the model runs on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning.passes, "SYNTHETIC_WINDOWS", 2)
        patch.setattr(planning.passes, "SYNTHETIC_LENGTH", 64)
        yield


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return open_checkpoint(tiny)


@pytest.fixture(scope="module")
def matrices(checkpoint: Checkpoint) -> dict[str, MatrixRef]:
    return {matrix.name: matrix for matrix in checkpoint.planned}


@pytest.fixture(scope="module")
def cache(known_tiny: Path) -> Iterator[Cache]:
    with Cache(known_tiny, {}) as opened:
        yield opened


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of one window."""
    path = tmp_path_factory.mktemp("text") / "code.txt"
    path.write_text((DATA / "texts" / "code.txt").read_text(encoding="utf-8")[:2500], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def plan(checkpoint: Checkpoint, cache: Cache) -> MakePlan:
    """Plan the bundled model; nothing is measured twice."""

    def make(calibration: Path | None = None, **settings: object) -> Plan:
        request = resolve(config_of(**settings))
        found = measure_for_plan(
            checkpoint, request, PlanInputs(text=calibration and Text(calibration)), Resources(cache=cache)
        )
        return make_plan(checkpoint, request, found)

    return make


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail whatever reads weights."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(planning.matrices, "measure", never)
    for name in ("gather", "routing_prior"):
        monkeypatch.setattr(planning.passes, name, never)


def data_bytes(plan: Plan, matrices: dict[str, MatrixRef], layer: int | None = None) -> int:
    """Bytes of the planned matrices' data, of one layer or of all."""
    storage_bytes = ENGINES[plan.engine].storage_bytes
    return sum(
        storage_bytes(plan.choice(name), matrix.shape)
        for name, matrix in matrices.items()
        if layer in (None, matrix.layer)
    )


def check_promises(plan: Plan, limit: int, spent: int, matrices: dict[str, MatrixRef]) -> None:
    """It fits and says by how much, units agree, no single upgrade fits, and the table is what it was made of."""
    assert plan.table is not None
    assert plan.budget_slack is not None
    assert 0 <= plan.budget_slack <= limit - spent <= plan.budget_slack + STACK_BYTES
    profile, table = ENGINES[plan.engine], plan.table
    chosen: dict[str, str] = {}
    for name, matrix in matrices.items():
        assert chosen.setdefault(profile.unit_of(matrix), plan.choices[name]) == plan.choices[name]
    assert set(table.losses) == set(chosen)
    objective = 0.0
    for position, (unit, losses) in enumerate(table.losses.items()):
        costs, at = table.costs[table.cost_of[position]], table.choices.index(chosen[unit])
        loss = losses[at]
        assert loss is not None
        objective += loss
        for other, cost in zip(losses, costs, strict=True):
            if other is not None and other < loss * (1 - 1e-5):
                assert cost - costs[at] > plan.budget_slack
    assert plan.objective == pytest.approx(objective, rel=1e-5)


@pytest.mark.parametrize(
    "engine",
    [one if one in ("native", "llama.cpp") else pytest.param(one, marks=pytest.mark.slow) for one in ENGINES],
)
def test_every_engine_s_plan_fits_agrees_and_is_proven(
    plan: MakePlan, checkpoint: Checkpoint, matrices: dict[str, MatrixRef], engine: str
) -> None:
    settings: dict[str, object] = {"method": "auto", "engine": engine}
    if engine == "llama.cpp":
        settings["choices"] = FAST
    by_bits = plan(**settings, budget=Budget(bits=4.5))
    request = resolve(config_of(**settings, budget=Budget(bits=4.5)))
    limit = nominal_bytes(request, list(matrices.values()), 4.5)
    check_promises(by_bits, limit, data_bytes(by_bits, matrices), matrices)
    assert by_bits.size_bytes is not None and by_bits.bits_per_weight is not None
    parameters = sum(matrix.parameters for matrix in matrices.values())
    by_bpw = plan(**settings, budget=Budget(bpw=by_bits.bits_per_weight - 0.1))
    limit = int((by_bits.bits_per_weight - 0.1) * parameters / 8 + 1e-9)
    check_promises(by_bpw, limit, data_bytes(by_bpw, matrices), matrices)
    limit = by_bits.size_bytes - 12_345
    by_size = plan(**settings, budget=Budget(size_bytes=limit))
    assert by_size.size_bytes is not None
    chosen = {matrix.name: matrix for matrix in checkpoint.matrices if matrix.name in by_size.assignment}
    check_promises(by_size, limit, by_size.size_bytes, chosen)
    for made in (by_bits, by_bpw, by_size):
        assert made.lower_bound is not None and made.objective is not None
        assert made.lower_bound <= made.objective
        assert made.gap <= 1e-9


@pytest.mark.parametrize("method", ["distortion", "uniform"])
def test_a_size_budget_is_the_size_of_the_files(
    plan: MakePlan, checkpoint: Checkpoint, tmp_path: Path, method: str
) -> None:
    made = plan(method=method, budget=Budget(size_bytes=7_000_000), pins=["layers.0.mlp.experts.3.*=16", "q_proj=8g32"])
    pipeline.quantize(checkpoint, made, tmp_path / "out")
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert written == made.size_bytes <= 7_000_000
    assert made.budget_slack == 7_000_000 - written


def test_uniform_at_whole_bits_is_one_plain_choice(plan: MakePlan) -> None:
    made = plan(method="uniform", budget=Budget(bits=2.0))
    assert {made.choices[name] for name in made.assignment} == {"t2"}
    assert made.budget_slack == 0
    assert made.lower_bound is None and made.price is None


@pytest.mark.parametrize(
    ("engine", "choices", "stored"),
    [
        ("llama.cpp", "IQ2_XS", "IQ2_XS"),
        ("llama.cpp", "IQ2_XXS,IQ2_XS", "IQ2_XS"),
        ("llama.cpp", "IQ2_XS,Q2_K", "Q2_K"),
        ("native", "2g128-nest", "2g128-nest"),
        ("native", "2g64s,2g128", "2g128"),
    ],
)
def test_methods_of_widths_store_what_was_named(engine: str, choices: str, stored: str) -> None:
    request = resolve(config_of(method="uniform", engine=engine, choices=choices, budget=Budget(bits=2.0)))
    assert {str(choice) for choice in request.offered} == {stored}


@pytest.mark.parametrize("method", WITHOUT_TEXT)
def test_every_method_plans_alike_twice_and_within_the_bytes_of_uniform(
    plan: MakePlan, matrices: dict[str, MatrixRef], method: str
) -> None:
    budget = Budget(bits=2.5)
    made = plan(method=method, budget=budget)
    assert plan(method=method, budget=budget) == made
    assert set(made.assignment) == set(matrices)
    assert made.average_bits is not None and made.average_bits <= 2.7
    if method == "paper":  # counts code bits, and the offsets of 1 bit are wider than those of 2
        assert made.average_bits == 2.5
    else:
        assert data_bytes(made, matrices) <= data_bytes(plan(method="uniform", budget=budget), matrices)
    if method in BOUNDED:
        assert made.gap <= 1e-9
    else:
        assert made.lower_bound is None


@pytest.mark.parametrize("method", WITH_TEXT)
def test_methods_that_need_a_text_say_so_and_plan_with_one(
    plan: MakePlan, matrices: dict[str, MatrixRef], text: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, object] = {"method": method, "choices": "1,2,3"}
    with pytest.raises(StatsError, match=rf"--method {method} needs a text.*--calibration"):
        plan(**settings)
    made = plan(text, **settings)
    assert made.gap <= 1e-6
    assert data_bytes(made, matrices) <= data_bytes(plan(method="uniform", choices="1,2,3"), matrices)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was run again")

    monkeypatch.setattr(planning.passes, "gather", never)
    assert plan(text, **settings) == made
    other = plan(text, **settings, budget=Budget(bits=2.25))
    assert other.objective is not None and made.objective is not None
    assert other.objective > made.objective


def test_another_text_runs_the_model_again(
    plan: MakePlan, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan(text, method="hessian", choices="1,2,3")
    (tmp_path / "other.txt").write_text(text.read_text() + "def another(): ...\n")

    def noted(*_: object, **__: object) -> None:
        raise RuntimeError("run")

    monkeypatch.setattr(planning.passes, "gather", noted)
    with pytest.raises(RuntimeError, match="run"):
        plan(tmp_path / "other.txt", method="hessian", choices="1,2,3")


def test_a_text_that_is_no_text_is_an_error(plan: MakePlan, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00" * 100)
    with pytest.raises(StatsError, match=r"binary is not UTF-8 text.*--calibration"):
        plan(tmp_path / "binary", method="hessian")


def test_the_default_runs_the_model_once(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(method="auto")
    assert made.config.method == "auto"

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was run again")

    monkeypatch.setattr(planning.passes, "gather_fisher", never)
    monkeypatch.setattr(planning.passes, "own_text", never)
    assert plan(method="auto") == made


def test_random_differs_by_its_seed_alone(plan: MakePlan) -> None:
    first, other = (plan(method="random", seed=seed) for seed in (0, 1))
    assert first.choices != other.choices
    assert first.histogram == other.histogram
    assert plan(method="uniform", seed=0).choices == plan(method="uniform", seed=1).choices


def test_pmq_gives_each_expert_one_choice_and_each_layer_its_share(
    plan: MakePlan, matrices: dict[str, MatrixRef], text: Path
) -> None:
    made = plan(text, method="pmq", choices="1,2,3")
    experts: dict[tuple[int | None, int | None], set[str]] = {}
    for name, matrix in matrices.items():
        experts.setdefault((matrix.layer, matrix.expert), set()).add(made.choices[name])
    assert all(len(choices) == 1 for choices in experts.values())
    uniform = plan(method="uniform", choices="2,3", budget=Budget(bits=2.5))
    whole = data_bytes(uniform, matrices)
    for layer in range(4):
        widths = [next(iter(choices)) for (place, _), choices in experts.items() if place == layer]
        assert "2g128" in widths and "3g128" in widths
        assert data_bytes(made, matrices, layer) <= whole // 4


def test_pmq_heeds_pins_of_whole_experts_and_names_the_expert_of_others(plan: MakePlan, text: Path) -> None:
    made = plan(text, method="pmq", choices="1,2,3", pins=["layers.1.mlp.experts.2.*=1"])
    assert {made.choices[name] for name in made.assignment if "layers.1.mlp.experts.2." in name} == {"1g128"}
    with pytest.raises(BudgetError, match=r"No choice is left for 'layers\.0\.experts\.0'.*relax"):
        plan(text, method="pmq", choices="1,2,3", pins=[f"{FIRST}=1", "layers.0.mlp.experts.0.up_proj=2"])


def test_pmq_is_refused_where_experts_share_a_choice(plan: MakePlan, unmeasured: None, text: Path) -> None:
    with pytest.raises(AlphaQError, match=r"pmq chooses per expert"):
        plan(text, method="pmq", engine="mlx", choices="2,3")


@pytest.mark.parametrize("method", ["distortion", "alphaq"])
def test_every_layer_keeps_to_its_own_budget(plan: MakePlan, matrices: dict[str, MatrixRef], method: str) -> None:
    settings: dict[str, object] = {"method": method, "choices": "1,2,3,4"}
    made, free = plan(**settings, per_layer=True), plan(**settings)
    limit = nominal_bytes(resolve(config_of(**settings)), list(matrices.values()), 2.5)
    for layer in range(4):
        assert data_bytes(made, matrices, layer) <= limit // 4
    assert made.gap <= 1e-6
    assert made.objective is not None and free.objective is not None
    assert made.objective > free.objective
    assert max(data_bytes(free, matrices, layer) for layer in range(4)) > limit // 4


def test_a_budget_per_layer_works_without_a_plain_choice(plan: MakePlan, matrices: dict[str, MatrixRef]) -> None:
    settings: dict[str, object] = {"choices": "2g64s,3g32"}
    limit = nominal_bytes(resolve(config_of(**settings)), list(matrices.values()), 2.5)
    made = plan(**settings, per_layer=True)
    shares = [data_bytes(made, matrices, layer) / (limit // 4) for layer in range(4)]
    assert 0.9 < min(shares) <= max(shares) <= 1


def test_an_order_has_no_budget_per_layer(plan: MakePlan) -> None:
    with pytest.raises(BudgetError, match="--per-layer needs losses, and random only has an order"):
        plan(method="random", per_layer=True)


# Rules


@pytest.mark.parametrize("method", ["distortion", "uniform", "alpha-ratio"])
@pytest.mark.parametrize(
    ("pin", "named", "stored"),
    [
        ("layers.0.*=8", lambda matrix: matrix.layer == 0 and matrix.role != Role.ROUTER, "8g128"),
        ("down=4g32s", lambda matrix: matrix.projection == "down", "4g32s"),
        (f"{FIRST}=16", lambda matrix: FIRST in matrix.name, "16"),
        ("attention=16", lambda matrix: matrix.role == Role.ATTENTION, "16"),
        ("shared_expert=3g64", lambda matrix: matrix.role == Role.SHARED_EXPERT, "3g64"),
    ],
)
def test_pins_hold_for_exactly_what_they_name(
    plan: MakePlan,
    checkpoint: Checkpoint,
    method: str,
    pin: str,
    named: Callable[[MatrixRef], bool],
    stored: str,
) -> None:
    made = plan(method=method, budget=Budget(bits=5.0), choices="1,2,3,4,5,6,7", pins=[pin])
    quantizable = [matrix for matrix in checkpoint.matrices if matrix.name in made.choices]
    assert any(named(matrix) for matrix in quantizable)
    for matrix in quantizable:
        assert (made.choices[matrix.name] == stored) == named(matrix), matrix.name
    assert made.budget_slack is not None and made.budget_slack >= 0


def test_of_two_pins_the_later_wins(plan: MakePlan) -> None:
    made = plan(pins=["*=3", "layers.0.*=4", "down=2"], budget=Budget(bits=4.0))
    for name in made.assignment:
        assert made.choices[name] == ("2g128" if "down" in name else "4g128" if "layers.0." in name else "3g128")


@pytest.mark.parametrize("method", ["distortion", "uniform", "alpha-ratio", "random"])
def test_bounds_hold_for_every_kind_of_method(plan: MakePlan, matrices: dict[str, MatrixRef], method: str) -> None:
    bounds: dict[str, object] = {"min_bits": ["2", "down=3"], "max_bits": ["4", "layers.0.*=3"]}
    made = plan(method=method, budget=Budget(bits=3.0), **bounds)
    for name, matrix in matrices.items():
        least, most = 3 if matrix.projection == "down" else 2, 3 if matrix.layer == 0 else 4
        assert least <= made.assignment[name] <= most
    assert 0 <= made.budget_slack < 8192 + 4096  # less than one matrix's step from 3 bits to 4


@pytest.mark.parametrize("method", ["distortion", "uniform", "mint"])
def test_least_signal_to_noise_ratio_holds_for_every_matrix(
    plan: MakePlan, checkpoint: Checkpoint, cache: Cache, method: str
) -> None:
    settings: dict[str, object] = {"method": method, "budget": Budget(bits=3.7), "fast": True}
    found = measure_for_plan(checkpoint, resolve(config_of(**settings)), resources=Resources(cache=cache))
    decibels = -10 * np.log10(found.evidence.relative_errors)
    labels = [str(choice) for choice in found.evidence.choices]

    def least(plan: Plan) -> float:
        columns = [labels.index(plan.choices[name]) for name in found.spectra]
        return float(decibels[np.arange(len(columns)), columns].min())

    bound = least(plan(**settings, min_sqnr_db=0.0)) + 0.1
    assert least(plan(**settings, min_sqnr_db=bound)) >= bound


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pins": ["nothing=4"]}, r"--pin 'nothing' names no matrix.*layers\.0"),
        ({"pins": ["router=4"]}, r"--pin 'router' names no matrix"),
        ({"min_bits": ["nothing=4"]}, r"--min-bits 'nothing' names no matrix"),
        ({"max_bits": ["shared_expert=4"]}, r"--max-bits 'shared_expert' names no matrix"),
        ({"min_bits": ["4"], "max_bits": ["3"]}, r"No choice is left for '.*experts\.0\.down_proj\.weight'.*relax"),
        ({"min_bits": ["down=4"], "choices": "1,2,3"}, r"No choice is left for .* and 31 more: .*--choices"),
        (
            {"engine": "vllm", "budget": Budget(bits=8.0), "pins": [f"{FIRST}=4", "layers.0.mlp.experts.1.*=8"]},
            r"No choice is left for 'layers\.0\.experts'.*relax one of them",
        ),
        ({"min_bits": ["3"], "budget": Budget(bits=2.0)}, r"below the least.*--bits 3 with all at t3"),
        ({"pins": ["down=8"], "budget": Budget(bits=2.0)}, r"below the least.*--bits 3\.\d+.*relax pins and bounds"),
        ({"min_bits": ["3"], "budget": Budget(bpw=2.0)}, r"below the least.*--bpw 3\.\d+ with all at t3"),
        ({"choices": "2,3", "budget": Budget(bits=1.5)}, r"below the least.*--bits 2 .*narrower --choices"),
    ],
)
def test_rules_that_cannot_be_met_are_told_before_measuring(
    plan: MakePlan, unmeasured: None, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(BudgetError, match=message):
        plan(**settings)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"engine": "mlx", "symmetric": True}, ChoiceError),
        ({"engine": "mlx", "choices": "1,2"}, ChoiceError),
        ({"engine": "vllm", "choices": "3"}, ChoiceError),
        ({"pins": ["down=Q4_K"]}, ChoiceError),
        ({"engine": "vllm", "attention_bits": 3}, ChoiceError),
        ({"engine": "llama.cpp", "method": "uniform", "choices": "IQ1_S"}, BudgetError),
        ({"unweighted": True, "budget": Budget(bpw=3.0)}, BudgetError),
        ({"min_bits": ["many"]}, BudgetError),
        ({"choices": " , "}, BudgetError),
    ],
)
def test_what_cannot_be_is_told_without_a_checkpoint(settings: dict[str, object], error: type[AlphaQError]) -> None:
    with pytest.raises(error):
        resolve(config_of(**settings))


@pytest.mark.parametrize("bits", [2.0, 2.3, 3.5, 7.25])
@pytest.mark.parametrize("engine", ["native", "llama.cpp", "mlx"])
def test_the_least_budget_that_an_error_names_is_feasible(
    plan: MakePlan, unmeasured: None, checkpoint: Checkpoint, engine: str, bits: float
) -> None:
    """Whatever is pinned, `--bits` as the message puts it fits, and a thousandth less does not."""
    settings: dict[str, object] = {"engine": engine, "pins": [f"experts.{e}.*=8" for e in range(int(bits))]}
    with pytest.raises(BudgetError, match="below the least") as raised:
        plan(budget=Budget(bits=2.0), **settings)
    least = float(str(raised.value).split("--bits ")[1].split()[0])
    planning.problem_of(Scope.of(checkpoint, resolve(config_of(budget=Budget(bits=least), **settings))))
    with pytest.raises(BudgetError):
        plan(budget=Budget(bits=least - 1e-3), **settings)


def test_what_an_engine_cannot_store_is_never_chosen(save_family: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(save_family("mixtral"))  # down projections have 96 columns
    request = resolve(config_of(engine="mlx", choices="2g32,2g64,3g32,3g64,4g32", attention_bits=16))
    made = make_plan(checkpoint, request, measure_for_plan(checkpoint, request))
    stored = {matrix.name: made.choice(matrix.name) for matrix in checkpoint.planned}
    assert {choice.group_size for name, choice in stored.items() if ".w2." in name} == {32}
    assert made.table is not None
    down = next(losses for unit, losses in made.table.losses.items() if unit.endswith("down"))
    assert [loss is None for loss in down] == [label.endswith("g64") for label in made.table.choices]


def test_a_role_that_an_engine_cannot_store_is_named_with_the_remedy(save_family: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(save_family("mixtral"))
    settings: dict[str, object] = {"engine": "vllm", "budget": Budget(bits=4.5), "choices": "4g32s,8g32s"}
    request = resolve(config_of(**settings, attention_bits=4))
    with pytest.raises(BudgetError, match=r"vllm cannot store .* as 4g128s: 64 columns.*--pin '.*=16'"):
        measure_for_plan(checkpoint, request)
    fixed = Scope.of(checkpoint, resolve(config_of(**settings))).fixed
    assert {str(choice) for choice in fixed.values()} == {"4g64s"}  # the usual one only has to be as wide


# Other roles under one budget


def outside(checkpoint: Checkpoint) -> dict[str, Role]:
    """Roles of the matrices beside the experts that llama.cpp's profile quantizes."""
    roles = ENGINES["llama.cpp"].role_bits
    return {matrix.name: matrix.role for matrix in checkpoint.matrices if matrix.role in roles}


def test_a_size_budget_of_llama_cpp_covers_every_role_each_matrix_alone(
    plan: MakePlan, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    settings: dict[str, object] = {"engine": "llama.cpp", "method": "auto", "choices": FAST}
    made, ample = (plan(**settings, budget=Budget(size_bytes=limit)) for limit in (5_200_000, 8_000_000))
    assert made.table is not None
    assert outside(checkpoint).keys() <= made.assignment.keys()
    assert outside(checkpoint).keys() <= made.table.losses.keys()
    assert len(made.table.losses) == 4 * 3 + len(outside(checkpoint))
    for role in set(outside(checkpoint).values()):
        bits = [
            [one.assignment[name] for name, its in outside(checkpoint).items() if its is role] for one in (made, ample)
        ]
        assert sum(bits[0]) < sum(bits[1]), role
    pipeline.quantize(checkpoint, made, tmp_path / "out")
    written = (tmp_path / "out" / "model.gguf").stat().st_size
    assert written == made.size_bytes
    assert made.budget_slack == 5_200_000 - written >= 0


def test_a_role_that_was_given_its_bits_leaves_the_budget(plan: MakePlan, checkpoint: Checkpoint) -> None:
    made = plan(
        engine="llama.cpp",
        method="auto",
        choices=FAST,
        budget=Budget(size_bytes=6_000_000),
        head_bits=8,
        pins=["attention=Q6_K"],
    )
    for name, role in outside(checkpoint).items():
        fixed = {Role.HEAD: "Q8_0", Role.ATTENTION: "Q6_K"}.get(role)
        assert (name in made.assignment) == (fixed is None)
        assert fixed in (None, made.choices[name])
    assert made.size_bytes is not None and made.size_bytes <= 6_000_000


@pytest.mark.parametrize(
    "settings",
    [{"method": "auto"}, {"method": "distortion", "budget": Budget(size_bytes=6_000_000)}],
    ids=["bits", "size"],
)
def test_without_a_joint_budget_roles_get_the_engine_s_usual_types(
    plan: MakePlan, checkpoint: Checkpoint, settings: dict[str, object]
) -> None:
    made = plan(**{"engine": "llama.cpp", "choices": FAST, "budget": Budget(bits=3.0), **settings})
    for name, role in outside(checkpoint).items():
        assert made.choices[name] == ("Q6_K" if role is Role.HEAD else "Q4_K")
        assert name not in made.assignment


def test_bits_for_a_role_that_an_engine_keeps_are_refused() -> None:
    with pytest.raises(BudgetError, match=r"vllm keeps the embedding in 16 bits; --embedding-bits does nothing"):
        resolve(config_of(engine="vllm", budget=Budget(bits=4), embedding_bits=4))


# Errors from samples


def unit_errors(plan: Measurements, units: np.ndarray) -> np.ndarray:
    """Σ(w − ŵ)² of each unit at each choice."""
    totals = np.zeros((units.max() + 1, plan.evidence.errors.shape[1]))
    np.add.at(totals, units, plan.evidence.errors)
    return totals


@pytest.mark.slow
def test_sampled_errors_of_a_unit_are_near_those_of_all_its_weights(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = resolve(config_of(engine="llama.cpp", choices="Q2_K,Q4_K,Q8_0"))
    names = [request.profile.unit_of(matrix) for matrix in checkpoint.planned]
    units = np.array([list(dict.fromkeys(names)).index(name) for name in names])
    several = []
    for members in (8, 5):  # of eight
        monkeypatch.setattr(planning.samples, "SAMPLE_MEMBERS", members)
        several.append(measure_for_plan(checkpoint, request))
    monkeypatch.setattr(planning.samples, "SAMPLE_MEMBERS", 8)
    monkeypatch.setattr(planning.samples, "SAMPLE_VALUES", 1 << 40)
    whole = measure_for_plan(checkpoint, request)
    assert whole.deviations is not None and (whole.deviations == 0).all()
    assert make_plan(checkpoint, request, whole).sampling_error == 0
    for sampled in several:
        real, found = unit_errors(whole, units), unit_errors(sampled, units)
        assert sampled.deviations is not None
        deviations = np.array([sampled.deviations[units == unit][0] for unit in range(units.max() + 1)])
        assert (np.abs(found / real - 1) <= np.minimum(4 * deviations, 0.03)).all()
        assert (deviations > 0).all()
        told = make_plan(checkpoint, request, sampled).sampling_error
        assert told is not None and 0 < told <= deviations.max() * 1.01


def test_of_a_large_unit_only_a_sample_of_matrices_is_measured_and_stands_for_the_rest(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, cache: Cache
) -> None:
    seen: set[str] = set()

    def noting(weight: torch.Tensor, choice: Choice, name: str = "matrix") -> QuantizedMatrix:
        seen.add(name)
        return quantize_ggml(weight, choice, name)

    monkeypatch.setitem(QUANTIZERS, "ggml", replace(QUANTIZERS["ggml"], function=noting))
    monkeypatch.setattr(planning.samples, "SAMPLE_MEMBERS", 3)
    request = resolve(config_of(engine="llama.cpp", choices="Q3_K,Q5_K,Q8_0", budget=Budget(bits=4.0)))
    found = measure_for_plan(checkpoint, request, resources=Resources(cache=cache))
    units: dict[str, list[int]] = {}
    for number, matrix in enumerate(checkpoint.planned):
        units.setdefault(request.profile.unit_of(matrix), []).append(number)
    names = list(found.spectra)
    for rows in units.values():
        drawn = [row for row in rows if names[row] in seen]
        rest = [row for row in rows if names[row] not in seen]
        assert (len(drawn), len(rest)) == (3, 5)
        pooled = found.evidence.errors[drawn].sum(axis=0) / found.evidence.energies[drawn].sum()
        assert found.evidence.relative_errors[rest] == pytest.approx(np.tile(pooled, (5, 1)))
    seen.clear()
    again = measure_for_plan(checkpoint, request, resources=Resources(cache=cache))
    assert not seen
    assert (again.evidence.errors == found.evidence.errors).all()


def test_types_that_rows_do_not_fit_are_never_measured(tmp_path: Path) -> None:
    narrow = open_checkpoint(save_runnable(tmp_path, "mixtral"))  # rows of 96 in one projection, of 64 in the others
    request = resolve(config_of(engine="llama.cpp", choices="Q4_0,Q4_K,Q8_0"))
    found = measure_for_plan(narrow, request)
    assert np.isfinite(found.evidence.errors).all()
    made = make_plan(narrow, request, found)
    assert {made.choices[name] for name in found.spectra} <= {"Q4_0", "Q8_0"}


# The published method and the exponent


@pytest.fixture(scope="module")
def stats(checkpoint: Checkpoint, cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stats") / "stats.csv"
    pipeline.analyze(checkpoint, path, resources=pipeline.Resources(cache=cache))
    return path


def from_stats(stats: Path, **settings: object) -> Plan:
    request = resolve(config_of(**settings), with_model=False)
    return make_plan(None, request, measure_for_plan(None, request, PlanInputs(stats)))


def test_the_paper_s_method_is_the_same_from_stats_and_from_the_model(plan: MakePlan, stats: Path) -> None:
    alone, whole = from_stats(stats, method="paper"), plan(method="paper")
    assert alone.assignment == whole.assignment
    for made in (alone, whole):
        assert made.config.gamma == 10.0
        assert made.config.unweighted is True
        assert made.config.noise == "analytic"
        assert set(made.histogram) <= {1, 2, 3, 4}
        assert made.cost_unit == "code bits"
        assert {label.partition("g")[2] for label in made.choices.values()} == {"128"}
        assert sum(made.assignment.values()) + made.budget_slack == 2.5 * len(made.assignment)


def test_a_setting_of_zero_is_not_taken_for_the_default(plan: MakePlan) -> None:
    assert plan(method="paper", gamma=0.0).config.gamma == 0.0
    assert resolve(config_of(method="mint", min_sqnr_db=0.0)).config.min_sqnr_db == 0.0
    assert resolve(config_of(method="mint")).config.min_sqnr_db == 9.0


def test_code_bits_do_not_buy_finer_groups(plan: MakePlan, stats: Path) -> None:
    uniform: dict[str, object] = {"method": "uniform"}
    for made in (
        from_stats(stats),
        plan(unweighted=True),
        from_stats(stats, **uniform),
        plan(unweighted=True, noise="analytic", **uniform),
    ):
        assert {made.choices[name] for name in made.assignment} <= {
            "t1",
            "t2",
            "t3",
            "t4",
            *(f"{bits}g128" for bits in range(5, 9)),
        }


def test_stats_alone_heed_the_least_signal_to_noise_ratio(stats: Path) -> None:
    low, bound = Budget(bits=1.5), 9.0  # Var·2^(−2b): 6 dB at 1 bit, 12 dB at 2
    assert from_stats(stats, budget=low).histogram == {1: 48, 2: 48}
    assert min(from_stats(stats, min_sqnr_db=bound).histogram) == 2
    with pytest.raises(BudgetError, match="--bits 2 with all at t2"):
        from_stats(stats, budget=low, min_sqnr_db=bound)


def test_stats_alone_plan_by_alpha_unless_told_otherwise(stats: Path) -> None:
    assert from_stats(stats, method="auto").config.method == "alphaq"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"method": "structure"}, StatsError, "--method structure needs the weights"),
        ({"method": "kurtosis"}, StatsError, "--method kurtosis needs the weights"),
        ({"method": "pmq"}, StatsError, "--method pmq needs the weights"),
        ({"noise": "measured"}, StatsError, "--noise measured needs the weights"),
        ({"budget": Budget(bpw=3.0)}, BudgetError, "do not say how many bytes"),
        ({"engine": "mlx", "choices": "2,3"}, BudgetError, "Give MODEL"),
        ({"pins": ["down=4"]}, BudgetError, "Give MODEL"),
        ({"budget": Budget(bits=0.5)}, BudgetError, r"--bits 1 with all at t1"),
    ],
)
def test_what_stats_alone_cannot_do_is_told(
    stats: Path, settings: dict[str, object], error: type[AlphaQError], message: str
) -> None:
    with pytest.raises(error, match=message):
        from_stats(stats, **settings)


def test_automatic_gamma_is_written_down_and_spreads_the_importance(plan: MakePlan) -> None:
    made = plan(method="alphaq")
    alphas = np.array(list(made.alpha.values()))
    assert (made.config.gamma * np.log(alphas)).std() == pytest.approx(SPREAD)
    assert plan(method="alphaq", gamma=made.config.gamma).choices == made.choices
    assert plan(method="alphaq", gamma=0.0).choices == plan(method="distortion").choices


def test_another_config_runs_the_model_again(
    tiny: Path, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    settings = json.loads((folder / "config.json").read_text())
    request = resolve(config_of(method="auto"))
    measure_for_plan(open_checkpoint(folder), request, resources=Resources(cache=cache))

    def noted(*_: object, **__: object) -> None:
        raise RuntimeError("run")

    monkeypatch.setattr(planning.passes, "gather_fisher", noted)
    measure_for_plan(open_checkpoint(folder), request, resources=Resources(cache=cache))
    (folder / "config.json").write_text(json.dumps(settings | {"num_experts_per_tok": 3}))
    with pytest.raises(RuntimeError, match="run"):
        measure_for_plan(open_checkpoint(folder), request, resources=Resources(cache=cache))


@pytest.mark.slow
def test_damaged_pass_in_the_cache_is_run_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    request = resolve(config_of(method="auto"))
    with Cache(tmp_path, {}) as own:
        made = make_plan(checkpoint, request, measure_for_plan(checkpoint, request, resources=Resources(cache=own)))
        [kept] = own.path.glob("fisher-*.json")
        for damage in (b"", b"\xff\xfe", b'{"format_version": 1}'):
            kept.write_bytes(damage)
            assert (
                make_plan(checkpoint, request, measure_for_plan(checkpoint, request, resources=Resources(cache=own)))
                == made
            )


@pytest.mark.parametrize("engine", ["llama.cpp", "mlx", "gptqmodel"])
def test_bits_mean_bits_where_rows_fit_no_usual_block(tmp_path: Path, engine: str) -> None:
    narrow = open_checkpoint(save_runnable(tmp_path, "qwen2_moe"))  # rows of 64 and 32: no block of 256 or group of 128
    roles = {"attention_bits": 16, "shared_bits": 16}
    request = resolve(config_of(engine=engine, budget=Budget(bits=4), **roles))
    made = make_plan(narrow, request, measure_for_plan(narrow, request))
    assert made.bits_per_weight is not None and made.bits_per_weight <= 5.5  # scales of small groups included


def test_orders_follow_the_model_and_not_its_files(tmp_path: Path) -> None:
    random_model("qwen2_moe", num_hidden_layers=12).save_pretrained(tmp_path / "model")
    deep = open_checkpoint(tmp_path / "model")
    assert [matrix.layer for matrix in deep.planned] != sorted(matrix.layer or 0 for matrix in deep.planned)
    request = resolve(config_of(method="first-layers", group_size=32))
    made = make_plan(deep, request, measure_for_plan(deep, request))
    layers = {matrix.name: matrix.layer for matrix in deep.planned}
    assert {layers[name] for name, bits in made.assignment.items() if bits == 3} == set(range(6))
