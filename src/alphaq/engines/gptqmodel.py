"""The GPTQModel profile: every expert and projection chooses alone, in the GPTQ v2 layout.

A matrix X becomes `X.qweight` (int32 [in·b/32, out], q least significant bits first along a column), `X.qzeros`
(int32 [in/g, out·b/32], along a row), `X.scales` (float16 [in/g, out]) and `X.g_idx` (int32 [in], the group of each
input). Our packed codes and zero points are these words, transposed.

A GPTQ file stores zero points whether or not they are all equal, so a symmetric choice would save nothing: only
asymmetric ones are offered. They are packed as they are (v2); v1 stores the zero point minus one and so has no
place for zero. Source: TorchLinear of GPTQModel 7.7, which runs on any device.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import alphaq
from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import TensorSpec
from alphaq.engines.assumptions.tables import family_settings
from alphaq.engines.export import Rows, Run
from alphaq.engines.safetensors.engine import SafetensorsEngine, ragged, words
from alphaq.engines.safetensors.modules import KEPT, linear_choices, module_patterns
from alphaq.errors import ArchitectureError, MissingEngineError, PlanError
from alphaq.formats.blocks import dequantized_rows
from alphaq.formats.native import GROUP_SIZES
from alphaq.formats.packing import pack, unpack
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role, Shape
from alphaq.nouns.plan import Plan
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.work.untrusted import JsonObject

NAME = "gptqmodel"
BITS = (2, 3, 4, 8)
HEAD = "lm_head"
_LAYER = re.compile(r".*\b(?:layers|blocks)\.\d+\.")
PACKED_ROWS = 32  # 32 codes fill whole int32 words at every width


def obstacle(choice: Choice, matrix: MatrixRef) -> str | None:
    """Codes are packed along the columns and zero points along the rows, in whole words; groups are whole too."""
    rows, columns = matrix.shape
    if not choice.kept and (rows % PACKED_ROWS or columns % PACKED_ROWS):
        return f"its shape {rows}×{columns} is not in multiples of {PACKED_ROWS}"
    return ragged(choice, matrix)


def tensors(choice: Choice, shape: Shape, dtype: str) -> dict[str, TensorSpec]:
    """Codes, zero points, scales (float16, whatever the model's type is) and the group of each column."""
    (rows, columns), groups = shape, choice.groups(shape[1])
    return {
        "qweight": TensorSpec("I32", (words(columns, choice.bits), rows)),
        "qzeros": TensorSpec("I32", (groups, words(rows, choice.bits))),
        "scales": TensorSpec("F16", (groups, rows)),
        "g_idx": TensorSpec("I32", (columns,)),
    }


def renamed(checkpoint: Checkpoint, tensor: str) -> str:
    """A tensor's name in the model that transformers 5 builds and GPTQModel fills."""
    return ENGINE.lines(checkpoint).called(tensor)


def module_path(checkpoint: Checkpoint, matrix: MatrixRef) -> str:
    """The module that a matrix belongs to, in the model that GPTQModel fills: its experts are taken apart."""
    module = renamed(checkpoint, matrix.name).removesuffix(".weight")
    if matrix.role is Role.EXPERT:
        return f"{module.rpartition('.')[0]}.{matrix.projection}_proj"
    return module


def keeps(checkpoint: Checkpoint, matrix: MatrixRef) -> str | None:
    """Why GPTQModel must have a matrix in 16 bits, or None."""
    module = module_path(checkpoint, matrix)
    if matrix.role is Role.HEAD and module != HEAD:
        return f"it loads quantized heads by the name {HEAD} alone"
    if not checkpoint.architecture.num_experts_keys or matrix.role is Role.HEAD:
        return None
    known = family_settings(NAME, checkpoint.architecture, checkpoint.text_config.get("model_type"))
    within = _LAYER.sub("", module)
    if within == module or not any(re.fullmatch(one, within) for one in known.lines.taken):
        return f"it has no place for quantized weights there in models of {checkpoint.architecture.name}"
    return None


def refuse(checkpoint: Checkpoint) -> None:
    """Raise ArchitectureError for a model around a language model that GPTQModel does not know."""
    kind = str(checkpoint.config.get("model_type"))
    if checkpoint.text_config != checkpoint.config and kind not in checkpoint.architecture.model_types:
        raise ArchitectureError(
            f"config.json: {kind!r} holds a {checkpoint.architecture.name!r} language model beside others. It is not "
            "known how GPTQModel loads this one. Use --engine native."
        )


def quantization_config(checkpoint: Checkpoint, choices: Mapping[str, Choice]) -> JsonObject:
    """What config.json and quantize_config.json say; empty if nothing is quantized.

    The most common choice is the rule; `dynamic` holds the exceptions as regular expressions, of which the first that
    matches counts (they exclude one another): `+:` for another choice, `-:` for what is kept.
    """
    known = linear_choices(checkpoint, choices, module_path)
    modules: dict[Choice, list[str]] = {}
    for module, choice in known.items():
        modules.setdefault(choice, []).append(module)
    counts = Counter({choice: len(names) for choice, names in modules.items() if choice != KEPT})
    if not counts:
        return {}
    (usual, _), *_ = counts.most_common(1)
    dynamic = {
        f"{'-' if choice == KEPT else '+'}:^{pattern}$": {} if choice == KEPT else _settings(choice)
        for choice, names in sorted(modules.items())
        if choice != usual
        for pattern in module_patterns(names, known)
    }
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        **_settings(usual),
        "desc_act": False,
        "sym": False,
        "lm_head": known.get(HEAD, KEPT) != KEPT,
        "pack_dtype": "int32",
        "dynamic": dynamic,
        "meta": {"quantizer": [f"alphaq:{alphaq.__version__}"]},
    }


