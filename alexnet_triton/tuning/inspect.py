"""`alexnet-triton inspect`: what the compiler makes of every launch of a network, for a GPU that need not be there.

The package's own code launches (`launches`): a network's layers run on meta tensors while `launch.recording` keeps what
would have been launched on the target, with the config that it would get there. `alexnet_triton.tuning.compiler`
compiles that; its docstring explains the figures. Each is held to a budget, so a kernel that gets worse shows where no
GPU is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from alexnet_triton.backend import interpreting
from alexnet_triton.kernels.target import TARGETS, Target
from alexnet_triton.tuning import loops
from alexnet_triton.tuning.launches import (
    DIRECTIONS,
    IMAGES,
    PLACES,
    UPDATE,
    LayerLaunch,
    image_launches,
    launches,
    update_launches,
)
from alexnet_triton.variants import VARIANTS

if TYPE_CHECKING:
    from alexnet_triton.tuning.compiler import Compiled

DTYPES = ("bfloat16", "float16", "float32")
MOST_ISSUE_SHARE = 0.5
"""Of a matrix product on sm_90: from this share of the schedulers' time on, the tensor cores wait for instructions.
Where the second-level cache or memory takes longer than they do, it is a share of that time (`loops.slack`)."""


class Allowed(NamedTuple):
    """An issue share over the budget that is known and explained. It may fall, and not rise."""

    issue_share: float
    reason: str


EXCEPTIONS: Mapping[tuple[str, str, str], Allowed] = {}
"""By target, layer and direction."""


# --- budgets ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A launch's place, its figures, and the budgets that it breaks."""

    layer: str
    direction: str
    kernel: str
    kind: str
    programs: int
    compiled: Compiled | None
    """None: the compiler refuses it."""
    broken: tuple[str, ...]
    """A sentence each: the figure, and what was expected."""
    allowed: Allowed | None = None
    """The exception that it stands in."""


def broken_budgets(
    compiled: Compiled,
    kind: str,
    target: Target,
    dtype: torch.dtype,
    allowed: Allowed | None = None,
    slack: float = 1.0,
    issuing: float = 0.0,
) -> list[str]:
    """The budgets that a launch breaks, a sentence each.

    Args:
        compiled: its figures.
        kind: see `LayerLaunch.kind`.
        target: what it was compiled for.
        dtype: of its tensors.
        allowed: the exception that it stands in.
        slack: see `loops.slack`.
        issuing: see `loops.issuing`.
    """
    broken = []
    half = dtype.itemsize == 2
    if compiled.spilled_bytes:
        broken.append(f"spills {compiled.spilled_bytes} bytes a thread, expected none")
    if compiled.shared_memory > target.shared_memory:
        takes, has = f"{compiled.shared_memory:,}", f"{target.shared_memory:,}"
        broken.append(f"takes {takes} bytes of shared memory, the target has {has}")
    elif not compiled.resident:
        broken.append(f"does not fit a multiprocessor, for its {compiled.limited_by}")
    if kind == "product" and half and not compiled.matrix_instructions:
        broken.append("has no tensor-core instruction, expected them in every product of 16-bit numbers")
    if kind == "product" and compiled.loop is not None:
        narrow = {bits: count for bits, count in compiled.loop.loads.items() if bits < 128}
        if narrow:
            what = ", ".join(f"{count} of {bits // 8}" for bits, count in narrow.items())
            broken.append(f"loads fewer than 16 bytes at once in its main loop ({what} bytes), expected 16")
    # A pixel has three bytes, a crop begins anywhere and may be mirrored, so loads are of a byte each; what can be
    # demanded is that issuing so many instructions takes no longer than memory takes to move the bytes.
    if kind == "bytes" and target.backend == "cuda" and issuing > 1:
        broken.append(f"takes {issuing:.2f} of its bytes' time to issue its instructions, expected at most 1")
    if kind in ("product", "map") and compiled.loop is None and compiled.widest_load < 128:
        broken.append(f"loads at most {compiled.widest_load // 8} bytes at once, expected 16")
    share = compiled.issue_share
    if kind == "product" and half and target.arch == 90 and compiled.matrix_instructions:
        most = allowed.issue_share if allowed else MOST_ISSUE_SHARE * slack
        if share is None:
            broken.append("has no main loop whose issue share could be told")
        elif share > most if allowed else share >= most:
            limit = f"its exception allows {most:.2f}" if allowed else f"expected under {most:.2g}"
            broken.append(f"has an issue share of {share:.2f}, {limit}")
    return broken


