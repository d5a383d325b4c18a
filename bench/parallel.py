"""Steps of training in several processes: each way to share the network, beside one process; a pipeline's simulation.

Every process has a device of its own, a GPU or a core. The processes of a row are there before its first step, hold
all the row's networks, and take their steps in turn.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alexnet_triton.bench import parallel_simulation, parallel_steps
from alexnet_triton.bench.benchmark import Benchmark
from alexnet_triton.bench.parallel_processes import Processes, ProcessesFailed
from alexnet_triton.bench.parallel_steps import LOSS_LIMITS, Work
from alexnet_triton.bench.plans import Plan, name_of
from alexnet_triton.bench.results import OURS, Rows, checked
from alexnet_triton.bench.timing import duration, heading, summary
from alexnet_triton.parallel.layout import TOWERS, Layout
from alexnet_triton.parallel.pipeline.schedules import SCHEDULES

METHOD = (
    "Training steps (forward, backward, exchange of gradients, the 2012 update) on the same batch, shared out among "
    "the processes, after a check of the loss and of every gradient against one process, dropout off. One process a "
    "GPU over NCCL, parameters, maps and gradients in bfloat16; on a CPU float32 over gloo, each process with one "
    "thread, bound to a core of its own, the one that is alone too. All layouts are in memory and taken in turn. A "
    "time is that of the last process to be done, from a barrier on, a step's mean over a few without a break on a "
    "GPU. The speedup is the median over the rounds of one process's time over the layout's. Bytes are the most that "
    "a process sends in a step, those of a ring for collectives, from the shapes that it hands to them. Simulations, "
    "of two processes on a CPU, take the times of gloo's messages, and of each stage without the pipeline, measured in "
    "both processes at once, which so share the memory as they do in a step; these and traced steps take turns. The "
    "bubble is the share of both processes' time, from a step's first work to its last, in which they do none; a "
    "ratio is the median over the rounds of the real figure over the simulated one."
)

MICROBATCHES = 8

STEPS = 10
"""In a sample on a GPU; on a CPU one, which takes long enough."""

MOST_PROCESSES = 4

TASK = "training step"

SECONDS = 150.0
"""Of a row's rounds, after which no further one begins."""


class Case(NamedTuple):
    """A way to share a network."""

    name: str
    processes: int
    layout: Layout


ALONE = Case("one process", 1, Layout())


def cases_for(variant: str, devices: int, microbatches: int = MICROBATCHES) -> list[Case]:
    """One process, and ways to share a network among two, and among four where there are so many devices.

    Args:
        variant: of `alexnet_triton.AlexNet`; towers are of `"paper"` alone.
        devices: that are there.
        microbatches: of each copy's batch, in a pipeline.
    """
    found = [ALONE]
    for processes in (2, MOST_PROCESSES):
        if processes > devices:
            break
        found.append(Case("data parallel", processes, Layout()))
        for schedule in SCHEDULES:
            layout = Layout(pipeline=processes, microbatches=microbatches, schedule=schedule)
            found.append(Case(f"pipeline, {schedule}", processes, layout))
        if processes > 2:
            layout = Layout(pipeline=2, microbatches=microbatches)
            found.append(Case("pipeline of 2, 1f1b, two copies", processes, layout))
        if variant == "paper":
            copies = "" if processes == TOWERS else ", two copies"
            found.append(Case(f"towers{copies}", processes, Layout(towers=True)))
        found.append(Case("hybrid", processes, Layout(hybrid=True)))
    return found


