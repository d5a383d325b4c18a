"""The fused ops of AlexNet, in torch's terms and with torch's defaults.

Every op takes and gives ordinary tensors, is differentiable, follows autocast, and runs as Triton kernels
or as its meaning in plain PyTorch (`alexnet_triton.reference`), as `alexnet_triton.backend` decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_triton import library, reference
from alexnet_triton.backend import takes_triton
from alexnet_triton.stages import ConvStage, PoolStage, Stage

__all__ = ["conv2d_relu", "lrn_max_pool", "dropout_linear"]

Run = tuple[Stage, Tensor | None, Tensor | None]


def conv2d_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    groups: int = 1,
    relu: bool = True,
) -> Tensor:
    """2-D convolution (cross-correlation), bias and ReLU.

    NaN passes through the ReLU, and its derivative at 0 is 0, as in `torch.relu`.

    Args:
        x: images or feature maps, (N, C, H, W). N may be 0.
        weight: filters, (K, C / groups, R, S).
        bias: (K,), or None.
        stride: step of the window in pixels, one number or (rows, columns).
        padding: zero pixels added at each side, one number or (rows, columns), or `"valid"` or `"same"`.
        groups: number of channel groups; C and K are multiples of it.
        relu: False leaves the ReLU out.

    Returns:
        (N, K, P, Q) with P = (H + 2*padding - R) // stride + 1, and Q likewise from W and S.

    Raises:
        ValueError: shapes that do not fit together, or a filter larger than the padded map.
        TypeError: tensors that are not floating-point, or of different dtypes outside autocast.
        RuntimeError: the Triton backend is demanded and cannot run this.
    """
    stride = pair(stride)
    if isinstance(padding, str):
        padding, (below, right) = named_padding(weight, stride, padding)
        if below or right:
            x = F.pad(x, (0, right, 0, below))
    else:
        padding = pair(padding)
    stage = ConvStage(stride, padding, groups, relu, bias is not None)
    stage.out_size(x.shape, weight.shape, None if bias is None else bias.shape)
    _check_tensors("conv2d_relu", x, weight, bias)
    if takes_triton("conv2d_relu", x):
        channels_last = is_channels_last(x) or is_channels_last(weight)
        return library.map_chain(x, [weight] if bias is None else [weight, bias], (stage,), channels_last)
    return reference.conv2d_relu(x, weight, bias, stride, padding, groups, relu)


def lrn_max_pool(
    x: Tensor,
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    kernel_size: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 2,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
    lrn_groups: int = 1,
) -> Tensor:
    """Local response normalisation across channels, then max pooling.

    b[c] = a[c] / (k + alpha/size * sum of a[i]^2 over the `size` channels around c)^beta

    `alpha` has torch's meaning: it is divided by `size`. The paper's formula (Krizhevsky et al. 2012,
    section 3.3; alpha 1e-4, not divided) is `alpha=5e-4, k=2` here. Squares are summed in float32 for
    half-precision input. The pool propagates NaN, and the first maximum of a window, row by row, gets its
    gradient.

    Args:
        x: feature maps, (N, C, H, W). N may be 0.
        size: number of neighbouring channels, odd or even; 0 leaves the normalisation out.
        alpha: multiplicative factor of the mean square.
        beta: exponent.
        k: additive constant.
        kernel_size: side of the pooling window in pixels, one number or (rows, columns).
        stride: step of the window, one number or (rows, columns).
        padding: border that never wins a window, at most half of the window.
        ceil_mode: round output sizes up instead of down (Caffe); the last window still starts inside.
        lrn_groups: normalise within this many groups of channels (the two towers of 2012).

    Returns:
        (N, C, P, Q) with P = (H + 2*padding - kernel_size) // stride + 1, and Q likewise.

    Raises:
        ValueError: shapes or numbers that do not fit together, or a window larger than the padded map.
        TypeError: `x` is not floating-point.
        RuntimeError: the Triton backend is demanded and cannot run this.
    """
    window, stride, padding = pair(kernel_size), pair(stride), pair(padding)
    stage = PoolStage(size, alpha, beta, k, window, stride, padding, ceil_mode, lrn_groups)
    stage.out_size(x.shape)
    _check_tensors("lrn_max_pool", x)
    if takes_triton("lrn_max_pool", x):
        return library.map_chain(x, [], (stage,), is_channels_last(x))
    return reference.lrn_max_pool(x, size, alpha, beta, k, window, stride, padding, ceil_mode, lrn_groups)


def dropout_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = 0.0,
    relu: bool = False,
    training: bool = True,
) -> Tensor:
    """Dropout on the input, then a linear layer, then ReLU where asked.

    In training each element of `x` is zeroed with probability `p` and the others are scaled by
    1 / (1 - p); the draw comes from torch's generator of the device and advances it. p = 1 gives zeros.

    Args:
        x: (..., features in).
        weight: (features out, features in).
        bias: (features out,), or None.
        p: probability of dropping an element, in [0, 1].
        relu: apply ReLU to the result.
        training: False leaves the dropout out.

    Returns:
        (..., features out).

    Raises:
        ValueError: `p` is outside [0, 1], or shapes do not fit together.
        TypeError: tensors that are not floating-point, or of different dtypes outside autocast.
        RuntimeError: the Triton backend is demanded and cannot run this.
    """
    fits = (
        0.0 <= p <= 1.0
        and x.dim() > 0
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
    )
    if not fits:
        raise ValueError(_why_linear_does_not_fit(x, weight, bias, p))
    _check_tensors("dropout_linear", x, weight, bias)
    run = library.dropout_linear if takes_triton("dropout_linear", x) else reference.dropout_linear
    return run(x, weight, bias, p if training else 0.0, relu)


def dropout_mask(x: Tensor, p: float, shape: Sequence[int]) -> Tensor:
    """What `dropout_linear` would multiply an input of `shape` by in training, drawn as it draws it.

    For those who have only a part of a batch at a time, and drop what the whole batch would. Torch's generator of the
    device advances as it does there.

    Args:
        x: an input, which says device and dtype, and so the backend.
        p: probability of dropping an element, in [0, 1].
        shape: (N, features in).

    Returns:
        `shape`: 0, or 1 / (1 - p) where an element is kept.

    Raises:
        RuntimeError: the Triton backend is demanded and cannot run this.
    """
    ones = x.new_ones(tuple(shape))
    draw = library.dropout if takes_triton("dropout_linear", x) else F.dropout
    return draw(ones, p)


def map_chain(x: Tensor, runs: Sequence[Run]) -> Tensor:
    """Convolutions and poolings that follow one another, on the Triton kernels, without a copy between them.

    Args:
        x: images or feature maps, (N, C, H, W).
        runs: for each, what it is told, and the filters and bias of a convolution.

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: tensors that are not floating-point, or of different dtypes outside autocast.
    """
    size: Sequence[int] = x.shape
    parameters: list[Tensor] = []
    for stage, weight, bias in runs:
        if isinstance(stage, ConvStage):
            assert weight is not None
            size = stage.out_size(size, weight.shape, None if bias is None else bias.shape)
            _check_tensors("conv2d_relu", x, weight, bias)
            parameters += [weight] if bias is None else [weight, bias]
        else:
            size = stage.out_size(size)
            _check_tensors("lrn_max_pool", x)
    channels_last = any(is_channels_last(t) for t in (x, *parameters) if t.dim() == 4)
    return library.map_chain(x, parameters, [stage for stage, _, _ in runs], channels_last)


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """One number as (rows, columns)."""
    if isinstance(value, int):
        return (value, value)
    rows, columns = value
    return (rows, columns)


def named_padding(weight: Tensor, stride: tuple[int, int], padding: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """`"same"` and `"valid"` in numbers: the padding at each side, and what even filters add below and to the right.

    Raises:
        ValueError: another name, or `"same"` with a stride.
    """
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding != "same":
        raise ValueError(f"conv2d_relu takes padding 'same', 'valid' or numbers, got {padding!r}")
    if stride != (1, 1):
        raise ValueError(f"conv2d_relu takes padding='same' with stride 1 only, got stride {stride}")
    rows, columns = weight.shape[-2] - 1, weight.shape[-1] - 1
    return (rows // 2, columns // 2), (rows % 2, columns % 2)


def is_channels_last(x: Tensor) -> bool:
    """Whether torch's convolutions take `x` for channels-last: its strides grow in the order C, W, H, N.

    The rule of `is_channels_last_strides_2d` in c10/core/MemoryFormat.h, where a size of 1 proves nothing.
    """
    least, sizes, strides = 0, x.shape, x.stride()
    if strides[1] == 0:
        return False
    for axis in (1, 3, 2, 0):
        size, stride = sizes[axis], strides[axis]
        if size == 0 or stride < least:
            return False
        if axis == 0 and least == strides[1]:
            return False
        least = stride * max(size, 1)
    return True


def _check_tensors(op: str, x: Tensor, *parameters: Tensor | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{op} needs a floating-point tensor, got {x.dtype}: convert it, as in x.float()")
    for parameter in parameters:
        if parameter is None:
            continue
        if parameter.device != x.device:
            raise ValueError(
                f"{op} needs all its tensors on one device, got input on {x.device} and parameter on "
                f"{parameter.device}: move one with .to(device)"
            )
        if parameter.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"{op} needs one dtype outside autocast, got input {x.dtype} and parameter "
                f"{parameter.dtype}: convert one with .to(dtype)"
            )


def _why_linear_does_not_fit(x: Tensor, weight: Tensor, bias: Tensor | None, p: float) -> str:
    op = "dropout_linear"
    if not 0.0 <= p <= 1.0:
        return f"{op} needs a dropout probability p in [0, 1], got {p}"
    if weight.dim() != 2:
        return f"{op} needs a weight of shape (features out, features in), got {tuple(weight.shape)}"
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return (
            f"{op} needs an input whose last dimension is {weight.shape[1]}, the weight's features in, "
            f"got {tuple(x.shape)}"
        )
    shape = None if bias is None else tuple(bias.shape)
    return f"{op} needs a bias of shape ({weight.shape[0]},), got {shape}"
