import copy
import re
import shutil
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.conversion_mapping import get_model_conversion_mapping

import alphaq  # noqa: F401 - registers the plug-in
from alphaq import pipeline
from alphaq.calibration.stream import model_class
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.output import Output
from alphaq.errors import AlphaQError, CheckpointError
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import resolve
from alphaq.runtime.modules import PackedExperts
from alphaq.runtime.packed import PackedWeights
from alphaq.runtime.replace import Packer, is_block, stored_tensors
from conftest import FAMILIES
from families import FAMILIES as SMALL_FAMILIES
from families import plain_copy, random_family, save_layout


def native(source: Path, out: Path, choices: str, bits: float, group_size: int = 128) -> Path:
    """A native checkpoint of a model."""
    checkpoint = open_checkpoint(source)
    request = resolve(PlanConfig(budget=Budget(bits=bits), group_size=group_size, choices=choices, method="alphaq"))
    plan = pipeline.make_plan(checkpoint, request, pipeline.measure_for_plan(checkpoint, request))
    pipeline.quantize(checkpoint, plan, out)
    return out


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def logits(model: Any) -> torch.Tensor:
    """Of two rows of random tokens."""
    ids = torch.randint(0, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(ids).logits.float()


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    return float((found - wanted).norm() / wanted.norm())


def weights_of(model: Any) -> list[PackedWeights]:
    return [module for module in model.modules() if isinstance(module, PackedWeights)]


def check_logits(source: Path, out: Path, choices: str, bits: float, group_size: int) -> None:
    """Packed against the same matrices restored by other code into a plain checkpoint."""
    folder = native(source, out / "out", choices, bits, group_size)
    packed = load(folder)
    stored = sum(one.dtype == "U8" for one in Output(folder).stored.values())
    assert sum(len(weights.tensors()) for weights in weights_of(packed)) >= stored > 0
    wanted = logits(load(plain_copy(open_checkpoint(source), folder, out / "plain")))
    assert float((logits(packed) - wanted).abs().max()) < 1e-4
    # Where bfloat16 makes a router choose another expert, a token moves by several per cent, packed or not.
    halved = logits(load(folder, torch.bfloat16))
    tokens = [distance(found, expected) for found, expected in zip(halved[0], wanted[0], strict=True)]
    assert statistics.median(tokens) < 1e-2 and distance(halved, wanted) < 2e-2
    assert float((wanted - logits(load(source))).abs().max()) > 1e-3  # quantization did change something


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_the_dequantized_matrices(
    save_family: Callable[..., Path], tmp_path: Path, family: str, fused: bool
) -> None:
    folder = native(save_family(family, fused), tmp_path / "out", "1,2,3,4,16", 2.5, 32)
    wanted = logits(load(plain_copy(open_checkpoint(save_family(family, fused)), folder, tmp_path / "plain")))
    assert float((logits(load(folder)) - wanted).abs().max()) < 1e-4


@pytest.mark.parametrize("bits", [3, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (1, 2, 4, 5, 6, 7, 8))])
def test_bundled_model_has_the_dequantized_logits_at_every_width(tiny: Path, tmp_path: Path, bits: int) -> None:
    check_logits(tiny, tmp_path, f"{bits},16", bits + 0.2, (32, 64, 128)[bits % 3])


@pytest.mark.slow
@pytest.mark.parametrize("bits", range(1, 9))
def test_larger_trained_model_has_the_dequantized_logits_at_every_width(
    shared: Path, tmp_path: Path, bits: int
) -> None:
    check_logits(shared / "models" / "moe22m", tmp_path, f"{bits}", bits, (64, 128, 32)[bits % 3])


def test_experts_stay_the_class_that_they_were(tiny_quantized: Path) -> None:
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

    experts = load(tiny_quantized).model.layers[0].mlp.experts
    assert isinstance(experts, Qwen2MoeExperts) and isinstance(experts, PackedExperts)
    assert not hasattr(experts, "gate_up_proj") and not list(experts.parameters())


def test_packed_bytes_are_the_file_s_and_lie_in_it(tiny_quantized: Path) -> None:
    model = load(tiny_quantized, torch.bfloat16)
    stored = Output(tiny_quantized).stored
    for weights in weights_of(model):
        for name, tensor in weights.tensors().items():
            assert tensor.nbytes == stored[name].place.nbytes
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tiny_quantized) in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in mapped]
    addresses = weights_of(model)[0].table[..., 0].flatten().tolist()
    assert all(any(begin <= address < end for begin, end in ranges) for address in addresses)
    assert model.get_memory_footprint() < 1.02 * sum(one.place.nbytes for one in stored.values())


