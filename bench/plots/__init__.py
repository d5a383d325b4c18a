"""Pictures of result files: `roofline`, `throughput`, `layers`, `tuning` and `schedules`, each as PNG and SVG.

A picture shows one file's figures and names their machine, versions and method below them. It never mixes two machines,
says where figures are a CPU's or a model's estimate, and lists what failed its check and so has no time.
Colours are Okabe and Ito's (2008, https://jfly.uni-koeln.de/color/), and never tell two things apart by themselves:
markers, hatches and line styles differ too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from alexnet_triton.bench.plots.canvas import DPI, Drawn
from alexnet_triton.bench.plots.files import Result, read
from alexnet_triton.bench.plots.layers import layers
from alexnet_triton.bench.plots.roofline import roofline
from alexnet_triton.bench.plots.schedules import schedules
from alexnet_triton.bench.plots.throughput import throughput
from alexnet_triton.bench.plots.tuning import tuning

if TYPE_CHECKING:  # matplotlib is loaded when a picture is drawn
    from matplotlib.figure import Figure


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
    from alexnet_triton.bench import benchmark, layers, model, parallel

    measured = {"throughput": model.BENCHMARK, "schedules": parallel.BENCHMARK}.get(kind, layers.BENCHMARK)
    benchmark.run(measured, out)
    return out / f"{measured.name}.json"


def _save(figure: Figure, out: Path, stem: str) -> list[Path]:
    import matplotlib

    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{stem}.png", out / f"{stem}.svg"]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": stem}):  # text stays text, ids stay the same
        figure.savefig(paths[0], dpi=DPI)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


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
    "schedules": Plot(schedules, ("parallel",)),
}
