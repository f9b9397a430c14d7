from pathlib import Path

import pytest

from alphaq.work import cores

CORES = cores._allowed_cores()


@pytest.mark.parametrize(
    ("written", "quota"),
    [
        ({"cpu.max": "250000 100000"}, 2.5),
        ({"cpu.max": "50000 100000"}, 0.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_a_container_s_share_limits_the_cores(
    written: dict[str, str], quota: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(cores, "_GROUPS", tmp_path)
    assert cores._quota() == quota
    assert cores.available_cores() == (CORES if quota is None else min(CORES, max(1, int(quota))))


def environment(monkeypatch: pytest.MonkeyPatch, quota: float | None, **given: str) -> dict[str, str]:
    """What `consider_others` makes of an environment."""
    kept = dict(given)
    monkeypatch.setattr(cores.os, "environ", kept)
    monkeypatch.setattr(cores, "_allowed_cores", lambda: 64)
    monkeypatch.setattr(cores, "_quota", lambda: quota)
    cores.consider_others()
    return kept


def test_threads_keep_within_a_share_and_sleep_soon_where_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment(monkeypatch, None) == {"GOMP_SPINCOUNT": cores.SPINS}
    assert environment(monkeypatch, 2.5) == {"GOMP_SPINCOUNT": cores.SPINS, "OMP_NUM_THREADS": "2"}
    assert environment(monkeypatch, 64.0) == {"GOMP_SPINCOUNT": cores.SPINS}


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "7"}
    assert environment(monkeypatch, 2.0, **own) == own
    assert environment(monkeypatch, None, GOMP_SPINCOUNT="1") == {"GOMP_SPINCOUNT": "1"}