def inspect(
    variant: str,
    dtype: str = "bfloat16",
    batch: int = 128,
    target: str = "sm_90",
    layers: Collection[str] = PLACES,
    copies: bool = True,
    show_progress: bool = False,
) -> list[Row]:
    """Compile a network's launches and hold them to their budgets.

    Args:
        variant: of `alexnet_triton.AlexNet`.
        dtype: of `DTYPES`.
        batch: number of images, at least 1.
        target: of `alexnet_triton.kernels.target.TARGETS`.
        layers: those of `PLACES` that are wanted.
        copies: also what serves the products: copies, packed filters, sums of parts.
        show_progress: count on standard error.

    Raises:
        ValueError: a name that is none of those.
        RuntimeError: Triton is not installed, or the process belongs to its interpreter.
    """
    _check("target", target, TARGETS)
    _check("variant", variant, VARIANTS)
    _check("dtype", dtype, DTYPES)
    for layer in layers:
        _check("layer", layer, PLACES)
    if batch < 1:
        raise ValueError(f"the batch must hold at least 1 image, got {batch}")
    _need_triton()
    numbers: torch.dtype = getattr(torch, dtype)
    made = image_launches(variant, numbers, batch, TARGETS[target]) + launches(variant, numbers, batch, TARGETS[target])
    made += update_launches(variant, numbers, TARGETS[target])
    made = [one for one in made if one.layer in layers and (copies or one.kind != "copy")]
    order = {name: number for number, name in enumerate([*PLACES, IMAGES[1], *DIRECTIONS, UPDATE[1]])}
    made.sort(key=lambda one: (order[one.layer], order[one.direction]))
    return compile_rows(made, numbers, target, show_progress)


def compile_rows(
    made: Sequence[LayerLaunch], dtype: torch.dtype, target: str, show_progress: bool = False
) -> list[Row]:
    """Compile launches and hold them to their budgets.

    Args:
        made: the launches.
        dtype: of their tensors.
        target: of `alexnet_triton.kernels.target.TARGETS`.
        show_progress: count on standard error.
    """
    from alexnet_triton.tuning.compiler import CompilationFailed, compile_launches

    def count(done: int) -> None:
        if show_progress:
            end = "\r" if done < len(made) else "\r\033[K"
            print(f"compiling {done} of {len(made)}", end=end, file=sys.stderr, flush=True)

    rows = []
    figures = compile_launches([one.launch for one in made], TARGETS[target], count)
    for one, figure in zip(made, figures, strict=True):
        compiled, allowed = None, None
        if isinstance(figure, CompilationFailed):
            broken = [f"does not compile: {figure}"]
        else:
            compiled = figure
            slack, issuing = 1.0, 0.0
            if one.kind == "bytes":
                issuing = loops.issuing(one.launch, figure)
            if one.kind == "product":
                allowed = EXCEPTIONS.get((target, one.layer, one.direction))
                slack = loops.slack(one.launch, figure, TARGETS[target])
            broken = broken_budgets(figure, one.kind, TARGETS[target], dtype, allowed, slack, issuing)
        place = (one.layer, one.direction, one.kernel, one.kind, one.launch.programs)
        rows.append(Row(*place, compiled, tuple(broken), allowed))
    return rows


def _check(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}: choose one of {', '.join(known)}")


def _need_triton() -> None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            "inspect compiles kernels with Triton, which is not installed: pip install triton, on Linux"
        ) from error


# --- the table ----------------------------------------------------------------------------------------------

HEADER = ("layer", "direction", "kernel", "grid", "warps", "regs", "spill", "shared", "mma", "loop",
          "issue", "L2", "load", "fit")  # fmt: skip
LEGEND = """\
warps x stages; spill: bytes a thread; shared: bytes a program; mma, loop: tensor-core and all instructions of the main
loop; issue: share of the issue slots in its tensor-core cycles; L2: bytes it asks in such a cycle; load: bits of the
widest (narrowest-widest of the loop; tile: copy engine); fit: programs a multiprocessor holds, and what limits them"""


