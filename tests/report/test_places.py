from pathlib import Path

import pytest

from alphaq import pipeline
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import StatsError
from alphaq.nouns.matrix import Role
from alphaq.report.places import Place, place_by_name, places_of_matrices, read_places


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.experts.17.down_proj.weight", Place(3, 17, "down", Role.EXPERT)),
        ("model.layers.0.block_sparse_moe.experts.2.w1.weight", Place(0, 2, "w1", Role.EXPERT)),
        ("model.layers.1.mlp.shared_experts.up_proj.weight", Place(1, None, "up", Role.SHARED_EXPERT)),
        ("model.layers.1.mlp.shared_expert.up_proj.weight", Place(1, None, "up", Role.SHARED_EXPERT)),
        ("model.layers.4.self_attn.q_proj.weight", Place(4, None, "q", Role.ATTENTION)),
        ("model.layers.0.mlp.gate_proj.weight", Place(0, None, "gate", Role.DENSE_MLP)),
        ("model.embed_tokens.weight", Place(None, None, "embed_tokens", Role.EMBEDDING)),
        ("lm_head.weight", Place(None, None, "lm_head", Role.HEAD)),
        ("something", Place(None, None, "something", Role.OTHER)),
    ],
)
def test_a_name_tells_the_place(name: str, place: Place) -> None:
    assert place_by_name(name) == place


def test_names_tell_what_the_checkpoint_knows(tiny: Path) -> None:
    for matrix in open_checkpoint(tiny).planned:
        found = place_by_name(matrix.name)
        assert (found.layer, found.expert, found.projection) == (matrix.layer, matrix.expert, matrix.projection)
        assert found.role is matrix.role


def test_a_stats_file_tells_the_same_as_the_checkpoint(tiny: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    rows = pipeline.analyze(checkpoint, tmp_path / "s.csv")
    places, alphas = read_places(tmp_path / "s.csv")
    assert places == places_of_matrices(checkpoint.matrices)
    assert alphas == {matrix.name: found.alpha for matrix, found in rows if found.alpha is not None}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("name,alpha\na,1\n", "lacks the column"),
        ("name,layer,expert,projection,role,rows,columns,alpha\na,x,1,up,expert,2,2,3\n", "line 2"),
        ("name,layer,expert,projection,role,rows,columns,alpha\na,1,1,up,chief,2,2,3\n", "'chief'"),
    ],
)
def test_a_damaged_stats_file_is_refused_by_line(text: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(StatsError, match=fault):
        read_places(tmp_path / "s.csv")
