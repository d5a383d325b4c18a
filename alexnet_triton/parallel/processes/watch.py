"""Which process of a run has died, by its rank; and that the others end with it.

torch's communication does not say. gloo names an address that has hung up, and NCCL waits for minutes, in a call that
nothing in Python can interrupt. So every process keeps a line of its own to a hub, a thread of rank 0. A process that
is killed hangs up, which the hub hears at once; one that hangs, or whose machine is gone, falls silent; one that fails
says why. The hub tells the others, and they end with that sentence.

The store by which the processes have met would do for this but for two things: its clients wait without limit for a
server that is stopped, and a process that was killed is known by its silence alone.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch.distributed as dist

from alexnet_triton.parallel.processes.hub import Hub, Link, Listener

SILENCE = 35.0
"""Seconds without one after which a process is given up. While a call holds Python's lock, as a compiler's may for half
a minute, nothing is heard of its process."""

GRACE = 20.0
"""Seconds in which a process comes to its end by itself once another is lost. torchrun gives 30."""

UNHURRIED = 15
"""Times as long where the other was asked to stop, since this process may have been asked too."""

PATIENCE = 5.0
"""Seconds for which a process that finds a connection broken waits to hear why. It is a matter of milliseconds."""

ABANDONED = 3
"""Exit code of a process that did not come to its end by itself."""

KEY = "alexnet_triton/watch"
"""Where the store has the hub's port, token and place."""


class ProcessLost(RuntimeError):
    """Another process of the run has died, hangs or has failed, and the run cannot go on without it.

    Attributes:
        rank: of that process.
        here: rank of this one.
    """

    def __init__(self, message: str, rank: int, here: int) -> None:
        super().__init__(message)
        self.rank, self.here = rank, here

    @property
    def to_be_said(self) -> bool:
        """Whether it is for this process to say so: rank 0 speaks for all, and where it is lost each for itself."""
        return 0 in (self.rank, self.here)


class Terminated(SystemExit):
    """SIGTERM came: torchrun sends it to all when one of its processes has ended."""


