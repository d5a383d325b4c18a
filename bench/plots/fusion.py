"""How layers become ops: the picture of `docs/fusion.md`, drawn from the plan that the network itself makes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from alexnet_triton import AlexNet, FusedSequential
from alexnet_triton.bench.plots.canvas import STYLES
from alexnet_triton.fusion import leaves
from alexnet_triton.fusion.maps import MapRuns
from alexnet_triton.fusion.plan import read, steps
from alexnet_triton.fusion.runs import OPS

if TYPE_CHECKING:  # matplotlib is loaded when a picture is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VARIANT, HOOKED = "paper", "conv4"
"""The network of the picture has every op; the layer has runs before it and after it."""

DPI = 150
WIDTH, ROW, GAP = 7.9, 0.27, 0.13
"""Inches: of the picture, of a layer, between the parts of the network."""

LAYERS, PLAIN, BROKEN = (0.75, 3.15), (3.75, 5.15), (5.95, 7.35)
"""Left and right edges of the three columns."""

ALONE = "the layer itself"
"""In the place of an op's name."""

COLOURS = dict(zip(("conv2d_relu", "lrn_max_pool", "dropout_linear"), (STYLES[0], STYLES[1], STYLES[2]), strict=True))
INK, FAINT, BOX, CHAIN, LINK = "#1f2933", "#6b7785", "#e7ecf2", "#dcebf7", "#0b4f7d"
DASHED: dict[str, Any] = {"facecolor": "white", "edgecolor": FAINT, "linewidth": 0.9, "linestyle": (0, (3, 2))}
"""How a layer that is called itself is drawn."""

COLOURS_KEPT = 256
"""Of the file, which a palette makes small."""


class Layer(NamedTuple):
    """A row of the picture."""

    title: str
    """What the paper calls it, or nothing."""
    name: str
    """In the state dict."""
    text: str
    module: nn.Module


class Run(NamedTuple):
    """Layers that are executed together."""

    text: str
    """The op, or `ALONE`."""
    first: int
    last: int
    """Rows."""


class Plan(NamedTuple):
    """How a network's layers are executed."""

    runs: list[Run]
    chains: list[tuple[int, int]]
    """First and last row of the runs that hand on their maps."""


# --- what is drawn ----------------------------------------------------------------------------------------------------


def network() -> AlexNet:
    """The network of the picture."""
    return AlexNet(variant=VARIANT, device="meta")


def layers(model: AlexNet) -> list[Layer]:
    """Its layers in the order in which they run."""
    names = {module: name for name, module in model.named_modules()}
    titles = iter(("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"))
    found = []
    for part in model.children():
        for module in leaves(part) if isinstance(part, FusedSequential) else [part]:
            title = next(titles) if isinstance(module, (nn.Conv2d, nn.Linear)) else ""
            found.append(Layer(title, names[module], _described(module), module))
    return found


def plan(model: AlexNet) -> Plan:
    """How it would run now."""
    row = 0
    runs, chains = [], []
    for part in model.children():
        inside = tuple(leaves(part)) if isinstance(part, FusedSequential) else (part,)
        place = {module: row + number for number, module in enumerate(inside)}
        for run, its in read(inside):
            runs.append(Run(OPS.get(type(run), ALONE), place[its[0]], place[its[-1]]))
        chains += [
            (place[step.layers[0]], place[step.layers[-1]]) for step in steps(inside) if isinstance(step, MapRuns)
        ]
        row += len(inside)
    return Plan(runs, chains)


def broken_plan(model: AlexNet) -> tuple[int, Plan]:
    """How it would run with a hook, and the row of the layer that has it."""
    row, hooked = next((row, layer) for row, layer in enumerate(layers(model)) if layer.title == HOOKED)
    with hooked.module.register_forward_hook(lambda *_: None):
        return row, plan(model)


