"""What `make gpu` checks of several GPUs, and what one GPU can show of them."""

from __future__ import annotations

import copy
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from alexnet_triton.backend import use_backend
from alexnet_triton.bench import checks, parallel, parallel_steps, results
from alexnet_triton.bench.checks import Absent, Measure, Scale
from alexnet_triton.bench.parallel_processes import GRACE, Processes, ProcessesFailed
from alexnet_triton.bench.parallel_steps import GRADIENT_LIMITS, LOSS_LIMITS, Work, classes_of, worst
from alexnet_triton.bench.plans import Plan, name_of
from alexnet_triton.bench.report import Check, Run
from alexnet_triton.parallel.engine import loss_and_right
from alexnet_triton.parallel.layout import Layout
from alexnet_triton.parallel.pipeline.schedules import SCHEDULES

FILE = f"{parallel.BENCHMARK.name}.json"

VARIANT = "paper"
"""Which can be shared in every way."""

ROUNDS = 5
"""On GPUs."""

BEFORE_KILL = 1.0
"""Seconds for which processes train before one of them is killed."""

KILL = 30.0
"""Seconds that starting processes and ending them may take; one that waits for another in NCCL takes most of it."""


def cases(run: Run) -> Iterator[tuple[str, Check]]:
    """The part's checks by name; in a dry run the processes are of a CPU, over gloo."""
    end = time.monotonic() + run.seconds
    small = run.device.type == "cpu"
    dtypes = (torch.float32,) if small else (torch.bfloat16, torch.float32)
    for dtype in dtypes:
        for schedule in ("1f1b",) if small else SCHEDULES:
            name = f"both stages of {VARIANT} on one device, {schedule}, {name_of(dtype)}"
            yield name, partial(check_stages, VARIANT, schedule, dtype, run.scale, [run.device, run.device])
    yield f"the stages of {VARIANT} on two GPUs of one process", partial(_check_two, run, dtypes[0])
    yield f"training steps of {VARIANT} in several processes", partial(_check_layouts, run, dtypes[0])
    yield "the others end when a process is killed", partial(_check_kill, run, dtypes[0], end)


# --- one process ------------------------------------------------------------------------------------------------------


def check_stages(
    variant: str, schedule: str, dtype: torch.dtype, scale: Scale, devices: Sequence[torch.device]
) -> list[Measure]:
    """Loss and gradients of a pipeline in this process against the network on the first device, dropout included.

    Args:
        variant: of `alexnet_triton.AlexNet`.
        schedule: of `schedules.SCHEDULES`.
        dtype: of parameters, maps and gradients.
        scale: how large: its first batch, and how thin the network is.
        devices: of the stages.
    """
    from alexnet_triton.parallel.pipeline.local import LocalPipeline  # loads what takes seconds

    torch.manual_seed(23)
    device = devices[0]
    whole = checks.network(variant, scale, device, dtype, dropout=0.5).train()
    cut = copy.deepcopy(whole)
    images = checks.images_for(variant, scale, device, dtype)
    labels = torch.arange(len(images), device=device) % classes_of(whole)
    pipeline = LocalPipeline(
        cut, devices, microbatches=min(parallel.MICROBATCHES, len(images)), schedule=schedule,
        image_size=images.shape[-1],
    )  # fmt: skip
    with use_backend("triton"):
        torch.manual_seed(24)
        expected = loss_and_right(whole(images), labels, len(images))[0]
        expected.backward()
        torch.manual_seed(24)
        found = pipeline.step(images, labels)
    error = abs(found.item() - expected.item()) / abs(expected.item())
    return [
        Measure("loss", error, LOSS_LIMITS[dtype]),
        Measure("gradients", worst(_gradients(cut, device), _gradients(whole, device)), GRADIENT_LIMITS[dtype]),
    ]


def _check_two(run: Run, dtype: torch.dtype) -> list[Measure]:
    if run.device.type != "cuda" or torch.cuda.device_count() < 2:
        raise Absent("a second GPU")
    devices = [torch.device("cuda", number) for number in range(2)]
    return check_stages(VARIANT, "1f1b", dtype, run.scale, devices)


def _gradients(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    return {name: p.grad.to(device) for name, p in model.named_parameters() if p.grad is not None}


# --- several devices --------------------------------------------------------------------------------------------------


def _check_devices(run: Run) -> int:
    """How many devices there are, if they are several."""
    found = parallel.devices_of(run.device)
    if found < 2:
        raise Absent("a second GPU" if run.device.type == "cuda" else "a second core")
    return found


def _check_layouts(run: Run, dtype: torch.dtype) -> list[Measure]:
    """Loss and gradients of every layout against one process; the times go into the benchmark's file."""
    devices = _check_devices(run)
    gpu = run.device.type == "cuda"
    work = Work(VARIANT, run.scale.batches[0], dtype, run.scale)
    plan = Plan(run.device, (VARIANT,), (work.batch,), (dtype,), ROUNDS if gpu else 1, scale=run.scale)
    head = results.envelope(parallel.BENCHMARK.name, run.device, parallel.METHOD)
    measures = []
    for row in parallel.rows_of(work, parallel.cases_for(VARIANT, devices), plan):
        results.add_row(run.out / FILE, head, row)
        error, limit = row["check"]["error"], row["check"]["limit"]
        name = f"{row['layout']}, {row['processes']}"
        measures.append(Measure(name, math.inf if error is None else error, limit))
    return measures


def check_kill(group: Processes, layout: Layout, work: Work) -> list[Measure]:
    """The second of two processes is killed while they train: the first ends in time, and names it.

    Args:
        group: the two, which have ended afterwards.
        layout: how they hold the network.
        work: what is trained.
    """
    group.call(parallel_steps.prepare, "", layout, work)
    group.call(parallel_steps.seconds_of, "", 1)
    group.begin(parallel_steps.seconds_of, "", 10**6)
    time.sleep(BEFORE_KILL)
    os.kill(group.ids[1], signal.SIGKILL)
    start = time.monotonic()
    try:
        group.finish(GRACE)
        said = ""
    except ProcessesFailed as failed:
        said = str(failed)
    return [
        Measure("seconds until the other one has ended", time.monotonic() - start, GRACE),
        Measure("it does not name the rank", float("rank 1 of 2" not in said), 0.0),
    ]


def _check_kill(run: Run, dtype: torch.dtype, end: float) -> list[Measure]:
    _check_devices(run)
    if time.monotonic() + KILL > end:
        raise Absent(f"{KILL:g} s of the part's time")
    with Processes(2, run.device.type) as group:
        return check_kill(group, Layout(), Work(VARIANT, 2, dtype, checks.TINY))
