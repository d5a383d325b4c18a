"""Memory of a training process on a CPU."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let this process's malloc keep large blocks that are freed, for those that are asked for next.

    AlexNet's gradients are 250 MB in few large blocks. By default glibc takes each from the system and gives
    it back at every step, and the system clears every page of it anew. For a process of one's own (a command
    line), not for a library: memory that was once used stays with the process.

    Returns:
        Whether the C library knows the setting (glibc does).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
