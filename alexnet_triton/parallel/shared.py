"""The engine of towers and of the hybrid: a network that several processes share layer by layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_triton.model import AlexNet
from alexnet_triton.parallel.engine import Engine, loss_and_right
from alexnet_triton.parallel.gradients import added, sum_gradients
from alexnet_triton.parallel.hybrid import hybrid
from alexnet_triton.parallel.processes.world import PLACE, REPLICA, World
from alexnet_triton.parallel.sharded import ShardedNetwork
from alexnet_triton.parallel.towers import towers


class SharedEngine(Engine):
    """A network whose processes compute the same loss from the same logits, which the first of them counts."""

    module: ShardedNetwork

    def __init__(self, model: AlexNet, network: ShardedNetwork, world: World) -> None:
        self.world, self.module = world, network
        model.to("meta")  # its values are in the processes' parts now
        first = network.features[0] if isinstance(network.features, nn.Sequential) else None
        self.first = first if isinstance(first, nn.Conv2d) else None

    @abstractmethod
    def _whole_batch(self, images: Tensor, labels: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Logits, and the labels of all their images, the same in every process that shares the network."""

    def step(self, images: Tensor | None, labels: Tensor, total: int) -> Tensor:
        """Forward and backward of a batch, or of this replica's part of it; see `Engine.step`."""
        assert images is not None
        logits, labels = self._whole_batch(images, labels, total)
        loss, right = loss_and_right(logits, labels, total)
        with added(self.module.parameters()):
            loss.backward()
            self.module.reduce_gradients()
            self._sum_over_replicas()
        counted = torch.stack([loss.detach(), right.float()])
        return counted if self.module.peers.rank == 0 else torch.zeros_like(counted)

    def _sum_over_replicas(self) -> None:
        """Add up the gradients of the copies of the network, where there are several."""

    def grad_norm(self) -> Tensor:
        """The norm of the whole network's gradients."""
        return self.module.grad_norm()

    def whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put together what every process has a part of; see `Engine.whole`."""
        found = self.module.whole(parts)
        return found if self.world.leads else {}

    def part(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's part of whole tensors."""
        return self.module.part(whole)


class TowersEngine(SharedEngine):
    """The towers of 2012, in one copy or several.

    Args:
        model: of `variant="paper"`; its values leave it.
        world: two processes to a copy.

    Raises:
        ValueError: as `towers`.
    """

    def __init__(self, model: AlexNet, world: World) -> None:
        mesh = world.mesh()
        super().__init__(model, towers(model.to(world.device), mesh[PLACE]), world)
        self.stream, self.streams = world.replica, world.replicas
        self._replicas = mesh.get_group(REPLICA)
        self.description = "in two towers"

    def _whole_batch(self, images: Tensor, labels: Tensor, total: int) -> tuple[Tensor, Tensor]:
        return self.module(images), labels

    def _sum_over_replicas(self) -> None:
        if self.world.replicas > 1:
            sum_gradients(self.module.parameters(), self._replicas)

    @torch.no_grad()
    def logits(self, images: Tensor | None, count: int) -> Tensor | None:
        """Logits of this replica's images, in its first process; see `Engine.logits`."""
        logits: Tensor = self.module(images)
        return logits.float() if self.world.place == 0 else None


class HybridEngine(SharedEngine):
    """Krizhevsky's hybrid of 2014: each process has a share of the images, and a part of the fully connected layers.

    Args:
        model: any variant; its values leave it.
        world: the processes, each of which counts as a replica, since each has images of its own.

    Raises:
        ValueError: as `hybrid`.
    """

    def __init__(self, model: AlexNet, world: World) -> None:
        super().__init__(model, hybrid(model.to(world.device), world.mesh()[REPLICA]), world)
        self.stream, self.streams = 0, 1  # the batch is whole where it is dropped of
        self.description = "convolutions in each, fully connected layers shared out"

    def _whole_batch(self, images: Tensor, labels: Tensor, total: int) -> tuple[Tensor, Tensor]:
        shares = [len(share) for share in torch.arange(total).tensor_split(self.world.size)]
        own = F.pad(labels, (0, shares[0] - len(labels)))  # the first share is the largest
        parts = [torch.empty_like(own) for _ in shares]
        dist.all_gather(parts, own)
        return self.module(images, total), torch.cat([part[:n] for part, n in zip(parts, shares, strict=True)])

    @torch.no_grad()
    def logits(self, images: Tensor | None, count: int) -> Tensor | None:
        """Logits of this process's images; see `Engine.logits`."""
        counts = self.world.gather(count)
        before = sum(counts[: self.world.rank])
        logits: Tensor = self.module(images, sum(counts))
        return logits[before : before + count].float()
