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

from alexnet_triton.configs import cache
from alexnet_triton.configs.cache import Entry
from alexnet_triton.kernels import config as kernels_config
from alexnet_triton.kernels.config import Config, Problem
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
    """The tuned config of a problem, or None."""
    if not target.card:
        return None
    key = cache.problem_key(problem)
    op = type(problem)
    sources = [_current(_users(target.card).get(key, {}), op, True), _current(shipped(target.card).get(key, {}), op)]
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


def _current(entries: dict[int, Entry], op: type[Problem], needs_triton: bool = False) -> dict[int, Config]:
    """The configs that count for these kernels and, where asked, for this Triton."""
    if not entries:
        return {}
    import triton

    kernel = cache.kernel_hash(cache.OPS[op])
    found = {}
    for images, entry in entries.items():
        if entry.kernel != kernel or (needs_triton and entry.triton != triton.__version__):
            continue
        try:
            found[images] = cache.config_of(entry, op)
        except ValueError as error:
            warnings.warn(f"a tuned config is ignored: {error}", stacklevel=2)
    return found


@functools.cache
def _users(card: str) -> dict[str, dict[int, Entry]]:
    return cache.read(cache.cache_path()).get(card, {})


@functools.cache
def shipped(card: str) -> dict[str, dict[int, Entry]]:
    """The entries that ship for a card: of the file whose name is a word of the card's."""
    words = re.findall(r"[a-z0-9]+", card.lower())
    for path in sorted(files(__package__).iterdir(), key=lambda path: path.name):
        name = path.name.removesuffix(".json")
        if path.name.endswith(".json") and name in words:
            return cache.parse(path.read_text(encoding="utf-8")).get(name, {})
    return {}
