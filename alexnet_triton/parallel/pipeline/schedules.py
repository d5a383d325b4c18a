"""Orders of work of a pipeline, one stage a process, and where its processes wait for one another.

`torch.distributed.pipelining` is the definition: `order` gives what its `ScheduleGPipe`, `Schedule1F1B` and
`ScheduleInterleavedZeroBubble` execute, and `steps` when they post and await transfers.

| schedule      | source                               | order on stage s of p, m microbatches            |
|---------------|--------------------------------------|--------------------------------------------------|
| `gpipe`       | Huang et al. 2019, arXiv 1811.06965  | all forward, then all backward                   |
| `1f1b`        | Harlap et al. 2018, arXiv 1806.03377 | p - s forward, then backward and forward in turn |
| `zero-bubble` | Qi et al. 2023, arXiv 2401.10241     | the same, weights' gradients s microbatches late |

With two stages of equal cost and 8 microbatches, where forward, input gradient and weight gradient take one unit each,
`gpipe` and `1f1b` idle for 11.1 % of the time and `zero-bubble` for 4.0 %. That needs ops that compute one gradient
without the other. The fused ops on Triton do not, and their stages do the whole backward pass at `I`; the first stage,
whose input nobody waits for, does it at `W` with any ops. Then nothing is left to fill the bubble with, and
`zero-bubble` idles for as long as `1f1b`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

SCHEDULES = ("gpipe", "1f1b", "zero-bubble")

KINDS: Mapping[str, str] = MappingProxyType(
    {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
)
"""Kinds of work; `B` is `I` and `W` at once."""


class Action(NamedTuple):
    """What a process does without a break."""

    kind: str
    """Of `KINDS`."""
    stage: int
    microbatch: int


class Post(NamedTuple):
    """Transfers that a process offers and asks for, and goes on; each is named by the action whose result travels.

    `F` of stage s sends its activations to s + 1, `B` or `I` of stage s its input's gradient to s - 1.
    """

    sends: tuple[Action, ...] = ()
    receives: tuple[Action, ...] = ()


class Wait(NamedTuple):
    """A process waits here until the transfers are over."""

    transfers: tuple[Action, ...]


Step = Action | Post | Wait


def check(schedule: str, stages: int, microbatches: int) -> None:
    """Refuse what no schedule can do.

    Raises:
        ValueError: an unknown schedule, stages or microbatches below 1, fewer microbatches than stages in `1f1b`, or a
            number of them that torch's zero-bubble schedule cannot put into rounds.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")
    if stages < 1:
        raise ValueError(f"a pipeline needs at least 1 stage, got {stages}")
    if microbatches < 1:
        raise ValueError(f"a pipeline needs at least 1 microbatch, got {microbatches}")
    if schedule == "1f1b" and microbatches < stages:
        raise ValueError(
            f"1f1b needs at least as many microbatches as stages, got {microbatches} for {stages} stages: take more "
            "microbatches, or gpipe"
        )
    rounds = max(1, microbatches // stages)
    if schedule == "zero-bubble" and microbatches % rounds:
        raise ValueError(
            f"zero-bubble runs {microbatches} microbatches on {stages} stages in {rounds} rounds, which must be equal: "
            f"take {microbatches // stages * stages} microbatches, or another schedule"
        )


def is_possible(schedule: str, stages: int, microbatches: int) -> bool:
    """Whether `check` lets that pass."""
    try:
        check(schedule, stages, microbatches)
    except ValueError:
        return False
    return True


def order(schedule: str, stages: int, microbatches: int) -> list[list[Action]]:
    """The work of each process in the order in which it is done, stage s on process s.

    Args:
        schedule: of `SCHEDULES`.
        stages: how many.
        microbatches: of a batch.

    Returns:
        A list of actions for each process.

    Raises:
        ValueError: as `check`.
    """
    check(schedule, stages, microbatches)
    order_of = {"gpipe": _gpipe, "1f1b": _one_f_one_b, "zero-bubble": _zero_bubble}[schedule]
    return [order_of(stage, stages, microbatches) for stage in range(stages)]


def _gpipe(stage: int, stages: int, microbatches: int) -> list[Action]:
    return [Action(kind, stage, i) for kind in "FB" for i in range(microbatches)]


def _one_f_one_b(stage: int, stages: int, microbatches: int) -> list[Action]:
    ahead = min(microbatches, stages - stage)
    actions = [Action("F", stage, i) for i in range(ahead)]
    for i in range(microbatches):
        actions.append(Action("B", stage, i))
        if ahead + i < microbatches:
            actions.append(Action("F", stage, ahead + i))
    return actions


def _zero_bubble(stage: int, stages: int, microbatches: int) -> list[Action]:
    ahead = min(microbatches, stages - 1 - stage)
    actions = [Action("F", stage, i) for i in range(ahead)]
    for i in range(microbatches):
        if ahead + i < microbatches:
            actions.append(Action("F", stage, ahead + i))
        actions.append(Action("I", stage, i))
        if i >= stage:
            actions.append(Action("W", stage, i - stage))
    return actions + [Action("W", stage, i) for i in range(max(0, microbatches - stage), microbatches)]


def in_flight(actions: Iterable[Action], ends: str = "BW") -> int:
    """The most microbatches whose activations a process holds at a time.

    Args:
        actions: of the process, in order.
        ends: the kinds of actions behind which a microbatch's activations are not needed any more.
    """
    held = most = 0
    for action in actions:
        held += (action.kind == "F") - (action.kind in ends)
        most = max(most, held)
    return most


# --- where processes wait ---------------------------------------------------------------------------------------------


def steps(schedule: str, stages: int, microbatches: int) -> list[list[Step]]:
    """The work of `order` with its transfers, as torch's schedules post and await them.

    `gpipe` asks for what an action needs just before it, and awaits its sends behind the last action of a direction.
    `1f1b` posts, once it is in its stride, a send and the next receive together and awaits both; so neither overlaps
    with its own work. `zero-bubble` asks early and awaits a transfer where it is needed, its sends at the end.

    Raises:
        ValueError: as `check`.
    """
    orders = order(schedule, stages, microbatches)
    if schedule == "zero-bubble":
        return _with_early_receives(orders)
    with_transfers = _with_receives_on_demand if schedule == "gpipe" else _with_fused_transfers
    return [with_transfers(actions, stages) for actions in orders]


def _needed(action: Action, stages: int) -> tuple[Action, ...]:
    """What an action must receive."""
    if action.kind == "F":
        return (action._replace(stage=action.stage - 1),) if action.stage else ()
    return (action._replace(stage=action.stage + 1),) if action.kind != "W" and action.stage < stages - 1 else ()


def _given(action: Action, stages: int) -> tuple[Action, ...]:
    """What an action sends: itself, or nothing."""
    sends = action.stage < stages - 1 if action.kind == "F" else action.kind != "W" and action.stage > 0
    return (action,) if sends else ()


def _with_receives_on_demand(actions: Sequence[Action], stages: int) -> list[Step]:
    made: list[Step] = []
    for kind in "FB":
        own = [action for action in actions if action.kind == kind]
        for action in own:
            if needed := _needed(action, stages):
                made += [Post(receives=needed), Wait(needed)]
            made.append(action)
            if given := _given(action, stages):
                made.append(Post(sends=given))
        if sent := tuple(each for action in own for each in _given(action, stages)):
            made.append(Wait(sent))
    return made


def _with_fused_transfers(actions: Sequence[Action], stages: int) -> list[Step]:
    """As `Schedule1F1B._step_microbatches`.

    The results of the forward passes ahead and of the backward passes at the end are sent at once, each awaited behind
    the next action; all others, and the last forward ahead, wait for the next action and go with what it receives.
    """
    made: list[Step] = []
    kinds = "".join(action.kind for action in actions)
    ahead, end = kinds.index("B"), kinds.rindex("F")  # the first backward, the last forward
    held: tuple[Action, ...] = ()
    on_the_way: tuple[Action, ...] = ()
    for number, action in enumerate(actions):
        needed, given = _needed(action, stages), _given(action, stages)
        if held or needed:
            made += [Post(held, needed), Wait(held + needed)]
        made.append(action)
        if on_the_way:
            made.append(Wait(on_the_way))
        held = on_the_way = ()
        if ahead - 1 <= number <= end:
            held = given
        elif given:
            made.append(Post(sends=given))
            on_the_way = given
    return [*made, Wait(on_the_way)] if on_the_way else made


def _with_early_receives(orders: Sequence[Sequence[Action]]) -> list[list[Step]]:
    """As torch's `_add_send_recv`: a sender puts the receive among the receiver's steps, behind what is there then."""
    stages = len(orders)
    made: list[list[Step]] = [[] for _ in orders]
    arrived: set[Action] = set()
    left = [list(actions) for actions in orders]
    while any(left):
        for process, actions in enumerate(left):
            if not actions or not arrived.issuperset(_needed(actions[0], stages)):
                continue
            action = actions.pop(0)
            if needed := _needed(action, stages):
                made[process].append(Wait(needed))
            made[process].append(action)
            for sent in _given(action, stages):
                made[process].append(Post(sends=(sent,)))
                made[sent.stage + (1 if sent.kind == "F" else -1)].append(Post(receives=(sent,)))
                arrived.add(sent)
    for process, done in enumerate(orders):
        if all_sent := tuple(sent for action in done for sent in _given(action, stages)):
            made[process].append(Wait(all_sent))
    return made
