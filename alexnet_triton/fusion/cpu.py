"""Runs on feature maps on a CPU: each in the memory layout that is faster there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alexnet_triton import ops
from alexnet_triton.fusion.runs import ConvRun, PoolRun

CHANNELS_LAST_PIXELS = 1_400
"""Output pixels (N*P*Q) from which a convolution is given channels-last maps; half of it where its map is pooled next.

Measured on two cores of a Xeon (AVX-512) with torch 2.14, float32: torch's convolutions are 10 to 60 % slower in this
layout below 700 pixels, equal at 1,400 to 3,000, and 5 to 35 % faster above, gradients included; its max pool is
seven to ten times as fast.
"""


def run_on_cpu(runs: tuple[ConvRun | PoolRun, ...], x: Tensor) -> Tensor:
    """Run map runs in the layouts that are faster on a CPU; the answer has the layout that torch would give."""
    layouts_are_free = (
        x.dtype != torch.float64  # torch's own convolution, for which the layouts are equals
        and torch._C._functorch.peek_interpreter_stack() is None  # vmap has its own
        and any(isinstance(run, ConvRun) for run in runs)
    )
    if not layouts_are_free:
        for run in runs:
            x = run(x)
        return x
    last = any(ops.is_channels_last(t) for t in (x, *(run.conv.weight for run in runs if isinstance(run, ConvRun))))
    back_to_contiguous = not last  # where the caller has chosen channels-last, torch keeps to it and so do we
    late_relu = False
    for run, following in zip(runs, (*runs[1:], None), strict=True):
        pooled_next = isinstance(following, PoolRun)
        if isinstance(run, ConvRun):
            if back_to_contiguous:
                last = _output_pixels(run.conv, x) >= CHANNELS_LAST_PIXELS // (2 if pooled_next else 1)
                x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            # max(relu(x)) is relu(max(x)), and so are its gradients: ReLU on the pooled map is a quarter of the
            # work. (In the contiguous layout torch's pool branches on every element, and is slower on maps of
            # both signs: 2.5 % of a whole forward at batch 1.)
            late_relu = last and run.relu and isinstance(following, PoolRun) and following.norm is None
            x = run.run(x, run.relu and not late_relu)
        else:
            x = run(x)
            if late_relu:
                x = torch.relu_(x)
                late_relu = False
    return x.contiguous() if back_to_contiguous else x


def _output_pixels(conv: nn.Conv2d, x: Tensor) -> int:
    pixels = x.shape[0]
    padding = conv.padding if isinstance(conv.padding, tuple) else (0, 0)
    for size, window, stride, pad in zip(x.shape[2:], conv.kernel_size, conv.stride, padding, strict=True):
        pixels *= (size + 2 * pad - window) // stride + 1
    return pixels
