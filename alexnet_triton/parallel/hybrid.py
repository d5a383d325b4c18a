"""Convolutions in copies, fully connected layers in parts (Krizhevsky 2014).

The convolutions have few parameters and most of the work, the fully connected layers 94 % of the parameters and little
work. So each process has all convolutions and a share of the batch, and of the fully connected layers a part of the
outputs and the whole batch, whose activations are gathered before them: scheme (a) of A. Krizhevsky, "One weird trick
for parallelizing convolutional neural networks", arXiv 1404.5997, section 4. Of the gradients, those of the
convolutions alone are summed over the processes.

Each of two processes that have 128 images of their own sends 33 MB a step of `"merged"` in float32, and each of eight
sends 155 MB, since all get the activations of all. Whole copies send 250 MB and 437 MB of gradients, however few the
images.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from alexnet_triton.model import AlexNet
from alexnet_triton.parallel.sharded import Peers, Processes, ShardedNetwork, check_model, shard_classifier


class Hybrid(ShardedNetwork):
    """An `AlexNet` with its convolutions in each process, and a part of its fully connected layers. See `hybrid`."""

    def __init__(self, model: AlexNet, peers: Peers) -> None:
        super().__init__(model, peers, lambda name: name.startswith("classifier."))
        self.classifier = shard_classifier(self, gathered=False)

    def forward(self, images: Tensor, batch: int | None = None) -> Tensor:
        """Logits of the whole batch, the same in every process.

        Args:
            images: (n, 3, H, W), this process's share of the batch, as for `AlexNet.forward`; n may be 0.
            batch: images of the whole batch, of which this process has the share of its rank by `torch.tensor_split`.
                None: the processes tell one another how many they have.

        Returns:
            (N, classes), images in the order of the processes.

        Raises:
            ValueError: the images are not this process's share of such a batch, or `AlexNet.forward` would refuse them.
        """
        self.model._check_images(images)
        counts = self._counts(images) if batch is None else _shares(batch, self.peers.size)
        if counts[self.peers.rank] != len(images):
            raise ValueError(
                f"process {self.peers.rank} of {self.peers.size} has {counts[self.peers.rank]} images of a batch of "
                f"{batch}, got {len(images)}: share them by torch.tensor_split, or leave batch out"
            )
        x = torch.flatten(self.avgpool(self.features(images)), 1)
        logits: Tensor = self.classifier(self._gather_rows(x, counts))
        return logits

    def _counts(self, images: Tensor) -> list[int]:
        """How many images each process has."""
        own = torch.tensor([len(images)], device=images.device)
        counts = own.new_empty(self.peers.size)
        dist.all_gather(list(counts.split(1)), own, group=self.peers.group)
        return counts.tolist()

    def _gather_rows(self, x: Tensor, counts: list[int]) -> Tensor:
        """All rows, from those of each process, which are made up to the largest number on the way."""
        most = max(counts)
        padded = F.pad(x, (0, 0, 0, most - len(x))) if len(x) < most else x
        whole = self.peers.gather(padded, 0, most * len(counts))
        if min(counts) == most:
            return whole
        return torch.cat([part[:count] for part, count in zip(whole.split(most), counts, strict=True)])


def hybrid(model: AlexNet, processes: Processes = None) -> Hybrid:
    """Let processes share a network, each with all convolutions and a part of each fully connected layer.

    Outputs, loss, gradients and steps are those of one process on the whole batch, to rounding. That holds for dropout
    too, where the generators of all processes have the same state.

    Args:
        model: any variant, on the device of this process, with any classifier of `nn.Dropout`, `nn.Linear`, `nn.ReLU`
            and `nn.Identity`. It is left as it is; all begin with what the first process has.
        processes: a mesh of one dimension, a group, or None, which is all.

    Returns:
        A module that takes this process's share of the images and gives the logits of all; see `ShardedNetwork`.

    Raises:
        ValueError: the model is no `AlexNet`, its classifier has other layers, a layer before it looks at the batch or
            draws, or a mesh has several dimensions, or other devices than the model's.
        RuntimeError: this process has joined no others.

    Examples:
        >>> network = hybrid(AlexNet(10, device="cuda"))
        >>> loss = F.cross_entropy(network(images), labels_of_all)
        >>> loss.backward()
        >>> network.reduce_gradients()
    """
    check_model("hybrid", model)
    for part in ("features", "avgpool"):
        for name, layer in model.get_submodule(part).named_modules(prefix=part):
            if isinstance(layer, (_BatchNorm, _DropoutNd)):
                does = "looks at the whole batch" if isinstance(layer, _BatchNorm) else "draws for the whole batch"
                raise ValueError(
                    f"hybrid gives each process a share of the images, and {name} ({type(layer).__name__}) {does}: "
                    "train it in whole copies"
                )
    return Hybrid(model, Peers(processes, model))


def _shares(batch: int, processes: int) -> list[int]:
    """The sizes of `torch.tensor_split`'s parts."""
    return [batch // processes + (rank < batch % processes) for rank in range(processes)]
