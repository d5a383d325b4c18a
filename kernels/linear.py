"""Dropout + linear + ReLU, forward and both gradients, as strided matrix products.

With X the activations after dropout (N, I), W the weights (O, I) and dZ the gradient before the ReLU (N, O)

    forward          Y  = X @ W^T       (+ bias, ReLU)
    input gradient   dX = dZ @ W        (times the dropout mask)
    weight gradient  dW = dZ^T @ X

one kernel serves all three. At the batches of training the time is that of reading the weights, so a product's
reduction is split among programs until every multiprocessor reads; partial sums are added in a second kernel, in a
fixed order.

Dropout is not drawn inside a product: every column tile would draw it again, in front of its tensor cores. Compiled
for sm_90, bfloat16, 128x128x64 tiles and 8 warps, a step of the loop has 92 instructions without the draw and 760 with
it. The tensor cores need 512 cycles for a step's products, issuing needs 184 and 1,520. So a small kernel draws a copy
of the activations once (at batch 128 it is 1/32 of fc6's weights), which lies so that the product reads 16 bytes
at a time without masks. The gradient is brought in likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_triton.kernels import launch, random
from alexnet_triton.kernels.config import LinearConfig, LinearProblem, choose, strip_config
from alexnet_triton.kernels.launch import rounded

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


# --- bringing matrices in -----------------------------------------------------------------------------------


@triton.jit
def drop_kernel(
    x, seed, out, x_m, x_n, pitch, rows, columns, dropped, scale,
    QUADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # out[m, n] = x[m, n] * (scale where kept, 0 where dropped), and 0 for n from `columns` to `pitch`.
    # A program writes one tile.
    tiles = tl.cdiv(pitch, BLOCK_N)
    m = (tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    first_n = tl.program_id(0) % tiles * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    value = tl.load(x + m[:, None] * x_m + n.to(tl.int64)[None, :] * x_n, mask=inside, other=0.0)
    if seed is not None:
        kept = random.keep(tl.load(seed), m, first_n, columns, dropped, BLOCK_N, QUADS)
        # A product, not a selection: as in torch, a NaN or an infinity that is dropped becomes NaN.
        value = value.to(tl.float32) * tl.where(kept, scale, 0.0)
    written = (m < rows)[:, None] & (n < pitch)[None, :]
    tl.store(out + m[:, None] * pitch + n[None, :], rounded(value, out), mask=written)


def drop(x: Tensor, seed: Tensor | None, p: float, multiple: int) -> Tensor:
    """Draw dropout, and lay a matrix out for `gemm`.

    Args:
        x: (N, I), of any strides.
        seed: int64 (1,), or None for no dropout.
        p: probability of dropping an element.
        multiple: what the answer's columns are to be a multiple of, itself a multiple of 16.

    Returns:
        (N, I rounded up), with zeros in the added columns; `x` itself where it is that already.
    """
    rows, columns = x.shape
    pitch = launch.cdiv(columns, multiple) * multiple
    if seed is None and pitch == columns and x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    out = launch.empty((rows, pitch), x)
    config = strip_config(launch.target_of(x.device), rows, pitch)
    launch.launch(
        drop_kernel,
        launch.cdiv(rows, config.block_m) * launch.cdiv(pitch, config.block_n),
        x=x, seed=seed, out=out, x_m=x.stride(0), x_n=x.stride(1), pitch=pitch, rows=rows, columns=columns,
        **_draw(seed, p, columns),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.warps, num_stages=1,
    )  # fmt: skip
    return out


def _draw(seed: Tensor | None, p: float, columns: int) -> dict[str, Any]:
    """What a kernel that draws a mask over rows of `columns` elements must be told."""
    if seed is None:
        return {"dropped": 0, "scale": 0.0, "QUADS": False}
    return {"dropped": random.last_dropped(p), "scale": random.scale(p), "QUADS": columns % 4 == 0}


@triton.jit
def gate_kernel(
    grad, y, out, bias_grad, grad_m, grad_n, y_m, y_n, pitch, rows, columns, rows_padded,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # out[m, n] = grad[m, n], or 0 where y[m, n] <= 0 or where there is no (m, n);  bias_grad[n] = sum over m of it.
    # A program owns its columns and passes over all rows, so that the sums have one order.
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    wide_n = n.to(tl.int64)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_m in range(0, rows_padded, BLOCK_M):
        m = (first_m + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = (m < rows)[:, None] & (n < columns)[None, :]
        value = tl.load(grad + m[:, None] * grad_m + wide_n * grad_n, mask=inside, other=0.0)
        if y is not None:
            output = tl.load(y + m[:, None] * y_m + wide_n * y_n, mask=inside, other=1.0)
            value = tl.where(output.to(tl.float32) <= 0, 0.0, value)  # a NaN is not <= 0: torch lets its gradient pass
        if bias_grad is not None:
            total += value.to(tl.float32)
        if out is not None:
            written = (m < rows_padded)[:, None] & (n < pitch)[None, :]
            tl.store(out + m[:, None] * pitch + n[None, :], rounded(value, out), mask=written)
    if bias_grad is not None:
        tl.store(bias_grad + n, rounded(tl.sum(total, 0), bias_grad), mask=n < columns)


def gate(grad: Tensor, y: Tensor | None, out: Tensor | None, bias_grad: Tensor | None) -> None:
    """Pass a gradient through the ReLU, lay it out for `gemm`, and sum its columns.

    Args:
        grad: (N, O), of any strides.
        y: the output of the ReLU, (N, O), of any strides; None where there was none.
        out: contiguous, at least (N, O), to be filled; elements that `grad` has not become zeros. Or None.
        bias_grad: (O,), to be filled with the sums over N. Or None.
    """
    rows, columns = grad.shape
    rows_padded, pitch = (rows, columns) if out is None else out.shape
    config = strip_config(launch.target_of(grad.device), rows_padded, pitch, whole_columns=True)
    y_strides = (0, 0) if y is None else y.stride()
    launch.launch(
        gate_kernel,
        launch.cdiv(pitch, config.block_n),
        grad=grad, y=y, out=out, bias_grad=bias_grad,
        grad_m=grad.stride(0), grad_n=grad.stride(1), y_m=y_strides[0], y_n=y_strides[1],
        pitch=pitch, rows=rows, columns=columns, rows_padded=rows_padded,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.warps, num_stages=1,
    )  # fmt: skip


# --- the product --------------------------------------------------------------------------------------------


@triton.jit
def _finish(
    sums, m, first_n, n, bias, bias_n, seed, rows, columns, dropped, scale,
    RELU: tl.constexpr, QUADS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue: bias, ReLU, dropout's mask."""
    if bias is not None:
        sums += tl.load(bias + n.to(tl.int64) * bias_n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    if RELU:
        sums = tl.where(sums <= 0, 0.0, sums)  # as a comparison, which lets NaN pass
    if seed is not None:
        kept = random.keep(tl.load(seed), m, first_n, columns, dropped, BLOCK_N, QUADS)
        sums *= tl.where(kept, scale, 0.0)
    return sums


@triton.jit
def gemm_kernel(
    a, b, bias, seed, out, a_m, a_k, b_k, b_n, bias_n, out_split, out_m, out_n,
    rows, columns, reduction, a_rows, b_columns, share, dropped, scale,
    RELU: tl.constexpr, QUADS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # out[split, m, n] = sum over k of a[m, k] * b[k, n]   for k from split * share up to (split + 1) * share
    # A program computes one tile for one split. Programs that read the same columns of b, the weights, are neighbours.
    # Rows of a and columns of b past the end wrap round: they are read and never written, so no load needs a
    # mask for them. Past the reduction's end a holds zeros, and b is masked unless the steps come out EVEN.
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    tile = tl.program_id(0) // tiles_m
    split = tile // tiles_n
    first_n = tile % tiles_n * BLOCK_N
    m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    first_k = split * share
    last_k = tl.minimum(first_k + share, reduction)

    a_k, b_k = tl.cast(a_k, tl.int64), tl.cast(b_k, tl.int64)
    a += (m % a_rows).to(tl.int64)[:, None] * a_m + (first_k + k)[None, :] * a_k
    b += (first_k + k)[:, None] * b_k + (n % b_columns).to(tl.int64)[None, :] * b_n
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first_k, last_k, BLOCK_K):
        a_tile = tl.load(a)
        b_tile = tl.load(b) if EVEN else tl.load(b, mask=(k < reduction - start)[:, None], other=0.0)
        if UPCAST:  # Triton's interpreter multiplies bfloat16 as bit patterns
            a_tile, b_tile = a_tile.to(tl.float32), b_tile.to(tl.float32)
        sums = tl.dot(a_tile, b_tile, sums, input_precision=PRECISION)
        a += BLOCK_K * a_k
        b += BLOCK_K * b_k

    m = m.to(tl.int64)
    sums = _finish(sums, m, first_n, n, bias, bias_n, seed, rows, columns, dropped, scale, RELU, QUADS, BLOCK_N)
    at = split.to(tl.int64) * out_split + m[:, None] * out_m + n.to(tl.int64)[None, :] * out_n
    tl.store(out + at, rounded(sums, out), mask=(m < rows)[:, None] & (n < columns)[None, :])


@triton.jit
def reduce_kernel(
    parts, bias, seed, out, parts_split, parts_m, bias_n, out_m, out_n, rows, columns, dropped, scale,
    RELU: tl.constexpr, QUADS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # out[m, n] = sum over splits of parts[split, m, n], finished. A program writes one tile.
    tiles = tl.cdiv(columns, BLOCK_N)
    m = (tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    first_n = tl.program_id(0) % tiles * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    summed = (m < rows)[:, None] & (n < parts_m)[None, :]
    at = parts + m[:, None] * parts_m + n[None, :]
    sums = tl.load(at, mask=summed, other=0.0)
    for _ in tl.static_range(1, SPLITS):
        at += parts_split
        sums += tl.load(at, mask=summed, other=0.0)
    sums = _finish(sums, m, first_n, n, bias, bias_n, seed, rows, columns, dropped, scale, RELU, QUADS, BLOCK_N)
    at = out + m[:, None] * out_m + n.to(tl.int64)[None, :] * out_n
    tl.store(at, rounded(sums, out), mask=(m < rows)[:, None] & (n < columns)[None, :])


def gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    config: LinearConfig,
    bias: Tensor | None = None,
    relu: bool = False,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> None:
    """Fill `out` with a @ b, then bias, ReLU and dropout's mask.

    Args:
        a: (at least M, K rounded up to a multiple of `config.block_k`), with zeros past K; of any strides.
        b: (K, at least N), of any strides.
        out: (M, N), of any strides, to be filled.
        config: blocks, splits, warps, stages.
        bias: (N,), of any stride, or None.
        relu: apply ReLU.
        seed: of the dropout by whose mask `out` is multiplied, int64 (1,), or None.
        p: probability of dropping an element.
    """
    rows, columns = out.shape
    reduction = b.shape[0]
    target = launch.target_of(a.device)
    steps = launch.cdiv(reduction, config.block_k)
    share = max(1, launch.cdiv(steps, config.splits))
    splits = max(1, launch.cdiv(steps, share))
    epilogue = _epilogue(bias, relu, seed, p, columns)
    product, pitch, strides = out, columns, (0, *out.stride())
    if splits > 1:
        # Rows of a multiple of 16 elements, whatever N is: Triton then writes and reads 16 bytes at once.
        pitch = launch.cdiv(columns, 16) * 16
        product, strides = launch.empty((splits, rows, pitch), out, torch.float32), (rows * pitch, pitch, 1)
    tiles = launch.cdiv(rows, config.block_m) * launch.cdiv(columns, config.block_n)
    launch.launch(
        gemm_kernel,
        tiles * splits,
        a=a, b=b, out=product, a_m=a.stride(0), a_k=a.stride(1), b_k=b.stride(0), b_n=b.stride(1),
        out_split=strides[0], out_m=strides[1], out_n=strides[2],
        rows=rows, columns=pitch, reduction=reduction, a_rows=a.shape[0], b_columns=b.shape[1],
        share=share * config.block_k,
        **(epilogue if splits == 1 else _epilogue(None, False, None, 0.0, columns)),
        EVEN=reduction % config.block_k == 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        PRECISION=launch.dot_precision(target), UPCAST=launch.INTERPRETED,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if splits > 1:
        strip = strip_config(target, rows, columns)
        launch.launch(
            reduce_kernel,
            launch.cdiv(rows, strip.block_m) * launch.cdiv(columns, strip.block_n),
            parts=product, out=out, parts_split=strides[0], parts_m=strides[1],
            out_m=out.stride(0), out_n=out.stride(1), rows=rows, columns=columns, **epilogue, SPLITS=splits,
            BLOCK_M=strip.block_m, BLOCK_N=strip.block_n, num_warps=strip.warps, num_stages=1,
        )  # fmt: skip


def _epilogue(bias: Tensor | None, relu: bool, seed: Tensor | None, p: float, columns: int) -> dict[str, Any]:
    bias_n = 0 if bias is None else bias.stride(0)
    return {"bias": bias, "bias_n": bias_n, "RELU": relu, "seed": seed, **_draw(seed, p, columns)}


# --- the layer ----------------------------------------------------------------------------------------------


def _problem(x: Tensor, weight: Tensor, direction: str, dropout: bool = False) -> LinearProblem:
    exact = launch.is_exact(x.dtype, launch.target_of(x.device))
    outputs, features = weight.shape
    return LinearProblem(x.shape[0], outputs, features, direction, dropout, x.dtype, exact)


def dropout_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    relu: bool,
    config: LinearConfig | None = None,
) -> Tensor:
    """Dropout, linear layer, ReLU.

    Args:
        x: (N, I), of any strides; float32, float16 or bfloat16. N may be 0.
        weight: (O, I), of any strides.
        bias: (O,), of any stride, or None.
        seed: int64 (1,), from `random.seed`; None where `p` is 0.
        p: probability of dropping an element of `x`; the others are scaled by 1 / (1 - p).
        relu: apply ReLU, which lets NaN pass.
        config: None takes that of `config.choose`.

    Returns:
        (N, O), contiguous, of the dtype of `x`.
    """
    y = launch.empty((x.shape[0], weight.shape[0]), x)
    if y.numel():
        if config is None:
            problem = _problem(x, weight, "forward")
            config = choose(launch.target_of(x.device), problem)
            launch.offer(problem, lambda other: dropout_linear(x, weight, bias, seed, p, relu, other))
        gemm(drop(x, seed, p, config.block_k), weight.t(), y, config, bias, relu)
    return y


def dropout_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    seed: Tensor | None,
    p: float,
    needs: tuple[bool, bool, bool],
    x_config: LinearConfig | None = None,
    weight_config: LinearConfig | None = None,
) -> Gradients:
    """The gradients of `dropout_linear`.

    Args:
        grad: of the output, (N, O), of any strides, expanded ones too.
        x: as in the forward pass.
        weight: as in the forward pass.
        y: the output of the forward pass where it ended in a ReLU, else None.
        seed: as in the forward pass.
        p: as in the forward pass.
        needs: whether the gradient of the input, of the weights and of the bias is wanted.
        x_config: None takes that of `config.choose`.
        weight_config: None takes that of `config.choose`.

    Returns:
        The gradients of the input, (N, I) contiguous; of the weights, (O, I) in their own layout; of the bias, (O,).
        None where it is not wanted.
    """
    (batch, features), outputs = x.shape, weight.shape[0]
    dx = launch.empty((batch, features), x) if needs[0] else None
    dw = launch.empty_like(weight) if needs[1] else None
    db = launch.empty((outputs,), weight) if needs[2] else None
    if not (batch and outputs):
        for gradient in (dx, dw, db):
            if gradient is not None:
                gradient.zero_()
        return dx, dw, db

    def again(needs: tuple[bool, bool, bool]) -> Callable[[LinearConfig], Gradients]:
        return lambda other: dropout_linear_backward(grad, x, weight, y, seed, p, needs, other, other)

    target = launch.target_of(x.device)
    if x_config is None:
        problem = _problem(x, weight, "data gradient", seed is not None)
        x_config = choose(target, problem)
        if needs[0]:
            launch.offer(problem, again((True, False, False)))
    if weight_config is None:
        problem = _problem(x, weight, "weight gradient")
        weight_config = choose(target, problem)
        if needs[1]:
            launch.offer(problem, again((False, True, False)))
    dz = None
    if features and (needs[0] or needs[1]):
        # Either product takes its sum along one of dz's sides: along columns for dx, along rows for dw.
        rows = launch.cdiv(batch, weight_config.block_k) * weight_config.block_k if needs[1] else batch
        columns = launch.cdiv(outputs, x_config.block_k) * x_config.block_k
        dz = launch.empty((rows, columns), x)
    gate(grad, y, dz, db)
    if dz is not None and dx is not None:
        gemm(dz, weight, dx, x_config, seed=seed, p=p)
    if dz is not None and dw is not None:
        gemm(dz.t(), drop(x, seed, p, 16), dw, weight_config)
    return dx, dw, db
