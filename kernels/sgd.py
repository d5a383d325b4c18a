"""The update rule of 2012 over all parameters of a network, in one launch.

With the velocity v, the weight w, its gradient g, and m, r and d momentum, rate and decay (Krizhevsky et al. 2012,
section 5)

    v = m v - r (d w + g)
    w = w + v
    c = w rounded, where a copy of lower precision is kept

g, w and v are read once; v, w and c are written once. A program does `BLOCK` elements of one tensor. Where the
tensors lie, it finds in a *table* in the GPU's memory, as addresses: so a launch takes any number of tensors, of any
sizes, and its arguments do not change with them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_triton.kernels import launch
from alexnet_triton.kernels.launch import rounded

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
"""Of gradients and copies."""

WIDTH = tl.constexpr(4)
"""Elements that a thread loads at once from float32 tensors, 16 bytes; as many from the others, so that all of a
program's tensors are spread over its threads alike, and none has to change places through shared memory."""


@triton.jit(do_not_specialize=["tensors"])
def sgd_kernel(
    table, rates, tensors,
    GRADIENT: tl.constexpr, COPY: tl.constexpr, TENSORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Rows of the table, a column for each tensor: its first program, its group, its size, and the addresses of
    # gradient, weight, velocity and copy. GRADIENT and COPY are dtypes; COPY is None where no copy is kept.
    program = tl.program_id(0)
    column = tl.arange(0, TENSORS)
    started = tl.load(table + column, mask=column < tensors, other=program + 1) <= program
    table += tl.sum(started.to(tl.int32)) - 1
    offset = (program - tl.load(table)) * BLOCK
    rates += 3 * tl.load(table + tensors)
    rate, momentum, decay = tl.load(rates), tl.load(rates + 1), tl.load(rates + 2)
    left = tl.load(table + 2 * tensors) - offset
    gradient = tl.load(table + 3 * tensors)
    weight = tl.load(table + 4 * tensors)
    velocity = tl.load(table + 5 * tensors)
    copy = tl.load(table + 6 * tensors)
    aligned = (gradient | weight | velocity | copy) % 16 == 0

    gradient = gradient.to(tl.pointer_type(GRADIENT)) + offset
    weight = weight.to(tl.pointer_type(tl.float32)) + offset
    velocity = velocity.to(tl.pointer_type(tl.float32)) + offset
    copy = copy.to(tl.pointer_type(COPY)) + offset if COPY is not None else None
    if aligned & (left >= BLOCK):
        _update(gradient, weight, velocity, copy, rate, momentum, decay, BLOCK, BLOCK, WIDTH)
    else:
        _update(gradient, weight, velocity, copy, rate, momentum, decay, left, BLOCK, 1)


@triton.jit
def _update(
    gradient, weight, velocity, copy, rate, momentum, decay, left, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    inside = at < left
    gradient = _in_runs(gradient, at, WIDTH)
    weight = _in_runs(weight, at, WIDTH)
    velocity = _in_runs(velocity, at, WIDTH)
    w = tl.load(weight, mask=inside)
    v = momentum * tl.load(velocity, mask=inside) - rate * (decay * w + tl.load(gradient, mask=inside).to(tl.float32))
    w += v
    tl.store(velocity, v, mask=inside)
    tl.store(weight, w, mask=inside)
    if copy is not None:
        tl.store(_in_runs(copy, at, WIDTH), rounded(w, copy), mask=inside)


@triton.jit
def _in_runs(pointer, at, WIDTH: tl.constexpr):
    """The pointers to elements `at`, of which each WIDTH can be loaded at once."""
    return tl.multiple_of(pointer + at, WIDTH * pointer.dtype.element_ty.primitive_bitwidth // 8)


class Step(NamedTuple):
    """A tensor's part of a launch. Its tensors hold their elements densely, in the same order."""

    gradient: Tensor
    weight: Tensor
    """float32; written."""
    velocity: Tensor
    """float32; written."""
    copy: Tensor | None
    """Written: the new weight, rounded to nearest."""
    group: int
    """Row of the rates."""


def sgd(steps: Sequence[Step], rates: Tensor) -> None:
    """Update tensors in one launch.

    Args:
        steps: on one device; gradients of one dtype; with copies of one dtype, or none with a copy.
        rates: (groups, 3), float32, of rate, momentum and decay.
    """
    gradient, _, _, copy, _ = steps[0]
    block = _block(launch.target_of(rates.device))
    first, programs = [], 0
    for step in steps:
        first.append(programs)
        programs += launch.cdiv(step.weight.numel(), block)
    table = [*first, *(step.group for step in steps), *(step.weight.numel() for step in steps)]
    for tensors in zip(*(step[:4] for step in steps), strict=True):
        table += [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    launch.launch(
        sgd_kernel,
        programs,
        table=by_value(tuple(table), torch.int64, rates.device), rates=rates, tensors=len(steps),
        GRADIENT=DTYPES[gradient.dtype], COPY=None if copy is None else DTYPES[copy.dtype],
        TENSORS=launch.power_of_two(len(steps)), BLOCK=block, num_warps=8, num_stages=1,
    )  # fmt: skip


def _block(target: launch.Target) -> int:
    """Elements of a program: eight a thread, in 48 registers. The interpreter's time goes by elements from 4,096 on."""
    return 4096 if target.backend == "cpu" else 2048


def by_value(numbers: tuple[int, ...] | tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of numbers that come to the device as arguments of kernels, not from the host's memory.

    So nothing waits for a copy, and a CUDA graph that is being captured holds the numbers. Outside a capture, what was
    asked for on this stream before is given again: it must not be written to.
    """
    stream = _stream(device)
    return _written(numbers, dtype, device) if stream is None else _kept(numbers, dtype, device, stream)


def _stream(device: torch.device) -> int | None:
    """The number of the device's current stream; None where a graph captures it."""
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return None
        return torch.cuda.current_stream(device).stream_id
    return 0


@functools.lru_cache(64)
def _kept(
    numbers: tuple[int, ...] | tuple[float, ...], dtype: torch.dtype, device: torch.device, stream: int
) -> Tensor:
    return _written(numbers, dtype, device)


def _written(numbers: tuple[int, ...] | tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    vector = torch.zeros(len(numbers), dtype=dtype, device=device)
    torch._foreach_add_(list(vector.unbind()), numbers)
    return vector
