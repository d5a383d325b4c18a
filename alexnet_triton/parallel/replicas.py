"""Data parallel: every process has the whole network, and its own part of each batch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from alexnet_triton.model import AlexNet
from alexnet_triton.parallel.engine import Engine, loss_and_right
from alexnet_triton.parallel.processes.world import World


class Replicas(Engine):
    """A process with a copy of the network, alone or beside others that have one too.

    Args:
        model: the network, which is trained in place, where `world` has its device.
        world: the processes.
        compiled: compile the network with `torch.compile`.
    """

    def __init__(self, model: AlexNet, world: World, compiled: bool = False) -> None:
        self.world = world
        self.module = model.to(world.device)
        self.stream, self.streams = world.rank, world.size  # each drops units of its own
        first = model.features[0]
        if isinstance(first, nn.Conv2d) and not compiled:  # a compiler is to see ordinary tensors
            self.first = first
        self._compiled = compiled

    @cached_property
    def _network(self) -> nn.Module:
        """The network as it is called in training, once its parameters have their dtype, which wrappers go by."""
        device = self.world.device
        network: nn.Module = self.module
        if self._compiled:
            network = cast(nn.Module, torch.compile(network))
        if self.world.size == 1:
            return network
        return DistributedDataParallel(network, [device] if device.type == "cuda" else None)

    def train(self, mode: bool = True) -> None:
        """Set the network to training, or evaluation."""
        self._network.train(mode)

    def step(self, images: Tensor | None, labels: Tensor, total: int) -> Tensor:
        """Forward and backward of this process's part of a batch; see `Engine.step`."""
        loss, right = loss_and_right(self._network(images), labels, total)
        (loss * self.world.size).backward()  # gradients are averaged over the processes, and the loss is their sum
        return torch.stack([loss.detach(), right.float()])

    @torch.no_grad()
    def logits(self, images: Tensor | None, count: int) -> Tensor | None:
        """Logits of this process's images; see `Engine.logits`."""
        logits: Tensor = self.module(images)
        return logits.float()

    def grad_norm(self) -> Tensor:
        """The norm of the gradients, which are those of all processes' images."""
        return nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])

    def whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors themselves; see `Engine.whole`."""
        return dict(parts) if self.world.leads else {}

    def part(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors themselves."""
        return dict(whole)
