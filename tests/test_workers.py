"""Processes that compile: what they give, what becomes of those that die, and that none outlives its parent."""

import os
import signal
import subprocess
import sys
import time

import pytest

from alexnet_triton.tuning.workers import WorkerDied, Workers


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
import os, sys, time
from alexnet_triton.tuning.workers import Workers
with Workers(2) as workers:
    print(*(workers.result(workers.submit(os.getpid)) for _ in range(4)), flush=True)
    task = workers.submit(time.sleep, 60)
    workers.result(task)
"""


def alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_no_worker_outlives_its_parent_or_says_anything(how):
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{PARENT}"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    workers = [int(word) for word in process.stdout.readline().split()]
    assert len(workers) == 4
    if how == signal.SIGINT:  # as a terminal does it: all processes of the command hear it
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    _, err = process.communicate(timeout=60)
    end = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(alive, workers))
    assert err.count("Traceback") == (how == signal.SIGINT)  # the parent's own, which its command line would catch
