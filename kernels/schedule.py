"""How the tiles of a matrix product fill a card, in cycles of its busiest multiprocessor.

A model, with an H100's figures, of what a config costs: products of a tile, or what they ask of the second-level cache;
whole waves of tiles; operands and answer moved once; partial sums written and read once more. `config` chooses by it
among tiles that are known to compile well, and `alexnet_triton.tuning` sorts candidates by it. Only the order and the
ratios of its answers for one product mean anything.
"""

from __future__ import annotations

from typing import NamedTuple

from alexnet_triton.kernels.target import Target, cdiv

L2_BYTES, MEMORY_BYTES, MOST_MEMORY_BYTES = 64, 13, 15
"""Bytes a cycle: that a multiprocessor draws from the second-level cache, its share of the memory's, and the most that
it draws from memory where others idle, which an eighth of them may. The last is assumed."""

L2_SIZE = 25 << 20
"""Bytes of partial sums that stay in the second-level cache until they are added: half of it, where nothing streams."""

STEP_CYCLES, LAUNCH_CYCLES = 200, 2_500
"""Of a step of a pipelined loop at least, and of a second launch. Assumed, as `bench predict` does."""


class Product(NamedTuple):
    """A product of two matrices, or several alike."""

    rows: int
    """Of the answer."""
    columns: int
    """Of the answer."""
    reduction: int
    """Length of the sum."""
    itemsize: int
    """Bytes of an operand's element."""
    groups: int = 1
    """So many products."""
    moved: int = 0
    """Bytes of all operands and answers, each once."""
    streams: bool = False
    """Whether most of it comes from memory, not from the second-level cache: then it passes that cache twice."""
    always_adds: bool = False
    """Whether partial sums are added in a second launch even where there is one part."""


class Tile(NamedTuple):
    """What a program makes of a product."""

    rows: int
    columns: int
    step: int
    """Of the sum."""
    splits: int = 1
    """Parts into which the sum is divided, each a program's."""


def tiles(product: Product, tile: Tile) -> int:
    """Tiles of a product, its sum undivided."""
    return cdiv(product.rows, tile.rows) * cdiv(product.columns, tile.columns) * product.groups


def programs(product: Product, tile: Tile) -> int:
    """Programs of a product: one for each tile and each part of its sum that is not empty."""
    steps = cdiv(product.reduction, tile.step)
    return tiles(product, tile) * cdiv(steps, cdiv(steps, tile.splits))


def cycles(product: Product, tile: Tile, target: Target, issue_share: float = 0.0) -> float:
    """Cycles of the busiest multiprocessor.

    Args:
        product: what is to be done.
        tile: how.
        target: where.
        issue_share: of the loop, as the compiler tells it: from a half on the products wait for instructions.
    """
    products = 1024 if target.arch == 80 or target.backend == "hip" else 2048
    multiply = tile.rows * tile.columns * tile.step / products * (product.itemsize / 2) * max(1.0, 2 * issue_share)
    l2 = L2_BYTES / 2 if product.streams else L2_BYTES
    turn = max(multiply, (tile.rows + tile.columns) * tile.step * product.itemsize / l2)
    steps = cdiv(product.reduction, tile.step)
    share = cdiv(steps, tile.splits)
    parts = cdiv(steps, share)
    busiest = cdiv(tiles(product, tile) * parts, target.multiprocessors)
    # Two programs, where a multiprocessor has them, hide each other's waiting.
    needed = max(busiest * share * turn, cdiv(busiest, 2) * share * STEP_CYCLES)
    memory = target.multiprocessors * MEMORY_BYTES
    drawing = max(1, min(target.multiprocessors, tiles(product, tile) * parts))
    needed = max(needed, product.moved / min(memory, drawing * MOST_MEMORY_BYTES))
    if parts > 1 or product.always_adds:
        sums = parts * product.groups * product.rows * product.columns * 4
        rate = target.multiprocessors * L2_BYTES / 2 if sums <= L2_SIZE and not product.streams else memory
        needed += 2 * sums / rate + (0 if product.always_adds else LAUNCH_CYCLES)
    return needed


def split(product: Product, tile: Tile, target: Target) -> Tile:
    """`tile` with the splits that cost least. A split of fewer steps would write more sums than it reads operands."""
    steps = cdiv(product.reduction, tile.step)
    enough = 8 * target.multiprocessors // max(1, tiles(product, tile))
    most = min(steps // (8 if product.streams else 4), enough)
    choices = [tile._replace(splits=splits) for splits in range(1, max(1, most) + 1)]
    return min(choices, key=lambda one: cycles(product, one, target))
