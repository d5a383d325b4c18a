"""What each op means, in plain PyTorch: the definition that the kernels are held to.

Every function runs on any device and is differentiable as often as PyTorch's own functions are.
Arguments have been checked by `ops`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def conv2d_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, groups: int, relu: bool
) -> Tensor:
    """Convolution, bias and ReLU. NaN passes through, and the derivative of ReLU at 0 is 0."""
    y = F.conv2d(x, weight, bias, stride, padding, 1, groups)
    return torch.relu_(y) if relu else y


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float, groups: int = 1) -> Tensor:
    """Local response normalisation across channels, each group of channels for itself (any rank >= 2).

    b[c] = a[c] / (k + alpha/size * sum of a[i]^2 for i in c - size//2 .. c + (size-1)//2)^beta

    as in `torch.nn.LocalResponseNorm`, even sizes included. Half-precision input is squared and summed in
    float32, so that squares past 65,504 do not become infinite.
    """
    if groups == 1:
        return _normalise(x, size, alpha, beta, k)
    return torch.cat([_normalise(part, size, alpha, beta, k) for part in x.chunk(groups, 1)], 1)


def _normalise(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    a = x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x
    channels = a.shape[1]
    square = a * a  # not a.square(): its gradient, 2a, overflows first
    total = square
    # Shifted sums instead of a band matrix: an infinity must stay inside its own windows.
    for shift in range(1, size // 2 + 1):
        if shift < channels:
            lower = square.narrow(1, 0, channels - shift)
            total = total + F.pad(lower, [0] * (2 * x.dim() - 4) + [shift, 0])
            if shift <= (size - 1) // 2:
                higher = square.narrow(1, shift, channels - shift)
                total = total + F.pad(higher, [0] * (2 * x.dim() - 4) + [0, shift])
    return (a / (total * (alpha / size) + k) ** beta).to(x.dtype)


def lrn_max_pool(
    x: Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    ceil_mode: bool,
    lrn_groups: int,
) -> Tensor:
    """Local response normalisation (none where `size` is 0), then max pooling."""
    if size:
        x = local_response_norm(x, size, alpha, beta, k, lrn_groups)
    return F.max_pool2d(x, kernel_size, stride, padding, 1, ceil_mode)


def dropout_linear(x: Tensor, weight: Tensor, bias: Tensor | None, p: float, relu: bool) -> Tensor:
    """Dropout with probability `p` (none where it is 0), then a linear layer, then ReLU where asked."""
    if p:
        x = F.dropout(x, p)
    y = F.linear(x, weight, bias)
    return torch.relu_(y) if relu else y
