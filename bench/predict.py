"""`alexnet-triton bench predict`: a model's estimate of every layer's time, for a card that need not be there.

What a launch does is known without a card: its programs and turns from the arguments that `tuning.launches.launches`
records, a turn's instructions and how many programs a multiprocessor holds from the compiler. In cycles, for each
launch, with the card's rates from `cards`:

    turn    = max(arithmetic, issue, L2), of one turn of a program's main loop, where
              arithmetic = multiply-adds of its tile / what the multiprocessor does of them in a cycle
              issue      = instructions x warps / 4 / ISSUE_SHARE
              L2         = bytes that it asks for / what the multiprocessor draws in a cycle
    span    = LATENCY + turns x max(turn, LATENCY / (stages - 1))      of a program alone; of a copy or a pass over
              turns x (LATENCY + turn)                                 maps, which has no stages
    busiest = programs / multiprocessors, rounded up: waves are counted over multiprocessors, since programs that
              share one share its rates too
    time    = max(max(busiest x turns x turn, busiest / resident, rounded up, x span) / clock,
                  bytes moved / copy roof) + LAUNCH

Bytes moved are those of every tensor of the launch, once. A row's estimate is the sum over its launches: copies, packed
filters and sums of parts too. Its *floor* is the longer of the layer's arithmetic and its least bytes, at the roofs; no
estimate is below. Its *bound* is what most of the estimate goes to: `memory`, `arithmetic`, `issue`, `L2`, or `waves`,
which stands for multiprocessors that idle (more than `MOST_IDLE`), waiting for loads, and launching itself.

What the model leaves out: the arithmetic of copies, normalisation and pooling, so where that limits, theirs are lower
bounds; what one launch leaves in the cache for the next; the few programs that sum a bias beside a weight gradient; the
epilogue of a product but for its bytes. It ranks changes. Measured times decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm import tqdm

from alexnet_triton.backend import interpreting
from alexnet_triton.bench import results as files
from alexnet_triton.bench.cards import CARDS, Card
from alexnet_triton.bench.checks import FULL, layers
from alexnet_triton.bench.floors import least
from alexnet_triton.bench.plots.files import read
from alexnet_triton.bench.results import OURS
from alexnet_triton.kernels.target import cdiv
from alexnet_triton.tuning import loops
from alexnet_triton.tuning.inspect import DTYPES, run_compiled
from alexnet_triton.tuning.launches import DIRECTIONS, LAYERS, LayerLaunch, launches
from alexnet_triton.variants import VARIANTS

if TYPE_CHECKING:
    from alexnet_triton.kernels.launch import Launch
    from alexnet_triton.tuning.compiler import Compiled

BATCHES = (1, 16, 128, 1024)

LATENCY = 600
"""Cycles from a load to its data, other loads being under way. Assumed: where none is, L2 needs about 200 and memory
about 400."""

LAUNCH = 1.5e-6
"""Seconds between two launches of a stream whose host is ahead: the last one drains, the next one fills. Assumed."""

ISSUE_SHARE = 0.5
"""Of the issue slots, what a loop can take before the tensor cores wait for it: the budget of `inspect`."""

MOST_IDLE = 0.2
"""Share of the card that a schedule may leave idle before it is marked."""


# --- the model ----------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What the model must know of a launch."""

    programs: int
    turns: int
    """Of a program's main loop."""
    multiply_adds: int
    """Of a turn of a program; 0 where the launch is no product."""
    issue_cycles: float
    """That a turn's instructions need at least; 0 where they are not known."""
    asked: float
    """Bytes that a turn of a program asks of L2."""
    moved: int
    """Bytes of the launch's tensors."""
    stages: int
    resident: int
    """Programs that a multiprocessor holds."""


