"""Every Mixture-of-Experts family that transformers can configure, from its own class to logits and back.

docs/models.md shows the same figures as a table; `scripts/models_table.py` writes it.
"""

import json
from pathlib import Path

import pytest

from alphaq.checkpoint.matching import architectures, unsupported
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import ArchitectureError
from families import FAMILIES, ONE_LAYOUT, UNLOADABLE, moe_model_types, outcome, random_family

OFTEN = ("mixtral", "qwen3_moe", "granitemoe", "gpt_oss", "dbrx", "qwen3_vl_moe", "nemotron_h", "inkling2_text")
ROWS = [(family, True) for family in FAMILIES] + [
    pytest.param(family, False, marks=() if family in OFTEN else pytest.mark.slow)
    for family in FAMILIES
    if family not in ONE_LAYOUT | UNLOADABLE
]


@pytest.mark.parametrize(("family", "published"), ROWS)
def test_family_is_found_whole_and_loads_as_its_dequantized_self(family: str, published: bool, tmp_path: Path) -> None:
    found = outcome(random_family(family), tmp_path, published)
    assert found.found == found.expected
    assert found.wide == 0
    assert found.difference < 1e-4
    assert found.change > 1e-3  # quantization did change something


def test_every_model_type_of_transformers_with_experts_is_known_or_named() -> None:
    assert moe_model_types() - architectures().keys() == unsupported().keys() & moe_model_types()


def test_unsupported_family_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "switch_transformers"}))
    with pytest.raises(ArchitectureError, match=r"'switch_transformers' .* is not supported: an encoder"):
        open_checkpoint(tmp_path)
