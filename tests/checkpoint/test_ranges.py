"""What was read of a store once lies here: the same bytes, of no other version, and anew where it is damaged."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import hubserver
from alphaq.checkpoint.ranges import fetched, keeping, missing
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.measuring.rows import draw_rows


@pytest.fixture
def web(save_family: Callable[..., Path]) -> Iterator[hubserver.Hub]:
    """A web server with a checkpoint."""
    served = hubserver.start_plain(save_family("qwen2_moe"))
    yield served
    served.stop()


@pytest.fixture
def there(web: hubserver.Hub) -> Checkpoint:
    return open_checkpoint(web.url)


def test_what_was_fetched_is_read_here_by_every_process(there: Checkpoint, web: hubserver.Hub, tmp_path: Path) -> None:
    near = keeping(there, tmp_path / "rows")
    sample = draw_rows(near, 0.05)
    before = [there.read(run) for run in sample.matrices]
    wanted = [*sample.row_ranges, *sample.whole_ranges]
    assert sum(fetched(near, missing(near, wanted))) == sample.extent.rows + sample.extent.whole
    assert not missing(near, wanted) and sample.extent.missing == 0
    web.served.clear()
    again = pickle.loads(pickle.dumps(near))
    for run, values in zip(sample.matrices, before, strict=True):
        assert torch.equal(again.read(run), values)
    for name in sample.whole:
        again.tensor(name)
    assert not web.served
    again.read(there.matrices[0])
    assert web.served


def test_a_damaged_range_is_read_anew(there: Checkpoint, tmp_path: Path) -> None:
    near = keeping(there, tmp_path)
    run = draw_rows(near, 0.05).matrices[0]
    values = near.read(run)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(bytes(kept.stat().st_size))  # as a machine that lost power may leave it
    assert torch.equal(near.read(run), values)
    assert kept.read_bytes().strip(b"\0")
