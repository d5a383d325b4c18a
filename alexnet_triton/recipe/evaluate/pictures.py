"""Pictures of a trained network: its first layer's filters, what it confuses, how good it is by class."""

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

BARS = 60
"""Classes up to which each has a bar in the picture of their accuracies."""


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


def per_class(right: Tensor, best: Tensor, images: Tensor, classes: tuple[str, ...], k: int, path: Path) -> None:
    """Draw each class's accuracy as a bar, top-1 in the bar of top-k, the worst class at the top.

    Of more than `BARS` classes the worst and the best halves of so many are drawn, with a gap between.

    Args:
        right: (classes,), images whose class is the best guess.
        best: (classes,), images whose class is among the k best guesses.
        images: (classes,), images of each class; classes without any are left out.
        classes: their names.
        k: of top-k.
        path: of the PNG; overwritten.
    """
    from matplotlib.figure import Figure

    shares = 100 * torch.stack([right, best]).double() / images.clamp_min(1)
    order = [i for i in shares[0].argsort(stable=True).tolist() if images[i]]
    rows: list[int | None] = [*order]
    if len(order) > BARS:
        rows = [*order[: BARS // 2], None, *order[-(BARS // 2) :]]
    places = [place for place, i in enumerate(rows) if i is not None]
    shown = [i for i in rows if i is not None]
    figure = Figure(figsize=(7, max(2.0, 0.22 * len(rows) + 1)), layout="constrained")
    axes = figure.subplots()
    for top, colour in ((1, "#c6dbef"), (0, "#0072b2")):
        label = f"among the {k} best guesses" if top else "the best guess"
        axes.barh(places, shares[top][shown].tolist(), color=colour, label=label)
    names = [f"{short(classes[i], 30)} ({images[i]:,})" for i in shown]
    axes.set_yticks(places, names, fontsize=8)
    left_out = f"; {len(order) - len(shown):,} classes in the middle are left out" if None in rows else ""
    axes.set(xlim=(0, 100), xlabel=f"images of the class that are right (%){left_out}", title="Accuracy by class")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


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
