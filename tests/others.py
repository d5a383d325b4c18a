"""Networks of other packages, as those build them, with few channels and units; and a network beside its fused twin."""

from __future__ import annotations

import contextlib
import copy
from unittest import mock

import lpips
import torch
import torchvision
from plain import error
from torch import nn

from alexnet_triton import fuse

SHARE = 16
"""Numbers of channels and units that this divides are divided by it, so that branches still add up."""


def few(number):
    """Channels or units in the place of so many."""
    return number if number % SHARE else number // SHARE


@contextlib.contextmanager
def narrow():
    """Convolutions, norms and linear layers that are made here have few channels and units."""
    convolution, linear, norm = nn.Conv2d.__init__, nn.Linear.__init__, nn.BatchNorm2d.__init__

    def narrow_convolution(self, inputs, outputs, *sizes, **options):
        convolution(self, few(inputs), few(outputs), *sizes, **options)

    def narrow_linear(self, inputs, outputs, **options):
        linear(self, few(inputs), few(outputs), **options)

    def narrow_norm(self, channels, **options):
        norm(self, few(channels), **options)

    with (
        mock.patch.object(nn.Conv2d, "__init__", narrow_convolution),
        mock.patch.object(nn.Linear, "__init__", narrow_linear),
        mock.patch.object(nn.BatchNorm2d, "__init__", narrow_norm),
    ):
        yield


def torchvisions(name, **options):
    """A network of torchvision with few channels, and biases and norms that are not trivial."""
    with narrow():
        return lively(getattr(torchvision.models, name)(weights=None, num_classes=5, **options))


def perceptual(net="alex", **options):
    """`lpips.LPIPS` with few channels, in the mode and with the frozen trunk that it has."""
    with narrow():
        return lively(lpips.LPIPS(net=net, pnet_rand=True, pretrained=False, verbose=False, **options))


@torch.no_grad()
def lively(model):
    """Weights that keep a signal through all layers, and no parameter of zeros or ones alone."""
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                layer.bias.uniform_(0.1, 0.3)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.normal_(std=0.1)
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 1.5)
    return model


def tensors(result):
    """All tensors of a result, however deep."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors(part)]


def answers(model, *images, **options):
    """What a model gives: outputs, the gradient of each image, of each parameter that learns, and the buffers."""
    model.zero_grad()
    leaves = [image.clone().requires_grad_() for image in images]
    torch.manual_seed(5)
    outputs = tensors(model(*leaves, **options))
    sum(output.square().mean() for output in outputs).backward()
    learned = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    return [*outputs, *(leaf.grad for leaf in leaves), *learned, *model.buffers()]


def furthest(model, *images, make=fuse, **options):
    """How far the answers of a model, fused, are from its own."""
    twin = make(copy.deepcopy(model))
    return apart(answers(twin, *images, **options), answers(model, *images, **options))


def apart(found, expected):
    """The largest difference of answers, as a share of each tensor's scale.

    A convolution's bias in front of a batch norm has a gradient of zero, and any number close to it is right.
    """
    assert [a is None for a in found] == [a is None for a in expected]
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True) if a is not None]
    least = 0.05 * max(b.abs().max() for _, b in pairs)
    return max(error(a, b) if b.abs().max() > least else error(a + least, b + least) for a, b in pairs)
