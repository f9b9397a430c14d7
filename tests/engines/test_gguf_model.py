import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from alphaq.checkpoint.families.architecture import architectures
from alphaq.checkpoint.gguf.format import GgufFile, read_gguf
from alphaq.checkpoint.gguf.values import GgufValue
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.engines.gguf.model import TensorRecipe, gguf_metadata, gguf_tensors, transformed
from alphaq.engines.gguf.pre_tokenizer import PreTokenizer
from alphaq.engines.gguf.pre_tokenizer import pre_tokenizers as known_rules
from alphaq.engines.gguf.tokenizer import tokenizer_metadata, tokens_left_out
from alphaq.errors import ArchitectureError, CheckpointError, MissingExtraError
from conftest import FAMILIES, random_model
from dense_models import DENSE, LLAMA3, save_dense
from llama_converter import CONVERTER, MISSING, convert
from runnable import LOADABLE, VOCAB, byte_level, save_sentencepiece, save_tokenizer

YARN = dict(
    rope_type="yarn", factor=4, original_max_position_embeddings=16, beta_fast=32, mscale=0.7, mscale_all_dim=0.7
)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "fused": ("qwen2_moe", {}),
    "tied": ("qwen2_moe", dict(tie_word_embeddings=True)),
    "tied-optional": ("mixtral", dict(tie_word_embeddings=True)),
    "yarn": ("deepseek_v2", dict(rope_scaling=YARN, q_lora_rank=None, num_hidden_layers=27)),
    "linear": ("qwen3_moe", dict(rope_scaling=dict(rope_type="linear", factor=2.5))),
    "prediction": ("deepseek_v3", dict(n_group=2)),
    "sentencepiece": ("mixtral", {}),
    # The converter has the first two Gemmas with SentencePiece's tokenizer only.
    **{family: (family, {}) for family in DENSE if family not in ("gemma", "gemma2")},
    "gemma3_text": ("gemma3_text", dict(vocab_size=323)),  # it cuts off rows of no token
    "llama3": ("llama", dict(rope_parameters=LLAMA3)),
    "biases": ("llama", dict(attention_bias=True, mlp_bias=True, head_dim=24)),
}
ADDED = {
    # transformers 5 leaves it out of config.json, without it llama.cpp would take the softmax.
    "deepseek_v3": {"deepseek2.expert_gating_func"},
    "prediction": {"deepseek2.expert_gating_func"},
    # transformers' tokenizer of this family adds a token that its published vocabularies have.
    "qwen2": {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type"},
}


def save_case(folder: Path, case: str, tokenizer: Tokenizer) -> None:
    family, overrides = CASES[case]
    if family in DENSE:
        save_dense(folder, family, **overrides)
        return
    model = random_model(family, vocab_size=VOCAB, **LOADABLE.get(family, {}), **overrides)
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("bias") or "norm" in name:
                values.normal_()
    model.bfloat16().save_pretrained(folder, save_original_format=case != "fused")
    if case == "sentencepiece":
        save_sentencepiece(folder)
    else:
        save_tokenizer(folder, tokenizer, chat_template="{{ messages }}", add_bos_token=False)
    if case == "prediction":
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.3.eh_proj.weight"] = torch.ones(64, 128, dtype=torch.bfloat16)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if case == "qwen3_moe":
        card = "---\nlicense: apache-2.0\nbase_model: Qwen/Qwen3-30B-A3B\ntags: [moe, tiny]\n---\n# Tiny\n"
        (folder / "README.md").write_text(card)


@dataclass(frozen=True)
class Converted:
    """A checkpoint, and what llama.cpp's converter made of it."""

    checkpoint: Checkpoint
    recipes: dict[str, TensorRecipe]
    oracle: GgufFile

    def oracle_bytes(self, name: str) -> bytes:
        place = self.oracle.tensors[name]
        with (self.oracle.folder / place.file).open("rb") as file:
            file.seek(place.begin)
            return file.read(place.nbytes)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Converted]:
    if not CONVERTER.is_dir():
        pytest.skip(MISSING)
    root = tmp_path_factory.mktemp("converted")
    tokenizer = byte_level()
    for case in CASES:
        save_case(root / case, case, tokenizer)
    assert not convert([root / case for case in CASES])

    def get(case: str) -> Converted:
        checkpoint = open_checkpoint(root / case)
        recipes = {recipe.name: recipe for recipe in gguf_tensors(checkpoint)}
        return Converted(checkpoint, recipes, read_gguf(root / f"{case}.gguf"))

    return get