def _settings(choice: Choice) -> dict[str, int]:
    return {"bits": choice.bits, "group_size": choice.group_size}


def config(checkpoint: Checkpoint, plan: Plan) -> JsonObject:
    """The quantization, if there is any."""
    found = quantization_config(checkpoint, plan.every_choice())
    return {"quantization_config": found} if found else {}


def encode(matrix: QuantizedMatrix) -> tuple[torch.Tensor, ...]:
    """qweight, qzeros, scales and g_idx."""
    choice, columns = matrix.choice, matrix.shape[1]
    assert matrix.offsets is not None  # only asymmetric choices are offered
    zeros = torch.from_numpy(pack(matrix.offsets.T.contiguous().numpy(), choice.bits))
    return matrix.codes.view(torch.int32).T, zeros.view(torch.int32), matrix.scales.T, _group_of(choice, columns)


def _group_of(choice: Choice, columns: int) -> torch.Tensor:
    return torch.arange(columns, dtype=torch.int32) // choice.group_size


def reader(parts: Sequence[torch.Tensor], choice: Choice, shape: Shape, name: str) -> Rows:
    """Rows in float32. GPTQModel is not used: it cannot be installed beside the versions that we need."""
    specs = tensors(choice, shape, "").values()
    qweight, qzeros, scales, _ = (part.view(spec.shape) for part, spec in zip(parts, specs, strict=True))
    zeros = unpack(qzeros.contiguous().view(torch.uint8).numpy(), choice.bits, shape[0])
    matrix = QuantizedMatrix(
        choice,
        shape,
        qweight.T.contiguous().view(torch.uint8),
        scales.T.contiguous(),
        torch.from_numpy(zeros).T.contiguous(),
    )
    return lambda rows: dequantized_rows(matrix, rows)


_RUN = (
    "import json,sys; sys.path[:]=json.loads(sys.argv[1]); import alphaq.engines.gptqmodel as g; g.run(*sys.argv[2:])"
)