def _described(module: Any) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.Conv2d):
        text = f"{kind} {module.out_channels}, {module.kernel_size[0]}x{module.kernel_size[1]}"
        text += f", stride {module.stride[0]}" if module.stride[0] > 1 else ""
        return text + (f", {module.groups} groups" if module.groups > 1 else "")
    if isinstance(module, nn.Linear):
        return f"{kind} {module.in_features} → {module.out_features}"
    if isinstance(module, nn.LocalResponseNorm):
        return "LocalResponseNorm, in 2 groups"
    if isinstance(module, nn.MaxPool2d):
        return f"{kind} {module.kernel_size}x{module.kernel_size}, stride {module.stride}"
    return f"{kind} {module.p}" if isinstance(module, nn.Dropout) else kind


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw() -> Figure:
    """The picture: layers, the runs that they become, and those that they become where one has a hook."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    model = network()
    rows = layers(model)
    hooked, broken = broken_plan(model)
    tops = _tops(rows)
    height = tops[-1] + ROW + 0.3
    figure = Figure(figsize=(WIDTH, height), facecolor="none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    card = FancyBboxPatch(
        (0.05, 0.05), WIDTH - 0.1, height - 0.1, boxstyle="round,pad=0,rounding_size=0.15", facecolor="white",
        edgecolor="#c9d1d9", linewidth=0.8,
    )  # fmt: skip
    axes.add_patch(card)
    for (left, right), text in zip(
        (LAYERS, PLAIN, BROKEN), ("the layers, as ever", "how they run", f"with a hook on {HOOKED}"), strict=True
    ):
        axes.text((left + right) / 2, 0.36, text, ha="center", va="center", size=11, weight="bold", color=INK)
    _draw_layers(axes, rows, tops)
    _draw_plan(axes, plan(model), tops, PLAIN)
    _draw_plan(axes, broken, tops, BROKEN)
    _draw_hook(axes, tops[hooked])
    return figure


def _tops(rows: Sequence[Layer]) -> list[float]:
    """The upper edge of each row: parts of the network stand apart."""
    tops, top = [], 0.68
    for number, layer in enumerate(rows):
        if number and layer.name.split(".")[0] != rows[number - 1].name.split(".")[0]:
            top += GAP
        tops.append(top)
        top += ROW
    return tops


def _box(axes: Axes, edges: tuple[float, float], top: float, bottom: float, inset: float = 0.02, **style: Any) -> None:
    from matplotlib.patches import FancyBboxPatch

    left, right = edges
    size = (right - left, bottom - top - 2 * inset)
    shape = {"boxstyle": "round,pad=0,rounding_size=0.06", "linewidth": 0, **style}
    axes.add_patch(FancyBboxPatch((left, top + inset), *size, **shape))


def _draw_layers(axes: Axes, rows: Sequence[Layer], tops: Sequence[float]) -> None:
    left = LAYERS[0]
    for layer, top in zip(rows, tops, strict=True):
        middle = top + ROW / 2
        _box(axes, LAYERS, top, top + ROW, facecolor=BOX)
        axes.text(left + 0.08, middle, layer.text, va="center", size=8.5, color=INK)
        axes.text(left - 0.08, middle, layer.title, va="center", ha="right", size=8.5, weight="bold", color=INK)


def _draw_plan(axes: Axes, drawn: Plan, tops: Sequence[float], edges: tuple[float, float]) -> None:
    left, right = edges
    for first, last in drawn.chains:
        top, bottom = tops[first], tops[last] + ROW
        _box(axes, (left - 0.3, right + 0.07), top, bottom, -0.015, facecolor=CHAIN)
        text = "one chain: no map is copied" if len(drawn.chains) == 1 else "a chain"
        axes.text(left - 0.15, (top + bottom) / 2, text, ha="center", va="center", rotation=90, size=8.5, color=LINK)
    for run in drawn.runs:
        top, bottom = tops[run.first], tops[run.last] + ROW
        style = DASHED
        font: dict[str, Any] = {"color": FAINT}
        if run.text in COLOURS:
            style = {"facecolor": COLOURS[run.text].colour}
            font = {"color": "white", "weight": "bold", "family": "monospace"}
        _box(axes, edges, top, bottom, 0.035, **style)
        middle = ((left + right) / 2, (top + bottom) / 2)
        axes.text(*middle, run.text, ha="center", va="center", size=9, **font)


def _draw_hook(axes: Axes, top: float) -> None:
    from matplotlib.patches import FancyArrowPatch

    right, middle = BROKEN[1], top + ROW / 2
    axes.add_patch(
        FancyArrowPatch(
            (right + 0.02, middle), (right + 0.3, middle - 0.28), connectionstyle="arc3,rad=0.5", arrowstyle="-|>",
            mutation_scale=9, color=INK, linewidth=1.2,
        )
    )  # fmt: skip
    axes.text(right + 0.27, middle - 0.38, "hook", ha="center", va="center", size=8.5, color=INK, style="italic")


# --- its file ---------------------------------------------------------------------------------------------------------


def stamp() -> str:
    """What the file of a picture of the plan as it is now has in it."""
    model = network()
    told = [[layer[:3] for layer in layers(model)], plan(model), broken_plan(model)]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def write(path: Path) -> None:
    """Draw it into a PNG."""
    from PIL import Image, PngImagePlugin

    held = io.BytesIO()
    draw().savefig(held, dpi=DPI)
    facts = PngImagePlugin.PngInfo()
    facts.add_text("Source", stamp())
    image = Image.open(held).quantize(COLOURS_KEPT, method=Image.Quantize.FASTOCTREE)  # which keeps what is clear
    image.save(path, "PNG", optimize=True, pnginfo=facts)


def fresh(path: Path) -> bool:
    """Whether the file is there, and a picture of the plan as it is now."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return bool(image.info.get("Source") == stamp())
    except OSError:
        return False
