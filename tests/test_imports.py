import importlib
import subprocess
import sys

import pytest

from injection import forked


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("module", ["alphaq", "alphaq.cli.app", "alphaq.nouns.plan", "alphaq.nouns.settings"])
def test_import_does_not_load_torch(module: str) -> None:
    assert (
        run_python(f"import sys, {module}; print('torch' in sys.modules or 'transformers' in sys.modules)") == "False"
    )


HOOKED = "transformers.quantizers.auto"
ORDERS = [f"alphaq, {HOOKED}", f"{HOOKED}, alphaq"]


@pytest.mark.parametrize("order", ORDERS)
def test_plugin_is_registered_whichever_is_imported_first(order: str) -> None:
    """In a fork that imports the two anew, but not what takes seconds: torch and the rest of transformers."""

    def work() -> None:
        sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("alphaq")]
        for name in list(sys.modules):
            if name == HOOKED or name.partition(".")[0] == "alphaq":
                del sys.modules[name]
        for name in order.split(", "):
            importlib.import_module(name)
        assert "alphaq" in sys.modules[HOOKED].AUTO_QUANTIZER_MAPPING

    importlib.import_module(HOOKED)
    ran = forked(work)
    assert ran.code == 0, ran.err


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_plugin_is_registered_in_a_fresh_process(order: str) -> None:
    code = f"import {order}; import {HOOKED} as a; print('alphaq' in a.AUTO_QUANTIZER_MAPPING)"
    assert run_python(code) == "True"
