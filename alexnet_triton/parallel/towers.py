"""The two towers of 2012: half of every layer in each of two processes.

Krizhevsky et al. 2012, section 3.5 and figure 2: conv2, conv4 and conv5 see the maps of their own GPU alone, and
normalisation stays within them (section 3.3); conv3 and the fully connected layers see those of both. (Accounts that
let the halves of the fully connected layers work apart, "no cross-GPU communication", contradict that section: "the
neurons in the fully-connected layers are connected to all neurons in the previous layer".)

So the processes exchange what conv3, fc6, fc7 and fc8 see, forward, and its gradients, backward; and the logits. At
batch 128 each sends 31.3 MB a step in float32. Two whole copies send gradients of 244 MB each, whatever the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alexnet_triton.fusion import FusedSequential, leaves
from alexnet_triton.layers import GroupedLocalResponseNorm
from alexnet_triton.model import AlexNet
from alexnet_triton.parallel.sharded import (
    Peers,
    Processes,
    ShardedNetwork,
    ShardedSequential,
    check_model,
    described,
    is_plain,
    name_of,
    shard_classifier,
)

TOWERS = 2


class Towers(ShardedNetwork):
    """Half of every layer of an `AlexNet`. See `towers`."""

    def __init__(self, model: AlexNet, peers: Peers) -> None:
        super().__init__(model, peers, lambda name: True)
        self.features = _in_towers(self)
        self.classifier = shard_classifier(self, gathered=True)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, the same in both processes.

        Args:
            images: (N, 3, H, W), the same in both, as for `AlexNet.forward`.

        Returns:
            (N, classes).

        Raises:
            ValueError: as `AlexNet.forward`.
        """
        self.model._check_images(images)
        if images.requires_grad:
            images = self.peers.share(images)
        maps = self.avgpool(self.features(images))
        logits: Tensor = self.classifier(torch.flatten(maps, 1))
        return logits


def towers(model: AlexNet, processes: Processes = None) -> Towers:
    """Let two processes share a network as the two GPUs of 2012 did, half of every layer in each.

    Outputs, loss, gradients and steps are those of one process, to rounding. That holds for dropout too, where the
    generators of both processes have the same state.

    Args:
        model: of `variant="paper"`, on the device of this process. It is left as it is; both begin with what the first
            process has.
        processes: two of them, as a mesh of one dimension or a group; None is all.

    Returns:
        A module that takes the same images in both processes, and gives their logits; see `ShardedNetwork`.

    Raises:
        ValueError: there are more or fewer processes; the model is of another variant (the convolutions of `"merged"`
            and `"torchvision"` have no groups, `"caffe"` normalises across all channels) or has other layers; or a mesh
            has several dimensions, or other devices than the model's.
        RuntimeError: this process has joined no other.

    Examples:
        >>> network = towers(AlexNet(10, variant="paper", device="cuda"))
        >>> F.cross_entropy(network(images), labels).backward()
    """
    check_model("towers", model)
    _check_features(model)
    peers = Peers(processes, model)
    if peers.size != TOWERS:
        raise ValueError(
            f"towers needs {TOWERS} processes, one for each group of the convolutions, got {peers.size}: hybrid takes "
            "any number"
        )
    return Towers(model, peers)


def _check_features(model: AlexNet) -> None:
    """Refuse features that do not fall into two towers."""
    elsewhere = "share the network by hybrid, or train it in whole copies"
    if type(model.features) not in (nn.Sequential, FusedSequential):
        raise ValueError(f"towers splits features that are an nn.Sequential, got {type(model.features).__name__}")
    layers = list(leaves(model.features))
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    if all(layer.groups % TOWERS for layer in convolutions):
        raise ValueError(
            f"towers splits the layers of 'paper', and the convolutions of {model.variant!r} have no two groups to "
            f"keep apart: {elsewhere}"
        )
    for layer in [*layers, model.avgpool]:
        why = _why_not(layer, layer is convolutions[0])
        if why:
            raise ValueError(f"towers splits the layers of 'paper', and {name_of(layer, model)} {why}: {elsewhere}")


def _why_not(layer: nn.Module, first: bool) -> str | None:
    """What keeps a layer from being split into towers, if anything does; `first` of a convolution of the images."""
    if isinstance(layer, nn.LocalResponseNorm) and getattr(layer, "groups", 1) % TOWERS:
        return "normalises across the channels of both towers"
    if type(layer) not in LAYERS or not is_plain(layer):
        return f"is {described(layer)}"
    if isinstance(layer, nn.Conv2d):
        if layer.groups > 1 and (first or layer.groups % TOWERS):
            return f"is a convolution of {layer.groups} groups"
        if layer.out_channels % TOWERS:
            return f"has {layer.out_channels} filters, which cannot be halved"
    return None


LAYERS = (nn.Conv2d, nn.ReLU, GroupedLocalResponseNorm, nn.MaxPool2d, nn.Identity, nn.AdaptiveAvgPool2d)
"""Those of which a tower can have half."""


def _in_towers(network: Towers) -> ShardedSequential:
    """The features, whose parameters are halves already: in segments, where a convolution sees the maps of both."""
    segments: list[tuple[list[nn.Module], int | None]] = [([], None)]
    convolutions = 0
    for layer in leaves(network.features):
        if isinstance(layer, nn.Conv2d):
            if layer.groups > 1:
                layer.in_channels //= TOWERS
                layer.groups //= TOWERS
            elif convolutions:
                segments.append(([], layer.in_channels))
            layer.out_channels //= TOWERS
            convolutions += 1
        elif isinstance(layer, GroupedLocalResponseNorm):
            layer.groups //= TOWERS
        segments[-1][0].append(layer)
    return ShardedSequential(network.features, segments, network.peers)
