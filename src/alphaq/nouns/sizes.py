"""Sizes as people write them."""

from __future__ import annotations

import re
from decimal import Decimal

from alphaq.errors import BudgetError

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024), ("", 1024))
}


def parse_size(text: str) -> int:
    """Bytes in '9.5MiB', '12GiB', '800MB', '123456'. KiB/MiB/GiB are 1024-based, KB/MB/GB 1000-based."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise BudgetError(f"{text!r} is not a size. Write a number and a unit: 9.5MiB, 12GiB, 800MB.")
    return int(Decimal(match[1]) * units[match[2].lower()])


def show_size(nbytes: int) -> str:
    """What to type for so many bytes: '16GiB' where a short number gives exactly these, else all digits."""
    units = [unit for unit in ("GiB", "GB", "MiB", "MB") if nbytes >= _UNITS[unit]]
    texts = (f"{nbytes / _UNITS[unit]:.{digits}f}{unit}" for unit in units for digits in (0, 1, 2))
    return next((text for text in texts if parse_size(text) == nbytes), str(nbytes))
