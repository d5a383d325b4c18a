"""Images a second against the batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alexnet_triton.bench.plots.canvas import (
    WIDTH,
    Drawn,
    Style,
    add_legend,
    grouped,
    new_figure,
    plain_log,
    settle,
    styles_of,
    tidy,
)
from alexnet_triton.bench.plots.files import Result, Row
from alexnet_triton.bench.results import OURS

if TYPE_CHECKING:  # matplotlib is loaded when a picture is drawn
    from matplotlib.axes import Axes


def throughput(result: Result) -> Drawn:
    """Images a second over the batch size, a line for each peer, a panel for each task, variant and dtype."""
    of = ("variant", "dtype") if result.benchmark == "model" else ("size", "dtype")
    kinds = list(grouped(result.rows, *of))
    tasks = list(dict.fromkeys(row["task"] for row in result.rows))
    peers = styles_of(result.rows)
    absent: dict[str, str] = {}
    for row in result.rows:
        absent.update(row.get("absent") or {})
    notes = ["Bars from the 20th to the 80th percentile of the times, where they are wider than the marker"]
    if absent:
        notes.append(f"Not run here: {'; '.join(f'{peer}: {why}' for peer, why in absent.items())}")
    title = "Throughput of AlexNet" if result.benchmark == "model" else "Throughput of LPIPS's AlexNet"
    columns = min(len(peers), int(WIDTH / (0.9 + 0.075 * max(map(len, peers)))))  # a name's width, as 9 points have it
    figure = new_figure(title, 3.2 * len(kinds) + 0.25 * -(-len(peers) // columns), result, notes, result.failed)
    grid = figure.subplots(len(kinds), len(tasks), squeeze=False)
    drawn: dict[str, Any] = {}
    for number, kind in enumerate(kinds):
        for column, task in enumerate(tasks):
            axes = grid[number, column]
            rows = [row for row in result.rows if row["task"] == task and tuple(row[key] for key in of) == kind]
            if not rows:
                axes.axis("off")
                continue
            for peer, line in _draw_throughput(axes, rows, peers):
                drawn.setdefault(peer, line)
            name = kind[0] if result.benchmark == "model" else f"{kind[0]:g} pixels"
            axes.set_title(f"{task}, {name}, {kind[1]}", loc="left", fontsize=10, fontweight="bold")
    add_legend(figure, list(drawn.values()), list(drawn), columns)
    settle(figure)
    yield [result.benchmark], figure


def _draw_throughput(axes: Axes, rows: Sequence[Row], peers: Mapping[str, Style]) -> Iterator[tuple[str, Any]]:
    speeds: list[float] = []
    for peer, style in peers.items():
        points = sorted((row["batch"], row["times"][peer]) for row in rows if peer in row["times"])
        if not points:
            continue
        batches = [batch for batch, _ in points]
        middle = [batch / times["median"] for batch, times in points]
        low = [max(0.0, speed - batch / times["p80"]) for speed, (batch, times) in zip(middle, points, strict=True)]
        high = [max(0.0, batch / times["p20"] - speed) for speed, (batch, times) in zip(middle, points, strict=True)]
        fill = style.colour if peer == OURS else "white"
        line = axes.errorbar(
            batches, middle, [low, high], color=style.colour, marker=style.marker, linestyle=style.line,
            markerfacecolor=fill, markersize=6, linewidth=1.6, elinewidth=1, zorder=4 if peer == OURS else 3,
        )  # fmt: skip
        speeds += middle
        yield peer, line
    batches = sorted({row["batch"] for row in rows})
    axes.set_xscale("log")
    axes.set_xlim(batches[0] / 1.4, batches[-1] * 1.4)
    axes.set_xticks(batches, [f"{batch:,g}" for batch in batches])
    axes.minorticks_off()
    if max(speeds) > 20 * min(speeds):  # from zero, the slow end could not be read
        axes.set_yscale("log")
        axes.set_ylim(min(speeds) / 1.6, max(speeds) * 1.6)
        plain_log(axes.yaxis)
    else:
        axes.set_ylim(0, 1.12 * max(speeds))
        axes.yaxis.set_major_formatter("{x:,.10g}")
    axes.set(xlabel="batch size (images)", ylabel="throughput (images/s)")
    tidy(axes)
