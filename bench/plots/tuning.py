"""What became of the candidates of each layer and direction, from a log of `alexnet-triton autotune`."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from alexnet_triton.bench.plots.canvas import (
    STYLES,
    Drawn,
    add_legend,
    grouped,
    in_order,
    new_figure,
    pictures,
    plain_log,
    settle,
    tidy,
)
from alexnet_triton.bench.plots.files import Result, Row
from alexnet_triton.tuning.launches import DIRECTIONS, LAYERS

if TYPE_CHECKING:  # matplotlib is loaded when a picture is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_REASONS = 5
"""Reasons for pruning that are told apart; rarer ones are counted together."""


def tuning(result: Result) -> Drawn:
    """Each trial's cost over the default's, the chosen marked, and how many were pruned for which reason."""
    cost = _seconds if result.measured else _cycles
    for (variant, dtype, batch), rows, _ in pictures(result, "variant", "dtype", "batch"):
        groups = grouped(rows, "layer", "direction")
        layers = in_order((layer for layer, _ in groups), LAYERS)
        directions = in_order((direction for _, direction in groups), DIRECTIONS)
        order = [(layer, direction) for layer in layers for direction in directions if (layer, direction) in groups]
        trials = [groups[place] for place in order]
        what = "Tuning" if result.measured else "Dry run of tuning"
        than = "faster" if result.measured else "said to be faster"
        notes = [f"Every dot is a trial that was not pruned; left of the line it is {than} than the default"]
        height = 0.3 * len(order) + 2.2
        figure = new_figure(f"{what} of AlexNet ({variant}), {dtype}, batch {batch}", height, result, notes, ())
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_costs(left, trials, cost, "nothing was timed" if result.measured else "the model has no cycles of it")
        left.set_xlabel(f"{'time' if result.measured else 'modelled cycles'} over the default's (ratio)")
        _draw_outcomes(right, trials, figure, "timed" if result.measured else "would be timed")
        left.set_yticks(range(len(order)), [" ".join(place) for place in order], parse_math=False)
        left.set_ylim(len(order) - 0.4, -0.6)
        settle(figure)
        yield [variant, dtype, f"batch{batch}"], figure


def _seconds(row: Row) -> float | None:
    return float(row["time"]["median"]) if row.get("time") else None


def _cycles(row: Row) -> float | None:
    return None if row.get("pruned") else row.get("cycles")


def _draw_costs(axes: Axes, groups: Sequence[Sequence[Row]], cost: Callable[[Row], float | None], without: str) -> None:
    ours, default = STYLES[0], STYLES[1]
    seen: list[float] = [0.8, 1.25]
    for place, rows in enumerate(groups):
        costs = [(row, value) for row in rows if (value := cost(row)) is not None]
        base = next((value for row, value in costs if row.get("default")), None)
        if base is None:
            why = "the default has none" if costs else without
            axes.annotate(
                why, (1, place), (6, 0), textcoords="offset points", va="center", fontsize=8, backgroundcolor="white"
            )
            continue
        ratios = [value / base for _, value in costs]
        chosen = next((value / base for row, value in costs if row.get("chosen")), 1.0)
        seen += ratios
        axes.plot(ratios, [place] * len(ratios), "o", color=ours.colour, alpha=0.45, markersize=4, zorder=3)
        axes.plot(chosen, place, "*", color="black", markersize=10, zorder=4)
        axes.annotate(
            f"{chosen:.2f}", (min(ratios), place), (-8, 0), textcoords="offset points", ha="right", va="center",
            fontsize=8,
        )  # fmt: skip
    axes.plot([], [], "o", color=ours.colour, alpha=0.45, markersize=4, label="trial")
    axes.plot([], [], "*", color="black", markersize=10, label="chosen, with its ratio")
    axes.axvline(1, color=default.colour, linestyle=default.line, label="default")
    far = max(seen) > 4 * min(seen)
    if far:
        axes.set_xscale("log")
    axes.set_xlim(min(seen) / (1.35 if far else 1.25), max(seen) * 1.1)
    if far:
        plain_log(axes.xaxis)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8, frameon=False)
    tidy(axes)


def _draw_outcomes(axes: Axes, groups: Sequence[Sequence[Row]], figure: Figure, left_over: str) -> None:
    from matplotlib.ticker import MaxNLocator

    counts = [Counter(row["pruned"]["reason"] if row.get("pruned") else left_over for row in rows) for rows in groups]
    total = sum(counts, Counter[str]())
    reasons = [name for name, _ in total.most_common() if name != left_over]
    shown = [left_over, *reasons[:MOST_REASONS]]
    rarer = reasons[MOST_REASONS:]
    left = np.zeros(len(groups))
    for number, name in enumerate([*shown, *(["another reason"] if rarer else [])]):
        names = [name] if name in shown else rarer
        widths = np.array([sum(count[each] for each in names) for count in counts])
        style = STYLES[number % len(STYLES)]
        label = "\n".join(textwrap.wrap(f"{name} ({widths.sum():,})", 90))
        face = style.colour if not style.hatch else "white"
        (at,) = np.nonzero(widths)  # a bar of nothing would show its edge
        axes.barh(at, widths[at], 0.7, left[at], color=face, edgecolor=style.colour, hatch=style.hatch, label=label)
        left += widths
    axes.set_xlabel("trials (count)")
    axes.set_xlim(0, 1.03 * left.max())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes.get_legend_handles_labels()
    add_legend(figure, handles, labels, 1)
    tidy(axes)
    axes.grid(False, axis="y")
