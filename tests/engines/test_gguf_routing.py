"""What llama.cpp's run of a file says of its matrices is what happens to the stream when they are changed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from llama import in_float32, plain_file, values_in, write_gguf
from numpy.typing import NDArray

from alphaq.calibration.traffic import Calibration, gather
from alphaq.checkpoint.gguf.format import read_gguf
from alphaq.checkpoint.gguf.values import GgufValue
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.gguf.library import Llama, Running
from alphaq.engines.gguf.observing import _notes, _signals, _uses, observed
from alphaq.engines.gguf.routing import LayerFlow, Routing
from alphaq.engines.gguf.watching import Node
from alphaq.measuring.cache import Cache
from alphaq.measuring.resources import Resources
from alphaq.planning import passes
from alphaq.planning.passes import PassRun, synthetic
from alphaq.work.workers import silent
from alphaq.writing.observing import in_16_bits
from conftest import Ran
from dense_models import save_dense
from runnable import save_runnable

pytestmark = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp comes with `pip install xllamacpp`")

IDS = np.random.default_rng(0).integers(1, 300, (3, 32), dtype=np.int32)
KINDS = {"gemma3_text": "ffn_down", "granite": "ffn_down", "qwen2_moe": "ffn_down_exps", "plain": "ffn_down_exps"}
OF_LAYER = "blk.{layer}.{kind}.weight"


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Random models with weights in float32: norms or scales behind the MLP, a shared expert; `plain` has no table."""
    made: dict[str, Path] = {}

    def file(name: str) -> Path:
        if name not in made:
            scratch, family = tmp_path_factory.mktemp(name), "mixtral" if name == "plain" else name
            save = save_runnable if KINDS[name] == "ffn_down_exps" else save_dense
            whole = in_16_bits(open_checkpoint(save(scratch / "model", family)), scratch)
            made[name] = in_float32(whole, scratch / "f32.gguf")
            if name == "plain":
                made[name] = plain_file(made[name], scratch / "plain.gguf")
        return made[name]

    return file


class Stream:
    """Keeps what layers leave, [tokens, hidden] by the node's name."""

    def __init__(self) -> None:
        self.left: dict[str, NDArray[np.float32]] = {}

    def wants(self, node: Node) -> bool:
        return node.name.startswith("l_out-")

    def sees(self, node: Node) -> None:
        self.left[node.name] = node.values().reshape(-1, node.shape[-1]).copy()


def flows_of(path: Path, kind: str) -> dict[int, LayerFlow]:
    watch = Routing(kind, lambda: None)
    run(path, watch)
    return watch.layers


def run(path: Path, watch: Routing | Stream) -> None:
    with Llama(path, IDS.shape[1], 1, len(IDS), Running(watch)) as model:
        model.run(IDS, np.ones(IDS.shape, np.bool_))


def stream_of(path: Path, layer: int) -> NDArray[np.float32]:
    watch = Stream()
    run(path, watch)
    return watch.left[f"l_out-{layer}"].astype(np.float64)


