"""A convolution's shapes, with its stride folded away: what its kernels and whoever lines them up must know."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from alexnet_triton.kernels import halo, launch
from alexnet_triton.kernels.halo import Fold, Layout

Pair = tuple[int, int]

CHANNELS_MULTIPLE = 16
"""Channels a group are padded to a multiple of this: 32 bytes of half precision, and the least step of a product."""


def padded(channels: int) -> int:
    """Columns that the channels of a group take in a matrix."""
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
        return self.taps[0] * self.taps[1] * padded(self.folded_depth)

    @functools.cached_property
    def fold(self) -> Fold:
        """How the input is brought in."""
        return Fold(self.groups, self.depth, self.block, self.stride, self.origin, padded(self.folded_depth))

    @functools.cached_property
    def x_layout(self) -> Layout:
        """The layout in which the input is read."""
        return halo.for_convolution(
            self.images, self.groups * padded(self.folded_depth), self.size, self.taps, self.padding, self.out_size
        )

    @functools.cached_property
    def dy_layout(self) -> Layout:
        """The layout in which the gradient of the output is read: row for row that of the input."""
        height, width = self.out_size
        channels = self.groups * padded(self.filters)
        return self.x_layout._replace(height=height, width=width, channels=channels)

    @functools.cached_property
    def dy_fold(self) -> Fold:
        """How the gradient of the output is brought in."""
        return halo.no_fold(self.groups, self.groups * self.filters, padded(self.filters))

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