@dataclass(frozen=True)
class Estimate:
    """The model's answer for a launch."""

    seconds: float
    """With `LAUNCH`."""
    bound: str
    """`"arithmetic"`, `"issue"`, `"memory"`, `"L2"` or `"waves"`."""
    cycles: Mapping[str, float]
    """Of a turn, by what takes them."""
    memory: float
    """Seconds of its bytes at the copy roof."""


def estimate(work: Work, card: Card, dtype: str) -> Estimate:
    """The model's time of a launch; the equations are at the top of this module.

    Args:
        work: the launch.
        card: the GPU.
        dtype: of its products, of `inspect.DTYPES`.

    Raises:
        ValueError: a multiprocessor cannot hold one program.
    """
    if work.resident < 1:
        raise ValueError("a multiprocessor cannot hold one program of the launch")
    cycles = {
        "arithmetic": work.multiply_adds / card.products_a_cycle(dtype),
        "issue": work.issue_cycles / ISSUE_SHARE,
        "L2": work.asked / card.l2_bytes_a_cycle,
    }
    turn = max(cycles.values())
    if work.multiply_adds:
        span = LATENCY + work.turns * max(turn, LATENCY / max(1, work.stages - 1))
    else:
        span = work.turns * (LATENCY + turn)
    busiest = cdiv(work.programs, card.target.multiprocessors)
    needed = max(busiest * work.turns * turn, cdiv(busiest, work.resident) * span)
    memory = work.moved / (card.copy_gbs * 1e9)
    seconds = needed / card.clock(dtype)
    evenly = work.programs / card.target.multiprocessors * work.turns * turn
    if memory >= seconds:
        bound = "memory"
    elif evenly < (1 - MOST_IDLE) * needed:
        bound = "waves"
    else:
        bound = max(cycles, key=lambda name: cycles[name])
    return Estimate(max(seconds, memory) + LAUNCH, bound, cycles, memory)


class Schedule(NamedTuple):
    """How a launch's programs fill a card."""

    programs: int
    waves: float
    """Programs over multiprocessors."""
    idle: float
    """Share of the last wave's multiprocessors that have no program."""
    idle_share: float
    """The same of all waves'."""


def schedule(programs: int, multiprocessors: int) -> Schedule:
    """How so many programs fill so many multiprocessors."""
    waves = cdiv(programs, multiprocessors)
    missing = waves * multiprocessors - programs
    return Schedule(
        programs, programs / multiprocessors, missing / multiprocessors, missing / (waves * multiprocessors)
    )


# --- what a launch does -------------------------------------------------------------------------------------


def work_of(made: Launch, compiled: Compiled) -> Work:
    """What the model must know, from a launch's arguments and the compiler's figures."""
    arguments, name = made.arguments, made.kernel.__name__
    moved, programs = loops.moved(made), loops.tiles(made)
    if name not in loops.PRODUCTS:
        turns = loops.LOOPS[name](arguments) if name in loops.LOOPS else 1
        return Work(programs, turns, 0, 0.0, moved / (programs * turns), moved, 1, compiled.resident)
    loop = loops.PRODUCTS[name](arguments)
    issue = 0.0
    if compiled.loop is not None:  # whose body may hold several turns
        held = max(1.0, (compiled.loop.multiply_adds or 0) / loop.multiply_adds)
        issue = compiled.loop.instructions * compiled.warps / 4 / held
    asked = (loop.rows + loop.columns) * loop.step * made.tensors["a" if "a" in arguments else "x"].itemsize
    return Work(
        programs, loop.turns, loop.multiply_adds, issue, asked, moved, arguments["num_stages"], compiled.resident
    )  # fmt: skip


# --- rows ---------------------------------------------------------------------------------------------------


def by_place(made: Iterable[LayerLaunch]) -> dict[tuple[str, str], list[LayerLaunch]]:
    """Launches by layer and direction, in the order of a table."""
    found: dict[tuple[str, str], list[LayerLaunch]] = {}
    for one in made:
        found.setdefault((one.layer, one.direction), []).append(one)
    return {
        (name, direction): found[name, direction]
        for name in LAYERS
        for direction in DIRECTIONS
        if (name, direction) in found
    }