def changed(path: Path, out: Path, name: str, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Path:
    values = values_in(path)
    values[name] = change(values[name]).astype(np.float32)
    return write_gguf(out, read_gguf(path).metadata, values)


@pytest.mark.parametrize("family", KINDS)
def test_the_signal_is_how_far_a_change_of_the_weights_moves_the_stream(
    family: str, exact: Callable[[str], Path], tmp_path: Path
) -> None:
    path, kind, chance = exact(family), KINDS[family], np.random.default_rng(1)
    flows = flows_of(path, kind)
    count = read_gguf(path).metadata
    assert len(flows) == count[f"{count['general.architecture'].value}.block_count"].value

    def a_hundredth_of_noise(values: NDArray[np.float32]) -> NDArray[np.float32]:
        size = np.sqrt(np.square(values).mean(axis=(-2, -1), keepdims=True))
        return values + 0.01 * size * chance.standard_normal(values.shape)

    for layer in (0, len(flows) - 1):
        name = OF_LAYER.format(layer=layer, kind=kind)
        before = stream_of(path, layer)
        after = stream_of(changed(path, tmp_path / "changed.gguf", name, a_hundredth_of_noise), layer)
        moved = (np.square(after - before).sum(axis=1) / np.square(before).sum(axis=1)).mean() / 1e-4
        assert flows[layer].moved / flows[layer].tokens == pytest.approx(moved, rel=0.12), layer


def test_weights_whose_length_a_norm_takes_away_keep_their_signal(exact: Callable[[str], Path], tmp_path: Path) -> None:
    path, name = exact("gemma3_text"), OF_LAYER.format(layer=1, kind="ffn_down")
    scaled = changed(path, tmp_path / "scaled.gguf", name, lambda values: 10 * values)
    before, after = flows_of(path, "ffn_down")[1], flows_of(scaled, "ffn_down")[1]
    assert after.outputs == pytest.approx(100 * before.outputs, rel=1e-3)
    assert after.moved == pytest.approx(before.moved, rel=1e-3)


def test_uses_and_signals_are_those_of_the_pass_through_transformers(exact: Callable[[str], Path]) -> None:
    path = exact("qwen2_moe")
    checkpoint, flows = open_checkpoint(path), flows_of(exact("qwen2_moe"), "ffn_down_exps")
    truth = gather(checkpoint, torch.from_numpy(IDS).long(), with_signal=True)
    signals, compared = _signals(flows, sorted(flows)), 0
    for layer, flow in flows.items():
        for expert, use in _uses(layer, flow).items():
            assert vars(use) == pytest.approx(vars(truth.experts[expert]), rel=1e-3, abs=1e-6), expert
            compared += 1
        down = [
            truth.matrices[one.name].signal
            for one in checkpoint.planned
            if (one.layer, one.projection) == (layer, "down")
        ]
        assert signals[layer] == pytest.approx(np.mean(down), rel=0.2), layer  # two bits are no small change
    assert compared == len(truth.experts) == 12


def test_what_is_not_seen_is_said() -> None:
    seen = LayerFlow(outputs=9.0, stream=6.0, moved=1.0, tokens=2)
    apart = LayerFlow(outputs=3.0, stream=6.0)  # nothing leads from its outputs to the stream
    assert _signals({0: seen, 1: apart}, (0, 1, 2)) == {0: 0.5, 1: 0.5, 2: 0.5}
    first, second = _notes({0: seen, 1: apart}, (0, 1, 2))
    assert "the MLP of layer 1 joins the stream is not understood" in first
    assert "nothing of the MLP of layer 2: they count as the mean of the others" in second
    assert _signals({}, (0, 1)) == {0: 1.0, 1: 1.0}
    assert _notes({}, (0, 1)) == (
        "llama.cpp shows nothing of the MLP of 2 layers, 0 among them: all layers count alike",
    )
    assert _notes({0: seen}, (0,)) == () and _uses(0, None) == _uses(0, seen) == {}


def with_bos(path: Path, out: Path) -> Path:
    metadata = read_gguf(path).metadata | {
        "tokenizer.ggml.add_bos_token": GgufValue.of("bool", True),
        "tokenizer.ggml.bos_token_id": GgufValue.of("uint32", 7),
    }
    return write_gguf(out, metadata, values_in(path))


def test_windows_begin_with_bos_unless_they_are_not_to(exact: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(with_bos(exact("plain"), tmp_path / "bos.gguf"))
    assert checkpoint.plain
    for bos in (True, False):
        found = observed(checkpoint, 4, 16, bos, silent)
        assert ({window[0] for window in found.tokens} == {7}) is bos
        assert len(found.experts) == 12 and not found.notes
        assert all(use.signal > 0 for use in found.matrices.values())
        assert Calibration.from_json(found.to_json()) == found


def test_a_kept_pass_is_not_taken_for_one_with_other_tokens(
    exact: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, asked = open_checkpoint(exact("plain")), []
    monkeypatch.setattr(passes, "SYNTHETIC_WINDOWS", 1)

    def watched(*arguments: object) -> Calibration:
        asked.append(arguments[3])
        return Calibration(notes=("a note",))

    with Cache(tmp_path, {"model": "one"}) as cache:
        for bos in (True, False, True):
            run = PassRun(checkpoint, bos, None, (), Resources(cache=cache), watched)
            assert synthetic(run).notes == ("a note",)
    assert asked == [True, False]


@pytest.mark.parametrize(
    "name, factor, met_by",
    [
        ("blk.1.ffn_norm.weight", 1e25, "blk.1.ffn_gate_inp.weight"),
        pytest.param("output_norm.weight", 1e38, "output.weight", marks=pytest.mark.slow),
    ],
)
def test_what_overflows_is_told_by_every_command(
    name: str, factor: float, met_by: str, exact: Callable[[str], Path], tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    path = changed(exact("plain"), tmp_path / "wrong.gguf", name, lambda values: np.float32(factor) * values)
    (tmp_path / "text.txt").write_text("a text of some words " * 20)
    text, out = ("--text", tmp_path / "text.txt", "--window", "16"), ("-o", tmp_path / "i.gguf")
    for said, *typed in (
        (f"first in the inputs of {met_by}", "imatrix", path, *out, "--window", "16", "--tokens", "32"),
        (f"first in the inputs of {met_by}", "imatrix", path, *out, *text),
        (f"in the logits of {path}", "eval", path, *text),
        (f"in the logits of {path}", "eval", exact("plain"), "--reference", path, *text),
        (f"first in the inputs of {met_by}", "plan", path, "--engine", "llama.cpp", "--bits", "6"),
    ):
        ran = alphaq(*typed)
        words = " ".join(ran.err.split())
        assert ran.code == 2 and "llama.cpp computes NaN or infinity" in words and said in words, (typed, words)
        assert "convert the model to BF16 instead of F16" in words and not (tmp_path / "i.gguf").exists()
