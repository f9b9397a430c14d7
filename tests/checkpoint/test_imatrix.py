import hashlib
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest

from alphaq.checkpoint.files import PlainFile
from alphaq.checkpoint.gguf import imatrix
from alphaq.checkpoint.gguf.imatrix import PRIOR_TOKENS, read_imatrix
from alphaq.checkpoint.pruned import without_experts
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.gguf.importance import importance_of
from alphaq.errors import CheckpointError
from alphaq.formats.table import parse_choice
from conftest import Ran

GATES = "blk.0.ffn_gate_exps.weight"
HEAD = "output.weight"
LONG = 1e8  # so that experts' own means are all that counts


def write_gguf(path: Path, entries: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    """As llama-imatrix writes: sums [experts, columns] and counts [experts, 1], here as of `LONG` such texts."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    for name, (sums, counts) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", (LONG * sums).astype(np.float32))
        writer.add_tensor(f"{name}.counts", (LONG * counts).astype(np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_binary(path: Path, entries: Mapping[str, tuple[int, np.ndarray]]) -> Path:
    """As llama-imatrix wrote before it took to GGUF."""
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, values.size)
        data += values.astype("<f4").tobytes()
    path.write_bytes(data)
    return path


def every_stack(values: np.ndarray) -> dict[str, np.ndarray]:
    """The same for each of the bundled model's stacks of experts."""
    return {f"blk.{layer}.ffn_{part}_exps.weight": values for layer in range(4) for part in ("gate", "up", "down")}


@pytest.fixture
def sums() -> np.ndarray:
    return np.random.default_rng(0).uniform(1, 9, (8, 256))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e28])
def test_importance_is_the_mean_square_of_each_column_over_that_of_all(
    tmp_path: Path, sums: np.ndarray, scale: float
) -> None:
    counts = np.arange(1, 9)
    found = read_imatrix(write_gguf(tmp_path / "i.gguf", {GATES: (scale * sums, counts)})).tensors[GATES]
    assert np.allclose(found, sums / sums.mean(axis=1, keepdims=True), rtol=1e-5)


def test_seldom_reached_experts_take_after_their_layer(tmp_path: Path, sums: np.ndarray) -> None:
    counts = np.array([0, 1, PRIOR_TOKENS, 100, 1000, 1e4, 1e5, 1e6]) / LONG
    given = sums * counts[:, None]
    found = read_imatrix(write_gguf(tmp_path / "i.gguf", {GATES: (given, counts)})).tensors[GATES]
    layer = given.sum(axis=0) / counts.sum()
    assert np.allclose(found[0], layer / layer.mean(), rtol=1e-4)
    half = (sums[2] + layer) / 2
    assert np.allclose(found[2], half / half.mean(), rtol=1e-4)
    assert np.allclose(found[7], sums[7] / sums[7].mean(), rtol=1e-3)
    distances = np.abs(found - sums / sums.mean(axis=1, keepdims=True)).mean(axis=1)
    assert (np.diff(distances[1:]) < 0).all()  # the more tokens, the more its own


def test_both_formats_mean_the_same_matrices(tmp_path: Path, tiny: Path, sums: np.ndarray) -> None:
    checkpoint = open_checkpoint(tiny)
    stacks = every_stack(sums)
    twos = {name: (values, np.full(8, 2)) for name, values in stacks.items()}
    new = read_imatrix(write_gguf(tmp_path / "i.gguf", twos | {HEAD: (sums[:1], np.ones(1))}))
    calls = {name: (2, values) for name, values in stacks.items()}
    old = read_imatrix(write_binary(tmp_path / "i.dat", calls | {HEAD: (1, sums[0])}))
    first, second = importance_of(checkpoint, new).columns, importance_of(checkpoint, old).columns
    assert first.keys() == second.keys()
    assert len(first) == 4 * 8 * 3 + 1
    one = "model.layers.0.mlp.experts.3.gate_proj.weight"
    assert np.allclose(first[one], sums[3] / sums[3].mean())
    # The older format has one count for all experts, and one mean.
    assert np.allclose(second[one], first[one])


