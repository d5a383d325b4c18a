"""Local response normalisation and max pooling, forward and backward, each one kernel.

With a a map, b its normalised map and D what b divides by, within each group of channels (Krizhevsky et al. 2012,
section 3.3; alpha as `torch.nn.LocalResponseNorm` takes it)

    D[c]  = k + alpha / size * sum of a[i]^2 for i in c - size//2 .. c + (size-1)//2
    b[c]  = a[c] / D[c]^beta
    da[c] = db[c] / D[c]^beta - 2 alpha beta / size * a[c] * sum of db[i] a[i] / D[i]^(beta+1)
                                                             for i in c - (size-1)//2 .. c + size//2

the second window being the first one mirrored. db[c] is the sum of the pooled gradient over the windows of which the
pixel is the maximum. Forward saves where in its window each maximum is, and backward, which reads that and a,
looks it up in the few windows a pixel belongs to: no atomics.

Sums over channels are what costs. A thread holds a chunk of consecutive channels of a pixel, each channel in a tensor
(a *lane*) of its own, so that the sums are plain additions: the chunk comes in 16-byte loads, and of its neighbours
only the few that the window reaches are loaded again.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_triton.kernels import launch
from alexnet_triton.kernels.config import NormPoolConfig, NormPoolProblem, choose
from alexnet_triton.kernels.halo import Layout
from alexnet_triton.kernels.launch import rounded

Pair = tuple[int, int]


# --- lanes --------------------------------------------------------------------------------------------------


@triton.jit
def _tiles(
    pointer, step, c, mask,
    DEPTH: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A chunk of LANES channels from channel `c` of its group on, at least BELOW before it and ABOVE after it.

    They come in vectors, which lie wholly inside the group or wholly outside, where they are 0.
    """
    W_BELOW: tl.constexpr = _width(BELOW, VECTOR)
    W_ABOVE: tl.constexpr = _width(ABOVE, VECTOR)
    step = tl.cast(step, tl.int64)
    tiles = ()
    for i in tl.static_range(-_vectors(BELOW, VECTOR), 0):
        at = pointer[:, None] + ((i * W_BELOW + tl.arange(0, W_BELOW)) * step)[None, :]
        tiles += (tl.load(at, mask=(mask & (c + i * W_BELOW >= 0))[:, None], other=0),)
    for i in tl.static_range(LANES // VECTOR):
        at = pointer[:, None] + ((i * VECTOR + tl.arange(0, VECTOR)) * step)[None, :]
        tiles += (tl.load(at, mask=mask[:, None], other=0),)
    for i in tl.static_range(_vectors(ABOVE, VECTOR)):
        at = pointer[:, None] + ((LANES + i * W_ABOVE + tl.arange(0, W_ABOVE)) * step)[None, :]
        tiles += (tl.load(at, mask=(mask & (c + (LANES + i * W_ABOVE) < DEPTH))[:, None], other=0),)
    return tiles


@triton.constexpr_function
def _width(reach, vector):
    """Channels of a vector of neighbours."""
    return min(1 << max(0, reach - 1).bit_length(), vector)


@triton.constexpr_function
def _vectors(reach, vector):
    """Vectors that hold `reach` neighbours."""
    return -(-reach // _width(reach, vector))


@triton.constexpr_function
def _surplus(reach, vector):
    """Neighbours that these vectors hold and nobody wants."""
    return _vectors(reach, vector) * _width(reach, vector) - reach


@triton.jit
def _lanes(tiles, SURPLUS: tl.constexpr, COUNT: tl.constexpr):
    """The COUNT channels of `tiles` after the first SURPLUS, each a float32 tensor [BLOCK]."""
    BLOCK: tl.constexpr = tiles[0].shape[0]
    found = ()
    for t in tl.static_range(len(tiles)):
        # Before a turn, part i of n holds channels i, i + n, i + 2 n ... of the tile.
        parts = (tiles[t].to(tl.float32),)
        for level in tl.static_range(4):
            if (1 << level) < tiles[t].shape[1]:
                evens = ()
                odds = ()
                for i in tl.static_range(1 << level):
                    even, odd = tl.split(tl.reshape(parts[i], (BLOCK, tiles[t].shape[1] >> (level + 1), 2)))
                    evens += (even,)
                    odds += (odd,)
                parts = evens + odds
        for i in tl.static_range(tiles[t].shape[1]):
            found += (tl.reshape(parts[i], (BLOCK,)),)
    lanes = ()
    for i in tl.static_range(COUNT):
        lanes += (found[SURPLUS + i],)
    return lanes


@triton.jit
def _store(pointer, lanes, mask, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Store LANES consecutive channels: the splitting of `_lanes` backwards, and a store a vector."""
    BLOCK: tl.constexpr = lanes[0].shape[0]
    for first in tl.static_range(0, LANES, VECTOR):
        parts = ()
        for i in tl.static_range(VECTOR):
            parts += (tl.reshape(lanes[first + i], (BLOCK, 1)),)
        for level in tl.static_range(4):
            if (2 << level) <= VECTOR:
                joined = ()
                for i in tl.static_range(VECTOR >> (level + 1)):
                    pair = tl.join(parts[i], parts[i + (VECTOR >> (level + 1))])
                    joined += (tl.reshape(pair, (BLOCK, 2 << level)),)
                parts = joined
        offset = first + tl.arange(0, VECTOR)
        tl.store(pointer[:, None] + offset[None, :], rounded(parts[0], pointer), mask=mask[:, None])


# --- the formula --------------------------------------------------------------------------------------------


@triton.jit
def _powers(a, k, scale, COUNT: tl.constexpr, SIZE: tl.constexpr, BETA: tl.constexpr):
    """D^-BETA and D^(-BETA-1) of COUNT channels, of which the first one's window begins with the first lane of `a`."""
    # Sums of their own, not running ones: an infinity must stay inside its own windows.
    squares = ()
    for i in tl.static_range(COUNT + SIZE - 1):
        squares += (a[i] * a[i],)
    powers = ()
    next_powers = ()
    for i in tl.static_range(COUNT):
        total = squares[i]
        for j in tl.static_range(1, SIZE):
            total += squares[i + j]
        d = k + scale * total
        if BETA == 0.75:
            root = tl.rsqrt(d)
            power = root * tl.sqrt(root)
            next_power = power * root * root
        elif BETA == 0.5:
            power = tl.rsqrt(d)
            next_power = power * power * power
        elif BETA == 1.0:
            power = 1.0 / d
            next_power = power * power
        elif BETA == 0.0:
            power = tl.full(d.shape, 1.0, tl.float32)
            next_power = 1.0 / d
        else:
            power = tl.exp2(-BETA * tl.log2(d))
            next_power = power / d
        powers += (power,)
        next_powers += (next_power,)
    return powers, next_powers


@triton.jit
def _clear_margins(out, first, count, lead, inner, BLOCK: tl.constexpr):
    """Zero BLOCK elements from the `first`th on of the `count` outside of the `inner` ones after `lead`."""
    element = first + tl.arange(0, BLOCK)
    at = tl.where(element < lead, element, element + inner)
    tl.store(out + at, tl.zeros((BLOCK,), out.dtype.element_ty), mask=element < count)


# --- forward ------------------------------------------------------------------------------------------------


@triton.jit
def _row_maxima(
    pointer, x_w, x_c, h, first_w, height, width, c, real, k, scale, first_column,
    WINDOW_W: tl.constexpr, CLIPPED: tl.constexpr,
    DEPTH: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr, NORM: tl.constexpr, BETA: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Maxima of b over one row of each window, and the columns where they are, lane by lane."""
    best = ()
    column = ()
    for s in tl.static_range(WINDOW_W):
        inside = real
        if CLIPPED:
            inside = real & (h >= 0) & (h < height) & (first_w + s >= 0) & (first_w + s < width)
        tiles = _tiles(pointer + tl.cast(x_w, tl.int64) * s, x_c, c, inside, DEPTH, BELOW, ABOVE, LANES, VECTOR)
        value = _lanes(tiles, _surplus(BELOW, VECTOR), BELOW + LANES + ABOVE)
        if NORM:
            powers = _powers(value, k, scale, LANES, BELOW + ABOVE + 1, BETA)[0]
            normalised = ()
            for i in tl.static_range(LANES):
                normalised += (value[BELOW + i] * powers[i],)
            value = normalised
        if s == 0 and not CLIPPED:
            best = value
            for _ in tl.static_range(LANES):
                column += (tl.zeros_like(c),)
        else:
            new_best = ()
            new_column = ()
            for i in tl.static_range(LANES):
                if s == 0:
                    so_far = tl.full(c.shape, float("-inf"), tl.float32)
                    so_far_at = first_column
                else:
                    so_far = best[i]
                    so_far_at = column[i]
                taken = (value[i] > so_far) | (value[i] != value[i])
                if CLIPPED:
                    taken &= inside
                new_best += (tl.where(taken, value[i], so_far),)
                new_column += (tl.where(taken, s, so_far_at),)
            best = new_best
            column = new_column
    return best, column


@triton.jit
def lrn_max_pool_kernel(
    x, out, index,
    x_n, x_c, x_h, x_w, height, width, images, out_height, out_width, pitch_h, pitch_w, strip_rows, lead, margin, tiles,
    k, scale,
    CHANNELS: tl.constexpr, DEPTH: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr,
    NORM: tl.constexpr, BETA: tl.constexpr,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, CLIPPED: tl.constexpr, INDEX: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ROLL: tl.constexpr,
):  # fmt: skip
    # An item is a chunk of LANES channels in one column of strip_rows pooled rows, and a program has BLOCK of them.
    # Item by item run the chunks of a pixel, the columns, the strips, the images. Down a strip the rows that two
    # windows share are normalised once: 1.5 times a pixel, not 2.25 times, in a long strip of 3x3 windows of stride 2.
    # Programs past `tiles` zero the rows before the first image and after the last.
    CHUNKS: tl.constexpr = CHANNELS // LANES
    OVERLAP: tl.constexpr = WINDOW_H - STRIDE_H if ROLL and WINDOW_H > STRIDE_H else 0
    program = tl.program_id(0)
    if program >= tiles:
        first = (program - tiles).to(tl.int64) * (BLOCK * LANES)
        inner = tl.cast(images, tl.int64) * (pitch_h * pitch_w) * CHANNELS
        before = tl.cast(lead, tl.int64) * CHANNELS
        _clear_margins(out, first, tl.cast(margin, tl.int64) * CHANNELS, before, inner, BLOCK * LANES)
    else:
        first = program.to(tl.int64) * BLOCK
        item = (first % CHUNKS).to(tl.int32) + tl.arange(0, BLOCK)
        place = (first // CHUNKS).to(tl.int32) + item // CHUNKS
        channel = item % CHUNKS * LANES
        c = channel % DEPTH
        q = place % pitch_w
        strips = tl.cdiv(pitch_h, strip_rows)
        first_p = place // pitch_w % strips * strip_rows
        n = place // pitch_w // strips
        written = n < images
        readable = written & (q < out_width)

        first_w = q * STRIDE_W - PADDING_W
        first_column = tl.maximum(-first_w, 0)
        pointer = x + n.to(tl.int64) * x_n + channel.to(tl.int64) * x_c + first_w.to(tl.int64) * x_w

        held = ()
        held_column = ()
        for r in tl.static_range(OVERLAP):
            held_h = first_p * STRIDE_H + (r - PADDING_H)
            held_row = _row_maxima(
                pointer + held_h.to(tl.int64) * x_h, x_w, x_c, held_h, first_w, height, width, c,
                readable & (first_p < out_height), k, scale, first_column,
                WINDOW_W, CLIPPED, DEPTH, BELOW, ABOVE, NORM, BETA, LANES, VECTOR,
            )  # fmt: skip
            held += held_row[0]
            held_column += held_row[1]

        for turn in range(strip_rows):
            p = first_p + turn
            real = readable & (p < out_height)
            first_h = p * STRIDE_H - PADDING_H
            rows = ()
            rows_column = ()
            if OVERLAP > 0:
                rows += held
                rows_column += held_column
            for r in tl.static_range(OVERLAP, WINDOW_H):
                h = first_h + r
                row_best, row_column = _row_maxima(
                    pointer + h.to(tl.int64) * x_h, x_w, x_c, h, first_w, height, width, c,
                    real, k, scale, first_column,
                    WINDOW_W, CLIPPED, DEPTH, BELOW, ABOVE, NORM, BETA, LANES, VECTOR,
                )  # fmt: skip
                rows += row_best
                rows_column += row_column

            pooled = ()
            position = ()
            for i in tl.static_range(LANES):
                if CLIPPED:
                    best = tl.full(c.shape, float("-inf"), tl.float32)
                    at = tl.maximum(-first_h, 0) * WINDOW_W + first_column
                else:
                    best = rows[i]
                    at = rows_column[i]
                for r in tl.static_range(0 if CLIPPED else 1, WINDOW_H):
                    value = rows[r * LANES + i]
                    taken = (value > best) | (value != value)
                    best = tl.where(taken, value, best)
                    at = tl.where(taken, rows_column[r * LANES + i] + r * WINDOW_W, at)
                pooled += (tl.where(real, best, 0.0),)
                position += (at,)
            if OVERLAP > 0:
                held = ()
                held_column = ()
                for i in tl.static_range(STRIDE_H * LANES, WINDOW_H * LANES):
                    held += (rows[i],)
                    held_column += (rows_column[i],)

            row = (n.to(tl.int64) * pitch_h + p) * pitch_w + q + lead
            _store(out + (row * CHANNELS + channel), pooled, written & (p < pitch_h), LANES, VECTOR)
            if INDEX:
                row = (n.to(tl.int64) * out_height + p) * out_width + q
                _store(index + (row * CHANNELS + channel), position, real, LANES, VECTOR)


def lrn_max_pool(
    x: Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    window: Pair,
    stride: Pair,
    padding: Pair,
    lrn_groups: int,
    layout: Layout,
    want_index: bool,
    config: NormPoolConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Local response normalisation, then max pooling, as `torch.nn.functional`'s are defined; ties go to the first.

    Args:
        x: (N, C, H, W), of any strides; channels-last is fast.
        size: channels of the normalisation's window; 0 for pooling alone.
        alpha: divided by `size`, as in torch.
        beta: exponent.
        k: added to the sum of squares.
        window: (rows, columns) of the pooling.
        stride: (rows, columns).
        padding: (rows, columns), at most half of the window.
        lrn_groups: groups of channels that are normalised each for itself.
        layout: of the answer; its height and width are (P, Q), its channels C.
        want_index: whether backward will need the second answer.
        config: blocks and warps; None for the default.

    Returns:
        The pooled map, (layout.rows, C), with zeros where there is no pixel; and where in its window each maximum is
        (row * columns + column), (N * P * Q, C), uint8 where that is enough and else int32, or None.
    """
    channels = x.shape[1]
    out = launch.empty((layout.rows, channels), x)
    index = None
    if want_index:
        index = launch.empty((layout.images * layout.height * layout.width, channels), x, index_dtype(window))
    if config is None:
        problem = NormPoolProblem(
            layout.images, layout.pitch_h, layout.pitch_w, channels, window, stride, size, False, x.dtype
        )
        config = choose(launch.target_of(x.device), problem)
        launch.offer(
            problem,
            lambda other: lrn_max_pool(
                x, size, alpha, beta, k, window, stride, padding, lrn_groups, layout, want_index, other
            ),
        )
    lanes, vector = _chunk(config.lanes, channels // lrn_groups if size else channels, x.dtype)
    # As many strips as the config says, but all of one length.
    strips = launch.cdiv(layout.pitch_h, config.strip)
    strip_rows = launch.cdiv(layout.pitch_h, strips)
    items = layout.images * launch.cdiv(layout.pitch_h, strip_rows) * layout.pitch_w * (channels // lanes)
    margin = layout.rows - layout.pixels
    tiles = launch.cdiv(items, config.block)
    launch.launch(
        lrn_max_pool_kernel,
        tiles + launch.cdiv(margin * channels, config.block * lanes),
        x=x, out=out, index=index, x_n=x.stride(0), x_c=x.stride(1), x_h=x.stride(2), x_w=x.stride(3),
        height=x.shape[2], width=x.shape[3], images=layout.images, out_height=layout.height, out_width=layout.width,
        pitch_h=layout.pitch_h, pitch_w=layout.pitch_w, strip_rows=strip_rows,
        lead=layout.lead, margin=margin, tiles=tiles,
        k=float(k), scale=alpha / max(1, size),
        **_normalisation(size, channels, lrn_groups, beta), **_windows(window, stride, padding),
        CLIPPED=_clipped((x.shape[2], x.shape[3]), (layout.height, layout.width), window, stride, padding),
        INDEX=want_index, BLOCK=config.block, LANES=lanes, VECTOR=vector, ROLL=strip_rows > 1,
        num_warps=config.warps, num_stages=1,
    )  # fmt: skip
    return out, index


def index_dtype(window: Pair) -> torch.dtype:
    """Of positions in a window."""
    return torch.uint8 if math.prod(window) <= 256 else torch.int32


def _chunk(most: int, depth: int, dtype: torch.dtype) -> tuple[int, int]:
    """Channels of a thread and of a load: chunks divide a group, and a load has up to 16 bytes."""
    lanes = math.gcd(depth, most)
    return lanes, min(lanes, 16 // dtype.itemsize)


def _normalisation(size: int, channels: int, groups: int, beta: float) -> dict[str, int | float | bool]:
    depth = channels // groups if size else channels
    below, above = (size // 2, (size - 1) // 2) if size else (0, 0)
    reach = {"BELOW": min(below, depth - 1), "ABOVE": min(above, depth - 1)}
    return {"CHANNELS": channels, "DEPTH": depth, **reach, "NORM": size > 0, "BETA": float(beta)}


def _windows(window: Pair, stride: Pair, padding: Pair) -> dict[str, int]:
    names = ("WINDOW_H", "WINDOW_W", "STRIDE_H", "STRIDE_W", "PADDING_H", "PADDING_W")
    return dict(zip(names, (*window, *stride, *padding), strict=True))


def _clipped(size: Pair, out_size: Pair, window: Pair, stride: Pair, padding: Pair) -> bool:
    """Whether a window hangs over an edge of the map."""
    ends = [(out - 1) * step + w for out, step, w in zip(out_size, stride, window, strict=True)]
    return any(padding) or ends[0] > size[0] or ends[1] > size[1]


# --- backward -----------------------------------------------------------------------------------------------


@triton.jit
def lrn_max_pool_backward_kernel(
    x, index, grad, out,
    x_n, x_c, x_h, x_w, grad_n, grad_c, grad_h, grad_w,
    height, width, images, out_height, out_width, pitch_h, pitch_w, blocks_h, blocks_w, lead, margin, tiles,
    k, scale, slope,
    CHANNELS: tl.constexpr, DEPTH: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr,
    NORM: tl.constexpr, BETA: tl.constexpr,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, RELU: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    # An item is a chunk of LANES channels of a pixel, and a program has BLOCK of them, all of one phase: pixels at the
    # same place (phase_h, phase_w) in their blocks of STRIDE_H x STRIDE_W pixels. So where such a pixel lies in which
    # windows is the same for the whole program, and no program visits windows that none of its pixels belongs to.
    # Item by item run the chunks of a pixel, the blocks of a row, the rows of blocks, the images.
    CHUNKS: tl.constexpr = CHANNELS // LANES
    PHASES: tl.constexpr = STRIDE_H * STRIDE_W
    # The windows that the channel itself is in.
    G_BELOW: tl.constexpr = ABOVE
    G_ABOVE: tl.constexpr = BELOW
    program = tl.program_id(0)
    if program >= tiles * PHASES:
        first = (program - tiles * PHASES).to(tl.int64) * (BLOCK * LANES)
        inner = tl.cast(images, tl.int64) * (pitch_h * pitch_w) * CHANNELS
        before = tl.cast(lead, tl.int64) * CHANNELS
        _clear_margins(out, first, tl.cast(margin, tl.int64) * CHANNELS, before, inner, BLOCK * LANES)
    else:
        phase_h = program % PHASES // STRIDE_W
        phase_w = program % STRIDE_W
        first = (program // PHASES).to(tl.int64) * BLOCK
        item = (first % CHUNKS).to(tl.int32) + tl.arange(0, BLOCK)
        place = (first // CHUNKS).to(tl.int32) + item // CHUNKS
        channel = item % CHUNKS * LANES
        c = channel % DEPTH
        # The last window that a pixel can be in has the number of its block.
        last_q = place % blocks_w
        last_p = place // blocks_w % blocks_h
        n = place // blocks_w // blocks_h
        h = last_p * STRIDE_H + phase_h - PADDING_H
        w = last_q * STRIDE_W + phase_w - PADDING_W
        written = (n < images) & (h >= 0) & (h < pitch_h) & (w >= 0) & (w < pitch_w)
        real = written & (h < height) & (w < width)

        at = n.to(tl.int64) * x_n + channel.to(tl.int64) * x_c + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w
        tiles_x = _tiles(x + at, x_c, c, real, DEPTH, BELOW + ABOVE, BELOW + ABOVE, LANES, VECTOR)

        gathered = ()
        for _ in tl.static_range(_vectors(G_BELOW, VECTOR)):
            gathered += (tl.zeros((BLOCK, _width(G_BELOW, VECTOR)), tl.float32),)
        for _ in tl.static_range(LANES // VECTOR):
            gathered += (tl.zeros((BLOCK, VECTOR), tl.float32),)
        for _ in tl.static_range(_vectors(G_ABOVE, VECTOR)):
            gathered += (tl.zeros((BLOCK, _width(G_ABOVE, VECTOR)), tl.float32),)
        index_at = index + ((n.to(tl.int64) * out_height + last_p) * out_width + last_q) * CHANNELS + channel
        grad_at = grad + n.to(tl.int64) * grad_n + channel.to(tl.int64) * grad_c
        grad_at += last_p.to(tl.int64) * grad_h + last_q.to(tl.int64) * grad_w
        for back_h in tl.static_range((WINDOW_H + STRIDE_H - 1) // STRIDE_H):
            r = phase_h + back_h * STRIDE_H
            inside_h = real & (last_p >= back_h) & (last_p < out_height + back_h)
            for back_w in tl.static_range((WINDOW_W + STRIDE_W - 1) // STRIDE_W):
                s = phase_w + back_w * STRIDE_W
                if (r < WINDOW_H) & (s < WINDOW_W):
                    inside = inside_h & (last_q >= back_w) & (last_q < out_width + back_w)
                    back = (tl.cast(out_width, tl.int64) * back_h + back_w) * CHANNELS
                    positions = _tiles(index_at - back, 1, c, inside, DEPTH, G_BELOW, G_ABOVE, LANES, VECTOR)
                    back = tl.cast(grad_h, tl.int64) * back_h + tl.cast(grad_w, tl.int64) * back_w
                    gradients = _tiles(grad_at - back, grad_c, c, inside, DEPTH, G_BELOW, G_ABOVE, LANES, VECTOR)
                    sums = ()
                    for i in tl.static_range(len(gathered)):
                        is_here = positions[i].to(tl.int32) == r * WINDOW_W + s
                        sums += (tl.where(is_here, gathered[i] + gradients[i].to(tl.float32), gathered[i]),)
                    gathered = sums

        g = _lanes(gathered, _surplus(G_BELOW, VECTOR), G_BELOW + LANES + G_ABOVE)
        a = _lanes(tiles_x, _surplus(BELOW + ABOVE, VECTOR), LANES + 2 * (BELOW + ABOVE))
        if NORM:
            direct = ()
            through = ()
            powers, next_powers = _powers(a, k, scale, LANES + BELOW + ABOVE, BELOW + ABOVE + 1, BETA)
            for i in tl.static_range(LANES + BELOW + ABOVE):
                direct += (g[i] * powers[i],)
                term = g[i] * (a[BELOW + i] * next_powers[i])
                if i < G_BELOW:
                    # Where k is 0 a channel that does not exist would divide by 0.
                    term = tl.where(c + (i - G_BELOW) >= 0, term, 0.0)
                if i >= G_BELOW + LANES:
                    term = tl.where(c + (i - G_BELOW) < DEPTH, term, 0.0)
                through += (term,)
        dx = ()
        for i in tl.static_range(LANES):
            if NORM:
                total = through[i]
                for j in tl.static_range(1, BELOW + ABOVE + 1):
                    total += through[i + j]
                gradient = direct[G_BELOW + i] - slope * a[BELOW + ABOVE + i] * total
            else:
                gradient = g[i]
            dropped = a[BELOW + ABOVE + i] <= 0 if RELU else ~real
            gradient = tl.where(dropped, 0.0, gradient)
            dx += (gradient,)
        row = (n.to(tl.int64) * pitch_h + h) * pitch_w + w + lead
        _store(out + (row * CHANNELS + channel), dx, written, LANES, VECTOR)


def lrn_max_pool_backward(
    x: Tensor,
    index: Tensor,
    grad: Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    window: Pair,
    stride: Pair,
    padding: Pair,
    lrn_groups: int,
    layout: Layout,
    relu: bool,
    config: NormPoolConfig | None = None,
) -> Tensor:
    """The gradient of `x`, given that of the pooled map.

    Args:
        x: as `lrn_max_pool` had it, as are the arguments that are not here.
        index: (N * P * Q, C), its second answer.
        grad: (N, C, P, Q), of any strides; channels-last is fast.
        size: as there.
        alpha: as there.
        beta: as there.
        k: as there.
        window: as there.
        stride: as there.
        padding: as there.
        lrn_groups: as there.
        layout: of the answer; its height and width are (H, W), its channels C.
        relu: whether `x` came out of a ReLU whose gradient is to be taken too: zero where `x` is at most 0.
        config: blocks and warps; None for the default.

    Returns:
        (layout.rows, C), with zeros where there is no pixel.
    """
    channels = x.shape[1]
    out = launch.empty((layout.rows, channels), x)
    if config is None:
        problem = NormPoolProblem(
            layout.images, layout.pitch_h, layout.pitch_w, channels, window, stride, size, True, x.dtype
        )
        config = choose(launch.target_of(x.device), problem)
        launch.offer(
            problem,
            lambda other: lrn_max_pool_backward(
                x, index, grad, size, alpha, beta, k, window, stride, padding, lrn_groups, layout, relu, other
            ),
        )
    lanes, vector = _chunk(config.lanes, channels // lrn_groups if size else channels, x.dtype)
    blocks_h = launch.cdiv(layout.pitch_h + padding[0], stride[0])
    blocks_w = launch.cdiv(layout.pitch_w + padding[1], stride[1])
    tiles = launch.cdiv(layout.images * blocks_h * blocks_w * (channels // lanes), config.block)
    margin = layout.rows - layout.pixels
    launch.launch(
        lrn_max_pool_backward_kernel,
        tiles * math.prod(stride) + launch.cdiv(margin * channels, config.block * lanes),
        x=x, index=index, grad=grad, out=out,
        x_n=x.stride(0), x_c=x.stride(1), x_h=x.stride(2), x_w=x.stride(3),
        grad_n=grad.stride(0), grad_c=grad.stride(1), grad_h=grad.stride(2), grad_w=grad.stride(3),
        height=layout.height, width=layout.width, images=layout.images,
        out_height=grad.shape[2], out_width=grad.shape[3], pitch_h=layout.pitch_h, pitch_w=layout.pitch_w,
        blocks_h=blocks_h, blocks_w=blocks_w, lead=layout.lead, margin=margin, tiles=tiles,
        k=float(k), scale=alpha / max(1, size), slope=2 * alpha * beta / max(1, size),
        **_normalisation(size, channels, lrn_groups, beta), **_windows(window, stride, padding),
        RELU=relu, BLOCK=config.block, LANES=lanes, VECTOR=vector, num_warps=config.warps, num_stages=1,
    )  # fmt: skip
    return out
