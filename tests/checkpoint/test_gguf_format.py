import contextlib
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alphaq.checkpoint.gguf.format import layout, read_gguf
from alphaq.checkpoint.gguf.values import GgufValue
from alphaq.errors import CheckpointError, OutputError
from alphaq.formats.ggml import GGML_TYPES

TYPES = gguf.GGUFValueType
ALL_TYPES: dict[str, tuple[Any, Any]] = {
    # name: (an own value, the number it stands for in gguf)
    "uint8": (255, TYPES.UINT8),
    "int8": (-128, TYPES.INT8),
    "uint16": (65535, TYPES.UINT16),
    "int16": (-1, TYPES.INT16),
    "uint32": (2**32 - 1, TYPES.UINT32),
    "int32": (-(2**31), TYPES.INT32),
    "float32": (0.5, TYPES.FLOAT32),
    "bool": (True, TYPES.BOOL),
    "string": ("größer als <0x0A>\n", TYPES.STRING),
    "uint64": (2**64 - 1, TYPES.UINT64),
    "int64": (-(2**63), TYPES.INT64),
    "float64": (1e300, TYPES.FLOAT64),
}
TENSORS = {
    "blk.0.ffn_up_exps.weight": ("Q4_K", (3, 5, 256)),
    "odd": ("F32", (7,)),
    "half": ("F16", (3, 5)),
    "brain": ("BF16", (2, 2, 3, 1)),
    "codes": ("Q8_0", (3, 64)),
}


def own_metadata() -> dict[str, GgufValue]:
    metadata = {f"one.{name}": GgufValue.of(name, value) for name, (value, _) in ALL_TYPES.items()}
    return metadata | {f"two.{name}": GgufValue.array(name, [value] * 2) for name, (value, _) in ALL_TYPES.items()}


