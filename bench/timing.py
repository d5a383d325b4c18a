"""Timings that can be compared: taken in turn, in one run, and summed up by medians."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from alexnet_triton.backend import interpreting

Samples = dict[str, list[float]]


def in_turn(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device | str = "cpu",
    *,
    host: bool = True,
    seconds: float = math.inf,
) -> Samples:
    """Seconds of each function in each of `rounds` rounds, after rounds that do not count: one, on a GPU three.

    Every round runs every function once, so that what slows the machine down for a while slows all alike;
    the order turns from round to round. On a GPU the time is that between two of its own events, and its second-level
    cache is overwritten before every sample.

    Args:
        functions: by name.
        rounds: samples of each.
        device: where they run.
        host: on a GPU, whether the host's time counts, as it does for who calls eagerly; else the device is kept
            busy until a sample's launches are in its queue.
        seconds: no round begins later than this, once three have been counted.
    """
    device = torch.device(device)
    timed = _on_gpu(device, host) if device.type == "cuda" else _on_cpu
    warm = 3 if device.type == "cuda" else 1
    taken: dict[str, list[Callable[[], float]]] = {name: [] for name in functions}
    names = list(functions)
    start = time.monotonic()
    for number in range(warm + rounds):
        if number >= warm + 3 and time.monotonic() - start > seconds:
            break
        for name in names[number % len(names) :] + names[: number % len(names)]:
            sample = timed(functions[name])
            if number >= warm:
                taken[name].append(sample)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return {name: [sample() for sample in samples] for name, samples in taken.items()}


AHEAD = 2_000_000
"""Cycles that a GPU is kept busy while the host puts a sample's launches into its queue, about a millisecond."""


def _on_gpu(device: torch.device, host: bool) -> Callable[[Callable[[], Any]], Callable[[], float]]:
    flushed = torch.empty(256 * 2**20, dtype=torch.int8, device=device)

    def timed(function: Callable[[], Any]) -> Callable[[], float]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flushed.zero_()
        if host:
            torch.cuda.synchronize(device)
        else:
            torch.cuda._sleep(AHEAD)
        start.record()
        function()
        end.record()
        return lambda: start.elapsed_time(end) / 1e3  # known once the device has come to the end

    return timed


def _on_cpu(function: Callable[[], Any]) -> Callable[[], float]:
    start = time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    return lambda: seconds


def over_sets(function: Callable[..., Any], sets: Iterable[Any]) -> Callable[[], Any]:
    """`function` of the next of `sets` at each call, so that one set's data is not what a cache holds."""
    turn = itertools.cycle(sets)
    return lambda: function(next(turn))


def summary(samples: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in seconds, and the number of samples."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else samples * 4
    return {"median": statistics.median(samples), "p20": fifths[0], "p80": fifths[3], "samples": len(samples)}


def speedup(samples: Samples, ours: str, theirs: str) -> float:
    """Median over the rounds of their time divided by ours."""
    return statistics.median(b / a for a, b in zip(samples[ours], samples[theirs], strict=True))


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a figure must name: the processor or the card with its driver and clocks, threads, versions, commit."""
    facts: dict[str, Any] = {
        "device": f"CPU: {_cpu_name()}" + (", in Triton's interpreter" if interpreting() else ""),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if torch.device(device).type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        told = nvidia_smi()
        if told:
            facts["driver"] = told["driver_version"]
            clocks = ("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem")
            facts["clocks"] = "{} of {} (SM), {} of {} (memory)".format(*(told[name] for name in clocks))
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts["triton"] = metadata.version("triton")
    commit = _commit()
    return {**facts, "commit": commit} if commit else facts


def heading(facts: Mapping[str, Any]) -> str:
    """A machine's facts, of `machine`, as the line above a table."""
    names = ("torch", "triton", "driver")
    threads = [f"{facts['threads']} threads"] if facts["device"].startswith("CPU") else []
    versions = [f"{name} {facts[name]}" for name in names if facts.get(name)]
    return ", ".join([facts["device"], *threads, *versions, facts["date"]])


def duration(seconds: float) -> str:
    """Seconds in a unit that suits them, for a table."""
    return f"{seconds * 1e3:,.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:,.1f} us"


QUERY = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit",
    "temperature.gpu", "mig.mode.current", "clocks_event_reasons.active",
)  # fmt: skip


def nvidia_smi() -> dict[str, str]:
    """What `nvidia-smi` says of the first card, by the names in `QUERY`; empty where it says nothing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    cells = [cell.strip() for cell in answer.strip().split(",")]
    return dict(zip(QUERY, cells, strict=True)) if len(cells) == len(QUERY) else {}


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
