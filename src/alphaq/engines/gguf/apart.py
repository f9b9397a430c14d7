"""llama.cpp in a process of its own, so that only that process ends where llama.cpp gives up.

Much of what llama.cpp takes for granted of a file it only asserts, and a failed assertion (GGML_ASSERT) ends the
process that called it without another word. So whatever runs a model is asked for here: a function is called in a
Python that was started for it, one at a time, and its progress, result or error come back through a pipe. What the
process said before it died is told. It dies with this one, however that ends.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryFile
from typing import Any, BinaryIO, Literal, TypeVar

from alphaq.engines.gguf.library import LlamaError, echo_words

T = TypeVar("T")
Wrap = Callable[[Iterable[int], int, str], Iterable[int]]
"""Shows how far an iteration is: (items, how many, label) → the same items."""

# Isolated from the current folder and the environment, which must not put a module in another's place.
_START = [
    "-I",
    "-c",
    "import json,sys; sys.path[:]=json.loads(sys.argv[1]); import alphaq.engines.gguf.apart as a; a.serve()",
]
_SAID_BYTES, _SAID_LINES = 4096, 6


@dataclass(frozen=True)
class _Request:
    """hold: keep what the function returns, for those that ask of it. shown: whether it takes a `Wrap` at last."""

    kind: Literal["hold", "ask", "run"]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    shown: bool = False


@dataclass(frozen=True)
class _Begin:
    """An iteration begins."""

    total: int
    label: str


@dataclass(frozen=True)
class _Step:
    """One more of its items is done; or none is left."""

    last: bool = False


@dataclass(frozen=True)
class _Answer:
    """What became of a request."""

    value: Any = None
    error: Exception | None = None


class Apart:
    """A process that works on one GGUF file. Close it, or use `with`.

    Functions and what they take and return are pickled, so they are found by their names. Raises what they raise, and
    LlamaError where the process dies.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._said = TemporaryFile()  # noqa: SIM115 - `close` closes it
        paths = json.dumps([one for one in sys.path if isinstance(one, str)])
        self._process = subprocess.Popen(
            [sys.executable, *_START, paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # it would start a debugger
        )

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process; closing twice is harmless."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            assert pipe is not None  # each was asked for
            with suppress(OSError):  # of what could not be sent
                pipe.close()

    def hold(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a function and keep what it returns over there."""
        self._call(_Request("hold", function, arguments))

    def ask(self, function: Callable[..., T], *arguments: Any) -> T:
        """function(what is kept, *arguments), a method for one."""
        answer: T = self._call(_Request("ask", function, arguments))
        return answer

    def run(self, function: Callable[..., T], *arguments: Any, shown: Wrap) -> T:
        """function(*arguments, a Wrap that shows here what happens there)."""
        answer: T = self._call(_Request("run", function, arguments, shown=True), shown)
        return answer

    def _call(self, request: _Request, shown: Wrap | None = None) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):  # of a process that has died; it tells why below
            _send(self._process.stdin, request)
        bar: Iterator[int] = iter(())
        while True:
            message = self._received(self._process.stdout)
            if isinstance(message, _Answer):
                break
            if isinstance(message, _Begin):
                assert shown is not None  # or nobody over there could begin any
                bar = iter(shown(range(message.total), message.total, message.label))
                next(bar, None)
            elif message.last:
                for _ in bar:  # closes it
                    pass
            else:
                next(bar, None)
        if message.error is not None:
            raise message.error
        return message.value

    def _received(self, pipe: Any) -> _Begin | _Step | _Answer:
        try:
            message: _Begin | _Step | _Answer = pickle.load(pipe)  # of a process of ours
        except (EOFError, pickle.UnpicklingError):
            raise self._death() from None
        return message

    def _death(self) -> LlamaError:
        """Which file, how the process ended, what it said last, and what may be done."""
        code = self._process.wait()
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - _SAID_BYTES))
        lines = self._said.read().decode(errors="replace").strip().splitlines()[-_SAID_LINES:]
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit status {code}"
        remedy = (
            "It was killed, most likely for lack of memory. Free some, or use a machine with more."
            if name == "SIGKILL"
            else "The file is damaged, or this build of llama.cpp cannot run it. Download or convert it again, or "
            "install another version of xllamacpp."
        )
        return LlamaError("\n  ".join((f"llama.cpp gave up on {self._path} ({name}). {remedy}", *lines)))


def run_apart(path: Path, function: Callable[..., T], *arguments: Any, shown: Wrap) -> T:
    """function(*arguments, shown) in a process of its own that ends with it."""
    with Apart(path) as apart:
        return apart.run(function, *arguments, shown=shown)


def _send(pipe: BinaryIO | Any, message: object) -> None:
    pickle.dump(message, pipe, pickle.HIGHEST_PROTOCOL)
    pipe.flush()


# -- over there -----------------------------------------------------------------------------------


def serve() -> None:
    """Answer requests until the process that sends them is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _leave_no_core()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between messages
    echo_words()
    requests: SimpleQueue[_Request] = SimpleQueue()
    threading.Thread(target=_receive, args=(requests,), daemon=True).start()
    held = None
    while True:
        request = requests.get()
        arguments = (*request.arguments, _Relay(answers)) if request.shown else request.arguments
        try:
            if request.kind == "ask":
                arguments = (held, *arguments)
            value = request.function(*arguments)
            if request.kind == "hold":
                held, value = value, None
            answer = _Answer(value)
        except MemoryError as error:
            answer = _Answer(error=LlamaError(f"What llama.cpp computes needs more memory than there is ({error})."))
        except Exception as error:
            answer = _Answer(error=error)
        _send(answers, answer)


class _Relay:
    """A `Wrap` whose items are shown in the other process."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe

    def __call__(self, items: Iterable[int], total: int, label: str) -> Iterator[int]:
        _send(self._pipe, _Begin(total, label))
        try:
            for number, item in enumerate(items):
                if number:
                    _send(self._pipe, _Step())
                yield item
        finally:
            _send(self._pipe, _Step(last=True))


def _receive(requests: SimpleQueue[_Request]) -> None:
    """Hand requests on; end the process, whatever it is at, when no more can come."""
    try:
        while True:
            requests.put(pickle.load(sys.stdin.buffer))
    finally:
        os._exit(1)


def _leave_no_core() -> None:
    """A core of a process that maps a whole model would fill the disk."""
    with suppress(ImportError):  # Windows leaves none
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
