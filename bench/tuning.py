"""`make gpu`'s tuning: the configs of the shapes that ship, found on the card before anything there is timed.

Each result is in a file of configs and in a log as soon as it is known. A network and batch whose default configs do
not give what the reference gives is not tuned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alexnet_triton.bench.checks import Absent, Measure
from alexnet_triton.bench.plans import name_of
from alexnet_triton.kernels import launch
from alexnet_triton.tuning import autotune, table

VARIANTS = ("paper", "torchvision")
BATCHES = (128, 1, 1024)
DTYPE = torch.bfloat16

CONFIGS, LOG = "configs.json", "tuning.json"
"""Its files. The first is a user's, where `ALEXNET_TRITON_CACHE` names their folder."""

Found = Callable[[], "list[Measure] | dict[str, Any]"]


def cases(
    device: torch.device, out: Path, passed: Callable[[str], bool], left: Callable[[], float] = lambda: math.inf
) -> Iterator[tuple[str, Found]]:
    """The checks and the problems by name, the most telling batch first, each with a function that does it.

    Args:
        device: the GPU.
        out: folder of the files, to which results are added.
        passed: whether a case has, by its name.
        left: the seconds that there are.
    """
    if device.type != "cuda":
        yield "configs of every launch", _nothing_to_time
        return
    target = launch.target_of(device)
    keeper = autotune.Keeper(target, "measured", out / CONFIGS, out / LOG)
    with autotune.Tuner(target, DTYPE, "measured") as tuner:
        jobs = [job for variant in VARIANTS for job in tuner.jobs(variant, BATCHES)]
        for batch in BATCHES:
            for variant in VARIANTS:
                check = f"default configs of {variant}, {name_of(DTYPE)}, batch {batch}, against the reference"
                yield check, partial(_check, variant, batch)
                for job in jobs:
                    if (job.variant, job.batch) == (variant, batch):
                        yield job.name, partial(_tune, tuner, keeper, job, partial(passed, check), left)


def _nothing_to_time() -> dict[str, Any]:
    raise Absent("a GPU whose kernels could be timed")


def _check(variant: str, batch: int) -> list[Measure]:
    errors = autotune.reference_errors(variant, DTYPE, batch)
    return [Measure(name, error, autotune.REFERENCE_LIMITS[DTYPE]) for name, error in errors.items()]


def _tune(
    tuner: autotune.Tuner,
    keeper: autotune.Keeper,
    job: autotune.Job,
    kernels_are_right: Callable[[], bool],
    left: Callable[[], float],
) -> dict[str, Any]:
    if not kernels_are_right():
        raise Absent("kernels that give what the reference gives: nothing is tuned on others")
    tuned = tuner.tune(job, left())
    if tuned is None:
        raise Absent("the time to compile its candidates")
    keeper.keep(tuned)
    default, best = tuned.trials[0], tuned.best
    return {
        "tried": len(tuned.trials),
        "timed": len(tuned.survivors),
        "config": table.brief(best.config),
        "is_default": best is default,
        "median": best.seconds,
        "default_median": default.seconds,
    }
