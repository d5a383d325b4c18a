"""What `alexnet-triton autotune` shows while it runs, and at its end."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from alexnet_triton.kernels.config import Config
from alexnet_triton.tuning.trials import Tuned

HEADER = f" {'layer':<6}{'direction':<16}{'batch':>6}{'tried':>6}{'timed':>6}{'best':>12}{'gain':>6}"
"""Fits 60 columns. The config follows, or is below where a terminal is narrow."""

WIDE = 100
"""Columns from which on a config finds its place in the line."""

J = TypeVar("J", bound=Any)


def running(jobs: Sequence[J], tune: Callable[[J], Tuned | None]) -> Iterator[Tuned]:
    """Tune one job after the other; each is a line of a table, above a progress bar where there is a terminal.

    Args:
        jobs: each with a `name`.
        tune: None for one that its time did not suffice for.
    """
    from tqdm import tqdm

    width = _width()
    narrow = width is not None and width < WIDE
    print(f"{HEADER}\n       config, where it is not the default" if narrow else f"{HEADER}  config", flush=True)
    look = "{desc}|{bar}| {n_fmt} of {total_fmt}, {elapsed}, {remaining} left"
    with tqdm(jobs, bar_format=look, leave=False, disable=None, dynamic_ncols=True) as bar:
        for job in bar:
            bar.set_description_str("" if narrow else f"{job.name} ")
            tuned = tune(job)
            if tuned is not None:
                tqdm.write(format_row(tuned, width))
                sys.stdout.flush()
                yield tuned


def _width() -> int | None:
    """Columns of the terminal; None where the table goes into a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def format_row(tuned: Tuned, width: int | None = None) -> str:
    """One problem's line: candidates, survivors, the best one's time or modelled cycles, its gain, what it is.

    Args:
        tuned: the problem.
        width: columns that there are; None for as many as it takes.
    """
    best = tuned.best
    if best.seconds is not None:
        cost = f"{best.seconds * 1e6:,.1f} us"
    else:
        thousands = best.cycles / 1e3
        digits = 2 if thousands < 10 else 1 if thousands < 1000 else 0
        cost = f"{thousands:,.{digits}f} kcyc" if tuned.modelled else "-"
    gain = "-" if cost == "-" else f"{tuned.gain:.2f}"
    counts = f"{tuned.problem.images:>6,}{len(tuned.trials):>6}{len(tuned.survivors):>6}"
    line = f" {tuned.layer:<6}{tuned.direction:<16}{counts} {cost:>11}{gain:>6}"
    default = best is tuned.trials[0]
    config = "the default" if default else brief(best.config)
    if width is None or (width >= WIDE and len(line) + 2 + len(config) <= width):
        return f"{line}  {config}"
    indent = " " * (7 if width < WIDE else len(HEADER) + 2)
    below = textwrap.wrap(config, width - 1, initial_indent=indent, subsequent_indent=indent)
    if width < WIDE:
        return "\n".join([line, *(below if not default else [])])
    return line + below[0][len(line) :] + "".join(f"\n{more}" for more in below[1:])


def brief(config: Config) -> str:
    """A config in one line, without what is nothing."""
    return " ".join(f"{name}={value}" for name, value in vars(config).items() if value)


def summary(results: Sequence[Tuned], source: str) -> str:
    """How many candidates there were, what became of them and why."""
    trials = [trial for result in results for trial in result.trials]
    if not trials:
        return "nothing was tuned"
    reasons = Counter(trial.objection.reason for trial in trials if trial.objection is not None)
    pruned = sum(reasons.values())
    verb = "timed" if source == "measured" else "would be timed"
    lines = [
        f"{len(trials):,} candidates, {pruned:,} pruned ({pruned / len(trials):.0%}), {len(trials) - pruned:,} {verb}"
    ]
    lines += [f"  {count:>5,}  {reason}" for reason, count in reasons.most_common()]
    better = [result for result in results if result.best is not result.trials[0]]
    unit = "time" if source == "measured" else "modelled cycles"
    lines.append(f"{len(better)} of {len(results)} problems gain over the default, in {unit}")
    return "\n".join(lines)
