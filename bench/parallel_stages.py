"""The stages of a pipeline, timed one by one: what a microbatch takes in each, without the pipeline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from alexnet_triton.bench.parallel_processes import Process
from alexnet_triton.bench.parallel_steps import Work, classes_of, network, update_rule
from alexnet_triton.parallel.engine import loss_and_right
from alexnet_triton.parallel.pipeline.masks import Masks
from alexnet_triton.parallel.pipeline.stages import dropouts, split

SMALL, LARGE = 2**10, 2**22
"""Bytes of the messages that tell a link's latency and its pace: a microbatch's map has some of these."""

LATER = 2
"""Microbatches that are timed behind the first one, whose gradients are not added to others."""


class Costs(NamedTuple):
    """What a stage was measured to take, in seconds."""

    work: dict[tuple[str, bool], float]
    """Of a microbatch, by kind (`schedules.KINDS`), and whether others were before it in the step."""
    update: float
    """Of the update of its parameters."""
    sent: int
    """Bytes of the map that it gives."""


class StageAlone:
    """The stage of a process, with a microbatch at hand.

    Args:
        process: this one; its rank is the stage's number.
        work: whose network it is.
        cut: the name of the layer that begins the second stage.
        size: images of a microbatch.
    """

    def __init__(self, process: Process, work: Work, cut: str, size: int) -> None:
        model = network(process, work)
        stages = split(model, at=[cut])
        device = process.world.device
        self._first, self._last = process.world.rank == 0, process.world.rank == len(stages) - 1
        self._stage = stages[process.world.rank].train()
        self._stage.masks = Masks(dropouts(model, work.side), device, work.dtype)
        self._stage.masks.draw(size)
        self._given = torch.randn(size, 3, work.side, work.side, device=device)
        with torch.no_grad():
            for stage in stages[: process.world.rank]:
                self._given = stage(self._given)
            output = self._stage(self._given)
        self._output_gradient = torch.full_like(output, 1 / output.numel())
        self._labels = torch.arange(size, device=device) % classes_of(model)
        self._rule = update_rule(self._stage, work)
        self.sent = output.nbytes
        self.seconds = 0.0
        """That one turn takes, the same in all processes; 0 before the first."""

    def turn(self) -> Iterator[tuple[str, bool, float]]:
        """A few microbatches with a whole backward pass, and a few with one in halves: kind, whether later, seconds."""
        for halves in (False, True):
            self._rule.optimizer.zero_grad(set_to_none=True)
            for number in range(1 + LATER):
                yield from ((kind, number > 0, seconds) for kind, seconds in self._microbatch(halves))
        yield "update", True, _timed(self._rule.optimizer.step)[0]

    def _microbatch(self, halves: bool) -> Iterator[tuple[str, float]]:
        from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

        x = self._given.detach().requires_grad_(not self._first)
        seconds, output = _timed(lambda: self._stage(x))
        yield "F", seconds
        if self._last:
            output = loss_and_right(output, self._labels, len(x))[0]
        gradient = None if self._last else self._output_gradient
        if not halves:
            yield "B", _timed(lambda: torch.autograd.backward(output, gradient))[0]
        elif self._first:  # torch leaves all of its backward pass to the second half
            yield "I", 0.0
            yield "W", _timed(lambda: torch.autograd.backward(output, gradient))[0]
        else:
            gradients = None if gradient is None else [gradient]
            weights = list(self._stage.parameters())
            seconds, (_, groups) = _timed(lambda: stage_backward_input([output], gradients, [x], iter(weights)))
            yield "I", seconds
            yield "W", _timed(lambda: stage_backward_weight(iter(weights), groups))[0]


def costs_of(process: Process, work: Work, cut: str, size: int) -> Costs:
    """Time the stages of a pipeline, each process its own, all at once and for as long.

    So each has its share of what they have in common, as in a pipeline, in which all are busy most of the time.

    Args:
        process: this one.
        work: whose network it is.
        cut: the name of the layer that begins the second stage.
        size: images of a microbatch.
    """
    key = f"stage of {size} images at {cut}"
    if key not in process.kept:
        process.kept[key] = StageAlone(process, work, cut, size)
    alone: StageAlone = process.kept[key]
    process.barrier()
    start = time.perf_counter()
    taken: dict[tuple[str, bool], list[float]] = {}
    while True:
        for kind, later, seconds in alone.turn():
            taken.setdefault((kind, later), []).append(seconds)
        if time.perf_counter() - start > alone.seconds:
            break
    if not alone.seconds:
        alone.seconds = max(process.world.gather(time.perf_counter() - start))
    medians = {key: statistics.median(seconds) for key, seconds in taken.items()}
    return Costs(medians, medians.pop(("update", True)), alone.sent)


def transfers(process: Process) -> list[float]:
    """Seconds of a small and of a large message between the first two processes."""
    found = []
    for size in (SMALL, LARGE):
        message = torch.zeros(size, dtype=torch.uint8)

        def there_and_back(message: Tensor = message) -> None:
            for sender in (0, 1):
                (dist.send if process.world.rank == sender else dist.recv)(message, 1 - process.world.rank)

        process.barrier()
        seconds = [_timed(there_and_back)[0] for _ in range(13)]
        found.append(statistics.median(seconds[2:]) / 2)
    return found


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and its answer."""
    start = time.perf_counter()
    answer = function()
    return time.perf_counter() - start, answer
