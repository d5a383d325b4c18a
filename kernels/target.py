"""GPUs as far as a launch depends on them, and the arithmetic of tiles."""

from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    """A device as far as a launch's configuration depends on it."""

    backend: str
    """`"cuda"`, `"hip"`, or `"cpu"` for the interpreter."""
    arch: int | str
    """Compute capability (90) or architecture (`"gfx942"`)."""
    multiprocessors: int
    shared_memory: int
    """Bytes that one program may have."""


TARGETS = {
    "sm_80": Target("cuda", 80, 108, 166_912),
    "sm_86": Target("cuda", 86, 84, 101_376),
    "sm_89": Target("cuda", 89, 128, 101_376),
    "sm_90": Target("cuda", 90, 132, 232_448),
    "sm_100": Target("cuda", 100, 148, 232_448),
    "sm_120": Target("cuda", 120, 170, 101_376),
    "gfx90a": Target("hip", "gfx90a", 104, 65_536),
    "gfx942": Target("hip", "gfx942", 304, 65_536),
    "gfx950": Target("hip", "gfx950", 256, 163_840),
}
"""GPUs by the name of their architecture: A100, RTX 3090, RTX 4090, H100, B200, RTX 5090, MI250, MI300X, MI355X.

Shared memory a block from the CUDA programming guide's table of compute capabilities and AMD's ISA documents.
"""

INTERPRETER = Target("cpu", "interpreter", 1, 1 << 40)


def cdiv(a: int, b: int) -> int:
    """Quotient, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Least power of two that is at least `n`."""
    return 1 << max(0, n - 1).bit_length()
