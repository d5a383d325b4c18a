"""Runs on feature maps on a CPU: each in the memory layout that is faster there."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_triton import ops
from alexnet_triton.fusion import pointwise, strided
from alexnet_triton.fusion.runs import ConvRun, PoolRun

CHANNELS_LAST_PIXELS = 1_400
"""Output pixels (N*P*Q) from which a convolution is given channels-last maps; half of it where its map is pooled next.

Measured on two cores of a Xeon (AVX-512) with torch 2.14, float32: torch's convolutions are 10 to 60 % slower in this
layout below 700 pixels, equal at 1,400 to 3,000, and 5 to 35 % faster above, gradients included; its max pool is
seven to ten times as fast.
"""

FEW_PRODUCTS = 16
"""Products an element of the input takes part in, below which a convolution is done before its map were copied."""


def run_on_cpu(runs: tuple[ConvRun | PoolRun, ...], x: Tensor) -> Tensor:
    """Run map runs in the layouts that are faster on a CPU; the answer has the layout that torch would give."""
    if (
        x.dtype == torch.float64  # torch's own convolution, for which the layouts are equals
        or torch._C._functorch.peek_interpreter_stack() is not None  # vmap has its own
    ):
        for run in runs:
            x = run(x)
        return x
    last = any(ops.is_channels_last(t) for t in (x, *(run.conv.weight for run in runs if isinstance(run, ConvRun))))
    chosen_here = not last  # where the caller has chosen channels-last, torch keeps to it and so do we
    late_relu = False
    for run, following in zip(runs, (*runs[1:], None), strict=True):
        if chosen_here:
            last = _faster_channels_last(run, following, x, last)
            x = in_layout(x, last)
        if isinstance(run, PoolRun):
            x = run(x)
            if late_relu:
                x = torch.relu_(x)
            late_relu = False
            continue
        # max(relu(x)) is relu(max(x)), and so are its gradients: ReLU on the pooled map is a quarter of the
        # work. (In the contiguous layout torch's pool branches on every element, and is slower on maps of
        # both signs: 2.5 % of a whole forward at batch 1.)
        late_relu = last and run.relu and isinstance(following, PoolRun) and following.norm is None
        relu = run.relu and not late_relu
        other = next((way for way in (strided, pointwise) if way.pays(run.conv, x)), None)
        if other is None:
            x = run.run(x, relu)
        else:
            x = other.conv2d(run.conv, x)
            x = torch.relu_(x) if relu else x
    return in_layout(x, False) if chosen_here else x


def _faster_channels_last(run: ConvRun | PoolRun, following: ConvRun | PoolRun | None, x: Tensor, last: bool) -> bool:
    """Whether `run` is to have its map channels-last; `last` tells whether `x` is."""
    if isinstance(run, ConvRun):
        if following is None and not last:
            return False  # alone it wins less than two copies, both ways, cost
        if run.conv.weight[:, 0].numel() < FEW_PRODUCTS * prod(run.conv.stride):
            return last
        pixels = _output_pixels(run.conv, x)
        return pixels >= CHANNELS_LAST_PIXELS // (2 if isinstance(following, PoolRun) else 1)
    windows, strides = ops.pair(run.pool.kernel_size), ops.pair(run.pool.stride)
    overlap = any(window > stride for window, stride in zip(windows, strides, strict=True))
    if last or run.norm is not None or not overlap:  # windows that do not overlap are fast as they lie
        return last
    return x.dtype == torch.float32 and x.shape[0] * x.shape[2] * x.shape[3] >= CHANNELS_LAST_PIXELS


def in_layout(x: Tensor, channels_last: bool) -> Tensor:
    """`x` contiguous or channels-last; its gradient comes back in the layout that `x` had."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if x.is_contiguous(memory_format=layout):
        return x
    if x.requires_grad and torch.is_grad_enabled() and not strided.forward_mode():
        return _InLayout.apply(x, layout)  # type: ignore[no-any-return]
    return x.contiguous(memory_format=layout)


class _InLayout(torch.autograd.Function):
    """Arithmetic on tensors of two layouts takes torch several times as long as a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: torch.memory_format) -> Tensor:
        ctx.layout = torch.channels_last if ops.is_channels_last(x) else torch.contiguous_format
        return x.contiguous(memory_format=layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.contiguous(memory_format=ctx.layout), None


def _output_pixels(conv: nn.Conv2d, x: Tensor) -> int:
    pixels = x.shape[0]
    padding = conv.padding if isinstance(conv.padding, tuple) else (0, 0)
    for size, window, stride, pad in zip(x.shape[2:], conv.kernel_size, conv.stride, padding, strict=True):
        pixels *= (size + 2 * pad - window) // stride + 1
    return pixels
