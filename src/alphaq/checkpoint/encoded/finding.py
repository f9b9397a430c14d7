"""Which stored tensors are codes, which help to decode them, and how: by names, dtypes and shapes, not by data.

What a checkpoint announces says little of each tensor, and often wrongly; its dtype and the shape of its scales say all
but the width of packed integers. Whatever is read besides codes is no tensor of the model: scales and zero points
belong to their codes, shapes and the scales of activations to nobody.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from alphaq.checkpoint.encoded.announced import COMPRESSED_TENSORS, FP8, MXFP4, Announcement
from alphaq.checkpoint.encoded.encodings import MXFP4_COLUMNS, packed_bits
from alphaq.checkpoint.encoded.scale_grids import EXPONENTS, NUMBERS, Form, Shape, misfit, required_grid, single
from alphaq.checkpoint.safetensors_format import TORCH_DTYPES
from alphaq.checkpoint.tensors import Encoding, Part, TensorInfo
from alphaq.errors import CheckpointError

Shards = Mapping[str, Mapping[str, TensorInfo]]
Read = Callable[[str, TensorInfo], Tensor]
"""The bytes of a stored tensor of a shard."""

_MXFP4_BYTES = 16
_PACKED_WIDTHS = (2, 4, 8)
_WORD_BITS = 32
_HELPERS = re.compile(r".*([._]q?scale(_inv|_2|_weight|_act)?|_zero_point|_shape|_g_idx)")
_INPUTS = (
    *(".input_scale", ".activation_scale", ".input_global_scale", ".input_zero_point", ".qscale_act"),
    *(".output_scale", ".output_zero_point", "_input_scale", "_activation_scale"),
)
_CACHE = re.compile(r".*att(n|ention)[\w.]*\.(q|k|v|kv)_(scale|zero_point|cache_scale)")


@dataclass(frozen=True)
class _Names:
    """Where codes' decoded values and what helps to decode them are named."""

    decoded: str
    scales: tuple[str, ...]
    factors: tuple[str, ...]
    divisor: str
    zero_points: str
    shape: str
    order: str

    @classmethod
    def of(cls, codes: str) -> _Names:
        """By the name of codes."""
        weight = codes.removesuffix("_packed")
        module = weight.removesuffix(".weight")
        stems = [weight] if module != weight else [weight, f"{weight}_weight"]  # stacks of experts are no modules
        scales = [f"{stem}{end}" for stem in stems for end in ("_scale_inv", "_scale")]
        if module != weight:
            scales += [f"{module}.scale", f"{module}.qscale_weight"]
        factors = tuple(f"{stem}_scale_2" for stem in stems)
        others = (f"{weight}{end}" for end in ("_global_scale", "_zero_point", "_shape", "_g_idx"))
        return cls(weight, tuple(scales), factors, *others)


@dataclass
class _Finder:
    """All tensors of a checkpoint by name, with their shards, and the names that some codes need."""

    places: Mapping[str, tuple[str, TensorInfo]]
    announcement: Announcement
    read: Read
    used: set[str] = field(default_factory=set)

    def first(self, names: Sequence[str]) -> str | None:
        """The one of these names that is stored, which is then of no model. Raises CheckpointError for two."""
        stored = [name for name in names if name in self.places]
        if len(stored) > 1:
            raise CheckpointError(f"{stored[0]} and {stored[1]} are scales of the same weight. Download it again.")
        self.used.update(stored)
        return stored[0] if stored else None

    def part(self, name: str, shape: Shape, height: int) -> Part:
        """A stored tensor that helps to decode, seen in a shape of the same number of elements."""
        shard, info = self.places[name]
        return Part(info if info.shape == shape else replace(info, shape=shape), shard, height)


