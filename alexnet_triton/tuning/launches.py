"""Which launches a training step of a network makes, on a GPU that need not be there, each with its place in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from alexnet_triton import configs
from alexnet_triton.kernels.target import Target
from alexnet_triton.model import AlexNet
from alexnet_triton.stages import ConvStage, PoolStage, Stage
from alexnet_triton.tuning import loops
from alexnet_triton.variants import VARIANTS

if TYPE_CHECKING:
    from alexnet_triton.kernels.launch import Launch

DIRECTIONS = ("forward", "data gradient", "weight gradient")
CONVOLUTIONS = ("conv_kernel", "shifted_conv_kernel")
"""Kernels of a convolution's forward product and data gradient, by the loop that a config names."""

LAYERS = ("conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5", "fc6", "fc7", "fc8")
IMAGES, UPDATE = ("images", "augment"), ("update", "step")
"""Layer and direction, as it were, of what makes the network's input from bytes, and of the rule that updates the
parameters."""
PLACES = (IMAGES[0], *LAYERS, UPDATE[0])

IMAGE_SIZE = 256
"""Side of the images, in pixels, that a dataset of 2012's recipe holds."""


class LayerLaunch(NamedTuple):
    """A launch, and the place in a network that it is made for."""

    layer: str
    """Of `PLACES`."""
    direction: str
    """Of `DIRECTIONS`, or that of `IMAGES` or `UPDATE`."""
    launch: Launch

    @property
    def kernel(self) -> str:
        """Name of the kernel's function."""
        return str(self.launch.kernel.__name__)

    @property
    def kind(self) -> str:
        """What it is.

        `"product"`: a sum of matrix products; `"map"`: a pass over maps or parameters; `"bytes"`: one over images;
        `"copy"`: what serves them.
        """
        if self.kernel in loops.PRODUCTS:
            return "product"
        if self.layer == IMAGES[0]:
            return "bytes"
        return "map" if self.layer.startswith(("pool", "update")) else "copy"


def launches(variant: str, dtype: torch.dtype, batch: int, target: Target) -> list[LayerLaunch]:
    """The launches of a training step's forward and backward pass, the gradient of the images included.

    Args:
        variant: of `alexnet_triton.AlexNet`.
        dtype: of images and parameters.
        batch: number of images.
        target: where they would be made, with the configs that ship for its card.
    """
    configs.install()
    model = AlexNet(variant=variant, device="meta", dtype=dtype)
    size = VARIANTS[variant].image_size
    images = torch.empty(batch, 3, size, size, device="meta", dtype=dtype)
    return _map_launches(model, images, target) + _linear_launches(model, batch, target)


def _map_launches(model: AlexNet, images: Tensor, target: Target) -> list[LayerLaunch]:
    """Of convolutions and poolings, run as the one chain that they are: a map's layout depends on who reads it."""
    from alexnet_triton import chain
    from alexnet_triton.kernels import launch

    stages, parameters = stages_of(model.features)
    names = [name for name in LAYERS if not name.startswith("fc")]
    with launch.recording(target) as forward:
        out, saved = chain.forward(images, parameters, stages, True, False)
    with launch.recording(target) as backward:
        needs = [True] * (1 + len(parameters))
        chain.backward(torch.empty_like(out), images, out, saved, parameters, stages, needs, False)

    found = []
    places = iter(names)
    place, done = next(places), False
    for made in forward:  # what enters, the packed filters, the product, the sum of its parts; then the next layer's
        name, pools = made.kernel.__name__, _of_pooling(made)
        if (done and name != "finish_kernel") or pools != place.startswith("pool"):
            place = next(places)
        done = name in (*CONVOLUTIONS, "finish_kernel")
        found.append(LayerLaunch(place, "forward", made))

    places = reversed(names)
    place, direction = next(places), "data gradient"
    for made in backward:  # what enters, the weight gradient; the turned filters, the data gradient; what leaves
        name, pools = made.kernel.__name__, _of_pooling(made)
        opens = name in ("weight_gradient_kernel", "enter_kernel") and direction == "data gradient"
        if opens or pools != place.startswith("pool"):
            place = next(places)
            direction = "data gradient" if pools else "weight gradient"
        if name in ("pack_kernel", *CONVOLUTIONS, "finish_kernel"):
            direction = "data gradient"
        found.append(LayerLaunch(place, direction, made))
    return found


def _of_pooling(made: Launch) -> bool:
    module: str = made.kernel.fn.__module__  # an interpreted kernel itself has none
    return module.endswith("norm_pool")


