"""A convolution of single pixels by a few filters as a matrix product, on a CPU: LPIPS's heads are such.

y[n] = weight (K, C) @ x[n] (C, H*W)        for each image n
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FEW_FILTERS = 16
"""Filters up to which a matrix product is faster than oneDNN's convolution.

Measured on two cores of an EPYC (AVX2) with torch 2.14, float32, maps of 64 and 256 channels: with 1 to 16 filters the
product takes a quarter to three quarters of the time forward, and less than that with its gradients; with 64 they are
equals.
"""


def pays(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `conv` is to be run on `x` by `conv2d`."""
    return (
        conv.kernel_size == (1, 1)
        and conv.out_channels <= FEW_FILTERS
        and conv.stride == (1, 1)
        and conv.padding in ((0, 0), "valid", "same")
        and conv.groups == 1
        and x.shape[1] == conv.in_channels  # anything else is refused by the op
        and x.dtype == conv.weight.dtype == torch.float32
        and x.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )


def conv2d(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What `conv` makes of `x`, (N, C, H, W)."""
    n, c, height, width = x.shape
    weight = conv.weight.reshape(1, conv.out_channels, c).expand(n, -1, -1)
    y = torch.bmm(weight, x.view(n, c, height * width)).view(n, conv.out_channels, height, width)
    return y if conv.bias is None else y + conv.bias.view(-1, 1, 1)
