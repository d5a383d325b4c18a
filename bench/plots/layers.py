"""The time of each layer and direction beside its floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from alexnet_triton.bench.plots.canvas import (
    Drawn,
    Style,
    add_legend,
    in_order,
    new_figure,
    pictures,
    settle,
    styles_of,
    three_digits,
    tidy,
)
from alexnet_triton.bench.plots.files import Result, Row
from alexnet_triton.bench.results import OURS
from alexnet_triton.tuning.launches import DIRECTIONS, LAYERS

if TYPE_CHECKING:  # matplotlib is loaded when a picture is drawn
    from matplotlib.axes import Axes


def layers(result: Result) -> Drawn:
    """A bar of time for each layer, direction and peer, with the layer's floor marked."""
    for (variant, dtype, batch), rows, failed in pictures(result, "variant", "dtype", "batch"):
        directions = in_order((row["direction"] for row in rows), DIRECTIONS)
        panels = {
            direction: {row["layer"]: row for row in rows if row["direction"] == direction} for direction in directions
        }
        peers = styles_of(rows)
        ends = [summary[name] for row in rows for summary in row["times"].values() for name in ("median", "p80")]
        longest = max(*ends, *(row["floor"] for row in rows))
        unit, scale = ("ms", 1e3) if longest >= 1e-2 else ("us", 1e6)
        counts = [len(panel) for panel in panels.values()]
        per_layer = 0.1 + 0.16 * len(peers)
        notes = [
            "Floor: the least time by the roofs, the longer of the layer's arithmetic and of moving its bytes once",
            "In brackets: times the floor"
            + ("; thin lines: 20th to 80th percentile" if result.measured else ", and what limits by the model"),
        ]
        title = f"Time of each layer of AlexNet ({variant}), {dtype}, batch {batch}"
        figure = new_figure(title, per_layer * sum(counts) + 0.9 * len(counts) + 0.3, result, notes, failed)
        heights = [count + 0.5 for count in counts]
        grid = figure.subplots(len(counts), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (direction, panel) in zip(grid, panels.items(), strict=True):
            _draw_bars(axes, [panel[name] for name in in_order(panel, LAYERS)], peers, unit, scale, result.measured)
            axes.set_title(direction, loc="left", fontsize=10, fontweight="bold")
            axes.set_xlim(0, 1.25 * scale * longest)
        entries = {
            label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        add_legend(figure, list(entries.values()), list(entries), len(entries))
        settle(figure)
        yield [variant, dtype, f"batch{batch}"], figure


def _draw_bars(
    axes: Axes, rows: Sequence[Row], peers: Mapping[str, Style], unit: str, scale: float, measured: bool
) -> None:
    thick = 0.8 / len(peers)
    for number, (peer, style) in enumerate(peers.items()):
        have = [(place, row) for place, row in enumerate(rows) if peer in row["times"]]
        if not have:
            continue
        centres = [place - 0.4 + (number + 0.5) * thick for place, _ in have]
        times = [row["times"][peer]["median"] for _, row in have]
        axes.barh(
            centres, [scale * time for time in times], 0.92 * thick, color=style.colour if peer == OURS else "white",
            edgecolor=style.colour, hatch=style.hatch, label=peer if measured else f"{peer}, estimate",
            xerr=_spread(have, peer, scale) if measured else None, error_kw={"elinewidth": 1, "ecolor": "#333333"},
        )  # fmt: skip
        for centre, time, (_, row) in zip(centres, times, have, strict=True):
            bound = f", {row['bound']}" if row.get("bound") else ""
            text = f"{three_digits(scale * time)} {unit} ({three_digits(time / row['floor'])}x{bound})"
            right = scale * max(row["times"][peer]["p80"], row["floor"])
            axes.annotate(text, (right, centre), (5, 0), textcoords="offset points", va="center", fontsize=8)
    for place, row in enumerate(rows):
        floor = scale * row["floor"]
        label = "floor" if not place else None
        axes.plot([floor, floor], [place - 0.46, place + 0.46], color="white", linewidth=4.5, zorder=3)
        axes.plot([floor, floor], [place - 0.46, place + 0.46], color="black", linewidth=2, zorder=4, label=label)
    axes.set_yticks(range(len(rows)), [row["layer"] for row in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"time ({unit})")
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.tick_params(labelbottom=True)
    tidy(axes)
    axes.grid(False, axis="y")


def _spread(have: Sequence[tuple[int, Row]], peer: str, scale: float) -> list[list[float]]:
    """From the median down to the 20th percentile, and up to the 80th."""
    summaries = [row["times"][peer] for _, row in have]
    down = [scale * max(0.0, each["median"] - each["p20"]) for each in summaries]
    return [down, [scale * max(0.0, each["p80"] - each["median"]) for each in summaries]]
