"""The stages of a network in as many processes, on `torch.distributed.pipelining`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_triton.backend import current_backend
from alexnet_triton.model import AlexNet
from alexnet_triton.parallel.engine import Engine, loss_and_right
from alexnet_triton.parallel.gradients import added, sum_gradients
from alexnet_triton.parallel.pipeline import runtime, schedules
from alexnet_triton.parallel.pipeline.masks import Masks
from alexnet_triton.parallel.pipeline.microbatches import accepted, filled_up
from alexnet_triton.parallel.pipeline.names import described
from alexnet_triton.parallel.pipeline.simulation import Block
from alexnet_triton.parallel.pipeline.stages import Stage, dropouts, split
from alexnet_triton.parallel.processes.world import PLACE, REPLICA, World
from alexnet_triton.variants import VARIANTS

NO_LABEL = -100
"""Of the rows that fill up a microbatch: `F.cross_entropy` leaves them out, of the loss and of the gradients."""


class PipelineEngine(Engine):
    """One stage of a network, beside the processes that have the others.

    Images enter at the first stage, a microbatch behind the other, and the last one computes the loss. Microbatches
    have one size in the whole run, `batch / microbatches` rounded up; a step of fewer images takes fewer of them, and
    its last is filled up with zeros, which nothing is learnt from. (A layer that looks at several images at once, as
    batch normalisation does, sees one microbatch, with those zeros.)

    Losses, gradients and dropout are those of one process that has the whole network and the replica's whole batch.
    For dropout all processes of a replica must have generators of equal state, as they have after each step.

    Args:
        model: the whole network, the same in every process. It is taken to pieces: what this process does not hold goes
            to "meta".
        world: the processes, one for each stage of each replica.
        batch: images of a full step of one replica.
        image_size: their side, in pixels; None is the variant's own.
        microbatches: that a full step is cut into.
        schedule: order of the work, of `schedules.SCHEDULES`. `zero-bubble` moves gradients of parameters only where
            torch computes them apart (`runtime.comes_in_halves`), which is not on Triton.
        at: where the network is cut, as of `split`.
        trace: note when each piece of work of a step began and ended (`trace_blocks`), which makes a GPU wait for each;
            `engine.trace.on` changes it from step to step.

    Raises:
        ValueError: the network cannot be cut like this, the schedule does not take so many microbatches, or a parameter
            is in two stages.
    """

    module: Stage

    def __init__(
        self,
        model: AlexNet,
        world: World,
        *,
        batch: int,
        image_size: int | None = None,
        microbatches: int = 8,
        schedule: str = "1f1b",
        at: str | Sequence[str] = "auto",
        trace: bool = False,
    ) -> None:
        schedules.check(schedule, world.per_replica, microbatches)
        if batch < 1:
            raise ValueError(f"a step of a pipeline has at least 1 image, got batch={batch}")
        self.stages = split(
            model, world.per_replica, at, batch, image_size, microbatches=microbatches, schedule=schedule
        )  # fmt: skip
        _check_apart(self.stages)
        self.model, self.world, self.schedule = model, world, schedule
        self.image_size = image_size or VARIANTS[model.variant].image_size
        self.size = -(-batch // microbatches)
        self._dropouts = dropouts(model, image_size)
        for number, stage in enumerate(self.stages):
            stage.to(world.device if number == world.place else "meta")
        self.module = self.stages[world.place]
        self.reads, self._counts = world.place == 0, world.place == world.per_replica - 1
        self.stream, self.streams = world.replica, world.replicas
        mesh = world.mesh()
        self._places, self._replicas = mesh.get_group(PLACE), mesh.get_group(REPLICA)
        parts = "; ".join(described(stage.names) for stage in self.stages)
        self.description = f"in {len(self.stages)} stages ({parts}), {schedule} of {microbatches} microbatches"
        self._masks: Masks | None = None
        self._total = 1
        self.trace = runtime.Trace(trace)
        self._prepared: dict[Any, tuple[runtime.Runner, Any]] = {}

    # --- work ---------------------------------------------------------------------------------------------------------

    def step(self, images: Tensor | None, labels: Tensor, total: int) -> Tensor:
        """Forward and backward of this replica's part of a batch; see `Engine.step`.

        Raises:
            ValueError: images or stage are not where or what they should be.
        """
        self._check(images, len(labels))
        self.trace.blocks.clear()
        if self._masks is None:  # parameters may have got another dtype since they were cut
            self._masks = Masks(self._dropouts, self.world.device, _dtype(self.module))
        self._masks.draw(len(labels))
        counted = torch.zeros(2, device=self.world.device)
        with added(self.module.parameters()) if self.world.replicas > 1 else nullcontext():
            if len(labels):
                self._total = total
                counted += self._run(images, labels)
            if self.world.replicas > 1:
                sum_gradients(self.module.parameters(), self._replicas)
        return counted

    def _run(self, images: Tensor | None, labels: Tensor) -> Tensor:
        """The schedule; gives what this process counts."""
        count = accepted(self.schedule, self.world.per_replica, self._microbatches(len(labels)))
        runner, schedule = self._training(count)
        losses: list[Tensor] = []
        told: dict[str, Any] = {}
        if self._counts:
            rows = count * self.size - len(labels)
            told = {"target": F.pad(labels.to(self.world.device), (0, rows), value=NO_LABEL), "losses": losses}
        self.module.masks, self.module.first_row = self._masks, 0
        try:
            logits = schedule.step(*self._given(images, count), **told)
        finally:
            self.module.masks = None
            runner.clear_runtime_states()
        if not self._counts:
            return torch.zeros(2, device=self.world.device)
        right = logits.argmax(1).eq(told["target"]).sum()
        return torch.stack([torch.stack(losses).sum().detach(), right.float()])

    @torch.no_grad()
    def logits(self, images: Tensor | None, count: int) -> Tensor | None:
        """Logits of this replica's images, in the last stage's process; see `Engine.logits`.

        Raises:
            ValueError: as `step`.
        """
        self._check(images, count)
        microbatches = self._microbatches(count)
        runner, schedule = self._evaluation(microbatches)
        try:
            logits = schedule.step(*self._given(images, microbatches))
        finally:
            runner.clear_runtime_states()
        return logits[:count].float() if self._counts else None

    def train(self, mode: bool = True) -> None:
        """Set the network to training, or evaluation: the layers of other stages too, whose dropout is drawn here."""
        self.model.train(mode)
        self.module.train(mode)

    def _microbatches(self, images: int) -> int:
        """Those that hold so many images, at least one."""
        return max(1, -(-images // self.size))

    def _given(self, images: Tensor | None, microbatches: int) -> tuple[Tensor, ...]:
        """What this process's stage is given from outside."""
        return () if images is None or not self.reads else (filled_up(images, microbatches * self.size),)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """A microbatch's part of the whole batch's mean loss; zero, with a graph, where no row has a label."""
        return loss_and_right(logits, labels, self._total)[0]

    def _training(self, microbatches: int) -> tuple[runtime.Runner, Any]:
        """The schedule for so many microbatches; all processes of the replica make it together when it is first run.

        Torch's schedule and stage settle at the first step what is sent, and whether gradients are; so there is one
        for each case.
        """
        learns = tuple(parameter.requires_grad for parameter in self.model.parameters())
        key = (microbatches, _autocast(self.world.device), current_backend(), learns)
        if key not in self._prepared:
            before = self.stages[: self.world.place]
            learns_before = any(parameter.requires_grad for stage in before for parameter in stage.parameters())
            halves = self.reads or runtime.comes_in_halves(self.module, self.world.device, learns_before)
            runner = self._runner(self.schedule != "zero-bubble" or halves, self.trace)
            self._prepared[key] = runner, runtime.schedule_of(self.schedule, runner, microbatches, self._loss)
        return self._prepared[key]

    def _evaluation(self, microbatches: int) -> tuple[runtime.Runner, Any]:
        """Likewise, forward alone."""
        key = (microbatches, _autocast(self.world.device))
        if key not in self._prepared:
            runner = self._runner(True, runtime.Trace(False))
            self._prepared[key] = runner, runtime.forward_only(runner, microbatches)
        return self._prepared[key]

    def _runner(self, halves: bool, trace: runtime.Trace) -> runtime.Runner:
        world = self.world
        return runtime.Runner(
            self.module, world.place, world.per_replica, world.device, self._places,
            size=self.size, halves=halves, trace=trace,
        )  # fmt: skip

    def _check(self, images: Tensor | None, count: int) -> None:
        device = self.world.device
        for name, parameter in self.module.named_parameters():
            if not _is_at(parameter, device):
                raise ValueError(
                    f"stage {self.world.place} computes on {device}, got its {name} on {parameter.device}: leave a "
                    "stage where the engine has put it"
                )
        if not self.reads:
            return
        if images is None:
            raise ValueError("the process of the first stage must be given the images, got None")
        if len(images) != count:
            raise ValueError(f"each image needs a label, got {len(images)} images and {count} labels")
        if not _is_at(images, device):
            raise ValueError(
                f"the first stage computes on {device}, got images on {images.device}: move them with .to(device)"
            )
        if images.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"the pipeline was made for images of {self.image_size}x{self.image_size} pixels, got "
                f"{tuple(images.shape)}: tell it image_size"
            )

    # --- the whole ----------------------------------------------------------------------------------------------------

    def grad_norm(self) -> Tensor:
        """The norm of all stages' gradients; see `Engine.grad_norm`."""
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        square = nn.utils.get_total_norm(gradients).to(self.world.device, torch.float32).square()
        dist.all_reduce(square, group=self._places)
        return square.sqrt()

    @torch.no_grad()
    def whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put the stages' tensors together; see `Engine.whole`.

        Those of other stages are received on this process's device.
        """
        if self.world.replica:
            return {}
        described = self._gathered([(name, tensor.shape, tensor.dtype) for name, tensor in parts.items()])
        if not self.world.leads:
            for tensor in parts.values():
                dist.send(tensor.detach().contiguous(), 0, group=self._places)  # replica 0's first rank is 0
            return {}
        found = dict(parts)
        for place, tensors in enumerate(described):
            for name, shape, dtype in tensors if place else ():
                found[name] = torch.empty(shape, dtype=dtype, device=self.world.device)
                dist.recv(found[name], place, group=self._places)
        return {name: found[name] for name in self.model.state_dict() if name in found}

    def part(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of this stage; see `Engine.part`."""
        return {name: whole[name] for name in self.module.state_dict() if name in whole}

    def trace_blocks(self) -> list[Block]:
        """When the work of the last step was done, in all processes of replica 0; all must call it together.

        Times are of `time.perf_counter`, which all processes of a Linux machine share; those of several machines cannot
        be compared.

        Returns:
            The blocks by process and in order of time, in the process that leads; nothing in others.

        Raises:
            RuntimeError: nothing was traced.
        """
        if not self.trace.blocks:
            raise RuntimeError("no times of a step were noted: make the engine with trace=True, or set engine.trace.on")
        if self.world.replica:
            return []
        gathered = self._gathered(self.trace.blocks)
        return [Block(*block) for blocks in gathered for block in blocks] if self.world.leads else []

    def _gathered(self, value: Any) -> list[Any]:
        """What every process of this replica gives, in the order of their stages."""
        values: list[Any] = [None] * self.world.per_replica
        dist.all_gather_object(values, value, group=self._places)
        return values


def _check_apart(stages: Sequence[Stage]) -> None:
    """Refuse a parameter that two processes would learn apart from one another."""
    owner: dict[nn.Parameter, int] = {}
    for number, stage in enumerate(stages):
        for name, parameter in stage.named_parameters():
            if owner.setdefault(parameter, number) != number:
                raise ValueError(
                    f"stages {owner[parameter]} and {number} share the parameter {name}: cut the network where none is "
                    "shared"
                )


def _dtype(module: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in module.parameters()), torch.float32)


def _autocast(device: torch.device) -> torch.dtype | None:
    """What autocast computes in; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _is_at(tensor: Tensor, device: torch.device) -> bool:
    """Whether a tensor lies on a device, which may be of any number."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)
