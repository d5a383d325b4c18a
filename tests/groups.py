"""Functions that run in several processes at once, which talk over gloo on this machine.

`run` is what tests call. The processes are forks of one program that has imported torch and the tests' modules, and has
started no thread: starting one takes milliseconds, and importing torch seconds. pytest's own process has torch's
threads, and must not be forked.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import importlib
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
GRACE = 3.0
"""Seconds that processes have to end in once one of them has failed, before they are ended."""


def run(function, processes, *args, seconds=60):
    """Call `function(rank, size, *args)` in each of so many processes.

    Each has joined a gloo group of all, computes with one thread, and has torch's seed set to 0.

    Args:
        function: a function of a test module's top level; what a test patches is not seen in the processes.
        processes: how many.
        *args: further arguments, which are pickled.
        seconds: after which all is ended.

    Returns:
        The functions' results, which are pickled, in the order of ranks.

    Raises:
        RuntimeError: processes failed, with the traceback of each; or time ran out.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        call = (function.__module__, function.__qualname__, processes, args, seconds)
        (folder / "call").write_bytes(pickle.dumps(call))
        codes = _Program.current().call(folder, seconds)
        ends = [_end(folder, rank, code) for rank, code in enumerate(codes)]
    failures = [said for failed, said in ends if failed]
    if failures:
        raise RuntimeError("\n".join(failures))
    return [result for _, result in ends]


def started(file, **more):
    """A program of the tests that is told what to do and answers, and computes with one thread."""
    quiet = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK}
    return subprocess.Popen(
        [sys.executable, file],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **quiet},
        start_new_session=True,
        **more,
    )


def ended(process):
    """End such a program, and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _end(folder, rank, code):
    """Whether a process failed, and what it said or gave."""
    written, said = folder / f"{rank}.result", (folder / f"{rank}.err").read_text(errors="replace")
    if code == 0:
        return False, pickle.loads(written.read_bytes())
    return True, f"process {rank} ended with code {code}:\n{said}"


class _Program:
    """The program whose forks the processes are, started when it is first needed."""

    _current = None

    @classmethod
    def current(cls):
        if cls._current is None:
            cls._current = cls()
        return cls._current

    def __init__(self):
        self.process = started(__file__)
        atexit.register(self.end)

    def call(self, folder, seconds):
        """Have the call in `folder` made; the processes' exit codes."""
        self.process.stdin.write(f"{folder}\n".encode())
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            self.end()
            said = "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("*.err")))
            raise RuntimeError(f"the processes have not ended after {seconds} s, and were ended:\n{said}")
        answer = self.process.stdout.readline()
        if not answer:
            self.end()
            raise RuntimeError("the program that starts the processes has died")
        return [int(code) for code in answer.split()]

    def end(self):
        """End the program and all its processes."""
        _Program._current = None
        atexit.unregister(self.end)
        ended(self.process)


# --- the program --------------------------------------------------------------------------------------------


def serve():
    """Make the calls whose folders come in by standard input, until that ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a test prints is no answer
    for line in sys.stdin:
        folder = Path(line.rstrip("\n"))
        module, name, processes, args, seconds = pickle.loads((folder / "call").read_bytes())
        function = getattr(importlib.import_module(module), name)
        children = [_fork(folder, function, rank, processes, args, seconds) for rank in range(processes)]
        print(*_codes(children), file=answers, flush=True)


def _fork(folder, function, rank, processes, args, seconds):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        error = os.open(folder / f"{rank}.err", os.O_CREAT | os.O_WRONLY)
        os.dup2(error, 1)
        os.dup2(error, 2)
        _work(folder, function, rank, processes, args, seconds)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _work(folder, function, rank, processes, args, seconds):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=seconds),
    )
    dist.barrier()  # else one that fails early is taken for one that never came
    result = function(rank, processes, *args)
    (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
    dist.barrier()  # a process that leaves early would break off what others are still sending
    dist.destroy_process_group()


def _codes(children):
    """Wait for processes; their exit codes."""
    codes, last = {}, None
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if last is None and any(codes.values()):
            last = time.monotonic() + GRACE
        elif last is not None and time.monotonic() > last:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    return [codes[child] for child in children]


if __name__ == "__main__":
    # Before the first fork: what each process would import by itself, a second each, as soon as it makes a model.
    import torch._dynamo
    import torch.distributed.tensor  # noqa: F401

    serve()
