"""Pictures of result files: `roofline`, `throughput`, `layers` and `tuning`, each written as PNG and SVG.

A picture shows one file's figures and names their machine, versions and method below them. It never mixes two machines,
says where figures are a CPU's or a model's estimate, and lists what failed its check and so has no time.
Colours are Okabe and Ito's (2008, https://jfly.uni-koeln.de/color/), and never tell two things apart by themselves:
markers, hatches and line styles differ too.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from alexnet_triton.tuning.inspect import DIRECTIONS, LAYERS

if TYPE_CHECKING:  # matplotlib is loaded when a picture is drawn
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

OURS = "alexnet_triton"
DPI = 120
WIDTH = 10.0
"""Inches. At the width of a web page, text of 9 points stays readable."""

Row = Mapping[str, Any]


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


# --- the files ----------------------------------------------------------------------------------------------------

LAYER = {"variant": str, "layer": str, "direction": str, "dtype": str, "batch": int}
WORK = {"flop": float, "bytes": float, "floor": float}
FIELDS: Mapping[str, Mapping[str, type]] = {
    "layers": {**LAYER, **WORK},
    "model": {"task": str, "variant": str, "dtype": str, "batch": int},
    "lpips": {"task": str, "size": int, "dtype": str, "batch": int},
    "predict": {**LAYER, **WORK, "estimate": float},
    "tuning": {"layer": str, "direction": str, "dtype": str, "batch": int, "config": str},
}
"""By benchmark, what every row must have: texts, counts, and numbers, in operations, bytes and seconds."""

OPTIONAL: Mapping[str, type] = {"variant": str, "torch_bytes": float, "bound": str, "failed": str, "absent": dict}
"""What a row may have; null counts as not there."""


@dataclass(frozen=True)
class Result:
    """A result file that has been read and checked."""

    path: Path
    benchmark: str
    """Of `FIELDS`."""
    machine: Mapping[str, Any]
    method: str
    measured: bool
    """False for a model's estimate."""
    roofs: Mapping[str, Any]
    rows: Sequence[Row]
    """Each with `times`, summaries in seconds by peer; a tuning log's rows as they are."""
    failed: Sequence[Row]
    """Those that have no time, each with a sentence under `failed`."""

    @property
    def title(self) -> str:
        """Where the figures are from: said in every title."""
        device = str(self.machine["device"])
        if not self.measured:
            return f"a model's estimate for {device}"
        return "on a CPU" if self.on_cpu else f"on {device}"

    @property
    def on_cpu(self) -> bool:
        """Whether the machine is a CPU."""
        return str(self.machine["device"]).startswith("CPU")