def main_launch(made: Sequence[LayerLaunch]) -> LayerLaunch:
    """The one of a layer's direction that the others serve."""
    [main] = [one for one in made if one.kind != "copy"]
    return main


def predict(card: Card, variant: str, dtype: str, batch: int) -> list[dict[str, Any]]:
    """Rows of a result file, one for every layer and direction.

    Args:
        card: of `cards.CARDS`.
        variant: of `alexnet_triton.AlexNet`.
        dtype: of `inspect.DTYPES`.
        batch: number of images.

    Raises:
        RuntimeError: the compiler refuses a launch, or a multiprocessor cannot hold it.
    """
    from alexnet_triton.tuning.compiler import CompilationFailed, compile_launches

    numbers: torch.dtype = getattr(torch, dtype)
    made = launches(variant, numbers, batch, card.target)
    with tqdm(total=len(made), desc=f"compiling, batch {batch}", leave=False, disable=None) as bar:
        compiled = compile_launches([one.launch for one in made], card.target, lambda done: bar.update())
    figures: dict[int, Compiled] = {}
    for one, figure in zip(made, compiled, strict=True):
        place = f"{one.layer} {one.direction}: {one.kernel}"
        if isinstance(figure, CompilationFailed):
            raise RuntimeError(f"{place} does not compile: {figure}")
        if not figure.resident:
            raise RuntimeError(f"{place} does not fit a multiprocessor of the {card.name}, for its {figure.limited_by}")
        figures[id(one)] = figure
    shapes = dict(layers(variant, batch, FULL))
    rows = []
    for (name, direction), group in by_place(made).items():
        flop, moved = least(shapes[name], direction, numbers.itemsize)
        works = [(one, work_of(one.launch, figures[id(one)])) for one in group]
        about = {"variant": variant, "layer": name, "direction": direction, "dtype": dtype, "batch": batch}
        rows.append({**about, **row_of(card, dtype, flop, moved, works, main_launch(group).launch)})
    return rows


def row_of(
    card: Card, dtype: str, flop: int, moved: int, works: Sequence[tuple[LayerLaunch, Work]], main: Launch
) -> dict[str, Any]:
    """A row's figures: floor, estimate, what bounds it, the main launch's schedule, and each launch's details."""
    spent = dict.fromkeys(("arithmetic", "issue", "memory", "L2", "waves"), 0.0)
    details = []
    for one, work in works:
        answer = estimate(work, card, dtype)
        spent[answer.bound] += answer.seconds - LAUNCH
        spent["waves"] += LAUNCH
        details.append({"kernel": one.kernel, **work._asdict(), **asdict(answer)})
    programs, waves, idle, _ = schedule(loops.tiles(main), card.target.multiprocessors)
    return {
        "flop": flop, "bytes": moved,
        "floor": max(flop / (card.tflops[dtype] * 1e12), moved / (card.copy_gbs * 1e9)),
        "estimate": sum(detail["seconds"] for detail in details), "bound": max(spent, key=lambda name: spent[name]),
        "programs": programs, "waves": waves, "idle": idle, "launches": details,
    }  # fmt: skip


# --- the tables ---------------------------------------------------------------------------------------------

Rows = Sequence[Mapping[str, Any]]
Times = Mapping[tuple[Any, ...], float]


def title(card: Card, variant: str, dtype: str, batches: Sequence[int]) -> str:
    """What a table's figures are."""
    many = ", ".join(f"{batch:,}" for batch in batches)
    return (
        f"{variant}, {dtype}, batch {many}: a model's estimate for an {card.name} that was not there; "
        "nothing was measured"
    )


