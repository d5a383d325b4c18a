"""Gradients of a convolution's filters and bias, as a sum of matrix products over shifted rows (see `conv`).

    dW[r, s] = sum over m of dY[m]^T @ X[m + shift(r, s)]
    db       = sum over m of dY[m]

The rows, those of the border too, follow one another, so that the loop is the shifted one: every column of X has a
constant distance of its own. The sum is divided among programs, and the parts are added in a second launch, in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_triton.kernels import launch
from alexnet_triton.kernels.config import WeightGradientConfig, WeightGradientProblem, choose, copy_config
from alexnet_triton.kernels.conv_shape import Convolution, padded
from alexnet_triton.kernels.launch import rounded


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
    UNROLL: tl.constexpr,
):  # fmt: skip
    # dw[(g, k), c, r, s] = sum over splits, in their order, of partial[split, g, (r', s', (c, i, j)), k].
    # A program adds BLOCK_K filters of BLOCK_CRS elements; programs past `filter_programs` add the bias's. It asks for
    # UNROLL parts before it waits for the first.
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
        for first in range(0, splits, UNROLL):
            for i in tl.static_range(UNROLL):
                at = part + i * tl.cast(split_size, tl.int64)
                total += tl.load(at, mask=written & (first + i < splits), other=0.0)
            part += UNROLL * tl.cast(split_size, tl.int64)
        at = (group * filters + k).to(tl.int64) * w_k + c.to(tl.int64) * w_c + r * w_r + s * w_s
        tl.store(dw + at, rounded(total, dw), mask=written)
    else:
        filter_ = (pid - filter_programs) * BLOCK_K + tl.arange(0, BLOCK_K)
        real = filter_ < groups * filters
        sums = tl.zeros((BLOCK_K,), tl.float32)
        for first in range(0, splits, UNROLL):
            for i in tl.static_range(UNROLL):
                at = bias_partial + (first + i) * groups * filters + filter_
                sums += tl.load(at, mask=real & (first + i < splits), other=0.0)
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
            dy_layout.images, dy_layout.pitch_h, dy_layout.pitch_w, conv.filters, padded(conv.folded_depth),
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
        dy_columns=dy_layout.channels, filters_padded=padded(conv.filters),
        x_columns=x_layout.channels, depth=padded(conv.folded_depth), taps_w=conv.taps[1], pitch_w=x_layout.pitch_w,
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
        depth_padded=padded(conv.folded_depth), window_h=conv.window[0], window_w=conv.window[1],
        stride_h=conv.stride[0], stride_w=conv.stride[1], taps_w=conv.taps[1], filter_programs=filter_programs,
        BLOCK_H=conv.block[0], BLOCK_W=conv.block[1], BLOCK_K=tile.channels, BLOCK_CRS=tile.rows,
        UNROLL=min(8, launch.power_of_two(splits)), num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
    return dw, db
