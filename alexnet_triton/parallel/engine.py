"""How the processes of a run hold one network, and take a step together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_triton.parallel.processes.world import World


class Engine(ABC):
    """A network as one process of a run sees it.

    Attributes:
        world: the processes.
        module: what this process holds of the network and updates: parameters under the model's own names, whole or a
            part of each.
        reads: whether this process is given its replica's images.
        stream: which of the run's streams of dropout this process draws from; processes of one stream have generators
            of equal state.
        streams: how many there are.
        first: the convolution that is given the images as they come, for which augmentation may lay them out; None
            where something is between.
        description: how the processes share the network, in a few words; empty where each has all of it.
    """

    world: World
    module: nn.Module
    reads: bool = True
    stream: int
    streams: int
    first: nn.Conv2d | None = None
    description: str = ""

    # --- work ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def step(self, images: Tensor | None, labels: Tensor, total: int) -> Tensor:
        """Forward and backward of this replica's part of a batch.

        Afterwards the gradients in `module` are those of the whole batch's mean loss, of all replicas. They are added
        to what is there.

        Args:
            images: (n, 3, H, W), where this process `reads`; n may be 0.
            labels: (n,), of those images, in every process of the replica.
            total: images of the batch, in all replicas.

        Returns:
            (2,), float32, which are the sum of these images' cross-entropies (in nats) over `total`, and how many were
            guessed right; zeros where another process counts them. Summed over all processes they are the batch's.
        """

    @abstractmethod
    def logits(self, images: Tensor | None, count: int) -> Tensor | None:
        """Logits of this replica's images, without gradients.

        Args:
            images: (count, 3, H, W), where this process `reads`.
            count: how many they are.

        Returns:
            (count, classes) in float32, in the one process of the replica that counts them; None in others.
        """

    def train(self, mode: bool = True) -> None:
        """Set the network to training, or evaluation."""
        self.module.train(mode)

    # --- the whole ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def grad_norm(self) -> Tensor:
        """The norm of the whole network's gradients, the same in every process."""

    def clip_gradients(self, most: float) -> None:
        """Scale the gradients so that their norm is at most so much."""
        nn.utils.clip_grads_with_norm_(self.module.parameters(), most, self.grad_norm())

    @abstractmethod
    def whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put together what every process has a part of, as parameters or velocities; all must call it together.

        Args:
            parts: this process's, by parameter name.

        Returns:
            The whole tensors by name, in the model's order, in the process that leads; nothing in others.
        """

    @abstractmethod
    def part(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's part of whole tensors, by parameter name."""


def loss_and_right(logits: Tensor, labels: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """These images' part of a batch's mean cross-entropy, and how many are guessed right.

    Args:
        logits: (n, classes), of any floating-point dtype.
        labels: (n,).
        total: images of the batch.
    """
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, reduction="sum") / total
    return loss, logits.detach().argmax(1).eq(labels).sum()
