"""How the images of a step are cut into microbatches."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from alexnet_triton.parallel.pipeline import schedules


def accepted(schedule: str, stages: int, least: int) -> int:
    """The smallest number of microbatches from `least` on that a schedule can do.

    Args:
        schedule: of `schedules.SCHEDULES`.
        stages: of the pipeline.
        least: microbatches, at least 1.
    """
    for count in range(least, least + 2 * stages):  # `1f1b` wants one a stage, `zero-bubble` equal rounds
        with suppress(ValueError):
            schedules.check(schedule, stages, count)
            return count
    raise ValueError(f"{schedule} takes no number of microbatches near {least} on {stages} stages")


def filled_up(x: Tensor, rows: int) -> Tensor:
    """`x` with zeros behind its last row, so that it has so many."""
    if len(x) == rows:
        return x
    return torch.cat([x, x.new_zeros((rows - len(x), *x.shape[1:]))])
