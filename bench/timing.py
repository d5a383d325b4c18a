"""Timings that can be compared: taken in turn, in one run, and summed up by medians."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Samples = dict[str, list[float]]


def in_turn(functions: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> Samples:
    """Seconds of each function in each of `rounds` rounds, after a first round that is not counted.

    Every round runs every function once, so that what slows the machine down for a while slows all alike;
    the order turns from round to round.
    """
    samples: Samples = {name: [] for name in functions}
    names = list(functions)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            _wait(device)
            start = time.perf_counter()
            functions[name]()
            _wait(device)
            if number:
                samples[name].append(time.perf_counter() - start)
    return samples


def summary(samples: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in seconds, and the number of samples."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else samples * 4
    return {"median": statistics.median(samples), "p20": fifths[0], "p80": fifths[3], "samples": len(samples)}


def speedup(samples: Samples, ours: str, theirs: str) -> float:
    """Median over the rounds of their time divided by ours."""
    return statistics.median(b / a for a, b in zip(samples[ours], samples[theirs], strict=True))


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a figure must name: the processor, its threads, and the versions."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU: {_cpu_name()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    commit = _commit()
    return {**facts, "commit": commit} if commit else facts


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
