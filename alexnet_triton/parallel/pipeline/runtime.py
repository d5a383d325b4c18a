"""What torch's schedules run: this process's stage, a microbatch at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleavedZeroBubble

from alexnet_triton.backend import takes_triton
from alexnet_triton.fusion import FusedSequential, fits
from alexnet_triton.parallel.pipeline.simulation import Block
from alexnet_triton.parallel.pipeline.stages import Stage


@dataclass
class Trace:
    """When the work of a step was done. On a GPU each piece is then waited for, and so is all before it."""

    on: bool
    """Whether it is noted."""
    blocks: list[Block] = field(default_factory=list)


class Runner(PipelineStage):
    """A stage as torch's schedules call it.

    Args:
        stage: the layers.
        number: the stage's, and its process's in `group`.
        stages: how many there are.
        device: of the stage.
        group: the processes that have the stages, in order.
        size: images of a microbatch.
        halves: whether the gradients of input and of parameters are computed apart, where the schedule does so. Else
            both are computed at the input's turn.
        trace: takes the times of what runs.
    """

    def __init__(
        self,
        stage: Stage,
        number: int,
        stages: int,
        device: torch.device,
        group: ProcessGroup,
        *,
        size: int,
        halves: bool,
        trace: Trace,
    ) -> None:
        super().__init__(
            _Called(stage), number, stages, device, group=group, dw_builder=None if halves else lambda: _nothing_left
        )  # fmt: skip
        self._stage, self._size, self._trace = stage, size, trace

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Forward of one microbatch."""
        self._stage.first_row = fwd_chunk_id * self._size
        with self._timed("F", fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Backward of one microbatch, or the first half of it."""
        kind = "B" if kwargs.get("full_backward", True) else "I"
        with self._timed(kind, bwd_chunk_id), without_autocast(self.device):
            return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """The other half."""
        with self._timed("W", bwd_chunk_id), without_autocast(self.device):
            return super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)

    @contextmanager
    def _timed(self, kind: str, microbatch: int) -> Iterator[None]:
        if not self._trace.on:
            yield
            return
        start = self._now()
        yield
        self._trace.blocks.append(Block(self.group_rank, self.stage_index, kind, microbatch, start, self._now()))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()  # of the machine on Linux, and so comparable between processes


class _Called(nn.Module):
    """A stage as torch calls it: what crosses to another process is contiguous, and has memory of its own.

    Memory is sent as it lies. A channels-last map would arrive in another order where torch's buffer for it is
    contiguous (2.11), and gloo would not send it. And torch detaches in place what a stage gives, which no view allows.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x = _ContiguousGradient.apply(x)
        y: Tensor = self.stage(x).contiguous()
        return y.clone() if y is x or y._is_view() else y


class _ContiguousGradient(torch.autograd.Function):
    """The same, whose gradient is contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


def schedule_of(name: str, runner: Runner, microbatches: int, loss: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """A schedule of `schedules.SCHEDULES` as torch runs it, one stage a process.

    Args:
        name: the schedule's.
        runner: this process's stage.
        microbatches: of a step.
        loss: of a microbatch's logits and labels; losses and gradients are summed over microbatches.
    """
    if name == "zero-bubble":
        # Of an exception on the way it logs a page of the whole schedule, ahead of the exception itself.
        logging.getLogger(ScheduleInterleavedZeroBubble.__module__).setLevel(logging.CRITICAL)
        return ScheduleInterleavedZeroBubble([runner], microbatches, loss_fn=loss, scale_grads=False)
    kind = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[name]
    return kind(runner, microbatches, loss_fn=loss, scale_grads=False)


def forward_only(runner: Runner, microbatches: int) -> ScheduleGPipe:
    """A schedule of forward passes alone."""
    return ScheduleGPipe(runner, microbatches)


def comes_in_halves(stage: Stage, device: torch.device, learns_before: bool) -> bool:
    """Whether torch gets a stage's gradients of inputs and of parameters apart, right and without doing work twice.

    It does so by cutting the graph at the layers that have parameters. A fused op on Triton is one node there, which
    would compute all its gradients both times (and 2.11 cannot cut at such nodes). An input that requires no gradient
    is no place to begin at: 2.14 then leaves out what follows. And of layers other than the table's
    (`alexnet_triton.fusion`) the graph is not known; in 2.11 two uses of a parameter give a wrong sum.

    Args:
        stage: the layers.
        device: of the stage.
        learns_before: whether a stage before this one has a parameter that requires a gradient.
    """
    known = all(fits(layer) or (type(layer) in _TRANSPARENT and not _is_hooked(layer)) for layer in stage.modules())
    dtype = next((parameter.dtype for parameter in stage.parameters()), torch.float32)
    return learns_before and known and not takes_triton("conv2d_relu", torch.empty(0, device=device, dtype=dtype))


_TRANSPARENT = (Stage, nn.Sequential, FusedSequential, nn.AdaptiveAvgPool2d, nn.Identity)
"""Modules without parameters of their own."""


def _is_hooked(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks)


def without_autocast(device: torch.device) -> torch.autocast:
    """Backward passes have the dtypes of the forward pass, and no others."""
    return torch.autocast(device.type, enabled=False)


def _nothing_left() -> None:
    """The gradients of the parameters, where those have been computed with the input's."""
