"""Result files as pictures take them: read, checked row by row."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alexnet_triton.bench import results
from alexnet_triton.bench.results import OURS

Row = Mapping[str, Any]

LAYER = {"variant": str, "layer": str, "direction": str, "dtype": str, "batch": int}
WORK = {"flop": float, "bytes": float, "floor": float}
FIELDS: Mapping[str, Mapping[str, type]] = {
    "layers": {**LAYER, **WORK},
    "model": {"task": str, "variant": str, "dtype": str, "batch": int},
    "lpips": {"task": str, "size": int, "dtype": str, "batch": int},
    "predict": {**LAYER, **WORK, "estimate": float},
    "tuning": {**LAYER, "config": dict},
    "parallel": {"task": str, "layout": str, "processes": int, "variant": str, "dtype": str, "batch": int},
}
"""By benchmark, what every row must have: texts, counts, and numbers, in operations, bytes and seconds."""

OPTIONAL: Mapping[str, type] = {"variant": str, "torch_bytes": float, "bound": str, "failed": str, "absent": dict}
"""What a row may have; null counts as not there."""


@dataclass(frozen=True)
class Result:
    """A result file that has been read and checked."""

    path: Path
    benchmark: str
    """Of `FIELDS`."""
    machine: Mapping[str, Any]
    method: str
    measured: bool
    """False for a model's estimate."""
    roofs: Mapping[str, Any]
    rows: Sequence[Row]
    """Each with `times`, summaries in seconds by peer; a tuning log's rows, each a trial, as they are."""
    failed: Sequence[Row]
    """Those that have no time, each with a sentence under `failed`."""

    @property
    def title(self) -> str:
        """Where the figures are from: said in every title."""
        device = str(self.machine["device"])
        if not self.measured:
            return f"a model's estimate for {device}"
        return "on a CPU" if self.on_cpu else f"on {device}"

    @property
    def on_cpu(self) -> bool:
        """Whether the machine is a CPU."""
        return str(self.machine["device"]).startswith("CPU")


def read(path: Path, benchmarks: Sequence[str]) -> Result:
    """Read a result file.

    Args:
        path: a JSON file that a benchmark has written.
        benchmarks: those that are wanted, of `FIELDS`.

    Raises:
        ValueError: the file is missing, no JSON, another benchmark's, lacks something, or has no row with a time.
    """
    content = results.read(path, *benchmarks)
    benchmark: str = content["benchmark"]
    machine, rows = content.get("machine"), content.get("rows")
    if not isinstance(machine, dict) or not isinstance(machine.get("device"), str):
        raise ValueError(f'{path} does not name its machine (no "machine" with a "device")')
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} has no rows; run the benchmark again")
    kept: list[Row] = []
    places: dict[str, int] = {}
    failed: list[Row] = []
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        _check_fields(row, FIELDS[benchmark], where)
        place = json.dumps([row[name] for name, kind in FIELDS[benchmark].items() if kind is not float])
        if places.setdefault(place, number) != number:
            raise ValueError(f"{where} is for the same as row {places[place]}")
        if benchmark == "tuning":
            _check_trial(row, where)
            kept.append(row)
        elif row.get("failed"):
            failed.append(row)
        else:
            kept.append({**row, "times": _times(row, benchmark, where)})
    if not kept:
        raise ValueError(f"{path} has no row with a time: all {len(rows)} failed. {failure_of(failed[0])}")
    method = content.get("method")
    measured = benchmark != "predict" and content.get("measured") is not False
    return Result(
        path, benchmark, machine, method if isinstance(method, str) else "", measured,
        content.get("roofs") or {}, kept, failed,
    )  # fmt: skip


def _check_fields(row: Any, fields: Mapping[str, type], where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no object")
    given = {name: kind for name, kind in OPTIONAL.items() if row.get(name) is not None}
    for name, kind in {**given, **fields}.items():
        value: Any = row.get(name)
        if kind is float:
            least = "a number from 0 on" if name == "flop" else "a positive number"
            fits = is_number(value) and (value > 0 or (name == "flop" and value == 0))
        elif kind is int:
            least, fits = "a count from 1 on", type(value) is int and value > 0
        elif kind is str:
            least, fits = "a text", isinstance(value, str) and value != ""
        else:
            least, fits = "an object", isinstance(value, kind)
        if not fits:
            raise ValueError(f'{where}: "{name}" must be {least}, got {json.dumps(value)}')


def is_number(value: Any) -> bool:
    """Whether a value of a file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _times(row: Row, benchmark: str, where: str) -> dict[str, Mapping[str, float]]:
    if benchmark == "predict":
        estimate: float = row["estimate"]
        return {OURS: {"median": estimate, "p20": estimate, "p80": estimate}}
    times = row.get("times")
    if not isinstance(times, dict) or not times:
        raise ValueError(f'{where} has neither "times" nor "failed"')
    for peer, summary in times.items():
        _check_summary(summary, f"{where}: {{name}} of {peer}")
    return times


def _check_summary(summary: Any, where: str) -> None:
    for name in ("median", "p20", "p80"):
        value: Any = summary.get(name) if isinstance(summary, dict) else None
        if not is_number(value) or value <= 0:
            raise ValueError(f"{where.format(name=json.dumps(name))} must be positive seconds, got {json.dumps(value)}")


def _check_trial(row: Row, where: str) -> None:
    if row.get("time") is not None:
        _check_summary(row["time"], f"{where}: {{name}} of its time")
    cycles: Any = row.get("cycles")
    if cycles is not None and (not is_number(cycles) or cycles <= 0):
        raise ValueError(f'{where}: "cycles" must be a positive number or null, got {json.dumps(cycles)}')
    pruned: Any = row.get("pruned")
    if pruned is not None and not (isinstance(pruned, dict) and isinstance(pruned.get("reason"), str)):
        raise ValueError(f'{where}: "pruned" must have a "reason" or be null, got {json.dumps(pruned)}')


def failure_of(row: Row) -> str:
    """Which row failed, and why, in words."""
    words = [row.get("layer") or row.get("task"), row.get("direction"), row.get("variant"), row["dtype"]]
    return f"{' '.join(word for word in words if word)} batch {row['batch']}: {row['failed']}"
