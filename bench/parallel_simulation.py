"""A pipeline's simulation beside the real run: bubble and step of two processes, from the times of its layers.

What `pipeline plan` simulates is held against what two processes do. Everything takes its turn in every round: each
layer alone, in both processes at once, which then share the memory's bandwidth as in a pipeline, where both are mostly
busy; the link; and a step of each pipeline, traced. A figure is the median over the rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from alexnet_triton.bench import checks, parallel_steps
from alexnet_triton.bench.parallel_processes import Process, Processes
from alexnet_triton.bench.parallel_steps import Trainer, Work
from alexnet_triton.bench.plans import Plan, name_of
from alexnet_triton.bench.results import OURS
from alexnet_triton.bench.timing import summary
from alexnet_triton.parallel.layout import Layout
from alexnet_triton.parallel.pipeline.costs import Link, Pipeline, best_cuts, cut_table, pipeline
from alexnet_triton.parallel.pipeline.schedules import SCHEDULES
from alexnet_triton.parallel.pipeline.simulation import Block, Timeline
from alexnet_triton.parallel.pipeline.work import Layer, Roofs, Table, layers

TASK = "simulation"

STAGES = 2

MICROBATCHES = (8, 4)

SMALL, LARGE = 2**10, 2**22
"""Bytes of the messages that tell a link's latency and its pace: the largest map of a microbatch is some of these."""

UNEVEN = 0.7
"""Of all work, what the second cut gives one of the stages."""

WARM = 1
"""Rounds that do not count."""


class Costs(NamedTuple):
    """What a process measures of the parts of a step."""

    times: dict[tuple[str, str, int], float]
    """Seconds of layers, as of `measuring.measure`."""
    pace: float
    """Bytes a second that adding gradients up moves."""


# --- in the processes -------------------------------------------------------------------------------------------------


def costs_of(process: Process, work: Work, sizes: Sequence[int]) -> Costs:
    """Time the layers for microbatches of some sizes; all processes do so at once.

    Args:
        process: this one.
        work: whose network it is.
        sizes: images of a microbatch.
    """
    from alexnet_triton.parallel.pipeline.measuring import measure

    if "layers" not in process.kept:
        process.kept["layers"] = parallel_steps.network(process, work)
    model = process.kept["layers"]
    process.barrier()
    times: dict[tuple[str, str, int], float] = {}
    for size in sizes:
        times |= measure(model, torch.randn(size, 3, work.side, work.side), 0.0)
    largest = max(model.parameters(), key=torch.Tensor.numel).detach()
    total, more = torch.zeros_like(largest), torch.zeros_like(largest)
    return Costs(times, 3 * largest.nbytes / _median(lambda: total.add_(more), 5))


def transfers(process: Process) -> list[float]:
    """Seconds of a small and of a large message from the first process to the second."""
    found = []
    for size in (SMALL, LARGE):
        message = torch.zeros(size, dtype=torch.uint8)

        def there_and_back(message: torch.Tensor = message) -> None:
            for sender in (0, 1):
                (dist.send if process.world.rank == sender else dist.recv)(message, 1 - process.world.rank)

        process.barrier()
        found.append(_median(there_and_back, 11) / 2)
    return found


def traced_step(process: Process, name: str) -> tuple[float, list[Block]]:
    """Seconds of a step, and when its work was done, in the process that leads."""
    seconds = parallel_steps.seconds_of(process, name, 1)
    trainer: Trainer = process.kept[name]
    return seconds, trainer.engine.trace_blocks()  # type: ignore[attr-defined]


def _median(function: Callable[[], Any], times: int) -> float:
    taken = []
    for _ in range(times + 2):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


# --- what is compared -------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A pipeline that is simulated, and run."""

    schedule: str
    microbatches: int
    cut: str

    @property
    def layout(self) -> Layout:
        """As the processes hold it."""
        return Layout(pipeline=STAGES, microbatches=self.microbatches, schedule=self.schedule, cut=(self.cut,))

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.schedule}, {self.microbatches} microbatches, cut at {self.cut}"


class Round(NamedTuple):
    """What a round has measured."""

    costs: list[Costs]
    """By process."""
    link: Link
    steps: dict[Run, tuple[float, Timeline]]
    """Seconds of a step, and its work."""


def rows_of(work: Work, plan: Plan, microbatches: Sequence[int] = MICROBATCHES) -> list[dict[str, Any]]:
    """A row for each schedule, number of microbatches and cut: what is simulated, what is real, and their ratio.

    One cut is the best for the times of the layers; the other one leaves a process idle.

    Args:
        work: what is trained.
        plan: device and rounds.
        microbatches: of the batch; the first of them is what the cuts are chosen for.
    """
    sizes = sorted({_size(work, count) for count in microbatches})
    with Processes(STAGES, plan.device.type) as group:
        cuts = _cuts(work, group.call(costs_of, work, sizes)[0], _link(group.call(transfers)), microbatches[0])
        runs = [Run(schedule, count, cut) for cut in cuts for count in microbatches for schedule in SCHEDULES]
        for run in runs:
            group.call(parallel_steps.prepare, run.name, run.layout, work, True)
        rounds = [_round(group, work, sizes, runs, number) for number in range(WARM + plan.rounds)][WARM:]
    return [_row(work, run, rounds, drawn=run in runs[: len(SCHEDULES)]) for run in runs]


