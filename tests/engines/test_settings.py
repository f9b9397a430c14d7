"""What engines make of a config's settings: flipped one by one, and compared with transformers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import config_of, cycled_plan
from flips import BASE, ENGINES, FLIPS, INSTALLED, answers, engines_of, named_setting, refusal, save_flipped
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from alphaq import pipeline
from alphaq.checkpoint.families.architecture import architectures
from alphaq.checkpoint.gguf.rope import llama3_factors
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.assumptions.rules import Fixed
from alphaq.engines.assumptions.tables import Lines, engine_table, family_settings
from alphaq.engines.effective import effective_config
from alphaq.engines.placement import left_out
from alphaq.engines.profiles import ENGINES as PROFILES
from alphaq.engines.settings import require_settings
from alphaq.engines.vllm import quantization_config
from alphaq.errors import ArchitectureError
from alphaq.nouns.plan import Plan
from conftest import FAMILIES, ROOT, Ran
from runnable import save_runnable

sys.path.append(str(ROOT / "tests" / "serving"))

from vllm_families import VLLM_ALONE

EXACT = 1e-4
"""Relative to the largest logit: what sums in another order make of float32."""
OFTEN = {
    ("mixtral", "rope llama3", "llama.cpp"),
    ("qwen2_moe", "qkv_bias", "llama.cpp"),
    ("olmoe", "rope yarn", "mlx"),
    ("qwen3_moe", "head_dim", "mlx"),
    ("deepseek_v3", "n_group", "mlx"),
    ("qwen3_moe", "use_sliding_window", "native"),
    ("mixtral", "sliding_window", "vllm"),
}


def cases() -> list[Any]:
    """Every flip of every family in every engine; few of them belong to the quick tests."""
    every = (
        (family, flip, engine) for family in FLIPS for flip in (None, *FLIPS[family]) for engine in engines_of(family)
    )
    return [
        pytest.param(*case, id="-".join(map(str, case)), marks=() if case in OFTEN else pytest.mark.slow)
        for case in every
    ]


@pytest.mark.parametrize(("family", "flip", "engine"), cases())
def test_a_setting_is_followed_or_refused_by_name(tmp_path: Path, family: str, flip: str | None, engine: str) -> None:
    source = save_flipped(tmp_path / "source", family, flip)
    why = refusal(source, engine)
    if why is not None:
        assert flip is not None, why
        top = named_setting(why).partition(".")[0]
        assert top in FLIPS[family][flip], why
        return
    if engine in INSTALLED and find_spec(INSTALLED[engine]) is None:
        pytest.skip(f"{INSTALLED[engine]} is not installed")
    if engine == "vllm" and family in VLLM_ALONE:
        pytest.skip("transformers, which stands in for vLLM here, does not load it")
    found = answers(source, engine, tmp_path)
    assert found.difference < (0.02 if engine == "gptqmodel" else EXACT)


@pytest.mark.parametrize("family", FLIPS)
def test_every_setting_of_the_class_is_flipped_or_known_to_be_neutral(family: str) -> None:
    """One that a newer transformers adds shows here."""
    known = family_settings("vllm" if "vllm" in engines_of(family) else "mlx", architectures()[family])
    flipped = {key for flip in FLIPS[family].values() for key in flip} | set(BASE[family])
    shapes = {"vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
              "shared_expert_intermediate_size", "num_attention_heads", "num_experts", "num_local_experts",
              "n_routed_experts", "kv_lora_rank", "max_position_embeddings", "qk_head_dim"}  # fmt: skip
    latent = {"num_key_value_heads", "head_dim"} if "kv_lora_rank" in CONFIG_MAPPING[family]().to_dict() else set()
    assert set(CONFIG_MAPPING[family]().to_dict()) <= flipped | known.neutral | shapes | latent


@pytest.mark.parametrize("engine", ENGINES)
def test_every_line_of_an_engine_is_for_a_family_that_is_known(engine: str) -> None:
    known = {name for one in architectures().values() for name in (one.name, *one.model_types)}
    assert engine_table(engine).families.keys() <= known


@pytest.mark.parametrize("engine", ["llama.cpp", "mlx", "vllm"])
def test_a_setting_that_no_line_names_must_have_its_default(tmp_path: Path, engine: str) -> None:
    """As one would that a newer transformers computes with."""
    source = save_flipped(tmp_path / "source", "olmoe", None)
    known = family_settings(engine, architectures()["olmoe"])
    assert "attention_bias" in known.carried | known.fixed.keys()
    assert known.verdict("a_setting_of_next_year") == "fixed"
    change(source, use_cache=False, output_router_logits=True, moe_layer_names="x")  # neutral, or nobody's
    assert refusal(source, engine) is None
    change(source, layer_types=["full_attention"] * 3)
    assert refusal(source, engine) is None  # the class of this family knows none


def test_an_engine_without_a_file_takes_every_setting_at_its_default() -> None:
    known = family_settings("an engine of next year", architectures()["olmoe"])
    assert {known.verdict(name) for name in ("hidden_size", "attention_bias", "clip_qkv")} == {"fixed"}
    assert known.verdict("use_cache") == "neutral"


def test_a_word_that_no_engine_file_knows_is_refused() -> None:
    with pytest.raises(TypeError, match="caried"):
        Lines.parse({"caried": ["hidden_size"]})


def test_rules_of_one_setting_say_what_they_allow() -> None:
    config = {"hidden_size": 64, "num_attention_heads": 4, "topk_method": "greedy"}
    equal = Fixed.parse({"values": ["none"], "equals": "hidden_size / num_attention_heads"})
    assert equal.allows(16, config) and equal.allows(None, config) and not equal.allows(32, config)
    assert not Fixed.parse([1]).allows(True, config)
    assert Fixed.parse([1.0]).allows(1, config)
    assert not Fixed.parse({"never": [1]}).allows(1, config)
    assert not Fixed.parse({"values": [1], "when": {"topk_method": ["greedy"]}}).allows(4, config)
    assert Fixed.parse({"values": [1], "when": {"topk_method": ["other"]}}).allows(4, config)
    assert Fixed.parse({"never": ["none"], "unless": {"hidden_size": [64]}}).allows(None, config)


def change(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


@pytest.fixture
def tiny_copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.mark.parametrize(
    "engine", ["mlx", "gptqmodel", *(pytest.param(one, marks=pytest.mark.slow) for one in ("llama.cpp", "vllm"))]
)
def test_refusal_comes_before_any_work(
    tiny_copy: Path, tmp_path: Path, alphaq: Callable[..., Ran], engine: str
) -> None:
    change(tiny_copy, tie_word_embeddings=False, **({} if engine == "gptqmodel" else {"hidden_act": "gelu"}))
    if engine == "gptqmodel":  # it computes with transformers' class: only what contradicts the files is refused
        tensors = load_file(tiny_copy / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, tiny_copy / "model.safetensors", {"format": "pt"})
    bits = ["--bits", 4 if engine != "vllm" else 8]
    for command in (["plan", tiny_copy], ["quantize", tiny_copy, "-o", tmp_path / "never"]):
        ran = alphaq(*command, "--engine", engine, *bits, "--method", "alphaq")
        assert ran.code == 2
        assert ("lm_head.weight" if engine == "gptqmodel" else "hidden_act is 'gelu'") in ran.err
    assert not (tmp_path / "never").exists()


def test_a_class_that_refuses_a_config_is_an_error_in_one_line(tiny_copy: Path) -> None:
    change(tiny_copy, hidden_size="wide")
    with pytest.raises(ArchitectureError, match=r"config\.json is not one that transformers' Qwen2MoeConfig takes"):
        effective_config(open_checkpoint(tiny_copy))


def test_defaults_of_the_class_are_told_to_engines_that_have_others(tmp_path: Path) -> None:
    """Mixtral's rotary base is a million where its config says nothing; llama.cpp and mlx-lm would take 10,000."""
    from alphaq.engines.gguf.model import gguf_metadata
    from alphaq.engines.mlx.config import told

    source = save_flipped(tmp_path / "source", "mixtral", None)
    change(source, rope_parameters=..., rope_theta=...)
    checkpoint = open_checkpoint(source)
    assert gguf_metadata(checkpoint)["llama.rope.freq_base"].value == 1e6
    assert told(checkpoint)["rope_theta"] == 1e6