def place_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row is about, the same in a predicted and in a measured one."""
    return tuple(row[key] for key in ("variant", "layer", "direction", "dtype", "batch"))


def format_table(rows: Rows, measured: Times | None = None) -> str:
    """The rows of one batch as text, their totals, and the three that are furthest from their floor.

    Args:
        rows: of `predict`.
        measured: seconds by `place_of`, to stand beside the estimates; None for no such columns.
    """
    header = f" {'layer':<6}{'direction':<16}{'programs':>9}{'waves':>10}{'idle':>6}"
    header += f"{'floor':>10}{'estimate':>10}{'ratio':>7}"
    header += f"{'measured':>10}{'est/meas':>10}" if measured is not None else ""
    lines = [f"{header}  bound", " " + "-" * (len(header) + 11)]
    for row in rows:
        lines.append(
            f" {row['layer']:<6}{row['direction']:<16}{row['programs']:>9,}{row['waves']:>10,.2f}{row['idle']:>6.0%}"
            f"{_us(row['floor'])}{_us(row['estimate'])}{_ratio(row):>7.2f}{_beside(row, measured)}  {row['bound']}"
        )
    for direction in (*DIRECTIONS, "in all"):
        chosen = [row for row in rows if direction in (row["direction"], "in all")]
        total = {key: sum(row[key] for row in chosen) for key in ("floor", "estimate")}
        if chosen:
            name = f"{direction}, {len(chosen)} rows"
            lines.append(f" {name:<47}{_us(total['floor'])}{_us(total['estimate'])}{_ratio(total):>7.2f}")
    worst = sorted(rows, key=_ratio, reverse=True)[:3]
    dearest = sorted(rows, key=lambda row: row["estimate"] - row["floor"], reverse=True)[:3]
    lines.append("furthest from their floor: " + ", ".join(f"{_name(row)} {_ratio(row):.1f} times" for row in worst))
    lines.append("most time above it: " + ", ".join(
        f"{_name(row)} {(row['estimate'] - row['floor']) * 1e6:,.1f} us" for row in dearest
    ))  # fmt: skip
    return "\n".join(lines)


LEGEND = f"""\
times in us; programs, waves over the multiprocessors and what idles in the last one: of the main launch;
ratio: estimate over floor; bound: what most of the estimate goes to;
assumed: {LAUNCH * 1e6:g} us a launch, {LATENCY} cycles a load"""


BESIDE = """\
estimate over measurement. The estimate is of a layer inside a network; measured is a user's op,
which brings its maps into the kernels' layout and out of it"""


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:>10,.1f}"


def _ratio(row: Mapping[str, Any]) -> float:
    return float(row["estimate"] / row["floor"])


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['layer']} {row['direction']}"


def _beside(row: Mapping[str, Any], measured: Times | None) -> str:
    if measured is None:
        return ""
    seconds = measured.get(place_of(row))
    return f"{'-':>10}{'-':>10}" if seconds is None else f"{_us(seconds)}{row['estimate'] / seconds:>10.2f}"


def read_times(path: Path, card: Card) -> dict[tuple[Any, ...], float]:
    """Median seconds of this package in a measured `layers.json`, by `place_of`.

    Raises:
        ValueError: the file is none, or was measured on another card.
    """
    result = read(path, ["layers"])
    device = str(result.machine["device"])
    if not result.measured or card.name not in device:
        raise ValueError(f"{path} was measured on {device!r}, and the estimate is for an {card.name}")
    return {place_of(row): row["times"][OURS]["median"] for row in result.rows if OURS in row["times"]}


def schedules(card: Card, variant: str, dtype: str, batches: Sequence[int]) -> dict[tuple[str, str], list[Schedule]]:
    """How the chosen configs fill a card, by layer and direction, in the order of `batches`. Compiles nothing."""
    found: dict[tuple[str, str], list[Schedule]] = {}
    for batch in batches:
        made = by_place(launches(variant, getattr(torch, dtype), batch, card.target))
        for place, group in made.items():
            one = schedule(loops.tiles(main_launch(group).launch), card.target.multiprocessors)
            found.setdefault(place, []).append(one)
    return found


