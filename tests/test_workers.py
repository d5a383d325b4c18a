"""Processes that compute: what they give, what becomes of those that die, and that none outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alexnet_triton.workers import WorkerDied, Workers


def test_a_call_gives_its_answer_or_raises_what_it_raised():
    with Workers(2) as workers:
        tasks = [workers.submit(abs, number) for number in (-3, 4)]
        wrong = workers.submit(int, "a")
        late = workers.submit(time.sleep, 60)
        assert [workers.result(task) for task in tasks] == [3, 4]
        with pytest.raises(ValueError, match="invalid literal"):
            workers.result(wrong)
        with pytest.raises(TimeoutError):
            workers.result(late, 0.01)
        start = time.monotonic()
    assert time.monotonic() - start < 30  # who is busy is stopped


def test_a_call_that_ends_its_process_costs_itself_alone():
    with Workers(1) as workers:
        first, deadly, *others = (
            workers.submit(function, argument)
            for function, argument in ((abs, -1), (os._exit, 1), (abs, -2), (os._exit, 2), (abs, -3))
        )
        assert workers.result(first) == 1
        assert workers.result(others[0]) == 2  # its process died of another's call
        with pytest.raises(WorkerDied):
            workers.result(deadly)
        with pytest.raises(WorkerDied):
            workers.result(others[1])
        assert workers.result(others[2]) == 3


PARENT = """
import os, time
from alexnet_triton.workers import Workers
with Workers(2) as workers:
    print(*(workers.result(workers.submit(os.getpid)) for _ in range(4)), flush=True)
    task = workers.submit(time.sleep, 60)
    workers.result(task)
"""


def facts(process):
    """What the system says of a process, by name; nothing of one that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except FileNotFoundError:
        return {}
    found = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return {} if found["State"].startswith("Z") else found


def test_workers_do_not_hear_ctrl_c_and_none_outlives_a_parent_that_is_killed():
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    workers = {int(word) for word in process.stdout.readline().split()}
    assert workers
    for worker in workers:
        assert int(facts(worker)["SigBlk"], 16) >> (signal.SIGINT - 1) & 1
    process.kill()
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    end = time.monotonic() + 60
    while any(map(facts, workers)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(facts, workers))