def _round(group: Processes, work: Work, sizes: Sequence[int], runs: Sequence[Run], number: int) -> Round:
    """Measure everything once, the pipelines in another order each time."""
    steps = {}
    turn = number % len(runs)
    for run in [*runs[turn:], *runs[:turn]]:
        answers = group.call(traced_step, run.name)
        steps[run] = max(seconds for seconds, _ in answers), Timeline(tuple(answers[0][1]))
    return Round(group.call(costs_of, work, sizes), _link(group.call(transfers)), steps)


def _size(work: Work, microbatches: int) -> int:
    """Images of a microbatch."""
    return -(-work.batch // microbatches)


def _link(seconds: Sequence[Sequence[float]]) -> Link:
    """What joins the processes, as `transfers` found it."""
    small, large = seconds[0]
    return Link("measured", (LARGE - SMALL) / max(large - small, 1e-9), small)


def _layers(work: Work, costs: Costs, microbatches: int) -> tuple[Layer, ...]:
    """The layers with their costs for a microbatch, as a process has measured them."""
    model = checks.network(work.variant, work.scale, torch.device("meta"), work.dtype, dropout=0.5)
    roofs = Roofs(float("inf"), costs.pace)  # of products nothing is left to estimate
    shape = (_size(work, microbatches), 3, work.side, work.side)
    return layers(model, shape, Table(costs.times, roofs), roofs, work.dtype)


def _cuts(work: Work, costs: Costs, link: Link, microbatches: int) -> tuple[str, str]:
    """The best cut, and another: the one that gives one of the stages about `UNEVEN` of the work."""
    found = _layers(work, costs, microbatches)
    best = best_cuts(found, STAGES, microbatches, SCHEDULES[1], link)[0]
    shares = {}
    for each in cut_table(found, microbatches, SCHEDULES[1], link):
        busy = [part.forward + part.backward for part in each.parts]
        shares[each.at[0]] = max(busy) / sum(busy)
    return best, min((name for name in shares if name != best), key=lambda name: abs(shares[name] - UNEVEN))


def simulated(work: Work, run: Run, costs: Sequence[Costs], link: Link) -> Pipeline:
    """A pipeline as `pipeline plan` has it, the layers of each stage as its own process has measured them."""
    own = [
        pipeline(
            _layers(work, each, run.microbatches), (run.cut,), run.microbatches, run.schedule, link, images=work.batch
        )
        for each in costs
    ]
    return replace(own[0], parts=tuple(each.parts[place] for place, each in enumerate(own)))


# --- the rows ---------------------------------------------------------------------------------------------------------


def _row(work: Work, run: Run, rounds: Sequence[Round], drawn: bool) -> dict[str, Any]:
    """What all rounds together say of a pipeline; with `drawn`, the work of the round in the middle too."""
    plans = [simulated(work, run, each.costs, each.link) for each in rounds]
    steps = [each.steps[run][0] for each in rounds]
    timelines = [each.steps[run][1] for each in rounds]
    bubbles = [timeline.bubble for timeline in timelines]
    row = {"task": TASK, "variant": work.variant, "dtype": name_of(work.dtype), "batch": work.batch}
    row |= {"layout": run.name, "processes": STAGES, **run._asdict()}
    row |= {
        "times": {OURS: summary(steps)},
        "bubble": summary(bubbles),
        "simulated": {
            "step": statistics.median(each.step for each in plans),
            "bubble": statistics.median(each.timeline.bubble for each in plans),
        },
        "ratio": {
            "step": statistics.median(real / each.step for real, each in zip(steps, plans, strict=True)),
            "bubble": statistics.median(
                real / each.timeline.bubble for real, each in zip(bubbles, plans, strict=True)
            ),
        },
        "work": {
            "simulated": _work([each.timeline for each in plans]),
            "real": _work(timelines),
        },
    }  # fmt: skip
    if drawn:
        middle = min(range(len(rounds)), key=lambda number: abs(bubbles[number] - statistics.median(bubbles)))
        row["blocks"] = {
            "simulated": _plain(plans[middle].timeline), "real": _plain(timelines[middle])
        }  # fmt: skip
    return row


def _work(timelines: Sequence[Timeline]) -> list[dict[str, float]]:
    """Seconds of a microbatch by process and kind of work, the median over all microbatches and timelines."""
    found: list[dict[str, list[float]]] = [{} for _ in range(STAGES)]
    for timeline in timelines:
        for block in timeline.blocks:
            found[block.process].setdefault(block.kind, []).append(block.end - block.start)
    return [{kind: statistics.median(seconds) for kind, seconds in kinds.items()} for kinds in found]


def _plain(timeline: Timeline) -> list[list[Any]]:
    """Blocks as process, stage, kind, microbatch, start and end, from the first start on, in seconds."""
    return [
        [*block[:4], round(block.start - timeline.start, 6), round(block.end - timeline.start, 6)]
        for block in timeline.blocks
    ]
