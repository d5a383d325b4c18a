"""What a schedule comes to when every action and every transfer takes a given time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from alexnet_triton.parallel.pipeline.schedules import Action, Post, Step, Wait, steps


class Block(NamedTuple):
    """A stretch of work of a process, simulated or real."""

    process: int
    stage: int
    kind: str
    """Of `schedules.KINDS`."""
    microbatch: int
    start: float
    """In seconds, from any moment that all blocks of a timeline count from."""
    end: float


@dataclass(frozen=True)
class Timeline:
    """The work of all processes in a step, from the first block's start to the last one's end."""

    blocks: tuple[Block, ...]

    @cached_property
    def processes(self) -> tuple[int, ...]:
        """Those that have a block, in order."""
        return tuple(sorted({block.process for block in self.blocks}))

    @cached_property
    def start(self) -> float:
        """Of the first block, in seconds."""
        return min((block.start for block in self.blocks), default=0.0)

    @cached_property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        return max((block.end for block in self.blocks), default=0.0) - self.start

    def of(self, process: int) -> list[Block]:
        """The blocks of a process in order of time."""
        return sorted((block for block in self.blocks if block.process == process), key=lambda block: block.start)

    def busy(self, process: int) -> float:
        """Seconds for which a process works."""
        return sum(block.end - block.start for block in self.blocks if block.process == process)

    def end(self, process: int) -> float:
        """Seconds from the first start of all to the process's last end."""
        return max(block.end for block in self.blocks if block.process == process) - self.start

    def idle(self, process: int) -> float:
        """The share of the makespan for which a process does not work."""
        return 1 - self.busy(process) / self.makespan if self.makespan else 0.0

    @property
    def bubble(self) -> float:
        """The same of all processes together: 1 - busy / (processes x makespan)."""
        return sum(map(self.idle, self.processes)) / len(self.processes) if self.processes else 0.0


def simulate(
    schedule: str,
    stages: int,
    microbatches: int,
    seconds: Callable[[Action], float],
    transfer: Callable[[Action], float] = lambda action: 0.0,
    *,
    blocking: bool = False,
) -> Timeline:
    """The timeline of a schedule as torch's runtime executes it, a stage a process.

    A process does its `schedules.steps` one after the other. A transfer begins when both sides have posted it; a link
    carries both directions at once, and these steps never have it carry two transfers in one. Transfers take no time
    of the processes but where these wait. That is so of NCCL, whose waits hold up the stream that computes and not the
    host, and of gloo, whose threads send; in both a send is over no sooner than its receiver has asked for it.

    Args:
        schedule: of `schedules.SCHEDULES`.
        stages: how many.
        microbatches: of a batch.
        seconds: that an action takes.
        transfer: seconds that the result of an action is on its way: of `F` to the next stage, of `B` and `I` to the
            one before.
        blocking: whether a process waits for each send before it goes on.

    Raises:
        ValueError: as `schedules.check`.
    """
    programs = [_await_sends(made) if blocking else made for made in steps(schedule, stages, microbatches)]
    transfers = _Transfers(transfer)
    clocks = [0.0] * stages
    blocks: list[Block] = []
    left = [list(reversed(program)) for program in programs]
    while any(left):
        before = sum(map(len, left))
        for process, program in enumerate(left):
            while program and (now := _do(program[-1], clocks[process], transfers, seconds)) is not None:
                step = program.pop()
                if isinstance(step, Action):
                    blocks.append(Block(process, step.stage, step.kind, step.microbatch, clocks[process], now))
                clocks[process] = now
        assert sum(map(len, left)) < before, "every receive has its send, before what needs it"
    return Timeline(tuple(blocks))


class _Transfers:
    """The transfers under way."""

    def __init__(self, seconds: Callable[[Action], float]) -> None:
        self._seconds = seconds
        self._posted: dict[Action, float] = {}
        self.over: dict[Action, float] = {}
        """When each transfer has ended, of those that both sides have posted."""

    def post(self, action: Action, now: float) -> None:
        """One side of a transfer is ready; with the second it begins."""
        if action in self._posted:
            self.over[action] = max(now, self._posted[action]) + self._seconds(action)
        self._posted[action] = now


def _do(step: Step, now: float, transfers: _Transfers, seconds: Callable[[Action], float]) -> float | None:
    """The time when a step that is begun `now` is done; None where that is not known yet."""
    if isinstance(step, Action):
        return now + seconds(step)
    if isinstance(step, Wait):
        ends = [transfers.over.get(transfer) for transfer in step.transfers]
        return None if None in ends else max([now, *(end for end in ends if end is not None)])
    for transfer in (*step.sends, *step.receives):
        transfers.post(transfer, now)
    return now


def _await_sends(program: Sequence[Step]) -> list[Step]:
    made: list[Step] = []
    for step in program:
        made.append(step)
        if isinstance(step, Post) and step.sends:
            made.append(Wait(step.sends))
    return made
