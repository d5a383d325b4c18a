"""What became of the candidates of each layer and direction."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Sequence
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
from alexnet_triton.tuning.inspect import DIRECTIONS, LAYERS

if TYPE_CHECKING:  # matplotlib is loaded when a picture is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_REASONS = 5
"""Reasons for pruning that are told apart; rarer ones are counted together."""


def tuning(result: Result) -> Drawn:
    """Each candidate's time over the default's, the best marked, and how many were pruned for which reason."""
    for (variant, dtype, batch), rows, _ in pictures(result, "variant", "dtype", "batch"):
        groups = grouped(rows, "layer", "direction")
        layers = in_order((layer for layer, _ in groups), LAYERS)
        directions = in_order((direction for _, direction in groups), DIRECTIONS)
        order = [(layer, direction) for layer in layers for direction in directions if (layer, direction) in groups]
        candidates = [groups[place] for place in order]
        timed = any(row.get("time") for row in rows)
        what = "Tuning" if timed else "Dry run of tuning"
        network = f" of AlexNet ({variant})" if variant else ""
        notes = ["Reasons that differ in their numbers alone count as one, with n for the number"]
        if timed:
            notes.insert(0, "Every dot is a candidate; left of the line it is faster than the default")
        height = 0.3 * len(order) + 2.2
        figure = new_figure(f"{what}{network}, {dtype}, batch {batch}", height, result, notes, ())
        grid = figure.subplots(1, 1 + timed, sharey=True, squeeze=False)[0]
        if timed:
            _draw_candidates(grid[0], candidates)
        _draw_pruned(grid[-1], candidates, figure)
        grid[0].set_yticks(range(len(order)), [" ".join(place) for place in order], parse_math=False)
        grid[0].set_ylim(len(order) - 0.4, -0.6)
        settle(figure)
        yield [*([variant] if variant else []), dtype, f"batch{batch}"], figure


def _draw_candidates(axes: Axes, groups: Sequence[Sequence[Row]]) -> None:
    ours, default = STYLES[0], STYLES[1]
    seen: list[float] = [0.8, 1.25]
    for place, rows in enumerate(groups):
        times = [row["time"] for row in rows if row.get("time")]
        base = next((row["time"] for row in rows if row.get("default") and row.get("time")), None)
        if not base:
            why = "the default has no time" if times else "nothing timed"
            axes.annotate(why, (1, place), (6, 0), textcoords="offset points", va="center", fontsize=8)
            continue
        ratios = [time / base for time in times]
        seen += ratios
        axes.plot(ratios, [place] * len(ratios), "o", color=ours.colour, alpha=0.45, markersize=4, zorder=3)
        axes.plot(min(ratios), place, "*", color="black", markersize=10, zorder=4)
        axes.annotate(
            f"{min(ratios):.2f}", (min(ratios), place), (-7, 0), textcoords="offset points", ha="right", va="center",
            fontsize=8,
        )  # fmt: skip
    axes.plot([], [], "o", color=ours.colour, alpha=0.45, markersize=4, label="candidate")
    axes.plot([], [], "*", color="black", markersize=10, label="best")
    axes.axvline(1, color=default.colour, linestyle=default.line, label="default")
    axes.set_xscale("log")
    axes.set_xlim(min(seen) / 1.35, max(seen) * 1.1)
    plain_log(axes.xaxis)
    axes.set_xlabel("time over the default's (ratio)")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8, frameon=False)
    tidy(axes)


def _draw_pruned(axes: Axes, groups: Sequence[Sequence[Row]], figure: Figure) -> None:
    from matplotlib.ticker import MaxNLocator

    counts = [Counter(_outcome(row) for row in rows) for rows in groups]
    total = sum(counts, Counter[str]())
    reasons = [name for name, _ in total.most_common() if name not in OUTCOMES]
    shown = [name for name in OUTCOMES if name in total] + reasons[:MOST_REASONS]
    rarer = reasons[MOST_REASONS:]
    left = np.zeros(len(groups))
    for number, name in enumerate([*shown, *(["another reason"] if rarer else [])]):
        names = [name] if name in shown else rarer
        widths = np.array([sum(count[each] for each in names) for count in counts])
        style = STYLES[number % len(STYLES)]
        label = "\n".join(textwrap.wrap(f"{name} ({widths.sum():,})", 90))
        face = style.colour if not style.hatch else "white"
        axes.barh(
            range(len(groups)), widths, 0.7, left, color=face, edgecolor=style.colour, hatch=style.hatch, label=label
        )
        left += widths
    axes.set_xlabel("candidates (count)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes.get_legend_handles_labels()
    add_legend(figure, handles, labels, 1)
    tidy(axes)
    axes.grid(False, axis="y")


OUTCOMES = ("timed", "not timed")
"""Of a candidate that was not pruned."""


def _outcome(row: Row) -> str:
    """What became of a candidate: the numbers of a reason are its own, and do not make it another one."""
    if row.get("pruned"):
        return re.sub(r"\d[\d.,]*\d|\d", "n", row["pruned"])
    return OUTCOMES[0] if row.get("time") else OUTCOMES[1]
