"""A pipeline over several devices of one process, as in a notebook: no launcher, no process groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_triton.model import AlexNet
from alexnet_triton.parallel.engine import loss_and_right
from alexnet_triton.parallel.pipeline import schedules
from alexnet_triton.parallel.pipeline.masks import Masks
from alexnet_triton.parallel.pipeline.microbatches import accepted
from alexnet_triton.parallel.pipeline.schedules import Action
from alexnet_triton.parallel.pipeline.stages import Stage, dropouts, split

GPU = "cuda"


class LocalPipeline:
    """The stages of a network on as many devices, a microbatch behind the other.

    A device works while the others do, as far as the schedule lets it: what is asked of a GPU is not waited for, and
    what travels between two GPUs does so beside their work. One device may be named several times, which is of use to
    try things.

    Losses, gradients and dropout are those of the network in one piece on the whole batch; dropout draws from the
    generator of the first device.

    Args:
        network: the network, whose layers are moved to the devices (`network.to(device)` brings them back); or its
            stages, of `split`.
        devices: one for each stage, as `["cuda:0", "cuda:1"]`.
        microbatches: that a batch is cut into.
        schedule: order of the work, of `schedules.SCHEDULES`. In `zero-bubble` the gradients of parameters are computed
            with those of the input.
        at: where the network is cut, as of `split`.
        batch: images of a step, for that choice.
        image_size: their side, in pixels; None is the variant's own.

    Attributes:
        stages: the stages.
        devices: their devices.

    Raises:
        ValueError: a device is not there, there are not as many as stages, the network cannot be cut like this, or the
            schedule does not take so many microbatches.

    Examples:
        >>> pipeline = LocalPipeline(model, ["cuda:0", "cuda:1"])
        >>> optimizer = KrizhevskySGD(pipeline.parameters(), lr=0.01)
        >>> loss = pipeline.step(images, labels)
        >>> optimizer.step()
    """

    def __init__(
        self,
        network: AlexNet | Sequence[Stage],
        devices: Sequence[str | torch.device],
        *,
        microbatches: int = 8,
        schedule: str = "1f1b",
        at: str | Sequence[str] = "auto",
        batch: int = 128,
        image_size: int | None = None,
    ) -> None:
        self.devices = tuple(_usable(device) for device in devices)
        schedules.check(schedule, len(self.devices), microbatches)
        if isinstance(network, nn.Module):
            told = {"microbatches": microbatches, "schedule": schedule}
            self.stages = split(network, len(self.devices), at, batch, image_size, **told)
        else:
            self.stages = list(network)
        if len(self.stages) != len(self.devices):
            raise ValueError(
                f"each stage needs a device, got {len(self.stages)} stages and {len(self.devices)} devices"
            )
        self.microbatches, self.schedule = microbatches, schedule
        self._dropouts = dropouts(network, image_size)
        for stage, device in zip(self.stages, self.devices, strict=True):
            stage.to(device)
        self._onwards = [_Link(a, b) for a, b in pairwise(self.devices)]
        self._back = [_Link(b, a) for a, b in pairwise(self.devices)]
        self._masks: Masks | None = None

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forward and backward of a batch.

        The gradients of its mean cross-entropy are added to those of the layers' parameters.

        Args:
            images: (N, 3, H, W), on any device; N may be 0.
            labels: (N,).

        Returns:
            The loss, in nats, a float32 tensor on the last device; 0 of no images.

        Raises:
            ValueError: not as many labels as images.
            RuntimeError: gradients are off.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("a step needs gradients, and torch.no_grad() is on: call the pipeline for logits alone")
        if len(images) != len(labels):
            raise ValueError(f"each image needs a label, got {len(images)} images and {len(labels)} labels")
        if self._masks is None:
            dtype = next((parameter.dtype for parameter in self.parameters()), torch.float32)
            self._masks = Masks(self._dropouts, self.devices[0], dtype)
        self._masks.draw(len(images))
        count = accepted(self.schedule, len(self.stages), self._count(images))
        flow = _Flow(self, images, count, labels)
        for stage in self.stages:
            stage.masks = self._masks
        try:
            for action in _merged(schedules.order(self.schedule, len(self.stages), count)):
                if action.kind == "F":
                    flow.forward(action.stage, action.microbatch)
                elif action.kind in "BI":
                    flow.backward(action.stage, action.microbatch)
        finally:
            for stage in self.stages:
                stage.masks = None
        return torch.stack(flow.losses).sum()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits, without gradients.

        Args:
            images: (N, 3, H, W), on any device.

        Returns:
            (N, num_classes), on the last device.
        """
        count = self._count(images)
        flow = _Flow(self, images, count)
        for action in _merged(schedules.order("gpipe", len(self.stages), count)):
            if action.kind == "F":
                flow.forward(action.stage, action.microbatch)
        return torch.cat(flow.logits)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of all stages, in order."""
        for stage in self.stages:
            yield from stage.parameters()

    def train(self, mode: bool = True) -> LocalPipeline:
        """Set the layers to training, or evaluation."""
        for stage in self.stages:
            stage.train(mode)
        return self

    def eval(self) -> LocalPipeline:
        """Set the layers to evaluation."""
        return self.train(False)

    def _count(self, images: Tensor) -> int:
        """Microbatches that have an image each, at least one."""
        return max(1, min(self.microbatches, len(images)))


class _Flow:
    """A batch on its way through the stages.

    Each stage has a graph of its own, from what it was given to what it gave; gradients pass from one to the other by
    hand, as they do between processes.
    """

    def __init__(self, pipeline: LocalPipeline, images: Tensor, count: int, labels: Tensor | None = None) -> None:
        self._pipeline = pipeline
        first, last = pipeline.devices[0], pipeline.devices[-1]
        self._images = images.to(first, non_blocking=True).tensor_split(count)
        self._labels = None if labels is None else labels.to(last, non_blocking=True).tensor_split(count)
        self._total = max(1, len(images))
        self._begins = [0]
        for part in self._images:
            self._begins.append(self._begins[-1] + len(part))
        self._sent: dict[tuple[int, int], _Sent] = {}
        """Activations on the way to a stage, by its number and the microbatch's."""
        self._returned: dict[tuple[int, int], _Sent] = {}
        """Gradients, likewise."""
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        """What a stage was given, and what it gave."""
        self.losses: list[Tensor] = []
        self.logits: list[Tensor] = []

    def forward(self, number: int, i: int) -> None:
        """Forward of stage `number` for microbatch `i`."""
        stage = self._pipeline.stages[number]
        x = self._sent.pop((number, i)).received() if number else self._images[i]
        stage.first_row = self._begins[i]
        y = stage(x)
        if number < len(self._pipeline.stages) - 1:
            self._sent[number + 1, i] = self._pipeline._onwards[number].send(y)
        elif self._labels is not None:
            y = loss_and_right(y, self._labels[i], self._total)[0]
            self.losses.append(y.detach())
        else:
            self.logits.append(y)
        if y.requires_grad:
            self._kept[number, i] = x, y

    def backward(self, number: int, i: int) -> None:
        """Backward of stage `number` for microbatch `i`, where anything in it or before it learns."""
        if (number, i) not in self._kept:
            return
        x, y = self._kept.pop((number, i))
        gradient = self._returned.pop((number, i)).received() if (number, i) in self._returned else None
        with torch.autocast(y.device.type, enabled=False):
            torch.autograd.backward(y, gradient)
        if x.grad is not None and number:
            self._returned[number - 1, i] = self._pipeline._back[number - 1].send(x.grad)


