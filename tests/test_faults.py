"""Runs of several processes of which one dies, hangs or fails: the others end by its name, and nothing is lost."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import fault_runs
import groups
import pytest
import torch
from small_run import equal, state

from alexnet_triton.parallel.processes.watch import ProcessLost
from alexnet_triton.parallel.processes.world import World
from alexnet_triton.recipe.train import run
from alexnet_triton.recipe.train.loop import TrainingError
from alexnet_triton.recipe.train.signals import Interrupted

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes that train together")

TOLD = {"epochs": 3, "batch_size": 8, "workers": 1}
LAYOUTS = {
    "copies": (TOLD, 2),
    "a pipeline": ({**TOLD, "layout": {"pipeline": 2, "microbatches": 3}}, 2),
    "two pipelines": ({**TOLD, "layout": {"pipeline": 2, "microbatches": 2}}, 4),
    "towers": ({**TOLD, "layout": {"towers": True}, "variant": "paper"}, 2),
}
LIMIT = 60
"""Seconds in which all must have ended."""


@pytest.fixture(scope="module")
def program():
    program = fault_runs.Program()
    yield program
    program.end()


@pytest.fixture(scope="module")
def undisturbed(program, tmp_path_factory):
    """The end of a run that nothing has happened to, by its layout."""
    ends = {}

    def end(name):
        if name not in ends:
            folder = tmp_path_factory.mktemp("undisturbed")
            assert all(end["code"] == 0 for end in program.call("train", folder, *LAYOUTS[name]))
            ends[name] = state(folder)
        return ends[name]

    return end


SAID = {
    "kill": r"has ended without a word, killed or by a crash; start the run again with --resume, which goes on from .*",
    "raise": r"has failed, and the others end with it: 'n01440764/a.jpg' cannot be read",
    "stop": r"has given no sign of life for 3 s: it hangs, was stopped, or its machine is gone; start .*",
}
CODES = {"kill": (-signal.SIGKILL, 2), "raise": (2, 2), "stop": (None, 3)}
"""Of the process that comes to grief, and of the others."""


def drawn(chance, processes, steps, how):
    """A fault in some process, at the beginning of some step or in its midst."""
    return {
        "rank": chance.randrange(processes),
        "step": chance.randint(*steps),
        "how": how,
        "after": chance.choice([0.0, chance.random() / 100]),
    }


def assert_all_end_by_the_name_of(fault, ends):
    rank, how, processes = fault["rank"], fault["how"], len(ends)
    own, others = CODES[how]
    assert ends.pop(rank)["code"] == own
    for end in ends:
        assert end["code"] == others, end["said"]
        assert end["seconds"] < LIMIT
        sentence = rf"alexnet-triton: rank {rank} of {processes} \(process \d+ on .+\) {SAID[how]}\n"
        assert re.fullmatch(sentence, end["said"]), end["said"]


@pytest.mark.parametrize(
    ("name", "faults"),
    [
        ("copies", ["raise", "kill"]),
        ("a pipeline", ["stop", "kill"]),
        ("two pipelines", ["raise", "kill"]),
        ("towers", ["kill"]),
    ],
)
def test_whatever_befalls_a_process_the_others_end_by_its_name_and_the_run_goes_on_to_the_same_weights(
    name, faults, program, undisturbed, tmp_path
):
    told, processes = LAYOUTS[name]
    chance = random.Random(name)
    replicas = processes if name == "copies" else processes // 2
    each = -(-22 // (8 * replicas))  # steps of an epoch
    steps = (each + 1, 2 * each)  # the first after an epoch, to which the run goes back
    for how in faults:
        fault = drawn(chance, processes, steps, how)
        hurry = (3, 1) if how == "stop" else None
        assert_all_end_by_the_name_of(fault, program.call("train", tmp_path, told, processes, fault, hurry))
        steps = (1, 2 * each - 1)
    assert [end["code"] for end in program.call("train", tmp_path, told, processes)] == [0] * processes
    assert equal(state(tmp_path), undisturbed(name))


@pytest.mark.parametrize(("lost", "here"), [(1, 0), (0, 1), (1, 2)])
def test_one_process_speaks_for_a_run_and_the_others_end_with_the_same_code(lost, here, monkeypatch):
    @contextmanager
    def breaks(*args, **options):
        yield World(torch.device("cpu"), here, 3)
        raise ProcessLost("rank 1 has ended", lost, here)

    monkeypatch.setattr(run, "world", breaks)
    with pytest.raises((ProcessLost, SystemExit)) as caught, run._joined(run.Options(Path("data"))):
        pass
    assert isinstance(caught.value, ProcessLost) == (0 in (lost, here))
    assert getattr(caught.value, "code", 2) == 2


@pytest.mark.parametrize("here", [0, 1])
def test_what_ends_all_processes_alike_is_said_by_the_one_that_leads(here, monkeypatch):
    @contextmanager
    def alike(*args, **options):
        yield World(torch.device("cpu"), here, 2)

    monkeypatch.setattr(run, "world", alike)
    ends = [
        (TrainingError("the loss is nan"), 2),
        (FileNotFoundError("there is no data"), 2),
        (ValueError("the crop is larger than the images"), 2),
        (Interrupted("stopped", signal.SIGTERM), 143),
    ]
    for error, code in ends:
        with pytest.raises((type(error), SystemExit)) as caught, run._joined(run.Options(Path("data"))):
            raise error
        assert (caught.value is error) == (here == 0)
        assert here == 0 or caught.value.code == code


REFUSED = {
    "fewer GPUs": ["2 processes are on this machine, and 1 GPU: start as many processes as there are GPUs"] * 2,
    "no gloo": ["several processes on cpu talk by gloo, which this PyTorch was built without"] * 2,
    "one broken device": ["device 'gpu' cannot be used here", "rank 0 of 2 .* cannot take part: device 'gpu' cannot"],
    "one missing": ["2 of 3 processes have come in 1 s, and not rank 2: start as many as WORLD_SIZE says"] * 2,
    "port in use": [r"MASTER_PORT \d+ is in use on '127.0.0.1'", r"rank 1 cannot reach rank 0 .* does not answer\)"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_processes_that_cannot_begin_are_refused_in_one_sentence_each(case, program, tmp_path):
    for end, sentence in zip(program.call("refuse", tmp_path, 2, case), REFUSED[case], strict=True):
        assert end["code"] == 2
        assert re.fullmatch(f"alexnet-triton: {sentence}.*\n", end["said"]), end["said"]
        assert end["seconds"] < LIMIT


def test_none_is_gone_before_all_have_come_to_the_end(program, tmp_path):
    """A process that hangs up early breaks off what others are still sending."""
    assert [(end["code"], end["said"]) for end in program.call("part", tmp_path, 2)] == [(0, "2\n")] * 2


def test_torchrun_starts_a_run_again_that_goes_on_to_the_same_weights(undisturbed, tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    words += ["--nproc-per-node=2", "--max-restarts=1", fault_runs.__file__, str(tmp_path), json.dumps(TOLD)]
    process = subprocess.Popen(
        [*words, json.dumps({"rank": 1, "step": 4, "how": "kill"})],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": groups.LOOPBACK},
        start_new_session=True,
    )
    try:
        said = process.communicate(timeout=120)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said
    ours = [line for line in said.splitlines() if line.startswith("alexnet-triton:")]
    assert len(ours) == 1
    assert "rank 1 of 2" in ours[0]
    assert "Traceback" not in said
    assert equal(state(tmp_path), undisturbed("copies"))
