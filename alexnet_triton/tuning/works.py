"""The work of a network's training step whose configs may be chosen: by layer and direction, ready to be done again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alexnet_triton.kernels.config import Problem, WeightGradientProblem
from alexnet_triton.kernels.target import Target
from alexnet_triton.model import AlexNet
from alexnet_triton.tuning.launches import DIRECTIONS, LAYERS, linear_calls, stages_of
from alexnet_triton.variants import VARIANTS


class Work(NamedTuple):
    """One launch, with the second one that adds its parts up where there is one, and its tensors."""

    layer: str
    """Of `launches.LAYERS`."""
    direction: str
    """Of `launches.DIRECTIONS`."""
    problem: Problem
    again: Any
    """A function of a config: does the work with it, and gives the answer, a tensor or a tuple of some."""

    @property
    def place(self) -> str:
        """Layer and direction in words."""
        return f"{self.layer} {self.direction}"


def works(variant: str, dtype: torch.dtype, batch: int, target: Target | None = None) -> list[Work]:
    """The work of one step, forward and backward, the gradient of the images included.

    Args:
        variant: of `alexnet_triton.AlexNet`.
        dtype: of images and parameters.
        batch: number of images.
        target: a GPU that need not be there: then no tensor holds anything, and work is done within
            `launch.recording`. None does all of it on this machine's GPU, with random tensors.
    """
    device = "cuda" if target is None else "meta"
    model = AlexNet(variant=variant, device=device, dtype=dtype, init="kaiming").requires_grad_(False)
    size = VARIANTS[variant].image_size
    images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
    found = [*_maps(model, images, target), *_matrices(model, batch, target)]
    order = {place: number for number, place in enumerate(LAYERS)}
    return sorted(found, key=lambda work: order[work.layer])


def _maps(model: AlexNet, images: Tensor, target: Target | None) -> Iterator[Work]:
    """Of convolutions and poolings, run as the one chain that they are: a map's layout depends on who reads it."""
    from alexnet_triton import chain
    from alexnet_triton.kernels import launch

    stages, parameters = stages_of(model.features)
    names = [name for name in LAYERS if not name.startswith("fc")]
    with launch.recording(target) if target else nullcontext():
        with launch.offered() as forward:
            out, saved = chain.forward(images, parameters, stages, True, False)
        with launch.offered() as backward:
            needs = [True] * (1 + len(parameters))
            chain.backward(torch.randn_like(out), images, out, saved, parameters, stages, needs, False)
    for name, offer in zip(names, forward, strict=True):
        yield Work(name, "forward", *offer)
    places = [(name, d) for name in reversed(names) for d in ("weight gradient", "data gradient")]
    places = [(name, d) for name, d in places if d == "data gradient" or name.startswith("conv")]
    for (name, direction), offer in zip(places, backward, strict=True):
        assert isinstance(offer.problem, WeightGradientProblem) == (direction == "weight gradient")
        yield Work(name, direction, *offer)


def _matrices(model: AlexNet, batch: int, target: Target | None) -> Iterator[Work]:
    """Of the fully connected layers."""
    from alexnet_triton.kernels import launch, linear

    for name, x, weight, bias, seed, dropout, relu in linear_calls(model, batch):
        with launch.recording(target) if target else nullcontext(), launch.offered() as offers:
            y = linear.dropout_linear(x, weight, bias, seed, dropout, relu)
            of_relu, grad = y if relu else None, torch.randn_like(y)
            linear.dropout_linear_backward(grad, x, weight, of_relu, seed, dropout, (True, True, True))
        for direction, offer in zip(DIRECTIONS, offers, strict=True):
            yield Work(name, direction, *offer)