def read(path: Path, benchmarks: Sequence[str]) -> Result:
    """Read a result file.

    Args:
        path: a JSON file that a benchmark has written.
        benchmarks: those that are wanted, of `FIELDS`.

    Raises:
        ValueError: the file is missing, no JSON, another benchmark's, lacks something, or has no row with a time.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # of the encoding, and of the JSON
        raise ValueError(f"{path} is no JSON file: {error}") from error
    wanted = " or ".join(f'"{name}"' for name in benchmarks)
    benchmark: Any = content.get("benchmark") if isinstance(content, dict) else None
    if benchmark not in benchmarks:
        found = "no benchmark's name" if benchmark is None else f"benchmark {json.dumps(benchmark)}"
        raise ValueError(f"{path} holds {found}; this plot takes {wanted}")
    machine, rows = content.get("machine"), content.get("rows")
    if not isinstance(machine, dict) or not isinstance(machine.get("device"), str):
        raise ValueError(f'{path} does not name its machine (no "machine" with a "device")')
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} has no rows; run the benchmark again")
    kept: list[Row] = []
    places: dict[tuple[Any, ...], int] = {}
    failed: list[Row] = []
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        _check_fields(row, FIELDS[benchmark], where)
        place = tuple(row[name] for name, kind in FIELDS[benchmark].items() if kind is not float)
        if benchmark != "tuning" and places.setdefault(place, number) != number:
            raise ValueError(f"{where} is for the same as row {places[place]}")
        if benchmark == "tuning":
            _check_candidate(row, where)
            kept.append(row)
        elif row.get("failed"):
            failed.append(row)
        else:
            kept.append({**row, "times": _times(row, benchmark, where)})
    if not kept:
        raise ValueError(f"{path} has no row with a time: all {len(rows)} failed. {_failure(failed[0])}")
    method = content.get("method")
    measured = benchmark != "predict" and content.get("measured") is not False
    return Result(
        path, benchmark, machine, method if isinstance(method, str) else "", measured,
        content.get("roofs") or {}, kept, failed,
    )  # fmt: skip


def _check_fields(row: Any, fields: Mapping[str, type], where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no object")
    given = {name: kind for name, kind in OPTIONAL.items() if row.get(name) is not None}
    for name, kind in {**given, **fields}.items():
        value: Any = row.get(name)
        if kind is float:
            least = "a number from 0 on" if name == "flop" else "a positive number"
            fits = _is_number(value) and (value > 0 or (name == "flop" and value == 0))
        elif kind is int:
            least, fits = "a count from 1 on", type(value) is int and value > 0
        elif kind is str:
            least, fits = "a text", isinstance(value, str) and value != ""
        else:
            least, fits = "an object", isinstance(value, kind)
        if not fits:
            raise ValueError(f'{where}: "{name}" must be {least}, got {json.dumps(value)}')


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _times(row: Row, benchmark: str, where: str) -> dict[str, Mapping[str, float]]:
    if benchmark == "predict":
        estimate: float = row["estimate"]
        return {OURS: {"median": estimate, "p20": estimate, "p80": estimate}}
    times = row.get("times")
    if not isinstance(times, dict) or not times:
        raise ValueError(f'{where} has neither "times" nor "failed"')
    for peer, summary in times.items():
        for name in ("median", "p20", "p80"):
            value: Any = summary.get(name) if isinstance(summary, dict) else None
            if not _is_number(value) or value <= 0:
                raise ValueError(f'{where}: "{name}" of {peer} must be positive seconds, got {json.dumps(value)}')
    return times


def _check_candidate(row: Row, where: str) -> None:
    time: Any = row.get("time")
    pruned: Any = row.get("pruned")
    if time is not None and (not _is_number(time) or time <= 0):
        raise ValueError(f'{where}: "time" must be positive seconds or null, got {json.dumps(time)}')
    if pruned is not None and not isinstance(pruned, str):
        raise ValueError(f'{where}: "pruned" must be a sentence or null, got {json.dumps(pruned)}')


def _failure(row: Row) -> str:
    words = [row.get("layer") or row.get("task"), row.get("direction"), row.get("variant"), row["dtype"]]
    return f"{' '.join(word for word in words if word)} batch {row['batch']}: {row['failed']}"


# --- what every picture has ---------------------------------------------------------------------------------------


def run(kind: str, results: Sequence[Path] = (), out: Path = Path("bench-out")) -> list[Path]:
    """Draw result files, print the pictures' paths, and give them.

    Every file gets its own pictures, of each variant, dtype and batch where the plot is of one. Where several files are
    given, their names come first in the pictures' names.

    Args:
        kind: of `PLOTS`.
        results: files that benchmarks have written; none: this machine is measured first, into `out`.
        out: folder of the pictures; made where it is missing.

    Raises:
        ValueError: a file is missing or not what the plot takes, two files have the same name, or there is nothing to
            measure for this plot.
    """
    if kind not in PLOTS:
        raise ValueError(f"plot must be one of {', '.join(PLOTS)}, got {kind!r}")
    plot = PLOTS[kind]
    paths = [Path(path) for path in results] or [_measure(kind, out)]
    twice = [stem for stem, times in Counter(path.stem for path in paths).items() if times > 1]
    if twice:
        raise ValueError(
            f"two results are called {twice[0]}: their pictures would be too; draw each with its own --out"
        )
    written: list[Path] = []
    for result in [read(path, plot.benchmarks) for path in paths]:
        prefix = [result.path.stem] if len(paths) > 1 else []
        for names, figure in plot.draw(result):
            stem = "-".join(re.sub(r"[^\w.]+", "_", word) for word in [kind, *prefix, *names])
            written += _save(figure, out, stem)
    for path in written:
        print(f"written to {path}")
    return written


def _measure(kind: str, out: Path) -> Path:
    if kind == "tuning":
        raise ValueError("plot tuning draws a tuning log and runs no tuning itself: give the log by --results")
    if kind == "throughput":
        from alexnet_triton.bench import model

        model.run(out)
        return out / "model.json"
    from alexnet_triton.bench import layers

    layers.run(out)
    return out / "layers.json"


def _save(figure: Figure, out: Path, stem: str) -> list[Path]:
    import matplotlib

    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{stem}.png", out / f"{stem}.svg"]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": stem}):  # text stays text, ids stay the same
        figure.savefig(paths[0], dpi=DPI)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _figure(title: str, height: float, result: Result, notes: Iterable[str], failed: Iterable[Row]) -> Figure:
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
    failures = "; ".join(_failure(row) for row in failed)
    sentences += [f"Failed, so without a time: {failures}"] if failures else []
    lines = [part for text in sentences if text for part in textwrap.wrap(_sentence(text), int(14.5 * WIDTH))]
    figure = Figure(figsize=(WIDTH, height + 0.7 + 0.16 * len(lines)), layout="constrained")
    heading = "\n".join(textwrap.wrap(f"{title}, {result.title}", int(9.5 * WIDTH)))
    figure.suptitle(heading, fontsize=12, parse_math=False)
    # The label of the whole figure's x axis: the layout leaves room for it, as for no other text.
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8, color="#333333", parse_math=False)
    return figure


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str], columns: int) -> None:
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


def _settle(figure: Figure) -> None:
    """Lay a picture out, once: what is then placed by pixels stays right, and both its files look alike."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _pictures(result: Result, *keys: str) -> Iterator[tuple[tuple[Any, ...], list[Row], list[Row]]]:
    """Each picture's keys, its rows, and the failed rows that it lists: its own, and those of no picture."""
    groups, failed = _groups(result.rows, *keys), _groups(result.failed, *keys)
    of_none = [row for key, rows in failed.items() if key not in groups for row in rows]
    for key, rows in groups.items():
        yield key, rows, failed.get(key, []) + of_none


