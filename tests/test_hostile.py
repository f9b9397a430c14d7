"""Files made to do harm: every command ends with a clean error, in time, and writes nothing."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import alphaq as package
from alphaq.checkpoint.config import read_config
from alphaq.checkpoint.files import read_json
from alphaq.checkpoint.gguf.format import read_gguf
from alphaq.checkpoint.gguf.imatrix import read_imatrix
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.checkpoint.safetensors_format import TensorSpec, layout, read_header
from alphaq.checkpoint.weights import read_shards
from alphaq.errors import LONGEST_MESSAGE, AlphaQError, CheckpointError, PlanError
from alphaq.formats.blocks import decode, encode, native_format
from alphaq.formats.table import parse_choice
from alphaq.measuring.cache import Cache, Entry
from alphaq.nouns.plan import Plan
from alphaq.quantizers.debiased import quantize_debiased
from alphaq.work.untrusted import parse_json
from conftest import Ran

Run = Callable[..., Ran]
SOURCES = sorted(Path(package.__file__).parent.rglob("*.py"))
SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """The bundled model, to be tampered with."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def tamper(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_header(path: Path, header: str | bytes, data: bytes = b"") -> Path:
    raw = header.encode() if isinstance(header, str) else header
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(shape: Any = (4,), offsets: Any = (0, 4), dtype: str = "U8") -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


# -- JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ('{"b": {"a": 1, "a": 1}}', "'a' appears twice"),
        ("[" * 60 + "]" * 60, "nested"),
        ("[" * 100_000, "nested"),
        ('{"a":' * 100_000, "nested"),
        ('"\\ud800"', "surrogates"),
        ('{"\\udfff": 1}', "surrogates"),
        (b'"\xed\xa0\x80"', "utf-8"),
        (b"\xff\xfe{}", "utf-8"),
        ("9" * 5000, "4300"),
        ("[" + "0," * 5_000_001, "values"),
    ],
)
def test_json_that_means_two_things_or_too_much_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


@pytest.mark.parametrize(
    "text", ["NaN", "-Infinity", "1e999", "[1, -1e999]", '"\\u001b[2J"', '{"a\\nb": 1}', '"\u202e"']
)
def test_strict_json_has_finite_numbers_and_text_that_can_be_shown(text: str) -> None:
    parse_json(text)
    with pytest.raises(ValueError, match=r"finite|control"):
        parse_json(text, strict=True)


def test_json_of_people_is_read() -> None:
    assert parse_json('{"\\ud83d\\ude00": [1, 2.5, null], "é": {"deep": [[[]]]}}', strict=True) == {
        "😀": [1, 2.5, None],
        "é": {"deep": [[[]]]},
    }


