"""What test_bench_parallel.py asks of processes, which import this and nothing else of the tests."""

import os
import time

import torch


def where(process):
    """Rank, size, cores, threads and number of the process, and whether it would interpret kernels."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    here = process.world
    return here.rank, here.size, cores, torch.get_num_threads(), os.getpid(), "TRITON_INTERPRET" in os.environ


def fails_in_the_second(process):
    if process.world.rank == 1:
        raise ValueError("so it is")
    process.barrier()


def sleeps(process):
    time.sleep(100)


def keeps(process, value):
    return process.kept.setdefault("value", value)
