"""Seconds of work on a GPU, comparable within one call."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

Name = TypeVar("Name")

AHEAD = 2_000_000
"""Cycles that the device is kept busy while the host puts the work into its queue, about a millisecond."""


def median_seconds(functions: Mapping[Name, Callable[[], Any]], rounds: int) -> dict[Name, float]:
    """Median of each function's time on the current GPU, over rounds that run all of them in turn.

    The second-level cache is overwritten before every sample, and the device is kept busy until its work is in the
    queue, so neither what ran before nor the host counts. Two rounds more come first, which do not count.
    """
    flushed = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    marks: dict[Name, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in functions}
    for number in range(2 + rounds):
        for name, function in functions.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flushed.zero_()
            torch.cuda._sleep(AHEAD)
            start.record()
            function()
            end.record()
            if number >= 2:
                marks[name].append((start, end))
        torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) / 1e3 for name, pairs in marks.items()}