def logits(folder: Path, ids: Sequence[int]) -> torch.Tensor:
    """What GPTQModel's TorchLinear computes in float32, float32 [tokens, words].

    In a process of its own: GPTQModel exchanges classes of transformers for its own, which would not build the model
    with the restored weights. Raises MissingEngineError, and PlanError where it cannot load the model.
    """
    if find_spec("gptqmodel") is None:
        raise MissingEngineError("GPTQModel", "gptqmodel")
    with TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.safetensors"
        arguments = [json.dumps(sys.path), str(folder), json.dumps(list(ids)), str(out)]
        ran = subprocess.run([sys.executable, "-c", _RUN, *arguments], capture_output=True, text=True)
        if ran.returncode:
            raise PlanError(_why_not(folder, ran.returncode, ran.stderr))
        return load_file(out)["logits"]


def _why_not(folder: Path, code: int, stderr: str) -> str:
    """Why the other process ended without logits."""
    if code < 0:
        return (
            f"GPTQModel was killed while it ran {folder} (signal {-code}), by lack of memory most likely: it holds the "
            "model in float16 and float32 at once. Use a machine with more, or leave --run out."
        )
    lines = stderr.strip().splitlines() or ["it said nothing"]
    said = next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)), lines[-1])
    return f"GPTQModel cannot run {folder} ({said:.300}). Use --engine native."


def run(folder: str, ids: str, out: str) -> None:
    """The other process' work: ids as JSON, the file for the logits."""
    save_file({"logits": logits_here(Path(folder), json.loads(ids))}, out)


def logits_here(folder: Path, ids: Sequence[int]) -> torch.Tensor:
    """`logits` in this process, whose classes of transformers are others from then on."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # it would compile each module
    from gptqmodel import GPTQModel

    # It rounds all to the type that it loads in, and has no float32. Scales are exact in float16; what is kept in
    # bfloat16 or float32 may be larger or finer than that, so it is read again.
    model = GPTQModel.load(str(folder), backend="gptq_torch", device="cpu", dtype=torch.float16).model.float()
    _read_again(folder, model.state_dict())
    with torch.inference_mode():
        values: torch.Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0]
    return values.contiguous()


def _read_again(folder: Path, loaded: Mapping[str, torch.Tensor]) -> None:
    """Fill what a model shares with a file by name, shape and kind, as stored."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as stored, torch.no_grad():
            for name in set(stored.keys()) & loaded.keys():
                values = stored.get_tensor(name)
                if values.is_floating_point() and values.shape == loaded[name].shape:
                    loaded[name].copy_(values)


def damage(choice: Choice, shape: Shape, parts: Sequence[torch.Tensor]) -> str:
    """What is wrong with tensors of the right shapes."""
    return "" if torch.equal(parts[3], _group_of(choice, shape[1])) else "has groups out of order in g_idx"


ENGINE = SafetensorsEngine(
    name=NAME,
    title="GPTQModel",
    summary="GPTQ v2: 2, 3, 4, 8 bit, each expert and projection on its own",
    unit="matrix",
    obstacle=obstacle,
    config_file="quantize_config.json",
    keeps=keeps,
    on_request=frozenset({Role.HEAD}),
    renamed=renamed,
    refuse=refuse,
    quantized=tuple(Choice(bits, group_size) for bits in BITS for group_size in GROUP_SIZES),
    group_size=128,  # GPTQModel's own
    quantizer="debiased",
    module=module_path,
    tensors=tensors,
    shape=lambda choice, stored: (stored[2].shape[1], stored[3].shape[0]),
    encode=encode,
    damage=damage,
    reader=reader,
    config=config,
    usage="Run it: python -c \"from gptqmodel import GPTQModel; GPTQModel.load('{out}', backend='gptq_torch')\"",
    run=Run("GPTQModel", logits, tolerance=0.01),
)
PROFILE = ENGINE.profile()
