"""Configs worth a try for a problem, and what speaks against one before it is compiled.

A config is left out at once where the arithmetic of its tiles already decides: products that fall outside the answer,
sums that do not fit the registers, stages that do not fit shared memory, a card that stands idle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

from alexnet_triton.kernels import schedule
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
    stage_bytes,
)
from alexnet_triton.kernels.schedule import Product, Tile
from alexnet_triton.kernels.target import Target, power_of_two

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

WIDTHS = ((32, 0), (32, 16), (64, 0), (64, 32), (128, 0), (128, 64), (256, 0))
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
        splits = _splits(problem.product, Tile(npq, k + extra, crs), target)
        for stages in _stages(target, (npq + k + extra) * crs * problem.dtype.itemsize):
            for parts in splits:
                yield ConvConfig(npq, k, extra, crs, warps, stages, parts, "gathered")
            if target.arch == 90 and problem.run % crs == 0:  # whose copy engine it is for
                yield ConvConfig(npq, k, extra, crs, warps, stages, splits[0], "shifted")


def _weight_gradient(problem: WeightGradientProblem, target: Target) -> Iterator[WeightGradientConfig]:
    npq = problem.default(target).block_npq
    for crs, (k, extra), warps in product((64, 128, 256), WIDTHS, (4, 8)):
        for splits in _splits(problem.product, Tile(crs, k + extra, npq), target):
            for stages in _stages(target, (crs + k + extra) * npq * problem.dtype.itemsize):
                yield WeightGradientConfig(crs, k, extra, npq, splits, warps, stages)


def _linear(problem: LinearProblem, target: Target) -> Iterator[LinearConfig]:
    rows, _, reduction = problem.product[:3]
    for m, n, k, warps in product((16, 32, 64, 128), (32, 64, 128, 256), (64, 128), (4, 8)):
        if m > max(16, power_of_two(rows)) or k > max(16, power_of_two(reduction)):
            continue
        for splits in _splits(problem.product, Tile(m, n, k), target):
            for stages in _stages(target, (m + n) * k * problem.dtype.itemsize):
                yield LinearConfig(m, n, k, splits, warps, stages)


def _splits(product: Product, tile: Tile, target: Target) -> list[int]:
    """The splits that cost least by the model, the next fewer that fill the card as well, and none."""
    best = schedule.split(product, tile, target).splits
    return list(dict.fromkeys([best, max(1, best // 2), 1]))


def _norm_pool(problem: NormPoolProblem, target: Target) -> Iterator[NormPoolConfig]:
    threads = 64 if target.backend == "hip" else 32
    for lanes, warps in product((4, 8, 16) if problem.backward else (8,), (1, 2, 4)):
        for strip in (1,) if problem.backward else (1, 2, 4, 7):
            yield NormPoolConfig(threads * warps, lanes, strip, warps)


def _stages(target: Target, bytes_a_stage: int) -> Iterator[int]:
    """Numbers of stages: as many as fit, and one fewer; two at least, so that what does not fit is said."""
    most = max(2, min(2 if target.backend == "hip" else 5, target.shared_memory // bytes_a_stage))
    yield from sorted({max(2, most - 1), most})


# --- what speaks against one --------------------------------------------------------------------------------


def waste(problem: Problem, config: Config) -> float:
    """Share of a launch's products that fall outside the answer."""
    if isinstance(problem, NormPoolProblem) or isinstance(config, NormPoolConfig):
        return 0.0
    done = schedule.tiles(_made(problem, config), config.tile) * config.tile.rows * config.tile.columns
    answer = problem.product
    return 1 - answer.rows * answer.columns * answer.groups / done


def _made(problem: ConvProblem | WeightGradientProblem | LinearProblem, config: Config) -> Product:
    """The product as a loop makes it: the shifted one makes the rows of the border too."""
    if isinstance(problem, ConvProblem) and isinstance(config, ConvConfig) and config.loop == "shifted":
        # A map as large as its convolution's answer has so wide a border.
        height, width = problem.out_h + problem.taps_h // 2, problem.out_w + problem.taps_w // 2
        return problem.product._replace(rows=problem.images * height * width)
    return problem.product


def cycles(problem: Problem, config: Config, target: Target, issue_share: float = 0.0) -> float:
    """`schedule.cycles` of a config. Only ratios between configs of one problem mean anything.

    Args:
        problem: what is to be done.
        config: how.
        target: where.
        issue_share: of the loop, as the compiler tells it: from a half on the products wait for instructions.
    """
    if isinstance(problem, NormPoolProblem) or isinstance(config, NormPoolConfig):
        return 1.0
    return schedule.cycles(_made(problem, config), config.tile, target, issue_share)


def sums_a_thread(config: Config, target: Target) -> float:
    """Float32 sums that a thread holds."""
    if isinstance(config, NormPoolConfig):
        return 0.0
    tile = config.tile
    return tile.rows * tile.columns / (config.warps * (64 if target.backend == "hip" else 32))


def objections(problem: Problem, configs: list[Config], target: Target) -> dict[Config, Objection]:
    """What speaks against configs; the default, the first, is always spared."""
    found: dict[Config, Objection] = {}
    least_waste = min(waste(problem, config) for config in configs)
    for config in configs[1:]:
        wasted, sums = waste(problem, config), sums_a_thread(config, target)
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