class _Link:
    """The way from one device to another.

    Between two GPUs, copies are made on streams of their own, one on either: torch orders a copy behind what is asked
    of both GPUs' current streams, and what is asked next behind the copy.
    """

    def __init__(self, source: torch.device, target: torch.device) -> None:
        self.source, self.target = source, target
        apart = source != target and source.type == target.type == GPU
        self._streams = [torch.cuda.Stream(device) for device in (source, target)] if apart else []

    def send(self, x: Tensor) -> _Sent:
        """Let `x` be copied once it has been computed; it takes no gradient back."""
        learns, x = x.requires_grad, x.detach()
        if not self._streams:
            return _Sent(x.to(self.target), learns, self.target)
        here, there = self._streams
        here.wait_stream(torch.cuda.current_stream(self.source))
        with torch.cuda.stream(there), torch.cuda.stream(here):
            copy = x.to(self.target, non_blocking=True)
        x.record_stream(here)
        return _Sent(copy, learns, self.target, there.record_event())


class _Sent:
    """What is on its way."""

    def __init__(self, tensor: Tensor, learns: bool, target: torch.device, arrival: Any = None) -> None:
        self._tensor, self._learns, self._target, self._arrival = tensor, learns, target, arrival

    def received(self) -> Tensor:
        """What has come, a leaf of autograd that wants a gradient where what was sent did."""
        if self._arrival is not None:
            stream = torch.cuda.current_stream(self._target)
            stream.wait_event(self._arrival)
            self._tensor.record_stream(stream)
        return self._tensor.requires_grad_(self._learns)


def _merged(orders: Sequence[Sequence[Action]]) -> Iterator[Action]:
    """The stages' orders of work as one, in which each action comes behind those whose result it needs."""
    done: set[Action] = set()
    left = [list(reversed(order)) for order in orders]
    while any(left):
        for actions in left:
            if actions and done.issuperset(_needed(actions[-1], len(orders))):
                done.add(actions[-1])
                yield actions.pop()


def _needed(action: Action, stages: int) -> list[Action]:
    """What another stage must have done before."""
    neighbour = action.stage + (-1 if action.kind == "F" else 1)
    return [action._replace(stage=neighbour)] if action.kind != "W" and 0 <= neighbour < stages else []


def _usable(name: str | torch.device) -> torch.device:
    """A device with its number, once a number has been there and back."""
    try:
        there = torch.zeros(1, device=name)
        there.item()
    except (RuntimeError, AssertionError) as error:  # PyTorch asserts that it was built for a kind of device
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(name)!r} cannot be used here ({reason}): name another, as 'cpu'") from error
    return there.device
