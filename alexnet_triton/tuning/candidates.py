"""Configs worth a try for a problem, and what speaks against one before it is compiled.

A config is left out at once where the arithmetic of its tiles already decides: products that fall outside the answer,
sums that do not fit the registers, stages that do not fit shared memory, a card that stands idle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

from alexnet_triton.kernels.config import (
    Config,
    ConvConfig,
    ConvProblem,
    LinearConfig,
    LinearProblem,
    NormPoolConfig,
    NormPoolProblem,
    Problem,
    WeightGradientConfig,
    WeightGradientProblem,
)
from alexnet_triton.kernels.target import Target, cdiv, power_of_two
from alexnet_triton.tuning.compiler import PRODUCTS_PER_CYCLE

MOST_WASTE = 0.25
"""Share of a launch's products that may fall outside the answer, unless every candidate wastes more."""

MOST_SUMS = 192
"""Float32 sums that a thread may hold: of its 255 registers, addresses and operands need the rest."""

MOST = 5
"""Candidates that are left to the compiler, the default beside them."""

LEAST_SUMS = 8
"""Sums under which a thread has too little to do for what its loop costs."""

MOST_CYCLES = 1.25
"""Times the least `cycles` among the candidates that one may need."""

L2_BYTES, MEMORY_BYTES = 64, 13
"""Bytes a cycle that a multiprocessor draws from the second-level cache, and its share of the memory's: an H100's."""

WIDTHS = ((32, 0), (64, 0), (64, 32), (128, 0), (128, 64), (256, 0))
"""Block and extra block of filters."""


class Objection(NamedTuple):
    """Why a config is not timed."""

    reason: str
    """Of a kind, to be counted."""
    figure: str = ""
    """What it is here."""

    def __str__(self) -> str:
        return f"{self.reason}: {self.figure}" if self.figure else self.reason


def candidates(problem: Problem, target: Target) -> list[Config]:
    """The default, then every other config worth a look, without repeats."""
    others: dict[type[Problem], Callable[..., Iterator[Config]]] = {
        ConvProblem: _conv,
        WeightGradientProblem: _weight_gradient,
        LinearProblem: _linear,
        NormPoolProblem: _norm_pool,
    }
    return list(dict.fromkeys([problem.default(target), *others[type(problem)](problem, target)]))


def _conv(problem: ConvProblem, target: Target) -> Iterator[ConvConfig]:
    crs = 32 if problem.dtype.itemsize == 4 else 64
    for npq, (k, extra), warps in product((64, 128, 256), WIDTHS, (4, 8)):
        for stages in _stages(target, (npq + k + extra) * crs * problem.dtype.itemsize):
            yield ConvConfig(npq, k, extra, crs, warps, stages)


