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

import triton
import triton.language as tl
from torch import Tensor

from alexnet_triton.kernels import launch

ROWS_MULTIPLE = 64
"""Rows between the two margins come in multiples of this: a weight gradient's steps need no mask."""


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
