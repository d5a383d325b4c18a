"""Runs on feature maps that follow one another, executed together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from alexnet_triton import ops
from alexnet_triton.backend import takes_triton
from alexnet_triton.fusion.cpu import run_on_cpu
from alexnet_triton.fusion.runs import ConvRun, PoolRun


class MapRuns(NamedTuple):
    """Convolution and pooling runs that follow one another, and the layers they stand for."""

    runs: tuple[ConvRun | PoolRun, ...]
    layers: tuple[nn.Module, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """The runs' answer to `x`."""
        if x.dim() != 4:  # the layers take a single image (C, H, W) too, and know best what else is wrong
            for layer in self.layers:
                x = layer(x)
            return x
        if takes_triton("conv2d_relu", x):
            return run_on_triton(self.runs, x)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return run_on_cpu(self.runs, x)
        for run in self.runs:
            x = run(x)
        return x


def run_on_triton(runs: tuple[ConvRun | PoolRun, ...], x: Tensor) -> Tensor:
    """Run map runs in as few chains as can be: one, but for a convolution whose padding is uneven."""
    links: list[ops.Run] = []
    for run in runs:
        link = run.link()
        if link is not None:
            links.append(link)
            continue
        x = run(ops.map_chain(x, links) if links else x)
        links = []
    return ops.map_chain(x, links) if links else x
