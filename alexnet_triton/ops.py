"""The fused ops of AlexNet, in torch's terms and with torch's defaults.

Every op takes and gives ordinary tensors, is differentiable, follows autocast, and runs as Triton kernels
or as its meaning in plain PyTorch (`alexnet_triton.reference`), as `alexnet_triton.backend` decides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_triton import reference
from alexnet_triton.backend import takes_triton

__all__ = ["conv2d_relu", "lrn_max_pool", "dropout_linear"]

KERNELS: dict[str, Callable[..., Tensor]] = {}
"""Triton implementations by op name; each takes the arguments of the function of that name in `reference`."""


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
    stride = _pair(stride)
    if isinstance(padding, str):
        x, padding = _named_padding(x, weight, stride, padding)
    else:
        padding = _pair(padding)
    fits = (
        x.dim() == 4
        and weight.dim() == 4
        and groups > 0
        and x.shape[1] == weight.shape[1] * groups
        and weight.shape[0] % groups == 0
        and x.shape[2] + 2 * padding[0] >= weight.shape[2]
        and x.shape[3] + 2 * padding[1] >= weight.shape[3]
        and min(stride) > 0
        and min(padding) >= 0
        and (bias is None or bias.shape == weight.shape[:1])
    )
    if not fits:
        raise ValueError(_why_conv_does_not_fit(x, weight, bias, stride, padding, groups))
    _check_tensors("conv2d_relu", x, weight, bias)
    return _implementation("conv2d_relu", x)(x, weight, bias, stride, padding, groups, relu)


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
    window, stride, padding = _pair(kernel_size), _pair(stride), _pair(padding)
    slack = (stride[0] - 1, stride[1] - 1) if ceil_mode else (0, 0)
    fits = (
        x.dim() == 4
        and size >= 0
        and lrn_groups > 0
        and x.shape[1] % lrn_groups == 0
        and min(window) > 0
        and min(stride) > 0
        and 0 <= 2 * padding[0] <= window[0]
        and 0 <= 2 * padding[1] <= window[1]
        and x.shape[2] > 0
        and x.shape[3] > 0
        and x.shape[2] + 2 * padding[0] + slack[0] >= window[0]
        and x.shape[3] + 2 * padding[1] + slack[1] >= window[1]
    )
    if not fits:
        raise ValueError(_why_pool_does_not_fit(x, size, window, stride, padding, slack, lrn_groups))
    _check_tensors("lrn_max_pool", x)
    run = _implementation("lrn_max_pool", x)
    return run(x, size, alpha, beta, k, window, stride, padding, ceil_mode, lrn_groups)


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
    return _implementation("dropout_linear", x)(x, weight, bias, p if training else 0.0, relu)


def _implementation(op: str, x: Tensor) -> Callable[..., Tensor]:
    kernel = KERNELS.get(op)
    if takes_triton(op, x, kernel is not None) and kernel is not None:
        return kernel
    return getattr(reference, op)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, int):
        return (value, value)
    rows, columns = value
    return (rows, columns)


def _named_padding(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: str) -> tuple[Tensor, tuple[int, int]]:
    """`"same"` and `"valid"` in numbers; an uneven border (even filters) is added to `x` here."""
    if padding == "valid":
        return x, (0, 0)
    if padding != "same":
        raise ValueError(f"conv2d_relu takes padding 'same', 'valid' or numbers, got {padding!r}")
    if stride != (1, 1):
        raise ValueError(f"conv2d_relu takes padding='same' with stride 1 only, got stride {stride}")
    rows, columns = weight.shape[-2] - 1, weight.shape[-1] - 1
    if rows % 2 or columns % 2:
        x = F.pad(x, (0, columns % 2, 0, rows % 2))
    return x, (rows // 2, columns // 2)


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


def _not_a_batch(op: str, x: Tensor) -> str:
    hint = ": add the batch dimension with x.unsqueeze(0)" if x.dim() == 3 else ""
    return f"{op} needs a 4-D input (N, C, H, W), got {x.dim()}-D {tuple(x.shape)}{hint}"


def _why_conv_does_not_fit(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    groups: int,
) -> str:
    op = "conv2d_relu"
    if x.dim() != 4:
        return _not_a_batch(op, x)
    if weight.dim() != 4:
        return f"{op} needs filters of shape (K, C/groups, R, S), got {tuple(weight.shape)}"
    if min(stride) < 1 or min(padding) < 0 or groups < 1:
        return (
            f"{op} needs stride and groups of at least 1 and padding of at least 0, got stride {stride}, "
            f"padding {padding}, groups {groups}"
        )
    filters, depth, rows, columns = weight.shape
    if x.shape[1] != depth * groups:
        return (
            f"{op} needs an input of {depth * groups} channels for filters of shape {tuple(weight.shape)} "
            f"in {groups} group(s), got {x.shape[1]} channels in {tuple(x.shape)}"
        )
    if filters % groups:
        return f"{op} needs a number of filters that {groups} groups divide, got {filters}"
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"{op} needs a bias of shape ({filters},), got {tuple(bias.shape)}"
    least = (max(1, rows - 2 * padding[0]), max(1, columns - 2 * padding[1]))
    return (
        f"{op} needs maps of at least {least[0]}x{least[1]} for a {rows}x{columns} filter with padding "
        f"{padding}, got {x.shape[2]}x{x.shape[3]}: use larger images"
    )


def _why_pool_does_not_fit(
    x: Tensor,
    size: int,
    window: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    slack: tuple[int, int],
    lrn_groups: int,
) -> str:
    op = "lrn_max_pool"
    if x.dim() != 4:
        return _not_a_batch(op, x)
    if size < 0:
        return f"{op} needs a size of at least 0 channels (0 leaves the normalisation out), got {size}"
    if lrn_groups < 1 or x.shape[1] % lrn_groups:
        return f"{op} needs lrn_groups that divides the {x.shape[1]} channels, got {lrn_groups}"
    if min(window) < 1 or min(stride) < 1:
        return f"{op} needs a window and a stride of at least 1, got window {window}, stride {stride}"
    if min(padding) < 0 or 2 * padding[0] > window[0] or 2 * padding[1] > window[1]:
        return f"{op} needs padding between 0 and half of the window {window}, got {padding}"
    least = [max(1, w - 2 * p - s) for w, p, s in zip(window, padding, slack, strict=True)]
    return (
        f"{op} needs maps of at least {least[0]}x{least[1]} for a {window[0]}x{window[1]} window with padding "
        f"{padding}, got {x.shape[2]}x{x.shape[3]}: use larger images"
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