class Watch(Listener):
    """This process's line to the hub; where this process is rank 0, the hub too.

    Within its block SIGTERM raises `Terminated`.

    Args:
        store: by which the processes meet.
        rank: of this process.
        size: how many there are.
        host: the name that all know rank 0's machine by.
        seconds: in which all must have come.
        silence: seconds without a sign of life after which a process is given up.
        grace: seconds in which this process must come to its end once another is lost. Then the thread ends it: its
            main thread waits in a call that neither a signal nor an exception reaches, and to abort the communication
            from here may hang as well, or let the call return with numbers that nobody has sent.

    Attributes:
        token: a word that the processes of this start share, and none of an earlier one.

    Raises:
        RuntimeError: rank 0 has not come, or cannot be reached.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        host: str,
        seconds: float,
        silence: float = SILENCE,
        grace: float = GRACE,
    ) -> None:
        super().__init__(silence)
        self.rank, self.size, self.grace = rank, size, grace
        self._news = threading.Condition()
        self._lost: ProcessLost | None = None
        self._met = self._over = False
        self._own: BaseException | None = None
        self._deadline = float("inf")
        self._before: Any = None
        self._hub: Hub | None = None
        self._where = f"process {os.getpid()} on {socket.gethostname()}"
        if rank == 0:
            self._hub = Hub(size, host, seconds, silence)
            self._hub.start()
            store.set(KEY, json.dumps([self._hub.port, self._hub.token, self._where]))
        try:
            self._link, self.token, self._where_hub = _reach(store, host, seconds)
        except (RuntimeError, OSError) as error:
            self.close()
            raise RuntimeError(
                f"rank {rank} of {size} cannot reach rank 0 at {host!r} ({str(error).splitlines()[0]}): see what that "
                "process said, and that its machine lets the others in"
            ) from error
        self._add(self._link)

    # --- the main thread's side ---------------------------------------------------------------------------------------

    def __enter__(self) -> Watch:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._terminate) or signal.SIG_DFL
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def close(self) -> None:
        """End the line, and the hub if it is here."""
        super().close()
        if self._hub is not None:
            self._hub.close()

    def meet(self, device: str, complaint: str = "") -> None:
        """Wait until all processes have come.

        Args:
            device: the type of the device that this process computes on, which must be the same in all.
            complaint: why it cannot take part.

        Raises:
            RuntimeError: with the complaint.
            ProcessLost: another process has one, or has not come in time.
        """
        with self._news:
            self._link.send("hello", self.token, self.rank, self._where, device, complaint)
            self._news.wait_for(lambda: self._met or self._lost)
            if complaint:
                raise RuntimeError(complaint)
            if self._lost is not None:
                raise self._lost

    def end(self) -> None:
        """Wait until all processes have come to the end.

        Raises:
            ProcessLost: one has not.
        """
        with self._news:
            self._link.send("done")
            self._news.wait_for(lambda: self._over or self._lost)
            if self._lost is not None and not self._over:
                raise self._lost

    def leave(self, error: BaseException) -> BaseException:
        """Say that this process ends by an exception, unless that follows from the end of another.

        From here on SIGTERM does nothing, since this process is about to end.

        Returns:
            The exception to end by: `error`, or a `ProcessLost`.
        """
        self._own, self._deadline = error, float("inf")
        with self._news:
            if not isinstance(error, ProcessLost):
                self._own = error = self._reason(error)
            self._deadline = time.monotonic() + self.grace
        return error

    def _reason(self, error: BaseException) -> BaseException:
        """The exception to end by, once the others know; takes no longer than patience and grace."""
        if _may_follow(error) and self._news.wait_for(lambda: self._lost, PATIENCE):
            assert self._lost is not None
            return self._lost
        stopped = isinstance(error, (KeyboardInterrupt, Terminated))
        if stopped:  # as a rule all are, and one may be writing a checkpoint still
            self._link.send("done")
            if self._news.wait_for(lambda: self._over or self._lost, self.grace):
                return error
        self._link.send("failed", _first_line(error), not stopped)
        self._news.wait_for(lambda: self._lost, PATIENCE)  # until the others have been told
        return error

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if self._own is None:
            raise Terminated(128 + number)

    # --- the thread's side --------------------------------------------------------------------------------------------

    def _heard(self, link: Link, kind: str, *words: Any) -> None:
        with self._news:
            if kind == "met":
                self._met = True
            elif kind == "over":
                self._over = True
            elif kind == "lost":
                self._lose(*words)
            self._news.notify_all()

    def _gone(self, link: Link, silent: bool) -> None:
        with self._news:
            if not self._over:
                self._lose(0, f"rank 0 of {self.size} ({self._where_hub}) {self._ended(silent)}", True)
            self._news.notify_all()

    def _turn(self, now: float) -> None:
        if now <= self._deadline:
            return
        error = self._own or self._lost
        if not isinstance(error, ProcessLost) or error.to_be_said:
            sys.stderr.write(f"alexnet-triton: {error}\n")  # in one piece, among what the others say
            sys.stderr.flush()
        os._exit(ABANDONED)

    def _lose(self, rank: int, message: str, hurry: bool) -> None:
        if self._lost is None:
            self._lost = ProcessLost(message, rank, self.rank)
            self._deadline = time.monotonic() + self.grace * (1 if hurry else UNHURRIED)


def _reach(store: dist.Store, host: str, seconds: float) -> tuple[Link, str, str]:
    """A link to the hub, its token, and where it is; torchrun's store may remember that of an earlier start."""
    until = time.monotonic() + seconds
    while True:
        port, token, where = json.loads(store.get(KEY))
        try:
            return Link(socket.create_connection((host, port), seconds)), token, where
        except OSError:
            if time.monotonic() > until:
                raise
        time.sleep(0.1)


def _may_follow(error: BaseException) -> bool:
    """Whether an exception may come from the end of another process: gloo raises RuntimeError itself."""
    return type(error) is RuntimeError or isinstance(error, (dist.DistError, Terminated))


def _first_line(error: BaseException) -> str:
    if isinstance(error, Terminated):
        return "SIGTERM"
    if isinstance(error, SystemExit):
        return f"it has left with exit code {error.code}"
    return (str(error).splitlines() or [type(error).__name__])[0]
