"""What a launch must be told, and a default that is right everywhere.

A config is a small frozen dataclass; its fields are the kernel's block sizes, warps and stages. The function of the same
name chooses one from the shape, the dtype and the target by rules that need no measurement. Under the interpreter time goes by programs
and loop turns, so blocks are large there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from alexnet_triton.kernels.target import Target, cdiv, power_of_two

# --- copies -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CopyConfig:
    """A tile of a kernel that moves a matrix: its rows by its channels."""

    rows: int
    channels: int
    warps: int


def copy_config(target: Target, rows: int, channels: int) -> CopyConfig:
    """A tile for a matrix of `rows` by `channels`."""
    if target.backend == "cpu":
        width = min(power_of_two(channels), 512)
        return CopyConfig(_rows(rows, width), width, 4)
    width = min(power_of_two(channels), 64)
    return CopyConfig(2048 // width, width, 4)


# --- convolutions -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvConfig:
    """Forward product and data gradient of a convolution. Every block is a power of two."""

    block_npq: int
    """Rows (pixels) of a tile."""
    block_k: int
    extra_k: int
    """A tile is `block_k + extra_k` filters wide; 0 for none. 64 + 32 holds 96 without waste."""
    block_crs: int
    extra_crs: int
    """A step sums over `block_crs + extra_crs` channels, which divide a run of them; 0 for none."""
    warps: int
    stages: int


@dataclass(frozen=True)
class WeightGradientConfig:
    """Weight gradient of a convolution. Every block is a power of two."""

    block_crs: int
    """Columns of the filter matrix in a tile."""
    block_k: int
    extra_k: int
    """A tile is `block_k + extra_k` filters wide; 0 for none."""
    block_npq: int
    """Rows (pixels) of a step, at most `halo.ROWS_MULTIPLE`."""
    splits: int
    """Parts into which the rows are divided."""
    warps: int
    stages: int


def conv_config(target: Target, dtype: torch.dtype, pixels: int, filters: int, groups: int, run: int) -> ConvConfig:
    """A config for a product of `pixels` by `filters` a group, which finds `run` columns side by side."""
    if target.backend == "cpu":
        block_k, block_crs = max(16, min(1024, power_of_two(filters))), min(256, run & -run)
        return ConvConfig(_rows(pixels, max(block_k, block_crs)), block_k, 0, block_crs, 0, 4, 1)
    full = dtype == torch.float32
    block_k, extra_k = _width(filters, 64 if full else 128)
    block_crs, extra_crs = _step(run, 32 if full else 64)
    block_npq = 64 if full or pixels <= 4096 else 128
    warps = 8 if block_npq * (block_k + extra_k) >= 128 * 128 else 4
    stages = _stages(target, dtype, (block_npq + block_k + extra_k) * (block_crs + extra_crs))
    return ConvConfig(block_npq, block_k, extra_k, block_crs, extra_crs, warps, stages)


def weight_gradient_config(
    target: Target, dtype: torch.dtype, filters: int, reduction: int, groups: int, steps: int
) -> WeightGradientConfig:
    """A config for a product of `reduction` columns by `filters` a group, over `steps` times 64 rows."""
    if target.backend == "cpu":
        block_k = max(16, min(1024, power_of_two(filters)))
        return WeightGradientConfig(_rows(reduction, block_k), block_k, 0, 64, 1, 4, 1)
    full = dtype == torch.float32
    block_k, extra_k = _width(filters, 64 if full else 128)
    block_crs = 64 if full else 128
    block_npq = 32 if full else 64
    tiles = cdiv(reduction, block_crs) * cdiv(filters, block_k + extra_k) * groups
    splits = max(1, min(2 * target.multiprocessors // tiles, steps // 4))
    warps = 8 if block_crs * (block_k + extra_k) >= 128 * 128 else 4
    stages = _stages(target, dtype, block_npq * (block_crs + block_k + extra_k))
    return WeightGradientConfig(block_crs, block_k, extra_k, block_npq, splits, warps, stages)


LARGEST_TILE = 1 << 20
"""Elements that Triton allows a tile."""


def _rows(rows: int, columns: int) -> int:
    """Rows of the largest tile of `columns` columns under the interpreter."""
    return max(16, min(power_of_two(rows), LARGEST_TILE // columns))


def _width(columns: int, most: int) -> tuple[int, int]:
    """The widest (block, extra) up to `most` + half of it that wastes the fewest columns."""
    choices = [(b, e) for b in (256, 128, 64, 32, 16) for e in (b // 2, 0) if b <= most and e != 8]
    return min(choices, key=lambda be: (cdiv(columns, sum(be)) * sum(be), -sum(be)))


def _step(run: int, most: int) -> tuple[int, int]:
    """The longest (block, extra) that divides `run`, of up to `most` and a half of it."""
    choices = [(b, e) for b in (64, 32, 16) for e in (32, 16, 0) if b <= most and e < b]
    return max((be for be in choices if run % sum(be) == 0), key=lambda be: (be[1] == 0 and be[0] == most, sum(be)))


def _stages(target: Target, dtype: torch.dtype, elements: int) -> int:
    """As many stages as shared memory holds, up to four."""
    most = 2 if target.backend == "hip" else 4
    return max(1, min(most, target.shared_memory // (elements * dtype.itemsize)))
