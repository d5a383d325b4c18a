"""Orders of work against torch's own, and the simulation against what must hold for every schedule."""

import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleavedZeroBubble
from torch.distributed.pipelining import schedules as torchs

from alexnet_triton.parallel.pipeline.schedules import (
    KINDS,
    SCHEDULES,
    Action,
    Post,
    Wait,
    check,
    in_flight,
    is_possible,
    order,
    steps,
)
from alexnet_triton.parallel.pipeline.simulation import Block, Timeline, simulate

SIZES = [(stages, microbatches) for stages in (1, 2, 3, 4, 5, 8) for microbatches in (1, 2, 3, 4, 6, 8, 12, 16, 24)]
CASES = [
    (schedule, stages, microbatches)
    for schedule in SCHEDULES
    for stages, microbatches in SIZES
    if is_possible(schedule, stages, microbatches)
]


# --- torch's own ------------------------------------------------------------------------------------------------------


class Recorder:
    """A stage that computes nothing, and notes what torch's schedule does with it and with the links."""

    def __init__(self, stage, stages):
        self.stage_index, self.num_stages = stage, stages
        self.group_rank, self.group_size = stage, stages
        self.is_first, self.is_last = stage == 0, stage == stages - 1
        self.stage_index_to_group_rank = {number: number for number in range(stages)}
        self.submod, self.device, self.group = nn.Identity(), torch.device("cpu"), None
        self.has_backward = True
        self.done = []

    def _transfer(self, kind, stage, microbatch, there):
        return [SimpleNamespace(action=(kind, stage, microbatch), sends=stage == self.stage_index)] if there else []

    def get_fwd_recv_ops(self, i):
        return self._transfer("F", self.stage_index - 1, i, not self.is_first)

    def get_fwd_send_ops(self, i):
        return self._transfer("F", self.stage_index, i, not self.is_last)

    def get_bwd_recv_ops(self, i):
        return self._transfer("gradient", self.stage_index + 1, i, not self.is_last)

    def get_bwd_send_ops(self, i):
        return self._transfer("gradient", self.stage_index, i, not self.is_first)

    def forward_one_chunk(self, i, *args, **kwargs):
        self.done.append(Action("F", self.stage_index, i))

    def backward_one_chunk(self, i, loss=None, full_backward=True, last_backward=False):
        self.done.append(Action("B" if full_backward else "I", self.stage_index, i))

    def backward_weight_one_chunk(self, i, last_backward=False):
        self.done.append(Action("W", self.stage_index, i))

    def post(self, ops, desc=None):
        if ops:
            sends, receives = ([op.action for op in ops if op.sends is side] for side in (True, False))
            self.done.append(("post", frozenset(sends), frozenset(receives)))
        return ops

    def wait(self, ops):
        self.done.append(("wait", frozenset(op.action for op in ops)))

    def perform_reduce_grad(self, *args):
        pass

    def scale_grads(self, *args):
        pass


CLASSES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "zero-bubble": ScheduleInterleavedZeroBubble}


def executed(schedule, stages, microbatches, monkeypatch):
    """What torch's schedule does on each process."""
    found = []
    for stage in range(stages):
        recorder = Recorder(stage, stages)
        made = CLASSES[schedule]([recorder] if schedule == "zero-bubble" else recorder, microbatches)
        name = "_initialize_stages" if schedule == "zero-bubble" else "_initialize_stage"
        monkeypatch.setattr(made, name, lambda *args, **kwargs: None)
        monkeypatch.setattr(torchs, "_batch_p2p", recorder.post)
        monkeypatch.setattr(torchs, "_sorted_batch_p2p", lambda ops, desc=None, r=recorder: {0: r.post(ops)})
        monkeypatch.setattr(torchs, "_wait_batch_p2p", recorder.wait)
        made._step_microbatches([()] * microbatches, [{}] * microbatches)
        found.append(recorder.done)
    return found