@pytest.mark.parametrize("case", CASES)
def test_metadata_is_what_llama_cpp_converter_writes(case: str, converted: Callable[[str], Converted]) -> None:
    model = converted(case)
    found = gguf_metadata(model.checkpoint)
    assert {key: (value.type, value.element, value.value) for key, value in found.items()} == {
        key: (value.type, value.element, value.value) for key, value in model.oracle.metadata.items()
    } | {key: (found[key].type, found[key].element, found[key].value) for key in ADDED.get(case, ())}


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_those_of_llama_cpp_converter(case: str, converted: Callable[[str], Converted]) -> None:
    model = converted(case)
    # The loader wants what the converter leaves out here.
    extra = {"output.weight": ("BF16", (VOCAB, 64))} if case == "tied" else {}
    assert {name: (recipe.type, recipe.shape) for name, recipe in model.recipes.items()} == {
        name: (tensor.type, tensor.shape) for name, tensor in model.oracle.tensors.items()
    } | extra


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_llama_cpp_converter(case: str, converted: Callable[[str], Converted]) -> None:
    model = converted(case)
    types = {"F32": torch.float32, "BF16": torch.bfloat16}
    for name in model.oracle.tensors:
        recipe = model.recipes[name]
        if recipe.vector:
            values = transformed(recipe.transform, model.checkpoint.tensor(recipe.vector), model.checkpoint.settings)
        else:
            matrices = [model.checkpoint.read(matrix) for matrix in recipe.matrices]
            values = transformed(
                recipe.transform, torch.stack(matrices) if "_exps" in name else matrices[0], model.checkpoint.config
            )
        assert tuple(values.shape) == recipe.shape
        stored = values.to(types[recipe.type]).contiguous().view(torch.uint8)
        assert stored.numpy().tobytes() == model.oracle_bytes(name), name


def test_fused_and_split_checkpoints_give_the_same_tensors(converted: Callable[[str], Converted]) -> None:
    fused, split = converted("fused").recipes, converted("qwen2_moe").recipes
    for name, recipe in fused.items():
        assert (recipe.shape, recipe.type) == (split[name].shape, split[name].type)
        assert [matrix.name for matrix in recipe.matrices] == [matrix.name for matrix in split[name].matrices]


def test_tied_embedding_is_written_twice_only_where_llama_cpp_insists(converted: Callable[[str], Converted]) -> None:
    tied = converted("tied").recipes
    assert tied["output.weight"].matrices == tied["token_embd.weight"].matrices
    assert "output.weight" not in converted("tied-optional").recipes


def test_sixteen_bit_sources_keep_their_type(tmp_path: Path, save_family: Callable[..., Path]) -> None:
    expected = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "BF16"}
    for dtype, kept in expected.items():
        recipes = gguf_tensors(open_checkpoint(save_family("qwen2_moe", dtype=dtype)))
        assert {recipe.type for recipe in recipes} == {kept, "F32"}
        assert all(len(recipe.shape) > 1 for recipe in recipes if recipe.type == kept)


def test_every_gguf_table_uses_names_that_llama_cpp_has() -> None:
    gguf = pytest.importorskip("gguf")
    arch_numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    keys = {
        value.removeprefix("{arch}.")
        for part in (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope)
        for value in vars(part).values()
        if isinstance(value, str)
    }
    for architecture in architectures().values():
        if (mapping := architecture.gguf) is None:
            continue
        tensors = gguf.MODEL_TENSORS[arch_numbers[mapping.arch]]
        known = {gguf.TENSOR_NAMES[tensor].replace("{bid}", "{layer}") for tensor in tensors}
        assert {rule.name.rsplit(".", 1)[0] for rule in mapping.tensors} <= known, architecture.name
        assert mapping.metadata.keys() <= keys, architecture.name


# -- what cannot be exported ------------------------------------------------------------------------


@pytest.fixture
def tiny_copy(tiny: Path, tmp_path: Path) -> Callable[..., Checkpoint]:
    """The bundled model with changes to its config."""

    def make(**changes: Any) -> Checkpoint:
        folder = tmp_path / "copy"
        shutil.copytree(tiny, folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in config.items() if value is not ...})
        )
        return open_checkpoint(folder)

    return make


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            dict(norm_topk_prob=True),
            "norm_topk_prob is True, but llama.cpp computes every 'qwen2_moe' model with False",
        ),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (dict(rope_parameters=dict(rope_type="dynamic", factor=2.0)), "rope_parameters.rope_type is 'dynamic'"),
        (dict(rms_norm_eps="small"), "config.json is not one that transformers' Qwen2MoeConfig takes"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    changes: dict[str, Any], said: str, tiny_copy: Callable[..., Checkpoint]
) -> None:
    with pytest.raises(ArchitectureError, match=re.escape(said)):
        gguf_metadata(tiny_copy(**changes))


