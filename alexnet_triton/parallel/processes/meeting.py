"""How the processes of a run find each other: what torchrun says in the environment, and the store that it names."""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist


class Place(NamedTuple):
    """This process among those of a run, as its environment has it."""

    rank: int
    size: int
    host: str
    """The name of rank 0's machine."""
    port: int
    """Of the store, on that machine."""


def size_of_run() -> int:
    """How many processes the run has: WORLD_SIZE, or 1.

    Raises:
        RuntimeError: it is no whole number.
    """
    return number("WORLD_SIZE", 1)


def place_in_run(size: int) -> Place:
    """This process's place among so many.

    Raises:
        RuntimeError: the environment is not torchrun's.
    """
    place = Place(number("RANK"), size, _word("MASTER_ADDR"), number("MASTER_PORT"))
    if place.rank >= size:
        raise RuntimeError(f"RANK is {place.rank}, and WORLD_SIZE {size}: ranks are 0 to {size - 1}, one a process")
    return place


def store_of_run(place: Place, minutes: float) -> dist.TCPStore:
    """The store by which the processes meet: that of torchrun, or of rank 0.

    Args:
        place: this process's.
        minutes: after which it gives up.

    Raises:
        RuntimeError: nobody answers there, or, in rank 0, another program does.
    """
    rank, _, host, port = place
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    timeout = timedelta(minutes=minutes)
    try:
        if not serves:
            _await(host, port, 60 * minutes)
        store: dist.TCPStore = _in_time(
            lambda: dist.TCPStore(
                host, port, is_master=serves, timeout=timeout, wait_for_workers=False, multi_tenant=True
            ),
            60 * minutes,
        )
        return store
    except (RuntimeError, OSError) as error:
        if "EADDRINUSE" in str(error):
            raise RuntimeError(
                f"MASTER_PORT {port} is in use on {host!r}: choose another, or start with torchrun --standalone, "
                "which finds a free one"
            ) from error
        verb = "listen" if serves else "reach rank 0"
        raise RuntimeError(
            f"rank {rank} cannot {verb} at {host}:{port} in {minutes:g} minutes ({str(error).splitlines()[0]}): see "
            "that MASTER_ADDR is the machine of rank 0, MASTER_PORT a free port of it, and that rank 0 runs"
        ) from error


def number(name: str, default: int | None = None) -> int:
    """A whole number from the environment, at least 0.

    Raises:
        RuntimeError: it is something else, or not there and without default.
    """
    if default is not None and name not in os.environ:
        return default
    word = _word(name)
    if not word.isdecimal():
        raise RuntimeError(f"{name} is {word!r} and must be a whole number: start with torchrun, or unset WORLD_SIZE")
    return int(word)


def _word(name: str) -> str:
    if name not in os.environ:
        size = os.environ.get("WORLD_SIZE")
        raise RuntimeError(f"WORLD_SIZE is {size} and {name} is not set: start with torchrun, or unset WORLD_SIZE")
    return os.environ[name]


def _await(host: str, port: int, seconds: float) -> None:
    """Wait until somebody listens there; the store's own client writes a page of C++ frames where nobody does."""
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), seconds).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
        time.sleep(0.1)


def _in_time(call: Callable[[], Any], seconds: float) -> Any:
    """What a call gives that may never return: the store's client waits for an answer without end."""
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError("what listens there does not answer") from None
    if error is not None:
        raise error
    return answer
