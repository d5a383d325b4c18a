"""A timeline as a picture: a row a process, a block an action, what is idle left open."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from alexnet_triton.parallel.pipeline.schedules import KINDS
from alexnet_triton.parallel.pipeline.simulation import Block, Timeline

if TYPE_CHECKING:  # matplotlib is loaded when a picture is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
WIDTH = 10.0
"""Inches."""

ENDINGS = (".png", ".svg", ".pdf")


class Style(NamedTuple):
    """How a kind of block is told from the others: never by its colour alone."""

    colour: str
    text: str
    hatch: str


STYLES = {
    "F": Style("#0072b2", "white", ""),
    "B": Style("#e69f00", "black", "////"),
    "I": Style("#e69f00", "black", "////"),
    "W": Style("#009e73", "black", "...."),
}
"""Colours of Okabe and Ito (2008, https://jfly.uni-koeln.de/color/)."""

IDLE = "#eeeeee"


def check_path(path: Path) -> None:
    """Say before any work that no picture could be written there.

    Raises:
        ValueError: the name has none of `ENDINGS`.
    """
    if path.suffix not in ENDINGS:
        raise ValueError(f"a picture's name must end in {', '.join(ENDINGS)}, got {str(path)!r}")


def draw(
    timeline: Timeline,
    path: Path,
    title: str,
    *,
    images_per_second: float | None = None,
    rows: Sequence[str] = (),
    note: str = "",
) -> Path:
    """Draw a timeline, simulated or real, and give its path; the file is the old one or the whole new one.

    Args:
        timeline: what is drawn.
        path: of the picture, with an ending of `ENDINGS`; its folder is made where it is missing.
        title: its first line; the second has the bubble and the throughput.
        images_per_second: of training; None leaves it out.
        rows: a name for each process, in order; none: its number.
        note: where the times are from, for the foot of the picture.

    Raises:
        ValueError: another ending, or a timeline without a block that takes time.
    """
    import matplotlib

    check_path(path)
    if not timeline.makespan:
        raise ValueError("there is nothing to draw: the timeline has no block that takes time")
    unit = _unit(timeline.makespan)
    speed = "" if images_per_second is None else f", {images_per_second:,.0f} images/s"
    span = f"{unit.per_second * timeline.makespan:,.1f} {unit.name} from the first block to the last"
    heading = [*_lines(title, 10), f"bubble {timeline.bubble:.1%}{speed}; {span}"]
    figure = _figure(timeline, unit, rows, heading, _lines(note, 14.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):  # text stays text, ids the same
            figure.savefig(temporary, dpi=DPI, metadata={"Date": None} if path.suffix == ".svg" else None)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


class _Unit(NamedTuple):
    """Of the time axis."""

    name: str
    per_second: float


def _unit(seconds: float) -> _Unit:
    if seconds >= 2:
        return _Unit("s", 1.0)
    return _Unit("ms", 1e3) if seconds >= 2e-3 else _Unit("us", 1e6)


def _lines(text: str, letters_an_inch: float) -> list[str]:
    return textwrap.wrap(text, int(letters_an_inch * WIDTH), break_on_hyphens=False)


def _figure(
    timeline: Timeline, unit: _Unit, rows: Sequence[str], heading: Sequence[str], notes: Sequence[str]
) -> Figure:
    """The picture of a timeline, with its heading above and its notes below."""
    from matplotlib.figure import Figure

    height = 0.55 * len(timeline.processes) + 1.2 + 0.25 * len(heading) + 0.16 * len(notes)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    for row, process in enumerate(timeline.processes):
        end = unit.per_second * timeline.makespan
        axes.broken_barh([(0, end)], (row - 0.4, 0.8), facecolor=IDLE, linewidth=0)
        for kind in KINDS:
            blocks = [block for block in timeline.of(process) if block.kind == kind and block.end > block.start]
            if blocks:
                _draw_blocks(axes, kind, blocks, row, timeline, unit)
        idle = f"{timeline.idle(process):.0%} idle"
        axes.annotate(idle, (end, row), (6, 0), textcoords="offset points", va="center", size=8)
    _finish(axes, timeline, unit, rows)
    _add_legend(figure, timeline, heading)
    figure.supxlabel("\n".join(notes), x=0.01, ha="left", fontsize=8, color="#333333", parse_math=False)
    return figure


def _draw_blocks(axes: Axes, kind: str, blocks: Sequence[Block], row: int, timeline: Timeline, unit: _Unit) -> None:
    """A process's blocks of a kind, with their microbatch's number where the longest number would fit."""
    style = STYLES[kind]
    spans = [
        (unit.per_second * (block.start - timeline.start), unit.per_second * (block.end - block.start))
        for block in blocks
    ]
    across = WIDTH - 2.6  # inches of the whole span, beside the names and the idle shares
    inches = [across * (block.end - block.start) / timeline.makespan for block in blocks]
    axes.broken_barh(
        spans, (row - 0.4, 0.8), facecolor=style.colour, hatch=style.hatch, edgecolor="white",
        linewidth=0.8 if min(inches) > 0.06 else 0.2,
    )  # fmt: skip
    digits = len(str(max(block.microbatch for block in timeline.blocks)))
    box = {"boxstyle": "square,pad=0.1", "facecolor": style.colour, "edgecolor": "none"}
    for block, (left, width), wide in zip(blocks, spans, inches, strict=True):
        if wide > 0.08 * digits + 0.05:
            centre, number = left + width / 2, str(block.microbatch)
            axes.text(centre, row, number, ha="center", va="center", size=8, color=style.text, bbox=box)


def _finish(axes: Axes, timeline: Timeline, unit: _Unit, rows: Sequence[str]) -> None:
    names = list(rows) or [f"process {process}" for process in timeline.processes]
    axes.set_yticks(range(len(names)), names, fontsize=9, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, unit.per_second * timeline.makespan)
    axes.set_xlabel(f"time ({unit.name})")
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _add_legend(figure: Figure, timeline: Timeline, heading: Sequence[str]) -> None:
    """What the blocks mean, under the heading, which the layout would set on it otherwise."""
    from matplotlib.patches import Patch

    shown = [kind for kind in KINDS if any(block.kind == kind and block.end > block.start for block in timeline.blocks)]
    patches = [
        Patch(facecolor=STYLES[kind].colour, hatch=STYLES[kind].hatch, edgecolor="white", label=KINDS[kind])
        for kind in shown
    ]
    legend = figure.legend(
        handles=[*patches, Patch(facecolor=IDLE, label="idle")], loc="outside upper center", ncols=len(patches) + 1,
        fontsize=9, frameon=False, title="\n".join(heading), title_fontsize=11,
    )  # fmt: skip
    legend.get_title().set_multialignment("center")
    for text in (legend.get_title(), *legend.get_texts()):
        text.set_parse_math(False)
