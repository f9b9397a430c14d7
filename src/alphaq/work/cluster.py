"""Tasks spread over the nodes of a Ray cluster, behind the same few methods as a pool of processes.

Consecutive tasks travel in batches, sized by bytes. The driver says which node a batch goes to: one that can read
the files it needs. No more batches are out than the nodes can work on and one waiting for each, so neither tasks nor
results pile up, and the driver holds the results of one batch. A batch whose node or process was lost is given to
another node, with a line that says so. Results come back in order, so what is written does not depend on the cluster.
"""

from __future__ import annotations

import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from alphaq.errors import AlphaQError, DeviceError, MissingExtraError, WorkerError, first_line
from alphaq.registry import unknown
from alphaq.terminal import err
from alphaq.work.batches import Batch, Node, batches, choose, limited
from alphaq.work.on_node import own_version, probe, run_batch, sees
from alphaq.work.workers import Size, Workers, no_bytes

S = TypeVar("S")
T = TypeVar("T")
MOST_TRIES = 4
GONE = ("NodeDiedError", "TaskUnschedulableError", "LocalRayletDiedError")
"""Errors of Ray that say that a node is no more."""
CONNECT_S = 10.0
WAIT_S = 120.0
REFRESH_S = 10.0


def parse_cluster(text: str) -> str:
    """The address in `ray` or `ray:ADDRESS`. Raises AlphaQError."""
    kind, _, address = text.partition(":")
    if kind != "ray":
        raise AlphaQError(unknown("--cluster", kind, ("ray",)) + " Write ray, or ray:HOST:PORT.")
    return address or "auto"