def test_old_configs_are_read_like_new_ones(tiny_copy: Callable[..., Checkpoint]) -> None:
    scaling = dict(type="linear", factor=2)
    found = gguf_metadata(tiny_copy(rope_parameters=..., rope_theta=5000, rope_scaling=scaling))
    assert found["qwen2moe.rope.freq_base"] == GgufValue.of("float32", 5000.0)
    assert found["qwen2moe.rope.scaling.type"].value == "linear"
    assert found["qwen2moe.rope.scaling.factor"].value == 2.0


def test_tensor_without_a_place_is_refused_by_name(tiny_copy: Callable[..., Checkpoint]) -> None:
    folder = tiny_copy().folder
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.sinks"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ArchitectureError, match=r"'model.layers.0.self_attn.sinks' has no place"):
        gguf_tensors(open_checkpoint(folder))


def test_heads_that_do_not_fit_are_refused(save_family: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(save_family("mixtral"), tmp_path / "mixtral")
    path = tmp_path / "mixtral" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 5}))
    with pytest.raises(ArchitectureError, match="cannot be cut into the attention heads"):
        gguf_tensors(open_checkpoint(path.parent))


def test_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'alphaq[gguf]'")):
        gguf_metadata(open_checkpoint(tiny))


def test_model_from_the_hub_is_called_by_its_name(tiny: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen1.5-MoE-A2.7B" / "snapshots" / "1a758c50ecb6350748b9ce0a99d2352fd9fc11c9"
    shutil.copytree(tiny, snapshot)
    assert gguf_metadata(open_checkpoint(snapshot))["general.name"].value == "Qwen1.5 MoE A2.7B"


def test_model_card_that_cannot_be_read_costs_nothing_else(tiny_copy: Callable[..., Checkpoint]) -> None:
    checkpoint = tiny_copy()
    (checkpoint.folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert gguf_metadata(checkpoint)["general.name"].value == "Copy"


# -- tokenizers -------------------------------------------------------------------------------------

SHORT, SPACES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT_4 = SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
LETTERS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s" + SHORT + "?"
GPT_4O = "|".join([LETTERS % ("*", "+"), LETTERS % ("+", "*"), r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*", SPACES])
DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"""
    "\r\n"
    r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+["
    "\r\n"
    r"]*|\s*["
    "\r\n"
    r"]+|\s+(?!\S)|\s+"
)


def split(*regexes: str) -> list[Any]:
    from tokenizers import Regex

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [*(pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes), plain]


GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
NAMED: dict[str, tuple[Any, Any, bool]] = {
    "gpt-2": (GPT_2, None, False),
    "olmo": (GPT_2, normalizers.NFC(), False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT_2]), None, False),
    "qwen2": (pre_tokenizers.Sequence(split(GPT_4 % "")), normalizers.NFC(), False),
    "llama-bpe": (pre_tokenizers.Sequence(split(GPT_4 % "{1,3}")), None, True),
    "smaug-bpe": (pre_tokenizers.Sequence(split(GPT_4 % "{1,3}")), None, False),
    "gpt-4o": (pre_tokenizers.Sequence(split(GPT_4O)), None, True),
    "deepseek-v3": (
        pre_tokenizers.Sequence(split(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_V3)),
        normalizers.Sequence([]),
        False,
    ),
    "deepseek-coder": (
        pre_tokenizers.Sequence(
            [
                *split("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")[:-1],
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        None,
        False,
    ),
}


def named(folder: Path, rule: Any, normalizer: Any = None, ignore_merges: bool = False) -> Path:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")], ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = rule, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    save_tokenizer(folder, tokenizer)
    return folder


@pytest.mark.parametrize("name", NAMED)
def test_pre_tokenizer_is_recognised_from_its_rules(name: str, tmp_path: Path) -> None:
    assert tokenizer_metadata(named(tmp_path, *NAMED[name]), 3)["tokenizer.ggml.pre"].value == name


@pytest.mark.parametrize("rule", known_rules(), ids=lambda rule: rule.name)
def test_no_entry_of_the_table_hides_another(rule: PreTokenizer, tmp_path: Path) -> None:
    words = {"ByteLevel": GPT_2, "Digits": pre_tokenizers.Digits(individual_digits=True)}
    published = {  # the same text to Unicode, but only so the ranges ascend; and a line feed as it is
        "Ὗ-\u03ce": "Ὗ-\u1f7d",
        "ῐ-\u0390": "ῐ-\u1fd3",
        "ῖ-\u038a": "ῖ-\u1fdb",
        r"\n": "\n",
    }
    rules = []
    for step in rule.steps:
        for ours, theirs in published.items():
            step = step.replace(ours, theirs)
        rules.append(words[step] if step in words else split(step)[0])
    normalizer = getattr(normalizers, rule.normalizer)() if rule.normalizer else None
    folder = named(tmp_path, pre_tokenizers.Sequence(rules), normalizer, rule.ignore_merges is not False)
    assert tokenizer_metadata(folder, 3)["tokenizer.ggml.pre"].value == rule.name


def test_unknown_pre_tokenizer_must_be_named(tmp_path: Path) -> None:
    folder = named(tmp_path, pre_tokenizers.Sequence(split(r"\w+")))
    with pytest.raises(CheckpointError, match=r"into words by \\w\+, a rule .* --pre-tokenizer NAME; llama"):
        tokenizer_metadata(folder, 3)
    assert tokenizer_metadata(folder, 3, "minerva-7b")["tokenizer.ggml.pre"].value == "minerva-7b"


def test_token_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'ab' the id 2, but the model's embedding has 2 rows.*resize_token"):
        tokenizer_metadata(named(tmp_path, GPT_2), 2)


@pytest.mark.parametrize("in_vocabulary", [False, True])
def test_added_tokens_without_a_row_are_left_out(tmp_path: Path, in_vocabulary: bool) -> None:
    folder = named(tmp_path, GPT_2)
    expected = tokenizer_metadata(folder, 3)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"] = [
        {"id": 3, "content": "[PAD]", "special": True},
        {"id": 4, "content": "<tool>", "special": False},
    ]
    if in_vocabulary:
        tokenizer["model"]["vocab"] |= {"[PAD]": 3, "<tool>": 4}
    path.write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    assert tokenizer_metadata(folder, 3) == expected
    assert tokens_left_out(folder, 3) == ["[PAD]", "<tool>"]
    assert tokens_left_out(folder, 5) == []
    assert tokenizer_metadata(folder, 5)["tokenizer.ggml.tokens"].value[3:] == ("[PAD]", "<tool>")


def test_an_added_token_of_sentencepiece_without_a_row_is_left_out(tmp_path: Path) -> None:
    save_sentencepiece(tmp_path)
    expected = tokenizer_metadata(tmp_path, VOCAB)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": VOCAB}))
    assert tokens_left_out(tmp_path, VOCAB)[-1] == "<extra>"
    assert tokenizer_metadata(tmp_path, VOCAB) == expected


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer that llama.cpp can be given"):
        tokenizer_metadata(tmp_path, 3)


@pytest.mark.parametrize("name", ["tiktoken.model", "qwen.tiktoken", "tokenizer.model"])
def test_folder_with_a_tiktoken_vocabulary_alone_says_what_to_make_of_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(CheckpointError, match=f"{name} is a tiktoken vocabulary.*convert_tiktoken_to_fast"):
        tokenizer_metadata(tmp_path, 3)
    from transformers.integrations.tiktoken import convert_tiktoken_to_fast

    assert callable(convert_tiktoken_to_fast)


@pytest.mark.parametrize("damage", [{"model": {"type": "BPE"}}, {"model": []}, {"added_tokens": 3}])
def test_damaged_tokenizer_is_named(damage: dict[str, Any], tmp_path: Path) -> None:
    path = named(tmp_path, GPT_2) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(CheckpointError, match="tokenizer's files are damaged"):
        tokenizer_metadata(tmp_path, 3)


def test_converted_sentencepiece_gives_the_same_vocabulary_and_order_of_merges(tmp_path: Path) -> None:
    original, converted = tmp_path / "original", tmp_path / "converted"
    original.mkdir()
    converted.mkdir()
    save_sentencepiece(original)
    settings = json.loads((original / "tokenizer_config.json").read_text())
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(original / "tokenizer.model"))
    vocab = {pieces.IdToPiece(position): position for position in range(pieces.vocab_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in vocab
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    for token in settings.pop("added_tokens_decoder").values():
        add = tokenizer.add_special_tokens if token["special"] else tokenizer.add_tokens
        add([AddedToken(token["content"], normalized=False)])
    tokenizer.save(str(converted / "tokenizer.json"))
    (converted / "tokenizer_config.json").write_text(json.dumps(settings))

    expected, found = tokenizer_metadata(original, VOCAB), tokenizer_metadata(converted, VOCAB)
    assert found.keys() >= expected.keys()
    texts, scores = (f"tokenizer.ggml.{name}" for name in ("tokens", "scores"))
    assert all(found[key] == expected[key] for key in expected if key != scores)
    merged = [position for position, text in enumerate(found[texts].value) if text in map("".join, merges)]
    by_score = [sorted(merged, key=lambda position: model[scores].value[position]) for model in (expected, found)]
    assert len(merged) > 20
    assert by_score[0] == by_score[1]


def test_space_prefix_follows_the_normalizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")], byte_fallback=True))
    save_tokenizer(tmp_path, tokenizer)
    assert tokenizer_metadata(tmp_path, 3)["tokenizer.ggml.add_space_prefix"].value is False
    tokenizer.normalizer = normalizers.Prepend("▁")
    save_tokenizer(tmp_path, tokenizer)
    assert "tokenizer.ggml.add_space_prefix" not in tokenizer_metadata(tmp_path, 3)
