"""Functions that tests run in several processes."""

import time

import groups
import pytest
import torch
import torch.distributed as dist


def total(rank, size, value):
    tensor = torch.tensor([float(rank + value)])
    dist.all_reduce(tensor)
    return rank, size, tensor.item()


def fail_in_the_last(rank, size):
    if rank == size - 1:
        raise ValueError("the last one fails")
    dist.barrier()


def hang_in_the_first(rank, size):
    if rank == 0:
        print("the first one hangs", flush=True)
        time.sleep(100)


def test_results_come_in_the_order_of_ranks():
    assert groups.run(total, 2, 1) == [(0, 2, 3.0), (1, 2, 3.0)]
    assert groups.run(total, 4, 0) == [(rank, 4, 6.0) for rank in range(4)]


def test_a_failure_comes_with_its_traceback():
    with pytest.raises(RuntimeError, match=r"process 1 ended with code 1:(.|\n)*in fail_in_the_last(.|\n)*one fails"):
        groups.run(fail_in_the_last, 2)
    assert groups.run(total, 1, 5) == [(0, 1, 5.0)]


def test_what_hangs_is_ended_and_the_next_call_is_made():
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"not ended after 2 s(.|\n)*the first one hangs"):
        groups.run(hang_in_the_first, 2, seconds=2)
    assert time.monotonic() - begun < 20
    assert groups.run(total, 1, 5) == [(0, 1, 5.0)]