def test_generating_step_by_step_equals_reading_at_once(tiny_quantized: Path) -> None:
    model = load(tiny_quantized)
    ids = torch.tensor([[12, 400, 31, 7]])
    found = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    with torch.no_grad():  # without the cache
        best = model(found, use_cache=False).logits.argmax(-1)
    assert torch.equal(found[0, 4:], best[0, 3:-1])


def test_a_batch_gives_what_its_rows_give(tiny_quantized: Path) -> None:
    model = load(tiny_quantized)
    rows = torch.randint(1, 4096, (5, 9), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    whole = model.generate(rows, attention_mask=torch.ones_like(rows), **options)
    for row, found in zip(rows, whole, strict=True):
        assert torch.equal(model.generate(row[None], **options)[0], found)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps_are_followed(tiny_quantized: Path, device_map: Any) -> None:
    assert torch.equal(logits(load(tiny_quantized, device_map=device_map)), logits(load(tiny_quantized)))


def test_sizes_are_known_before_devices_are_chosen(tiny_quantized: Path) -> None:
    from accelerate.utils import compute_module_sizes
    from transformers import AutoConfig, AutoModelForCausalLM

    stored = Output(tiny_quantized).stored
    files = sorted(map(str, tiny_quantized.glob("*.safetensors")))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_quantized), dtype=torch.bfloat16)
    Packer(stored_tensors(files)).pack(model, get_model_conversion_mapping(model))
    assert compute_module_sizes(model)[""] == pytest.approx(sum(one.place.nbytes for one in stored.values()), rel=0.02)


def test_default_dtype_is_the_checkpoint_s(tiny_quantized: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tiny_quantized).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss"])
def test_saving_gives_the_checkpoint_again(tmp_path: Path, family: str) -> None:
    source = save_layout(random_family(family), tmp_path / "source", True)
    folder = native(source, tmp_path / "out", "2,3,4,16", 3, 32)
    model = load(folder, torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    first, again = Output(folder), stored_tensors(sorted(map(str, (tmp_path / "again").glob("*.safetensors"))))
    assert {name for name, one in first.stored.items() if one.dtype == "U8"} == {
        name for name, (_, info) in again.items() if info.dtype == "U8"
    }
    assert torch.equal(logits(load(tmp_path / "again")), logits(load(folder)))


def test_dequantizing_gives_an_ordinary_model(tiny_quantized: Path, tmp_path: Path) -> None:
    model = load(tiny_quantized)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "packed")  # which leaves a text for the dtype in the config
    plain = model.dequantize()
    assert not weights_of(plain) and float((logits(plain) - wanted).abs().max()) < 1e-4
    assert type(plain.model.layers[0].mlp.experts).__name__ == "Qwen2MoeExperts"
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text()
    assert len(open_checkpoint(tmp_path / "plain").matrices) == len(open_checkpoint_of(tiny_quantized))
    assert float((logits(load(tmp_path / "plain")) - wanted).abs().max()) < 1e-4


