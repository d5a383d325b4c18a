"""Pictures of a trained network: its first layer's filters, and what it confuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FILTER_PIXELS = 88
"""Side of a filter in its picture, about; each of its own pixels becomes a square of whole pixels."""

NUMBERS_UP_TO, NAMES_UP_TO, CELLS = 20, 120, 250
"""Classes up to which a confusion matrix shows its numbers, and all their names; and its most rows of cells."""


def filters(weight: Tensor, path: Path, towers: int = 1) -> None:
    """Draw the first layer's filters as colour pictures in a grid, as figure 3 of Krizhevsky et al. (2012) does.

    Each is scaled to its own range, darkest to brightest; colours keep their proportion.

    Args:
        weight: (K, 3, R, S), R, G and B.
        path: of the PNG; overwritten.
        towers: parts of the network that share no filters, drawn one below the other: 2 for the network of 2012, whose
            first GPU learned the first half of the filters.
    """
    from torchvision.utils import make_grid, save_image

    weight = weight.detach().float().cpu()
    low = weight.amin((1, 2, 3), keepdim=True)
    scaled = (weight - low) / (weight.amax((1, 2, 3), keepdim=True) - low).clamp_min(1e-12)
    zoom = max(1, FILTER_PIXELS // weight.shape[-1])
    gap = max(2, zoom // 2)
    enlarged = scaled.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    columns = _columns(len(weight), towers)
    grids = [make_grid(tower, nrow=columns, padding=gap, pad_value=1.0) for tower in enlarged.chunk(towers)]
    between = torch.ones(3, 3 * gap, grids[0].shape[-1])
    parts = [part for grid in grids for part in (grid, between)][:-1]
    save_image(torch.cat(parts, 1), path, format="png")


def _columns(count: int, towers: int) -> int:
    """The number that fills whole rows of every tower and leaves a grid a little wider than high: 12 for 96."""
    fitting = [n for n in range(math.isqrt(count - 1) + 1, 2 * math.isqrt(count) + 1) if count % (n * towers) == 0]
    return min(fitting, default=math.isqrt(count - 1) + 1)


def confusion(matrix: Tensor, classes: tuple[str, ...], path: Path) -> None:
    """Draw true classes by guessed classes, as shares of each true class; numbers and names where they can be read.

    Of more than `CELLS` classes, neighbours share a cell, which shows the largest of their shares.

    Args:
        matrix: (classes, classes), images.
        classes: their names.
        path: of the PNG; overwritten.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    count = len(classes)
    numbers, block = count <= NUMBERS_UP_TO, math.ceil(count / CELLS)
    shares = (matrix / matrix.sum(1, keepdim=True).clamp_min(1)).float()
    cells = F.max_pool2d(shares[None], block, ceil_mode=True)[0]
    side = min(13.0, max(4.5, 0.5 * count + 1.5))
    figure = Figure(figsize=(side, side if numbers else 0.9 * side), layout="constrained")
    axes = figure.subplots()
    # Many classes are confused a little with many: the power shows a share of 1 % as a sixth of the colour.
    norm = PowerNorm(1.0 if numbers else 0.4, vmin=0, vmax=1)
    extent = (-0.5, block * cells.shape[1] - 0.5, block * cells.shape[0] - 0.5, -0.5)
    image = axes.imshow(cells.numpy(), cmap="Blues", norm=norm, interpolation="nearest", extent=extent)
    if numbers:
        for row, column in matrix.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{matrix[row, column]:,}", ha="center", va="center", color=colour, fontsize=9)
    else:
        label = "share of the true class's images" + (f", largest of {block} x {block} classes" if block > 1 else "")
        figure.colorbar(image, ax=axes, label=label, fraction=0.03, pad=0.01, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    axes.set(xlabel="guessed", ylabel="true", title="True class by best guess")
    _name(axes, classes, 0.75 * 72 * 0.8 * side)
    figure.savefig(path, dpi=120 if numbers else 150)


def _name(axes: Any, classes: tuple[str, ...], points: float) -> None:
    """Name the classes along both axes, of `points` in length, or as many as there is room for."""
    labels = [short(name, 20) for name in classes]
    every = 1 if len(labels) <= NAMES_UP_TO else math.ceil(len(labels) / 60)
    ticks = range(0, len(labels), every)
    size = min(10.0, points / len(ticks))
    upright = 0.7 * size * max(map(len, labels)) < points / len(ticks)  # a letter is about as wide
    axes.set_xticks(ticks, [labels[i] for i in ticks], rotation=0 if upright else 90, fontsize=size)
    axes.set_yticks(ticks, [labels[i] for i in ticks], fontsize=size)


def short(name: str, length: int = 14) -> str:
    """A name that fits beside a picture: its beginning, where it is longer than `length`."""
    return name if len(name) <= length else name[: length - 1] + "…"
