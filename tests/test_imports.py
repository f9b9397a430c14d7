import subprocess
import sys

import pytest


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("module", ["alphaq", "alphaq.cli", "alphaq.records", "alphaq.config"])
def test_import_does_not_load_torch(module: str) -> None:
    assert (
        run_python(f"import sys, {module}; print('torch' in sys.modules or 'transformers' in sys.modules)") == "False"
    )


@pytest.mark.parametrize("order", ["alphaq, transformers.quantizers.auto", "transformers.quantizers.auto, alphaq"])
def test_plugin_is_registered_whichever_is_imported_first(order: str) -> None:
    code = f"import {order}; import transformers.quantizers.auto as a; print('alphaq' in a.AUTO_QUANTIZER_MAPPING)"
    assert run_python(code) == "True"