def plain(made):
    """Steps as a recorder notes them, with waits that follow one another as one."""

    def names(actions):
        return frozenset(("F" if a.kind == "F" else "gradient", a.stage, a.microbatch) for a in actions)

    found = []
    for step in made:
        if isinstance(step, Post):
            step = ("post", names(step.sends), names(step.receives))
        elif isinstance(step, Wait):
            step = ("wait", names(step.transfers))
        if step[0] == "wait" and found and found[-1][0] == "wait":
            step = ("wait", found.pop()[1] | step[1])
        if step != ("wait", frozenset()):
            found.append(step)
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_order_and_transfers_are_those_that_torch_executes(schedule, monkeypatch):
    for _, stages, microbatches in (case for case in CASES if case[0] == schedule):
        theirs = executed(schedule, stages, microbatches, monkeypatch)
        ours = order(schedule, stages, microbatches)
        assert ours == [[step for step in done if isinstance(step, Action)] for done in theirs], (stages, microbatches)
        assert list(map(plain, steps(schedule, stages, microbatches))) == list(map(plain, theirs)), (
            stages,
            microbatches,
        )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_torch_refuses_is_refused(schedule):
    refused = 0
    for stages in range(1, 7):
        for microbatches in range(1, 20):
            try:
                recorder = Recorder(0, stages)
                CLASSES[schedule]([recorder] if schedule == "zero-bubble" else recorder, microbatches)
                theirs = True
            except ValueError:
                theirs = False
            assert is_possible(schedule, stages, microbatches) == theirs, (stages, microbatches)
            refused += not theirs
    assert (refused > 0) == (schedule != "gpipe")


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (("2f2b", 2, 8), "unknown schedule '2f2b': choose one of gpipe, 1f1b, zero-bubble"),
        (("gpipe", 0, 8), "a pipeline needs at least 1 stage, got 0"),
        (("gpipe", 2, 0), "a pipeline needs at least 1 microbatch, got 0"),
        (("1f1b", 4, 3), "1f1b needs at least as many microbatches as stages, got 3 for 4 stages: take more"),
        (("zero-bubble", 2, 7), "zero-bubble runs 7 microbatches on 2 stages in 3 rounds, .* take 6 microbatches"),
    ],
)
def test_what_cannot_be_scheduled_is_refused_in_words(told, why):
    with pytest.raises(ValueError, match=why):
        check(*told)
    with pytest.raises(ValueError, match=why):
        simulate(*told, seconds=lambda action: 1.0)


def test_gpipe_holds_all_microbatches_and_1f1b_one_a_stage_behind():
    assert [in_flight(actions) for actions in order("gpipe", 4, 8)] == [8, 8, 8, 8]
    assert [in_flight(actions) for actions in order("1f1b", 4, 8)] == [4, 3, 2, 1]
    assert [in_flight(actions) for actions in order("zero-bubble", 4, 8)] == [4, 4, 4, 4]
    assert [in_flight(actions, "BI") for actions in order("zero-bubble", 4, 8)] == [4, 3, 2, 1]


# --- the simulation ---------------------------------------------------------------------------------------------------


def drawn(seed):
    """Seconds of actions and transfers, any."""
    dice = random.Random(seed)
    work = {(stage, kind): dice.uniform(0.1, 3) for stage in range(8) for kind in "FBIW"}
    way = {(stage, kind == "F"): dice.choice((0.0, dice.uniform(0, 2))) for stage in range(8) for kind in "FB"}
    return lambda a: work[a.stage, a.kind], lambda a: way[a.stage, a.kind == "F"]


def unit(action):
    return {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}[action.kind]


def critical_path(stages, microbatches, seconds, transfer, schedule):
    """The longest of what cannot overlap: one process's work behind the first microbatch's way to it and before the
    last one's way back, without any waiting."""
    gradient = "I" if schedule == "zero-bubble" else "B"
    longest = 0.0
    for stage in range(stages):
        there = sum(seconds(Action("F", s, 0)) + transfer(Action("F", s, 0)) for s in range(stage))
        own = sum(seconds(action) for action in order(schedule, stages, microbatches)[stage])
        longest = max(longest, there + own)
    there_and_back = sum(seconds(Action("F", s, 0)) + seconds(Action(gradient, s, 0)) for s in range(stages)) + sum(
        transfer(Action("F", s, 0)) + transfer(Action(gradient, s + 1, 0)) for s in range(stages - 1)
    )
    return max(longest, there_and_back)


