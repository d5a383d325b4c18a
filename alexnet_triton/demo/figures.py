"""The pictures that the page alone has, each written to one PNG file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from alexnet_triton.recipe.data.sets import ImageSet
from alexnet_triton.recipe.evaluate.pictures import short
from alexnet_triton.recipe.train.settings import History

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#8a8f98"


def curves(history: History, path: Path) -> None:
    """Loss of every step and epoch, and accuracy on the held-out images."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = len(history.epochs)
    per_epoch = len(history.step_loss) / epochs
    steps = (np.arange(len(history.step_loss)) + 1) / per_epoch
    left.plot(steps, history.step_loss, color=GREY, linewidth=0.8, alpha=0.7, label="each batch")
    left.plot(range(1, epochs + 1), history.column("loss"), "o-", color=BLUE, label="training, mean of the epoch")
    left.plot(range(1, epochs + 1), history.column("held_out_loss"), "s--", color=ORANGE, label="held out")
    left.set(xlabel="epoch", ylabel="cross-entropy (nats)", title="Loss", ylim=(0, None))
    left.set_ylim(0, min(left.get_ylim()[1], 1.5 * max(history.column("loss"))))
    left.legend(frameon=False)
    percent = [100 * value for value in history.column("held_out_top1")]
    right.plot(range(1, epochs + 1), percent, "s-", color=ORANGE)
    right.annotate(f"{percent[-1]:.1f} %", (epochs, percent[-1]), (-4, -16), textcoords="offset points", ha="right")
    right.set(xlabel="epoch", ylabel="held-out images right (%)", title="Accuracy", ylim=(0, 102))
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        _plain(axes)
    figure.savefig(path, dpi=120)


def guesses(data: ImageSet, probabilities: Tensor, path: Path) -> None:
    """Images with their best guesses as bars: the true class in blue, others in orange."""
    columns = min(4, len(data))
    rows = -(-len(data) // columns)
    figure = Figure(figsize=(2.9 * columns, 1.75 * rows), layout="constrained")
    grid = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1, 1.1] * columns)
    for axes in grid.flat:
        axes.axis("off")
    best = probabilities.topk(min(5, probabilities.shape[1]), dim=1)
    for index in range(len(data)):
        picture, bars = grid[index // columns][2 * (index % columns) : 2 * (index % columns) + 2]
        picture.imshow(data.read(torch.tensor([index]))[0].permute(1, 2, 0).numpy())
        truth = int(data.labels[index])
        right = int(best.indices[index, 0]) == truth
        title = short(data.classes[truth]) + ("" if right else "  (wrong)")
        picture.set_title(title, fontsize=9, color="black" if right else ORANGE)
        _bars(bars, best.values[index], [int(i) for i in best.indices[index]], truth, data.classes)
    figure.savefig(path, dpi=120)


def _bars(axes: Axes, shares: Tensor, labels: list[int], truth: int, classes: tuple[str, ...]) -> None:
    axes.axis("on")
    axes.barh(range(len(labels)), shares.tolist(), color=[BLUE if label == truth else ORANGE for label in labels])
    axes.set_yticks(range(len(labels)), [short(classes[label]) for label in labels], fontsize=8)
    axes.set(xlim=(0, 1), xticks=[])
    axes.invert_yaxis()
    _plain(axes)


def choose(count: int, number: int = 12, seed: int = 0) -> list[int]:
    """Indices of `number` images (or all), drawn without looking at their guesses."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:number].tolist()


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
