"""Result files: a JSON object a benchmark, with its machine and method; whole after every row."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from alexnet_triton.bench.checks import Measure
from alexnet_triton.bench.timing import machine
from alexnet_triton.configs import cache

Rows = Callable[[], Iterable[dict[str, Any]]]
"""Measures some rows, and gives each as it comes."""


def envelope(
    benchmark: str, device: torch.device | str, method: str, roofs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a result file holds beside its rows.

    Args:
        benchmark: its name; the file is called so.
        device: where it is measured.
        method: how, in a sentence or two.
        roofs: of the device, from `roofs.measure`; None where the benchmark needs none.
    """
    head = {"benchmark": benchmark, "machine": machine(device), "method": method, "measured": True}
    return {**head, "roofs": dict(roofs)} if roofs else head


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON; whatever ends the process, the file is the old one or the new one.

    Raises:
        ValueError: a figure that JSON does not have (NaN, infinity).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    cache.write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read(path: Path, benchmark: str) -> dict[str, Any]:
    """A result file's content.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or another benchmark's.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    found = content.get("benchmark") if isinstance(content, dict) else None
    if found != benchmark:
        raise ValueError(f"{path} is a result of {found!r}, expected {benchmark!r}")
    return dict(content)


def add_row(path: Path, head: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """Add a row to a result file, which begins as `head` (of `envelope`) where there is none."""
    rows = read(path, head["benchmark"])["rows"] if path.exists() else []
    write(path, {**head, "rows": [*rows, row]})


def checked(measure: Measure, figures: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What a row says of its check, and the figures only if that held; else a sentence under `"failed"`."""
    if not measure.holds:
        why = f"{measure.name}: off by {measure.value:.3g} of its scale, the limit is {measure.limit:.3g}"
        error = measure.value if math.isfinite(measure.value) else None
        return {"check": {"error": error, "limit": measure.limit}, "failed": why}
    return {"check": {"error": measure.value, "limit": measure.limit}, **figures()}


def measure_cases(
    path: Path, head: Mapping[str, Any], cases: Sequence[tuple[str, Rows]], progress: bool
) -> dict[str, Any]:
    """Measure all cases into a new file, whole after every row, and give its content.

    Args:
        path: of the file; an older one is replaced.
        head: of `envelope`.
        cases: the rows' functions by name.
        progress: show a progress bar.
    """
    from tqdm import tqdm

    write(path, {**head, "rows": []})
    with tqdm(cases, desc=f"bench {head['benchmark']}", disable=not progress) as bar:
        for name, rows in bar:
            bar.set_postfix_str(name)
            for row in rows():
                add_row(path, head, row)
    return read(path, head["benchmark"])
