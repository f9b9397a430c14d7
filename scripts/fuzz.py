"""Throw damaged files at every reader: each is read or refused with an AlphaQError, in bounded time and memory.

    python scripts/fuzz.py gguf --executions 1000000 --seed 0

A file is a list of tokens (numbers, texts, marks). Each execution takes a sound file, replaces tokens by hostile ones
or by others of the same file, repeats, drops and moves runs of them, and may damage single bytes of the result. An
execution depends on nothing but the seed and its number. Ends with 1, and keeps the input, at the first one that
raises anything else, takes more than `SLOW_S` seconds or needs more memory than `MEMORY_BYTES`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import resource
import signal
import struct
import sys
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
import zstandard

from alphaq.checkpoint.files import PlainFile
from alphaq.checkpoint.gguf.imatrix import read_imatrix
from alphaq.checkpoint.gguf.values import VALUE_TYPES
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.checkpoint.safetensors_format import DTYPE_NAMES, TORCH_DTYPES, TensorSpec, layout, read_header
from alphaq.checkpoint.summary import summarize
from alphaq.checkpoint.tensors import TensorInfo
from alphaq.checkpoint.weights import read_shards
from alphaq.engines.gguf.gathering import Runs
from alphaq.engines.gguf.importance import importance_of
from alphaq.engines.gguf.profile import file_layout
from alphaq.errors import AlphaQError
from alphaq.formats.blocks import decode, dequantized_rows, encode, native_format
from alphaq.formats.coding import PREFIX_BYTES, block_header, decode_tensor, decoded_info, encode_tensor
from alphaq.formats.ggml import GGML_TYPES
from alphaq.formats.table import parse_choice, storage_bytes
from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import Plan
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import PlanInputs, make_plan, measure_for_plan, resolve
from alphaq.planning.outline import outline
from alphaq.quantizers.base import rounder_of
from alphaq.report.explanation import explain_plan, explanation_tables
from alphaq.spectra.measure import read_stats
from alphaq.work.untrusted import parse_json
from alphaq.work.workers import silent
from alphaq.writing.planned import plan_choices

SLOW_S = 1.0
HANGS_S = 20
LONGEST = 3000
MEMORY_BYTES = 1 << 30


class Token(NamedTuple):
    """A piece of a file. kind: what may stand in its place."""

    kind: str
    raw: bytes


@dataclass(frozen=True)
class Target:
    """A reader. seeds: sound files. hostile: what tokens of a kind are replaced by. run: read a file's bytes."""

    seeds: Sequence[Sequence[Token]]
    hostile: dict[str, Sequence[bytes]]
    join: Callable[[Iterable[Token]], bytes]
    run: Callable[[bytes], None]


@dataclass(frozen=True)
class Result:
    """What became of the executions. refusals: distinct lines of code that refused."""

    target: str
    seed: int
    executions: int
    accepted: int
    refused: int
    refusals: int
    per_second: float
    slowest_ms: float
    peak_mib: float


# -- damage ---------------------------------------------------------------------------------------

