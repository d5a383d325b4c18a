"""Ctrl-C and SIGTERM, noted until a run has come to a place where it can stop."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, and has written what it needs to go on.

    Attributes:
        signal: number of the signal that asked.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal = number


class StopSignals:
    """While active, a first Ctrl-C or SIGTERM is only noted; a second Ctrl-C interrupts as usual.

    Args:
        insist: False notes the second Ctrl-C too. Processes that torchrun started get one from the terminal and one
            from torchrun.

    Attributes:
        asked: the signal that was noted, or 0.
    """

    def __init__(self, insist: bool = True) -> None:
        self.insist = insist
        self.asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self.asked = 0
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        except ValueError:  # not the main thread, which alone gets signals
            self._before.clear()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        if self.insist and number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
