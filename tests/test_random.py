import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from alexnet_triton.kernels import random

WORD = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox(key, counters):
    """Philox4x32-10 from the paper's description, in NumPy: four uint32 words for each uint64 counter."""
    counters = np.asarray(counters, np.uint64)
    zero = np.zeros_like(counters)
    return philox_of(key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF, counters & WORD, counters >> HALF, zero, zero)


def philox_of(k0, k1, c0, c1, c2, c3):
    for _ in range(10):
        left, right = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = (right >> HALF) ^ c1 ^ np.uint64(k0), right & WORD
        c2, c3 = (left >> HALF) ^ c3 ^ np.uint64(k1), left & WORD
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1)


def mask(seed, rows, columns, p, first_row=0):
    """Which elements are kept, (rows, columns): the definition, without the kernels."""
    elements = (first_row + np.arange(rows, dtype=np.uint64))[:, None] * np.uint64(columns) + np.arange(
        columns, dtype=np.uint64
    )
    words = philox(seed, elements >> np.uint64(2))
    word = np.take_along_axis(words, (elements & np.uint64(3)).astype(np.int64)[..., None], -1)[..., 0]
    return torch.from_numpy(word.astype(np.float64) >= p * 2.0**32)


@triton.jit
def keep_kernel(
    seed, out, first_row, rows, columns, dropped,
    QUADS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    row = (tl.program_id(0) // tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    first_column = tl.program_id(0) % tiles * BLOCK_COLUMNS
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    kept = random.keep(tl.load(seed), first_row + row, first_column, columns, dropped, BLOCK_COLUMNS, QUADS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + row[:, None] * columns + column[None, :], kept.to(tl.int8), mask=inside)


def keep(seed, rows, columns, p, blocks=(8, 256), first_row=0, quads=None):
    """The mask that kernels draw."""
    out = torch.full((rows, columns), 7, dtype=torch.int8)
    programs = math.ceil(rows / blocks[0]) * math.ceil(columns / blocks[1])
    keep_kernel[(programs,)](
        torch.tensor([seed]), out, first_row, rows, columns, random.last_dropped(p),
        columns % 4 == 0 if quads is None else quads, *blocks,
    )  # fmt: skip
    assert out.max() <= 1
    return out.bool()


@triton.jit
def philox_kernel(key, counter, out):
    c0, c1, c2, c3 = tl.load(counter), tl.load(counter + 1), tl.load(counter + 2), tl.load(counter + 3)
    w0, w1, w2, w3 = tl.philox(tl.load(key), c0, c1, c2, c3)
    tl.store(out, w0.to(tl.int64))
    tl.store(out + 1, w1.to(tl.int64))
    tl.store(out + 2, w2.to(tl.int64))
    tl.store(out + 3, w3.to(tl.int64))


KNOWN = [
    (0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (-1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
]


@pytest.mark.parametrize(("ones", "expected"), KNOWN)
def test_the_generator_gives_random123s_known_answers(ones, expected):
    out = torch.zeros(4, dtype=torch.int64)
    philox_kernel[(1,)](torch.tensor([ones]), torch.full((4,), ones, dtype=torch.int32), out)
    assert tuple(out.tolist()) == expected
    word = np.uint64(ones & 0xFFFFFFFF)
    assert tuple(philox_of(int(word), int(word), word, word, word, word).tolist()) == expected


CASES = [
    (0, (5, 64)),
    (1, (3, 36)),
    (-1, (7, 33)),
    (2**63 - 1, (6, 1)),
    (-(2**63), (9, 4)),
    (0x1234_5678_9ABC_DEF0, (2, 1030)),
]


@pytest.mark.parametrize(("seed", "size"), CASES)
def test_the_mask_is_the_definitions(seed, size):
    assert torch.equal(keep(seed, *size, 0.5), mask(seed, *size, 0.5))


@pytest.mark.parametrize("blocks", [(4, 16), (16, 64), (1, 1024)])
def test_blocks_and_the_number_of_words_drawn_at_once_do_not_change_the_mask(blocks):
    expected = mask(11, 13, 100, 0.3)
    assert torch.equal(keep(11, 13, 100, 0.3, blocks), expected)
    assert torch.equal(keep(11, 13, 100, 0.3, blocks, quads=False), expected)


@pytest.mark.parametrize("columns", [9216, 9215])
def test_elements_are_numbered_in_64_bits(columns):
    for first_row in (2**32 // columns - 1, 2**34 // columns - 1, 2**40 + 5):
        assert torch.equal(keep(3, 3, columns, 0.5, (2, 2048), first_row), mask(3, 3, columns, 0.5, first_row))
    here, wrapped = keep(3, 1, 4096, 0.5, first_row=2**22), keep(3, 1, 4096, 0.5)  # 2^34 elements on: counter 2^32
    assert not torch.equal(here, wrapped)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_right_share_is_kept(p):
    kept = keep(5, 1000, 1000, p, (1024, 1024))
    assert abs(kept.double().mean().item() - (1 - p)) < 3 * math.sqrt(p * (1 - p) / kept.numel())
    share = 3.5 * math.sqrt(p * (1 - p) / 250_000)  # of each of the four words
    assert all(abs(kept[:, word::4].double().mean().item() - (1 - p)) < share for word in range(4))


def test_the_ends_of_the_range_of_p():
    assert not keep(0, 64, 64, 1.0).any()
    assert keep(0, 64, 64, 2.0**-32).all()  # one element in 2^32 is dropped
    assert (random.scale(0.0), random.scale(0.5), random.scale(1.0)) == (1, 2, 0)
    assert [random.last_dropped(p) for p in (2.0**-32, 0.5, 1.0)] == [0, 2**31 - 1, 2**32 - 1]


def test_rows_differ_and_so_do_neighbouring_seeds():
    masks = [keep(seed, 64, 256, 0.5) for seed in (0, 1, 2, 2**32)]
    assert len({tuple(row) for kept in masks for row in kept.tolist()}) == 4 * 64
    for other in masks[1:]:
        assert 0.45 < (masks[0] ^ other).double().mean() < 0.55


def test_seeds_follow_torchs_generator_and_advance_it():
    device = torch.device("cpu")
    torch.manual_seed(5)
    first, second = random.seed(device), random.seed(device)
    torch.manual_seed(5)
    assert torch.equal(random.seed(device), first)
    assert torch.equal(random.seed(device), second)
    assert first != second
    assert (first.shape, first.dtype) == ((1,), torch.int64)


def test_seeds_use_all_64_bits():
    seeds = [random.seed(torch.device("cpu")).item() & (2**64 - 1) for _ in range(256)]
    assert len(set(seeds)) == 256
    for bit in range(64):
        assert 70 < sum(seed >> bit & 1 for seed in seeds) < 186
