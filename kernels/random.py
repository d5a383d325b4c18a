"""The random stream of dropout: which element is kept depends on a seed and on the element's number, on nothing else.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with the 64-bit seed as its key. The
element in row r and column c of a matrix of C columns has number e = r * C + c; its word is output e % 4 of counter
e // 4. So a forward pass, a backward pass and a reference draw the same mask, whatever their blocks are.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


def seed(device: torch.device) -> Tensor:
    """Draw a seed from torch's generator of `device`, which advances.

    No number reaches the host, so a CUDA graph may hold the draw.

    Returns:
        int64, (1,).
    """
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def last_dropped(p: float) -> int:
    """The largest word that drops its element: a word w is kept where w >= p * 2^32, and p = 1 keeps none.

    Args:
        p: probability of dropping an element, in (0, 1].

    Returns:
        A number that fits 32 bits, as p * 2^32 itself does not where p = 1.
    """
    return math.ceil(p * 2**32) - 1


def scale(p: float) -> float:
    """What a kept element is multiplied by. With p = 1 none is kept, and no infinity must arise."""
    return 1 / (1 - p) if p < 1 else 0.0


@triton.jit
def words(key, counter):
    """Four blocks of uint32: the outputs of Philox for int64 counters under an int64 key."""
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(key, low, high, zero, zero)


@triton.jit
def keep(
    key, row, first_column, columns, dropped,
    BLOCK_COLUMNS: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Which elements of a tile of a matrix are kept.

    `row` holds the tile's row numbers, int64; its columns are BLOCK_COLUMNS from `first_column`, a multiple of 4.
    `key` is the seed and `dropped` is `last_dropped`. QUADS says that `columns` is a multiple of 4: then each
    counter is drawn once for its four elements. The stream is the same.
    """
    dropped = tl.cast(dropped, tl.uint32)
    if QUADS:
        quad = first_column // 4 + tl.arange(0, BLOCK_COLUMNS // 4)
        w0, w1, w2, w3 = words(key, row[:, None] * (columns // 4) + quad[None, :])
        kept = tl.join(tl.join(w0 > dropped, w2 > dropped), tl.join(w1 > dropped, w3 > dropped))
        return tl.reshape(kept, (row.shape[0], BLOCK_COLUMNS))
    else:
        element = row[:, None] * columns + (first_column + tl.arange(0, BLOCK_COLUMNS))[None, :]
        w0, w1, w2, w3 = words(key, element >> 2)
        output = element & 3
        word = tl.where(output < 2, tl.where(output == 0, w0, w1), tl.where(output == 2, w2, w3))
        return word > dropped