def stages_of(features: nn.Module) -> tuple[tuple[Stage, ...], list[Tensor]]:
    """The stages of a network's `features`, and their parameters, as `alexnet_triton.chain` takes them."""
    stages: list[Stage] = []
    parameters: list[Tensor] = []
    norm: tuple[int, float, float, float] = (0, 0.0, 0.0, 0.0)
    groups = 1
    for layer in features.modules():
        options: Any = layer  # torch declares its pairs as tuple[int, ...]
        if isinstance(layer, nn.Conv2d):
            stages.append(ConvStage(options.stride, options.padding, layer.groups, True, layer.bias is not None))
            parameters += [p for p in (layer.weight, layer.bias) if p is not None]
        elif isinstance(layer, nn.LocalResponseNorm):
            norm, groups = (layer.size, layer.alpha, layer.beta, layer.k), getattr(layer, "groups", 1)
        elif isinstance(layer, nn.MaxPool2d):
            window, stride, padding = ((n, n) for n in (options.kernel_size, options.stride, options.padding))
            stages.append(PoolStage(*norm, window, stride, padding, layer.ceil_mode, groups))
            norm, groups = (0, 0.0, 0.0, 0.0), 1
    return tuple(stages), parameters


class LinearCall(NamedTuple):
    """What a fully connected layer's kernels are called with."""

    layer: str
    """Of `LAYERS`."""
    x: Tensor
    """(N, features in), random."""
    weight: Tensor
    bias: Tensor
    seed: Tensor | None
    """Of the dropout before the layer; None where there is none."""
    dropout: float
    relu: bool


def linear_calls(model: AlexNet, batch: int) -> Iterator[LinearCall]:
    """The calls of a network's fully connected layers in a training step, on the model's device."""
    from alexnet_triton.kernels import random

    dropout, names = 0.0, iter(("fc6", "fc7", "fc8"))
    for layer in model.classifier.modules():
        if isinstance(layer, nn.Dropout):
            dropout = layer.p
        if isinstance(layer, nn.Linear):
            name, weight = next(names), layer.weight
            x = torch.randn(batch, layer.in_features, device=weight.device, dtype=weight.dtype)
            seed = random.seed(x.device) if dropout else None
            yield LinearCall(name, x, weight, layer.bias, seed, dropout, name != "fc8")
            dropout = 0.0


def _linear_launches(model: AlexNet, batch: int, target: Target) -> list[LayerLaunch]:
    from alexnet_triton.kernels import launch, linear

    found = []
    for name, x, weight, bias, seed, dropout, relu in linear_calls(model, batch):
        with launch.recording(target) as forward:
            y = linear.dropout_linear(x, weight, bias, seed, dropout, relu)
        with launch.recording(target) as backward:
            of_relu = y if relu else None
            linear.dropout_linear_backward(y, x, weight, of_relu, seed, dropout, (True, True, True))
        found += [LayerLaunch(name, "forward", made) for made in forward]
        products = 0
        for made in backward:  # the gradient enters; the data gradient; the activations enter; the weight gradient
            kernel = made.kernel.__name__
            after_data = products > 0 and kernel != "reduce_kernel"
            products += kernel == "gemm_kernel"
            direction = "weight gradient" if products > 1 or after_data else "data gradient"
            found.append(LayerLaunch(name, direction, made))
    return found


def update_launches(variant: str, dtype: torch.dtype, target: Target) -> list[LayerLaunch]:
    """The launch that updates all parameters of a network, with float32 masters where they are of half precision.

    Args:
        variant: of `alexnet_triton.AlexNet`.
        dtype: of parameters and gradients.
        target: where it would be made.
    """
    from alexnet_triton.kernels import launch, sgd

    steps = []
    for parameter in AlexNet(variant=variant, device="meta", dtype=dtype).requires_grad_(False).parameters():
        weight, velocity = (torch.empty_like(parameter, dtype=torch.float32) for _ in range(2))
        copy = parameter if dtype.itemsize == 2 else None
        steps.append(sgd.Step(torch.empty_like(parameter), weight, velocity, copy, 0))
    with launch.recording(target) as made:
        sgd.sgd(steps, torch.empty(1, 3, device="meta"))
    return [LayerLaunch(*UPDATE, one) for one in made]


def image_launches(variant: str, dtype: torch.dtype, batch: int, target: Target) -> list[LayerLaunch]:
    """The launch that makes a batch of a network's input from bytes, as its first layer reads it.

    Args:
        variant: of `alexnet_triton.AlexNet`.
        dtype: of the input.
        batch: number of images, of `IMAGE_SIZE` pixels a side.
        target: where it would be made.
    """
    from alexnet_triton.kernels import augment, launch
    from alexnet_triton.kernels.conv_shape import convolution

    spec = VARIANTS[variant]
    conv: Any = AlexNet(variant=variant, device="meta").features[0]
    size = (batch, 3, spec.image_size, spec.image_size)
    shape = convolution(size, tuple(conv.weight.shape), conv.stride, conv.padding, conv.groups)
    packed = torch.empty(batch, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8, device="meta")
    draws = torch.empty(batch, augment.FIELDS, device="meta")
    with launch.recording(target) as made:
        images, scale = packed.permute(0, 3, 1, 2), (1 / 255, 1 / 255, 1 / 255)
        augment.augment(images, draws, scale, spec.image_size, shape.x_layout, shape.fold, dtype)
    return [LayerLaunch(*IMAGES, one) for one in made]
