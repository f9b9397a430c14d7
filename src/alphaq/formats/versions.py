"""Versions of native files that are read here, and how their tensors may be coded."""

from __future__ import annotations

from alphaq.errors import CheckpointError

NATIVE_FORMAT_VERSION = 1  # of native checkpoints
CODED_FORMAT_VERSION = 2  # of those with coded tensors
CODECS = ("none", "zstd")  # a coded tensor's header holds the place in this list
UNEVEN = "uneven_experts"
"""Key of a native checkpoint's `quantization_config`: whether layers have different numbers of experts."""


def check_native_format(version: int) -> None:
    """CheckpointError if a native checkpoint has another format than those that are run here."""
    if version not in (NATIVE_FORMAT_VERSION, CODED_FORMAT_VERSION):
        raise CheckpointError(
            f"The checkpoint has native format {version}; this alphaq reads {NATIVE_FORMAT_VERSION} and "
            f"{CODED_FORMAT_VERSION}. Update alphaq."
        )
