"""Steps of training in processes that share a network: what one of them does when it is asked."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from alexnet_triton.bench import checks
from alexnet_triton.bench.checks import NETWORK_FLOORS, Measure, Scale
from alexnet_triton.bench.layers import backend_of_ours
from alexnet_triton.bench.parallel_processes import Process
from alexnet_triton.bench.parallel_traffic import counted
from alexnet_triton.model import AlexNet
from alexnet_triton.parallel.engine import Engine
from alexnet_triton.parallel.layout import Layout
from alexnet_triton.recipe.train.rule import Rule
from alexnet_triton.recipe.train.settings import Settings
from alexnet_triton.tuning.accuracy import rms_error
from alexnet_triton.variants import VARIANTS

LOSS_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of a loss, as a share of one process's: sums of a batch in another order."""

GRADIENT_LIMITS = {dtype: 2 * NETWORK_FLOORS[dtype] for dtype in LOSS_LIMITS}
"""Of a gradient: both sides decide a few ReLUs and maxima otherwise than exact numbers would."""


class Work(NamedTuple):
    """What is trained."""

    variant: str
    batch: int
    """Images of a step, of all processes together."""
    dtype: torch.dtype
    """float32, or bfloat16 as `train --amp` has it: of parameters, maps and gradients."""
    scale: Scale
    """How thin the layers are, and their images' size; the rest of it is not read."""

    @property
    def side(self) -> int:
        """Of the images, in pixels."""
        return self.scale.image_size or VARIANTS[self.variant].image_size


@dataclass
class Trainer:
    """A network that processes share, with its update rule and this process's images."""

    process: Process
    engine: Engine
    rule: Rule
    work: Work
    images: Tensor | None
    labels: Tensor

    def gradients(self) -> Tensor:
        """Forward and backward; gives the batch's loss, the same in all processes, on the device."""
        self.rule.optimizer.zero_grad(set_to_none=True)
        with backend_of_ours(self.process.world.device):
            return self.engine.step(self.images, self.labels, self.work.batch)

    def step(self) -> None:
        """A step of training."""
        self.gradients()
        self.rule.optimizer.step()


def network(process: Process, work: Work) -> AlexNet:
    """The network, the same in all processes of all groups."""
    torch.manual_seed(20)
    return checks.network(work.variant, work.scale, process.world.device, torch.float32, dropout=0.5)


def classes_of(model: AlexNet) -> int:
    """How many classes a network tells apart."""
    last = model.classifier[-1]
    assert isinstance(last, nn.Linear)
    return last.out_features


def update_rule(module: nn.Module, work: Work) -> Rule:
    """What `train` updates parameters by, at a rate that leaves them what they are."""
    return Rule(module, Settings(lr=1e-6, crop=work.side, amp=work.dtype != torch.float32))


def prepare(process: Process, name: str, layout: Layout, work: Work, trace: bool = False) -> str:
    """Share a network out, to be kept under a name.

    Args:
        process: this one.
        name: for the calls that follow.
        layout: how the processes hold the network.
        work: what is trained.
        trace: of a pipeline, note when each piece of work begins and ends.

    Returns:
        Where a pipeline is cut, as in `"features.6"`; else nothing.
    """
    here = replace(process.world, per_replica=layout.per_replica)
    device, side = here.device, work.side
    model = network(process, work)
    batch = -(-work.batch // here.replicas)
    if layout.pipeline > 1:
        from alexnet_triton.parallel.pipeline.engine import PipelineEngine  # seconds, which no other layout needs

        engine: Engine = PipelineEngine(
            model, here, batch=batch, image_size=side, microbatches=layout.microbatches, schedule=layout.schedule,
            at=layout.cut or "auto", trace=trace,
        )  # fmt: skip
    else:
        engine = layout.engine(model, here, batch, side)
    if device.type == "cuda":
        engine.module.to(memory_format=torch.channels_last)
    rule = update_rule(engine.module, work)
    generator = torch.Generator().manual_seed(21)
    images = torch.randn(work.batch, 3, side, side, generator=generator)
    share = here.share(torch.arange(work.batch))
    own = images[share].to(device, work.dtype, memory_format=_layout_of(device)) if engine.reads else None
    torch.manual_seed(22 + engine.stream)
    engine.train()
    process.kept[name] = Trainer(process, engine, rule, work, own, share.to(device) % classes_of(model))
    stages = getattr(engine, "stages", [])
    return ", ".join(stage.names[0] for stage in stages[1:])


def _layout_of(device: torch.device) -> torch.memory_format:
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


# --- the check --------------------------------------------------------------------------------------------------------


def first_step(process: Process, name: str, folder: Path) -> tuple[float, float]:
    """Loss and gradients without dropout.

    One process alone writes its gradients into the folder, others compare theirs with those.

    Returns:
        The batch's loss, and the largest error of a gradient, where this process leads; else 0.
    """
    trainer: Trainer = process.kept[name]
    here = process.world
    with _without_dropout(trainer):
        loss = here.sum(trainer.gradients())[0].item()
    own = {name: p.grad for name, p in trainer.engine.module.named_parameters() if p.grad is not None}
    whole = trainer.engine.whole(own)
    trainer.rule.optimizer.zero_grad(set_to_none=True)
    path = folder / "gradients.pt"
    if here.size == 1:
        torch.save(whole, path)
        return loss, 0.0
    return loss, worst(whole, torch.load(path, map_location=here.device)) if here.leads else 0.0


@contextmanager
def _without_dropout(trainer: Trainer) -> Iterator[None]:
    """Nothing is dropped in the block, and nothing drawn: copies that drop for themselves agree with one process."""
    roots = [trainer.engine.module, getattr(trainer.engine, "model", None)]
    layers = {layer: layer.p for root in roots if root for layer in root.modules() if isinstance(layer, nn.Dropout)}
    for layer in layers:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, p in layers.items():
            layer.p = p


def worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest error of a tensor among those by name; infinite where the names are others."""
    if found.keys() != expected.keys():
        return float("inf")
    return max(rms_error(found[name], expected[name]) for name in expected)


def measures(work: Work, found: float, expected: float, error: float) -> list[Measure]:
    """A layout's loss and gradients against one process's."""
    return [
        Measure("loss", abs(found - expected) / abs(expected), LOSS_LIMITS[work.dtype]),
        Measure("gradients", error, GRADIENT_LIMITS[work.dtype]),
    ]


def bytes_sent(process: Process, name: str) -> int | None:
    """Bytes that this process sends in a step; not in the first two, in which torch settles what travels how."""
    trainer: Trainer = process.kept[name]
    trainer.step()
    with counted(trainer.engine.world.replicas) as traffic:
        trainer.step()
    return traffic.bytes


# --- times ------------------------------------------------------------------------------------------------------------


def seconds_of(process: Process, name: str, steps: int) -> float:
    """Seconds of a step, of so many without a break, from when all processes are ready to when this one is done."""
    trainer: Trainer = process.kept[name]
    process.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        trainer.step()
    process.synchronize()
    return (time.perf_counter() - start) / steps
