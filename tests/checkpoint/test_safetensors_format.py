import contextlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from alphaq.checkpoint.safetensors_format import TensorSpec, layout, read_header, total_bytes
from alphaq.checkpoint.writer import Place, create_file, pieces_at, write_at
from alphaq.errors import CheckpointError, OutputError


def test_header_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "empty": torch.zeros(0, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    found, _ = read_header(tmp_path / "x.safetensors")
    assert {name: info.shape for name, info in found.items()} == {n: tuple(t.shape) for n, t in tensors.items()}


def test_written_file_is_read_by_the_library_and_has_the_promised_size(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(3, 5).half(),
        "wörd": torch.randn(2, 2),
        "scalar": torch.tensor(3.0),
    }
    names = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}
    specs = {name: TensorSpec(names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    path = tmp_path / "x.safetensors"
    header, places, nbytes = layout(specs)
    create_file(path, header, nbytes)
    for name in reversed(specs):
        data = memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy())
        write_at(tmp_path, [Place(path.name, places[name].begin, places[name].nbytes)], [data])
    assert path.stat().st_size == total_bytes(specs.items()) == layout(specs)[2]
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert all(info.begin % 2 == 0 for info in read_header(path)[0].values() if info.dtype == "F16")


def test_creating_a_shard_again_keeps_its_data(tmp_path: Path) -> None:
    specs = {"a": TensorSpec("U8", (3,))}
    header, places, nbytes = layout(specs)
    create_file(tmp_path / "x", header, nbytes)
    write_at(tmp_path, [Place("x", places["a"].begin, 3)], [memoryview(b"abc")])
    before = (tmp_path / "x").read_bytes()
    create_file(tmp_path / "x", header, nbytes)
    assert (tmp_path / "x").read_bytes() == before


def test_places_are_filled_in_turn_by_pieces_of_any_size(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(10))
    places = [Place("x", 6, 3), Place("x", 1, 4)]
    checksums = {
        write_at(tmp_path, places, [memoryview(piece) for piece in pieces])
        for pieces in ([b"abcdefg"], [b"ab", b"cdef", b"g"], [b"abc", b"", b"defg"])
    }
    assert len(checksums) == 1
    assert (tmp_path / "x").read_bytes() == b"\0defg\0abc\0"
    assert b"".join(map(bytes, pieces_at(tmp_path, places))) == b"abcdefg"
    for wrong in (b"abcdef", b"abcdefgh"):
        with pytest.raises(OutputError):
            write_at(tmp_path, places, [memoryview(wrong)])


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry()}, b"12", "cut short"),
        ({"a": entry()}, b"123456", "cut short or padded"),
        ({"a": entry(shape=[5])}, b"1234", "does not fill"),
        ({"a": entry(offsets=[1, 5])}, b"12345", "hole"),
        ({"a": entry(), "b": entry(offsets=[2, 6])}, b"123456", "overlaps"),
        ({"a": entry(shape=[-4])}, b"1234", "not counts"),
        ({"a": entry(shape=[2**70], offsets=[0, 2**70])}, b"1234", "not counts"),
        ({"a": entry(shape=[True, 4])}, b"1234", "not counts"),
        ({"a": entry(shape="44")}, b"1234", "not counts"),
        ({"a": entry(offsets=[0])}, b"1234", "lacks"),
        ({"a": 3}, b"1234", "lacks"),
        ({"a": entry(shape=[1] * 20 + [4])}, b"1234", "dimensions"),
        ({"a": entry(dtype="F4")}, b"1234", "cannot be read"),
        ({"a": entry(dtype=["U8"])}, b"1234", "cannot be read"),
        (b"{nonsense", b"", "not valid JSON"),
        (b"\xff\xfe{}", b"", "not valid JSON"),
        (b'{"a":1,"a":2}', b"", "twice"),
        ([1, 2], b"", "not a JSON object"),
        (b"[" * 100_000, b"", "not valid JSON"),
    ],
)
def test_damaged_header_is_refused(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize("length", [10**6, 2**63, 2**64 - 1])
def test_header_longer_than_the_file_is_refused_without_reading_it(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match="claims"):
        read_header(write_raw(tmp_path / "x", {}, length=length))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_header_or_a_typed_error(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "fuzz"
    path.write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        read_header(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=4),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.sampled_from(["U8", "F32"]) | st.floats(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.fixed_dictionaries({"dtype": inner, "shape": inner, "data_offsets": inner})
            ),
            max_leaves=12,
        ),
        max_size=3,
    ),
    st.binary(max_size=16),
)
def test_any_json_header_gives_a_header_or_a_typed_error(tmp_path: Path, header: object, data: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        read_header(write_raw(tmp_path / "fuzz", header, data))
