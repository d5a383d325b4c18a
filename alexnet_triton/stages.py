"""What a convolution and a pooling are told beside their tensors, which shapes they take, and what they give.

Both backends stand on these: a shape that does not fit is refused here, in one sentence, before anything runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Pair = tuple[int, int]
Size = Sequence[int]


class ConvStage(NamedTuple):
    """A convolution with bias and ReLU; the fields are `ops.conv2d_relu`'s."""

    stride: Pair
    padding: Pair
    groups: int
    relu: bool
    bias: bool
    """Whether there is one."""

    def out_size(self, x: Size, weight: Size, bias: Size | None) -> tuple[int, int, int, int]:
        """(N, K, P, Q), from the shapes of the input, the filters and the bias.

        Raises:
            ValueError: they do not fit together.
        """
        (stride_h, stride_w), (pad_h, pad_w) = self.stride, self.padding
        if not (
            len(x) == 4
            and len(weight) == 4
            and self.groups > 0
            and stride_h > 0
            and stride_w > 0
            and pad_h >= 0
            and pad_w >= 0
            and weight[0] > 0
            and weight[1] > 0
            and weight[2] > 0
            and weight[3] > 0
            and x[1] == weight[1] * self.groups
            and weight[0] % self.groups == 0
            and x[2] + 2 * pad_h >= weight[2]
            and x[3] + 2 * pad_w >= weight[3]
            and (bias is None or (len(bias) == 1 and bias[0] == weight[0]))
        ):
            raise ValueError(self._misfit(x, weight, bias))
        height = (x[2] + 2 * pad_h - weight[2]) // stride_h + 1
        width = (x[3] + 2 * pad_w - weight[3]) // stride_w + 1
        return x[0], weight[0], height, width

    def _misfit(self, x: Size, weight: Size, bias: Size | None) -> str:
        op = "conv2d_relu"
        if len(x) != 4:
            return _not_a_batch(op, x)
        if len(weight) != 4:
            return f"{op} needs filters of shape (K, C/groups, R, S), got {tuple(weight)}"
        if min(self.stride) < 1 or min(self.padding) < 0 or self.groups < 1:
            return (
                f"{op} needs stride and groups of at least 1 and padding of at least 0, got stride {self.stride}, "
                f"padding {self.padding}, groups {self.groups}"
            )
        if min(weight) < 1:
            return f"{op} needs at least 1 filter, of at least 1 channel and 1 pixel, got filters {tuple(weight)}"
        filters, depth, rows, columns = weight
        if x[1] != depth * self.groups:
            return (
                f"{op} needs an input of {depth * self.groups} channels for filters of shape {tuple(weight)} "
                f"in {self.groups} group(s), got {x[1]} channels in {tuple(x)}"
            )
        if filters % self.groups:
            return f"{op} needs a number of filters that {self.groups} groups divide, got {filters}"
        if bias is not None and tuple(bias) != (filters,):
            return f"{op} needs a bias of shape ({filters},), got {tuple(bias)}"
        least = (max(1, rows - 2 * self.padding[0]), max(1, columns - 2 * self.padding[1]))
        return (
            f"{op} needs maps of at least {least[0]}x{least[1]} for a {rows}x{columns} filter with padding "
            f"{self.padding}, got {x[2]}x{x[3]}: use larger images"
        )