def _answers(address: str) -> None:
    """Raise OSError, ValueError if nothing listens at HOST:PORT; Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()


def ray_package() -> Any:
    """The package. Raises MissingExtraError."""
    try:
        import ray
    except ImportError:
        raise MissingExtraError("ray", "--cluster ray needs the package ray") from None
    return ray


@dataclass
class _Count:
    """How often something happened."""

    retried: int = 0
    most_out: int = 0
    nodes: dict[str, int] = field(default_factory=dict)


class RayWorkers(Workers):
    """The nodes of a running Ray cluster that can read what is shared. most: cores to use, all by default.

    Raises WorkerError if there is no such cluster or node.
    """

    cluster = True

    def __init__(
        self, address: str, shared: Any, most: int | None = None, log: Callable[[str], None] | None = None
    ) -> None:
        super().__init__(1, shared)
        self.address, self.most = address, most
        self.log = log or _note
        self.nodes: list[Node] = []
        self.told = _Count()
        self._known: dict[str, Node | None] = {}
        self._refreshed = 0.0
        self._folder: Path | None = None

    def __enter__(self) -> RayWorkers:
        self._ray = ray_package()
        before = signal.getsignal(signal.SIGTERM)
        try:
            _answers(self.address)
            self._ray.init(self.address, log_to_driver=False, logging_level="ERROR", configure_logging=True)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise WorkerError(
                f"No Ray cluster can be joined at {self.address} ({first_line(error)}). Start one with `ray start "
                "--head`, or name one: --cluster ray:HOST:PORT."
            ) from None
        finally:
            with suppress(ValueError):  # of another thread than the main one
                signal.signal(signal.SIGTERM, before)  # which Ray replaces
        try:
            self._shared = self._ray.put(self.shared)
            self._run = self._ray.remote(run_batch)
            self._refresh(first=True)
        except BaseException:
            self._ray.shutdown()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def require_card(self, device: str) -> None:
        """Raise DeviceError unless a node can compute on the device."""
        if device != "cuda":
            raise DeviceError(
                f"--device {device} names a card of one machine. On a cluster, where each task gets a card, write cuda."
            )
        if not any(node.cards for node in self.nodes):
            raise DeviceError("No node that can read the checkpoint has a GPU. Drop --device, or add such a node.")

    def shares(self, folder: Path) -> bool:
        """Whether every node that works can write into a folder of this machine; later ones must then too."""
        whole = self._seeing(folder, [node.id for node in self.nodes]) == len(self.nodes)
        self._folder = folder if whole else None
        return whole

    def _seeing(self, folder: Path, nodes: Sequence[str]) -> int:
        """How many of the nodes can write into a folder of this machine."""
        token = folder / f".alphaq-{uuid4().hex}"
        token.write_text(token.name, encoding="utf-8")
        try:
            asked = [self._on(node, sees).remote(str(token)) for node in nodes]
            return sum(self._ray.get(asked, timeout=WAIT_S))
        except (self._ray.exceptions.RayError, TimeoutError):
            return 0
        finally:
            token.unlink()

    def map(
        self, function: Callable[[Any, S], T], tasks: Iterable[S], size: Size[S] = no_bytes, on_card: bool = False
    ) -> Iterator[T]:
        """function(shared, task) for every task, in order, wherever there is room. on_card: only where there is a GPU.

        Raises what the first task that fails raises, and WorkerError if a batch is lost again and again.
        """
        ray = self._ray
        slots = sum(node.slots(on_card) for node in self.nodes)
        waiting = batches(tasks, size, self._needed, slots)
        queue: deque[Batch] = deque()  # in order; what is out, and what has come back before its turn
        load: dict[str, int] = {}
        more = True
        try:
            while queue or more:
                while more and (not queue or self._room(queue, load, on_card)):
                    batch = next(waiting, None)
                    more = batch is not None
                    if batch is not None:
                        queue.append(batch)
                        self._submit(function, batch, load, on_card)
                if not queue:
                    break
                self.told.most_out = max(self.told.most_out, len(queue))
                head = queue[0]
                if head.done:
                    assert head.refs is not None
                    try:
                        results, fault = ray.get(head.refs[1]), ray.get(head.refs[0])
                    except ray.exceptions.RayError as error:
                        self._again(function, head, load, on_card, error)
                        continue
                    queue.popleft()
                    head.refs = None  # lets the store drop them
                    yield from results
                    del results
                    if fault is not None:
                        raise fault
                    continue
                self._settle(function, queue, load, on_card)
        finally:
            for batch in queue:
                if batch.refs is not None and not batch.done:
                    with suppress(ray.exceptions.RayError):
                        ray.cancel(batch.refs[0], force=True)

    def _needed(self, task: Any) -> frozenset[str]:
        """Weight files that a task reads."""
        tensor = getattr(task, "tensor", None)
        under = getattr(self.shared, "shards_under", None)
        return frozenset() if tensor is None or under is None else frozenset(under(tensor))

    def _room(self, queue: Sequence[Batch], load: Mapping[str, int], on_card: bool) -> bool:
        """Whether one more may be out: done ones that wait for their turn count too, since their results are held."""
        slots = sum(node.slots(on_card) for node in self.nodes)
        return len(queue) < 2 * slots + len(self.nodes) and any(
            node.slots(on_card) + 1 > load.get(node.id, 0) for node in self.nodes if node.slots(on_card)
        )

    def _submit(self, function: Any, batch: Batch, load: dict[str, int], on_card: bool) -> None:
        """Give a batch to a node; where all that could take it are busy, the least busy one has it waiting."""
        deadline = time.monotonic() + WAIT_S
        is_told = False
        while True:
            able = [node for node in self.nodes if node.can(batch.needed, on_card)]
            if able:
                break
            if time.monotonic() > deadline:
                raise WorkerError(
                    f"No node of the cluster can {'compute on a GPU and ' if on_card else ''}read "
                    f"{', '.join(sorted(batch.needed)) or 'the checkpoint'}. Add nodes, or put the files where they "
                    "can be read, and repeat the command: what is finished is kept."
                )
            if not is_told:
                self.log("note: no node is left that could go on; waiting for one")
                is_told = True
            time.sleep(1.0)
            self._refresh()
        node = choose(able, load, batch.needed, on_card) or min(
            able, key=lambda one: load.get(one.id, 0) / one.slots(on_card)
        )
        batch.node, batch.where, batch.done = node.id, node.name, False
        load[node.id] = load.get(node.id, 0) + 1
        self.told.nodes[node.name] = self.told.nodes.get(node.name, 0) + len(batch.tasks)
        run = self._on(node.id, self._run, num_returns=2, num_cpus=0 if on_card else 1, num_gpus=1 if on_card else 0)
        batch.refs = tuple(run.remote([self._shared], function, batch.tasks))

    def _settle(self, function: Any, queue: Iterable[Batch], load: dict[str, int], on_card: bool) -> None:
        """Wait until a batch is done or lost; lost ones are given out again."""
        ray = self._ray
        out = {batch.refs[0]: batch for batch in queue if batch.refs is not None and not batch.done}
        ready, _ = ray.wait(list(out), num_returns=1, timeout=REFRESH_S)
        if time.monotonic() - self._refreshed > REFRESH_S:
            self._refresh()
        for ref in ready:
            batch = out[ref]
            try:
                ray.get(ref)
            except ray.exceptions.RayTaskError as error:
                raise error.as_instanceof_cause() from None  # a defect: with the traceback of where it was
            except ray.exceptions.RayError as error:
                self._again(function, batch, load, on_card, error)
            else:
                batch.done = True
                self._leave(batch, load)

    def _again(self, function: Any, batch: Batch, load: dict[str, int], on_card: bool, error: BaseException) -> None:
        """Give a lost batch to another node. Raises WorkerError after too many tries."""
        if not batch.done:  # else only its results were lost, on their way
            self._leave(batch, load)
        batch.tries += 1
        reason = (str(error).strip() or "no reason given").splitlines()[0].partition(". ")[0]
        why = f"{type(error).__name__}: {reason}"
        if type(error).__name__ in GONE and batch.node is not None:
            self._known[batch.node] = None  # Ray goes on to list it for a while; one that returns has another id
        what = f"{_label(batch.tasks[0])} and {len(batch.tasks) - 1} more"
        if batch.tries >= MOST_TRIES:
            raise WorkerError(
                f"{what} were lost {batch.tries} times, last on {batch.where} ({why}). Give nodes more memory or use "
                "fewer --workers, and repeat the command: what is finished is kept."
            )
        self.told.retried += 1
        self.log(f"note: again, after a loss: {what}; were on {batch.where}; {why}")
        self._refresh()
        self._submit(function, batch, load, on_card)

    def _leave(self, batch: Batch, load: dict[str, int]) -> None:
        if batch.node is not None:
            load[batch.node] -= 1

    def _on(self, node: str, function: Any, **options: Any) -> Any:
        """A function bound to a node; Ray itself does not try again."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        remote = function if hasattr(function, "options") else self._ray.remote(function)
        place = NodeAffinitySchedulingStrategy(node, soft=False)
        return remote.options(**{"num_cpus": 0, "max_retries": 0, "scheduling_strategy": place, **options})

    def _refresh(self, first: bool = False) -> None:
        """Look which nodes there are; new ones are asked what they can read."""
        ray = self._ray
        alive = {one["NodeID"]: one for one in ray.nodes() if one["Alive"]}
        fresh = {key: self._on(key, probe).remote([self._shared]) for key in alive if key not in self._known}
        refused = []
        if fresh:  # all at once: one that is gone but not missed yet would hold up the others
            ray.wait(list(fresh.values()), num_returns=len(fresh), timeout=WAIT_S)
        for key, ref in fresh.items():
            resources, name = alive[key].get("Resources", {}), alive[key].get("NodeManagerHostname", key[:8])
            self._known[key] = None
            try:
                version, files = ray.get(ref, timeout=0.1)
            except (ray.exceptions.RayError, TimeoutError) as error:
                refused.append(f"{name}: {(str(error).strip() or type(error).__name__).splitlines()[-1]}")
                continue
            if version != own_version():
                refused.append(f"{name} has {version}, this machine {own_version()}")
                continue
            if files is not None and not files:
                refused.append(f"{name} cannot read the weights")
                continue
            folder = self._folder if self._folder is not None and self._folder.is_dir() else None
            if folder is not None and not self._seeing(folder, [key]):
                refused.append(f"{name} cannot write into {folder}")
                continue
            cores, cards = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
            self._known[key] = Node(key, f"{name} ({key[:8]})", cores, cards, files)
        self.nodes = limited([node for key in alive if (node := self._known.get(key)) is not None], self.most)
        self.count = sum(node.cores for node in self.nodes)
        self._refreshed = time.monotonic()
        for why in refused:
            self.log(f"note: a node is left out: {why}")
        if first and not self.count:
            raise WorkerError(
                f"No node of the Ray cluster can do the work ({'; '.join(refused) or 'none has a core'}). Nodes need "
                "this version of alphaq, and to read the checkpoint under the same path or address."
            )


def _note(line: str) -> None:
    err.print(line, markup=False, highlight=False, soft_wrap=True)


def _label(task: Any) -> str:
    """What a task is about."""
    for name in ("matrix", "entry"):
        if (about := getattr(task, name, None)) is not None:
            return str(about.name)
    return str(getattr(task, "name", type(task).__name__))