def decoded_shards(shards: Shards, announcement: Announcement, read: Read) -> dict[str, dict[str, TensorInfo]]:
    """Tensors by shard as they are once decoded; what helps to decode, and shards of nothing else, are no longer there.

    read: asked only for the shapes of packed integers whose scales do not tell them. Raises CheckpointError, naming
    the tensor, for codes without scales, scales without codes, shapes and dtypes that do not fit, and forms that
    cannot be decoded.
    """
    places = {name: (shard, info) for shard, tensors in shards.items() for name, info in tensors.items()}
    finder = _Finder(places, announcement, read)
    coded = {name: _decoded(finder, info) for name, (_, info) in places.items() if _is_code(finder, info)}
    decoded: dict[str, dict[str, TensorInfo]] = {}
    for name, (shard, info) in places.items():
        if name in finder.used or _is_of_inputs(name, places) or _is_of_cache(info):
            continue
        if name not in coded:
            _require_of_model(finder, info, coded)
        elif coded[name].name != name and coded[name].name in places:
            raise CheckpointError(f"{coded[name].name} is stored twice, as {name} too. Keep one of them.")
        info = coded.get(name, info)
        decoded.setdefault(shard, {})[info.name] = info
    return decoded


def _is_code(finder: _Finder, info: TensorInfo) -> bool:
    name = info.name
    if finder.announcement.method == MXFP4 and name.endswith("_blocks"):
        return True
    if name.endswith("_packed"):
        return info.dtype in ("I32", "U8")
    if _HELPERS.fullmatch(name):
        return False
    if info.dtype == "F8_E4M3":
        return True
    return info.dtype in ("I8", "U8") and any(scales in finder.places for scales in _Names.of(name).scales)


def _is_of_inputs(name: str, places: Mapping[str, object]) -> bool:
    """Whether a tensor belongs to activations: engines that compute in few bits need it, weights do not."""
    stems = (name.removesuffix(end) for end in _INPUTS if name.endswith(end))
    return any(f"{stem}{weight}" in places for stem in stems for weight in (".weight", ".weight_packed", ""))


def _is_of_cache(info: TensorInfo) -> bool:
    """Whether a tensor is the scale of the cache of keys and values, which is an engine's."""
    return _CACHE.fullmatch(info.name) is not None and math.prod(info.shape) == 1


def _require_of_model(finder: _Finder, info: TensorInfo, coded: Mapping[str, object]) -> None:
    """Raise CheckpointError for what can only belong to codes that are not there, or that no rule here knows."""
    name, method = info.name, finder.announcement.method
    if name.endswith(".pre_quant_scale"):
        raise CheckpointError(
            f"{name} multiplies a layer's inputs (AWQ), which cannot be decoded. Start from the 16-bit checkpoint."
        )
    ends: tuple[str, ...] = (
        "_scale_inv",
        ".weight_scale",
        ".weight_scale_2",
        ".weight_global_scale",
        ".weight_zero_point",
    )
    ends = (*ends, ".weight_shape", ".weight_g_idx", ".qscale_weight", "_scales" if method == MXFP4 else "_scale_inv")
    end = next((end for end in ends if name.endswith(end)), None)
    if end is None and info.dtype != "F8_E8M0":
        return
    codes = f"{name.removesuffix(end)}{'_blocks' if end == '_scales' else ''}" if end else "what they scale"
    codes = f"{codes}.weight" if end and end.startswith((".weight", ".qscale")) else codes
    what = "are scales" if "scale" in (end or "scale") else "belongs to codes"
    raise CheckpointError(f"{name} {what}, but {codes} is not there as {method}. Download it again.")


# -- one tensor -----------------------------------------------------------------------------------


def _decoded(finder: _Finder, codes: TensorInfo) -> TensorInfo:
    """What codes stand for."""
    if codes.name.endswith("_blocks"):
        return _gpt_oss(finder, codes)
    names = _Names.of(codes.name)
    if names.order in finder.places:
        raise CheckpointError(
            f"{names.order} groups columns in an order of its own (actorder), which cannot be decoded. Start from the "
            "16-bit checkpoint."
        )
    expected = "_scale" if finder.announcement.method != FP8 else "_scale_inv"
    name = finder.first(names.scales)
    if name is None:
        raise _no_scales(codes.name, f"{names.decoded}{expected}")
    scales = finder.places[name][1]
    if len(codes.shape) not in (2, 3) or 0 in codes.shape:
        raise _unfit(codes, "a matrix, or one to each expert")
    form = _form(finder, codes, scales)
    finder.first([names.shape])
    block, seen = required_grid(form, scales)
    mxfp4 = form.scheme == "fp4" and scales.dtype in EXPONENTS and block == (1, MXFP4_COLUMNS)
    encoding = Encoding(
        "mxfp4" if mxfp4 else form.scheme,
        block,
        finder.part(name, seen, block[0]),
        columns=form.shape[-1] if codes.dtype == "I32" else 0,
        label=_label(form.scheme, scales),
    )
    encoding = _with_tensor_scale(finder, encoding, codes, names)
    encoding = _with_zero_points(finder, encoding, codes, names.zero_points)
    dtype = "F16" if scales.dtype == "F16" else "BF16"
    return replace(codes, name=names.decoded, dtype=dtype, shape=form.shape, encoding=encoding)