def format_schedules(found: Mapping[tuple[str, str], Sequence[Schedule]], batches: Sequence[int]) -> str:
    """The schedules as text: tiles, waves and the share of the card that idles, marked over `MOST_IDLE`."""
    heads = "".join(f"{f'batch {batch:,}':>26} " for batch in batches)
    names = "".join(f"{'tiles':>10}{'waves':>10}{'idle':>6} " for _ in batches)
    lines = [f" {'':<22}{heads}".rstrip(), f" {'layer':<6}{'direction':<16}{names}".rstrip()]
    over = 0
    for (name, direction), row in found.items():
        cells = ""
        for one in row:
            idles = one.idle_share > MOST_IDLE
            over += idles
            cells += f"{one.programs:>10,}{one.waves:>10,.2f}{one.idle_share:>6.0%}{'!' if idles else ' '}"
        lines.append(f" {name:<6}{direction:<16}{cells}".rstrip())
    number = sum(len(row) for row in found.values())
    lines.append(f"! idles over {MOST_IDLE:.0%} of the card over all its waves: {over} of {number} schedules")
    return "\n".join(lines)


# --- the command --------------------------------------------------------------------------------------------


def run(
    card: str = "h100",
    variant: str = "merged",
    batches: Sequence[int] = BATCHES,
    dtype: str = "bfloat16",
    results: Path | None = None,
    schedules_only: bool = False,
    out: Path = Path("bench-out"),
) -> int:
    """Print the estimates, write `predict.json`, and give the exit code.

    Where Triton's interpreter is on, another Python does it, without: an interpreted process compiles nothing.

    Args:
        card: of `cards.CARDS`.
        variant: of `alexnet_triton.AlexNet`.
        batches: numbers of images, a table each.
        dtype: of `inspect.DTYPES`.
        results: a measured `layers.json` to stand beside the estimates.
        schedules_only: print how the launches fill the card; nothing is compiled or written.
        out: folder of `predict.json`.

    Raises:
        ValueError: a name that is none, a batch below 1, a results file that does not fit.
        RuntimeError: Triton is not installed, or a launch cannot be compiled.
    """
    for what, name, known in (("card", card, CARDS), ("variant", variant, VARIANTS), ("dtype", dtype, DTYPES)):
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}: choose one of {', '.join(known)}")
    if not batches or min(batches) < 1:
        raise ValueError(f"a batch must hold at least 1 image, got {list(batches)}")
    if interpreting():
        words = ["--card", card, "--variant", variant, "--batch", ",".join(map(str, batches)), "--dtype", dtype]
        words += ["--out", str(out), *([] if results is None else ["--results", str(results)])]
        return run_compiled(["bench", "predict", *words, *["--schedules"] * schedules_only])
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeError("predict compiles kernels with Triton: pip install triton, on Linux") from error

    chosen = CARDS[card]
    if schedules_only:
        print(title(chosen, variant, dtype, batches))
        print(format_schedules(schedules(chosen, variant, dtype, batches), batches))
        return 0
    measured = None if results is None else read_times(results, chosen)
    rows = []
    for batch in batches:
        fresh = predict(chosen, variant, dtype, batch)
        rows += fresh
        print(f"{title(chosen, variant, dtype, [batch])}\n{format_table(fresh, measured)}\n", flush=True)
    print(LEGEND + (f"\nmeasured: {results}; est/meas: {BESIDE}" if results else ""))
    method = (
        "A model's estimate from the compiler's figures, for a card that was not there: nothing was measured. "
        f"Assumed: {LAUNCH * 1e6:g} us a launch, {LATENCY} cycles a load."
    )
    tops = {"copy_gbs": chosen.copy_gbs, "tflops": dict(chosen.tflops), "source": chosen.source}
    path = out / "predict.json"
    files.write(path, {**files.estimate("predict", f"NVIDIA {chosen.name}", method, tops), "rows": rows})
    print(f"written to {path}")
    return 0