class PoolStage(NamedTuple):
    """Local response normalisation and max pooling; the fields are `ops.lrn_max_pool`'s."""

    size: int
    alpha: float
    beta: float
    k: float
    window: Pair
    stride: Pair
    padding: Pair
    ceil_mode: bool
    lrn_groups: int

    def out_size(self, x: Size) -> tuple[int, int, int, int]:
        """(N, C, P, Q), from the shape of the input.

        Raises:
            ValueError: it does not fit.
        """
        slack = self._slack()
        if not (
            len(x) == 4
            and self.size >= 0
            and self.lrn_groups > 0
            and x[1] > 0
            and x[1] % self.lrn_groups == 0
            and min(self.window) > 0
            and min(self.stride) > 0
            and 0 <= 2 * self.padding[0] <= self.window[0]
            and 0 <= 2 * self.padding[1] <= self.window[1]
            and x[2] > 0
            and x[3] > 0
            and x[2] + 2 * self.padding[0] + slack[0] >= self.window[0]
            and x[3] + 2 * self.padding[1] + slack[1] >= self.window[1]
        ):
            raise ValueError(self._misfit(x))
        return x[0], x[1], self._length(x[2], 0, slack[0]), self._length(x[3], 1, slack[1])

    def _slack(self) -> Pair:
        return (self.stride[0] - 1, self.stride[1] - 1) if self.ceil_mode else (0, 0)

    def _length(self, length: int, axis: int, slack: int) -> int:
        window, stride, padding = self.window[axis], self.stride[axis], self.padding[axis]
        out = (length + 2 * padding - window + slack) // stride + 1
        if self.ceil_mode and (out - 1) * stride >= length + padding:
            out -= 1  # the last window must start inside the map or its left border
        return out

    def _misfit(self, x: Size) -> str:
        op = "lrn_max_pool"
        if len(x) != 4:
            return _not_a_batch(op, x)
        if self.size < 0:
            return f"{op} needs a size of at least 0 channels (0 leaves the normalisation out), got {self.size}"
        if x[1] < 1:
            return f"{op} needs maps of at least 1 channel, got {tuple(x)}"
        if self.lrn_groups < 1 or x[1] % self.lrn_groups:
            return f"{op} needs lrn_groups that divides the {x[1]} channels, got {self.lrn_groups}"
        window, padding, slack = self.window, self.padding, self._slack()
        if min(window) < 1 or min(self.stride) < 1:
            return f"{op} needs a window and a stride of at least 1, got window {window}, stride {self.stride}"
        if min(padding) < 0 or 2 * padding[0] > window[0] or 2 * padding[1] > window[1]:
            return f"{op} needs padding between 0 and half of the window {window}, got {padding}"
        least = [max(1, w - 2 * p - s) for w, p, s in zip(window, padding, slack, strict=True)]
        return (
            f"{op} needs maps of at least {least[0]}x{least[1]} for a {window[0]}x{window[1]} window with padding "
            f"{padding}, got {x[2]}x{x[3]}: use larger images"
        )


Stage = ConvStage | PoolStage


def _not_a_batch(op: str, x: Size) -> str:
    hint = ": add the batch dimension with x.unsqueeze(0)" if len(x) == 3 else ""
    return f"{op} needs a 4-D input (N, C, H, W), got {len(x)}-D {tuple(x)}{hint}"


# --- as numbers, for a schema of torch.library ---------------------------------------------------------------


def encode(stages: Sequence[Stage]) -> tuple[list[int], list[float]]:
    """Stages as whole numbers and real ones."""
    whole: list[int] = []
    real: list[float] = []
    for stage in stages:
        if isinstance(stage, ConvStage):
            whole += [0, *stage.stride, *stage.padding, stage.groups, int(stage.relu), int(stage.bias)]
        else:
            whole += [1, stage.size, *stage.window, *stage.stride, *stage.padding, int(stage.ceil_mode)]
            whole.append(stage.lrn_groups)
            real += [stage.alpha, stage.beta, stage.k]
    return whole, real


def decode(whole: Sequence[int], real: Sequence[float]) -> tuple[Stage, ...]:
    """The stages that `encode` was given."""
    stages: list[Stage] = []
    at, real_at = 0, 0
    while at < len(whole):
        if whole[at] == 0:
            stride_h, stride_w, pad_h, pad_w, groups, relu, bias = whole[at + 1 : at + 8]
            stages.append(ConvStage((stride_h, stride_w), (pad_h, pad_w), groups, bool(relu), bool(bias)))
            at += 8
        else:
            size, window_h, window_w, stride_h, stride_w, pad_h, pad_w, ceil_mode, groups = whole[at + 1 : at + 10]
            alpha, beta, k = real[real_at : real_at + 3]
            stages.append(
                PoolStage(
                    size, alpha, beta, k, (window_h, window_w), (stride_h, stride_w), (pad_h, pad_w),
                    bool(ceil_mode), groups,
                )
            )  # fmt: skip
            at, real_at = at + 10, real_at + 3
    return tuple(stages)
