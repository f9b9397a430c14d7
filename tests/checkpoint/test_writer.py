from pathlib import Path

import pytest

from alphaq.checkpoint.writer import atomic_file, atomic_folder
from alphaq.errors import OutputError


def test_folder_appears_complete(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "1"


def test_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match=r"already exists\. Remove it"), atomic_folder(tmp_path / "out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not a folder"), atomic_folder(tmp_path / "no" / "out"):
        pass


def test_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left"), atomic_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_failed_file_keeps_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    with pytest.raises(ValueError, match="stop"), atomic_file(tmp_path / "f") as partial:
        partial.write_text("new")
        raise ValueError("stop")
    assert (tmp_path / "f").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    import os
    import platform
    import subprocess
    import sys

    finished = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    processes = int(finished.stdout), os.getppid()
    abandoned, running = (tmp_path / f".out.partial-{platform.node()}-{process}" for process in processes)
    abandoned.mkdir()
    running.mkdir()
    with atomic_folder(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([running.name, "out"])


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder"), atomic_file(tmp_path):
        pass
