"""A benchmark of the device that is there, from what is asked for to its file and its table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alexnet_triton.bench import results, roofs
from alexnet_triton.bench.plans import Plan, choose, device_of
from alexnet_triton.bench.results import Rows


class Benchmark(NamedTuple):
    """What a benchmark is made of; every module that is one has it as `BENCHMARK`."""

    name: str
    """Of its result file too."""
    method: str
    """How it measures, in a sentence or two."""
    plan: Callable[[torch.device], Plan]
    """What a device is given unless somebody says otherwise."""
    cases: Callable[[Plan], Iterable[tuple[str, Rows]]]
    """The rows by name, each with a function that measures them."""
    table: Callable[[Mapping[str, Any]], str]
    """Its file's content as text."""


def run(
    benchmark: Benchmark, out: Path, device: str | None = None, *, progress: bool = True, **asked: Any
) -> dict[str, Any]:
    """Measure the roofs, then all rows; print a table, and write `out/NAME.json`, anew after every row.

    Args:
        benchmark: which.
        out: folder of the JSON file; made where it is missing.
        device: None: this machine's GPU, or its CPU where it has none.
        progress: show a progress bar.
        **asked: in the place of what the benchmark's own plan has; see `plans.choose`.

    Raises:
        ValueError: an unknown variant, or a batch, a size or rounds below 1.
    """
    where = device_of(device)
    plan = choose(benchmark.plan(where), **asked)
    torch.backends.cudnn.benchmark = True  # torch's side takes the fastest that cuDNN has
    cases = list(benchmark.cases(plan._replace(roofs=lambda: measured)))  # which says what cannot be measured
    measured = roofs.measure(where, plan.dtypes)
    head = results.envelope(benchmark.name, where, benchmark.method, measured)
    path = out / f"{benchmark.name}.json"
    result = results.measure_cases(path, head, cases, progress)
    print(benchmark.table(result))
    print(f"written to {path}")
    return result
