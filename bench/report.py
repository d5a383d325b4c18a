"""What a part of `make gpu` finds: checks are made one after another, and each leaves a line as it ends."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alexnet_triton.bench.checks import Absent, Measure, Scale

RESULTS = "gpu.jsonl"

LOST = 3
"""Exit code of a part's process whose device has failed for good, with the failure written down."""

Check = Callable[[], "Sequence[Measure] | dict[str, Any]"]


class Run(NamedTuple):
    """What a part is told."""

    device: torch.device
    scale: Scale
    seconds: float
    out: Path


class Report:
    """A file of results, one JSON object a line, that whatever ends the run leaves whole.

    Args:
        path: of the file; lines are added to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._running = path.with_suffix(".running")

    def write(self, part: str, case: str, status: str, **values: Any) -> None:
        """Add a result.

        Args:
            part: name of the part.
            case: what was done.
            status: `"passed"`, `"failed"`, `"skipped"`, or `"noted"` for figures that are not checked.
            **values: what was found.
        """
        row = {"part": part, "case": case, "status": status, **values, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        line = (json.dumps(_plain(row), allow_nan=False) + "\n").encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)  # one call, so that a line is there or is not
        finally:
            os.close(descriptor)
        text = f": {values['why']}" if "why" in values else ""
        print(f"{status:8}{part}: {case}{text}", flush=True)

    def begin(self, part: str, case: str) -> None:
        """Note what is being done, for whoever finds the process dead."""
        self._running.write_text(json.dumps([part, case]))

    def in_flight(self, part: str) -> str | None:
        """The case of `part` that was begun last and has no result."""
        try:
            of, case = json.loads(self._running.read_text())
        except (OSError, ValueError):
            return None
        return case if of == part and case not in self.done(part) else None

    def done(self, part: str) -> set[str]:
        """The cases of `part` that have a result."""
        return {row["case"] for row in self.rows() if row["part"] == part}

    def status(self, part: str, case: str) -> str | None:
        """What came of a case; None where it has no result."""
        return next((row["status"] for row in self.rows() if (row["part"], row["case"]) == (part, case)), None)

    def rows(self) -> list[dict[str, Any]]:
        """The results so far."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def _plain(value: Any) -> Any:
    """With numbers that JSON has not as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def run_cases(report: Report, part: str, cases: Iterable[tuple[str, Check]], run: Run) -> int:
    """Make the checks of a part, and write down each result, that of a check that raises too.

    Args:
        report: where results go; cases that it has are not made again.
        part: name of the part.
        cases: the checks by name.
        run: the device, and the seconds within which the last check must have begun.

    Returns:
        Exit code: 0, 1 if a check failed, `LOST` if the device went with it.
    """
    end = time.monotonic() + run.seconds
    done = report.done(part)
    code = 0
    for name, check in cases:
        if name in done:
            continue
        start = time.monotonic()
        if start > end:
            report.write(part, name, "skipped", why="no time was left")
            continue
        report.begin(part, name)
        try:
            found = check()
        except Absent as absent:
            report.write(part, name, "skipped", why=f"absent: {absent}")
            continue
        except Exception as error:  # whatever it is, it is this check's result, and others follow
            code = 1
            why = f"{type(error).__name__}: {error}"[:2000]
            report.write(part, name, "failed", why=why, seconds=round(time.monotonic() - start, 3))
            if not _device_answers(run.device):
                return LOST
            continue
        seconds = round(time.monotonic() - start, 3)
        if isinstance(found, dict):
            report.write(part, name, "noted", **found, seconds=seconds)
            continue
        broken = [m for m in found if not m.holds]
        values: dict[str, Any] = {"measures": {m.name: [m.value, m.limit] for m in found}, "seconds": seconds}
        status = "failed" if broken or not found else "passed"
        if status == "failed":
            code = 1
            words = [f"{m.name} is {m.value:.3g}, the limit {m.limit:.3g}" for m in broken]
            values["why"] = "; ".join(words) or "nothing was measured"
        report.write(part, name, status, **values)
    return code


def _device_answers(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