def write_own(path: Path, tensors: Any = TENSORS, metadata: Any = None) -> Path:
    header, _, total = layout(own_metadata() if metadata is None else metadata, tensors)
    path.write_bytes(header + bytes(range(256)) * (total // 256 + 1))
    with path.open("r+b") as file:
        file.truncate(total)
    return path


def theirs(path: Path, **options: Any) -> gguf.GGUFWriter:
    """The other library's writer of a file with a value of every type."""
    writer = gguf.GGUFWriter(path, "qwen2moe", **options)
    for name, (value, type) in ALL_TYPES.items():
        writer.add_key_value(f"one.{name}", value, type)
        writer.add_key_value(f"two.{name}", [value] * 2, TYPES.ARRAY, type)
    return writer


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_type_of_the_gguf_package_is_known() -> None:
    sizes = {kind.name: (int(kind), *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert sizes.items() <= {name: tuple(kind) for name, kind in GGML_TYPES.items()}.items()


def test_a_file_of_the_gguf_package_reads_equal(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = theirs(path)
    data = {"a": np.arange(12, dtype=np.float32).reshape(2, 2, 3), "b": np.ones(5, np.float16)}
    for name, values in data.items():
        writer.add_tensor(name, values)
    writer.add_tensor("c", np.zeros((3, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    finish(writer)
    found = read_gguf(path)
    for name, (value, _) in ALL_TYPES.items():
        assert found.metadata[f"one.{name}"].value == value
        assert found.metadata[f"two.{name}"].value == (value, value)
        assert (found.metadata[f"one.{name}"].type, found.metadata[f"two.{name}"].element) == (name, name)
    assert [(t.name, t.type, t.shape) for t in found.tensors.values()] == [
        ("a", "F32", (2, 2, 3)),
        ("b", "F16", (5,)),
        ("c", "Q8_0", (3, 32)),
    ]
    raw = path.read_bytes()
    for name, values in data.items():
        assert raw[found.tensors[name].begin : found.tensors[name].end] == values.tobytes()


@pytest.mark.parametrize("alignment", [None, 1, 8, 4096])
def test_our_header_is_the_gguf_package_s_own(tmp_path: Path, alignment: int | None) -> None:
    """Same metadata, same tensors: the same bytes, and their reader finds each tensor where ours puts it."""
    metadata = {"general.architecture": GgufValue.of("string", "qwen2moe")}
    for name, (value, _) in ALL_TYPES.items():
        metadata[f"one.{name}"] = GgufValue.of(name, value)
        metadata[f"two.{name}"] = GgufValue.array(name, [value] * 2)
    writer = theirs(tmp_path / "theirs.gguf")
    if alignment is not None:
        metadata["general.alignment"] = GgufValue.of("uint32", alignment)
        writer.add_custom_alignment(alignment)
    for name, (type, shape) in TENSORS.items():
        kind = GGML_TYPES[type]
        rows = np.zeros((*shape[:-1], shape[-1] // kind.block_weights * kind.block_bytes), np.uint8)
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType(kind.number))
    finish(writer)
    expected = (tmp_path / "theirs.gguf").read_bytes()
    header, places, total = layout(metadata, TENSORS)
    assert header == expected[: len(header)]
    assert total == len(expected)
    for tensor in gguf.GGUFReader(tmp_path / "theirs.gguf").tensors:
        assert (places[tensor.name].begin, places[tensor.name].nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert places[tensor.name].begin % (alignment or 32) == 0


def test_what_is_laid_out_reads_the_same(tmp_path: Path) -> None:
    path = write_own(tmp_path / "x.gguf")
    found = read_gguf(path)
    header, places, total = layout(own_metadata(), TENSORS)
    assert found.metadata == own_metadata()
    assert list(found.metadata) == list(own_metadata())
    assert {name: (t.type, t.shape) for name, t in found.tensors.items()} == TENSORS
    assert all((found.tensors[n].begin, found.tensors[n].end) == (p.begin, p.end) for n, p in places.items())
    assert (layout(found.metadata, TENSORS)[0], path.stat().st_size) == (header, total)


def test_values_keep_their_bits(tmp_path: Path) -> None:
    """Also those that Python would change: a signalling NaN, a bool that is neither 0 nor 1."""
    metadata = {"nan": GgufValue("float32", b"\1\0\xa0\x7f"), "bool": GgufValue("bool", b"\2")}
    assert read_gguf(write_own(tmp_path / "x", {}, metadata)).metadata == metadata


def test_empty_arrays_and_texts_survive(tmp_path: Path) -> None:
    metadata = {"a": GgufValue.array("uint32", []), "b": GgufValue.array("string", ["", "x"])}
    found = read_gguf(write_own(tmp_path / "x", {}, metadata))
    assert found.metadata == metadata
    assert [value.value for value in found.metadata.values()] == [(), ("", "x")]


def test_values_that_do_not_fit_are_refused() -> None:
    for type, value in (("uint8", 256), ("uint32", -1), ("float32", 1e40), ("string", 3), ("int32", 1.5)):
        with pytest.raises(OutputError, match=f"cannot be written to GGUF metadata as {type}"):
            GgufValue.of(type, value)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("x" * 64, ("F32", (4,)), "names of up to 63 bytes"),
        ("x", ("F32", (1, 1, 1, 1, 1)), "1 to 4 dimensions"),
        ("x", ("Q4_K", (256, 32)), "whole Q4_K blocks of 256"),
    ],
)
def test_tensors_that_no_reader_would_load_are_refused(name: str, tensor: Any, message: str) -> None:
    with pytest.raises(OutputError, match=message):
        layout({}, {name: tensor})


def test_a_large_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    tokens = GgufValue.array("string", [f"token {number}" for number in range(250_000)])
    path = write_own(tmp_path / "x", {}, {"tokenizer.ggml.tokens": tokens})
    begin = time.process_time()
    assert read_gguf(path).metadata["tokenizer.ggml.tokens"] == tokens
    assert time.process_time() - begin < 1


def split(folder: Path, tensors: int = 5) -> list[Path]:
    """A model in parts of two tensors, written by the other library."""
    writer = theirs(folder / "x.gguf", split_max_tensors=2)
    for number in range(tensors):
        writer.add_tensor(f"t{number}", np.full((2, 8), number, np.float32))
    finish(writer)
    return sorted(folder.glob("x-*.gguf"))


def test_a_split_model_reads_as_one(tmp_path: Path) -> None:
    parts = split(tmp_path)
    found = read_gguf(parts[0])
    assert found.files == tuple(part.name for part in parts)
    assert [tensor.file for tensor in found.tensors.values()] == [parts[n // 2].name for n in range(5)]
    assert found.metadata["one.uint64"].value == 2**64 - 1
    assert not any(key.startswith("split.") for key in found.metadata)
    assert read_gguf(parts[2]) == found
    for number, tensor in enumerate(found.tensors.values()):
        data = (tmp_path / tensor.file).read_bytes()[tensor.begin : tensor.end]
        assert data == np.full((2, 8), number, np.float32).tobytes()


def test_a_split_model_that_lacks_a_part_names_it(tmp_path: Path) -> None:
    parts = split(tmp_path)
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"x-00002-of-00003\.gguf cannot be read: No such file"):
        read_gguf(parts[0])


def test_parts_in_the_wrong_place_are_refused(tmp_path: Path) -> None:
    parts = split(tmp_path)
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(CheckpointError, match=r"x-00002-of-00003\.gguf: split\.no is 2, not 1"):
        read_gguf(parts[0])
    parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="original names"):
        read_gguf(tmp_path / "model.gguf")


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, type: int, raw: bytes) -> bytes:
    return text(name) + struct.pack("<I", type) + raw


def tensor(name: str = "t", shape: tuple[int, ...] = (8,), type: int = 0, offset: int = 0, claimed: int = -1) -> bytes:
    dimensions = len(shape) if claimed < 0 else claimed
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", dimensions, *shape, type, offset)


def file_of(keys: list[bytes], tensors: list[bytes], counts: tuple[int, int] | None = None, data: int = 64) -> bytes:
    tensor_count, key_count = counts or (len(tensors), len(keys))
    header = b"GGUF" + struct.pack("<IQQ", 3, tensor_count, key_count) + b"".join(keys + tensors)
    return header.ljust(-(-len(header) // 32) * 32, b"\0") + bytes(data)


HUGE = 2**60


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not a GGUF file"),
        (b"GGUF", "not a GGUF file"),
        (b"\x80\x04." + bytes(40), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1;"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big endian"),
        (file_of([], [], (HUGE, 0)), f"claims {HUGE} tensors"),
        (file_of([], [], (0, HUGE)), f"claims {HUGE} keys"),
        (file_of([], [tensor()], (3, 0), 0), "3 tensors|beyond"),
        (file_of([struct.pack("<Q", HUGE) + bytes(40)], []), f"claims {HUGE} bytes, beyond"),
        (file_of([key("k", 8, struct.pack("<Q", 2**63) + bytes(40))], []), "beyond"),
        (file_of([key("k", 9, struct.pack("<IQ", 4, HUGE))], []), f"claims {HUGE} values of k"),
        (file_of([key("k", 9, struct.pack("<IQ", 8, HUGE))], []), f"claims {HUGE} values of k"),
        (file_of([key("k", 9, struct.pack("<IQ", 9, 1))], []), "array of arrays"),
        (file_of([key("k", 13, bytes(8))], []), "unknown type 13"),
        (file_of([key("k", 9, struct.pack("<IQ", 99, 1))], []), "unknown type 99"),
        (file_of([key("k", 4, bytes(4))] * 2, []), "'k' appears twice"),
        (file_of([key("", 4, bytes(4))], []), "not printable"),
        (file_of([key("a\nb", 4, bytes(4))], []), "not printable"),
        (file_of([key(b"\xff\xfe", 4, bytes(4))], []), "not UTF-8"),
        (file_of([key("k", 8, text(b"\xc3"))], []), "not UTF-8"),
        (file_of([key("k", 9, struct.pack("<IQ", 8, 1) + text(b"\xc3"))], []), "not UTF-8"),
        (file_of([key("general.alignment", 4, struct.pack("<I", 0))], []), "power of two"),
        (file_of([key("general.alignment", 4, struct.pack("<I", 24))], []), "power of two"),
        (file_of([key("general.alignment", 8, text("32"))], []), "power of two"),
        (file_of([key("split.count", 8, text("3"))], []), "split.count is not a count"),
        (file_of([], [tensor(), tensor()]), "'t' appears twice"),
        (file_of([], [tensor(), tensor("u")]), "'[tu]' overlaps another"),
        (file_of([], [tensor(offset=1)]), "begins at no multiple of 32"),
        (file_of([], [tensor(offset=64)]), "ends at byte"),
        (file_of([], [tensor(offset=2**63)]), "ends at byte"),
        (file_of([], [tensor(shape=(8, 2, 2))]), "ends at byte"),
        (file_of([], [tensor(shape=(2**40, 2**40, 2**40, 2**40))]), "ends at byte"),
        (file_of([], [tensor(shape=(1,) * 5)]), "5 dimensions"),
        (file_of([], [tensor(claimed=2**32 - 1)]), "4294967295 dimensions"),
        (file_of([], [tensor(type=31)]), "ggml type 31"),
        (file_of([], [tensor(type=12, shape=(32, 8))]), "no whole Q4_K blocks"),
    ],
)
def test_damaged_header_is_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf(path)
    assert "bad.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_text_as_long_as_a_large_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(file_of([key("k", 8, struct.pack("<Q", 2**40))], []))
    with path.open("r+b") as file:
        file.truncate(2**41)  # sparse
    with pytest.raises(CheckpointError, match="beyond the 100000000 bytes allowed"):
        read_gguf(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(CheckpointError, match=f"{path.name} cannot be read"):
            read_gguf(path)


fuzz = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=5000)


@fuzz
@given(st.binary(max_size=200))
def test_any_bytes_give_a_header_or_a_typed_error(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "fuzz").write_bytes(b"GGUF\3\0\0\0" + raw)
    with contextlib.suppress(CheckpointError):
        read_gguf(tmp_path / "fuzz")


@fuzz
@given(data=st.data())
def test_any_damage_gives_a_header_or_a_typed_error(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(write_own(tmp_path / "whole").read_bytes())
    header = len(layout(own_metadata(), TENSORS)[0])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(8, header - 8))
        width = data.draw(st.sampled_from([1, 4, 8]))
        raw[place : place + width] = data.draw(st.sampled_from([b"\0", b"\1", b"\xff"])) * width
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    (tmp_path / "fuzz").write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        for value in read_gguf(tmp_path / "fuzz").metadata.values():
            assert value.value is not None
