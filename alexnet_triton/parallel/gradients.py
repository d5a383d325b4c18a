"""Gradients of layers of which several processes have a copy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


def sum_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sum gradients over the processes that have a copy of the parameters, after the last `backward` of a step.

    Args:
        parameters: the same ones in every process, in the same order. One that is trained and has no gradient, in a
            process that has seen no image, counts as one of zeros.
        group: the processes.
    """
    kinds: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            kinds[parameter.grad.dtype].append(parameter.grad)
    # Laid out anew, a buffer a dtype: the processes' gradients may lie differently, and few messages are fast ones.
    sums = [torch.cat([gradient.reshape(-1) for gradient in kind]) for kind in kinds.values()]
    work = [dist.all_reduce(values, group=group, async_op=True) for values in sums]
    for kind, values, done in zip(kinds.values(), sums, work, strict=True):
        done.wait()
        for gradient, found in zip(kind, values.split([g.numel() for g in kind]), strict=True):
            gradient.copy_(found.view(gradient.shape))


@contextmanager
def added(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Add the gradients that arise in the block to those that are there, which `sum_gradients` does not see in it."""
    before = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
    for parameter in before:
        parameter.grad = None
    yield
    for parameter, gradient in before.items():
        parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