def _gpt_oss(finder: _Finder, codes: TensorInfo) -> TensorInfo:
    """Stacked experts as transformers' class has them: [experts, columns, rows]."""
    stem = codes.name.removesuffix("_blocks")
    name = finder.first([f"{stem}_scales"])
    if name is None:
        raise _no_scales(codes.name, f"{stem}_scales")
    if codes.dtype != "U8" or len(codes.shape) != 4 or codes.shape[-1] != _MXFP4_BYTES or 0 in codes.shape:
        raise _unfit(codes, f"U8 [experts, rows, columns / {MXFP4_COLUMNS}, {_MXFP4_BYTES}]")
    scales, (experts, rows, groups, _) = finder.places[name][1], codes.shape
    if scales.dtype not in EXPONENTS or scales.shape != codes.shape[:-1]:
        raise misfit(codes, scales, EXPONENTS, [codes.shape[:-1]])
    part = finder.part(name, scales.shape, 1)
    encoding = Encoding("mxfp4", (1, MXFP4_COLUMNS), part, turned=True, label="MXFP4")
    return replace(codes, name=stem, dtype="BF16", shape=(experts, groups * MXFP4_COLUMNS, rows), encoding=encoding)


def _form(finder: _Finder, codes: TensorInfo, scales: TensorInfo) -> Form:
    """By the dtypes of codes and scales. Raises CheckpointError for those that do not belong together."""
    method, columns = finder.announcement.method, codes.shape[-1]
    if codes.dtype == "I32":
        _require_dtype(codes, scales, NUMBERS)
        bits, columns = _packed(finder, codes, scales)
        scheme = f"packed{bits}"
    elif codes.dtype == "F8_E4M3":
        _require_dtype(codes, scales, (*NUMBERS, *EXPONENTS))
        scheme = "fp8"
    elif codes.dtype == "I8" and method == COMPRESSED_TENSORS:
        _require_dtype(codes, scales, NUMBERS)
        scheme = "int8"
    else:
        # Other tools' bytes may be integers; only transformers' FP8 has 4-bit floats with scales of more than 8 bits.
        _require_dtype(codes, scales, (*EXPONENTS, "F8_E4M3", *(NUMBERS if method == FP8 else ())))
        scheme, columns = "fp4", 2 * columns
    shape = codes.shape if columns == codes.shape[-1] else (*codes.shape[:-1], columns)
    return Form(finder.announcement, codes, scheme, shape)


def _require_dtype(codes: TensorInfo, scales: TensorInfo, dtypes: Sequence[str]) -> None:
    if scales.dtype not in dtypes:
        raise misfit(codes, scales, dtypes, ())


def _label(scheme: str, scales: TensorInfo) -> str:
    if scheme == "fp4":
        return "MXFP4" if scales.dtype in EXPONENTS else "NVFP4" if scales.dtype == "F8_E4M3" else "FP4"
    return "F8_E4M3" if scheme == "fp8" else f"INT{scheme.removeprefix('int').removeprefix('packed')}"


