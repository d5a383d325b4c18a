"""Fresh processes that have joined one another, each on a device of its own, and do what they are asked in turn."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

import torch

from alexnet_triton.parallel.processes.watch import ProcessLost
from alexnet_triton.parallel.processes.world import World, world

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"

STARTING = 120.0
"""Seconds that processes have to start and to join."""

GRACE = 60.0
"""Seconds that the others have to end in once one of them has failed."""


@dataclass
class Process:
    """One of the processes, as what it is asked to call sees it."""

    world: World
    kept: dict[str, Any] = field(default_factory=dict)
    """What calls leave for those after them."""

    def barrier(self) -> None:
        """Wait until all processes are here and their devices idle."""
        self.world.sum(torch.zeros(1, device=self.world.device)).item()
        self.synchronize()

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)


class ProcessesFailed(RuntimeError):
    """A call has failed, in one process at least, and all have ended.

    Attributes:
        said: by each in the order of ranks, why it has ended; None where it did so without a word, or was ended.
    """

    def __init__(self, message: str, said: list[str | None]) -> None:
        super().__init__(message)
        self.said = said


class Processes:
    """So many processes, which start at once and have joined where a `with` begins, and end with it or this process.

    On GPUs each has the one of its rank, over NCCL. On a CPU each computes with one thread, bound to a core of its own
    where the system can do so, over gloo.

    Args:
        size: how many.
        kind: of device, `"cuda"` or `"cpu"`.

    Attributes:
        ids: of the processes, in the order of ranks.
    """

    def __init__(self, size: int, kind: str) -> None:
        self.size, self.kind = size, kind
        self.ids: list[int] = []
        self._started: list[subprocess.Popen[bytes]] = []
        self._links: list[Connection] = []
        self._files = ExitStack()
        self._log = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
        told |= {"LOCAL_WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": LOOPBACK, "NCCL_SOCKET_IFNAME": LOOPBACK}
        environment = {**os.environ, **told}
        if kind == "cpu":
            environment["OMP_NUM_THREADS"] = "1"
            environment.pop("TRITON_INTERPRET", None)  # minutes for what PyTorch's own ops do at once
        for rank in range(size):
            self._start({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, kind)

    def _start(self, environment: dict[str, str], kind: str) -> None:
        here, there = Pipe()
        with there:
            command = [sys.executable, "-m", "alexnet_triton.bench.parallel_processes", str(there.fileno()), kind]
            process = subprocess.Popen(
                command, env=environment, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, stdout=self._log,
                stderr=self._log, start_new_session=True,
            )  # fmt: skip
        self._links.append(here)
        self._started.append(process)
        self.ids.append(process.pid)

    def call(self, function: Callable[..., Any], *args: Any, seconds: float = 300.0) -> list[Any]:
        """Have `function(process, *args)` called in each process.

        Args:
            function: of a module's top level.
            *args: what pickle can take.
            seconds: that they have.

        Returns:
            The answers in the order of ranks.

        Raises:
            ProcessesFailed: a process has raised, has died, or has not come to an end; all are ended then.
        """
        self.begin(function, *args)
        return self.finish(seconds)

    def begin(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the call made, and do not wait for it."""
        for link in self._links:
            with suppress(OSError):  # one that has died is found where answers are waited for
                link.send_bytes(pickle.dumps((function, args)))

    def finish(self, seconds: float) -> list[Any]:
        """Wait for the answers to a call that was begun; see `call`."""
        answers: dict[int, Any] = {}
        said: dict[int, str | None] = {}
        deadline = time.monotonic() + seconds
        while len(answers) + len(said) < self.size:
            left = [rank for rank in range(self.size) if rank not in answers and rank not in said]
            ready = wait([self._links[rank] for rank in left], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in left:
                if self._links[rank] not in ready:
                    continue
                try:
                    good, answer = pickle.loads(self._links[rank].recv_bytes())
                except (EOFError, OSError):
                    good, answer = False, None
                if good:
                    answers[rank] = answer
                    continue
                if not said:
                    deadline = time.monotonic() + GRACE
                said[rank] = answer
        if len(answers) == self.size:
            return [answers[rank] for rank in range(self.size)]
        raise self._failed(said, seconds)

    def _failed(self, said: dict[int, str | None], seconds: float) -> ProcessesFailed:
        """End all, and say why."""
        for rank, process in enumerate(self._started):
            if rank in said:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
        self._stop(0.0)
        words = [said.get(rank) for rank in range(self.size)]
        own = [word for word in words if word and not word.startswith(ProcessLost.__name__)]
        message = next(iter([*own, *filter(None, words)]), None)
        if message is None:
            what = "a process has died" if said else f"processes have not come to an end in {seconds:g} s"
            self._log.seek(0)
            message = f"{what}: {self._log.read().decode(errors='replace').strip()[-2000:] or 'nothing was said'}"
        self.end()
        return ProcessesFailed(message, words)

    def __enter__(self) -> Processes:
        """Wait until they have joined.

        Raises:
            ProcessesFailed: they cannot.
        """
        try:
            self.finish(STARTING)
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """End them."""
        self._stop(5.0)
        self._files.close()

    def _stop(self, patience: float) -> None:
        """Let them end by themselves within so many seconds, or end them."""
        for link in self._links:
            link.close()  # which one that waits for a call takes for the end
        for process in self._started:
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._started.clear()


# --- in the processes -------------------------------------------------------------------------------------------------


def _bind(rank: int) -> None:
    """Compute with one thread, on a core of one's own."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})


def _serve(link: Connection, kind: str) -> None:
    """Join the others, and make calls until there are no more."""
    from alexnet_triton.recipe.train.memory import keep_freed_memory

    keep_freed_memory()  # as training does
    if kind == "cpu":
        _bind(int(os.environ["RANK"]))
    try:
        with world(kind, minutes=STARTING / 60) as here:
            process = Process(here)
            link.send_bytes(pickle.dumps((True, None)))
            while True:
                try:
                    function, args = pickle.loads(link.recv_bytes())
                except (EOFError, OSError):
                    os._exit(0)  # all of the group do so: none needs to be heard
                link.send_bytes(pickle.dumps((True, function(process, *args))))
    except Exception as error:
        if not isinstance(error, ProcessLost):
            traceback.print_exc()
        link.send_bytes(pickle.dumps((False, f"{type(error).__name__}: {error}")))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), sys.argv[2])