TEXTS = ("", "../../x", "/etc/passwd", "..", "a/b", "\\\\x", "x" * 300, "x" * 70_000, "\0")
TEXTS += ("\x1b[31m", "a\nb", "\u202e", "é", "😀")
WHOLE = (0, 1, 2, 3, 7, 31, 32, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
WHOLE += (2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
JSON_VALUES = [
    *(json.dumps(text).encode() for text in TEXTS),
    *(str(number).encode() for number in WHOLE),
    *(b"-1", b"-0.0", b"1.5", b"1e999", b"-1e999", b"NaN", b"Infinity", b"null", b"true", b"false", b"1e308"),
    *(b"9" * 400, b"9" * 5000, b"{}", b"[]", b"[[]]", b"[null]", b"[" * 60 + b"]" * 60, b"[" * 20_000 + b"]" * 20_000),
    *(b'{"a":' * 5000 + b"1" + b"}" * 5000, b'{"a":1,"a":1}', b'"\\ud800"', b'"\xff\xfe"', b'"\xed\xa0\x80"'),
]


def number(width: str) -> list[bytes]:
    """Little-endian numbers near every edge."""
    size = struct.calcsize(f"<{width}")
    return [(value % 256**size).to_bytes(size, "little") for value in (*WHOLE, -1, -2)]


def float32(*values: float) -> list[bytes]:
    return [struct.pack("<f", value) for value in values]


def damaged(rng: random.Random, target: Target) -> bytes:
    """A sound file's tokens in disorder."""
    tokens = list(rng.choice(target.seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not tokens:
            break
        at = rng.randrange(len(tokens))
        if tokens[at].kind == "mark" and rng.random() < 0.8:
            at = rng.randrange(len(tokens))
        kind, raw = tokens[at]
        action = rng.random()
        if action < 0.5:
            if options := target.hostile.get(kind):
                tokens[at] = Token(kind, rng.choice(options))
        elif action < 0.6:
            tokens[at] = Token(kind, near(rng, kind, raw))
        elif action < 0.75:
            tokens[at] = Token(kind, rng.choice([other.raw for other in tokens if other.kind == kind]))
        else:
            stop = min(at + rng.choice((1, 2, 4, 8, 20)), len(tokens))
            run = tokens[at:stop]
            if action >= 0.85:
                del tokens[at:stop]
            if action < 0.92:
                place = stop if rng.random() < 0.5 else rng.randrange(len(tokens) + 1)
                tokens[place:place] = run
    whole = bytearray(target.join(tokens))
    if rng.random() < 0.3:
        damage_bytes(rng, whole)
    return bytes(whole)


def near(rng: random.Random, kind: str, raw: bytes) -> bytes:
    """A number not far from another."""
    step = rng.choice((-32, -1, 1, 32))
    with suppress(ValueError):
        if kind in ("value", "cell"):
            return str(int(raw) + step).encode()
    if kind in ("B", "H", "I", "Q", "i"):
        return ((int.from_bytes(raw, "little") + step) % 256 ** len(raw)).to_bytes(len(raw), "little")
    return raw


def damage_bytes(rng: random.Random, whole: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        place, action = rng.randrange(len(whole) + 1), rng.randrange(5)
        if action == 0:
            del whole[place:]
        elif action == 1:
            whole[place:place] = rng.randbytes(rng.choice((1, 4, 8)))
        elif action == 2:
            del whole[place : place + rng.choice((1, 4, 8, 32))]
        else:
            width = min(rng.choice((1, 4, 8)), len(whole) - place)
            whole[place : place + width] = rng.choice((b"\0", b"\xff", b"\x7f", rng.randbytes(1))) * width


def plain(tokens: Iterable[Token]) -> bytes:
    return b"".join(token.raw for token in tokens)


_JSON_TOKEN = re.compile(rb'(?P<value>"(?:[^"\\]|\\.)*"|[-+\w.]+)|(?P<mark>\s*[\[\]{}:,]\s*)')


def json_tokens(data: Any) -> list[Token]:
    return [Token(str(found.lastgroup), found[0]) for found in _JSON_TOKEN.finditer(json.dumps(data).encode())]


def csv_tokens(text: str) -> list[Token]:
    pieces = re.split(rb"([,\n])", text.encode())
    return [Token("mark" if piece in (b",", b"\n") else "cell", piece) for piece in pieces]


# -- readers --------------------------------------------------------------------------------------

LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (8, 32),
    "model.norm.weight": (32,),
    f"{LAYER}input_layernorm.weight": (32,),
    f"{LAYER}self_attn.q_proj.weight": (32, 32),
    f"{LAYER}mlp.gate.weight": (2, 32),
    **{
        f"{LAYER}mlp.experts.{expert}.{projection}_proj.weight": (32, 8) if projection == "down" else (8, 32)
        for expert in range(2)
        for projection in ("gate", "up", "down")
    },
}
CONFIG = {
    "model_type": "qwen2_moe",
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "auto_map": {"AutoConfig": "configuration.Config"},
}
ENCODED = {  # tensors that an encoding may claim
    "fp8.weight": TensorSpec("F8_E4M3", (4, 8)),
    "fp8.weight_scale_inv": TensorSpec("F32", (2, 2)),
    "fp4_blocks": TensorSpec("U8", (2, 3, 1, 16)),
    "fp4_scales": TensorSpec("U8", (2, 3, 1)),
}
CODED = {  # ways to store weights, each with what helps to decode it
    "fp8": {"w.weight": ("F8_E4M3", (4, 8)), "w.weight_scale_inv": ("BF16", ()), "w.activation_scale": ("F32", ())},
    "rows": {"w.weight": ("F8_E4M3", (4, 8)), "w.weight_scale": ("F16", (4, 1))},
    "stack": {"w.up": ("F8_E4M3", (3, 4, 8)), "w.up_scale_inv": ("F32", (3, 1, 1))},
    "mxfp4": {"w.weight": ("I8", (4, 16)), "w.scale": ("F8_E8M0", (4, 1))},
    "nvfp4": {
        "w.weight": ("U8", (4, 16)),
        "w.weight_scale": ("F8_E4M3", (4, 2)),
        "w.weight_scale_2": ("F32", ()),
        "w.input_scale": ("F32", ()),
    },
    "int4": {
        "w.weight_packed": ("I32", (8, 4)),
        "w.weight_scale": ("BF16", (8, 2)),
        "w.weight_zero_point": ("I32", (1, 2)),
        "w.weight_shape": ("I64", (2,)),
    },
    "int8": {"w.weight": ("I8", (4, 8)), "w.weight_scale": ("F32", (4,)), "w.weight_zero_point": ("I8", (4,))},
}
GROUP = {"format": "pack-quantized", "weights": {"num_bits": 4, "type": "int", "group_size": 16, "strategy": "group"}}
BLOCKS: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [2, 4]}
WHOLE_FP8: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": None}
MODELOPT: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": GROUP},
}
SOUND = [
    *(("fp8", WHOLE_FP8), ("rows", WHOLE_FP8), ("stack", WHOLE_FP8), ("mxfp4", BLOCKS), ("nvfp4", MODELOPT)),
    *((form, COMPRESSED) for form in ("rows", "int4", "int8")),
]
QUANTIZATIONS = (
    {"quant_method": "fp8", "weight_block_size": [2, 4]},
    {"quant_method": "mxfp4", "weight_block_size": [2, 4]},
)


def write_model(folder: Path, config: Any = CONFIG, more: dict[str, TensorSpec] | None = None) -> Path:
    """A folder with a model of one layer of two experts."""
    specs = {name: TensorSpec("BF16", shape) for name, shape in SHAPES.items()} | (more or {})
    header, _, total = layout(specs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(header.ljust(total, b"\x3c"))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def safetensors_target(folder: Path) -> Target:
    specs = {"a": TensorSpec("F32", (2, 3)), "b": TensorSpec("U8", (0, 4)), "c": TensorSpec("BF16", (4,))} | ENCODED
    header, _, total = layout(specs)
    data = bytes(total - len(header))

    def join(tokens: Iterable[Token]) -> bytes:
        text = plain(tokens)
        return len(text).to_bytes(8, "little") + text + data

    def run(raw: bytes) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(raw)
        tensors, _ = read_header(path)
        file = PlainFile(path)
        for info in tensors.values():
            file.read(info.begin, info.nbytes).view(TORCH_DTYPES[info.dtype]).view(info.shape)

    dtypes = [json.dumps(name).encode() for name in (*TORCH_DTYPES, "F4", "f32")]
    return Target([json_tokens(json.loads(header[8:]))], {"value": [*JSON_VALUES, *dtypes]}, join, run)


def gguf_text(text: str | bytes) -> Token:
    raw = text if isinstance(text, bytes) else text.encode()
    return Token("text", len(raw).to_bytes(8, "little") + raw)


def gguf_tokens(metadata: dict[str, tuple[str, Any]], tensors: dict[str, tuple[str, tuple[int, ...]]]) -> list[Token]:
    """Header fields of a file, then its data as one token."""
    tokens = [Token("mark", b"GGUF"), *(number_token("I", 3), number_token("Q", len(tensors)))]
    tokens.append(number_token("Q", len(metadata)))
    for key, (type, value) in metadata.items():
        tokens += [gguf_text(key), number_token("I", VALUE_TYPES.index(type)), *gguf_value(type, value)]
    data = 0
    for name, (type, shape) in tensors.items():
        tokens += [gguf_text(name), number_token("I", len(shape))]
        tokens += [number_token("Q", side) for side in reversed(shape)]
        tokens += [number_token("I", GGML_TYPES[type].number), number_token("Q", data)]
        data += -(-GGML_TYPES[type].storage_bytes(shape) // 32) * 32
    return [*tokens, Token("data", bytes(data))]


def gguf_value(type: str, value: Any) -> list[Token]:
    if type == "array":
        element, values = value
        head = [number_token("I", VALUE_TYPES.index(element)), number_token("Q", len(values))]
        return [*head, *(token for one in values for token in gguf_value(element, one))]
    if type == "string":
        return [gguf_text(value)]
    formats = {"uint32": "I", "uint64": "Q", "float32": "f", "bool": "B", "uint16": "H", "float64": "d", "int32": "i"}
    return [number_token(formats[type], value)]


def number_token(width: str, value: float) -> Token:
    return Token(width, struct.pack(f"<{width}", value))


def join_gguf(tokens: Iterable[Token]) -> bytes:
    kept = list(tokens)
    header = plain(token for token in kept if token.kind != "data")
    return header.ljust(-(-len(header) // 32) * 32, b"\0") + plain(token for token in kept if token.kind == "data")


GGUF_HOSTILE: dict[str, Sequence[bytes]] = {
    **{width: number(width) for width in "BHIQ"},
    "f": float32(0, -1, 1e-45, 3e38, np.inf, -np.inf, np.nan),
    "d": [struct.pack("<d", value) for value in (0, -1, 5e-324, 1e308, np.inf, np.nan)],
    "text": [
        *(gguf_text(text).raw for text in (*TEXTS, b"\xff\xfe", b"\xed\xa0\x80", "split.count", "general.alignment")),
        *(gguf_text(text).raw for text in ("llama", "blk.0.attn_q.weight", "blk.99999.attn_norm.weight")),
        *(gguf_text(text).raw for text in ("blk.0.ffn_up_exps.1.weight", "dec.blk.1.ffn_up.weight", "output.weight")),
        *(value.to_bytes(8, "little") + b"x" for value in (2**31, 2**63, 2**64 - 1)),
    ],
    "data": [b"", bytes(32), bytes(1 << 16), random.Random(0).randbytes(1 << 14)],
}


def gguf_target(folder: Path) -> Target:
    arch = "qwen2moe"
    counts = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 8,
        "attention.head_count": 2,
        "expert_count": 2,
        "expert_used_count": 1,
        "expert_feed_forward_length": 8,
        "expert_shared_feed_forward_length": 8,
    }
    metadata: dict[str, tuple[str, Any]] = {
        "general.architecture": ("string", arch),
        **{f"{arch}.{key}": ("uint32", value) for key, value in counts.items()},
        f"{arch}.attention.layer_norm_rms_epsilon": ("float32", 1e-6),
        "tokenizer.ggml.tokens": ("array", ("string", ["a", "b"])),
    }
    tensors = {
        "token_embd.weight": ("F16", (8, 32)),
        "blk.0.attn_norm.weight": ("F32", (32,)),
        "blk.0.attn_q.weight": ("Q8_0", (32, 32)),
        "blk.0.ffn_gate_inp.weight": ("F32", (2, 32)),
        "blk.0.ffn_gate_exps.weight": ("F16", (2, 8, 32)),
        "blk.0.ffn_up_exps.weight": ("BF16", (2, 8, 32)),
        "blk.0.ffn_down_exps.weight": ("F16", (2, 32, 8)),
    }
    values = {
        "general.alignment": ("uint32", 32),
        "split.count": ("uint16", 0),
        "a": ("array", ("uint64", [1, 2])),
        "b": ("bool", 1),
        "c": ("array", ("float64", [])),
        "d": ("float32", 1.0),
    }
    part = {"split.no": ("uint16", 0), "split.count": ("uint16", 2)}
    part["split.tensors.count"] = ("uint64", len(tensors) + 1)
    norm = gguf_tokens(part | {"split.no": ("uint16", 1)}, {"output_norm.weight": ("F32", (32,))})
    (folder / "x-00002-of-00002.gguf").write_bytes(join_gguf(norm))
    path = folder / "x-00001-of-00002.gguf"

    def run(raw: bytes) -> None:
        path.write_bytes(raw)
        checkpoint = open_checkpoint(path, quantized=True)
        summarize(checkpoint)
        assert checkpoint.gguf is not None
        for value in checkpoint.gguf.metadata.values():
            assert value.value is not None
        for matrix in checkpoint.matrices:
            checkpoint.read(matrix)
        sizes = Runs.of(path, 1, silent, True).sizes
        assert sizes.token_bytes(256) > 0 and sizes.outputs > 0 and sizes.enough_tokens > 0
        if checkpoint.plain:
            assert file_layout(checkpoint, {}).size_bytes <= file_layout(checkpoint, {}, 1000).size_bytes
            with suppress(AlphaQError):
                outline(checkpoint, request.with_stored(checkpoint))

    request = resolve(PlanConfig(engine="llama.cpp", method="distortion", budget=Budget(size_bytes=100_000)))
    # Of an architecture that no table describes, with what only names tell.
    other = {key.replace(arch, "newest"): value for key, value in metadata.items()}
    other["general.architecture"] = ("string", "newest")
    more = {"blk.0.attn_k_b.weight": ("BF16", (2, 4, 32)), "blk.0.ffn_up_shexp.weight": ("MXFP4", (8, 32))}
    more |= {"blk.0.ssm_a": ("F32", (4, 4)), "blk.0.unheard_of.weight": ("Q4_0", (2, 32))}
    seeds = [gguf_tokens(metadata | added, tensors) for added in ({}, values, part)]
    seeds.append(gguf_tokens(other, tensors | more))
    # Types that only --requantize reads.
    kinds = {"gate": "Q4_K", "up": "IQ2_XS", "down": "NVFP4", "gate_up": "Q8_K"}
    coded = {f"blk.0.ffn_{name}_exps.weight": (type, (2, 2, 256)) for name, type in kinds.items()}
    coded["blk.0.attn_q.weight"] = ("I32", (2, 256))
    seeds.append(gguf_tokens(other, {"token_embd.weight": ("IQ4_XS", (8, 256)), **coded}))
    return Target(seeds, GGUF_HOSTILE, join_gguf, run)


def parts_target(folder: Path) -> Target:
    """All parts of a split file as one, with a token where the next begins."""
    metadata = {"general.architecture": ("string", "newest"), "newest.block_count": ("uint32", 1)}
    tensors = {f"blk.0.ffn_{name}.weight": ("BF16", (4, 32)) for name in ("gate", "up", "down")}
    tokens: list[Token] = []
    for place, (name, held) in enumerate(tensors.items()):
        keys = {"split.no": ("uint16", place), "split.count": ("uint16", 3), "split.tensors.count": ("int32", 3)}
        tokens += [Token("next", b""), *gguf_tokens((metadata if place == 0 else {}) | keys, {name: held})]

    def join(tokens: Iterable[Token]) -> bytes:
        files: list[list[Token]] = []
        for token in tokens:
            if token.kind == "next" or not files:
                files.append([])
            if token.kind != "next":
                files[-1].append(token)
        raw = [join_gguf(file) for file in files]
        return b"".join(part for one in raw for part in (len(one).to_bytes(4, "little"), one))

    def run(raw: bytes) -> None:
        for path in folder.glob("*.gguf"):
            path.unlink()
        for part in range(1, 5):
            if not raw:
                break
            end = 4 + int.from_bytes(raw[:4], "little")
            (folder / f"x-{part:05d}-of-00003.gguf").write_bytes(raw[4:end])
            raw = raw[end:]
        checkpoint = open_checkpoint(folder / "x-00001-of-00003.gguf")
        assert checkpoint.gguf is not None and not any(key.startswith("split.") for key in checkpoint.gguf.metadata)
        for matrix in checkpoint.matrices:
            checkpoint.read(matrix)
        assert file_layout(checkpoint, {}).size_bytes <= file_layout(checkpoint, {}, 300).size_bytes

    return Target([tokens], GGUF_HOSTILE | {"i": number("i")}, join, run)


def index_target(folder: Path) -> Target:
    model, outside = write_model(folder / "model"), folder / "outside.safetensors"
    (model / "model.safetensors").rename(model / "a.safetensors")
    header, _, total = layout({"b": TensorSpec("U8", (3,))})
    for path in (outside, model / "b.safetensors"):
        path.write_bytes(header.ljust(total, b"\0"))
    (model / "out.safetensors").symlink_to(outside)
    (model / "loop.safetensors").symlink_to("loop.safetensors")
    (model / "zero.safetensors").symlink_to("/dev/zero")
    (model / "folder.safetensors").mkdir()
    os.mkfifo(model / "pipe.safetensors")
    shards = [json.dumps(path.name).encode() for path in sorted(model.glob("*.safetensors"))]
    paths = (b'"../outside.safetensors"', b'"' + b"x" * 300 + b'.safetensors"')
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: "a.safetensors" for name in SHAPES} | {"b": "b.safetensors"},
    }

    def run(raw: bytes) -> None:
        (model / "model.safetensors.index.json").write_bytes(raw)
        tensors, _ = read_shards(model)
        assert tensors.keys() <= {"a.safetensors", "b.safetensors"}

    return Target([json_tokens(index)], {"value": [*JSON_VALUES, *shards, *paths]}, plain, run)


def config_target(folder: Path) -> Target:
    write_model(folder, more=ENCODED)
    seeds = [json_tokens(CONFIG | {"quantization_config": quantization}) for quantization in QUANTIZATIONS]

    def run(raw: bytes) -> None:
        (folder / "config.json").write_bytes(raw)
        checkpoint = open_checkpoint(folder)
        summarize(checkpoint)
        json.dumps(checkpoint.config, ensure_ascii=False).encode()
        for name in checkpoint.shard_of:
            if name.startswith("fp"):
                checkpoint.tensor(name)

    names = ("fp8", "mxfp4", "mixtral", "deepseek_v3", "gpt_oss", "quantization_config", "text_config")
    words = [json.dumps(name).encode() for name in names]
    return Target(seeds, {"value": [*JSON_VALUES, *words]}, plain, run)


def sources_target(folder: Path) -> Target:
    """Config and header of checkpoints in few bits, as one JSON text, so that both can be damaged."""
    write_model(folder)

    def run(raw: bytes) -> None:
        try:
            given = parse_json(raw)
            specs = {name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in given["tensors"].items()}
            if not all(type(side) is int and side >= 0 for spec in specs.values() for side in spec.shape):
                raise ValueError("no shape")
            header, _, total = layout(specs | {name: TensorSpec("BF16", shape) for name, shape in SHAPES.items()})
            if total > 1 << 20:
                raise ValueError("too large to be written")
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
            raise AlphaQError("This describes no safetensors file.") from error  # of which other targets damage headers
        (folder / "model.safetensors").write_bytes(header.ljust(total, b"\x3c"))
        (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": given.get("told")}))
        checkpoint = open_checkpoint(folder)
        summarize(checkpoint)
        for name in checkpoint.shard_of:
            if name not in SHAPES:
                found = checkpoint.tensor(name)
                assert (found.shape, DTYPE_NAMES[found.dtype]) == (
                    checkpoint.info(name).shape,
                    checkpoint.info(name).dtype,
                )

    seeds = [json_tokens({"tensors": CODED[form], "told": told}) for form, told in SOUND]
    words = [*TORCH_DTYPES, *(name for coded in CODED.values() for name in coded), "mxfp4", "modelopt", "float"]
    return Target(seeds, {"value": [*JSON_VALUES, *(json.dumps(word).encode() for word in words)]}, plain, run)


def plan_target(folder: Path) -> Target:
    checkpoint = open_checkpoint(write_model(folder))
    experts = [name for name in SHAPES if "experts" in name]
    table = {"choices": ["2g32", "4g32"], "losses": dict.fromkeys(experts, (2.0, 1.0)), "costs": [[80, 144]]}
    whole = {
        "format_version": 1,
        "engine": "native",
        "source": {"name": "model", "fingerprint": checkpoint.fingerprint},
        "config": {"method": "alphaq", "budget": {"bits": 2.5}, "imatrix": None},
        "average_bits": 2.0,
        "size_bytes": 1000,
        "objective": 2.0,
        "lower_bound": 1.5,
        "price": 0.1,
        "histogram": {"2": 6},
        "assignment": dict.fromkeys(experts, 2),
        "choices": dict.fromkeys(experts, "2g32"),
        "alpha": dict.fromkeys(experts, 2.5),
        "expected_error": dict.fromkeys(experts, 0.1),
        "table": table | {"cost_of": [0] * len(experts), "members": {}},
    }
    few = {"choices": dict.fromkeys(experts, "16"), "unplanned": {"a": "why"}, "neutral": {"b": "why"}}

    def run(raw: bytes) -> None:
        plan = Plan.from_json(raw, "plan.json")
        assert Plan.from_json(plan.to_json(), "again") == plan
        with suppress(AlphaQError):
            plan_choices(plan, checkpoint)
        with suppress(AlphaQError):
            explanation_tables(explain_plan(plan, None))

    words = [json.dumps(word).encode() for word in ("3g64", "Q4_K", "16", "mlx", "llama.cpp", "99g1", *experts[:2])]
    return Target([json_tokens(whole), json_tokens(few)], {"value": [*JSON_VALUES, *words]}, plain, run)


def stats_target(folder: Path) -> Target:
    path = folder / "stats.csv"
    columns = "name,layer,expert,projection,role,rows,columns,alpha,variance,mean_square,tail_count,reason"
    rows = [f"a.{number},0,{number},up,expert,64,32,{2 + number},0.01,0.01,5," for number in range(3)]
    files = ["\n".join((columns, *rows, "")), "name,alpha,variance\na,2.5,0.1\nb,,0.1\n"]
    seeds = [csv_tokens(file) for file in files]
    words = ["nan", "inf", "-inf", "1e999", "1e308", "5e-324", "-1", "0", "1_0", "0x1", '"', '""', '"a\nb"', "head"]
    words.append("alpha")
    request = resolve(PlanConfig(budget=Budget(bits=2.5)), with_model=False)

    def plan() -> None:
        make_plan(None, request, measure_for_plan(None, request, PlanInputs(path)))

    def run(raw: bytes) -> None:
        path.write_bytes(raw)
        read_stats(path)
        if zlib.crc32(raw) % 20 == 0:  # planning takes twenty times as long as reading
            plan()

    path.write_text(files[0])
    plan()  # the first one loads the solver

    cells = [text.encode() for text in (*TEXTS, *words, *map(str, WHOLE))]
    return Target(seeds, {"cell": [*cells, b"\xff", b"\xef\xbb\xbfname", b'"' + b"x" * 200_000]}, plain, run)


def imatrix_target(folder: Path) -> Target:
    path = folder / "x.imatrix"
    entries = (b"blk.0.ffn_up_exps.weight", b"output.weight")
    values = [Token("f", value) for value in float32(1, 2, 0, 4) * 16]
    model = {"blk.0.ffn_up_exps.weight": ("BF16", (2, 2, 32)), "output.weight": ("BF16", (2, 64))}
    metadata = {"general.architecture": ("string", "newest"), "newest.block_count": ("uint32", 1)}
    (folder / "model.gguf").write_bytes(join_gguf(gguf_tokens(metadata, model)))
    checkpoint = open_checkpoint(folder / "model.gguf")
    old = [number_token("i", len(entries))]
    for name in entries:
        old.append(Token("name", len(name).to_bytes(4, "little") + name))
        old += [number_token("i", 3), number_token("i", len(values)), *values]
    shapes = {
        f"{name.decode()}.{part}": ("F32", (2, side))
        for name in entries
        for part, side in (("in_sum2", 32), ("counts", 1))
    }
    new = gguf_tokens({"general.type": ("string", "imatrix")}, shapes)
    texts = [raw if isinstance(raw, bytes) else raw.encode() for raw in (*TEXTS, b"\xff")]

    def join(tokens: Iterable[Token]) -> bytes:
        kept = list(tokens)
        return join_gguf(kept) if any(token.kind == "data" for token in kept) else plain(kept)

    def run(raw: bytes) -> None:
        path.write_bytes(raw)
        for means in read_imatrix(path).tensors.values():
            assert means.size and np.isfinite(means).all() and (means > 0).all()
        importance = importance_of(checkpoint, read_imatrix(path))
        for matrix in checkpoint.matrices:
            own = importance.columns.get(matrix.name)
            assert own is None or (own.shape == (matrix.shape[1],) and np.isfinite(own).all() and (own > 0).all())

    names = [len(text).to_bytes(4, "little") + text for text in texts]
    ratios = float32(1, 0, 3e38, 1e-45) * 9
    data = [b"".join(random.Random(number).choices(ratios, k=32)) for number in range(8)]
    hostile = GGUF_HOSTILE | {"i": number("i"), "name": names, "data": [*data, *GGUF_HOSTILE["data"]]}
    return Target([old, new], hostile, join, run)


def packed_target(folder: Path) -> Target:
    def block(choice: Choice, rows: int, columns: int) -> list[Token]:
        flags = int(choice.symmetric) | native_format(choice).kind_number(choice) << 1
        head = [Token("mark", b"AQ"), number_token("B", 1), number_token("B", choice.bits)]
        head += [number_token("H", choice.group_size), number_token("H", flags)]
        head += [number_token("I", rows), number_token("I", columns)]
        return [*head, *(Token("B", b"\x3c") for _ in range(storage_bytes(choice, (rows, columns)) - 16))]

    def run(raw: bytes) -> None:
        matrix = decode(torch.from_numpy(np.frombuffer(raw, np.uint8).copy()))
        assert torch.isfinite(dequantized_rows(matrix, slice(0, matrix.shape[0]))).all()

    choices = [parse_choice(text) for text in ("1g32", "2g32", "3g64", "4g128s", "8g32", "1g32s", "t1", "t2.25", "t4")]
    seeds = [block(choice, *shape) for choice in choices for shape in ((2, 3), (3, 33), (1, 65))]
    return Target(seeds, {width: number(width) for width in "BHI"}, plain, run)


def coded_target(folder: Path) -> Target:
    def tokens(tensor: torch.Tensor) -> list[Token]:
        raw = encode_tensor(tensor).numpy().tobytes()
        dimensions, planes = raw[5], int.from_bytes(raw[6:8], "little")
        words = [raw[place : place + 8] for place in range(8, 16 + 8 * (dimensions + 2 * planes), 8)]
        ends = list(accumulate((int.from_bytes(size, "little") for size in words[1 + dimensions :: 2]), initial=0))
        frames = raw[8 + 8 * len(words) :]
        head = [Token("mark", raw[:2]), *(Token("B", raw[place : place + 1]) for place in range(2, 6))]
        data = [Token("frame", frames[first:last]) for first, last in pairwise(ends)]
        return [*head, Token("H", raw[6:8]), *(Token("Q", word) for word in words), *data]

    def run(raw: bytes) -> None:
        stored = torch.from_numpy(np.frombuffer(raw, np.uint8).copy())
        info = TensorInfo("w", "U8", (stored.numel(),), 0, stored.numel())
        told = decoded_info(info, stored[:PREFIX_BYTES])
        header = block_header(lambda place, count: stored[place : place + count], info)
        found = decode_tensor(stored)
        assert tuple(found.shape) == told.shape and DTYPE_NAMES[found.dtype] == told.dtype
        if header is not None:
            rows = header[1][0]
            assert torch.isfinite(dequantized_rows(decode(found), slice(0, rows))).all()

    drawn = torch.Generator().manual_seed(0)
    texts = ("8g128s@2", "4g32-nest", "3g64s", "2g128-slim", "1g128-pb2")
    blocks = [parse_choice(text) for text in texts]
    tensors = [torch.randn(16, 256, generator=drawn).round() for _ in blocks]
    seeds = [tokens(encode(rounder_of("debiased")(one, choice))) for one, choice in zip(tensors, blocks, strict=True)]
    seeds += [tokens(tensors[0].to(dtype)) for dtype in (torch.bfloat16, torch.float32, torch.int64)]
    packer = zstandard.ZstdCompressor(write_checksum=True)
    frames = [packer.compress(bytes(size)) for size in (0, 1, 16, 64, 4096, 1 << 22)]
    return Target(seeds, {width: number(width) for width in "BHQ"} | {"frame": frames}, plain, run)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "safetensors": safetensors_target,
    "gguf": gguf_target,
    "parts": parts_target,
    "index": index_target,
    "config": config_target,
    "sources": sources_target,
    "plan": plan_target,
    "stats": stats_target,
    "imatrix": imatrix_target,
    "packed": packed_target,
    "coded": coded_target,
}

# -- executions -----------------------------------------------------------------------------------


class Hang(BaseException):
    """Nothing catches it by accident."""


class Failed(Exception):
    """An input that broke the promise. raw: the input. number: its execution."""

    def __init__(self, why: str, raw: bytes, number: int) -> None:
        super().__init__(why)
        self.raw, self.number = raw, number


@contextmanager
def bounds() -> Iterator[None]:
    """Raise Hang after `HANGS_S` seconds, MemoryError beyond `MEMORY_BYTES` more than now."""

    def stop(number: int, frame: object) -> None:
        raise Hang

    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, before[1]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def execute(target: Target, seed: int, number: int) -> tuple[str, float]:
    """One execution: where it was refused ("" if it was not) and the seconds of processor time it took."""
    raw = damaged(random.Random(seed << 40 | number), target)
    refused = ""
    begin = time.process_time()
    try:
        target.run(raw)
    except AlphaQError as error:
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        refused = f"{type(error).__name__} {last and last.tb_lineno}"
        if not str(error).replace("\n", "").isprintable() or len(str(error)) > LONGEST:
            raise Failed(f"an error of {len(str(error))} characters", raw, number) from error
    except (Exception, Hang) as error:
        raise Failed("".join(traceback.format_exception(error)), raw, number) from error
    elapsed = time.process_time() - begin
    if elapsed > SLOW_S:
        raise Failed(f"it took {elapsed:.2f} s", raw, number)
    return refused, elapsed


def fuzz(name: str, executions: int, seed: int, first: int = 0, progress: bool = False) -> Result:
    """Run a target so many times. Raises Failed at the first input that breaks the promise."""
    refusals: Counter[str] = Counter()
    slowest = 0.0
    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        target = TARGETS[name](Path(folder))
        for tokens in target.seeds:  # sound files are read, whatever is compiled is compiled
            target.run(target.join(tokens))
        gc.collect()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin = time.perf_counter()
        with bounds():
            for number in range(first, first + executions):
                signal.alarm(HANGS_S)
                refused, elapsed = execute(target, seed, number)
                refusals[refused] += 1
                slowest = max(slowest, elapsed)
                if progress and number % 10_000 == 0:
                    print(f"\r{name} {number:,}", end="", file=sys.stderr)
        rate = executions / (time.perf_counter() - begin)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    accepted = refusals.pop("", 0)
    return Result(
        *(name, seed, executions, accepted, executions - accepted, len(refusals)),
        *(round(rate), round(1e3 * slowest, 1), round(grown, 1)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--executions", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="Number of the first execution, to repeat one.")
    parser.add_argument("--output", "-o", type=Path, help="JSON file to add the results to.")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"), help="Folder for inputs that fail.")
    given = parser.parse_args()
    for name in TARGETS if given.target == "all" else [given.target]:
        try:
            result = fuzz(name, given.executions, given.seed, given.first, sys.stderr.isatty())
        except Failed as failure:
            given.failures.mkdir(parents=True, exist_ok=True)
            kept = given.failures / f"{name}-{given.seed}-{failure.number}"
            kept.write_bytes(failure.raw)
            sys.exit(f"{failure}\n{name}: the input is in {kept}")
        print(json.dumps(asdict(result)))
        if given.output is not None:
            known = json.loads(given.output.read_text()) if given.output.exists() else {}
            given.output.write_text(json.dumps(known | {name: asdict(result)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