def _packed(finder: _Finder, codes: TensorInfo, scales: TensorInfo) -> tuple[int, int]:
    """Bits and columns of packed integers: by the config's groups and, where these leave a choice, the stored shape."""
    widths_and_sizes, words = finder.announcement.integers, codes.shape[-1]
    groups = scales.shape[-1] if len(scales.shape) == len(codes.shape) else 1
    grouped = {
        (bits, groups * size)
        for bits, size in widths_and_sizes
        if size and -(-groups * size * bits // _WORD_BITS) == words
    }
    if len(grouped) == 1:
        return _readable(codes, *next(iter(grouped)))
    columns = _stored_columns(finder, codes)
    widths = {bits for bits, _ in widths_and_sizes} or set(range(1, 9))
    if columns is None:  # whole words then
        fits = {(bits, words * _WORD_BITS // bits) for bits in widths if len(widths) == 1 and bits > 0}
    else:
        fits = {(bits, columns) for bits in widths if -(-columns * bits // _WORD_BITS) == words}
    if len(fits) != 1:
        raise CheckpointError(
            f"{codes.name}: config_groups, its scales and its stored shape do not tell how many bits a code has in its "
            f"rows of {words} words. Restore config.json, or start from the 16-bit checkpoint."
        )
    return _readable(codes, *next(iter(fits)))


def _readable(codes: TensorInfo, bits: int, columns: int) -> tuple[int, int]:
    if bits not in _PACKED_WIDTHS:
        raise CheckpointError(
            f"{codes.name} is packed in {bits} bits; of packed integers those of {', '.join(map(str, _PACKED_WIDTHS))} "
            "can be decoded. Start from the 16-bit checkpoint."
        )
    return bits, columns


def _stored_columns(finder: _Finder, codes: TensorInfo) -> int | None:
    """The columns that a stored shape names; None if there is no such tensor."""
    name = _Names.of(codes.name).shape
    if name not in finder.places:
        return None
    shard, info = finder.places[name]
    if info.dtype not in ("I64", "I32") or info.shape != (len(codes.shape),):
        raise _unfit(info, f"the shape of {codes.name}")
    *lead, columns = finder.read(shard, info).view(TORCH_DTYPES[info.dtype]).tolist()
    if tuple(lead) != codes.shape[:-1] or not 0 < columns <= codes.shape[-1] * _WORD_BITS:
        raise CheckpointError(
            f"{name} says {[*lead, columns]}, but {codes.name} has the shape {list(codes.shape)}. Download it again."
        )
    return int(columns)


def _with_tensor_scale(finder: _Finder, encoding: Encoding, codes: TensorInfo, names: _Names) -> Encoding:
    """NVFP4 has a second scale, of the whole tensor, that brings the others into the range of 8-bit floats."""
    if encoding.label != "NVFP4":
        return encoding
    name = finder.first([*names.factors, names.divisor])
    if name is None:
        raise _no_scales(codes.name, f"{names.factors[0]} or {names.divisor}")
    info, forms = finder.places[name][1], dict(reversed(list(single(codes.shape[:-2]))))
    seen = forms.get(info.shape)
    if seen is None or info.dtype not in NUMBERS:
        raise misfit(codes, info, NUMBERS, list(forms))
    part = finder.part(name, seen, codes.shape[-2])
    return replace(encoding, divisor=part) if name == names.divisor else replace(encoding, factor=part)


def _with_zero_points(finder: _Finder, encoding: Encoding, codes: TensorInfo, name: str) -> Encoding:
    """Of integers that are not symmetric; packed along the rows if the codes are packed."""
    if finder.first([name]) is None:
        return encoding
    assert encoding.scales is not None
    info, scales = finder.places[name][1], finder.places[encoding.scales.info.name][1]
    if encoding.scheme in ("fp4", "mxfp4"):
        raise CheckpointError(f"{name}: 4-bit floats with zero points cannot be decoded. Start from 16 bits.")
    if info.dtype == "I32" and codes.dtype == "I32" and len(codes.shape) == 2 and encoding.block[0] == 1:
        rows, bits = codes.shape[0], packed_bits(encoding.scheme)
        words = (-(-rows * bits // _WORD_BITS), encoding.scales.info.shape[-1])
        if info.shape != words:
            raise misfit(codes, info, ("I32",), [words])
        return replace(encoding, zero_points=finder.part(name, words, _WORD_BITS // bits))
    if info.dtype not in ("I8", "F8_E4M3", *NUMBERS) or info.shape != scales.shape:
        raise misfit(codes, info, ("I8", *NUMBERS), [scales.shape])
    return replace(encoding, zero_points=finder.part(name, encoding.scales.info.shape, encoding.block[0]))


# -- errors ---------------------------------------------------------------------------------------


def _no_scales(codes: str, scales: str) -> CheckpointError:
    return CheckpointError(
        f"{codes} has no scales: {scales} is not there. Complete the download, or start from the 16-bit checkpoint."
    )


def _unfit(info: TensorInfo, form: str) -> CheckpointError:
    return CheckpointError(
        f"{info.name} is {info.dtype} {list(info.shape)}, not {form}. Download the checkpoint again."
    )