def test_one_of_the_whole_model_serves_what_is_left_of_it(tmp_path: Path, tiny: Path, sums: np.ndarray) -> None:
    checkpoint, stacks = open_checkpoint(tiny), every_stack(sums)
    left = without_experts(checkpoint, {layer: (layer, 5) for layer in range(4)})
    new = read_imatrix(write_gguf(tmp_path / "i.gguf", {name: (values, np.ones(8)) for name, values in stacks.items()}))
    old = read_imatrix(write_binary(tmp_path / "i.dat", {name: (1, values) for name, values in stacks.items()}))
    for given in (new, old):
        whole, cut = (importance_of(one, given).columns for one in (checkpoint, left))
        assert len(cut) == 4 * 6 * 3
        for before, after in ((2, 1), (4, 3), (7, 5)):  # of layer 1, without 1 and 5
            name = "model.layers.1.mlp.experts.{}.down_proj.weight"
            assert np.array_equal(cut[name.format(after)], whole[name.format(before)])
    own = {name: (values[:6], np.ones(6)) for name, values in stacks.items()}
    assert importance_of(left, read_imatrix(write_gguf(tmp_path / "o.gguf", own))).columns.keys() == cut.keys()


def test_tensors_never_reached_count_as_ones_and_dead_columns_a_little(tmp_path: Path, sums: np.ndarray) -> None:
    sums[3, 7] = 0
    entries = {GATES: (sums, np.ones(8)), HEAD: (0 * sums, np.zeros(8))}
    found = read_imatrix(write_gguf(tmp_path / "i.gguf", entries)).tensors
    assert 0 < found[GATES][3, 7] < 1e-4
    assert (found[GATES] > 0).all()
    assert (found[HEAD] == 1).all()


def test_importance_moves_the_error_to_columns_that_matter_less(tmp_path: Path, tiny: Path) -> None:
    from alphaq.formats.ggml_library import restore_rows
    from alphaq.nouns.matrix import Role
    from alphaq.quantizers.ggml import quantize_ggml

    weight = open_checkpoint(tiny).with_role(Role.EXPERT)[0]
    values = open_checkpoint(tiny).read(weight).float()
    importance = np.where(np.arange(256) < 128, 100.0, 1.0).astype(np.float32)
    errors = []
    for given in (None, importance):
        quantized = quantize_ggml(values, parse_choice("Q2_K"), importance=given)
        miss = (restore_rows(quantized.codes.numpy(), "Q2_K", 256) - values.numpy()) ** 2
        errors.append(miss.sum(axis=0))
    assert errors[1][:128].sum() < errors[0][:128].sum()


def test_one_of_another_model_is_refused(tmp_path: Path, tiny: Path, sums: np.ndarray) -> None:
    ones = np.ones(8)
    whole = {name: (values, ones) for name, values in every_stack(sums).items()}
    narrow = read_imatrix(write_gguf(tmp_path / "n.gguf", whole | {GATES: (sums[:, :128], ones)}))
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_gate_exps\.weight has 1024 values, not 256"):
        importance_of(open_checkpoint(tiny), narrow)
    dense = {f"blk.{layer}.ffn_{part}.weight": (sums[:1], np.ones(1)) for layer in range(4) for part in ("up", "down")}
    with pytest.raises(CheckpointError, match=r"o\.gguf has no entry for any expert matrix .*blk\.0\.ffn_up\.weight"):
        importance_of(open_checkpoint(tiny), read_imatrix(write_gguf(tmp_path / "o.gguf", dense)))


@pytest.mark.parametrize("format", ["new", "old"])
@pytest.mark.parametrize("kept", ["gate", "up", "gate_up"])
def test_an_entry_speaks_for_every_matrix_that_reads_the_same_input(
    tmp_path: Path, tiny: Path, sums: np.ndarray, kept: str, format: str
) -> None:
    names = [f"blk.{layer}.ffn_{part}_exps.weight" for layer in range(4) for part in (kept, "down")]
    names += [f"blk.{layer}.attn_v.weight" for layer in range(4)]
    entries = {name: sums if "exps" in name else sums[:1] for name in names}
    if format == "new":
        path = write_gguf(tmp_path / "i", {name: (values, np.ones(len(values))) for name, values in entries.items()})
    else:
        path = write_binary(tmp_path / "i", {name: (3, values) for name, values in entries.items()})
    checkpoint = open_checkpoint(tiny)
    found = importance_of(checkpoint, read_imatrix(path))
    for matrix in checkpoint.matrices:
        if matrix.expert is not None:
            assert np.allclose(found.columns[matrix.name], sums[matrix.expert] / sums[matrix.expert].mean())
        elif matrix.name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            assert np.allclose(found.columns[matrix.name], sums[0] / sums[0].mean())
    assert not any("exps" in name or "attn_q" in name for name in found.missing)


