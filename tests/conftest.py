"""Shared fixtures: the bundled model, tiny random models of every family, and a command-line runner."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve the tests' other processes

import torch

from alphaq.planning import passes
from turns import compile_in_turn, made_once

compile_in_turn()

ROOT = Path(__file__).parents[1]
DATA = ROOT / "src" / "alphaq" / "data"
SHARED = ROOT.parent / "shared"
USUAL_WINDOWS = {name: getattr(passes, name) for name in ("FEWEST_WINDOWS", "MOST_WINDOWS")}
"""Of the default method's pass, of which tests take fewer."""

COMMON = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    num_experts_per_tok=2,
)
EXPERTS = 4
MLA = dict(q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
DEEPSEEK_SIZES = dict(
    num_key_value_heads=4,
    n_routed_experts=EXPERTS,
    n_shared_experts=1,
    first_k_dense_replace=1,
    moe_intermediate_size=32,
    n_group=1,
    topk_group=1,
)
DEEPSEEK = DEEPSEEK_SIZES | MLA
QWEN = dict(num_experts=EXPERTS, moe_intermediate_size=32)
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": dict(num_local_experts=EXPERTS),
    "qwen2_moe": dict(shared_expert_intermediate_size=32, **QWEN),
    "qwen3_moe": dict(mlp_only_layers=[0], head_dim=16, **QWEN),
    "olmoe": dict(num_experts=EXPERTS),
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
}
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "glm4_moe": DEEPSEEK_SIZES | dict(head_dim=16, num_key_value_heads=2),
    "granitemoe": dict(num_local_experts=EXPERTS),
}
"""Those that not every engine of files with experts is written for."""


_STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="begin no test after so many minutes; -rs names the rest")


@pytest.hookimpl(trylast=True)  # of the tests that are left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where time is short, files of few tests come first: they make one claim each. Sweeps over hundreds come last."""
    if config.getoption("--minutes") is not None:
        tests_of = Counter(item.path for item in items)
        items.sort(key=lambda item: (tests_of[item.path], item.path))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - _STARTED > 60 * minutes:
        pytest.skip(f"no time left: {item.path.relative_to(ROOT)}")


def random_model(family: str, **overrides: Any) -> Any:
    """A tiny randomly initialised model of the real class, float32, with spectra that differ by matrix."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **(FAMILIES | MORE_FAMILIES)[family], **overrides})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(1 + torch.rand(parameter.shape[0]).view(-1, *[1] * (parameter.ndim - 1)))
    return model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test begins with an empty cache, and none touches the user's."""
    own = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ALPHAQ_CACHE", str(own))
    return own


@pytest.fixture(scope="session")
def save_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a family's random model once per layout and dtype; returns its folder."""
    saved: dict[tuple[str, bool, torch.dtype], Path] = {}

    def save(family: str, fused: bool = False, dtype: torch.dtype = torch.bfloat16) -> Path:
        key = (family, fused, dtype)
        if key not in saved:
            folder = tmp_path_factory.mktemp(f"{family}-{'fused' if fused else 'split'}")
            random_model(family).to(dtype).save_pretrained(
                folder, save_original_format=not fused, max_shard_size="150KB"
            )
            saved[key] = folder
        return saved[key]

    return save


