"""Processes that compute: started once, deaf to Ctrl-C, gone when their parent is, and replaced where one dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from typing import Any


class WorkerDied(RuntimeError):
    """A task ended its process, twice."""


class Task:
    """A call that a worker makes; `Workers.result` gives its answer."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.call = function, *arguments
        self.future: Future[Any] | None = None


class Workers:
    """A pool of processes, to be closed by `with`.

    They are forked from one that has imported `modules` and nothing else, so that each starts at once and none shares
    a GPU's context with its parent. Those that are busy when the block ends are stopped.

    Args:
        number: of processes.
        modules: what their calls need.
    """

    def __init__(self, number: int, modules: Sequence[str] = ()) -> None:
        self._number = number
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, *modules])
        self._tasks: list[Task] = []
        self._pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        resource_tracker.ensure_running()  # which would let the signal through again
        with _uninterrupted():
            # Who interrupts a command interrupts all its processes: its first is to hear it, and children inherit that.
            forkserver.ensure_running()
        return ProcessPoolExecutor(self._number, self._context, _end_with_parent)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Task:
        """Have a function of a module called, with arguments that can be pickled."""
        task = Task(function, arguments)
        task.future = self._pool.submit(*task.call)
        self._tasks.append(task)
        return task

    def result(self, task: Task, timeout: float | None = None) -> Any:
        """What the call gave; what it raised is raised.

        Raises:
            TimeoutError: it is not ready after `timeout` seconds.
            WorkerDied: its process ends whenever the call is made.
        """
        assert task.future is not None
        try:
            return task.future.result(timeout)
        except BrokenProcessPool:
            pass  # by this call or by another one: alone it shows
        self._restart()
        task.future = self._pool.submit(*task.call)
        try:
            return task.future.result(timeout)
        except BrokenProcessPool as error:
            self._restart()
            raise WorkerDied("its process died") from error
        finally:
            for other in self._tasks:
                if other is not task and other.future and (not other.future.done() or _broken(other.future)):
                    other.future = self._pool.submit(*other.call)

    def _restart(self) -> None:
        self._stop()
        self._pool = self._start()

    def _stop(self) -> None:
        with _uninterrupted():  # by who presses Ctrl-C twice
            processes = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()
            for process in processes:
                process.join()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _broken(future: Future[Any]) -> bool:
    return future.cancelled() or isinstance(future.exception(), BrokenProcessPool)


def _end_with_parent() -> None:
    """Let this process end when its parent is gone, killed too: nobody else would tell it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
