"""Convolution + bias + ReLU and the gradient of its input, as sums of matrix products over shifted rows.

A stride is folded away first (`conv_shape`), so every convolution here has stride 1 and R x S taps. In the layout of
`halo`, with X of shape (rows, G * depth), Y and dY of shape (rows, G * filters), and for each group

    shift(r, s) = (r - padding) * pitch_w + s - padding
    forward          Y[m]    = sum over taps of X[m + shift(r, s)] @ W[r, s]^T     (+ bias, ReLU)
    data gradient    dX[m]   = sum over taps of dY[m - shift(r, s)] @ W[r, s]
    weight gradient  dW[r, s] = sum over m of dY[m]^T @ X[m + shift(r, s)]         (`weight_gradient`)

The data gradient is the forward product with the filters turned by half a turn and transposed, so the same kernels
serve both; `pack_kernel` lays the filters out for either. No loop masks a pixel: outside an image there are zeros in
memory. There are two loops, and a config names one: `conv_kernel` gathers the rows of output pixels,
`shifted_conv_kernel` takes rows as they follow one another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from alexnet_triton.kernels import halo, launch
from alexnet_triton.kernels.config import ConvConfig, ConvProblem, choose, copy_config
from alexnet_triton.kernels.conv_shape import Convolution, Pair, padded
from alexnet_triton.kernels.halo import Layout
from alexnet_triton.kernels.launch import rounded

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


def _lie_packed(weight: Tensor, conv: Convolution, dtype: torch.dtype) -> bool:
    """Whether the filters' memory is what `pack` would write."""
    return (
        conv.reads_plain_channels
        and weight.dtype == dtype
        and weight.is_contiguous(memory_format=torch.channels_last)
        and weight.data_ptr() % 16 == 0
    )


def pack(weight: Tensor, conv: Convolution, dtype: torch.dtype, turned: bool = False) -> Tensor:
    """Lay filters out for `conv2d_relu`, or `turned` for `data_gradient`.

    Args:
        weight: (K, C / groups, R, S), of any strides and floating-point dtype.
        conv: the convolution.
        dtype: of the answer.
        turned: by half a turn and transposed.

    Returns:
        (G * filters, R' * S' * padded channels), or turned (G * channels, R' * S' * padded filters). Filters that lie
        so already (channels-last, of `dtype`, without a stride to fold) are not copied.
    """
    if not turned and _lie_packed(weight, conv, dtype):
        return weight.as_strided((weight.shape[0], conv.reduction), (conv.reduction, 1))
    filters_padded, depth_padded = padded(conv.filters), padded(conv.folded_depth)
    width = filters_padded if turned else depth_padded
    rows = conv.groups * (conv.folded_depth if turned else conv.filters)
    columns = conv.taps[0] * conv.taps[1] * width
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
    sums, bias, gate, y, row, gate_row, inside, k, filters, columns, group, gate_columns, RELU: tl.constexpr
):
    """The epilogue: bias, ReLU or its gradient."""
    column = (group * filters + k)[None, :]
    written = inside[:, None] & (k < filters)[None, :]
    if bias is not None:
        sums += tl.load(bias + column, mask=(k < filters)[None, :], other=0.0).to(tl.float32)
    if RELU:
        sums = tl.where(sums <= 0, 0.0, sums)  # as a comparison, which lets NaN pass
    if gate is not None:
        open_ = tl.load(gate + gate_row[:, None] * gate_columns + column, mask=written, other=0.0)
        sums = tl.where(open_.to(tl.float32) <= 0, 0.0, sums)
    tl.store(y + row[:, None] * columns + column, rounded(sums, y), mask=written)


