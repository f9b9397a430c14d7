"""The command line: commands put together, and errors turned into exit codes.

With `--json` exactly one object goes to stdout; progress, tables and errors go to stderr. A user's
mistake ends with one line and exit code 2.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from alphaq import __version__
from alphaq.cli.analyze import analyze
from alphaq.cli.bench import bench
from alphaq.cli.cache import cache
from alphaq.cli.card import card
from alphaq.cli.certify import certify
from alphaq.cli.compare import compare
from alphaq.cli.demo import demo
from alphaq.cli.engines import engines
from alphaq.cli.eval import evaluate
from alphaq.cli.explain import explain
from alphaq.cli.fit import fit
from alphaq.cli.generate import generate
from alphaq.cli.imatrix import imatrix
from alphaq.cli.inspect import inspect
from alphaq.cli.methods import methods
from alphaq.cli.options import as_command
from alphaq.cli.plan import plan
from alphaq.cli.plot import plot
from alphaq.cli.price import price
from alphaq.cli.prune import prune
from alphaq.cli.quantize import quantize
from alphaq.cli.quantizers import quantizers
from alphaq.cli.recode import recode
from alphaq.cli.refine import refine
from alphaq.cli.report import report
from alphaq.cli.skip import skip
from alphaq.cli.slice import slice_
from alphaq.cli.verify import verify
from alphaq.errors import AlphaQError
from alphaq.terminal import complain
from alphaq.work.cores import consider_others

COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect,
    "analyze": analyze,
    "price": price,
    "fit": fit,
    "plan": plan,
    "refine": refine,
    "quantize": quantize,
    "compare": compare,
    "engines": engines,
    "methods": methods,
    "quantizers": quantizers,
    "explain": explain,
    "verify": verify,
    "eval": evaluate,
    "generate": generate,
    "skip": skip,
    "demo": demo,
    "recode": recode,
    "slice": slice_,
    "prune": prune,
    "imatrix": imatrix,
    "certify": certify,
    "card": card,
    "report": report,
    "plot": plot,
    "bench": bench,
    "cache": cache,
}
RENAMED = {
    ("verify", "--source"): "--reference",
    ("card", "--source"): "--reference",
    ("report", "--model"): "--reference",
}
"""Options that had another name, by command."""

app = typer.Typer(
    name="alphaq",
    help="Fit Mixture-of-Experts models into the memory you have, without calibration data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for name, command in COMMANDS.items():
    app.command(name)(as_command(command))


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"alphaq {__version__}\n")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    warnings.filterwarnings("ignore", category=UserWarning)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 2 a user's mistake or what the system refuses, 130 interrupted, 143 stopped.

    A defect keeps its traceback.
    """
    try:
        consider_others()
        signal.signal(signal.SIGTERM, _terminated)
        words = list(sys.argv[1:] if arguments is None else arguments)  # certificates record them
        code = typer.main.get_command(app).main(args=words, prog_name="alphaq", standalone_mode=False, obj=words)
        sys.stdout.flush()
    except AlphaQError as error:
        _fail(str(error))
    except OSError as error:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115, what is left in it would be refused again at the end
        if isinstance(error, BrokenPipeError):  # whoever reads has seen enough
            sys.exit(141)  # as if SIGPIPE had ended it
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}. Check that it is there, its permissions, and the space on the disk.")
    except (KeyboardInterrupt, typer.Abort):
        complain("interrupted; what was measured and quantized is kept for the next run")
        sys.exit(130)
    except Exception as error:
        if (lacking := _lacking_memory(error)) is not None:
            _fail(lacking)
        # Typer's usage errors share no public base class across its versions, but all can format themselves.
        if not hasattr(error, "format_message"):
            raise
        if not error.format_message():  # bare `alphaq`: the help has been shown
            sys.exit(2)
        said = error.format_message().rstrip(".")
        _fail(_renamed(error) or f"{said}{'' if said.endswith('?') else '.'} See `alphaq --help`.")
    sys.exit(code if isinstance(code, int) else 0)


def _renamed(error: Exception) -> str | None:
    """What an option that is not known is called now."""
    context, option = getattr(error, "ctx", None), getattr(error, "option_name", None)
    known = None if context is None else RENAMED.get((str(context.info_name), str(option)))
    return None if known is None else f"{option} is called {known} now. Write {known} instead."


def _lacking_memory(error: Exception) -> str | None:
    """What to say where Python, numpy or torch (which has no class for it) were refused memory; else None."""
    wanted = re.search(r"you tried to allocate (\d+) bytes", str(error))
    if not isinstance(error, MemoryError) and wanted is None:
        return None
    more = f" for {int(wanted[1]) / 2**20:,.0f} MiB more" if wanted else ""
    return (
        f"The system has no memory{more}. End other programs, use --workers 1 where the command has it, or a machine "
        "with more memory. What was measured and quantized is kept for the next run."
    )


def _terminated(number: int, frame: object) -> None:
    """Unwind on SIGTERM, so that temporary output is removed."""
    sys.exit(128 + number)


def _fail(message: str) -> None:
    complain("error: " + " ".join(message.split()))
    sys.exit(2)