def _weight_gradient(problem: WeightGradientProblem, target: Target) -> Iterator[WeightGradientConfig]:
    default = problem.default(target)
    columns = problem.taps_h * problem.taps_w * problem.depth
    npq = default.block_npq
    for crs, (k, extra), warps in product((64, 128, 256), WIDTHS, (4, 8)):
        tiles = cdiv(columns, crs) * cdiv(problem.filters, k + extra) * problem.groups
        whole = max(1, target.multiprocessors // tiles)
        for splits in sorted({default.splits, whole, 2 * whole}):
            for stages in _stages(target, (crs + k + extra) * npq * problem.dtype.itemsize):
                yield WeightGradientConfig(crs, k, extra, npq, splits, warps, stages)


def _linear(problem: LinearProblem, target: Target) -> Iterator[LinearConfig]:
    rows, columns, reduction = sizes(problem)
    for m, n, k, warps in product((16, 32, 64, 128), (32, 64, 128, 256), (64, 128), (4, 8)):
        if m > max(16, power_of_two(rows)) or k > max(16, power_of_two(reduction)):
            continue
        tiles = cdiv(rows, m) * cdiv(columns, n)
        whole = max(1, target.multiprocessors // tiles)
        for splits in sorted({1, whole, 2 * whole}):
            if splits > 1 and cdiv(reduction, k) < 4 * splits:
                continue
            for stages in _stages(target, (m + n) * k * problem.dtype.itemsize):
                yield LinearConfig(m, n, k, splits, warps, stages)


def _norm_pool(problem: NormPoolProblem, target: Target) -> Iterator[NormPoolConfig]:
    threads = 64 if target.backend == "hip" else 32
    for lanes, warps in product((4, 8, 16) if problem.backward else (8,), (1, 2, 4)):
        for strip in (1,) if problem.backward else (1, 2, 4, 7):
            yield NormPoolConfig(threads * warps, lanes, strip, warps)


def _stages(target: Target, bytes_a_stage: int) -> Iterator[int]:
    """Numbers of stages: as many as fit, and one fewer; two at least, so that what does not fit is said."""
    most = max(2, min(2 if target.backend == "hip" else 5, target.shared_memory // bytes_a_stage))
    yield from sorted({max(2, most - 1), most})


def sizes(problem: LinearProblem) -> tuple[int, int, int]:
    """Rows, columns and reduction of a linear layer's product."""
    n, o, i = problem.images, problem.outputs, problem.features
    return {"forward": (n, o, i), "data gradient": (n, i, o), "weight gradient": (o, i, n)}[problem.direction]


# --- what speaks against one --------------------------------------------------------------------------------


def tile(problem: Problem, config: Config) -> tuple[int, int, int, int, int]:
    """Of a product: its answer's rows and columns, a tile's rows and columns, and the launch's programs."""
    if isinstance(problem, ConvProblem):
        assert isinstance(config, ConvConfig)
        rows, columns = problem.images * problem.out_h * problem.out_w, problem.filters
        height, width, times = config.block_npq, config.block_k + config.extra_k, problem.groups
    elif isinstance(problem, WeightGradientProblem):
        assert isinstance(config, WeightGradientConfig)
        rows, columns = problem.taps_h * problem.taps_w * problem.depth, problem.filters
        height, width, times = config.block_crs, config.block_k + config.extra_k, problem.groups * config.splits
    else:
        assert isinstance(problem, LinearProblem)
        assert isinstance(config, LinearConfig)
        rows, columns, _ = sizes(problem)
        height, width, times = config.block_m, config.block_n, config.splits
    return rows, columns, height, width, cdiv(rows, height) * cdiv(columns, width) * times


def waste(problem: Problem, config: Config) -> float:
    """Share of a launch's products that fall outside the answer."""
    if isinstance(problem, NormPoolProblem):
        return 0.0
    rows, columns, height, width, _ = tile(problem, config)
    return 1 - rows * columns / (cdiv(rows, height) * height * cdiv(columns, width) * width)


def cycles(problem: Problem, config: Config, target: Target, issue_share: float = 0.0) -> float:
    """Cycles of the busiest multiprocessor by the arithmetic of the tiles: their products, or what they ask of L2.

    No fewer than the memory needs for operands and answer, each moved once; partial sums of splits are written and read
    once more. Only ratios between configs of one problem mean anything.

    Args:
        problem: what is to be done.
        config: how.
        target: where.
        issue_share: of the loop, as the compiler tells it: from a half on the products wait for instructions.
    """
    if isinstance(problem, NormPoolProblem):
        return 1.0
    rows, columns, height, width, programs = tile(problem, config)
    groups, itemsize = 1, problem.dtype.itemsize
    if isinstance(problem, LinearProblem):
        assert isinstance(config, LinearConfig)
        splits, reduction = config.splits, sizes(problem)[2]
        moved = rows * reduction + reduction * columns + rows * columns
    elif isinstance(problem, WeightGradientProblem):
        assert isinstance(config, WeightGradientConfig)
        splits, groups, reduction = config.splits, problem.groups, problem.images * problem.pitch_h * problem.pitch_w
        moved = reduction * (problem.depth + columns) + rows * columns
    else:
        splits, groups, reduction = 1, problem.groups, problem.taps_h * problem.taps_w * problem.depth
        moved = rows * (problem.depth + columns) + reduction * columns
    length = cdiv(reduction, splits)
    products = height * width / PRODUCTS_PER_CYCLE.get(target.arch, PRODUCTS_PER_CYCLE[90]) * max(1.0, 2 * issue_share)
    program = length * max(products, (height + width) * itemsize / L2_BYTES)
    sums = 2 * splits * groups * rows * columns * 4 if splits > 1 else 0
    memory = target.multiprocessors * MEMORY_BYTES
    return max(cdiv(programs, target.multiprocessors) * program, groups * moved * itemsize / memory) + sums / memory


def sums_a_thread(problem: Problem, config: Config, target: Target) -> float:
    """Float32 sums that a thread holds."""
    if isinstance(problem, NormPoolProblem):
        return 0.0
    _, _, height, width, _ = tile(problem, config)
    assert not isinstance(config, NormPoolConfig)
    return height * width / (config.warps * (64 if target.backend == "hip" else 32))


def stage_bytes(problem: Problem, config: Config) -> int:
    """Shared memory that the stages of a program need at least."""
    if isinstance(config, NormPoolConfig):
        return 0
    itemsize = problem.dtype.itemsize
    _, _, height, width, _ = tile(problem, config)
    if isinstance(config, ConvConfig):
        step = config.block_crs
    else:
        step = config.block_npq if isinstance(config, WeightGradientConfig) else config.block_k
    return config.stages * (height + width) * step * itemsize


def objections(problem: Problem, configs: list[Config], target: Target) -> dict[Config, Objection]:
    """What speaks against configs; the default, the first, is always spared."""
    found: dict[Config, Objection] = {}
    least_waste = min(waste(problem, config) for config in configs)
    for config in configs[1:]:
        wasted, sums = waste(problem, config), sums_a_thread(problem, config, target)
        stages = stage_bytes(problem, config)
        if wasted > max(MOST_WASTE, least_waste):
            found[config] = Objection("too many products fall outside the answer", f"{wasted:.0%}")
        elif sums > MOST_SUMS:
            found[config] = Objection("a thread holds too many sums", f"{sums:.0f}")
        elif sums < LEAST_SUMS and not isinstance(problem, NormPoolProblem):
            found[config] = Objection("a thread holds too few sums", f"{sums:.0f}")
        elif stages > target.shared_memory:
            found[config] = Objection("its stages need more shared memory than there is", f"{stages:,} bytes")
    left = [config for config in configs if config not in found]
    needed = {config: cycles(problem, config, target) for config in left}
    least = min(needed.values())
    for config in left[1:]:
        times = needed[config] / least
        if times > MOST_CYCLES:
            found[config] = Objection("its tiles need more cycles than the best's", f"{times:.1f} times as many")
    left = sorted((config for config in left[1:] if config not in found), key=needed.__getitem__)
    for config in left[MOST:]:
        found[config] = Objection("enough others need no more cycles by their tiles")
    return found
