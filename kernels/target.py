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
    card: str = ""
    """The device's name, as tuned configs are kept by."""


TARGETS = {
    "sm_80": Target("cuda", 80, 108, 166_912, "A100"),
    "sm_86": Target("cuda", 86, 84, 101_376, "RTX 3090"),
    "sm_89": Target("cuda", 89, 128, 101_376, "RTX 4090"),
    "sm_90": Target("cuda", 90, 132, 232_448, "H100"),
    "sm_100": Target("cuda", 100, 148, 232_448, "B200"),
    "sm_120": Target("cuda", 120, 170, 101_376, "RTX 5090"),
    "gfx90a": Target("hip", "gfx90a", 104, 65_536, "MI250"),
    "gfx942": Target("hip", "gfx942", 304, 65_536, "MI300X"),
    "gfx950": Target("hip", "gfx950", 256, 163_840, "MI355X"),
}
"""GPUs by the name of their architecture.

Shared memory a block from the CUDA programming guide's table of compute capabilities and AMD's ISA documents.
"""

INTERPRETER = Target("cpu", "interpreter", 1, 1 << 40)


def cdiv(a: int, b: int) -> int:
    """Quotient, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Least power of two that is at least `n`."""
    return 1 << max(0, n - 1).bit_length()
