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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

REPLICA, PLACE = "replica", "place"
"""The dimensions of a world's mesh: which copy of the network, and which process of those that hold it."""


@dataclass(frozen=True)
class World:
    """This process among all that train together.

    The network is there in `replicas` copies, each held by `per_replica` processes of consecutive ranks: one that has
    all of it, or several that have a part each. A batch is shared among the replicas.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    per_replica: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    @property
    def replicas(self) -> int:
        """Copies of the network."""
        return self.size // self.per_replica

    @property
    def replica(self) -> int:
        """Number of the copy that this process holds, or holds a part of."""
        return self.rank // self.per_replica

    @property
    def place(self) -> int:
        """Number of this process among those that hold its copy."""
        return self.rank % self.per_replica

    def mesh(self) -> DeviceMesh:
        """The processes as (replicas, processes of a replica), `REPLICA` and `PLACE`; all must ask together."""
        return init_device_mesh(
            self.device.type, (self.replicas, self.per_replica), mesh_dim_names=(REPLICA, PLACE)
        )  # fmt: skip

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
        """This replica's part of the images of a batch, as even as can be; each image is in one part."""
        return torch.tensor_split(positions, self.replicas)[self.replica]


@contextmanager
def world(device: str | None = None, minutes: float = 10, per_replica: int = 1) -> Iterator[World]:
    """Join the processes that torchrun has started; without it, this one is alone.

    Args:
        device: `"cpu"`, `"cuda"` or such; None takes a GPU where there is one. Of several GPUs each process takes the
            one of its local rank.
        minutes: after which a process that waits for another gives up.
        per_replica: processes that hold one copy of the network.

    Raises:
        RuntimeError: there are fewer GPUs than processes on this machine, the device is unknown or not there, the
            environment is not torchrun's, PyTorch lacks what the processes would talk by, or their number is no
            multiple of `per_replica`.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size % per_replica:
        raise RuntimeError(
            f"{per_replica} processes hold one copy of the network, and {size} {'is' if size == 1 else 'are'} here: "
            f"start a multiple of {per_replica}, as in torchrun --nproc-per-node {per_replica} -m alexnet_triton train"
        )
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
    backend = _backend(chosen)
    dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    try:
        yield World(chosen, rank, size, per_replica)
    finally:
        dist.destroy_process_group()


def _backend(device: torch.device) -> str:
    """What processes on such devices talk by."""
    name, there = ("nccl", dist.is_nccl_available) if device.type == "cuda" else ("gloo", dist.is_gloo_available)
    if not dist.is_available() or not there():
        raise RuntimeError(
            f"several processes on {device.type} talk by {name}, which this PyTorch was built without: install one "
            "that has it, or train in one process"
        )
    return name


def _usable(name: str) -> torch.device:
    """A device, once a number has been there and back."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # PyTorch asserts that it was built for a kind of device
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"device {name!r} cannot be used here ({reason}): take another --device, as cpu") from error
    return device
