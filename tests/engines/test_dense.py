"""Models without experts in every engine's files: what the engines compute with them, and what is refused.

Each setting that a published model has is flipped once: the engine's logits are transformers', or the setting is named.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import config_of, cycled_plan, linear_modules, logits_of, plan_of, quantize, standing_for, weight_bytes
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from alphaq import pipeline
from alphaq.checkpoint.families.architecture import architectures
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines import gptqmodel
from alphaq.engines.assumptions.tables import engine_table
from alphaq.engines.output import PLAN_NAME
from alphaq.engines.profiles import profile
from alphaq.errors import ArchitectureError, PlanError
from alphaq.formats.table import parse_choice
from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import Plan
from alphaq.nouns.settings import Budget
from alphaq.runtime.loading import load_model
from conftest import read_back
from dense_models import DENSE, FLIPS, save_dense

TOKENS = [(7 * number) % 300 for number in range(40)]
needs = {
    engine: pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")
    for engine, package in {"llama.cpp": "xllamacpp", "mlx": "mlx_lm"}.items()
}
every_family = pytest.mark.parametrize("family", DENSE)
OFTEN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")


def loaded_by(engine: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("family", [family for family in DENSE if family in engine_table(engine).dense])


def tolerance(family: str) -> float:
    """llama.cpp looks gelu up in a table of 16-bit numbers, mlx-lm computes it without tanh in the first Gemma."""
    return 2e-2 if family.startswith("gemma") else 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's random model, saved once."""
    saved: dict[str, Path] = {}

    def save(family: str) -> Path:
        if family not in saved:
            saved[family] = save_dense(tmp_path_factory.mktemp(family) / "model", family)
        return saved[family]

    return save


def kept(source: Path, engine: str) -> Plan:
    """Everything in 16 bits: what then differs is what the engine makes of the settings."""
    return Plan(engine=engine, choices={matrix.name: "16" for matrix in open_checkpoint(source).planned})


def llama_error(out: Path, model: Any, scratch: Path) -> float:
    """Largest difference of llama.cpp's logarithms of chances, with each weight as the number that it stands for."""
    from llama import Llama, in_float32
    from test_llama_cpp import distance

    with Llama(in_float32(out / "model.gguf", scratch / "f32.gguf"), context=64) as llama:
        return distance(llama, model, [TOKENS]).largest_log


def mlx_error(out: Path, model: Any, scratch: Path) -> float:
    """Largest difference of mlx-lm's logits, in float32."""
    import mlx.core as mx
    from mlx_lm.utils import load_model as load_mlx
    from test_mlx import mlx_logits

    loaded, _ = load_mlx(out)
    loaded.set_dtype(mx.float32)
    return float((mlx_logits(loaded, TOKENS) - logits_of(model, TOKENS)).abs().max())