def _groups(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return groups


def _peers(rows: Iterable[Row]) -> dict[str, Style]:
    """Styles by peer, this package first."""
    names = dict.fromkeys(peer for row in rows for peer in row["times"])
    ordered = [OURS, *(name for name in names if name != OURS)]  # the first style stays ours where ours is missing
    return {name: STYLES[number % len(STYLES)] for number, name in enumerate(ordered) if name in names}


def _in_order(found: Iterable[str], known: Sequence[str]) -> list[str]:
    """Names without repeats: known ones in their order, then others as they come."""
    names = list(dict.fromkeys(found))
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def _plain_log(axis: Axis) -> None:
    """A logarithmic axis whose ticks are plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    least, most = axis.get_view_interval()
    subs = (1.0,) if most / least > 300 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


Drawn = Iterator[tuple[list[str], "Figure"]]
"""The words of a picture's file name after the plot's, and the picture."""


# --- roofline -----------------------------------------------------------------------------------------------------


def roofline(result: Result) -> Drawn:
    """Arithmetic a second over arithmetic a byte, a panel for each direction (Williams, Waterman, Patterson 2009).

    Raises:
        ValueError: the roofs of the rows' dtypes are missing.
    """
    for (variant, dtype, batch), rows, failed in _pictures(result, "variant", "dtype", "batch"):
        copy, peaks = _roofs(result, dtype)
        unit, scale = ("TFLOP/s", 1e12) if peaks[dtype] >= 1e12 else ("GFLOP/s", 1e9)
        drawn, edge = _with_intensity(rows, max(peaks.values()) / copy)
        directions = _in_order((row["direction"] for row in rows), DIRECTIONS)
        title = f"Roofline of AlexNet ({variant}), {dtype}, batch {batch}"
        figure = _figure(title, 4.3 * len(directions), result, _roofline_notes(result, rows), failed)
        grid = figure.subplots(len(directions), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        _limit(grid[0], drawn, copy, peaks, scale)
        panels = {direction: [row for row in drawn if row["direction"] == direction] for direction in directions}
        texts: list[list[Any]] = []
        for axes, (direction, chosen) in zip(grid, panels.items(), strict=True):
            texts.append(_draw_roofs(axes, copy, peaks, dtype, unit, scale))
            if any(row["without"] for row in chosen):
                axes.axvspan(axes.get_xlim()[0], edge, color="#eeeeee", zorder=0)
                middle = math.sqrt(axes.get_xlim()[0] * edge)
                of_axes = axes.get_xaxis_transform()
                axes.text(middle, 0.97, "no matrix products", ha="center", va="top", fontsize=8, transform=of_axes)
            _draw_points(axes, chosen, _peers(drawn), result, scale)
            axes.set_title(direction, loc="left", fontsize=10, fontweight="bold")
            axes.set_ylabel(f"arithmetic speed ({unit})")
            axes.set_xlabel("arithmetic intensity (FLOP per byte moved)")
            axes.tick_params(labelbottom=True)
            _tidy(axes)
        handles, labels = grid[0].get_legend_handles_labels()
        _legend(figure, handles, labels, len(labels))
        _settle(figure)
        for axes, chosen, written in zip(grid, panels.values(), texts, strict=True):
            _label_points(axes, chosen, scale, _roof_line(axes, copy, peaks[dtype], scale), written)
        yield [variant, dtype, f"batch{batch}"], figure


def _with_intensity(rows: Sequence[Row], ridge: float) -> tuple[list[Row], float]:
    """Rows that all have arithmetic, and the intensity left of which it is not theirs.

    A layer without products has no place on a roofline. It gets one left of all others, side by side with its like,
    as if it did so many operations a byte: there its distance from the copy roof shows its share of that roof.
    """
    real = [_intensity(row, peer) for row in rows if row["flop"] for peer in row["times"]]
    edge = min([ridge, *real]) / 1.5
    names = _in_order((row["layer"] for row in rows if not row["flop"]), LAYERS)
    nominal = {name: edge / 1.3 / 1.8 ** (len(names) - 1 - number) for number, name in enumerate(names)}
    drawn: list[Row] = []
    for row in rows:
        if row["flop"]:
            drawn.append({**row, "without": False})
        else:  # torch's point straight below, since bytes a second of the same bytes is what is compared
            flop = row["bytes"] * nominal[row["layer"]]
            drawn.append({**row, "without": True, "flop": flop, "torch_bytes": row["bytes"]})
    return drawn, edge


def _roofline_notes(result: Result, rows: Sequence[Row]) -> list[str]:
    source = "measured on this machine" if result.measured else "of a source that is not named"
    if result.roofs.get("source"):
        source = f"from {result.roofs['source']}"
    intensity = "Intensity: operations over the bytes that the fused op must move at least"
    if any(row.get("torch_bytes") for row in rows):
        intensity += "; of torch's ops, over what its separate passes (bias, ReLU, normalisation) move"
    elif any(peer != OURS for row in rows for peer in row["times"]):
        intensity += "; torch's points stand at the same intensity, so arrows show time alone"
    notes = [f"Roofs: {source}", intensity]
    names = _in_order((row["layer"] for row in rows if not row["flop"]), LAYERS)
    if names:
        notes.append(
            f"No matrix products: {', '.join(names)}. They stand at the left, where the intensity means nothing and "
            "the distance from the copy roof shows the share of it that they reach"
        )
    return notes


def _draw_points(axes: Axes, rows: Sequence[Row], peers: Mapping[str, Style], result: Result, scale: float) -> None:
    for peer, style in peers.items():
        at = [(_intensity(row, peer), _speed(row, peer, scale)) for row in rows if peer in row["times"]]
        role = f"{peer}{'' if result.measured else ', estimate'}"
        if not result.on_cpu:  # there this package runs plain PyTorch too
            role += " (fused)" if peer == OURS else " (unfused)"
        axes.plot(
            [x for x, _ in at], [y for _, y in at], style.marker, color=style.colour, markersize=6.5, zorder=4,
            markeredgewidth=1.6, markerfacecolor=style.colour if peer == OURS else "none", label=role,
        )  # fmt: skip


def _roofs(result: Result, dtype: str) -> tuple[float, dict[str, float]]:
    """Bytes a second, and operations a second by dtype."""
    roofs = result.roofs if isinstance(result.roofs, dict) else {}
    copy: Any = roofs.get("copy_gbs")
    tflops: Any = roofs.get("tflops")
    found = tflops.items() if isinstance(tflops, dict) else ()
    peaks = {name: 1e12 * value for name, value in found if _is_number(value) and value > 0}
    if not _is_number(copy) or copy <= 0 or dtype not in peaks:
        raise ValueError(f'{result.path}: "roofs" must hold positive "copy_gbs" and "tflops" of {dtype}')
    return 1e9 * copy, peaks


def _intensity(row: Row, peer: str) -> float:
    return row["flop"] / (row["bytes"] if peer == OURS else row.get("torch_bytes") or row["bytes"])


def _speed(row: Row, peer: str, scale: float) -> float:
    return row["flop"] / row["times"][peer]["median"] / scale


def _limit(axes: Axes, rows: Sequence[Row], copy: float, peaks: Mapping[str, float], scale: float) -> None:
    at = [(_intensity(row, peer), _speed(row, peer, scale)) for row in rows for peer in row["times"]]
    xs, ys = zip(*at, strict=True)
    ridge, top = max(peaks.values()) / copy, max(peaks.values()) / scale
    left = min(*xs, ridge) / 2.5
    axes.set(xscale="log", yscale="log")
    axes.set_xlim(left, 4 * max(*xs, ridge))
    axes.set_ylim(min(*ys, copy * left / scale) / 1.5, 2.2 * max(*ys, top))
    _plain_log(axes.xaxis)
    _plain_log(axes.yaxis)


def _roof_line(axes: Axes, copy: float, peak: float, scale: float) -> list[tuple[float, float]]:
    """The roof as a row of points, close together."""
    left, right = axes.get_xlim()
    return [(x, min(copy * x, peak) / scale) for x in np.geomspace(left, right, 120)]


def _draw_roofs(axes: Axes, copy: float, peaks: Mapping[str, float], dtype: str, unit: str, scale: float) -> list[Any]:
    """Draw the roofs, and give their texts, the slanted one first."""
    left, right = axes.get_xlim()
    ridge = max(peaks.values()) / copy
    axes.plot([left, ridge], [copy * left / scale, copy * ridge / scale], color="black", linewidth=1.6)
    x, y = 1.15 * left, 1.2 * copy * 1.15 * left / scale
    texts = [
        axes.text(
            x, y, f"copy: {_three_digits(copy / 1e9)} GB/s", rotation=math.degrees(math.atan2(y, x)),
            rotation_mode="anchor", transform_rotates_text=True, fontsize=8,
        )
    ]  # fmt: skip
    bottom, top = axes.get_ylim()
    below, line_height = 0.0, (top / bottom) ** 0.045
    for name, peak in sorted(peaks.items(), key=lambda item: item[1]):
        own = name == dtype
        line: Any = "-" if own else (0, (4, 3))
        colour = "black" if own else "#666666"
        width = 1.6 if own else 1.0
        axes.plot([peak / copy, right], [peak / scale] * 2, linestyle=line, color=colour, linewidth=width)
        height = max(peak / scale, below * line_height)  # above the text of a roof that is as high
        text = f"{name}: {_three_digits(peak / scale)} {unit}"
        texts.append(
            axes.annotate(
                text, (right, height), (-4, 2), textcoords="offset points", ha="right", fontsize=8, color=colour
            )
        )
        below = height
    return texts


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


Box = tuple[float, float, float, float]
"""Left, bottom, right and top in pixels."""


def _label_points(
    axes: Axes, rows: Sequence[Row], scale: float, roof: Sequence[tuple[float, float]], texts: Iterable[Any]
) -> None:
    """Arrows from torch's points to ours, and beside each of ours its layer's name, where nothing else is.

    Args:
        axes: where the points are, in the layout that stays.
        rows: of the points.
        scale: operations a second of the unit.
        roof: points of the roof, which names keep off.
        texts: of the roofs, the slanted one first, which names keep off too.
    """
    figure = axes.figure
    pixels = figure.dpi / 72
    taken: list[np.ndarray] = [axes.transData.transform(point) for point in roof]
    heads: list[np.ndarray] = []
    for row in rows:
        ends = {peer: (_intensity(row, peer), _speed(row, peer, scale)) for peer in row["times"]}
        head = ends.get(OURS) or next(iter(ends.values()))
        heads.append(axes.transData.transform(head))
        for tail in ends.values():
            start = axes.transData.transform(tail)
            way = heads[-1] - start
            length = float(np.hypot(*way))
            taken += [start + 5 * pixels * np.array([math.cos(turn), math.sin(turn)]) for turn in range(6)]
            taken += [start + share * way for share in np.linspace(0, 1, 2 + int(length / 4))]
            if length > 12 * pixels:
                arrow = {"arrowstyle": "-|>", "color": "#555555", "linewidth": 0.9, "shrinkA": 5, "shrinkB": 5}
                axes.annotate("", head, tail, arrowprops=arrow, zorder=3)
    frame = axes.get_window_extent()
    slanted, *flat = (text.get_window_extent() for text in texts)
    taken += list(np.linspace(slanted.p0, slanted.p1, 30))
    written: list[Box] = [box.extents for box in flat]
    for number in sorted(range(len(rows)), key=lambda number: heads[number][0]):
        name, point = rows[number]["layer"], heads[number]
        text = axes.text(0, 0, name, fontsize=9, parse_math=False)
        size = np.array(text.get_window_extent().size) + np.array([3 * pixels, 0])
        text.remove()
        others = np.array(heads[:number] + heads[number + 1 :]).reshape(-1, 2)
        offset, box = _best_place(point, size, pixels, frame.extents, np.array(taken), others, written)
        written.append(box)
        far = abs(offset[0]) - size[0] / 2 > 11 * pixels or abs(offset[1]) - size[1] / 2 > 11 * pixels
        at = tuple(axes.transData.inverted().transform(point))
        line = {"arrowstyle": "-", "color": "#888888", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
        axes.annotate(
            name, at, tuple(offset / pixels), textcoords="offset points", ha="center",
            va="center", fontsize=9, parse_math=False, zorder=5, arrowprops=line if far else None,
        )  # fmt: skip
        if far:
            taken += [point + share * offset for share in np.linspace(0.2, 0.8, 8)]


def _best_place(
    point: np.ndarray, size: np.ndarray, pixels: float, frame: Box, taken: np.ndarray, others: np.ndarray,
    written: Sequence[Box],
) -> tuple[np.ndarray, Box]:  # fmt: skip
    """Where a name goes: off what is written and drawn, nearer to its own point than to others, and not far.

    Args:
        point: the name's.
        size: of the name, width and height.
        pixels: of a typographic point.
        frame: of the axes.
        taken: dots that lie densely on all that is drawn.
        others: points of other names.
        written: other texts.

    Returns:
        The offset of the name's middle from the point, and the name's box; all in pixels.
    """
    best: tuple[float, np.ndarray, Box] | None = None
    for distance in (5, 10, 16, 24, 34, 46, 60):
        for angle in np.linspace(0, 2 * math.pi, 24, endpoint=False):
            way = np.array([math.cos(angle), math.sin(angle)])
            # From the middle to the box's edge in that direction, then the distance.
            edge = min(half / max(abs(part), 1e-9) for half, part in zip(size / 2, way, strict=True))
            offset = way * (edge + distance * pixels)
            (x0, y0), (x1, y1) = low, high = point + offset - size / 2, point + offset + size / 2
            margin = 2 * pixels
            hits = ((taken > low - margin) & (taken < high + margin)).all(1).sum()
            over = sum(x0 < right and x1 > left and y0 < top and y1 > bottom for left, bottom, right, top in written)
            off = x0 < frame[0] or y0 < frame[1] or x1 > frame[2] or y1 > frame[3]
            gaps = np.hypot(*np.maximum(0, np.maximum(low - others, others - high)).T)
            strange = int((gaps < distance * pixels + 4).sum())
            cost = 300 * off + 80 * over + 4 * hits + 5 * strange + distance / 3
            if best is None or cost < best[0]:
                best = cost, offset, (x0, y0, x1, y1)
    assert best is not None
    return best[1], best[2]


# --- throughput ---------------------------------------------------------------------------------------------------


def throughput(result: Result) -> Drawn:
    """Images a second over the batch size, a line for each peer, a panel for each task, variant and dtype."""
    of = ("variant", "dtype") if result.benchmark == "model" else ("size", "dtype")
    kinds = list(_groups(result.rows, *of))
    tasks = list(dict.fromkeys(row["task"] for row in result.rows))
    peers = _peers(result.rows)
    absent: dict[str, str] = {}
    for row in result.rows:
        absent.update(row.get("absent") or {})
    notes = ["Bars from the 20th to the 80th percentile of the times, where they are wider than the marker"]
    if absent:
        notes.append(f"Not run here: {'; '.join(f'{peer}: {why}' for peer, why in absent.items())}")
    title = "Throughput of AlexNet" if result.benchmark == "model" else "Throughput of LPIPS's AlexNet"
    figure = _figure(title, 3.2 * len(kinds) + 0.25 * -(-len(peers) // 3), result, notes, result.failed)
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
    _legend(figure, list(drawn.values()), list(drawn), min(3, len(drawn)))
    _settle(figure)
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
        _plain_log(axes.yaxis)
    else:
        axes.set_ylim(0, 1.12 * max(speeds))
        axes.yaxis.set_major_formatter("{x:,.10g}")
    axes.set(xlabel="batch size (images)", ylabel="throughput (images/s)")
    _tidy(axes)


# --- layers -------------------------------------------------------------------------------------------------------


def layers(result: Result) -> Drawn:
    """A bar of time for each layer, direction and peer, with the layer's floor marked."""
    for (variant, dtype, batch), rows, failed in _pictures(result, "variant", "dtype", "batch"):
        directions = _in_order((row["direction"] for row in rows), DIRECTIONS)
        panels = {
            direction: {row["layer"]: row for row in rows if row["direction"] == direction} for direction in directions
        }
        peers = _peers(rows)
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
        figure = _figure(title, per_layer * sum(counts) + 0.9 * len(counts) + 0.3, result, notes, failed)
        heights = [count + 0.5 for count in counts]
        grid = figure.subplots(len(counts), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (direction, panel) in zip(grid, panels.items(), strict=True):
            _draw_bars(axes, [panel[name] for name in _in_order(panel, LAYERS)], peers, unit, scale, result.measured)
            axes.set_title(direction, loc="left", fontsize=10, fontweight="bold")
            axes.set_xlim(0, 1.25 * scale * longest)
        entries = {
            label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        _legend(figure, list(entries.values()), list(entries), len(entries))
        _settle(figure)
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
            text = f"{_three_digits(scale * time)} {unit} ({_three_digits(time / row['floor'])}x{bound})"
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
    _tidy(axes)
    axes.grid(False, axis="y")


def _spread(have: Sequence[tuple[int, Row]], peer: str, scale: float) -> list[list[float]]:
    """From the median down to the 20th percentile, and up to the 80th."""
    summaries = [row["times"][peer] for _, row in have]
    down = [scale * max(0.0, each["median"] - each["p20"]) for each in summaries]
    return [down, [scale * max(0.0, each["p80"] - each["median"]) for each in summaries]]


# --- tuning -------------------------------------------------------------------------------------------------------

MOST_REASONS = 5
"""Reasons for pruning that are told apart; rarer ones are counted together."""


def tuning(result: Result) -> Drawn:
    """Each candidate's time over the default's, the best marked, and how many were pruned for which reason."""
    for (variant, dtype, batch), rows, _ in _pictures(result, "variant", "dtype", "batch"):
        groups = _groups(rows, "layer", "direction")
        layers = _in_order((layer for layer, _ in groups), LAYERS)
        directions = _in_order((direction for _, direction in groups), DIRECTIONS)
        order = [(layer, direction) for layer in layers for direction in directions if (layer, direction) in groups]
        candidates = [groups[place] for place in order]
        timed = any(row.get("time") for row in rows)
        what = "Tuning" if timed else "Dry run of tuning"
        network = f" of AlexNet ({variant})" if variant else ""
        notes = ["Reasons that differ in their numbers alone count as one, with n for the number"]
        if timed:
            notes.insert(0, "Every dot is a candidate; left of the line it is faster than the default")
        height = 0.3 * len(order) + 2.2
        figure = _figure(f"{what}{network}, {dtype}, batch {batch}", height, result, notes, ())
        grid = figure.subplots(1, 1 + timed, sharey=True, squeeze=False)[0]
        if timed:
            _draw_candidates(grid[0], candidates)
        _draw_pruned(grid[-1], candidates, figure)
        grid[0].set_yticks(range(len(order)), [" ".join(place) for place in order], parse_math=False)
        grid[0].set_ylim(len(order) - 0.4, -0.6)
        _settle(figure)
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
    _plain_log(axes.xaxis)
    axes.set_xlabel("time over the default's (ratio)")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8, frameon=False)
    _tidy(axes)


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
    _legend(figure, handles, labels, 1)
    _tidy(axes)
    axes.grid(False, axis="y")


OUTCOMES = ("timed", "not timed")
"""Of a candidate that was not pruned."""


def _outcome(row: Row) -> str:
    """What became of a candidate: the numbers of a reason are its own, and do not make it another one."""
    if row.get("pruned"):
        return re.sub(r"\d[\d.,]*\d|\d", "n", row["pruned"])
    return OUTCOMES[0] if row.get("time") else OUTCOMES[1]


# --- the table ----------------------------------------------------------------------------------------------------


class Plot(NamedTuple):
    """A kind of picture."""

    draw: Callable[[Result], Drawn]
    benchmarks: tuple[str, ...]
    """Whose files it takes."""


PLOTS: Mapping[str, Plot] = {
    "roofline": Plot(roofline, ("layers", "predict")),
    "throughput": Plot(throughput, ("model", "lpips")),
    "layers": Plot(layers, ("layers", "predict")),
    "tuning": Plot(tuning, ("tuning",)),
}
