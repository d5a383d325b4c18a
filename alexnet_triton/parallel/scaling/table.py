"""The model's estimates as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from alexnet_triton.parallel.scaling.model import Estimate

LINKS_COUNT = 0.1
"""Share of a step from which on a GPU is said to wait for its links."""


def table(estimates: Iterable[Estimate], one: Estimate, epochs: float) -> str:
    """A row for each estimate.

    Columns are images and seconds of a step; the share of it that is computing, a pipeline's bubble included; images a
    second, and over so many times one GPU's; bytes that a GPU sends in a step, and that a machine reads a second.

    Args:
        estimates: of one job and cluster.
        one: of one GPU alone.
        epochs: whose time is given, of ImageNet's images.
    """
    titles = "GPUs", "layout", "images/step", "step", "computing", "images/s", "efficiency", f"{epochs:g} epochs"
    rows = [(*titles, "sent/GPU", "read/machine", "waits for")]
    for e in estimates:
        rows.append(
            (
                f"{e.gpus:,}",
                e.layout if e.gpus > 1 else "one GPU",
                f"{e.batch:,}",
                f"{1e3 * e.step:.1f} ms",
                f"{e.computing / e.step:.0%}",
                _rounded(e.images_per_second),
                f"{e.images_per_second / e.gpus / one.images_per_second:.0%}",
                duration(e.seconds(epochs)),
                f"{e.sent / 1e6:,.0f} MB" if e.sent else "",
                f"{e.images_of_a_machine / e.step / 1e9:.1f} GB/s",
                waits_for(e),
            )
        )
    return aligned(rows, words=0)


def _rounded(number: float) -> str:
    """Three figures of a whole number, as more would promise more than a model knows."""
    return f"{float(f'{number:.3g}'):,.0f}"


def waits_for(e: Estimate) -> str:
    """What a GPU waits for, if for anything that counts."""
    if e.step > e.computing + e.waiting:
        return "images"
    return "links" if e.waiting > LINKS_COUNT * e.step else ""


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def aligned(rows: Sequence[Sequence[str]], words: int) -> str:
    """Rows under each other, numbers to the right, so many columns of words first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if place < words else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
