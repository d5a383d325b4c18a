"""A pipeline's simulation beside the real run: bubble and step of two processes.

The orders of work and the simulation are what `pipeline plan` goes by; the times are measured, everything in turn in
every round: each stage without the pipeline, the link, and a step of each pipeline, traced. A figure is the median over
the rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from alexnet_triton.bench import checks, parallel_stages, parallel_steps
from alexnet_triton.bench.parallel_processes import Process, Processes
from alexnet_triton.bench.parallel_stages import LARGE, SMALL, Costs
from alexnet_triton.bench.parallel_steps import Trainer, Work
from alexnet_triton.bench.plans import Plan, name_of
from alexnet_triton.bench.results import OURS
from alexnet_triton.bench.timing import summary
from alexnet_triton.parallel.layout import Layout
from alexnet_triton.parallel.links import LINKS, Link
from alexnet_triton.parallel.pipeline.costs import best_cuts, cut_table
from alexnet_triton.parallel.pipeline.measuring import measure
from alexnet_triton.parallel.pipeline.schedules import SCHEDULES, Action
from alexnet_triton.parallel.pipeline.simulation import Block, Timeline, simulate
from alexnet_triton.parallel.pipeline.work import PROCESSOR, Table, layers

LayerTimes = Mapping[tuple[str, str, int], float]

TASK = "simulation"

STAGES = 2

MICROBATCHES = (8, 4)

UNEVEN = 0.7
"""Of all work, what the second cut gives one of the stages."""

WARM = 1
"""Rounds that do not count."""


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

    costs: dict[tuple[str, int], list[Costs]]
    """By cut and images of a microbatch: of each stage."""
    link: Link
    steps: dict[Run, tuple[float, Timeline]]
    """Seconds of a step, and its work."""


class Simulated(NamedTuple):
    """What a round's times come to in theory."""

    step: float
    timeline: Timeline


# --- a round ----------------------------------------------------------------------------------------------------------


def rows_of(work: Work, plan: Plan, microbatches: Sequence[int] = MICROBATCHES) -> list[dict[str, Any]]:
    """A row for each schedule, number of microbatches and cut: what is simulated, what is real, and their ratio.

    One cut is the best by the times of the layers; the other one, for the first number of microbatches alone, leaves a
    process idle.

    Args:
        work: what is trained.
        plan: device and rounds.
        microbatches: of the batch.
    """
    with Processes(STAGES, plan.device.type) as group:
        best, uneven = cuts(work, microbatches[0], group.call(layer_times, work, microbatches[0])[0])
        pairs = [(count, best) for count in microbatches] + [(microbatches[0], uneven)]
        runs = [Run(schedule, count, cut) for count, cut in pairs for schedule in SCHEDULES]
        for run in runs:
            group.call(parallel_steps.prepare, run.name, run.layout, work, True)
        rounds = [_round(group, work, runs, number) for number in range(WARM + plan.rounds)][WARM:]
    return [_row(work, run, rounds, drawn=run in runs[: len(SCHEDULES)]) for run in runs]


def layer_times(process: Process, work: Work, microbatches: int) -> LayerTimes:
    """Seconds of the layers for a microbatch."""
    images = torch.randn(_size(work, microbatches), 3, work.side, work.side)
    return measure(parallel_steps.network(process, work), images, seconds=0.0)


def cuts(work: Work, microbatches: int, times: LayerTimes) -> tuple[str, str]:
    """The best cut, and the one at which a stage has about `UNEVEN` of the work.

    Args:
        work: what is trained.
        microbatches: of the batch.
        times: of the layers, as of `layer_times`.
    """
    model = checks.network(work.variant, work.scale, torch.device("meta"), work.dtype, dropout=0.5)
    shape = (_size(work, microbatches), 3, work.side, work.side)
    found = layers(model, shape, Table(times, PROCESSOR), PROCESSOR, work.dtype)
    best = best_cuts(found, STAGES, microbatches, "1f1b", LINKS["loopback"])[0]
    shares = {}
    for each in cut_table(found, microbatches, "1f1b", LINKS["loopback"]):
        busy = [part.forward + part.backward for part in each.parts]
        shares[each.at[0]] = max(busy) / sum(busy)
    return best, min((name for name in shares if name != best), key=lambda name: abs(shares[name] - UNEVEN))