@pytest.fixture(autouse=True, scope="session")
def short_passes() -> None:
    """The default method's pass by few windows: hundreds of tests plan by it, and few ask how well."""
    for name in USUAL_WINDOWS:
        setattr(passes, name, 4)


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The bundled trained model."""
    return DATA / "tiny"


@pytest.fixture(scope="session")
def server() -> Iterator[Any]:
    """An object store, one for all tests: s3fs keeps its clients, and with them the first server's address."""
    import objectstore

    started = objectstore.start()
    yield started
    started.stop()


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def measured_tiny(tiny: Path, common: Path, short_passes: None) -> Path:
    """A cache with what plans measure of the bundled model, as commands keep it; not to be written to.

    By the default method, with its check, and by alphaq, whose plain errors others use too.
    """
    from alphaq.checkpoint.reader import open_checkpoint
    from alphaq.cli import means
    from alphaq.measuring.resources import Resources
    from alphaq.nouns.settings import Budget, PlanConfig
    from alphaq.planning import checked_plan, measure_for_plan, resolve

    def measure(folder: Path) -> None:
        checkpoint = open_checkpoint(tiny)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ALPHAQ_CACHE", str(folder))
            with means._cache(checkpoint, False, "cpu") as kept:
                resources = Resources(cache=kept)
                for method in ("auto", "alphaq"):
                    request = resolve(PlanConfig(budget=Budget(bits=2.5), method=method))
                    found = measure_for_plan(checkpoint, request, resources=resources)
                    checked_plan(checkpoint, request, found, resources)

    return made_once(common / "measured-tiny", measure)


@pytest.fixture
def knows_tiny(measured_tiny: Path, _own_cache: Path) -> None:
    """The test's cache holds what `measured_tiny` has: planning for the bundled model measures nothing anew."""
    shutil.copytree(measured_tiny, _own_cache, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def known_tiny(measured_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `Cache(folder, {})` that holds what `measured_tiny` has."""
    from alphaq.measuring.cache import Cache

    folder = tmp_path_factory.mktemp("known")
    (measured,) = measured_tiny.iterdir()
    with Cache(folder, {}) as opened:
        shutil.copytree(measured, opened.path, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_quantized(tiny: Path, measured_tiny: Path, common: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model at 2.5 bits."""
    from alphaq import pipeline
    from alphaq.checkpoint.reader import open_checkpoint
    from alphaq.cli import means
    from alphaq.measuring.resources import Resources
    from alphaq.nouns.settings import Budget, PlanConfig
    from alphaq.planning import resolve

    def quantize(out: Path) -> None:
        checkpoint, request = open_checkpoint(tiny), resolve(PlanConfig(budget=Budget(bits=2.5)))
        cache = shutil.copytree(measured_tiny, tmp_path_factory.mktemp("known"), dirs_exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ALPHAQ_CACHE", str(cache))
            with means._cache(checkpoint, False, "cpu") as kept:
                known = pipeline.measure_for_plan(checkpoint, request, resources=Resources(cache=kept))
        pipeline.quantize(checkpoint, pipeline.make_plan(checkpoint, request, known), out)

    return made_once(common / "tiny-quantized", quantize)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Larger models and published figures, which only the project's own machines have."""
    if not SHARED.is_dir():
        pytest.skip("the shared folder (larger models, published figures) is not on this machine")
    return SHARED


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as one JSON document."""
        assert self.out, self.err  # an error says why
        return json.loads(self.out)


@pytest.fixture
def alphaq(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command line in this process."""
    from alphaq.cli.app import main

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(int(stop.value.code or 0), captured.out, captured.err)

    return run


def read_back(folder: Path, source: Any) -> dict[str, torch.Tensor]:
    """Every matrix and kept tensor of an output by its name in the source, as the engine's own library reads it."""
    from alphaq.checkpoint.files import PlainFile
    from alphaq.engines.output import Output
    from alphaq.writing.planned import plan_choices

    opened = Output(folder)
    values = {}
    for entry in opened.profile.writer.layout(source, plan_choices(opened.plan, source)).entries:
        stored = [opened.stored[tensor] for tensor, _ in entry.parts]
        parts = [
            one.typed(PlainFile(folder / place.file).read(place.begin, place.nbytes))
            for one, place in zip(stored, opened.places(entry.name), strict=True)
        ]
        if entry.choice is None or entry.choice.bits == 16:
            stacked = entry.parts[0][1] is not None
            values[entry.name] = parts[0].view(stored[0].shape[1:] if stacked else stored[0].shape)
        else:
            rows = opened.profile.writer.reader(parts, entry.choice, entry.source.shape, entry.name)
            values[entry.name] = rows(slice(0, entry.source.shape[0]))
    return values
