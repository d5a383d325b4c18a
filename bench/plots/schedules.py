"""The work of a pipeline's processes in a step: as it was simulated, and as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alexnet_triton.bench.parallel_simulation import TASK
from alexnet_triton.bench.plots.canvas import Drawn, add_legend, new_figure, pictures, settle
from alexnet_triton.bench.plots.files import Result, Row, is_number
from alexnet_triton.parallel.pipeline.picture import IDLE, STYLES
from alexnet_triton.parallel.pipeline.schedules import KINDS
from alexnet_triton.parallel.pipeline.simulation import Block, Timeline

if TYPE_CHECKING:  # matplotlib is loaded when a picture is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Timelines = Mapping[str, Timeline]
"""Of a pipeline: `"simulated"` and `"real"`."""

ROW = 0.4
"""Inches of a process."""

NUMBERED = 0.02
"""Of the whole span: blocks that are wider show their microbatch."""


def schedules(result: Result) -> Drawn:
    """A panel for each pipeline that was traced: a row for each process, simulated and real."""
    traced = [row for row in result.rows if row["task"] == TASK and "blocks" in row]
    if not traced:
        raise ValueError(f"{result.path} has no traced pipeline; `bench parallel` traces them on a CPU")
    for (variant, dtype, batch), rows, _ in pictures(result, "variant", "dtype", "batch"):
        found = [(row, _timelines(row, result)) for row in rows if row in traced]
        if not found:
            continue
        heights = [sum(len(timeline.processes) for timeline in timelines.values()) for _, timelines in found]
        notes = ["Of the rounds, each panel shows the one whose bubble is in the middle; numbers are microbatches"]
        title = f"Training steps of AlexNet ({variant}) in a pipeline, {dtype}, batch {batch:,}"
        figure = new_figure(title, ROW * sum(heights) + 0.8 * len(found) + 0.4, result, notes, ())
        panels = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (row, timelines) in zip(panels, found, strict=True):
            _draw(axes, row, timelines)
        _add_legend(figure, [block for _, timelines in found for each in timelines.values() for block in each.blocks])
        settle(figure)
        yield [variant, dtype, f"batch{batch}"], figure


def _draw(axes: Axes, row: Row, timelines: Timelines) -> None:
    """A pipeline."""
    end = 1e3 * max(timeline.makespan for timeline in timelines.values())
    names: list[str] = []
    for which, timeline in timelines.items():
        for process in timeline.processes:
            place = len(names)
            names.append(f"{which}, stage {process}")
            axes.broken_barh([(0, 1e3 * timeline.makespan)], (place - 0.4, 0.8), facecolor=IDLE, linewidth=0)
            for kind in KINDS:
                _draw_kind(axes, kind, [block for block in timeline.of(process) if block.kind == kind], place, end)
            idle = f"{timeline.idle(process):.0%} idle"
            axes.annotate(idle, (end, place), (6, 0), textcoords="offset points", va="center", size=8)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, end)
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.set_xlabel("time (ms)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    bubbles = f"bubble {row['bubble']['median']:.1%}, simulated {row['simulated']['bubble']:.1%}"
    axes.set_title(f"{row['layout']}: {bubbles}", loc="left", fontsize=10, fontweight="bold", parse_math=False)


def _draw_kind(axes: Axes, kind: str, blocks: Sequence[Block], place: int, end: float) -> None:
    """A process's blocks of a kind; `end` is the panel's, in milliseconds."""
    spans = [(1e3 * block.start, 1e3 * (block.end - block.start)) for block in blocks]
    style = STYLES[kind]
    axes.broken_barh(
        spans, (place - 0.4, 0.8), facecolor=style.colour, hatch=style.hatch, edgecolor="white", linewidth=0.6
    )
    box = {"boxstyle": "square,pad=0.1", "facecolor": style.colour, "edgecolor": "none"}
    for block, (left, width) in zip(blocks, spans, strict=True):
        if width > NUMBERED * end:
            centre, number = left + width / 2, str(block.microbatch)
            axes.text(centre, place, number, ha="center", va="center", size=8, color=style.text, bbox=box)


def _add_legend(figure: Figure, blocks: Sequence[Block]) -> None:
    from matplotlib.patches import Patch

    kinds = [kind for kind in KINDS if any(block.kind == kind for block in blocks)]
    patches = [Patch(facecolor=STYLES[kind].colour, hatch=STYLES[kind].hatch, edgecolor="white") for kind in kinds]
    add_legend(figure, [*patches, Patch(facecolor=IDLE)], [*(KINDS[kind] for kind in kinds), "idle"], len(kinds) + 1)


def _timelines(row: Row, result: Result) -> dict[str, Timeline]:
    """A row's timelines, without blocks that take no time.

    Raises:
        ValueError: what is there is none.
    """
    try:
        return {which: _timeline(row["blocks"][which]) for which in ("simulated", "real")}
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f'{result.path}: "blocks" of {row["layout"]} must have "simulated" and "real", each a list of process, '
            "stage, kind, microbatch, start and end; run bench parallel again"
        ) from None


def _timeline(blocks: Sequence[Sequence[Any]]) -> Timeline:
    found = [Block(*block) for block in blocks]
    for block in found:
        if block.kind not in KINDS or not all(
            map(is_number, (block.process, block.microbatch, block.start, block.end))
        ):
            raise ValueError("no block")
    timeline = Timeline(tuple(block for block in found if block.end > block.start))
    if not timeline.makespan:
        raise ValueError("no time")
    return timeline
