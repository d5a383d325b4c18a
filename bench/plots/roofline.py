"""Arithmetic speed against arithmetic intensity, under the roofs that were measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from alexnet_triton.bench.plots.canvas import (
    Drawn,
    Style,
    add_legend,
    in_order,
    new_figure,
    pictures,
    plain_log,
    settle,
    styles_of,
    three_digits,
    tidy,
)
from alexnet_triton.bench.plots.files import Result, Row, is_number
from alexnet_triton.bench.results import OURS
from alexnet_triton.tuning.launches import DIRECTIONS, LAYERS

if TYPE_CHECKING:  # matplotlib is loaded when a picture is drawn
    from matplotlib.axes import Axes


def roofline(result: Result) -> Drawn:
    """Arithmetic a second over arithmetic a byte, a panel for each direction (Williams, Waterman, Patterson 2009).

    Raises:
        ValueError: the roofs of the rows' dtypes are missing.
    """
    for (variant, dtype, batch), rows, failed in pictures(result, "variant", "dtype", "batch"):
        copy, peaks = _roofs(result, dtype)
        unit, scale = ("TFLOP/s", 1e12) if peaks[dtype] >= 1e12 else ("GFLOP/s", 1e9)
        drawn, edge = _with_intensity(rows, max(peaks.values()) / copy)
        directions = in_order((row["direction"] for row in rows), DIRECTIONS)
        title = f"Roofline of AlexNet ({variant}), {dtype}, batch {batch}"
        figure = new_figure(title, 4.3 * len(directions), result, _roofline_notes(result, rows), failed)
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
            _draw_points(axes, chosen, styles_of(drawn), result, scale)
            axes.set_title(direction, loc="left", fontsize=10, fontweight="bold")
            axes.set_ylabel(f"arithmetic speed ({unit})")
            axes.set_xlabel("arithmetic intensity (FLOP per byte moved)")
            axes.tick_params(labelbottom=True)
            tidy(axes)
        handles, labels = grid[0].get_legend_handles_labels()
        add_legend(figure, handles, labels, len(labels))
        settle(figure)
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
    names = in_order((row["layer"] for row in rows if not row["flop"]), LAYERS)
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
    names = in_order((row["layer"] for row in rows if not row["flop"]), LAYERS)
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
    peaks = {name: 1e12 * value for name, value in found if is_number(value) and value > 0}
    if not is_number(copy) or copy <= 0 or dtype not in peaks:
        raise ValueError(f'{result.path}: "roofs" must hold positive "copy_gbs" and "tflops" of {dtype}')
    return 1e9 * copy, peaks


def _intensity(row: Row, peer: str) -> float:
    return float(row["flop"] / (row["bytes"] if peer == OURS else row.get("torch_bytes") or row["bytes"]))


def _speed(row: Row, peer: str, scale: float) -> float:
    return float(row["flop"] / row["times"][peer]["median"] / scale)


def _limit(axes: Axes, rows: Sequence[Row], copy: float, peaks: Mapping[str, float], scale: float) -> None:
    at = [(_intensity(row, peer), _speed(row, peer, scale)) for row in rows for peer in row["times"]]
    xs, ys = zip(*at, strict=True)
    ridge, top = max(peaks.values()) / copy, max(peaks.values()) / scale
    left = min(*xs, ridge) / 2.5
    axes.set(xscale="log", yscale="log")
    axes.set_xlim(left, 4 * max(*xs, ridge))
    axes.set_ylim(min(*ys, copy * left / scale) / 1.5, 2.2 * max(*ys, top))
    plain_log(axes.xaxis)
    plain_log(axes.yaxis)


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
            x, y, f"copy: {three_digits(copy / 1e9)} GB/s", rotation=math.degrees(math.atan2(y, x)),
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
        text = f"{name}: {three_digits(peak / scale)} {unit}"
        texts.append(
            axes.annotate(
                text, (right, height), (-4, 2), textcoords="offset points", ha="right", fontsize=8, color=colour
            )
        )
        below = height
    return texts


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