ERRORS = {"llama.cpp": llama_error, "mlx": mlx_error}
ENGINES = [pytest.param(engine, marks=needs[engine]) for engine in ERRORS]
REFUSED = [
    pytest.param(engine, family, name, id=f"{engine}-{family}-{name}")
    for family, settings in FLIPS.items()
    for name, flip in settings.items()
    for engine in flip.refused
    if engine == "llama.cpp" or family in engine_table(engine).dense
]
CARRIED = [
    pytest.param(engine, family, name, id=f"{engine}-{family}-{name}", marks=(needs[engine], pytest.mark.slow))
    for family, settings in FLIPS.items()
    for name, flip in settings.items()
    for engine in ERRORS
    if engine not in flip.refused
]


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "family", "name"), REFUSED)
def test_a_setting_that_an_engine_computes_otherwise_is_refused_by_name(
    engine: str, family: str, name: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    flip = FLIPS[family][name]
    source = Path(shutil.copytree(folder(family), tmp_path / "model"))
    config = json.loads((source / "config.json").read_text()) | flip.settings
    (source / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(source)
    with pytest.raises(
        ArchitectureError, match=rf"config\.json( has no|:| says[^:]*\() ?{re.escape(flip.refused[engine])}\b"
    ):
        profile(engine).writer.layout(checkpoint, {})


@pytest.mark.parametrize(("engine", "family", "name"), CARRIED)
def test_every_other_setting_is_computed_as_transformers_does(
    engine: str, family: str, name: str, tmp_path: Path
) -> None:
    source = save_dense(tmp_path / "model", family, **FLIPS[family][name].settings)
    out = quantize(source, kept(source, engine), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert ERRORS[engine](out, model, tmp_path) < tolerance(family)


@every_family
def test_defaults_are_those_of_transformers_class(family: str) -> None:
    usual = AutoConfig.for_model(family).to_dict()
    for key, value in architectures()[family].defaults.items():
        assert usual[key] == value, key


# -- quantized ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [pytest.param(one, marks=[] if one in OFTEN else pytest.mark.slow) for one in DENSE])
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_compute_with_the_decoded_weights(
    engine: str, family: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = open_checkpoint(folder(family))
    types = {"llama.cpp": ("Q4_0", "Q8_0", "Q5_1", "IQ4_NL"), "mlx": ("4g32", "8g32", "3g32", "16")}[engine]
    wanted = [one for one in source.matrices if profile(engine).obstacle(parse_choice(types[0]), one) is None]
    if engine == "mlx":
        wanted = [one for one in wanted if one.role.value not in ("embedding", "head")]
    plan = Plan(engine=engine, choices={one.name: types[number % 4] for number, one in enumerate(wanted)})
    out = quantize(folder(family), plan, tmp_path / "out")
    assert pipeline.verify(out, source).quantized >= len(wanted) * 3 // 4
    if engine == "llama.cpp":
        model, _ = load_model(out, "float32")
    else:
        model = standing_for(read_back(out, source), folder(family), tmp_path / "restored", torch.float32)
    assert ERRORS[engine](out, model, tmp_path) < tolerance(family)


@loaded_by("vllm")
def test_compressed_tensors_through_transformers(family: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers restores the weights to bf16: the same weights, so the same logits."""
    source = folder(family)
    plan = plan_of(source, "vllm", choices="4g32s,8g32s", budget=Budget(bits=6), attention_bits=16, group_size=32)
    out = quantize(source, plan, tmp_path / "out")
    assert weight_bytes(out) == Plan.from_json((out / PLAN_NAME).read_bytes(), "plan").size_bytes
    for layer in range(open_checkpoint(source).architecture.layers(config_of(source))):
        merged = [f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up")]
        assert plan.choices[merged[0]] == plan.choices[merged[1]]  # which vLLM runs as one
    assert len({plan.choices[one.name] for one in open_checkpoint(source).planned}) == 2
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    expected = standing_for(read_back(out, open_checkpoint(source)), source, tmp_path / "restored", torch.bfloat16)
    assert torch.equal(logits_of(loaded, TOKENS), logits_of(expected, TOKENS))


@loaded_by("gptqmodel")
def test_gptqmodel_s_layout(family: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    from test_gptqmodel import NAMES, decoded, resolved

    source = open_checkpoint(folder(family))
    plan = cycled_plan(source, "gptqmodel", ("4g32",), "3g32")
    cycled = ("2g32", "4g32", "8g32", "16")
    choices = {one.name: cycled[number % 4] for number, one in enumerate(source.planned)}
    plan = Plan(engine="gptqmodel", choices=plan.choices | choices)
    able = {name for name in plan.choices if gptqmodel.obstacle(Choice(4, 32), _matrix(source, name)) is None}
    plan = Plan(engine="gptqmodel", choices={name: one for name, one in plan.choices.items() if name in able})
    out = quantize(folder(family), plan, tmp_path / "out")
    stored = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    values, config = read_back(out, source), config_of(out)["quantization_config"]
    for module, matrix in linear_modules(source).items():
        choice = plan.choice(matrix.name) if matrix.name in plan.choices else Choice(16)
        assert resolved(config, module) == choice, module
        if choice.bits != 16:
            parts = {name: stored[f"{module}.{name}"] for name in NAMES}
            assert torch.equal(decoded(parts, choice.bits), values[matrix.name])


def _matrix(source: Any, name: str) -> Any:
    return next(matrix for matrix in source.matrices if matrix.name == name)


@pytest.mark.parametrize("engine", ["mlx", "vllm", "gptqmodel"])
def test_other_dense_families_are_refused_with_those_that_are_known(
    engine: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(folder("llama"), tmp_path / "model"))
    (source / "config.json").write_text(json.dumps(config_of(source) | {"model_type": "cohere"}))
    with pytest.raises(PlanError, match=r"the tensors of 'cohere'. Available: .*llama, .*gemma3_text.*\. Plan with"):
        profile(engine).writer.layout(open_checkpoint(source), {})
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"} <= engine_table(engine).dense.keys()