# -- headers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (f'{{"a": {entry()}, "a": {entry()}}}', "twice"),
        (f'{{"a": {entry(offsets=[4, 0])}}}', "does not fill"),
        (f'{{"a": {entry(offsets=[2**63, 2**63 + 4])}}}', "not counts"),
        (f'{{"a": {entry([2**32, 2**32], (0, 0))}}}', "larger than any"),
        (f'{{"a": {entry()}, "b": {entry([0, 2**61, 8], (4, 4))}}}', "larger than any"),
        ('{"a": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 4]}}', "not counts"),
        ('{"a": {"dtype": "U8", "shape": [4.0], "data_offsets": [0, 4]}}', "not counts"),
        (f'{{"{"x" * 2000}": {entry()}}}', "1 to 1000 characters"),
        (f'{{"": {entry()}}}', "1 to 1000 characters"),
        (f'{{"a\\u001b[2J": {entry()}}}', "not printable"),
        (f'{{"\\ud800": {entry()}}}', "surrogates"),
        (b'{"\xff": {}}', "utf-8"),
        (f'{{"a": {entry(dtype="X" * 1_000_000)}}}', "cannot be read"),
        ("{" + ",".join(f'"{number}":[]' for number in range(10)) + "}", "lacks"),
    ],
)
def test_a_hostile_safetensors_header_is_refused(tmp_path: Path, header: str | bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(write_header(tmp_path / "x.safetensors", header, b"1234"))
    assert len(str(caught.value)) <= LONGEST_MESSAGE + 10


def test_a_header_of_countless_values_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    begin = time.process_time()
    with pytest.raises(CheckpointError, match="more than 5000000 values"):
        read_header(write_header(tmp_path / "x", b"[" + b"[]," * 12_000_000 + b"0]"))
    assert time.process_time() - begin < 1


def gguf_bytes(*fields: bytes) -> bytes:
    return (b"GGUF" + struct.pack("<I", 3) + b"".join(fields)).ljust(4096, b"\0")


def gguf_tensor(name: bytes, *shape: int) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, 0)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (gguf_bytes(struct.pack("<QQ", 1, 0), gguf_tensor(b"a", 2**62, 0)), "no elements"),
        (gguf_bytes(struct.pack("<QQ", 1, 0), gguf_tensor(b"a", 2**32, 2**32, 2**32, 2**32)), "ends at byte"),
        (gguf_bytes(struct.pack("<QQ", 1, 0), gguf_tensor(b"x" * 2000, 4)), "1 to 1000 bytes"),
        (gguf_bytes(struct.pack("<QQ", 1, 0), gguf_tensor(b"\xed\xa0\x80", 4)), "not UTF-8"),
        (gguf_bytes(struct.pack("<QQ", 1, 0), gguf_tensor(b"\x1b[2J", 4)), "not printable"),
        (gguf_bytes(struct.pack("<QQ", 2**64 - 1, 2**64 - 1)), "claims"),
    ],
)
def test_a_hostile_gguf_header_is_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "x.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        read_gguf(tmp_path / "x.gguf")


def test_more_texts_than_any_vocabulary_has_are_refused_at_once(tmp_path: Path) -> None:
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 5_000_000)
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(struct.pack("<QQ", 0, 1), key, bytes(8 * 5_000_000)))
    with pytest.raises(CheckpointError, match="more than any vocabulary"):
        read_gguf(tmp_path / "x.gguf")


def split_part(folder: Path, number: int, claimed: int, parts: int = 2) -> Path:
    def key(name: bytes, value: int) -> bytes:
        return struct.pack("<Q", len(name)) + name + struct.pack("<II", 4, value)

    path = folder / f"x-{number:05d}-of-{parts:05d}.gguf"
    path.write_bytes(gguf_bytes(struct.pack("<QQ", 0, 2), key(b"split.no", claimed), key(b"split.count", parts)))
    return path


def test_a_split_into_many_links_to_one_part_stops_at_the_second(tmp_path: Path) -> None:
    first = split_part(tmp_path, 1, 0, 99_999)
    second = tmp_path / "x-00002-of-99999.gguf"
    second.symlink_to(first.name)
    with pytest.raises(CheckpointError, match=r"split\.no is 0, not 1"):
        read_gguf(first)


def test_a_split_into_no_parts_is_one_file(tmp_path: Path) -> None:
    assert len(read_gguf(split_part(tmp_path, 1, 0, 0)).files) == 1


def test_a_part_may_not_be_a_link_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    second = split_part(tmp_path, 2, 1)
    first = split_part(tmp_path / "in", 1, 0)
    (tmp_path / "in" / second.name).symlink_to(second)
    with pytest.raises(CheckpointError, match="link out of its folder"):
        read_gguf(first)


# -- folders --------------------------------------------------------------------------------------


