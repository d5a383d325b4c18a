"""The processes that train together, one a device, as torchrun starts them; or one alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among all that train together."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, the same in each; where there is one alone, `values` itself."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """What every process gives, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share(self, positions: Tensor) -> Tensor:
        """This process's part of the images of a batch, as even as can be; each image is in one part."""
        return torch.tensor_split(positions, self.size)[self.rank]


@contextmanager
def world(device: str | None = None, minutes: float = 10) -> Iterator[World]:
    """Join the processes that torchrun has started; without it, this one is alone.

    Args:
        device: `"cpu"`, `"cuda"` or such; None takes a GPU where there is one. Of several GPUs each process takes the
            one of its local rank.
        minutes: after which a process that waits for another gives up.

    Raises:
        RuntimeError: there are fewer GPUs than processes on this machine, the device is unknown or not there, or the
            environment is not torchrun's.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(_usable(name))
        return
    if "RANK" not in os.environ:
        raise RuntimeError(f"WORLD_SIZE is {size} and RANK is not set: start with torchrun, or unset WORLD_SIZE")
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if name.startswith("cuda"):
        if local >= torch.cuda.device_count():
            raise RuntimeError(
                f"process {local} of this machine finds {torch.cuda.device_count()} GPUs: start as many processes as "
                "there are GPUs (--nproc-per-node), or use --device cpu"
            )
        name = f"cuda:{local}"
        torch.cuda.set_device(name)
    chosen = _usable(name)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(minutes=minutes))
    try:
        yield World(chosen, rank, size)
    finally:
        dist.destroy_process_group()


def _usable(name: str) -> torch.device:
    """A device, once a number has been there and back."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # PyTorch asserts that it was built for a kind of device
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"device {name!r} cannot be used here ({reason}): take another --device, as cpu") from error
    return device