def test_a_stack_that_no_token_reached_counts_its_columns_alike_and_is_named(
    alphaq: Callable[..., Ran], tmp_path: Path, tiny: Path, sums: np.ndarray
) -> None:
    stacks = {name: (values, np.ones(8)) for name, values in every_stack(sums).items() if "blk.2." not in name}
    given = write_gguf(tmp_path / "short.gguf", stacks)
    found = importance_of(open_checkpoint(tiny), read_imatrix(given))
    assert not any(".layers.2." in name for name in found.columns)
    assert found.missing[:3] == tuple(f"blk.2.ffn_{part}_exps.weight" for part in ("gate", "up", "down"))
    options = ("--engine", "llama.cpp", "--bits", "3", "--choices", "Q3_K", "--method", "distortion", "--workers", "1")
    ran = alphaq("plan", tiny, *options, "--imatrix", given)
    assert ran.code == 0 and "short.gguf has no entry for blk.2.ffn_gate_exps.weight," in ran.err.replace("\n", " ")


def test_an_expert_never_hit_counts_its_columns_alike_in_the_older_format(tmp_path: Path, tiny: Path) -> None:
    sums = np.random.default_rng(0).uniform(1, 9, (8, 256))
    sums[5] = 0
    path = write_binary(tmp_path / "i.dat", {name: (2, values) for name, values in every_stack(sums).items()})
    found = importance_of(open_checkpoint(tiny), read_imatrix(path)).columns
    assert np.allclose(found["model.layers.1.mlp.experts.5.up_proj.weight"], 1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        struct.pack("<i", -1),
        struct.pack("<i", 2**30),
        struct.pack("<ii", 1, 2**30),
        struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii", 1, 2**30),
        struct.pack("<ii", 1, 1) + b"\xff" + struct.pack("<ii", 1, 1) + struct.pack("<f", 1),
        struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii", 1, 1) + struct.pack("<f", float("nan")),
        b"GGUF" + bytes(20),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "i.dat").write_bytes(data)
    with pytest.raises(CheckpointError):
        read_imatrix(tmp_path / "i.dat")


@pytest.mark.slow
def test_plan_and_quantize_must_have_the_same_one(alphaq, tmp_path: Path, tiny: Path, sums: np.ndarray) -> None:  # type: ignore[no-untyped-def]
    stacks = {name: (values, np.ones(8)) for name, values in every_stack(sums).items()}
    given = write_gguf(tmp_path / "i.gguf", stacks | {"output_norm.weight": (sums[:1], np.ones(1))})
    common = ("--engine", "llama.cpp", "--bits", "3", "--choices", "Q2_K,Q3_K,Q4_K", "--method", "alphaq")
    planned = alphaq("plan", tiny, *common, "--imatrix", given, "-o", tmp_path / "plan.json")
    assert planned.code == 0, planned.err
    without = alphaq("quantize", tiny, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    assert without.code == 2
    assert "importance matrix i.gguf" in without.err
    renamed = given.rename(tmp_path / "other.gguf")
    made = alphaq("quantize", tiny, "--plan", tmp_path / "plan.json", "--imatrix", renamed, "-o", tmp_path / "out")
    assert made.code == 0, made.err
    refused = alphaq("plan", tiny, "--bits", "3", "--imatrix", renamed)
    assert refused.code == 2
    assert "--imatrix is for llama.cpp" in refused.err


def test_one_of_a_large_model_is_read_and_hashed_in_pieces(
    tmp_path: Path, sums: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of Kimi-K2 has 1.5 GB. Only the older format is read at once, and has little for each tensor."""
    new = write_gguf(tmp_path / "i.gguf", {GATES: (sums, np.ones(8))})
    old = write_binary(tmp_path / "i.dat", {GATES: (1, sums)})
    monkeypatch.setattr(imatrix, "MAX_BINARY_BYTES", 1000)
    monkeypatch.setattr(PlainFile, "chunk_bytes", 1000)
    assert read_imatrix(new).digest == hashlib.sha256(new.read_bytes()).hexdigest()[:16]
    with pytest.raises(CheckpointError, match="more than 1000 bytes"):
        read_imatrix(old)
    monkeypatch.setattr(imatrix, "memory_bytes", lambda: sums.nbytes // 4)
    with pytest.raises(CheckpointError, match="more than half of the memory"):
        read_imatrix(new)
