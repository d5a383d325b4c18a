"""Convolution + bias + ReLU, forward and both gradients, as sums of matrix products over shifted rows.

A stride is folded away first (`halo.Fold`), so every convolution here has stride 1 and R x S taps. In the layout of
`halo`, with X of shape (rows, G * depth), Y and dY of shape (rows, G * filters), and for each group

    shift(r, s) = (r - padding) * pitch_w + s - padding
    forward          Y[m]    = sum over taps of X[m + shift(r, s)] @ W[r, s]^T     (+ bias, ReLU)
    data gradient    dX[m]   = sum over taps of dY[m - shift(r, s)] @ W[r, s]
    weight gradient  dW[r, s] = sum over m of dY[m]^T @ X[m + shift(r, s)]

The data gradient is the forward product with the filters turned by half a turn and transposed, so one kernel serves
both; `pack_kernel` lays the filters out for either. No loop masks a pixel: outside an image there are zeros in memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_triton.kernels import halo, launch
from alexnet_triton.kernels.config import (
    ConvConfig,
    ConvProblem,
    WeightGradientConfig,
    WeightGradientProblem,
    choose,
    copy_config,
)
from alexnet_triton.kernels.halo import Fold, Layout
from alexnet_triton.kernels.launch import rounded

Pair = tuple[int, int]

CHANNELS_MULTIPLE = 16
"""Channels a group are padded to a multiple of this: 32 bytes of half precision, and the least step of a product."""


STEP_MULTIPLE = 64
"""Columns of the packed filters come in multiples of this: no step of a product reads past them."""


def _padded(channels: int) -> int:
    return launch.cdiv(channels, CHANNELS_MULTIPLE) * CHANNELS_MULTIPLE


@dataclass(frozen=True)
class Convolution:
    """One convolution's shapes, with its stride folded away. Made by `convolution`, kept by a chain's plan."""

    images: int
    groups: int
    filters: int
    """Filters a group."""
    depth: int
    """Channels a group of the tensor, before folding."""
    window: Pair
    """(R, S) of the filter, before folding."""
    source: Pair
    """(H, W) of the tensor, before folding."""
    stride: Pair
    block: Pair
    """Pixels of a block that become channels; (1, 1) where nothing is folded."""
    origin: Pair
    """Padding that the fold takes upon itself."""
    taps: Pair
    """(R, S) after folding."""
    padding: Pair
    """Padding left after folding."""
    size: Pair
    """(H, W) after folding."""
    out_size: Pair
    """(P, Q)."""

    @functools.cached_property
    def folds(self) -> bool:
        """Whether the input must be folded, so that no kernel can hand it over in the layout."""
        return self.stride != (1, 1)

    @functools.cached_property
    def reads_plain_channels(self) -> bool:
        """Whether the input's layout holds the tensor's channels as they are, so that a kernel can hand it over."""
        return not self.folds and self.depth % CHANNELS_MULTIPLE == 0

    @functools.cached_property
    def takes_plain_gradients(self) -> bool:
        """The same of the output's gradient."""
        return self.filters % CHANNELS_MULTIPLE == 0

    @functools.cached_property
    def folded_depth(self) -> int:
        """Channels a group after folding."""
        return self.depth * self.block[0] * self.block[1]

    @functools.cached_property
    def reduction(self) -> int:
        """Length of the forward product's sum: a row of the packed filters."""
        return self.taps[0] * self.taps[1] * _padded(self.folded_depth)

    @functools.cached_property
    def fold(self) -> Fold:
        """How the input is brought in."""
        return Fold(self.groups, self.depth, self.block, self.stride, self.origin, _padded(self.folded_depth))

    @functools.cached_property
    def x_layout(self) -> Layout:
        """The layout in which the input is read."""
        return halo.for_convolution(
            self.images, self.groups * _padded(self.folded_depth), self.size, self.taps, self.padding, self.out_size
        )

    @functools.cached_property
    def dy_layout(self) -> Layout:
        """The layout in which the gradient of the output is read: row for row that of the input."""
        height, width = self.out_size
        channels = self.groups * _padded(self.filters)
        return self.x_layout._replace(height=height, width=width, channels=channels)

    @functools.cached_property
    def dy_fold(self) -> Fold:
        """How the gradient of the output is brought in."""
        return halo.no_fold(self.groups, self.groups * self.filters, _padded(self.filters))

    @functools.cached_property
    def y_dense(self) -> Layout:
        """The layout of the output as an NHWC tensor."""
        return halo.dense(self.images, self.groups * self.filters, *self.out_size)

    @functools.cached_property
    def dx_dense(self) -> Layout:
        """The layout of the input's gradient, still folded, as an NHWC tensor."""
        return halo.dense(self.images, self.groups * self.folded_depth, *self.size)