def _size(work: Work, microbatches: int) -> int:
    """Images of a microbatch."""
    return -(-work.batch // microbatches)


def _round(group: Processes, work: Work, runs: Sequence[Run], number: int) -> Round:
    """Measure everything once, the pipelines in another order each time."""
    steps = {}
    turn = number % len(runs)
    for run in [*runs[turn:], *runs[:turn]]:
        answers = group.call(traced_step, run.name)
        steps[run] = max(seconds for seconds, _ in answers), Timeline(tuple(answers[0][1]))
    stages = dict.fromkeys((run.cut, _size(work, run.microbatches)) for run in runs)
    costs = {stage: group.call(parallel_stages.costs_of, work, *stage) for stage in stages}
    return Round(costs, link_of(group.call(parallel_stages.transfers)), steps)


def traced_step(process: Process, name: str) -> tuple[float, list[Block]]:
    """Seconds of a step, and when its work was done, in the process that leads."""
    seconds = parallel_steps.seconds_of(process, name, 1)
    trainer: Trainer = process.kept[name]
    return seconds, trainer.engine.trace_blocks()  # type: ignore[attr-defined]


def link_of(seconds: Sequence[Sequence[float]]) -> Link:
    """What joins the processes, as `parallel_stages.transfers` found it."""
    small, large = seconds[0]
    return Link("measured", (LARGE - SMALL) / max(large - small, 1e-9), small)


def simulated(run: Run, costs: Sequence[Costs], link: Link) -> Simulated:
    """A step as the schedule and the times of stages and link have it.

    Args:
        run: which pipeline.
        costs: of each stage, for a microbatch.
        link: between the two.
    """

    def seconds(action: Action) -> float:
        return costs[action.stage].work[action.kind, action.microbatch > 0]

    def transfer(action: Action) -> float:
        return link.seconds(costs[0].sent)  # there the map, back its gradient

    timeline = simulate(run.schedule, STAGES, run.microbatches, seconds, transfer)
    return Simulated(max(timeline.end(stage) + each.update for stage, each in enumerate(costs)), timeline)


# --- the rows ---------------------------------------------------------------------------------------------------------


def _row(work: Work, run: Run, rounds: Sequence[Round], drawn: bool) -> dict[str, Any]:
    """What all rounds together say of a pipeline; with `drawn`, the work of the round in the middle too."""
    theory = [simulated(run, each.costs[run.cut, _size(work, run.microbatches)], each.link) for each in rounds]
    steps = [each.steps[run][0] for each in rounds]
    timelines = [each.steps[run][1] for each in rounds]
    bubbles = [timeline.bubble for timeline in timelines]
    row = {"task": TASK, "variant": work.variant, "dtype": name_of(work.dtype), "batch": work.batch}
    row |= {"layout": run.name, "processes": STAGES, **run._asdict()}
    row |= {
        "times": {OURS: summary(steps)},
        "bubble": summary(bubbles),
        "simulated": {
            "step": statistics.median(each.step for each in theory),
            "bubble": statistics.median(each.timeline.bubble for each in theory),
        },
        "ratio": {
            "step": statistics.median(real / each.step for real, each in zip(steps, theory, strict=True)),
            "bubble": statistics.median(
                real / each.timeline.bubble for real, each in zip(bubbles, theory, strict=True)
            ),
        },
        "work": {
            "simulated": _work([each.timeline for each in theory]),
            "real": _work(timelines),
        },
    }  # fmt: skip
    if drawn:
        middle = min(range(len(rounds)), key=lambda number: abs(bubbles[number] - statistics.median(bubbles)))
        row["blocks"] = {
            "simulated": _plain(theory[middle].timeline), "real": _plain(timelines[middle])
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
