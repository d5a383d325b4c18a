"""Candidates and what becomes of them: what the compiler says of each, which is chosen, and a log's rows.

A candidate that the arithmetic of its tiles does not rule out is compiled, and goes where the compiler speaks against
it: spills, shared memory, a loop that keeps the tensor cores waiting. What costs least replaces the default only if it
gains more than the noise, and of candidates that tie, the one wins that other batches chose.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from alexnet_triton.kernels.config import Config, NormPoolProblem, Problem
from alexnet_triton.kernels.target import Target
from alexnet_triton.tuning import candidates, loops
from alexnet_triton.tuning.candidates import Objection
from alexnet_triton.tuning.inspect import broken_budgets
from alexnet_triton.tuning.launches import LayerLaunch
from alexnet_triton.tuning.works import Work, works

if TYPE_CHECKING:
    from alexnet_triton.kernels.launch import Launch

NOISE = 0.02
"""Share of a time within which two configs tie."""

LEAST_GAIN = {"measured": NOISE, "modelled": 0.05}
"""Share of the default's time that a config must save to replace it."""


@dataclass(frozen=True)
class Trial:
    """A candidate and what became of it."""

    config: Config
    objection: Objection | None = None
    """Why it was not timed; None for a survivor."""
    issue_share: float | None = None
    cycles: float = 0.0
    """By the model, for the busiest multiprocessor."""
    time: Mapping[str, float] | None = None
    """Measured: median, p20 and p80, in seconds."""

    @property
    def seconds(self) -> float | None:
        """The median time."""
        return self.time["median"] if self.time else None

    @property
    def cost(self) -> float:
        """What candidates are ranked by: seconds where measured, else the model's cycles."""
        return self.cycles if self.seconds is None else self.seconds


@dataclass(frozen=True)
class Tuned:
    """A problem and all its trials, the default's first."""

    variant: str
    layer: str
    direction: str
    problem: Problem
    trials: tuple[Trial, ...]
    best: Trial

    @property
    def gain(self) -> float:
        """The default's time over the best's."""
        return self.trials[0].cost / self.best.cost if self.best.cost else 1.0

    @property
    def survivors(self) -> list[Trial]:
        """What was timed, or would be."""
        return [trial for trial in self.trials if trial.objection is None]

    @property
    def modelled(self) -> bool:
        """Whether the model tells the candidates apart; of normalisation and pooling it has none."""
        return not isinstance(self.problem, NormPoolProblem)


# --- the compiler's word ------------------------------------------------------------------------------------


class Figures(NamedTuple):
    """What the compiler says of a candidate."""

    objection: Objection | None
    issue_share: float | None


@functools.lru_cache(4)
def _works_of(variant: str, dtype: torch.dtype, batch: int, target: Target) -> list[Work]:
    return works(variant, dtype, batch, target)


def compile_candidates(
    variant: str, dtype: torch.dtype, target: Target, number: int, tried: Sequence[tuple[int, Config]]
) -> list[Figures]:
    """Compile configs for one piece of `works`, each for its batch; runs in a worker.

    What comes to the same code in two batches is compiled and read once.
    """
    from alexnet_triton.tuning.compiler import compile_launches

    made = [main_launch(_works_of(variant, dtype, batch, target)[number], config, target) for batch, config in tried]
    figures = compile_launches(made, target)
    return [_figures(found, launch, target, dtype) for found, launch in zip(figures, made, strict=True)]


def main_launch(work: Work, config: Config, target: Target) -> Launch:
    """The launch that a config is for, beside which there may be others that serve it."""
    from alexnet_triton.kernels import launch

    with launch.recording(target) as launches:
        work.again(config)
    [main] = [one for one in launches if LayerLaunch(work.layer, work.direction, one).kind != "copy"]
    return main


def _figures(found: Any, launch: Launch, target: Target, dtype: torch.dtype) -> Figures:
    from alexnet_triton.tuning.compiler import CompilationFailed

    if isinstance(found, CompilationFailed):
        return Figures(Objection("the compiler refuses it", str(found)), None)
    if found.spilled_bytes:
        return Figures(Objection("registers spill", f"{found.spilled_bytes} bytes a thread"), None)
    if found.shared_memory > target.shared_memory:
        return Figures(Objection("it takes too much shared memory", f"{found.shared_memory:,} bytes"), None)
    if not found.resident:
        return Figures(Objection("it does not fit a multiprocessor", f"for its {found.limited_by}"), None)
    product = launch.kernel.__name__ in loops.PRODUCTS
    slack = loops.slack(launch, found, target) if product else 1.0
    broken = broken_budgets(found, "product" if product else "map", target, dtype, None, slack)
    return Figures(Objection("it breaks a budget of `inspect`", broken[0]) if broken else None, found.issue_share)


def pruned(problem: Problem, target: Target) -> list[Trial]:
    """All candidates of a problem before any is compiled, the default first."""
    tried = candidates.candidates(problem, target)
    objections = candidates.objections(problem, tried, target)
    return [Trial(c, objections.get(c), None, candidates.cycles(problem, c, target)) for c in tried]


def with_figures(
    problem: Problem, trials: Sequence[Trial], figures: Mapping[Config, Figures], target: Target
) -> tuple[Trial, ...]:
    """Trials after compiling: the cycles count what the loop's instructions cost, and whoever needs too many goes."""
    found = []
    for trial in trials:
        if trial.config in figures:
            objection, share = figures[trial.config]
            cycles = candidates.cycles(problem, trial.config, target, share or 0.0)
            trial = replace(trial, objection=objection, issue_share=share, cycles=cycles)
        found.append(trial)
    least = min((trial.cycles for trial in found if trial.objection is None), default=0.0)
    for number, trial in enumerate(found[1:], 1):
        if trial.objection is None and trial.cycles > candidates.MOST_CYCLES * least:
            times = f"{trial.cycles / least:.1f} times the least"
            why = Objection("its tiles and its loop's instructions need more cycles", times)
            found[number] = replace(trial, objection=why)
    return tuple(found)


# --- the choice ---------------------------------------------------------------------------------------------


def choose_best(trials: Sequence[Trial], source: str, chosen: Counter[Config]) -> Trial:
    """The survivor that costs least; the default unless another saves enough; of ties, what other batches chose."""
    survivors = [trial for trial in trials if trial.objection is None]
    least = min((trial.cost for trial in survivors), default=trials[0].cost)
    if least > trials[0].cost * (1 - LEAST_GAIN[source]):
        return trials[0]
    ties = [trial for trial in survivors if trial.cost <= least * (1 + NOISE)]
    return max(ties, key=lambda trial: (chosen[trial.config], -trial.cost))


def rows(tuned: Tuned) -> list[dict[str, Any]]:
    """A log's rows: each trial, what it cost in seconds or by the model, why it was pruned, and whether it won."""
    place = {
        "variant": tuned.variant,
        "layer": tuned.layer,
        "direction": tuned.direction,
        "dtype": str(tuned.problem.dtype).removeprefix("torch."),
        "batch": tuned.problem.images,
    }
    return [
        {
            **place,
            "config": asdict(trial.config),
            "time": trial.time,
            "cycles": trial.cycles if tuned.modelled else None,
            "issue_share": trial.issue_share,
            "pruned": trial.objection._asdict() if trial.objection else None,
            "default": trial is tuned.trials[0],
            "chosen": trial is tuned.best,
        }
        for trial in tuned.trials
    ]
