"""Result files: a JSON object a benchmark, with its machine and method, a row a line; whole after every row."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from alexnet_triton import configs
from alexnet_triton.bench.checks import Measure
from alexnet_triton.bench.timing import machine
from alexnet_triton.configs import cache

OURS = "alexnet_triton"
"""What this package's side is called among the peers of a row."""

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
    if torch.device(device).type == "cuda":
        head["configs"] = configs.in_force(torch.cuda.get_device_name(device))
    return {**head, "roofs": dict(roofs)} if roofs else head


def estimate(benchmark: str, card: str, method: str, roofs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """As `envelope`, for a model's estimate of a card that is not there: nothing in the file is measured.

    Args:
        benchmark: as for `envelope`.
        card: its maker and its name.
        method: as for `envelope`.
        roofs: as the card's data sheet has them.
    """
    head = envelope(benchmark, "cpu", method, roofs)
    facts = {name: value for name, value in head["machine"].items() if name not in ("cores", "threads")}
    return {**head, "machine": {**facts, "device": card, "triton": metadata.version("triton")}, "measured": False}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON; whatever ends the process, the file is the old one or the new one.

    Raises:
        ValueError: a figure that JSON does not have (NaN, infinity).
    """
    rows = [_line(row) for row in content["rows"]]
    _write_lines(path, {name: value for name, value in content.items() if name != "rows"}, rows)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False)


def _write_lines(path: Path, head: Mapping[str, Any], rows: Sequence[str]) -> None:
    opening = json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    cache.write(path, f'{opening},\n "rows": [{",".join(f"{chr(10)}  {row}" for row in rows)}\n ]\n}}\n')


def read(path: Path, *benchmarks: str) -> dict[str, Any]:
    """A result file's content.

    Args:
        path: of the file.
        *benchmarks: whose it may be.

    Raises:
        ValueError: it cannot be read, is no JSON, or another benchmark's; the sentence names the file.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # of the encoding, and of the JSON
        raise ValueError(f"{path} is no JSON file: {error}") from error
    found = content.get("benchmark") if isinstance(content, dict) else None
    if found not in benchmarks:
        holds = "no benchmark's name" if found is None else f"benchmark {json.dumps(found)}"
        raise ValueError(f"{path} holds {holds}, expected {' or '.join(map(json.dumps, benchmarks))}")
    return dict(content)


class ResultFile:
    """A result file that grows, whole after every addition.

    Args:
        path: of the file; where there is one, of the same benchmark, its rows stay.
        head: of `envelope`.
    """

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self._path, self._head = path, head
        self._rows = [_line(row) for row in read(path, head["benchmark"])["rows"]] if path.exists() else []

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows; see `write`."""
        lines = [*self._rows, *map(_line, rows)]
        _write_lines(self._path, self._head, lines)
        self._rows = lines


def add_row(path: Path, head: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """Add a row to a result file, which begins as `head` (of `envelope`) where there is none."""
    ResultFile(path, head).add([row])


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