def format_table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, `!` before a broken budget and `*` before an exception, and what these are."""
    lines = [_cells(row) for row in rows]
    widths = [max(len(line[column]) for line in (HEADER, *lines)) for column in range(len(HEADER))]

    def text(line: Sequence[str], mark: str = "") -> str:
        cells = [
            cell.ljust(width) if column in (0, 1, 2, len(HEADER) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"{mark or ' '}{' '.join(cells)}".rstrip()

    marks = ["!" if row.broken else "*" if row.allowed else "" for row in rows]
    out = [text(HEADER), " " + "-" * (sum(widths) + len(widths) - 1), *map(text, lines, marks), LEGEND]
    notes = []
    for row in rows:
        place = f"{row.layer} {row.direction}: {row.kernel}"
        if row.allowed:
            share, reason = row.allowed
            notes.append(f"* {place} may have an issue share of {share:.2f}, {reason}")
        notes += [f"! {place} {sentence}" for sentence in row.broken]
    return "\n".join(out + (["", *notes] if notes else []))


def _cells(row: Row) -> tuple[str, ...]:
    direction, kernel = row.direction.replace("gradient", "grad"), row.kernel.removesuffix("_kernel")
    place = (row.layer, direction, kernel, f"{row.programs:,}")
    c = row.compiled
    if c is None:
        return (*place, *["-"] * (len(HEADER) - len(place)))
    in_loop = c.loop.loads if c.loop else {}
    load = f"{min(in_loop)}-{max(in_loop)}" if len(in_loop) > 1 else str(c.widest_load or "-")
    mma = c.loop.matrix_instructions if c.loop else c.matrix_instructions
    return (
        *place,
        f"{c.warps}x{c.stages}",
        str(c.registers),
        str(c.spilled_bytes),
        f"{c.shared_memory:,}",
        str(mma) if mma else "-",
        str(c.loop.instructions) if c.loop else "-",
        "-" if c.issue_share is None else f"{c.issue_share:.2f}",
        "-" if c.l2_bytes is None else f"{c.l2_bytes:.0f}",
        "tile" if c.copy_engine_loads else load,
        f"{c.resident} {c.limited_by}",
    )


def as_json(rows: Sequence[Row], variant: str, dtype: str, batch: int, target: str) -> str:
    """The rows, and what they were made from and with, for machines."""
    import triton

    from alexnet_triton import __version__

    listed = []
    for row in rows:
        c = row.compiled
        names = ("issue_share", "l2_bytes", "widest_load") if c else ()
        listed.append({**asdict(row), **{name: getattr(c, name) for name in names}})
    what = {"target": target, "variant": variant, "dtype": dtype, "batch": batch}
    versions = {"alexnet_triton": __version__, "triton": triton.__version__, "torch": torch.__version__}
    broken = sum(len(row.broken) for row in rows)
    return json.dumps({**what, "versions": versions, "broken": broken, "rows": listed}, indent=1)


# --- the command --------------------------------------------------------------------------------------------


def run(
    target: str, variant: str, dtype: str, batch: int, layer: str | None, copies: bool, machine_readable: bool
) -> int:
    """Print the table or JSON, and give the exit code: 1 where a budget is broken.

    Where Triton's interpreter is on, another Python does it, without: an interpreted process holds no kernel that
    could be compiled.

    Args:
        target: as for `inspect`.
        variant: as for `inspect`.
        dtype: as for `inspect`.
        batch: as for `inspect`.
        layer: the one that is wanted; None takes all.
        copies: as for `inspect`.
        machine_readable: print JSON.

    Raises:
        ValueError: as `inspect`.
        RuntimeError: Triton is not installed.
    """
    layers = PLACES if layer is None else (layer,)
    if interpreting():
        words = ["--target", target, "--variant", variant, "--dtype", dtype, "--batch", str(batch)]
        words += ([] if layer is None else ["--layer", layer]) + ["--all"] * copies + ["--json"] * machine_readable
        return run_compiled(["inspect", *words])
    rows = inspect(variant, dtype, batch, target, layers, copies, sys.stderr.isatty())
    broken = sum(len(row.broken) for row in rows)
    if machine_readable:
        print(as_json(rows, variant, dtype, batch, target))
        return int(broken > 0)
    print(format_table(rows))
    verdict = f"{broken} broken budgets" if broken != 1 else "1 broken budget"
    place = f"{len(rows)} launches of {variant}, {dtype}, batch {batch}, for {target}"
    print(f"\n{place}: {verdict if broken else 'every budget holds'}")
    return int(broken > 0)


def run_compiled(words: Sequence[str]) -> int:
    """Run a command of the package in another Python, without Triton's interpreter, and give its exit code."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with subprocess.Popen([sys.executable, "-m", "alexnet_triton", *words], env=environment) as child:
        try:
            return child.wait()
        except KeyboardInterrupt:
            return child.wait()  # it was interrupted too, and has said so