@triton.jit
def _pixel_of(row, images, pitch_h, pitch_w, height, width):
    """(n, h, w) of a row of a matrix, its lead taken off, and whether it is a pixel; pixel 0 where it is none."""
    inside = (row >= 0) & (row < images * pitch_h * pitch_w)
    inside &= (row // pitch_w % pitch_h < height) & (row % pitch_w < width)
    row = tl.where(inside, row, 0)
    return row // (pitch_h * pitch_w), row // pitch_w % pitch_h, row % pitch_w, inside


@triton.jit
def _place_of(pid, filters, groups, pixel_tiles, WIDTH: tl.constexpr):
    """Group, first filter, number of the pixels' tile and split of a program: filters run fastest, splits slowest."""
    k_tiles = tl.cdiv(filters, WIDTH)
    tile = pid // k_tiles // groups
    return pid // k_tiles % groups, pid % k_tiles * WIDTH, tile % pixel_tiles, tile // pixel_tiles


@triton.jit
def _add_step(sums, a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """The sums, and a @ b^T added to them."""
    if UPCAST:  # Triton's interpreter multiplies bfloat16 as bit patterns
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, tl.trans(b), sums, input_precision=PRECISION)


@triton.jit
def _clear_border(
    y, first_row, images, height, width, pitch_h, pitch_w, lead, rows, columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the zeros of a layout's rows that are no pixel, BLOCK_ROWS of them."""
    row = first_row + tl.arange(0, BLOCK_ROWS)
    _, _, _, inside = _pixel_of(row - lead, images, pitch_h, pitch_w, height, width)
    cleared = (row < rows) & ~inside
    for first in range(0, columns, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)
        at = y + row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(at, tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), y.dtype.element_ty),
                 mask=cleared[:, None] & (column < columns)[None, :])  # fmt: skip