def convolution(
    x_size: tuple[int, ...], w_size: tuple[int, ...], stride: Pair, padding: Pair, groups: int
) -> Convolution:
    """Fold the stride of a convolution away.

    Args:
        x_size: (N, C, H, W).
        w_size: (K, C / groups, R, S).
        stride: (rows, columns).
        padding: (rows, columns).
        groups: G.
    """
    images, _, *source = x_size
    filters, depth, *window = w_size
    out, block, origin, taps, left, size = [], [], [], [], [], []
    for length, w, step, pad in zip(source, window, stride, padding, strict=True):
        out.append((length + 2 * pad - w) // step + 1)
        folds = step > 1
        block.append(min(step, w) if folds else 1)
        taps.append(launch.cdiv(w, step) if folds else w)
        origin.append(pad if folds else 0)
        left.append(0 if folds else pad)
        size.append(out[-1] + taps[-1] - 1 if folds else length)
    pairs: list[Pair] = [(a, b) for a, b in (window, source, stride, block, origin, taps, left, size, out)]
    return Convolution(images, groups, filters // groups, depth, *pairs)


# --- filters ------------------------------------------------------------------------------------------------


@triton.jit
def pack_kernel(
    weight, out, w_k, w_c, w_r, w_s, rows, columns, filters, depth, window_h, window_w, stride_h, stride_w,
    taps_h, taps_w, width,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, TURN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    # Forward: out[(g, k), (r', s', (c, i, j))] = weight[(g, k), c, r' * stride + i, s' * stride + j].
    # TURN:    out[(g, (c, i, j)), (R' - 1 - r', S' - 1 - s', k)] = the same element.
    # `width` is the padded length of the last axis; zeros fill it up. A program writes one tile.
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    row = ((tl.program_id(0) // tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    column = ((tl.program_id(0) % tiles) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    r, s, last = column // width // taps_w, column // width % taps_w, column % width
    folded = depth * BLOCK_H * BLOCK_W
    if TURN:
        r, s = taps_h - 1 - r, taps_w - 1 - s
        k, channel = row // folded * filters + last, row % folded
        inside = last < filters
    else:
        k, channel = row, last
        inside = last < folded
    r = r * stride_h + channel // BLOCK_W % BLOCK_H
    s = s * stride_w + channel % BLOCK_W
    c = channel // (BLOCK_H * BLOCK_W)
    written = (row < rows) & (column < columns)
    inside &= written & (r >= 0) & (r < window_h) & (s >= 0) & (s < window_w)
    at = k.to(tl.int64) * w_k + c.to(tl.int64) * w_c + r * w_r + s * w_s
    value = tl.load(weight + at, mask=inside, other=0.0)
    tl.store(out + row.to(tl.int64) * columns + column, rounded(value, out), mask=written)


def pack(weight: Tensor, conv: Convolution, dtype: torch.dtype, turned: bool = False) -> Tensor:
    """Lay filters out for `conv2d_relu`, or `turned` for `data_gradient`.

    Args:
        weight: (K, C / groups, R, S), of any strides and floating-point dtype.
        conv: the convolution.
        dtype: of the answer.
        turned: by half a turn and transposed.

    Returns:
        (G * filters, R' * S' * padded channels), or turned (G * channels, R' * S' * padded filters), with columns of
        zeros up to a multiple of `STEP_MULTIPLE`.
    """
    filters_padded, depth_padded = _padded(conv.filters), _padded(conv.folded_depth)
    width = filters_padded if turned else depth_padded
    rows = conv.groups * (conv.folded_depth if turned else conv.filters)
    columns = launch.cdiv(conv.taps[0] * conv.taps[1] * width, STEP_MULTIPLE) * STEP_MULTIPLE
    out = launch.empty((rows, columns), weight, dtype)
    config = copy_config(launch.target_of(weight.device), rows, columns)
    launch.launch(
        pack_kernel,
        launch.cdiv(rows, config.rows) * launch.cdiv(columns, config.channels),
        weight=weight, out=out,
        w_k=weight.stride(0), w_c=weight.stride(1), w_r=weight.stride(2), w_s=weight.stride(3),
        rows=rows, columns=columns, filters=conv.filters, depth=conv.depth,
        window_h=conv.window[0], window_w=conv.window[1], stride_h=conv.stride[0], stride_w=conv.stride[1],
        taps_h=conv.taps[0], taps_w=conv.taps[1], width=width,
        BLOCK_H=conv.block[0], BLOCK_W=conv.block[1], TURN=turned,
        BLOCK_ROWS=config.rows, BLOCK_COLUMNS=config.channels, num_warps=config.warps, num_stages=1,
    )  # fmt: skip
    return out


# --- forward and data gradient ------------------------------------------------------------------------------


@triton.jit
def _store_tile(
    sums, bias, gate, y, row, gate_row, inside, k, filters, columns, group, gate_columns, rows,
    RELU: tl.constexpr, BORDER: tl.constexpr,
):  # fmt: skip
    """The epilogue: bias, ReLU or its gradient, zeros outside the image."""
    column = (group * filters + k)[None, :]
    real = (k < filters)[None, :]
    if bias is not None:
        sums += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
    if RELU:
        sums = tl.where(sums <= 0, 0.0, sums)  # as a comparison, which lets NaN pass
    if gate is not None:
        open_ = tl.load(gate + gate_row[:, None] * gate_columns + column, mask=real & inside[:, None], other=0.0)
        sums = tl.where(open_.to(tl.float32) <= 0, 0.0, sums)
    if BORDER:
        sums = tl.where(inside[:, None], sums, 0.0)
        written = (row < rows)[:, None] & real
    else:
        written = inside[:, None] & real
    tl.store(y + row[:, None] * columns + column, rounded(sums, y), mask=written)


@triton.jit
def conv_kernel(
    x, weight, bias, gate, y,
    filters, groups, reduction, packed_columns, x_columns, depth, run, hop, taps_w, row_hop, first_shift,
    images, out_h, out_w, pitch_h, pitch_w, x_lead,
    y_rows, y_columns, y_pitch_h, y_pitch_w, y_lead, gate_lead, gate_columns,
    GATHER: tl.constexpr, BORDER: tl.constexpr, RELU: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_NPQ: tl.constexpr, BLOCK_K: tl.constexpr, EXTRA_K: tl.constexpr, BLOCK_CRS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # Y[NPQ, K] = X[NPQ shifted by each tap, C] @ W[K, (R, S, C)]^T, for each group.
    # A program makes BLOCK_NPQ rows by BLOCK_K + EXTRA_K filters (64 + 32 hold 96 without waste); filters run
    # fastest, so that programs side by side read the same rows of X.
    # The columns of X that a tap, or a row of taps, finds side by side are a `run`; `hop` leads on from one run to
    # the next, and `row_hop` further to the next row of taps. A step takes BLOCK_CRS columns; where these divide a run
    # (ALIGNED) their places are one number, else each column counts its own.
    k_tiles = tl.cdiv(filters, BLOCK_K + EXTRA_K)
    pid = tl.program_id(0)
    group = pid // k_tiles % groups
    first_k = pid % k_tiles * (BLOCK_K + EXTRA_K)
    number = (pid // k_tiles // groups) * BLOCK_NPQ + tl.arange(0, BLOCK_NPQ)

    if GATHER:  # `number` counts output pixels
        inside = number < images * out_h * out_w
        pixel = tl.where(inside, number, 0)
        n, p, q = pixel // (out_h * out_w), pixel // out_w % out_h, pixel % out_w
        pixel = (n * pitch_h + p) * pitch_w + q
        row = y_lead + (n * y_pitch_h + p) * y_pitch_w + q
    else:  # `number` counts rows of Y, the border's too
        pixel = number - y_lead
        inside = (pixel >= 0) & (pixel < images * pitch_h * pitch_w)
        inside &= (pixel // pitch_w % pitch_h < out_h) & (pixel % pitch_w < out_w)
        pixel = tl.where(inside, pixel, 0)
        row = number
    row = row.to(tl.int64)

    lane = tl.arange(0, BLOCK_CRS)
    x_at = x + (x_lead + first_shift + pixel).to(tl.int64)[:, None] * x_columns + group * depth
    if ALIGNED:
        x_at += lane[None, :]
        in_run, in_row, offset = 0, 0, 0
    else:
        in_run, in_row = lane % run, lane // run % taps_w
        # Sixteen columns at a time lie side by side, since a group's channels come in sixteens.
        offset = tl.max_contiguous(tl.multiple_of(lane + lane // run * hop + lane // run // taps_w * row_hop, 16), 16)
    k0 = first_k + tl.arange(0, BLOCK_K)
    w_at = weight + (group * filters + tl.minimum(k0, filters - 1)).to(tl.int64)[:, None] * packed_columns
    w_at += lane[None, :]
    sums = tl.zeros((BLOCK_NPQ, BLOCK_K), tl.float32)
    if EXTRA_K:
        k1 = first_k + BLOCK_K + tl.arange(0, EXTRA_K)
        w1_at = weight + (group * filters + tl.minimum(k1, filters - 1)).to(tl.int64)[:, None] * packed_columns
        w1_at += lane[None, :]
        sums1 = tl.zeros((BLOCK_NPQ, EXTRA_K), tl.float32)

    step = BLOCK_CRS + BLOCK_CRS // run * hop + BLOCK_CRS // run // taps_w * row_hop
    for column in range(0, reduction, BLOCK_CRS):
        if ALIGNED:
            a = tl.load(x_at + offset)
        elif EVEN:
            a = tl.load(x_at + offset[None, :])
        else:
            a = tl.load(x_at + offset[None, :], mask=(column + lane < reduction)[None, :], other=0.0)
        b = tl.load(w_at)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        sums = tl.dot(a, tl.trans(b), sums, input_precision=PRECISION)
        w_at += BLOCK_CRS
        if EXTRA_K:
            b1 = tl.load(w1_at)
            if UPCAST:
                b1 = b1.to(tl.float32)
            sums1 = tl.dot(a, tl.trans(b1), sums1, input_precision=PRECISION)
            w1_at += BLOCK_CRS
        # A step passes BLOCK_CRS // run runs, and one more where the columns that are left over fill one up.
        in_run += BLOCK_CRS % run
        over = in_run >= run
        in_run = tl.where(over, in_run - run, in_run)
        offset += tl.where(over, step + hop, step)
        in_row += tl.where(over, BLOCK_CRS // run % taps_w + 1, BLOCK_CRS // run % taps_w)
        over = in_row >= taps_w
        in_row = tl.where(over, in_row - taps_w, in_row)
        # The hints stand on a choice, not on a sum: sums are taken apart on the way to AMD's loads.
        offset = tl.multiple_of(tl.where(over, offset + row_hop, offset), 16)
        if not ALIGNED:
            offset = tl.max_contiguous(offset, 16)

    gate_row = pixel.to(tl.int64) + gate_lead
    _store_tile(
        sums, bias, gate, y, row, gate_row, inside, k0, filters, y_columns, group, gate_columns, y_rows, RELU, BORDER
    )
    if EXTRA_K:
        _store_tile(
            sums1, bias, gate, y, row, gate_row, inside, k1, filters, y_columns, group, gate_columns, y_rows,
            RELU, BORDER,
        )  # fmt: skip


class _Product(NamedTuple):
    """What tells a forward product from a data gradient's."""

    filters: int
    depth: int
    taps: Pair
    padding: Pair
    out_size: Pair


def _shifted_product(
    x: Tensor, x_layout: Layout, packed: Tensor, bias: Tensor | None, gate: Tensor | None, gate_layout: Layout | None,
    groups: int, product: _Product, y_layout: Layout, relu: bool, config: ConvConfig | None,
) -> Tensor:  # fmt: skip
    target = launch.target_of(x.device)
    pixels = x_layout.images * product.out_size[0] * product.out_size[1]
    taps_h, taps_w = product.taps
    # A row of taps lies side by side in memory where there is one group; with several each tap is a run.
    runs_a_row = 1 if groups == 1 else taps_w
    run = product.depth * taps_w // runs_a_row
    reduction = taps_h * taps_w * product.depth
    same_rows = (y_layout.pitch_h, y_layout.pitch_w) == (x_layout.pitch_h, x_layout.pitch_w)
    gather = y_layout.is_dense or not same_rows
    if config is None:
        problem = ConvProblem(
            x_layout.images, *product.out_size, product.filters, product.depth, taps_h, taps_w, groups, not gather,
            x.dtype, launch.is_exact(x.dtype, target),
        )  # fmt: skip
        config = choose(target, problem)
        launch.offer(
            problem,
            lambda other: _shifted_product(
                x, x_layout, packed, bias, gate, gate_layout, groups, product, y_layout, relu, other
            ),
        )
    make = launch.empty if y_layout.is_dense or same_rows else launch.zeros
    y = make((y_layout.rows, y_layout.channels), x)
    numbers = pixels if gather else y_layout.rows
    k_tiles = launch.cdiv(product.filters, config.block_k + config.extra_k)
    launch.launch(
        conv_kernel,
        launch.cdiv(numbers, config.block_npq) * k_tiles * groups,
        x=x, weight=packed, bias=bias, gate=gate, y=y,
        filters=product.filters, groups=groups, reduction=reduction, packed_columns=packed.shape[1],
        x_columns=x_layout.channels, depth=product.depth, run=run,
        hop=(x_layout.pitch_w if runs_a_row == 1 else 1) * x_layout.channels - run,
        taps_w=runs_a_row, row_hop=0 if runs_a_row == 1 else (x_layout.pitch_w - taps_w) * x_layout.channels,
        first_shift=-(product.padding[0] * x_layout.pitch_w + product.padding[1]),
        images=x_layout.images, out_h=product.out_size[0], out_w=product.out_size[1],
        pitch_h=x_layout.pitch_h, pitch_w=x_layout.pitch_w, x_lead=x_layout.lead,
        y_rows=y_layout.rows, y_columns=y_layout.channels,
        y_pitch_h=y_layout.pitch_h, y_pitch_w=y_layout.pitch_w, y_lead=y_layout.lead,
        gate_lead=gate_layout.lead if gate_layout else 0, gate_columns=gate_layout.channels if gate_layout else 0,
        GATHER=gather, BORDER=not gather, RELU=relu,
        ALIGNED=run % config.block_crs == 0, EVEN=reduction % config.block_crs == 0,
        BLOCK_NPQ=config.block_npq, BLOCK_K=config.block_k, EXTRA_K=config.extra_k, BLOCK_CRS=config.block_crs,
        PRECISION=launch.dot_precision(target), UPCAST=launch.INTERPRETED,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y


def conv2d_relu(
    x: Tensor, packed: Tensor, bias: Tensor | None, conv: Convolution, relu: bool, y_layout: Layout,
    config: ConvConfig | None = None,
) -> Tensor:  # fmt: skip
    """Convolution, bias and ReLU.

    Args:
        x: the input in `conv.x_layout`.
        packed: filters from `pack`.
        bias: (K,), of any floating-point dtype, or None.
        conv: the convolution.
        relu: apply ReLU.
        y_layout: of the answer: (P, Q) pixels of K channels in any layout, `conv.y_dense` or the next convolution's.
        config: None takes the default.

    Returns:
        (y_layout.rows, K) of the dtype of `x`, zeros where there is no pixel.
    """
    product = _Product(conv.filters, _padded(conv.folded_depth), conv.taps, conv.padding, conv.out_size)
    return _shifted_product(
        x, conv.x_layout, packed, bias, None, None, conv.groups, product, y_layout, relu, config
    )  # fmt: skip


def data_gradient(
    dy: Tensor, turned: Tensor, conv: Convolution, dx_layout: Layout, gate: Tensor | None = None,
    config: ConvConfig | None = None,
) -> Tensor:  # fmt: skip
    """Gradient of a convolution's input, still folded.

    Args:
        dy: gradient of the convolution's output before its ReLU, in `conv.dy_layout`.
        turned: filters from `pack(..., turned=True)`.
        conv: the convolution.
        dx_layout: of the answer: `conv.dx_dense`, or the layout in which the convolution before reads it.
        gate: the input in `conv.x_layout`; the answer is dropped where it is at most 0 (the ReLU before).
        config: None takes the default.

    Returns:
        (dx_layout.rows, G * folded channels) of the dtype of `dy`, zeros where there is no pixel.
    """
    turned_padding = (conv.taps[0] - 1 - conv.padding[0], conv.taps[1] - 1 - conv.padding[1])
    product = _Product(conv.folded_depth, _padded(conv.filters), conv.taps, turned_padding, conv.size)
    gate_layout = None if gate is None else conv.x_layout
    return _shifted_product(
        dy, conv.dy_layout, turned, None, gate, gate_layout, conv.groups, product, dx_layout, False, config
    )  # fmt: skip


# --- weight gradient ----------------------------------------------------------------------------------------


@triton.jit
def _sixteens(first, end, BLOCK: tl.constexpr):
    """Numbers first, first + 1, ...; sixteens past `end` repeat the last, so that loads need no mask and stay wide."""
    number = first + tl.arange(0, BLOCK)
    number = tl.minimum(number // 16 * 16, end - 16) + number % 16
    return tl.max_contiguous(tl.multiple_of(number, 16), 16)


@triton.jit
def weight_gradient_kernel(
    dy, x, partial, bias_partial,
    filters, groups, reduction, dy_columns, filters_padded, x_columns, depth, taps_w, pitch_w, first_shift,
    dy_first, x_first, steps, steps_a_split, products,
    BLOCK_CRS: tl.constexpr, BLOCK_K: tl.constexpr, EXTRA_K: tl.constexpr, BLOCK_NPQ: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # dW[(R, S, C), K] = X[NPQ shifted by each tap, C]^T @ dY[NPQ, K], for each group; a split sums a part of the rows.
    # A program makes BLOCK_CRS columns of X, any columns since each has a constant distance of its own, by
    # BLOCK_K + EXTRA_K filters. Programs past `products` sum dY itself over the rows, for the bias.
    pid = tl.program_id(0)
    k_tiles = tl.cdiv(filters, BLOCK_K + EXTRA_K)
    if pid < products:
        tiles = tl.cdiv(reduction, BLOCK_CRS)
        group = pid // tiles // k_tiles % groups
        split = pid // tiles // k_tiles // groups
        first_column = pid % tiles * BLOCK_CRS
        first_k = pid // tiles % k_tiles * (BLOCK_K + EXTRA_K)

        column = first_column + tl.arange(0, BLOCK_CRS)
        tap = column // depth
        shift = first_shift + tap // taps_w * pitch_w + tap % taps_w
        distance = tl.where(column < reduction, shift * x_columns + group * depth + column % depth, column % 16)
        distance = tl.max_contiguous(tl.multiple_of(distance, 16), 16)  # a group's channels come in sixteens
        row = split.to(tl.int64) * steps_a_split * BLOCK_NPQ + tl.arange(0, BLOCK_NPQ)
        x_at = x + (x_first + row)[:, None] * x_columns + distance[None, :]
        dy_row = dy + (dy_first + row)[:, None] * dy_columns + group * filters_padded
        dy_at = dy_row + _sixteens(first_k, filters_padded, BLOCK_K)[None, :]
        sums = tl.zeros((BLOCK_CRS, BLOCK_K), tl.float32)
        if EXTRA_K:
            dy1_at = dy_row + _sixteens(first_k + BLOCK_K, filters_padded, EXTRA_K)[None, :]
            sums1 = tl.zeros((BLOCK_CRS, EXTRA_K), tl.float32)
        for _ in range(tl.minimum(steps_a_split, steps - split * steps_a_split)):
            a = tl.load(x_at)
            b = tl.load(dy_at)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            sums = tl.dot(tl.trans(a), b, sums, input_precision=PRECISION)
            if EXTRA_K:
                b1 = tl.load(dy1_at)
                if UPCAST:
                    b1 = b1.to(tl.float32)
                sums1 = tl.dot(tl.trans(a), b1, sums1, input_precision=PRECISION)
                dy1_at += BLOCK_NPQ * dy_columns
            x_at += BLOCK_NPQ * x_columns
            dy_at += BLOCK_NPQ * dy_columns

        out = partial + ((split * groups + group).to(tl.int64) * reduction + column)[:, None] * filters
        k0 = first_k + tl.arange(0, BLOCK_K)
        tl.store(out + k0[None, :], sums, mask=(column < reduction)[:, None] & (k0 < filters)[None, :])
        if EXTRA_K:
            k1 = first_k + BLOCK_K + tl.arange(0, EXTRA_K)
            tl.store(out + k1[None, :], sums1, mask=(column < reduction)[:, None] & (k1 < filters)[None, :])
    else:
        _sum_rows(
            dy, bias_partial, pid - products, filters, groups, dy_columns, filters_padded, dy_first,
            steps, steps_a_split, BLOCK_K, BLOCK_NPQ,
        )  # fmt: skip


@triton.jit
def _sum_rows(
    dy, bias_partial, pid, filters, groups, dy_columns, filters_padded, dy_first, steps, steps_a_split,
    BLOCK_K: tl.constexpr, BLOCK_NPQ: tl.constexpr,
):  # fmt: skip
    """The bias's part of a weight gradient: db[K] = sum of dY[NPQ, K] over a split's rows."""
    tiles = tl.cdiv(filters, BLOCK_K)
    k = pid % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    group = pid // tiles % groups
    split = pid // tiles // groups
    row = split.to(tl.int64) * steps_a_split * BLOCK_NPQ + tl.arange(0, BLOCK_NPQ)
    dy_at = dy + (dy_first + row)[:, None] * dy_columns + (group * filters_padded + k)[None, :]
    total = tl.zeros((BLOCK_NPQ, BLOCK_K), tl.float32)
    for _ in range(tl.minimum(steps_a_split, steps - split * steps_a_split)):
        total += tl.load(dy_at, mask=(k < filters)[None, :], other=0.0).to(tl.float32)
        dy_at += BLOCK_NPQ * dy_columns
    tl.store(bias_partial + (split * groups + group) * filters + k, tl.sum(total, 0), mask=k < filters)


@triton.jit
def add_splits_kernel(
    partial, bias_partial, dw, db, w_k, w_c, w_r, w_s,
    splits, split_size, groups, filters, depth, reduction, depth_padded,
    window_h, window_w, stride_h, stride_w, taps_w, filter_programs,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_CRS: tl.constexpr,
):  # fmt: skip
    # dw[(g, k), c, r, s] = sum over splits, in their order, of partial[split, g, (r', s', (c, i, j)), k].
    # A program adds BLOCK_K filters of BLOCK_CRS elements; programs past `filter_programs` add the bias's.
    pid = tl.program_id(0)
    size = depth * window_h * window_w
    if pid < filter_programs:
        tiles = tl.cdiv(size, BLOCK_CRS)
        k_tiles = tl.cdiv(filters, BLOCK_K)
        element = (pid % tiles * BLOCK_CRS + tl.arange(0, BLOCK_CRS))[:, None]
        k = (pid // tiles % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
        group = pid // tiles // k_tiles
        c, r, s = element // (window_h * window_w), element // window_w % window_h, element % window_w
        channel = (c * BLOCK_H + r % stride_h) * BLOCK_W + s % stride_w
        column = (r // stride_h * taps_w + s // stride_w) * depth_padded + channel
        written = (element < size) & (k < filters)
        total = tl.zeros((BLOCK_CRS, BLOCK_K), tl.float32)
        part = partial + (group.to(tl.int64) * reduction + column) * filters + k
        for _ in range(splits):
            total += tl.load(part, mask=written, other=0.0)
            part += split_size
        at = (group * filters + k).to(tl.int64) * w_k + c.to(tl.int64) * w_c + r * w_r + s * w_s
        tl.store(dw + at, rounded(total, dw), mask=written)
    else:
        filter_ = (pid - filter_programs) * BLOCK_K + tl.arange(0, BLOCK_K)
        real = filter_ < groups * filters
        sums = tl.zeros((BLOCK_K,), tl.float32)
        for split in range(splits):
            sums += tl.load(bias_partial + split * groups * filters + filter_, mask=real, other=0.0)
        tl.store(db + filter_, rounded(sums, db), mask=real)


def weight_gradient(
    dy: Tensor, x: Tensor, conv: Convolution, weight: Tensor, bias: Tensor | None,
    config: WeightGradientConfig | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gradients of a convolution's filters and bias. Deterministic: splits are added in order, in a second pass.

    Args:
        dy: gradient of the convolution's output before its ReLU, in `conv.dy_layout`.
        x: the input in `conv.x_layout`.
        conv: the convolution.
        weight: the filters, for the dtype, shape and strides of the answer alone.
        bias: likewise, or None where none is wanted.
        config: None takes the default.

    Returns:
        The gradients, each of its parameter's dtype, shape and strides.
    """
    target = launch.target_of(dy.device)
    x_layout, dy_layout = conv.x_layout, conv.dy_layout
    if config is None:
        problem = WeightGradientProblem(
            dy_layout.images, dy_layout.pitch_h, dy_layout.pitch_w, conv.filters, _padded(conv.folded_depth),
            *conv.taps, conv.groups, dy.dtype, launch.is_exact(dy.dtype, target),
        )  # fmt: skip
        config = choose(target, problem)
        launch.offer(problem, lambda other: weight_gradient(dy, x, conv, weight, bias, other))
    steps = launch.cdiv(dy_layout.rows - 2 * dy_layout.lead, config.block_npq)
    steps_a_split = launch.cdiv(steps, config.splits)
    splits = launch.cdiv(steps, steps_a_split)
    filters = conv.groups * conv.filters
    partial = launch.empty((splits, conv.groups, conv.reduction, conv.filters), dy, torch.float32)
    bias_partial = None if bias is None else launch.empty((splits, filters), dy, torch.float32)
    k_tiles = launch.cdiv(conv.filters, config.block_k + config.extra_k)
    products = launch.cdiv(conv.reduction, config.block_crs) * k_tiles * conv.groups * splits
    bias_programs = 0 if bias is None else launch.cdiv(conv.filters, config.block_k) * conv.groups * splits
    launch.launch(
        weight_gradient_kernel,
        products + bias_programs,
        dy=dy, x=x, partial=partial, bias_partial=bias_partial,
        filters=conv.filters, groups=conv.groups, reduction=conv.reduction,
        dy_columns=dy_layout.channels, filters_padded=_padded(conv.filters),
        x_columns=x_layout.channels, depth=_padded(conv.folded_depth), taps_w=conv.taps[1], pitch_w=x_layout.pitch_w,
        first_shift=-(conv.padding[0] * x_layout.pitch_w + conv.padding[1]),
        dy_first=dy_layout.lead, x_first=x_layout.lead, steps=steps, steps_a_split=steps_a_split, products=products,
        BLOCK_CRS=config.block_crs, BLOCK_K=config.block_k, EXTRA_K=config.extra_k, BLOCK_NPQ=config.block_npq,
        PRECISION=launch.dot_precision(target), UPCAST=launch.INTERPRETED,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip

    dw = launch.empty_like(weight)
    db = None if bias is None else launch.empty_like(bias)
    size = weight.shape[1] * weight.shape[2] * weight.shape[3]
    tile = copy_config(target, size, conv.filters)
    filter_programs = launch.cdiv(size, tile.rows) * launch.cdiv(conv.filters, tile.channels) * conv.groups
    launch.launch(
        add_splits_kernel,
        filter_programs + (0 if bias is None else launch.cdiv(filters, tile.channels)),
        partial=partial, bias_partial=bias_partial, dw=dw, db=db,
        w_k=dw.stride(0), w_c=dw.stride(1), w_r=dw.stride(2), w_s=dw.stride(3),
        splits=splits, split_size=filters * conv.reduction, groups=conv.groups, filters=conv.filters, depth=conv.depth,
        reduction=conv.reduction,
        depth_padded=_padded(conv.folded_depth), window_h=conv.window[0], window_w=conv.window[1],
        stride_h=conv.stride[0], stride_w=conv.stride[1], taps_w=conv.taps[1], filter_programs=filter_programs,
        BLOCK_H=conv.block[0], BLOCK_W=conv.block[1], BLOCK_K=tile.channels, BLOCK_CRS=tile.rows,
        num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
    return dw, db