@pytest.mark.parametrize("original", [16, 64, 8192])
@pytest.mark.parametrize("base", [1e4, 5e5])
def test_frequency_factors_are_those_of_transformers(original: int, base: float) -> None:
    rope = dict(rope_type="llama3", rope_theta=base, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=original)  # fmt: skip
    config = CONFIG_MAPPING["llama"](hidden_size=256, num_attention_heads=4, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    plain = 1 / base ** (torch.arange(0, 64, 2) / 64)
    assert torch.allclose(plain / llama3_factors(rope, 64), expected, rtol=1e-5)


def test_rotary_factors_of_a_mixtral_file_are_read_back(tmp_path: Path) -> None:
    rope = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192)  # fmt: skip
    source = open_checkpoint(save_runnable(tmp_path / "model", "mixtral", rope_parameters=rope))
    choices = {matrix.name: "16" for matrix in source.matrices}
    pipeline.quantize(source, Plan(engine="llama.cpp", choices=choices), tmp_path / "out")
    again = open_checkpoint(tmp_path / "out" / "model.gguf", quantized=True)
    assert {key: again.config["rope_parameters"][key] for key in rope} == rope


def test_language_model_inside_another_is_left_to_native(tiny_copy: Path) -> None:
    config = json.loads((tiny_copy / "config.json").read_text())
    (tiny_copy / "config.json").write_text(json.dumps({"model_type": "some_vision", "text_config": config}))
    checkpoint = open_checkpoint(tiny_copy)
    with pytest.raises(ArchitectureError, match=r"'some_vision' holds its language model beside others"):
        require_settings(checkpoint, "mlx")
    require_settings(checkpoint, "native")


