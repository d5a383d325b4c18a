"""From bytes to the network's input in one pass: crop, mirror, colour, normalisation, conv1's layout."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_triton.kernels import launch
from alexnet_triton.kernels.halo import Fold, Layout
from alexnet_triton.kernels.launch import rounded

FIELDS = 6
"""Numbers that the kernel is told of an image; see `pack_draws`."""


@triton.jit
def augment_kernel(
    images, draws, out,
    images_n, images_c, images_h, images_w, scale_r, scale_g, scale_b,
    crop, height, width, pitch_h, pitch_w, lines, before, lead, rows, channels,
    stride_h, stride_w, origin_h, origin_w,
    DEPTH: tl.constexpr, DEPTH_PADDED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CELLS: tl.constexpr, BLOCK_PADDING: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    # out[row, (c, i, j)] = images[n, c, y, x] * scale[c] + offset[n, c], or 0 outside the crop, where
    # y = top + h * stride + i - origin, and x likewise from the left or, mirrored, to the left. A program writes
    # BLOCK_ROWS rows of the matrix, of one line of pixels (n, h): what the draws say is the same for all of them, and a
    # pixel's three channels are loaded through one address.
    tiles = tl.cdiv(pitch_w, BLOCK_ROWS)
    line = tl.program_id(0) // tiles - before
    n, h = line // pitch_h, line % pitch_h
    w = tl.program_id(0) % tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cell = tl.arange(0, BLOCK_CELLS)
    i, j = cell // BLOCK_W, cell % BLOCK_W

    holds = (line >= 0) & (line < lines) & (h < height)
    drawn = draws + n.to(tl.int64) * FIELDS
    top = tl.load(drawn, mask=holds, other=0.0).to(tl.int64)
    left = tl.load(drawn + 1, mask=holds, other=0.0).to(tl.int64)
    step = tl.load(drawn + 2, mask=holds, other=0.0).to(tl.int64)

    y = h * stride_h - origin_h + i
    x = (w * stride_w - origin_w)[:, None] + j[None, :]
    inside = holds & (y >= 0) & (y < crop) & (cell < BLOCK_H * BLOCK_W)
    inside = inside[None, :] & (w < width)[:, None] & (x >= 0) & (x < crop)
    at = images + n.to(tl.int64) * images_n + ((top + y) * images_h)[None, :] + (left + step * x) * images_w

    row = lead + line.to(tl.int64) * pitch_w + w
    written = (w < pitch_w) & (row >= 0) & (row < rows)
    to = out + row * channels
    for c in tl.static_range(3):
        scale = scale_r if c == 0 else scale_g if c == 1 else scale_b
        offset = tl.load(drawn + 3 + c, mask=holds, other=0.0)
        value = tl.load(at + c * tl.cast(images_c, tl.int64), mask=inside, other=0).to(tl.float32) * scale + offset
        column = c // DEPTH * DEPTH_PADDED + c % DEPTH * (BLOCK_H * BLOCK_W) + cell
        mask = written[:, None] & (cell < BLOCK_H * BLOCK_W)[None, :]
        tl.store(to[:, None] + column[None, :], rounded(tl.where(inside, value, 0.0), out), mask=mask)
    if BLOCK_PADDING > 0:
        used: tl.constexpr = DEPTH * BLOCK_H * BLOCK_W
        column = tl.arange(0, BLOCK_PADDING)
        mask = written[:, None] & (column < DEPTH_PADDED - used)[None, :]
        zero = tl.zeros((BLOCK_ROWS, BLOCK_PADDING), tl.float32).to(out.dtype.element_ty)
        for group in tl.static_range(3 // DEPTH):
            tl.store(to[:, None] + (group * DEPTH_PADDED + used + column)[None, :], zero, mask=mask)


def pack_draws(top: Tensor, left: Tensor, mirror: Tensor, offset: Tensor, crop: int) -> Tensor:
    """Lay out what is drawn for N images in one tensor, so that one copy brings it to a device.

    Args:
        top: (N,), the crop's first row of pixels.
        left: (N,), its first column.
        mirror: (N,), whether to mirror.
        offset: (N, 3), float32, what is added to each channel after scaling.
        crop: side of the crops.

    Returns:
        (N, FIELDS), float32: top, the column that comes first, the step to the next (-1 where mirrored), the offsets.
        Whole numbers up to 2^24 are exact in it.
    """
    first = torch.where(mirror, left + (crop - 1), left)
    places = torch.stack([top, first, 1 - 2 * mirror.long()], 1)
    return torch.cat([places.float(), offset], 1)


def augment(
    images: Tensor, draws: Tensor, scale: tuple[float, float, float], crop: int, layout: Layout, fold: Fold,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Crop, mirror, shift and scale images on their way into a layout.

    Args:
        images: (N, 3, H, W), uint8, of any strides.
        draws: (N, FIELDS), float32, on their device, of `pack_draws`; the crops lie in the images.
        scale: what each channel's bytes are multiplied by.
        crop: side of the crops.
        layout: of the answer.
        fold: how pixels become channels. What it takes upon itself of a convolution's padding is 0.
        dtype: of the answer.

    Returns:
        (layout.rows, layout.channels), with zeros where there is no pixel or no channel.
    """
    out = launch.empty((layout.rows, layout.channels), images, dtype)
    cells = fold.block[0] * fold.block[1]
    padding = fold.depth_padded - fold.depth * cells
    block_cells = launch.power_of_two(cells)
    block_rows = min(launch.power_of_two(layout.pitch_w), max(1, 1024 // block_cells))
    warps = 2 if launch.target_of(images.device).backend == "hip" else 4  # 128 threads
    before = launch.cdiv(layout.lead, layout.pitch_w)
    after = launch.cdiv(layout.rows - layout.lead, layout.pitch_w)
    launch.launch(
        augment_kernel,
        (before + after) * launch.cdiv(layout.pitch_w, block_rows),
        images=images, draws=draws, out=out,
        images_n=images.stride(0), images_c=images.stride(1), images_h=images.stride(2), images_w=images.stride(3),
        scale_r=scale[0], scale_g=scale[1], scale_b=scale[2],
        crop=crop, height=layout.height, width=layout.width, pitch_h=layout.pitch_h, pitch_w=layout.pitch_w,
        lines=layout.images * layout.pitch_h, before=before, lead=layout.lead, rows=layout.rows,
        channels=layout.channels, stride_h=fold.stride[0], stride_w=fold.stride[1],
        origin_h=fold.origin[0], origin_w=fold.origin[1],
        DEPTH=fold.depth, DEPTH_PADDED=fold.depth_padded, BLOCK_H=fold.block[0], BLOCK_W=fold.block[1],
        BLOCK_ROWS=block_rows, BLOCK_CELLS=block_cells,
        BLOCK_PADDING=launch.power_of_two(padding) if padding else 0, FIELDS=FIELDS, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return out
