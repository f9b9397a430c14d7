"""Embedding and head stay packed: tokens are looked up, and logits multiplied, where the codes lie."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import alphaq  # noqa: F401 - registers the plug-in
from alphaq import pipeline
from alphaq.calibration.stream import model_class
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import AlphaQError
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Plan
from alphaq.runtime.modules import PackedEmbedding, PackedLinear, RestoredWhenRead
from alphaq.runtime.packed import PackedWeights
from families import FAMILIES, plain_copy, random_family, save_layout

EMBEDDING, HEAD = "4g32", "6g64s"
SPECIAL = [
    "gemma2",  # tied and scaled
    "inkling_text",  # normed
    "internvl",  # inside a model of several modalities
    "jamba",  # layers of other kinds
    "nemotron_h",  # another name
    "qwen3",  # dense
]


def with_vocabulary(source: Path, out: Path, embedding: str = EMBEDDING, head: str = HEAD) -> Path:
    """A native checkpoint with its embedding and head quantized; "16" leaves one as it is."""
    checkpoint = open_checkpoint(source)
    wanted = {Role.EMBEDDING: embedding, Role.HEAD: head, checkpoint.planned_role: "4g32"}
    choices = {one.name: wanted[one.role] for one in checkpoint.matrices if one.role in wanted}
    pipeline.quantize(checkpoint, Plan(engine="native", choices=choices), out)
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """A family's tiny random model, and a native checkpoint of it with embedding and head; made once."""

    @cache
    def made(family: str, tied: bool = False) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(family)
        overrides = {"tie_word_embeddings": True} if tied else {}
        source = save_layout(random_family(family, **overrides), folder / "source", True)
        return source, with_vocabulary(source, folder / "out")

    return made


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoConfig

    cls = model_class(AutoConfig.from_pretrained(folder))
    model, report = cls.from_pretrained(folder, **{"dtype": torch.float32, **options}, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, 19)[None]).logits.float()


def largest(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}


def check_family(source: Path, out: Path, scratch: Path) -> None:
    """Logits are those of the dequantized matrices, after saving and as an ordinary model too."""
    model = load(out)
    wanted = logits(model)
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    head = model.get_output_embeddings()
    assert head is None or isinstance(head, PackedLinear)  # one family labels tokens
    assert largest(wanted, logits(load(plain_copy(open_checkpoint(source), out, scratch / "plain")))) < 1e-4
    model.save_pretrained(scratch / "again", max_shard_size="100KB")
    first, again = tensors_of(out), tensors_of(scratch / "again")
    assert all(torch.equal(one, again[name]) for name, one in first.items() if one.dtype == torch.uint8)
    assert torch.equal(logits(load(scratch / "again")), wanted)
    model.dequantize().save_pretrained(scratch / "ordinary")
    assert not any(isinstance(one, PackedWeights) for one in model.modules())
    assert largest(logits(model), wanted) < 1e-4
    assert largest(logits(load(scratch / "ordinary")), wanted) < 1e-4


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=[] if one in SPECIAL else pytest.mark.slow) for one in FAMILIES]
)
def test_every_family_has_the_logits_of_its_dequantized_vocabulary(
    small: Callable[..., tuple[Path, Path]], tmp_path: Path, family: str
) -> None:
    check_family(*small(family), tmp_path)


def test_a_tied_head_multiplies_with_the_one_matrix_that_is_stored(
    small: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    source, out = small("qwen2_moe", True)
    assert sorted(name for name in tensors_of(out) if "embed" in name or "head" in name) == [
        "model.embed_tokens.weight"
    ]
    model = load(out)
    assert model.lm_head.packed is model.model.embed_tokens.packed
    assert model.lm_head.packed.nbytes == tensors_of(out)["model.embed_tokens.weight"].nbytes
    model.tie_weights()  # as some libraries do again
    check_family(source, out, tmp_path)
    ordinary = load(out).dequantize()
    assert ordinary.lm_head.weight is ordinary.model.embed_tokens.weight
    assert ordinary.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize(("embedding", "head"), [("4g32", "16"), ("16", "4g32"), ("3g32", "6g32")])
def test_a_head_that_is_stored_apart_stays_apart_whatever_the_config_says(
    small: Callable[..., tuple[Path, Path]], tmp_path: Path, embedding: str, head: str
) -> None:
    source, _ = small("qwen2_moe", True)
    apart = tmp_path / "apart"
    apart.mkdir()
    (apart / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = tensors_of(source)
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        apart / "model.safetensors",
        {"format": "pt"},
    )
    out = with_vocabulary(apart, tmp_path / "out", embedding, head)
    wanted = logits(load(plain_copy(open_checkpoint(apart), out, tmp_path / "plain")))
    model = load(out)
    assert largest(logits(model), wanted) < 1e-4
    model.save_pretrained(tmp_path / "again")
    assert largest(logits(load(tmp_path / "again")), wanted) < 1e-4


def test_no_table_is_restored_to_look_tokens_up(
    small: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for family in ("qwen2_moe", "gemma2"):  # which asks its weight for the type
        model = load(small(family)[1])
        wanted = logits(model)
        with monkeypatch.context() as patch:
            patch.setattr(PackedWeights, "dequantized", lambda *_: pytest.fail("restored a whole matrix"))
            assert torch.equal(logits(model), wanted)


def test_code_that_reads_the_weight_gets_its_values(small: Callable[..., tuple[Path, Path]]) -> None:
    model = load(small("qwen2_moe")[1])
    table = model.get_input_embeddings().weight
    assert isinstance(table, RestoredWhenRead) and table.dtype == torch.float32 and table.shape == (340, 64)
    ids = torch.tensor([5, 9])
    assert torch.equal(table[ids], model.get_input_embeddings()(ids))
    ordinary = load(small("qwen2_moe")[1]).dequantize()
    assert torch.equal(table + 0, ordinary.get_input_embeddings().weight)
    assert torch.equal(model.lm_head.weight.T + 0, ordinary.lm_head.weight.T)


def test_resizing_asks_for_an_ordinary_model(small: Callable[..., tuple[Path, Path]]) -> None:
    model = load(small("qwen2_moe")[1])
    with pytest.raises(AlphaQError, match=r"cannot be changed or resized\..*model\.dequantize\(\)"):
        model.resize_token_embeddings(400)
    model = load(small("qwen2_moe")[1]).dequantize()
    model.resize_token_embeddings(400)
    assert model.get_input_embeddings().weight.shape[0] == 400


def test_casts_and_copies_are_followed(small: Callable[..., tuple[Path, Path]]) -> None:
    for family in ("qwen2_moe", "gemma2"):
        model = load(small(family)[1])
        wanted = logits(model)
        twin = copy.deepcopy(model)
        twin.dequantize()
        assert largest(logits(twin), wanted) < 1e-4 and torch.equal(logits(model), wanted)
        assert model.bfloat16().get_input_embeddings()(torch.tensor([1])).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_moe", "gemma2"])
def test_compiled_models_give_the_same(small: Callable[..., tuple[Path, Path]], family: str) -> None:
    model = load(small(family)[1])
    ids = torch.arange(3, 19)[None]
    with torch.inference_mode():
        assert largest(torch.compile(model, backend="eager")(ids).logits, model(ids).logits) < 1e-4