@pytest.mark.parametrize("blocking", [False, True])
def test_every_timeline_keeps_to_its_order_and_its_dependencies(blocking):
    for seed, (schedule, stages, microbatches) in enumerate(CASES):
        seconds, transfer = drawn(seed)
        timeline = simulate(schedule, stages, microbatches, seconds, transfer, blocking=blocking)
        ends = {Action(b.kind, b.stage, b.microbatch): b.end for b in timeline.blocks}
        assert len(ends) == len(timeline.blocks)
        for process, actions in enumerate(order(schedule, stages, microbatches)):
            blocks = timeline.of(process)
            assert [Action(b.kind, b.stage, b.microbatch) for b in blocks] == actions
            assert all(a.end <= b.start for a, b in pairwise(blocks))
        for block in timeline.blocks:
            action = Action(block.kind, block.stage, block.microbatch)
            assert block.end - block.start == pytest.approx(seconds(action))
            step = {"F": -1, "W": 0}.get(action.kind, 1)
            needed = action._replace(stage=action.stage + step) if step else action._replace(kind="I")
            if 0 <= needed.stage < stages:
                way = transfer(needed) if step else 0.0
                assert block.start >= ends[needed] + way - 1e-9
            elif action.kind in "BI":  # the last stage's own forward pass
                assert block.start >= ends[action._replace(kind="F")] - 1e-9
        least = critical_path(stages, microbatches, seconds, transfer, schedule)
        assert timeline.makespan >= least - 1e-9
        if blocking:
            free = simulate(schedule, stages, microbatches, seconds, transfer)
            assert timeline.makespan >= free.makespan - 1e-9


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_equal_stages_and_free_links_have_the_textbook_bubble(schedule):
    for _, stages, microbatches in (case for case in CASES if case[0] == schedule):
        timeline = simulate(schedule, stages, microbatches, unit)
        assert timeline.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))
        assert timeline.makespan == pytest.approx(3 * (microbatches + stages - 1))


def test_zero_bubble_idles_a_third_as_long_where_gradients_come_one_by_one():
    for stages, microbatches in ((2, 8), (4, 8), (4, 16)):
        timeline = simulate("zero-bubble", stages, microbatches, unit)
        assert timeline.makespan == pytest.approx(3 * microbatches + stages - 1)


def test_the_figures_in_the_docstring_of_schedules():
    def at_once(action):  # as the fused ops: both gradients at I, in the first stage at W
        return {"F": 1.0, "B": 2.0, "I": 2.0 * (action.stage > 0), "W": 2.0 * (action.stage == 0)}[action.kind]

    assert simulate("1f1b", 2, 8, unit).bubble == pytest.approx(0.111, abs=5e-4)
    assert simulate("zero-bubble", 2, 8, unit).bubble == pytest.approx(0.04, abs=5e-4)
    assert simulate("zero-bubble", 2, 8, at_once).bubble == pytest.approx(simulate("1f1b", 2, 8, unit).bubble)


def test_1f1b_waits_for_its_own_sends_and_gpipe_does_not():
    # Two stages, two microbatches, by hand. gpipe: stage 0 goes on while F0 is under way. 1f1b: its last forward's send
    # goes together with the first gradient's receive, which both it and the next stage await.
    def way(action):
        return 10.0 if action == Action("F", 0, 0) else 0.0

    gpipe = simulate("gpipe", 2, 2, unit, way)
    assert [block.start for block in gpipe.of(0)] == [0, 1, 15, 17]
    assert [block.start for block in gpipe.of(1)] == [11, 12, 13, 15]
    one = simulate("1f1b", 2, 2, unit, way)
    assert [(block.kind, block.start) for block in one.of(0)] == [("F", 0), ("F", 1), ("B", 14), ("B", 17)]


def test_gpipe_asks_for_activations_behind_the_forward_before():
    timeline = simulate("gpipe", 2, 3, lambda action: 1.0, lambda action: 5.0 if action.kind == "F" else 0.0)
    assert [block.start for block in timeline.of(1)][:3] == [6, 12, 18]


def test_a_blocking_send_holds_its_process_up():
    timeline = simulate("gpipe", 2, 3, lambda action: 1.0, lambda action: 5.0, blocking=True)
    assert [block.start for block in timeline.of(0)][:3] == [0, 6, 12]


def test_shares_of_time_are_of_the_span_whenever_it_begins():
    timeline = Timeline((Block(0, 0, "F", 0, 100.0, 101.0), Block(1, 1, "F", 0, 101.0, 104.0)))
    assert (timeline.makespan, timeline.end(0), timeline.busy(1)) == (4.0, 1.0, 3.0)
    assert [timeline.idle(process) for process in timeline.processes] == [0.75, 0.25]
    assert timeline.bubble == 0.5
    assert Timeline(()).bubble == Timeline(()).makespan == 0.0


def test_kinds_of_work_have_words():
    assert {action.kind for case in CASES for actions in order(*case) for action in actions} == set(KINDS)