@triton.jit
def conv_kernel(
    x, weight, bias, gate, y,
    filters, groups, reduction, share, packed_columns, x_columns, depth, run, hop, taps_w, row_hop, first_shift,
    images, out_h, out_w, pitch_h, pitch_w, x_lead,
    y_rows, y_columns, y_pitch_h, y_pitch_w, y_lead, gate_lead, gate_columns, pixel_tiles, products,
    RELU: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_NPQ: tl.constexpr, BLOCK_K: tl.constexpr, EXTRA_K: tl.constexpr, BLOCK_CRS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # The gathered loop. Y[NPQ, K] = X[NPQ shifted by each tap, C] @ W[K, (R, S, C)]^T, for each group.
    # A program makes BLOCK_NPQ output pixels by BLOCK_K + EXTRA_K filters (64 + 32 hold 96 without waste); filters run
    # fastest, so that programs side by side read the same rows of X. Each pixel's row has a pointer of its own.
    # A split sums `share` of the `reduction` columns; Y then holds one answer a split, one behind the other.
    # The columns of X that a tap, or a row of taps, finds side by side are a `run`; `hop` leads on from one run to
    # the next, and `row_hop` further to the next row of taps. A step takes BLOCK_CRS columns; where these divide a run
    # (ALIGNED) their places are one number, else each column counts its own.
    # Programs past `products` clear the border of Y's layout.
    pid = tl.program_id(0)
    if pid < products:
        group, first_k, pixel_tile, split = _place_of(pid, filters, groups, pixel_tiles, BLOCK_K + EXTRA_K)
        number = pixel_tile * BLOCK_NPQ + tl.arange(0, BLOCK_NPQ)
        n, p, q, inside = _pixel_of(number, images, out_h, out_w, out_h, out_w)
        pixel = (n * pitch_h + p) * pitch_w + q
        row = (y_lead + (n * y_pitch_h + p) * y_pitch_w + q).to(tl.int64) + split.to(tl.int64) * y_rows

        first = tl.multiple_of(split * share, 16)
        last = tl.minimum(first + share, reduction)
        lane = tl.arange(0, BLOCK_CRS)
        x_at = x + (x_lead + first_shift + pixel).to(tl.int64)[:, None] * x_columns + group * depth
        if ALIGNED:
            x_at += lane[None, :]
            in_run, in_row = first % run, first // run % taps_w
            offset = tl.multiple_of(first + first // run * hop + first // run // taps_w * row_hop, 16)
        else:
            column = first + lane
            in_run, in_row = column % run, column // run % taps_w
            # Sixteen columns at a time lie side by side, since a group's channels come in sixteens.
            offset = column + column // run * hop + column // run // taps_w * row_hop
            offset = tl.max_contiguous(tl.multiple_of(offset, 16), 16)
        k0 = first_k + tl.arange(0, BLOCK_K)
        w_at = weight + (group * filters + tl.minimum(k0, filters - 1)).to(tl.int64)[:, None] * packed_columns
        w_at += (first + lane)[None, :]
        sums = tl.zeros((BLOCK_NPQ, BLOCK_K), tl.float32)
        if EXTRA_K:
            k1 = first_k + BLOCK_K + tl.arange(0, EXTRA_K)
            w1_at = weight + (group * filters + tl.minimum(k1, filters - 1)).to(tl.int64)[:, None] * packed_columns
            w1_at += (first + lane)[None, :]
            sums1 = tl.zeros((BLOCK_NPQ, EXTRA_K), tl.float32)

        step = BLOCK_CRS + BLOCK_CRS // run * hop + BLOCK_CRS // run // taps_w * row_hop
        for start in range(first, last, BLOCK_CRS):
            if ALIGNED:
                a = tl.load(x_at + offset)
            elif EVEN:
                a = tl.load(x_at + offset[None, :])
            else:
                a = tl.load(x_at + offset[None, :], mask=(start + lane < reduction)[None, :], other=0.0)
            b = tl.load(w_at) if EVEN else tl.load(w_at, mask=(start + lane < reduction)[None, :], other=0.0)
            sums = _add_step(sums, a, b, PRECISION, UPCAST)
            w_at += BLOCK_CRS
            if EXTRA_K:
                b1 = tl.load(w1_at) if EVEN else tl.load(w1_at, mask=(start + lane < reduction)[None, :], other=0.0)
                sums1 = _add_step(sums1, a, b1, PRECISION, UPCAST)
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
        _store_tile(sums, bias, gate, y, row, gate_row, inside, k0, filters, y_columns, group, gate_columns, RELU)
        if EXTRA_K:
            _store_tile(sums1, bias, gate, y, row, gate_row, inside, k1, filters, y_columns, group, gate_columns, RELU)
    else:
        _clear_border(
            y, (pid - products) * BLOCK_NPQ, images, out_h, out_w, y_pitch_h, y_pitch_w, y_lead, y_rows, y_columns,
            BLOCK_NPQ, BLOCK_K,
        )  # fmt: skip


@triton.jit
def shifted_conv_kernel(
    x, weight, extra_weight, bias, gate, y,
    filters, groups, reduction, share, depth, run, taps_w, row_hop, first_row,
    images, out_h, out_w, pitch_h, pitch_w,
    y_rows, y_columns, y_pitch_h, y_pitch_w, y_lead, gate_lead, gate_columns, pixel_tiles, products,
    RELU: tl.constexpr,
    BLOCK_NPQ: tl.constexpr, BLOCK_K: tl.constexpr, EXTRA_K: tl.constexpr, BLOCK_CRS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # The shifted loop: the same product over consecutive rows of X, those of its border too, whose products are
    # dropped. So a tile of X is one block of a matrix: X and W are descriptors, from which Hopper's copy engine
    # fetches tiles without an address in a register. Every run must be a multiple of BLOCK_CRS.
    # A row of taps of one group is one run, although its columns lie in several rows: the descriptor's rows overlap.
    pid = tl.program_id(0)
    if pid < products:
        group, first_k, pixel_tile, split = _place_of(pid, filters, groups, pixel_tiles, BLOCK_K + EXTRA_K)
        first_pixel = pixel_tile * BLOCK_NPQ

        first = split * share
        last = tl.minimum(first + share, reduction)
        in_run, in_row = first % run, first // run % taps_w
        x_row = first_row + first_pixel + first // run + first // run // taps_w * row_hop
        w_row = group * filters + first_k
        sums = tl.zeros((BLOCK_NPQ, BLOCK_K), tl.float32)
        if EXTRA_K:
            sums1 = tl.zeros((BLOCK_NPQ, EXTRA_K), tl.float32)
        for start in range(first, last, BLOCK_CRS):
            a = x.load([x_row, group * depth + in_run])
            b = weight.load([w_row, start])
            sums = _add_step(sums, a, b, PRECISION, UPCAST)
            if EXTRA_K:
                b1 = extra_weight.load([w_row + BLOCK_K, start])
                sums1 = _add_step(sums1, a, b1, PRECISION, UPCAST)
            in_run += BLOCK_CRS
            over = in_run >= run
            in_run = tl.where(over, 0, in_run)
            x_row += tl.where(over, 1, 0)
            in_row += tl.where(over, 1, 0)
            over = in_row >= taps_w
            in_row = tl.where(over, 0, in_row)
            x_row += tl.where(over, row_hop, 0)

        pixel = first_pixel + tl.arange(0, BLOCK_NPQ)
        n, p, q, inside = _pixel_of(pixel, images, pitch_h, pitch_w, out_h, out_w)
        row = (y_lead + (n * y_pitch_h + p) * y_pitch_w + q).to(tl.int64) + split.to(tl.int64) * y_rows
        gate_row = pixel.to(tl.int64) + gate_lead
        k0 = first_k + tl.arange(0, BLOCK_K)
        _store_tile(sums, bias, gate, y, row, gate_row, inside, k0, filters, y_columns, group, gate_columns, RELU)
        if EXTRA_K:
            k1 = first_k + BLOCK_K + tl.arange(0, EXTRA_K)
            _store_tile(sums1, bias, gate, y, row, gate_row, inside, k1, filters, y_columns, group, gate_columns, RELU)
    else:
        _clear_border(
            y, (pid - products) * BLOCK_NPQ, images, out_h, out_w, y_pitch_h, y_pitch_w, y_lead, y_rows, y_columns,
            BLOCK_NPQ, BLOCK_K,
        )  # fmt: skip


@triton.jit
def finish_kernel(
    partial, bias, gate, y, splits, pixels, images, out_h, out_w,
    y_rows, y_columns, y_pitch_h, y_pitch_w, y_lead, gate_lead, gate_pitch_h, gate_pitch_w, gate_columns,
    RELU: tl.constexpr, BLOCK_NPQ: tl.constexpr, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    # Y[row, k] = sum over splits, in their order, of partial[split, pixel of the row, k], finished; 0 in the border.
    # A program writes one tile. It asks for UNROLL parts before it waits for the first.
    tiles = tl.cdiv(y_columns, BLOCK_K)
    row = tl.program_id(0) // tiles * BLOCK_NPQ + tl.arange(0, BLOCK_NPQ)
    column = (tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    n, p, q, inside = _pixel_of(row - y_lead, images, y_pitch_h, y_pitch_w, out_h, out_w)
    inside = inside[:, None] & (column < y_columns)
    at = partial + ((n * out_h + p) * out_w + q).to(tl.int64)[:, None] * y_columns + column
    sums = tl.zeros((BLOCK_NPQ, BLOCK_K), tl.float32)
    part = tl.cast(pixels, tl.int64) * y_columns
    for first in range(0, splits, UNROLL):
        for i in tl.static_range(UNROLL):
            sums += tl.load(at + i * part, mask=inside & (first + i < splits), other=0.0)
        at += UNROLL * part
    if bias is not None:
        sums += tl.load(bias + column, mask=column < y_columns, other=0.0).to(tl.float32)
    if RELU:
        sums = tl.where(sums <= 0, 0.0, sums)
    if gate is not None:
        gate_row = ((n * gate_pitch_h + p) * gate_pitch_w + q).to(tl.int64) + gate_lead
        open_ = tl.load(gate + gate_row[:, None] * gate_columns + column, mask=inside, other=0.0)
        sums = tl.where(open_.to(tl.float32) <= 0, 0.0, sums)
    sums = tl.where(inside, sums, 0.0)
    at = y + row.to(tl.int64)[:, None] * y_columns + column
    tl.store(at, rounded(sums, y), mask=(row < y_rows)[:, None] & (column < y_columns))


class _Product(NamedTuple):
    """What tells a forward product from a data gradient's."""

    filters: int
    depth: int
    taps: Pair
    padding: Pair
    out_size: Pair

    @property
    def reduction(self) -> int:
        return self.taps[0] * self.taps[1] * self.depth


def _convolve(
    x: Tensor, x_layout: Layout, packed: Tensor, bias: Tensor | None, gate: Tensor | None, gate_layout: Layout | None,
    groups: int, product: _Product, y_layout: Layout, relu: bool, config: ConvConfig | None,
) -> Tensor:  # fmt: skip
    target = launch.target_of(x.device)
    if config is None:
        problem = ConvProblem(
            x_layout.images, *product.out_size, product.filters, product.depth, *product.taps, groups,
            not y_layout.is_dense, x.dtype, launch.is_exact(x.dtype, target),
        )  # fmt: skip
        config = choose(target, problem)
        launch.offer(
            problem,
            lambda other: _convolve(
                x, x_layout, packed, bias, gate, gate_layout, groups, product, y_layout, relu, other
            ),
        )
    y = launch.empty((y_layout.rows, y_layout.channels), x)
    steps = launch.cdiv(product.reduction, config.block_crs)
    share = launch.cdiv(steps, config.splits)
    splits = launch.cdiv(steps, share)
    if splits == 1:
        _multiply(x, x_layout, packed, bias, gate, gate_layout, groups, product, y, y_layout, relu, 1, share, config)
        return y
    out = halo.dense(x_layout.images, groups * product.filters, *product.out_size)
    partial = launch.empty((splits, out.rows, out.channels), x, torch.float32)
    _multiply(x, x_layout, packed, None, None, None, groups, product, partial, out, False, splits, share, config)
    tile = copy_config(target, y_layout.rows, y_layout.channels)
    gate_pitches = (gate_layout.lead, gate_layout.pitch_h, gate_layout.pitch_w) if gate_layout else (0, 0, 0)
    launch.launch(
        finish_kernel,
        launch.cdiv(y_layout.rows, tile.rows) * launch.cdiv(y_layout.channels, tile.channels),
        partial=partial, bias=bias, gate=gate, y=y, splits=splits, pixels=out.rows,
        images=out.images, out_h=out.height, out_w=out.width,
        y_rows=y_layout.rows, y_columns=y_layout.channels,
        y_pitch_h=y_layout.pitch_h, y_pitch_w=y_layout.pitch_w, y_lead=y_layout.lead,
        gate_lead=gate_pitches[0], gate_pitch_h=gate_pitches[1], gate_pitch_w=gate_pitches[2],
        gate_columns=gate_layout.channels if gate_layout else 0,
        RELU=relu, BLOCK_NPQ=tile.rows, BLOCK_K=tile.channels, UNROLL=min(8, launch.power_of_two(splits)),
        num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
    return y


def _multiply(
    x: Tensor, x_layout: Layout, packed: Tensor, bias: Tensor | None, gate: Tensor | None, gate_layout: Layout | None,
    groups: int, product: _Product, y: Tensor, y_layout: Layout, relu: bool, splits: int, share: int,
    config: ConvConfig,
) -> None:  # fmt: skip
    """Launch the product in the loop that `config` names; `share` is in steps."""
    target = launch.target_of(x.device)
    gathers = config.loop == "gathered"
    taps_w = product.taps[1]
    # A row of taps lies side by side in memory where there is one group; with several each tap is a run.
    runs_a_row = 1 if groups == 1 else taps_w
    run = product.depth * taps_w // runs_a_row
    first_shift = -(product.padding[0] * x_layout.pitch_w + product.padding[1])
    row_hop = (x_layout.pitch_w if runs_a_row == 1 else x_layout.pitch_w - taps_w) - (runs_a_row == 1)
    pixels = x_layout.images * product.out_size[0] * product.out_size[1] if gathers else x_layout.pixels
    pixel_tiles = launch.cdiv(pixels, config.block_npq)
    products = pixel_tiles * launch.cdiv(product.filters, config.block_k + config.extra_k) * groups * splits
    rest: dict[str, Any] = {
        "bias": bias, "gate": gate, "y": y, "filters": product.filters, "groups": groups,
        "reduction": product.reduction, "share": share * config.block_crs, "depth": product.depth, "run": run,
        "taps_w": runs_a_row, "images": x_layout.images, "out_h": product.out_size[0], "out_w": product.out_size[1],
        "pitch_h": x_layout.pitch_h, "pitch_w": x_layout.pitch_w,
        "y_rows": y_layout.rows, "y_columns": y_layout.channels,
        "y_pitch_h": y_layout.pitch_h, "y_pitch_w": y_layout.pitch_w, "y_lead": y_layout.lead,
        "gate_lead": gate_layout.lead if gate_layout else 0,
        "gate_columns": gate_layout.channels if gate_layout else 0,
        "pixel_tiles": pixel_tiles, "products": products, "RELU": relu,
        "BLOCK_NPQ": config.block_npq, "BLOCK_K": config.block_k, "EXTRA_K": config.extra_k,
        "BLOCK_CRS": config.block_crs, "PRECISION": launch.dot_precision(target), "UPCAST": launch.INTERPRETED,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    programs = products + (0 if y_layout.is_dense else launch.cdiv(y_layout.rows, config.block_npq))
    if gathers:
        columns = x_layout.channels
        launch.launch(
            conv_kernel, programs, x=x, weight=packed, packed_columns=packed.shape[1], x_columns=columns,
            hop=columns - run if runs_a_row > 1 else x_layout.pitch_w * columns - run,
            row_hop=row_hop * columns if runs_a_row > 1 else 0, first_shift=first_shift, x_lead=x_layout.lead,
            ALIGNED=run % config.block_crs == 0, EVEN=product.reduction % config.block_crs == 0, **rest,
        )  # fmt: skip
        return
    config.check_loop(run)
    overlap = taps_w if runs_a_row == 1 else 1  # rows that a run begins in its own and goes on to
    rows = TensorDescriptor(
        x, [x_layout.rows - overlap + 1, x_layout.channels * overlap], [x_layout.channels, 1],
        [config.block_npq, config.block_crs],
    )  # fmt: skip
    filters = [
        TensorDescriptor(packed, list(packed.shape), [packed.shape[1], 1], [width, config.block_crs]) if width else None
        for width in (config.block_k, config.extra_k)
    ]
    launch.launch(
        shifted_conv_kernel, programs, x=rows, weight=filters[0], extra_weight=filters[1], row_hop=row_hop,
        first_row=x_layout.lead + first_shift, **rest,
    )  # fmt: skip


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
    product = _Product(conv.filters, padded(conv.folded_depth), conv.taps, conv.padding, conv.out_size)
    return _convolve(
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
    product = _Product(conv.folded_depth, padded(conv.filters), conv.taps, turned_padding, conv.size)
    gate_layout = None if gate is None else conv.x_layout
    return _convolve(
        dy, conv.dy_layout, turned, None, gate, gate_layout, conv.groups, product, dx_layout, False, config
    )  # fmt: skip
