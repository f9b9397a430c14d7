"""`alphaq inspect`: what a checkpoint consists of."""

from __future__ import annotations

from typing import Annotated

from alphaq.cli.means import JsonOption, Means, ModelArgument, opened
from alphaq.cli.options import Shown
from alphaq.terminal import show


def inspect(
    model: ModelArgument, means: Annotated[Means, Shown(only=("revision",))], as_json: JsonOption = False
) -> None:
    """Show a checkpoint's architecture, roles, counts and sizes; reads headers only."""
    from alphaq.checkpoint.summary import summarize
    from alphaq.report.tables import inspect_table

    summary = summarize(opened(model, means, headers_only=True))
    show(as_json, summary, inspect_table(summary))