def test_training_asks_for_an_ordinary_model(tiny_quantized: Path) -> None:
    model = load(tiny_quantized)
    ids = torch.arange(4, 20)[None]
    with pytest.raises(AlphaQError, match=r"model\.dequantize"):
        model(ids, labels=ids).loss.backward()
    model.dequantize()(ids, labels=ids).loss.backward()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A native checkpoint of a tiny random model of a family, made once."""

    @cache
    def made(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        return native(save_layout(random_family(family), folder / "source", True), folder / "out", "2,3,4,16", 3, 32)

    return made


@pytest.mark.parametrize("family", ["dbrx", "granitemoe", "gpt_oss", "mixtral"])
def test_a_model_without_a_head_is_packed_as_well(small: Callable[[str], Path], family: str) -> None:
    from transformers import AutoModel

    model = load(small(family))
    base, report = AutoModel.from_pretrained(small(family), dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and len(weights_of(base)) == len(weights_of(model))
    ids = torch.arange(3, 19)[None]
    with torch.inference_mode():
        inner = getattr(model, model.base_model_prefix)
        assert torch.equal(base.eval()(ids).last_hidden_state, inner(ids).last_hidden_state)


@pytest.mark.parametrize("family", ["qwen2_moe", "dbrx"])
def test_copies_stand_alone(small: Callable[[str], Path], family: str) -> None:
    model = load(small(family))
    wanted = logits(model)
    twin = copy.deepcopy(model)
    twin.dequantize()
    assert weights_of(model) and not weights_of(twin)
    assert torch.equal(logits(model), wanted) and float((logits(twin) - wanted).abs().max()) < 1e-4
    other = copy.deepcopy(model)
    del model
    assert torch.equal(logits(other), wanted)


@pytest.mark.parametrize("family", ["qwen2_moe", "dbrx"])
def test_threads_may_share_a_model(small: Callable[[str], Path], family: str) -> None:
    model = load(small(family))
    wanted = logits(model)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, wanted) for found in pool.map(lambda _: logits(model), range(24)))


@pytest.mark.parametrize("family", ["qwen2_moe", "dbrx"])
def test_casts_are_followed(small: Callable[[str], Path], family: str) -> None:
    model = load(small(family))
    wanted = logits(model)
    assert distance(logits(model.to(torch.bfloat16)), wanted) < 2e-2
    plain = load(small(family)).dequantize(torch.bfloat16)
    assert {one.dtype for one in plain.parameters()} == {torch.bfloat16}
    assert distance(logits(plain), wanted) < 2e-2


def test_no_tokens_are_no_error(small: Callable[[str], Path]) -> None:
    experts = load(small("mixtral")).model.layers[0].mlp.experts
    width = experts.packed_first.shape[1]
    nothing = torch.zeros(0, 2)
    assert experts(torch.zeros(0, width), nothing.long(), nothing).shape == (0, width)


def test_experts_that_change_places_are_refused(small: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(small("mixtral"), tmp_path / "m"))
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.0.block_sparse_moe.experts.5.w1.weight"
    tensors[name.replace(".5.", ".7.")] = tensors.pop(name)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="or of other experts"):
        load(folder)


def test_a_checkpoint_without_its_experts_is_refused(small: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(small("mixtral"), tmp_path / "m"))
    (file,) = folder.glob("*.safetensors")
    kept = {name: one for name, one in load_file(file).items() if ".experts." not in name}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has experts in model\.layers\.0.*stores nothing"):
        load(folder)


def test_nothing_is_called_unexpected(small: Callable[[str], Path]) -> None:
    for family in ("granitemoe", "dbrx", "mixtral", "gpt_oss"):
        _, report = load(small(family), output_loading_info=True)
        assert not report["unexpected_keys"] and not report["missing_keys"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_moe", "dbrx"])
def test_compiled_models_give_the_same(small: Callable[[str], Path], family: str) -> None:
    model = load(small(family))
    ids = torch.arange(3, 19)[None]
    with torch.inference_mode():
        found = torch.compile(model, backend="eager")(ids).logits
        assert float((found - model(ids).logits).abs().max()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", SMALL_FAMILIES)
def test_every_family_can_be_saved_again_and_made_ordinary(tmp_path: Path, family: str) -> None:
    source = save_layout(random_family(family), tmp_path / "source", True)
    folder = native(source, tmp_path / "out", "2,3,4,16", 3, 32)
    model = load_any(folder)
    model.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    first = stored_tensors(sorted(map(str, folder.glob("*.safetensors"))))
    again = stored_tensors(sorted(map(str, (tmp_path / "again").glob("*.safetensors"))))
    assert [name for name, (_, one) in first.items() if is_block(one) and name not in again] == []
    ids = torch.arange(3, 19)[None]
    torch.manual_seed(0)
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits
        torch.manual_seed(0)
        assert float((load_any(tmp_path / "again")(input_ids=ids).logits - wanted).abs().max()) < 1e-5
        torch.manual_seed(0)
        assert float((model.dequantize()(input_ids=ids).logits - wanted).abs().max()) < 1e-4


def load_any(folder: Path) -> Any:
    """With the class for all modalities, where there is one."""
    from transformers import AutoConfig

    return model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32).eval()


def test_families_that_read_their_experts_get_them_restored(small: Callable[[str], Path]) -> None:
    model = load(small("dbrx"))
    restored = [name for name, module in model.named_modules() if "packed_w1" in name]
    glu = model.get_submodule(restored[0].rpartition(".")[0])
    logits(model)
    assert not hasattr(glu, "w1")  # only while it runs
    with pytest.raises(TypeError):
        model(input_ids="nothing")
    assert torch.equal(logits(model), logits(model))
    assert float((logits(model) - logits(load(small("dbrx")).dequantize())).abs().max()) < 1e-4


def test_an_expert_that_is_not_there_is_named(tiny_quantized: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_quantized, tmp_path / "m"))
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        tensors.pop("model.layers.1.mlp.experts.5.up_proj.weight", None)
        save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts.* 8 matrices .* and 7 like"):
        load(folder)


def test_a_damaged_block_is_named(tiny_quantized: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_quantized, tmp_path / "m"))
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    path, info = stored_tensors(sorted(map(str, folder.glob("*.safetensors"))))[name]
    with path.open("r+b") as file:
        file.seek(info.begin)
        file.write(b"no block")
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} is not a native block"):
        load(folder)


def open_checkpoint_of(folder: Path) -> list[str]:
    """Names of a native checkpoint's matrices."""
    return [name for name, one in Output(folder).stored.items() if one.dtype == "U8" or len(one.shape) == 2]


def test_newer_format_is_refused(tiny_quantized: Path, tmp_path: Path) -> None:
    import json

    folder = Path(shutil.copytree(tiny_quantized, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="native format 3"):
        load(folder)
