"""A short run of scripts/fuzz.py, the same inputs every time; docs/security.md has the long one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("resource")  # limits of memory, which Windows has not
SCRIPT = Path(__file__).parents[1] / "scripts" / "fuzz.py"
EXECUTIONS = 2000


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["fuzz"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fuzz = load()


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_no_damage_leads_to_anything_but_a_typed_error(target: str) -> None:
    result = fuzz.fuzz(target, EXECUTIONS, seed=1)
    assert result.accepted > EXECUTIONS // 50  # the fuzzer gets past the first check
    assert result.refused > EXECUTIONS // 5


def test_an_input_that_breaks_the_promise_is_reported() -> None:
    def run(raw: bytes) -> None:
        raise KeyError("a defect")

    target = fuzz.Target([[fuzz.Token("value", b"1")]], {"value": [b"2"]}, fuzz.plain, run)
    with pytest.raises(fuzz.Failed, match="a defect"):
        fuzz.execute(target, 0, 0)
