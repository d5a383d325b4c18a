"""A strided convolution's gradient for its input as that of a convolution without a stride, on a CPU.

    folded(x)[n, c*s*t + i*t + j, h, w] = x[n, c, h*s + i, w*t + j]         (stride (s, t), 0 <= i < s, 0 <= j < t)

Blocks of pixels become channels (`torch.nn.functional.pixel_unshuffle` for equal strides), of the images and of the
filters alike, and the strided convolution becomes one of stride 1: AlexNet's conv1, 11x11 with stride 4 over 3
channels, one of 3x3 over 48. The Triton kernels do the same (kernels/conv_shape.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from alexnet_triton import ops

Pair = tuple[int, int]

FEW_CHANNELS = 4
"""Channels a group up to which oneDNN's gradient of a strided convolution for its input is slow.

Measured on two cores of an EPYC (AVX2) with torch 2.14, float32: from images of 3 channels and 11x11 filters with
stride 4 it takes three to four times as long as folded; with 7x7 and stride 2, and 3x3 and stride 2, as long or
longer; from maps of 16 channels half as long.
"""


def pays(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `conv` is to be run on `x` by `conv2d`: its input's gradient is wanted, and slow otherwise."""
    return (
        x.requires_grad
        and torch.is_grad_enabled()
        and x.dtype == torch.float32
        and type(x) in (Tensor, nn.Parameter)  # of a subclass, a function gives a view, which no ReLU may change
        and conv.in_channels // conv.groups <= FEW_CHANNELS
        and min(conv.stride) > 1
        and conv.padding != "same"
        and not torch.is_autocast_enabled("cpu")
        and not forward_mode()
    )


def forward_mode() -> bool:
    """Whether forward-mode differentiation is on, which a function with a gradient of its own would stop."""
    return forward_ad._current_level >= 0


def conv2d(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What `conv` makes of `x`, (N, C, H, W); float32, on a CPU. Differentiable as often as one likes."""
    padding = (0, 0) if isinstance(conv.padding, str) else conv.padding
    return _FoldedGradient.apply(x, conv.weight, conv.bias, conv.stride, padding, conv.groups)  # type: ignore[no-any-return]


class _FoldedGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, groups: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = (stride, padding, groups)
        return ops.conv2d_relu(x, weight, bias, stride, padding, groups, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, groups = ctx.options
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if of_x:
            last = ops.is_channels_last(x) or ops.is_channels_last(weight)  # torch's own rule
            layout = torch.channels_last if last else torch.contiguous_format
            dx = _input_gradient(grad, weight, x.shape[2:], stride, padding, groups).contiguous(memory_format=layout)
        if of_weight or of_bias:
            sizes = [weight.shape[0]] if of_bias else None
            options = (stride, padding, (1, 1), False, (0, 0), groups, (False, of_weight, of_bias))
            _, dw, db = torch.ops.aten.convolution_backward(grad, x, weight, sizes, *options)
        return dx, dw, db, None, None, None


def _input_gradient(grad: Tensor, weight: Tensor, size: Pair, stride: Pair, padding: Pair, groups: int) -> Tensor:
    """The gradient for an input of `size` (H, W) from that of the output, (N, K, P, Q): folded, then unfolded."""
    (s, t), (top, left), (height, width) = stride, padding, size
    rows, columns = weight.shape[2:]
    filters = _folded(F.pad(weight, (0, -columns % t, 0, -rows % s)), stride)
    padded = _unfolded(F.conv_transpose2d(grad, filters, groups=groups), stride)
    # What the padding took part in has no gradient; where the last pixels met no window, theirs is zero.
    right, bottom = left + width - padded.shape[3], top + height - padded.shape[2]
    return F.pad(padded, (-left, right, -top, bottom))


def _folded(x: Tensor, stride: Pair) -> Tensor:
    (s, t), (n, c, height, width) = stride, x.shape
    blocks = x.reshape(n, c, height // s, s, width // t, t)
    return blocks.permute(0, 1, 3, 5, 2, 4).reshape(n, c * s * t, height // s, width // t)


def _unfolded(x: Tensor, stride: Pair) -> Tensor:
    (s, t), (n, c, height, width) = stride, x.shape
    blocks = x.reshape(n, c // (s * t), s, t, height, width)
    return blocks.permute(0, 1, 4, 2, 5, 3).reshape(n, c // (s * t), height * s, width * t)