def devices_of(device: torch.device) -> int:
    """GPUs, or cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plan(device: torch.device) -> Plan:
    """What a device is given unless somebody says otherwise."""
    if device.type == "cuda":
        return Plan(device, ("paper", "torchvision"), (128, 1024), (torch.bfloat16,), 20)
    return Plan(device, ("paper",), (64,), (torch.float32,), 7)


# --- the rows ---------------------------------------------------------------------------------------------------------


def rows_of(work: Work, cases: Sequence[Case], plan: Plan) -> list[dict[str, Any]]:
    """Each layout's time and traffic, or why it has none.

    Args:
        work: what is trained.
        cases: the layouts; `ALONE` is the first.
        plan: device and rounds.

    Raises:
        ProcessesFailed: one process alone cannot do it.
    """
    sizes = sorted({case.processes for case in cases})
    with tempfile.TemporaryDirectory(prefix="alexnet-triton-") as folder, ExitStack() as stack:
        groups = {size: Processes(size, plan.device.type) for size in sizes}  # they start at once
        found: dict[Case, dict[str, Any]] = {}
        for size in sizes:
            own = [case for case in cases if case.processes == size]
            groups[size] = _ready(stack.enter_context(groups[size]), stack, own, work, Path(folder), found)
        rows = {case: _row(case, found[case], found[ALONE]["loss"], work) for case in cases}
        timed = [case for case in cases if "failed" not in rows[case]]
        samples = _in_turn(timed, groups, plan)
    for case in timed:
        pairs = zip(samples[ALONE], samples[case], strict=True)
        rows[case]["times"] = {OURS: summary(samples[case])}
        rows[case]["speedup"] = statistics.median(alone / own for alone, own in pairs)
    return list(rows.values())


def _ready(
    group: Processes,
    stack: ExitStack,
    cases: Sequence[Case],
    work: Work,
    folder: Path,
    found: dict[Case, dict[str, Any]],
) -> Processes:
    """Processes that hold the networks of all these cases but those that fail, and have taken two steps with each.

    Args:
        group: the processes.
        stack: ends those that take their place when a case fails, with which they end.
        cases: that have as many processes.
        work: what is trained.
        folder: for one process's gradients.
        found: takes what is found of each case: `cut`, `loss`, `error` and `sent`, or `failed`.
    """
    for case in cases:
        if "failed" in found.get(case, {}):
            continue
        try:
            cut = group.call(parallel_steps.prepare, case.name, case.layout, work)[0]
            losses, errors = zip(*group.call(parallel_steps.first_step, case.name, folder), strict=True)
            sent = group.call(parallel_steps.bytes_sent, case.name)
        except ProcessesFailed as failed:
            if case == ALONE:
                raise
            found[case] = {"failed": str(failed)}
            again = stack.enter_context(Processes(group.size, group.kind))
            return _ready(again, stack, cases, work, folder, found)
        found[case] = {"cut": cut, "loss": losses[0], "error": max(errors)}
        found[case]["sent"] = None if None in sent else max(sent)
    return group


def _row(case: Case, found: Mapping[str, Any], expected: float, work: Work) -> dict[str, Any]:
    """What is known of a case before it is timed.

    Args:
        case: which.
        found: of `_ready`.
        expected: one process's loss.
        work: what is trained.
    """
    row = {"task": TASK, "variant": work.variant, "dtype": name_of(work.dtype), "batch": work.batch}
    row |= {"layout": case.name, "processes": case.processes}
    if case.layout.pipeline > 1:
        row |= {"stages": case.layout.pipeline, "microbatches": case.layout.microbatches}
    if "failed" in found:
        return {**row, "check": {"error": None, "limit": LOSS_LIMITS[work.dtype]}, "failed": found["failed"]}
    if found["cut"]:
        row["cut"] = found["cut"]
    measures = parallel_steps.measures(work, found["loss"], expected, found["error"])
    worst = max(measures, key=lambda measure: measure.value / measure.limit)
    return {**row, **checked(worst, lambda: {"sent": found["sent"]})}


def _in_turn(cases: Sequence[Case], groups: Mapping[int, Processes], plan: Plan) -> dict[Case, list[float]]:
    """Seconds of a step of each case in each of the rounds, as `timing.in_turn` takes them."""
    gpu = plan.device.type == "cuda"
    warm, steps = (2, STEPS) if gpu else (1, 1)
    taken: dict[Case, list[float]] = {case: [] for case in cases}
    start = time.monotonic()
    for number in range(warm + plan.rounds):
        if number >= warm + 3 and time.monotonic() - start > SECONDS:
            break
        turn = number % len(cases)
        for case in [*cases[turn:], *cases[:turn]]:
            seconds = max(groups[case.processes].call(parallel_steps.seconds_of, case.name, steps))
            if number >= warm:
                taken[case].append(seconds)
    return taken


def cases(plan: Plan) -> Iterator[tuple[str, Rows]]:
    """The rows' names, each with a function that measures them.

    Raises:
        RuntimeError: there is one device alone.
        ValueError: a dtype that `train` does not have.
    """
    for dtype in plan.dtypes:
        if dtype not in LOSS_LIMITS:
            raise ValueError(f"training is in float32 or, in mixed precision, bfloat16, got {name_of(dtype)}")
    devices = devices_of(plan.device)
    if devices < 2:
        what = "GPU" if plan.device.type == "cuda" else "core"
        raise RuntimeError(f"bench parallel needs two {what}s or more, and {devices} is here")
    for dtype in plan.dtypes:
        for batch in plan.batches:
            for variant in plan.variants:
                work = Work(variant, batch, dtype, plan.scale)
                name = f"{variant}, {name_of(dtype)}, batch {batch}"
                yield f"{TASK}s, {name}", partial(rows_of, work, cases_for(variant, devices), plan)
                if plan.device.type == "cpu":  # where noting times makes nothing wait
                    yield f"simulation, {name}", partial(parallel_simulation.rows_of, work, plan)


# --- the table --------------------------------------------------------------------------------------------------------


def format_result(result: Mapping[str, Any]) -> str:
    """The result as a table of text."""
    lines = [f"AlexNet in several processes: {heading(result['machine'])}"]
    last = ""
    for row in result["rows"]:
        title = f"{row['task']}, {row['variant']}, {row['dtype']}, batch {row['batch']:,}"
        columns, cells = (STEP, _step) if row["task"] == TASK else (SIMULATION, _simulation)
        if title != last:
            lines.append(f"{title:{NAME}}{columns}")
        last = title
        lines.append(f"  {_name(row):{NAME - 2}}" + (f"no time: {row['failed']}" if "failed" in row else cells(row)))
    return "\n".join(lines)


def _name(row: Mapping[str, Any]) -> str:
    layout = row["layout"] if row["processes"] == 1 else f"{row['processes']}: {row['layout']}"
    return f"{layout}, cut at {row['cut']}" if row.get("cut") and row["task"] == TASK else layout


NAME = 52
"""Characters of a table's first column."""

STEP = f"{'a step':>14}{'images/s':>12}{'speedup':>10}{'sent':>12}"

SIMULATION = f"{'bubble':>8}{'simulated':>11}{'ratio':>7}{'a step':>14}{'simulated':>14}{'ratio':>7}"


def _step(row: Mapping[str, Any]) -> str:
    seconds = row["times"][OURS]["median"]
    sent = "" if row["sent"] is None else f"{row['sent'] / 1e6:,.1f} MB"
    return f"{duration(seconds):>14}{row['batch'] / seconds:>12,.1f}{row['speedup']:>10.2f}{sent:>12}"


def _simulation(row: Mapping[str, Any]) -> str:
    simulated, ratio = row["simulated"], row["ratio"]
    bubble = f"{row['bubble']['median']:>8.1%}{simulated['bubble']:>11.1%}{ratio['bubble']:>7.2f}"
    step = f"{duration(row['times'][OURS]['median']):>14}{duration(simulated['step']):>14}{ratio['step']:>7.2f}"
    return bubble + step


BENCHMARK = Benchmark("parallel", METHOD, plan, cases, format_result)
