"""Which config a launch gets: the user's cache, what ships for the card, or the rule of `kernels.config`.

In this order: the user's entry for the very shape and batch; the shipped one; of both, the nearest batch's, if it is at
most `FARTHEST` times as large or as small; the rule's, which is right everywhere. The user's entries count for the
Triton and the kernels that they were tuned with, the shipped ones for those kernels.

Shipped files lie in this folder, one a card, and `alexnet-triton autotune` writes the user's (see `cache`). Nothing is
ever tuned while a network runs.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

from alexnet_triton.configs import cache
from alexnet_triton.configs.cache import Entry
from alexnet_triton.kernels import config as kernels_config
from alexnet_triton.kernels.config import Config, ConvConfig, ConvProblem, NormPoolConfig, Problem, stage_bytes
from alexnet_triton.kernels.target import Target

FARTHEST = 4
"""Times by which a batch may differ from the one that a config was chosen for."""


def install() -> None:
    """Let launches take tuned configs, from now on."""
    kernels_config.look_up_with(lookup)


def forget() -> None:
    """Read the files again when a config is next asked for: after tuning, or when the environment has changed."""
    _users.cache_clear()
    shipped.cache_clear()
    kernels_config.choose.cache_clear()


def lookup(target: Target, problem: Problem) -> Config | None:
    """The tuned config of a problem, or None where none is near enough.

    Args:
        target: the GPU; one without a card's name has none.
        problem: the launch: op, shapes, dtype, images.
    """
    if not target.card:
        return None
    key = cache.problem_key(problem)
    sources = [
        _current(_users(target.card).get(key, {}), target, problem, True),
        _current(shipped(target.card).get(key, {}), target, problem),
    ]
    for entries in sources:
        if problem.images in entries:
            return entries[problem.images]
    if problem.images < 1:
        return None
    distances = [
        (abs(math.log2(images / problem.images)), number, config)
        for number, entries in enumerate(sources)
        for images, config in entries.items()
        if images
    ]
    nearest = min(distances, key=lambda found: found[:2], default=None)
    return nearest[2] if nearest and nearest[0] <= math.log2(FARTHEST) else None


def in_force(card: str) -> dict[str, Any]:
    """The user's file, and how many entries for a card it and the shipped one have, and count here.

    Args:
        card: its name as files have it, such as `"h100"`.
    """
    import triton

    def count(problems: dict[str, dict[int, Entry]], needs_triton: bool) -> dict[str, int]:
        given = [(problem.partition(" ")[0], one) for problem, batches in problems.items() for one in batches.values()]
        hashes = {op: cache.kernel_hash(op) for op in cache.OPS.values()}
        counting = [one for op, one in given if hashes.get(op) == one.kernel]
        counting = [one for one in counting if not needs_triton or one.triton == triton.__version__]
        return {"entries": len(given), "counting": len(counting)}

    users, ships = count(_users(card), True), count(shipped(card), False)
    return {"tuned": {"file": str(_users_file()), **users}, "shipped": ships}


def _current(
    entries: dict[int, Entry], target: Target, problem: Problem, needs_triton: bool = False
) -> dict[int, Config]:
    """The configs that count for these kernels and, where asked, for this Triton, and that a card can take."""
    if not entries:
        return {}
    import triton

    op = type(problem)
    kernel = cache.kernel_hash(cache.OPS[op])
    found = {}
    for images, entry in entries.items():
        if entry.kernel != kernel or (needs_triton and entry.triton != triton.__version__):
            continue
        try:
            config = cache.config_of(entry, op)
            check_fits(problem, config, target)
            found[images] = config
        except ValueError as error:
            warnings.warn(f"a tuned config is ignored: {error}", stacklevel=2)
    return found


MOST_ELEMENTS = 2**20
"""Of a tile: Triton's own limit."""


def check_fits(problem: Problem, config: Config, target: Target) -> None:
    """Refuse a config whose launch must fail on a card: no candidate of tuning is one.

    Raises:
        ValueError: its tiles, or its parts of a sum, are more than a card can take.
    """
    if isinstance(config, NormPoolConfig):
        elements, splits = config.block * config.lanes, 1
    else:
        elements, splits = config.tile.rows * config.tile.columns, config.splits
    needed = stage_bytes(problem, config)
    if elements > MOST_ELEMENTS:
        raise ValueError(f"a tile of {elements:,} elements is more than Triton takes, in {config}")
    if needed > target.shared_memory:
        has = f"a program has {target.shared_memory:,}"
        raise ValueError(f"its stages need {needed:,} bytes of shared memory, {has}, in {config}")
    if splits > 8 * target.multiprocessors:
        raise ValueError(f"{splits:,} parts of a sum are more than {target.multiprocessors} multiprocessors need")
    if isinstance(config, ConvConfig) and isinstance(problem, ConvProblem):
        config.check_loop(problem.run)


@functools.cache
def _users(card: str) -> dict[str, dict[int, Entry]]:
    path = _users_file()
    return {} if path is None else cache.read(path).get(card, {})


def _users_file() -> Path | None:
    try:
        return cache.cache_path()
    except RuntimeError:  # a user without a home has none
        return None


@functools.cache
def shipped(card: str) -> dict[str, dict[int, Entry]]:
    """The entries that ship for a card: all of the file whose name is a word of the card's, whatever they call it."""
    words = re.findall(r"[a-z0-9]+", card.lower())
    for path in sorted(files(__package__).iterdir(), key=lambda path: path.name):
        name = path.name.removesuffix(".json")
        if path.name.endswith(".json") and name in words:
            entries = cache.read(Path(str(path))).values()
            return {problem: batches for problems in entries for problem, batches in problems.items()}
    return {}
