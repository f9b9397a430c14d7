"""A GGUF file that no table of ours describes, from the plan to the score, with what commands say of it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from llama import in_float32, plain_file

from alphaq.checkpoint.gguf.format import layout, read_gguf
from alphaq.checkpoint.gguf.values import GgufValue
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.formats.ggml_library import restore_rows
from alphaq.writing.observing import in_16_bits
from conftest import Ran
from runnable import save_runnable

pytestmark = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp comes with `pip install xllamacpp`")

CHOICES = ("--engine", "llama.cpp", "--choices", "Q4_0,Q5_1,Q8_0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral folder, which AlphaQ writes itself."""
    return save_runnable(tmp_path_factory.mktemp("plain") / "model", "mixtral")


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("file")
    whole = in_16_bits(open_checkpoint(folder), scratch)
    return plain_file(in_float32(whole, scratch / "f32.gguf"), scratch / "plain.gguf")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "my.txt"
    path.write_text("some words of a text that is long enough for two windows " * 4)
    return path


def words(ran: Ran) -> str:
    return " ".join(f"{ran.out} {ran.err}".split())


def test_the_default_plan_is_quantized_scored_and_quantized_again(
    alphaq: Callable[..., Ran], plain: Path, text: Path, tmp_path: Path
) -> None:
    size = plain.stat().st_size // 4
    ran = alphaq("quantize", plain, *CHOICES, "--size", size, "--imatrix", "self", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    out = tmp_path / "out" / "model.gguf"
    assert out.stat().st_size <= size
    assert f"alphaq eval {tmp_path / 'out'} --reference {plain} --text my.txt" in words(ran)
    types = {tensor.type for name, tensor in read_gguf(out).tensors.items() if "exps" in name}
    assert len(types) > 1 and types <= {"Q4_0", "Q5_1", "Q8_0"}
    ran = alphaq("eval", tmp_path / "out", "--reference", plain, "--text", text, "--window", 32, "--json")
    assert ran.code == 0, ran.err
    assert 0 < ran.json["mean_kl"] < 0.3 and ran.json["run_by"] == ["llama.cpp", "llama.cpp"]
    ran = alphaq("verify", tmp_path / "out", "--reference", plain)
    assert ran.code == 0 and "(add --run)" in words(ran)
    asked = (*CHOICES, "--method", "alphaq", "--bpw", 9, "-o", tmp_path / "again")
    ran = alphaq("quantize", out, *asked)
    assert ran.code == 2 and "add --requantize, which plan, quantize and analyze take" in words(ran)
    assert alphaq("quantize", out, *asked, "--requantize").code == 0
    kept = read_gguf(tmp_path / "again" / "model.gguf").tensors
    assert all(kept[name].type == tensor.type for name, tensor in read_gguf(out).tensors.items() if "exps" in name)


def test_remedies_can_be_followed(alphaq: Callable[..., Ran], plain: Path, text: Path, tmp_path: Path) -> None:
    said = "`alphaq eval` without --dtype and --device can"
    asked = ("quantize", plain, *CHOICES, "--method", "alphaq", "--bits", 6, "-o", tmp_path / "out")
    assert alphaq(*asked).code == 0
    ran = alphaq("eval", plain, "--text", text, "--window", 32, "--dtype", "float32")
    assert ran.code == 2 and said in words(ran)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(plain.read_bytes().replace(b"ffn_gate_inp.weight", b"ffn_gate_inq.weight"))
    ran = alphaq("eval", broken, "--text", text)
    assert ran.code == 2 and "cannot load" in words(ran) and "--dtype" not in words(ran)
    (tmp_path / "folder").mkdir()
    (tmp_path / "out" / "model.gguf").rename(tmp_path / "folder" / "model.gguf")  # of quantized weights
    ran = alphaq("imatrix", tmp_path / "folder", "-o", tmp_path / "i.gguf", "--tokens", 64, "--window", 32)
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("with_source", [True, False], ids=["source", "alone"])
def test_llama_cpp_runs_the_file_beside_its_weights_in_16_bits(
    alphaq: Callable[..., Ran], plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_source: bool
) -> None:
    asked = ("quantize", plain, *CHOICES, "--method", "alphaq", "--bits", 6, "-o", tmp_path / "out")
    assert alphaq(*asked).code == 0
    command = ("verify", tmp_path / "out", *(("--reference", plain) if with_source else ()), "--run")
    ran = alphaq(*command, "--json")
    assert ran.code == 0, ran.err
    assert 0 < ran.json["run"]["difference"] < 0.05 and ran.json["run"]["twice"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def wrong(codes: np.ndarray, type: str, columns: int) -> np.ndarray:
        return restore_rows(codes, type, columns)[::-1].copy()

    monkeypatch.setattr("alphaq.engines.gguf.restoring.restore_rows", wrong)
    ran = alphaq(*command)
    assert ran.code == 2 and "its kernels for these types are wrong" in words(ran)


def in_parts(path: Path, folder: Path) -> list[Path]:
    """A file cut in two, as llama.cpp's own tool does it."""
    file, raw = read_gguf(path), path.read_bytes()
    names, parts = list(file.tensors), []
    for number, held in enumerate((names[:5], names[5:])):
        own = {
            "split.no": GgufValue.of("uint16", number),
            "split.count": GgufValue.of("uint16", 2),
            "split.tensors.count": GgufValue.of("int32", len(names)),
        }
        tensors = {name: (file.tensors[name].type, file.tensors[name].shape) for name in held}
        header, places, nbytes = layout((file.metadata if not number else {}) | own, tensors)
        data = np.zeros(nbytes, np.uint8)
        data[: len(header)] = np.frombuffer(header, np.uint8)
        for name, place in places.items():
            data[place.begin : place.end] = np.frombuffer(
                raw[file.tensors[name].begin : file.tensors[name].end], np.uint8
            )
        parts.append(folder / f"m-{number + 1:05d}-of-00002.gguf")
        parts[-1].write_bytes(data.tobytes())
    return parts


@pytest.mark.slow
def test_any_part_of_a_split_file_means_the_whole(
    alphaq: Callable[..., Ran], plain: Path, text: Path, tmp_path: Path
) -> None:
    found = []
    for part in in_parts(plain, tmp_path):
        ran = alphaq("eval", part, "--reference", plain, "--text", text, "--window", 32, "--json")
        assert ran.code == 0 and ran.json["mean_kl"] == pytest.approx(0, abs=1e-6), ran.err
        matrix = tmp_path / "i.gguf"
        assert alphaq("imatrix", part, "-o", matrix, "--tokens", 64, "--window", 32).code == 0
        found.append(matrix.read_bytes())
        matrix.unlink()
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "typed, said",
    [
        (("imatrix", "{plain}", "--revision", "main", "-o", "{i}"), "--revision does nothing for a GGUF file"),
        (("imatrix", "{plain}", "--pre-tokenizer", "qwen2", "-o", "{i}"), "--pre-tokenizer does nothing for a GGUF"),
        (("imatrix", "{folder}", "--revision", "main", "-o", "{i}"), "--revision applies only to hub models"),
        (("imatrix", "{plain}", "--text", "{text}", "--seed", "0", "-o", "{i}"), "--seed is for the model's own"),
        (("imatrix", "{plain}", "--window", "100", "-o", "{i}"), "fewer than a window of 100. Give --window 64."),
        (("plan", "{plain}", *CHOICES, "--bits", "5", "--pre-tokenizer", "qwen2"), "--pre-tokenizer is for folders"),
        (("plan", "{plain}", *CHOICES, "--bits", "5", "--revision", "main"), "--revision applies only to hub models"),
        (("plan", "{folder}", *CHOICES, "--bits", "5", "--requantize"), "--requantize is for GGUF files"),
        (("plan", "{plain}", *CHOICES, "--bits", "5", "--dry-run", "--imatrix", "self"), "--dry-run needs MODEL and"),
        (("plan", "{folder}", *CHOICES, "--bits", "5", "--converter", "{checkout}", "--requantize"), "Drop it."),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    typed: tuple[str, ...], said: str, alphaq: Callable[..., Ran], plain: Path, folder: Path, text: Path, tmp_path: Path
) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "convert_hf_to_gguf.py").touch()
    places = dict(plain=plain, folder=folder, text=text, i=tmp_path / "i.gguf", checkout=checkout)
    ran = alphaq(*(one.format(**places) for one in typed))
    assert ran.code == 2 and said in words(ran), ran.err


def test_usual_windows_are_no_longer_than_those_of_training(
    alphaq: Callable[..., Ran], plain: Path, tmp_path: Path
) -> None:
    ran = alphaq("imatrix", plain, "-o", tmp_path / "i.gguf", "--tokens", 128, "--json")
    assert ran.code == 0 and (ran.json["windows"], ran.json["window"]) == (2, 64), ran.err
    assert ran.json["expert_matrices"] == 3 * 3 * 4  # layers, projections, experts