@pytest.mark.slow
def test_page_of_settings_is_what_the_script_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from settings_table import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page()


# -- tensors without a place ------------------------------------------------------------------------


def with_tensors(folder: Path, **tensors: torch.Tensor) -> Path:
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, **{name.replace("__", "."): one for name, one in tensors.items()}},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    return folder


@pytest.mark.parametrize("engine", ["mlx", "vllm", "gptqmodel"])
def test_what_an_engine_does_without_is_left_out(tiny_copy: Path, tmp_path: Path, engine: str) -> None:
    buffer, layer = "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.4.eh_proj.weight"
    with_tensors(tiny_copy, **{buffer: torch.rand(32), layer: torch.rand(4, 4)})
    checkpoint = open_checkpoint(tiny_copy)
    assert left_out(checkpoint, engine) == {buffer, layer}
    choice = {"mlx": "4g64", "vllm": "4g64s", "gptqmodel": "4g64"}[engine]
    pipeline.quantize(checkpoint, cycled_plan(checkpoint, engine, (choice,), choice), tmp_path / "out")
    assert not {buffer, layer} & PROFILES[engine].writer.stored(tmp_path / "out").keys()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert not {buffer, layer} & index.keys()
    assert pipeline.verify(tmp_path / "out", checkpoint).against_source


@pytest.mark.parametrize("engine", ["mlx", "vllm", "gptqmodel"])
def test_what_a_model_may_need_is_refused_by_name(tiny_copy: Path, engine: str) -> None:
    with_tensors(tiny_copy, v_head__summary__weight=torch.zeros(1, 256))
    with pytest.raises(
        ArchitectureError, match=rf"'v_head\.summary\.weight' has no place in a 'qwen2_moe' model of {engine}"
    ):
        PROFILES[engine].writer.layout(open_checkpoint(tiny_copy), {})


def test_prediction_layers_stay_where_the_engine_has_a_use_for_them(tmp_path: Path) -> None:
    source = save_flipped(tmp_path / "source", "deepseek_v3", None)
    with_tensors(source, model__layers__3__eh_proj__weight=torch.ones(64, 128))
    checkpoint = open_checkpoint(source)
    assert left_out(checkpoint, "vllm") == set()
    assert quantization_config(checkpoint, {})["ignore"][-1] == r"re:.*\blayers\.3\..*"
    assert left_out(checkpoint, "mlx") == {"model.layers.3.eh_proj.weight"}


# -- heads and embeddings ---------------------------------------------------------------------------


@pytest.fixture
def other_head(tmp_path: Path) -> Path:
    """A config that calls the head tied, and a file that holds another one."""
    source = save_flipped(tmp_path / "source", "qwen3_moe", "tie_word_embeddings")
    head = torch.randn(340, 64, generator=torch.Generator().manual_seed(3)).bfloat16() / 4
    return with_tensors(source, lm_head__weight=head)


@pytest.mark.parametrize("engine", ["llama.cpp", "mlx", "vllm", "native"])
def test_the_head_in_the_files_wins_over_the_config(other_head: Path, tmp_path: Path, engine: str) -> None:
    if engine in INSTALLED and find_spec(INSTALLED[engine]) is None:
        pytest.skip(f"{INSTALLED[engine]} is not installed")
    assert answers(other_head, engine, tmp_path).difference < EXACT
    if engine != "llama.cpp":
        assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


def test_a_head_that_is_the_embedding_stays_tied(other_head: Path, tmp_path: Path) -> None:
    same = load_file(other_head / "model.safetensors")["model.embed_tokens.weight"]
    with_tensors(other_head, lm_head__weight=same.clone())
    checkpoint = open_checkpoint(other_head)
    pipeline.quantize(checkpoint, cycled_plan(checkpoint, "native", ("4g32",), "16"), tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.tie_word_embeddings


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_config_of_every_family_is_understood(save_family: Callable[..., Path], family: str) -> None:
    assert effective_config(open_checkpoint(save_family(family)))["vocab_size"] == 128
