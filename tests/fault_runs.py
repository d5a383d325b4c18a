"""Processes of which one comes to grief; as a program, which forks them once all is imported.

`Program.call` is what tests use: it has a function of this file called in the program, and gives what that gives.
Started by torchrun, the program is one of the processes.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import groups


class Program:
    """The program, and all that it has started."""

    def __init__(self):
        self.process = groups.started(__file__, text=True)

    def call(self, name, *args, seconds=120):
        """Call a function of this file by its name, with arguments that JSON can hold, a folder first or none."""
        self.process.stdin.write(json.dumps([name, *args], default=str) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            self.end()
            raise TimeoutError(f"{name} has not ended after {seconds} s")
        return json.loads(self.process.stdout.readline())

    def end(self):
        groups.ended(self.process)


# --- the program ------------------------------------------------------------------------------------------------------


def train(folder, told, processes, fault=None, hurry=None):
    """Train as `small_run.run` does, with a fault in one process.

    Args:
        folder: of the run.
        told: its settings.
        processes: how many.
        fault: `rank` and `step` where it comes, counted from this start; `how`: "kill", "stop" or "raise"; and
            `after`, seconds into the step.
        hurry: seconds of silence, and of grace, after which others are given up; None takes the usual ones.

    Returns:
        Of each process, the exit code, what it said, and the seconds from the fault to its end.
    """
    import small_run

    Path(folder).mkdir(parents=True, exist_ok=True)

    def work(rank):
        if hurry is not None:
            _hurried(*hurry)
        if fault is not None and fault["rank"] == rank:
            _lay(fault, Path(folder))
        small_run.run(Path(folder), told)

    return together(work, processes, Path(folder))


def refuse(folder, processes, case):
    """Start processes that cannot begin together, for a reason of `REASONS`; as `train`."""

    def work(rank):
        from alexnet_triton.parallel.processes.world import world

        with world(**REASONS[case](rank)):
            print("began")

    return together(work, processes, Path(folder), held=_held(case))


def part(folder, processes):
    """Processes that come to their ends one after the other, and say who else had when they could go."""

    def work(rank):
        from alexnet_triton.parallel.processes.world import world

        with world("cpu"):
            time.sleep(0.3 * rank)
            (Path(folder) / f"{rank}.done").touch()
        print(len([*Path(folder).glob("*.done")]))

    return together(work, processes, Path(folder))


def _hurried(silence, grace):
    """Let this process give up others sooner."""
    import small_run

    import alexnet_triton.parallel.processes.world as module

    small_run.world = functools.partial(module.world, silence=silence)
    module.Watch = functools.partial(module.Watch, grace=grace)


def _lay(fault, folder):
    """Let this process come to grief in a step that it is going to take."""
    from alexnet_triton.parallel.layout import Layout

    engine_of, left = Layout.engine, [fault["step"]]

    def engine(*args, **options):
        made = engine_of(*args, **options)
        take = made.step

        def step(*words):
            left[0] -= 1
            if left[0] == 0:
                (folder / "fault").write_text(str(time.time() + fault.get("after", 0.0)))
                _come_to_grief(fault["how"], fault.get("after", 0.0))
            return take(*words)

        made.step = step
        return made

    Layout.engine = engine


def _come_to_grief(how, after):
    if how == "raise":
        from alexnet_triton.recipe.data.sets import DataError

        raise DataError("'n01440764/a.jpg' cannot be read")
    number = signal.SIGKILL if how == "kill" else signal.SIGSTOP
    if after:
        threading.Timer(after, os.kill, (os.getpid(), number)).start()
    else:
        os.kill(os.getpid(), number)


def _fewer_gpus(rank):
    import torch

    torch.cuda.device_count = lambda: 1
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    return {"device": "cuda"}


def _no_gloo(rank):
    import torch.distributed as dist

    dist.is_gloo_available = lambda: False
    return {"device": "cpu"}


def _one_more(rank):
    os.environ["WORLD_SIZE"] = str(int(os.environ["WORLD_SIZE"]) + 1)
    return {"device": "cpu", "minutes": 1 / 60}


REASONS = {
    "fewer GPUs": _fewer_gpus,
    "no gloo": _no_gloo,
    "one broken device": lambda rank: {"device": "cpu" if rank else "gpu"},
    "no multiple": lambda rank: {"device": "cpu", "per_replica": 2},
    "one missing": _one_more,
    "port in use": lambda rank: {"device": "cpu", "minutes": 0.05},
}


def _held(case):
    """A socket whose port the processes are to meet at."""
    if case == "port in use":
        return socket.create_server(("127.0.0.1", 0))
    return None


def together(work, processes, folder, held=None, seconds=90):
    """Start processes as torchrun does, and wait for them; those that have not ended then are killed."""
    with held or socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        if held is None:
            free.close()
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        (folder / "fault").unlink(missing_ok=True)
        children = [_fork(work, rank, folder) for rank in range(processes)]
        ends = _ends(children, time.monotonic() + seconds)
    fault = folder / "fault"
    begun = float(fault.read_text()) if fault.exists() else time.time()
    return [
        {"code": code, "said": (folder / f"{rank}.said").read_text(), "seconds": ended - begun}
        for rank, (code, ended) in enumerate(ends)
    ]


def _ends(children, deadline):
    """Exit codes, and when; None of one that was stopped, or has not ended in time."""
    ends = dict.fromkeys(children)
    while None in ends.values():
        for child in [child for child, end in ends.items() if end is None]:
            ended, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
            if ended and os.WIFSTOPPED(status):
                ends[child] = (None, time.time())
            elif ended:
                ends[child] = (os.waitstatus_to_exitcode(status), time.time())
            elif time.monotonic() > deadline:
                ends[child] = (None, time.time())
        time.sleep(0.002)
    for child, (code, _) in ends.items():
        if code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return list(ends.values())


def _fork(work, rank, folder):
    child = os.fork()
    if child:
        return child
    said = os.open(folder / f"{rank}.said", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os._exit(_code_of(lambda: work(rank)))


def _code_of(work):
    """The exit code of some work, whose errors are said as the command line says them."""
    code = 1
    try:
        work()
        code = 0
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:
        code = error.code
    except (ValueError, OSError, RuntimeError) as error:
        print(f"alexnet-triton: {error}", file=sys.stderr)
        code = 2
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    return code


def elastic(folder, told, fault):
    """The run of a process that torchrun started, with a fault that comes once."""
    import small_run

    if int(os.environ["RANK"]) == fault["rank"] and not (folder / "fault").exists():
        _lay(fault, folder)
    small_run.run(folder, told)


def serve():
    """Make the calls that come in by standard input, until that ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        name, *args = json.loads(line)
        print(json.dumps(globals()[name](*args)), file=answers, flush=True)


if __name__ == "__main__":
    import small_run  # noqa: F401  (before the first fork)

    if sys.argv[1:]:
        raise SystemExit(_code_of(lambda: elastic(Path(sys.argv[1]), *map(json.loads, sys.argv[2:]))))
    serve()
