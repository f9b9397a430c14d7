"""How fast this machine reads memory, and that it is asked once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alphaq.errors import AlphaQError
from alphaq.measuring import bandwidth
from alphaq.measuring.bandwidth import bandwidth_here, kept_bandwidth, measured_bandwidth
from alphaq.trials import rates
from conftest import Ran


def test_a_machine_reads_between_a_floppy_and_what_is_built() -> None:
    found = measured_bandwidth(threads=2, nbytes=2**26)
    assert 1e8 < found.bytes_per_second < 1e13 and found.threads == 2
    with pytest.raises(AlphaQError, match="State --bandwidth"):
        measured_bandwidth(threads=2, nbytes=4)


def test_it_is_measured_once_and_anew_when_told_to_or_the_file_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alphaq: Callable[..., Ran]
) -> None:
    monkeypatch.setenv("ALPHAQ_CACHE", str(tmp_path))
    monkeypatch.setattr(bandwidth, "MOST_BYTES", 2**22)
    monkeypatch.setattr(rates, "CLOCKS", {})  # engines have a test of their own
    first = alphaq("bench", "--json").json
    assert first == alphaq("bench", "--json").json == bandwidth_here(tmp_path).model_dump()
    (kept,) = tmp_path.glob("bandwidth-*.json")
    kept.write_text(json.dumps(first | {"bytes_per_second": 0}))
    assert kept_bandwidth(tmp_path) is None
    assert "GB/s" in alphaq("bench").out and kept_bandwidth(tmp_path) is not None