def in_shards(folder: Path, shard: str = "a.safetensors") -> Path:
    """The model's only file under another name, with an index."""
    tensors, _ = read_header(folder / SHARD)
    (folder / SHARD).rename(folder / "a.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
    return folder


@pytest.mark.parametrize(
    "shard",
    [
        "../a.safetensors",
        "/etc/passwd",
        "..",
        "",
        "b/a.safetensors",
        "a.bin",
        "x" * 300 + ".safetensors",
        "a\0.safetensors",
    ],
)
def test_an_index_cannot_name_files_elsewhere(copy: Path, shard: str) -> None:
    with pytest.raises(CheckpointError, match="not a safetensors file of this folder"):
        read_shards(in_shards(copy, shard))


@pytest.mark.parametrize("name", [SHARD, "config.json", "tokenizer.json", "a.safetensors", INDEX])
def test_no_file_may_be_a_link_out_of_the_folder(copy: Path, tmp_path: Path, name: str) -> None:
    if name in ("a.safetensors", INDEX):
        in_shards(copy)
    shutil.move(copy / name, tmp_path / name)
    (copy / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        open_checkpoint(copy).side_files()


def test_a_folder_that_looks_like_the_hub_s_is_not_the_hub_s(copy: Path, tmp_path: Path) -> None:
    """Only `snapshots/REVISION` links to `blobs`."""
    (tmp_path.parent / "blobs").mkdir(exist_ok=True)
    shutil.move(copy / "config.json", tmp_path.parent / "blobs" / "config.json")
    (copy / "config.json").symlink_to("../../blobs/config.json")
    assert (copy / "config.json").is_file()
    with pytest.raises(CheckpointError, match="link out of its folder"):
        open_checkpoint(copy)


def test_links_within_a_folder_are_followed(copy: Path) -> None:
    (copy / SHARD).rename(copy / "weights")
    (copy / SHARD).symlink_to("weights")
    assert open_checkpoint(copy).matrices


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
@pytest.mark.parametrize("name", ["config.json", SHARD, INDEX, "x.gguf", "x.imatrix", "plan.json", "stats.csv"])
def test_what_is_no_file_is_refused_and_not_waited_for(
    alphaq: Run, copy: Path, tmp_path: Path, name: str, kind: str
) -> None:
    path = (copy if (copy / name).exists() or name == INDEX else tmp_path) / name
    path.unlink(missing_ok=True)
    if name == INDEX:
        (copy / SHARD).unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path.name)
    commands: dict[str, tuple[object, ...]] = {
        "x.gguf": ("inspect", path),
        "x.imatrix": ("plan", copy, "--bits", 2.5, "--engine", "llama.cpp", "--imatrix", path),
        "plan.json": ("quantize", copy, "--plan", path, "-o", tmp_path / "out"),
        "stats.csv": ("plan", "--stats", path, "--bits", 2.5),
    }
    ran = alphaq(*commands.get(name, ("inspect", copy)))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_json_file_without_end_is_not_read(copy: Path) -> None:
    with (copy / "config.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(CheckpointError, match="more than 100000000 bytes"):
        read_json(copy / "config.json")


def test_an_index_with_a_tensor_twice_is_refused(copy: Path) -> None:
    in_shards(copy)
    (copy / INDEX).write_text('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}')
    with pytest.raises(CheckpointError, match="'a' appears twice"):
        read_shards(copy)


def test_a_folder_name_of_any_bytes_can_be_shown_and_planned_for(alphaq: Run, copy: Path) -> None:
    renamed = copy.rename(os.fsdecode(os.fsencode(copy) + b"\xff"))
    assert alphaq("inspect", renamed, "--json").json["model"] == "model�"
    assert Plan(source=open_checkpoint(renamed).identity, choices={"a": "2"}).to_json().encode()


def test_a_gguf_file_name_may_have_any_bytes(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.gguf"))
    path.write_bytes(gguf_bytes(struct.pack("<QQ", 0, 0)))
    assert len(read_gguf(path).fingerprint) == 64


@pytest.mark.parametrize("model", ["~nobody-at-all/model", "x" * 5000, "a/" + "x" * 300])
def test_a_path_that_cannot_be_is_refused(alphaq: Run, model: str) -> None:
    ran = alphaq("inspect", model)
    assert (ran.code, ran.err.count("\n")) == (2, 1)


# -- no code from a checkpoint --------------------------------------------------------------------


def test_nothing_trusts_remote_code_or_loads_pickles() -> None:
    """Every `trust_remote_code` is False, and nothing that could run a pickle is imported or called."""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        trusted = re.findall(r"trust_remote_code\W+(\w+)", text)
        assert set(trusted) <= {"False"}, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                roots = {one.split(".")[0] for one in modules}
                if path.name == "apart.py":  # talks to a process that it has started itself
                    roots -= {"pickle"}
                assert not {"pickle", "marshal", "shelve", "joblib", "dill"} & roots, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "np.load", "numpy.load", "torch.hub.load"), path


POISON = "from pathlib import Path\nPath({marker!r}).touch()\n"


def poison(folder: Path, marker: Path, **config: Any) -> None:
    """Every hook by which transformers can be led to a folder's own code."""
    for name in ("configuration_own", "modeling_own", "tokenization_own", "setup", "__init__", "sitecustomize"):
        (folder / f"{name}.py").write_text(POISON.format(marker=str(marker)))
    own = {"AutoConfig": "configuration_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    tamper(folder / "config.json", auto_map=own, **config)
    tamper(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(POISON.format(marker=str(marker)))


def test_code_in_a_checkpoint_is_never_run(
    alphaq: Run, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even by a user who would answer yes to anything."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker, out = tmp_path / "marker", tmp_path / "out"
    poison(copy, marker)
    assert alphaq("inspect", copy).code == 0
    assert alphaq("quantize", copy, "--bits", 2.5, "--method", "uniform", "-o", out).code == 0
    named = {"configuration_own.py", "modeling_own.py", "tokenization_own.py"}  # which come along as they are
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.py")} == named
    for folder in (copy, out):
        assert alphaq("generate", folder, "def", "--max-new-tokens", 1).code == 0
    assert alphaq("verify", out, "--reference", copy).code == 0
    assert not marker.exists()


@pytest.mark.parametrize("command", ["inspect", "generate"])
def test_a_model_type_of_its_own_is_refused_without_a_question(
    alphaq: Run, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "marker"
    poison(copy, marker, model_type="own", architectures=["Own"])
    ran = alphaq(command, copy, *(["def"] if command == "generate" else []))
    assert (ran.code, asked, marker.exists()) == (2, [], False)


@pytest.mark.parametrize("value", ["evil/kernel", {"": "evil/kernel"}, "evil/kernel@main:attention"])
def test_a_config_that_asks_for_code_from_the_hub_is_refused(copy: Path, value: Any) -> None:
    tamper(copy / "config.json", attn_implementation=value)
    with pytest.raises(CheckpointError, match="asks for code from the hub"):
        read_config(copy)


# -- plans, packed blocks, importance, measurements -----------------------------------------------

PLANS: dict[str, object] = {
    "NaN": '{"choices": {"a": "2"}, "objective": NaN}',
    "infinity": '{"choices": {"a": "2"}, "alpha": {"a": 1e999}}',
    "NaN in config": '{"choices": {"a": "2"}, "config": {"budget": {"bits": NaN}}}',
    "twice": '{"choices": {"a": "2", "a": "3"}}',
    "control characters": '{"choices": {"a\\u001b[2J": "2"}}',
    "surrogate": '{"choices": {"\\ud800": "2"}}',
    "deep": '{"choices": {"a": "2"}, "config": {"a": ' + "[" * 1000 + "]" * 1000 + "}}",
    "huge cost": {
        "choices": {"a": "2"},
        "table": {"choices": ["2"], "losses": {"a": [1.0]}, "costs": [[10**400]], "cost_of": [0]},
    },
    "list for text": {"choices": {"a": "2"}, "config": {"imatrix": [1]}},
    "traversal": {"choices": {"../../x": "2"}},
    "absolute": {"choices": {"/etc/passwd": "2"}},
    "engine": {"choices": {"a": "2"}, "engine": "../../x"},
    "long": {"choices": {"x" * 1_000_000: "2"}},
    "long choice": {"choices": {"a": "2" * 1_000_000}},
    "not UTF-8": b'{"choices": {"\xff": "2"}}',
    "empty": b"",
    "pickle": b"\x80\x04.",
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_a_hostile_plan_is_refused_and_nothing_is_written(
    alphaq: Run, tiny: Path, tmp_path: Path, plan: object
) -> None:
    text = plan if isinstance(plan, (str, bytes)) else json.dumps(plan)
    path = tmp_path / "plan.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    ran = alphaq("quantize", tiny, "--plan", path, "-o", tmp_path / "out")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1 and len(ran.err) < LONGEST_MESSAGE + 100
    assert ran.err.strip().isprintable()
    assert sorted(tmp_path.iterdir()) == [path]
    assert alphaq("explain", path).code == 2


def test_a_plan_without_an_objective_can_be_explained(alphaq: Run, tmp_path: Path) -> None:
    table = {"choices": ["2g32"], "losses": {"a": [1.0]}, "costs": [[10]], "cost_of": [0]}
    (tmp_path / "p").write_text(json.dumps({"choices": {"a": "2g32"}, "price": 0.5, "table": table}))
    assert alphaq("explain", tmp_path / "p").code == 0


def test_hostile_checkpoints_leave_nothing_behind(alphaq: Run, copy: Path, tmp_path: Path) -> None:
    """Through every command that reads a model."""
    write_header(copy / SHARD, f'{{"../../../x": {entry([0, 2**61, 8], (0, 0))}}}')
    before = sorted(tmp_path.rglob("*"))
    for command in (
        ("inspect", copy),
        ("analyze", copy, "-o", tmp_path / "s.csv"),
        ("plan", copy, "--bits", 2.5, "-o", tmp_path / "p.json"),
        ("quantize", copy, "--bits", 2.5, "-o", tmp_path / "out"),
    ):
        ran = alphaq(*command)
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
        assert sorted(tmp_path.rglob("*")) == before


def test_a_tensor_s_name_is_never_a_path(alphaq: Run, copy: Path, tmp_path: Path) -> None:
    """A model with tensors named like files elsewhere is quantized into its folder and nowhere else."""
    from safetensors.torch import load_file, save_file

    names = ("../../escaped", str(tmp_path / "absolute"), "..", "~/home")
    save_file(load_file(copy / SHARD) | {name: torch.ones(2) for name in names}, copy / SHARD)
    assert alphaq("quantize", copy, "--bits", 2.5, "--method", "uniform", "-o", tmp_path / "out").code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
    written = [name for shard in (tmp_path / "out").glob("*.safetensors") for name in read_header(shard)[0]]
    assert set(names) <= set(written)


def block(text: str = "2g32", shape: tuple[int, int] = (3, 33)) -> torch.Tensor:
    return encode(quantize_debiased(torch.randn(shape), parse_choice(text)))


def packed_header(bits: int, group_size: int, flags: int, rows: int, columns: int, version: int = 1) -> bytes:
    return struct.pack("<2sBBHHII", b"AQ", version, bits, group_size, flags, rows, columns)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"AQ",
        bytes(80),
        packed_header(16, 0, 0, 2, 4) + bytes(0),
        packed_header(0, 32, 0, 2, 4) + bytes(64),
        packed_header(9, 32, 0, 2, 4) + bytes(64),
        packed_header(2, 0, 0, 2, 4) + bytes(64),
        packed_header(2, 32, 0, 0, 4),
        packed_header(2, 32, 0, 4, 0),
        packed_header(2, 32, 0, 0, 2**32 - 1),
        packed_header(2, 32, 0, 2**32 - 1, 2**32 - 1) + bytes(64),
        packed_header(2, 32, 0, 2**32 - 1, 0) + bytes(64),
        packed_header(2, 32, 2, 3, 33) + bytes(64),
        packed_header(2, 32, 0, 3, 33, version=2) + bytes(64),
    ],
)
def test_a_hostile_block_is_refused(raw: bytes) -> None:
    with pytest.raises(CheckpointError, match="is not a native block"):
        decode(torch.tensor(list(raw), dtype=torch.uint8))


@pytest.mark.parametrize("text", ["1g32", "2g32", "4g64s", "8g128"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scales_that_are_no_numbers_are_refused(text: str, bad: float) -> None:
    sound = block(text)
    choice = parse_choice(text)
    codes, offsets, *_ = native_format(choice).parts(choice, (3, 33))
    hostile = sound.clone()
    at = 16 + codes + offsets
    hostile[at : at + 2] = torch.tensor([bad], dtype=torch.float16).view(torch.uint8)
    decode(sound)
    with pytest.raises(CheckpointError, match="not finite"):
        decode(hostile)


def test_a_block_of_another_dtype_is_refused() -> None:
    for tensor in (block().float(), block().view(2, -1), block().view(torch.int16)):
        with pytest.raises(CheckpointError, match="is not a native block"):
            decode(tensor)


def old_imatrix(*entries: tuple[bytes, int, list[float]], count: int | None = None) -> bytes:
    raw = struct.pack("<i", len(entries) if count is None else count)
    for name, calls, values in entries:
        raw += struct.pack("<i", len(name)) + name + struct.pack(f"<ii{len(values)}f", calls, len(values), *values)
    return raw


@pytest.mark.parametrize(
    "raw",
    [
        old_imatrix((b"a", 1, [float("nan")])),
        old_imatrix((b"a", 1, [float("inf")])),
        old_imatrix((b"a", 1, [-1.0])),
        old_imatrix((b"a", 1, [1.0]), (b"a", 1, [2.0])),
        old_imatrix((b"\x1b[2J", 1, [1.0])),
        old_imatrix((b"\xff", 1, [1.0])),
        old_imatrix((b"x" * 5000, 1, [1.0])),
        old_imatrix((b"a", 1, [1.0]), count=2**31 - 1),
        old_imatrix((b"a", 1, [1.0]), count=-1),
        old_imatrix((b"a", 1, []), count=1),
    ],
)
def test_a_hostile_importance_matrix_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        read_imatrix(tmp_path / "x")
    assert str(caught.value).isprintable()


def test_damaged_lines_of_the_cache_are_measured_anew(tmp_path: Path) -> None:
    with Cache(tmp_path, {"a": "b"}) as cache:
        cache.add(Entry("sound", {"2g32": (1.0, 0.0)}))
        journal = cache.path / "measurements.jsonl"
    lines = ({}, {"name": 1}, {"name": "a", "errors": 3}, {"name": "a", "errors": {}, "spectrum": {"alpha": "x"}})
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines) + journal.read_text() + "[" * 100_000 + "\n")
    with Cache(tmp_path, {"a": "b"}) as cache:
        assert cache.known.errors == {("sound", "2g32"): (1.0, 0.0)}


def test_errors_are_short_and_cannot_command_a_terminal() -> None:
    assert str(AlphaQError("a\x1b[2Jb")) == "a�[2Jb"
    message = str(PlanError("x" * 10**6 + " the remedy."))
    assert len(message) <= LONGEST_MESSAGE + 10
    assert message.endswith(" the remedy.")


def test_layouts_are_still_read_as_written(tmp_path: Path) -> None:
    """Names and shapes at the limits."""
    specs = {"x" * 1000: TensorSpec("U8", (1,)), "é 😀 (ß)": TensorSpec("U8", (0, 5))}
    header, _, total = layout(specs)
    (tmp_path / "x").write_bytes(header.ljust(total, b"\0"))
    assert set(read_header(tmp_path / "x")[0]) == set(specs)
