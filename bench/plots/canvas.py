"""What every picture has: its size, styles, title, legend, caption."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from alexnet_triton.bench.plots.files import Result, Row, failure_of
from alexnet_triton.bench.results import OURS

if TYPE_CHECKING:  # matplotlib is loaded when a picture is drawn
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

DPI = 120
WIDTH = 10.0
"""Inches. At the width of a web page, text of 9 points stays readable."""


class Style(NamedTuple):
    """How one of several is told from the others."""

    colour: str
    marker: str
    line: Any
    """As matplotlib takes it: a name, or the lengths of dashes and gaps."""
    hatch: str


STYLES = (
    Style("#0072b2", "o", "-", ""),
    Style("#d55e00", "s", "--", "////"),
    Style("#009e73", "^", "-.", "...."),
    Style("#e69f00", "D", ":", "\\\\\\\\"),
    Style("#cc79a7", "v", (0, (5, 1, 1, 1, 1, 1)), "xxxx"),
    Style("#56b4e9", "P", (0, (1, 1)), "----"),
    Style("#000000", "X", (0, (8, 3)), "++++"),
    Style("#8a8f98", "*", (0, (3, 3)), "oooo"),
)
"""In the order in which they are given out; the first is this package's."""


def new_figure(title: str, height: float, result: Result, notes: Iterable[str], failed: Iterable[Row]) -> Figure:
    """An empty picture with its title, and below the axes what the figures need."""
    from matplotlib.figure import Figure

    facts = {name: value for name, value in result.machine.items() if value}
    line = [str(facts["device"])]
    if result.on_cpu and "threads" in facts:
        line.append(f"{facts['threads']} threads")
    line += [f"{name} {facts[name]}" for name in ("driver", "clocks", "torch", "triton", "python") if name in facts]
    line += [str(facts["date"])] if "date" in facts else []
    line += [f"commit {facts['commit']}"] if "commit" in facts else []
    sentences = [", ".join(line), result.method, *notes]
    failures = "; ".join(failure_of(row) for row in failed)
    sentences += [f"Failed, so without a time: {failures}"] if failures else []
    lines = [part for text in sentences if text for part in textwrap.wrap(_sentence(text), int(14.5 * WIDTH))]
    figure = Figure(figsize=(WIDTH, height + 0.7 + 0.16 * len(lines)), layout="constrained")
    heading = "\n".join(textwrap.wrap(f"{title}, {result.title}", int(9.5 * WIDTH)))
    figure.suptitle(heading, fontsize=12, parse_math=False)
    # The label of the whole figure's x axis: the layout leaves room for it, as for no other text.
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8, color="#333333", parse_math=False)
    return figure


def add_legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str], columns: int) -> None:
    """A legend above all axes. It takes the heading over, since the layout would set one on the other."""
    heading = figure.get_suptitle()
    figure.suptitle("")
    legend = figure.legend(
        handles, labels, loc="outside upper center", ncols=columns, fontsize=9, frameon=False, handlelength=3.5,
        title=heading, title_fontsize=12,
    )  # fmt: skip
    legend.get_title().set_multialignment("center")
    for text in (legend.get_title(), *legend.get_texts()):
        text.set_parse_math(False)


def settle(figure: Figure) -> None:
    """Lay a picture out, once: what is then placed by pixels stays right, and both its files look alike."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


def pictures(result: Result, *keys: str) -> Iterator[tuple[tuple[Any, ...], list[Row], list[Row]]]:
    """Each picture's keys, its rows, and the failed rows that it lists: its own, and those of no picture."""
    groups, failed = grouped(result.rows, *keys), grouped(result.failed, *keys)
    of_none = [row for key, rows in failed.items() if key not in groups for row in rows]
    for key, rows in groups.items():
        yield key, rows, failed.get(key, []) + of_none


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of some keys, in the order in which they come."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return groups


def styles_of(rows: Iterable[Row]) -> dict[str, Style]:
    """Styles by peer, this package first."""
    names = dict.fromkeys(peer for row in rows for peer in row["times"])
    ordered = [OURS, *(name for name in names if name != OURS)]  # the first style stays ours where ours is missing
    return {name: STYLES[number % len(STYLES)] for number, name in enumerate(ordered) if name in names}


def in_order(found: Iterable[str], known: Sequence[str]) -> list[str]:
    """Names without repeats: known ones in their order, then others as they come."""
    names = list(dict.fromkeys(found))
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def plain_log(axis: Axis) -> None:
    """A logarithmic axis whose ticks are plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    least, most = axis.get_view_interval()
    subs = (1.0,) if most / least > 300 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def tidy(axes: Axes) -> None:
    """Leave the axes their left and lower edges and a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


Drawn = Iterator[tuple[list[str], "Figure"]]
"""The words of a picture's file name after the plot's, and the picture."""


def three_digits(value: float) -> str:
    """A number with three digits that count."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"
