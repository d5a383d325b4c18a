"""What a run of layers is: the layers, and the op that they are given to."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from alexnet_triton import ops
from alexnet_triton.stages import ConvStage, PoolStage


class ConvRun(NamedTuple):
    """Conv2d [+ ReLU]."""

    conv: nn.Conv2d
    relu: bool

    def __call__(self, x: Tensor) -> Tensor:
        """The run's answer to `x`."""
        return self.run(x, self.relu)

    def run(self, x: Tensor, relu: bool) -> Tensor:
        """The run on `x`, (N, C, H, W), with or without its ReLU."""
        c: Any = self.conv  # torch declares its pairs as tuple[int, ...]
        return ops.conv2d_relu(x, c.weight, c.bias, c.stride, c.padding, c.groups, relu)

    def link(self) -> ops.Run | None:
        """What a chain is told of this run; None where it cannot stand in one (uneven padding)."""
        c: Any = self.conv
        padding, more = c.padding, (0, 0)
        if isinstance(padding, str):
            padding, more = ops.named_padding(c.weight, c.stride, padding)
        if more != (0, 0):
            return None
        return ConvStage(c.stride, padding, c.groups, self.relu, c.bias is not None), c.weight, c.bias


class PoolRun(NamedTuple):
    """[LocalResponseNorm +] MaxPool2d."""

    norm: nn.LocalResponseNorm | None
    pool: nn.MaxPool2d

    def __call__(self, x: Tensor) -> Tensor:
        """The run's answer to `x`."""
        n, p = self.norm, self.pool
        window = (p.kernel_size, p.stride, p.padding, p.ceil_mode)
        if n is None:
            return ops.lrn_max_pool(x, 0, 0.0, 0.0, 0.0, *window)
        return ops.lrn_max_pool(x, n.size, n.alpha, n.beta, n.k, *window, getattr(n, "groups", 1))

    def link(self) -> ops.Run:
        """What a chain is told of this run."""
        n, p = self.norm, self.pool
        norm = (0, 0.0, 0.0, 0.0) if n is None else (n.size, n.alpha, n.beta, n.k)
        window = (ops.pair(p.kernel_size), ops.pair(p.stride), ops.pair(p.padding), p.ceil_mode)
        return PoolStage(*norm, *window, getattr(n, "groups", 1)), None, None


class LinearRun(NamedTuple):
    """[Dropout +] Linear [+ ReLU]."""

    dropout: nn.Dropout | None
    linear: nn.Linear
    relu: bool

    def __call__(self, x: Tensor) -> Tensor:
        """The run's answer to `x`."""
        d, layer = self.dropout, self.linear
        p, training = (0.0, False) if d is None else (d.p, d.training)
        return ops.dropout_linear(x, layer.weight, layer.bias, p, self.relu, training)


Run = ConvRun | PoolRun | LinearRun

OPS: dict[type, str] = {ConvRun: "conv2d_relu", PoolRun: "lrn_max_pool", LinearRun: "dropout_linear"}
"""The op that a run of each kind is given to."""
