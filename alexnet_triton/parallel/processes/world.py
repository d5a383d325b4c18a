"""The processes that train together, one a device, as torchrun starts them; or one alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from alexnet_triton.parallel.processes.meeting import number, place_in_run, size_of_run, store_of_run
from alexnet_triton.parallel.processes.watch import SILENCE, Watch

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
def world(
    device: str | None = None, minutes: float = 10, per_replica: int = 1, silence: float = SILENCE
) -> Iterator[World]:
    """Join the processes that torchrun has started; without it, this one is alone.

    The processes begin together or not at all, and end together: each learns why another cannot take part, or ended.

    Args:
        device: `"cpu"`, `"cuda"` or such; None takes a GPU where there is one. Of several GPUs each process takes the
            one of its local rank.
        minutes: after which a process that waits for another gives up.
        per_replica: processes that hold one copy of the network.
        silence: seconds without a sign of life after which a process is taken for lost; see `watch`.

    Raises:
        RuntimeError: there are fewer GPUs than processes on this machine, the device is unknown or not there, the
            environment is not torchrun's, PyTorch lacks what the processes would talk by, their number is no
            multiple of `per_replica`, or the first of them cannot be reached.
        ProcessLost: another process cannot take part, or has not come in time; or, in the place of what torch's
            communication raises, it has ended or failed.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    size = size_of_run()
    if size % per_replica:
        raise RuntimeError(
            f"{per_replica} processes hold one copy of the network, and {size} {'is' if size == 1 else 'are'} here: "
            f"start a multiple of {per_replica}, as in torchrun --nproc-per-node {per_replica} -m alexnet_triton train"
        )
    if size == 1:
        yield World(_usable(name))
        return
    if not dist.is_available():
        raise RuntimeError(
            f"this PyTorch was built for one process, and {size} are here: install another, or start one"
        )
    place = place_in_run(size)
    chosen, complaint = torch.device("cpu"), ""
    try:
        chosen = _own(name)
        backend = _backend(chosen)
    except RuntimeError as error:
        complaint = str(error)
    store = store_of_run(place, minutes)
    with Watch(store, place.rank, size, place.host, 60 * minutes, silence=silence) as watch:
        watch.meet(chosen.type, complaint)
        try:
            fresh = dist.PrefixStore(watch.token, store)  # torchrun keeps its store when it starts processes again
            dist.init_process_group(
                backend, store=fresh, rank=place.rank, world_size=size, timeout=timedelta(minutes=minutes)
            )  # fmt: skip
            yield World(chosen, place.rank, size, per_replica)
            watch.end()
        except BaseException as error:
            reason = watch.leave(error)
            if reason is error:
                raise
            raise reason from error
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _own(name: str) -> torch.device:
    """The device of this process; of GPUs, that of its local rank."""
    if name.startswith("cuda"):
        local = number("LOCAL_RANK", 0)
        here, there = max(local + 1, number("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > there:
            raise RuntimeError(
                f"{here} processes are on this machine, and {there} GPU{'s' if there != 1 else ''}: start as many "
                "processes as there are GPUs (--nproc-per-node), or use --device cpu"
            )
        name = f"cuda:{local}"
        torch.cuda.set_device(name)
    return _usable(name)


def _backend(device: torch.device) -> str:
    """What processes on such devices talk by."""
    name, there = ("nccl", dist.is_nccl_available) if device.type == "cuda" else ("gloo", dist.is_gloo_available)
    if not there():
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
