"""The layout that convolutions work in, and the kernels that bring tensors into it and out of it.

A feature map is a matrix, pixels by channels. Pixel (n, h, w) of N maps of H x W is row

    lead + (n * pitch_h + h) * pitch_w + w

Rows of the matrix that are no pixel hold zeros: the `pitch_w - W` at the end of each row of pixels (the right border of
one row is the left border of the next), the `pitch_h - H` rows of pixels at the end of each image, `lead` rows before
the first image and as many and a few more after the last. In such a matrix a tap (r, s) of a filter is a constant
distance `r * pitch_w + s` in rows, so that all three directions of a convolution are sums of matrix products
over shifted rows, and no load needs a mask (see `conv`).

A *dense* layout has no border: its matrix is an NHWC tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_triton.kernels import launch
from alexnet_triton.kernels.config import ROWS_MULTIPLE, copy_config
from alexnet_triton.kernels.launch import rounded


class Layout(NamedTuple):
    """Where the pixels of a batch of feature maps lie in the rows of a matrix. Two equal layouts are alike in all."""

    images: int
    height: int
    width: int
    pitch_h: int
    """Rows of pixels from one image to the next."""
    pitch_w: int
    """Rows of the matrix from one row of pixels to the next."""
    lead: int
    """Zero rows before the first image."""
    rows: int
    """Rows of the whole matrix."""
    channels: int
    """Columns of the matrix."""

    @property
    def pixels(self) -> int:
        """Rows from the first image's first to the last image's last."""
        return self.images * self.pitch_h * self.pitch_w

    @property
    def is_dense(self) -> bool:
        """Whether every row is a pixel."""
        return self.rows == self.images * self.height * self.width


def dense(images: int, channels: int, height: int, width: int) -> Layout:
    """The layout of a contiguous NHWC tensor."""
    return Layout(images, height, width, height, width, 0, images * height * width, channels)


def view(matrix: Tensor, layout: Layout) -> Tensor:
    """The pixels of `matrix` as a tensor (N, C, H, W), without a copy."""
    pitch = layout.channels
    strides = (layout.pitch_h * layout.pitch_w * pitch, 1, layout.pitch_w * pitch, pitch)
    size = (layout.images, layout.channels, layout.height, layout.width)
    return matrix.as_strided(size, strides, matrix.storage_offset() + layout.lead * pitch)


def for_convolution(
    images: int,
    channels: int,
    size: tuple[int, int],
    taps: tuple[int, int],
    padding: tuple[int, int],
    out_size: tuple[int, int],
) -> Layout:
    """The layout in which a convolution of stride 1 reads its input and its output's gradient.

    Args:
        images: N.
        channels: of the matrix.
        size: (H, W) of the input.
        taps: (R, S) of the filter.
        padding: zero pixels at each side, (rows, columns).
        out_size: (P, Q). Output pixel (n, p, q) has the number of input pixel (n, p, q), so it too has room.
    """
    height, width = size
    pitch_h = max(height + padding[0], out_size[0])
    pitch_w = max(width + padding[1], out_size[1])
    back = padding[0] * pitch_w + padding[1]
    ahead = (taps[0] - 1 - padding[0]) * pitch_w + taps[1] - 1 - padding[1]
    lead = max(back, ahead)
    rows = 2 * lead + launch.cdiv(images * pitch_h * pitch_w, ROWS_MULTIPLE) * ROWS_MULTIPLE
    return Layout(images, height, width, pitch_h, pitch_w, lead, rows, channels)


class Fold(NamedTuple):
    """How blocks of a tensor's pixels become channels, so that a strided convolution has stride 1.

    Channel (g, c, i, j) of pixel (h, w) of the matrix is channel c of group g of the tensor's pixel
    (h * stride + i - origin, w * stride + j - origin): inside a group the order of
    `torch.nn.functional.pixel_unshuffle`. A group's channels are followed by zeros up to `depth_padded`.
    """

    groups: int
    depth: int
    """Channels a group of the tensor."""
    block: tuple[int, int]
    stride: tuple[int, int]
    origin: tuple[int, int]
    depth_padded: int
    """Columns a group of the matrix."""


def no_fold(groups: int, channels: int, depth_padded: int) -> Fold:
    """Pixels as they are, each group's channels padded to `depth_padded`."""
    return Fold(groups, channels // groups, (1, 1), (1, 1), (0, 0), depth_padded)


@triton.jit
def enter_kernel(
    x, gate, out,
    x_n, x_c, x_h, x_w, gate_n, gate_c, gate_h, gate_w,
    source_h, source_w, height, width, pitch_h, pitch_w, pixels, lead, rows, channels,
    depth, depth_padded, stride_h, stride_w, origin_h, origin_w,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, GATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    # out[row, column] = x[n, c, h, w], or 0 where the row is no pixel or the column no channel.
    # A program copies BLOCK_ROWS rows by BLOCK_CHANNELS columns.
    tiles = tl.cdiv(channels, BLOCK_CHANNELS)
    row = (tl.program_id(0) // tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(0) % tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)

    pixel = row - lead
    inside = (pixel >= 0) & (pixel < pixels)
    n = pixel // (pitch_h * pitch_w)
    h = pixel // pitch_w % pitch_h
    w = pixel % pitch_w
    inside &= (h < height) & (w < width)

    in_group = column % depth_padded
    of_group = in_group // (BLOCK_H * BLOCK_W)
    c = column // depth_padded * depth + of_group
    source_row = h[:, None] * stride_h - origin_h + (in_group // BLOCK_W % BLOCK_H)[None, :]
    source_column = w[:, None] * stride_w - origin_w + (in_group % BLOCK_W)[None, :]
    inside = inside[:, None] & ((of_group < depth) & (column < channels))[None, :]
    inside &= (source_row >= 0) & (source_row < source_h) & (source_column >= 0) & (source_column < source_w)

    n, c = n.to(tl.int64)[:, None], c.to(tl.int64)[None, :]
    source_row, source_column = source_row.to(tl.int64), source_column.to(tl.int64)
    value = tl.load(x + n * x_n + c * x_c + source_row * x_h + source_column * x_w, mask=inside, other=0.0)
    if GATE:
        at = n * gate_n + c * gate_c + source_row * gate_h + source_column * gate_w
        value = tl.where(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32) <= 0, 0.0, value)
    at = row.to(tl.int64)[:, None] * channels + column[None, :]
    tl.store(out + at, rounded(value, out), mask=(row < rows)[:, None] & (column < channels)[None, :])


def enter(
    x: Tensor, layout: Layout, fold: Fold, gate: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Bring a tensor into a layout: fold, pad, convert.

    Args:
        x: (N, C, H, W), of any strides.
        layout: of the answer.
        fold: how pixels become channels.
        gate: a tensor of the shape of `x`; elements of `x` are dropped where it is at most 0 (the gradient
            of ReLU, given its output).
        dtype: of the answer; None takes that of `x`.

    Returns:
        (layout.rows, layout.channels), with zeros where there is no pixel or no channel.
    """
    out = launch.empty((layout.rows, layout.channels), x, dtype)
    config = copy_config(launch.target_of(x.device), layout.rows, layout.channels)
    gate_strides = (0, 0, 0, 0) if gate is None else gate.stride()
    launch.launch(
        enter_kernel,
        launch.cdiv(layout.rows, config.rows) * launch.cdiv(layout.channels, config.channels),
        x=x, gate=gate, out=out,
        x_n=x.stride(0), x_c=x.stride(1), x_h=x.stride(2), x_w=x.stride(3),
        gate_n=gate_strides[0], gate_c=gate_strides[1], gate_h=gate_strides[2], gate_w=gate_strides[3],
        source_h=x.shape[2], source_w=x.shape[3],
        height=layout.height, width=layout.width, pitch_h=layout.pitch_h, pitch_w=layout.pitch_w,
        pixels=layout.pixels, lead=layout.lead, rows=layout.rows, channels=layout.channels,
        depth=fold.depth, depth_padded=fold.depth_padded,
        stride_h=fold.stride[0], stride_w=fold.stride[1], origin_h=fold.origin[0], origin_w=fold.origin[1],
        BLOCK_H=fold.block[0], BLOCK_W=fold.block[1], GATE=gate is not None,
        BLOCK_ROWS=config.rows, BLOCK_CHANNELS=config.channels, num_warps=config.warps, num_stages=1,
    )  # fmt: skip
    return out


@triton.jit
def leave_kernel(
    x, out,
    x_n, x_c, x_h, x_w, out_n, out_c, out_h, out_w,
    folded_h, folded_w, height, width, images, channels,
    stride_h, stride_w, origin_h, origin_w,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    # out[n, c, h, w] = x[n, (c, i, j), h', w'] where h = h' * stride + i - origin, and w likewise; or 0 where
    # no pixel of x holds it. A program writes BLOCK_PIXELS pixels of BLOCK_CHANNELS channels.
    tiles = tl.cdiv(channels, BLOCK_CHANNELS)
    pixel = (tl.program_id(0) // tiles) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    c = ((tl.program_id(0) % tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS))[None, :]
    n = (pixel // (height * width)).to(tl.int64)[:, None]
    h = pixel // width % height
    w = pixel % width
    i, j = (h + origin_h) % stride_h, (w + origin_w) % stride_w
    from_h, from_w = (h + origin_h) // stride_h, (w + origin_w) // stride_w
    held = (i < BLOCK_H) & (j < BLOCK_W) & (from_h < folded_h) & (from_w < folded_w)
    written = (pixel < images * height * width)[:, None] & (c < channels)
    column = c.to(tl.int64) * (BLOCK_H * BLOCK_W) + (i * BLOCK_W + j)[:, None]
    at = n * x_n + column * x_c + (from_h.to(tl.int64) * x_h + from_w.to(tl.int64) * x_w)[:, None]
    value = tl.load(x + at, mask=written & held[:, None], other=0.0)
    at = n * out_n + c.to(tl.int64) * out_c + (h.to(tl.int64) * out_h + w.to(tl.int64) * out_w)[:, None]
    tl.store(out + at, rounded(value, out), mask=written)


def leave(x: Tensor, out: Tensor, fold: Fold) -> Tensor:
    """Undo a fold: bring a map into an ordinary tensor.

    Args:
        x: (N, channels of the fold without padding, H', W'), of any strides: a `view` of a matrix.
        out: (N, C, H, W), of any strides, to be filled; zeros where no pixel of `x` holds a pixel.
        fold: how pixels have become channels.

    Returns:
        `out`.
    """
    images, channels, height, width = out.shape
    config = copy_config(launch.target_of(x.device), images * height * width, channels)
    launch.launch(
        leave_kernel,
        launch.cdiv(images * height * width, config.rows) * launch.cdiv(channels, config.channels),
        x=x, out=out,
        x_n=x.stride(0), x_c=x.stride(1), x_h=x.stride(2), x_w=x.stride(3),
        out_n=out.stride(0), out_c=out.stride(1), out_h=out.stride(2), out_w=out.stride(3),
        folded_h=x.shape[2], folded_w=x.shape[3], height=height, width=width, images=images, channels=channels,
        stride_h=fold.stride[0], stride_w=fold.stride[1], origin_h=fold.origin[0], origin_w=fold.origin[1],
        BLOCK_H=fold.block[0], BLOCK_W=fold.block[1],
        BLOCK_PIXELS=config.rows, BLOCK_CHANNELS=config.channels, num_warps=config.warps, num_stages=1,
    )  # fmt: skip
    return out
