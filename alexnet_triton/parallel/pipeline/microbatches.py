"""How the images of a step are cut into microbatches."""

from __future__ import annotations

from itertools import count

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
    return next(number for number in count(least) if schedules.is_possible(schedule, stages, number))


def filled_up(x: Tensor, rows: int) -> Tensor:
    """`x` with zeros behind its last row, so that it has so many."""
    if len(x) == rows:
        return x
    return torch.cat([x, x.new_zeros((rows - len(x), *x.shape[1:]))])
