"""What a cut through a network costs: time of each stage, traffic, memory; and where to cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise

import torch

from alexnet_triton.model import AlexNet
from alexnet_triton.parallel.links import LINKS, Link
from alexnet_triton.parallel.pipeline.schedules import Action, check, in_flight, order
from alexnet_triton.parallel.pipeline.simulation import Timeline, simulate
from alexnet_triton.parallel.pipeline.work import NEUTRAL, PROCESSOR, Layer, Times, layers

GOOD_ENOUGH = 1.02
"""A step may take so many times the fastest one's time for a cut that needs less memory."""


@dataclass(frozen=True)
class Part:
    """The layers of one stage, and their costs for a microbatch."""

    layers: tuple[Layer, ...]
    apart: bool = True
    """Whether the layers' ops can compute the gradients of input and of weights one without the other. The fused ops on
    Triton compute both whichever is asked for; a stage of them does its whole backward pass at `I`."""

    @cached_property
    def forward(self) -> float:
        """Seconds."""
        return sum(layer.forward for layer in self.layers)

    @cached_property
    def backward(self) -> float:
        """Seconds of both gradients, without adding them to those before."""
        return self.input_gradient + self.weight_gradient

    @cached_property
    def input_gradient(self) -> float:
        """Seconds."""
        return sum(layer.input_gradient for layer in self.layers)

    @cached_property
    def weight_gradient(self) -> float:
        """Seconds."""
        return sum(layer.weight_gradient for layer in self.layers)

    @cached_property
    def accumulate(self) -> float:
        """Seconds of adding the parameters' gradients to those of the microbatches before."""
        return sum(layer.accumulate for layer in self.layers)

    @cached_property
    def update(self) -> float:
        """Seconds of the update rule."""
        return sum(layer.update for layer in self.layers)

    @property
    def parameters(self) -> int:
        """How many."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def state(self) -> int:
        """Bytes of parameters, gradients, velocities and masters."""
        return sum(layer.state for layer in self.layers)

    @property
    def kept(self) -> int:
        """Bytes of activations of a microbatch that the backward pass needs."""
        return sum(layer.kept for layer in self.layers)

    def seconds(self, action: Action) -> float:
        """What an action takes here, as torch's stages do it.

        The first stage's `I` is empty: nobody waits for the gradient of its input, and torch leaves it all to `W`.
        Where gradients do not come apart, the other stages' `W` is.
        """
        if action.kind == "F":
            return self.forward
        more = self.accumulate if action.microbatch else 0.0
        whole = self.backward_kind(action.stage)
        if action.kind in ("B", whole):
            return self.backward + more
        if whole is not None:
            return 0.0
        return self.input_gradient if action.kind == "I" else self.weight_gradient + more

    def backward_kind(self, stage: int) -> str | None:
        """The kind of action that is all of a backward pass in two parts; None where `I` and `W` share it.

        Args:
            stage: which one this is.
        """
        if stage == 0:
            return "W"
        return None if self.apart else "I"


@dataclass(frozen=True)
class Pipeline:
    """A network in stages under a schedule, and what comes of it.

    Args:
        at: the names of the layers that begin the stages but the first.
        parts: the stages.
        microbatches: of a batch.
        images: of a batch; the last microbatch is filled up where they do not divide.
        schedule: of `schedules.SCHEDULES`.
        link: between one stage and the next.
    """

    at: tuple[str, ...]
    parts: tuple[Part, ...]
    microbatches: int
    images: int
    schedule: str
    link: Link

    def traffic(self, stage: int) -> tuple[int, int]:
        """Bytes of a microbatch that leave a stage for the next one, and that come back from there."""
        forward = self.parts[stage].layers[-1].output
        return forward, forward if self.parts[stage + 1].layers[0].input_gradient else 0

    @cached_property
    def timeline(self) -> Timeline:
        """Of a step, the update not counted."""

        def transfer(action: Action) -> float:
            forward = action.kind == "F"
            return self.link.seconds(self.traffic(action.stage - (not forward))[not forward])

        return simulate(
            self.schedule, len(self.parts), self.microbatches, lambda a: self.parts[a.stage].seconds(a), transfer
        )

    @cached_property
    def step(self) -> float:
        """Seconds of a step: each process updates its own parameters when it has done its last action."""
        return max(self.timeline.end(stage) + part.update for stage, part in enumerate(self.parts))

    @property
    def images_per_second(self) -> float:
        """Of training."""
        return self.images / self.step

    @cached_property
    def in_flight(self) -> tuple[int, ...]:
        """The most microbatches whose activations a stage holds at a time, by stage."""
        orders = order(self.schedule, len(self.parts), self.microbatches)
        ends = ["B" + (part.backward_kind(stage) or "W") for stage, part in enumerate(self.parts)]
        return tuple(map(in_flight, orders, ends))

    def memory(self, stage: int) -> int:
        """Bytes of a stage's parameters and what belongs to them, and of the activations that it keeps."""
        return self.parts[stage].state + self.in_flight[stage] * self.parts[stage].kept

    @property
    def most_memory(self) -> int:
        """Bytes, of the fullest stage."""
        return max(map(self.memory, range(len(self.parts))))

    @property
    def bound(self) -> float:
        """Seconds that the step takes at least: the work of the slowest stage."""
        return max(
            self.microbatches * (part.forward + part.backward) + (self.microbatches - 1) * part.accumulate + part.update
            for part in self.parts
        )


def candidates(found: Sequence[Layer]) -> tuple[str, ...]:
    """The names of layers before which a network may be cut without tearing apart what executes as one op."""
    return tuple(layer.begins for layer in found[1:] if layer.begins is not None)


def pipeline(
    found: Sequence[Layer],
    at: Sequence[str],
    microbatches: int,
    schedule: str,
    link: Link,
    *,
    images: int | None = None,
    apart: bool = True,
) -> Pipeline:
    """A network cut at given places.

    Args:
        found: of `layers`, for one microbatch.
        at: the names that begin the stages but the first, of `candidates`, in order.
        microbatches: of a batch.
        schedule: of `schedules.SCHEDULES`.
        link: between the stages.
        images: of a batch; None is as many as the microbatches hold.
        apart: see `Part.apart`.

    Raises:
        ValueError: a name that is none of the candidates, names that are not in order, or as `schedules.check`.
    """
    known = candidates(found)
    for name in at:
        if name not in known:
            raise ValueError(
                f"no stage can begin at {name!r} without tearing an op apart: choose of {', '.join(known)}"
            )
    places = [0, *(next(i for i, layer in enumerate(found) if layer.begins == name) for name in at), len(found)]
    if sorted(set(places)) != places:
        raise ValueError(f"the cuts must be different and in the order of the layers, got {', '.join(at)}")
    check(schedule, len(places) - 1, microbatches)
    parts = tuple(Part(tuple(found[a:b]), apart) for a, b in pairwise(places))
    images = images or microbatches * found[0].works["forward"].images
    return Pipeline(tuple(at), parts, microbatches, images, schedule, link)


def best_cuts(
    found: Sequence[Layer],
    stages: int,
    microbatches: int,
    schedule: str,
    link: Link,
    memory_limit: float | None = None,
    *,
    apart: bool = True,
) -> tuple[str, ...]:
    """Where to cut a network so that a step is short: the names that begin the stages but the first.

    Every choice is simulated that could be the best one. Time of the stages and traffic over the cuts are in the
    simulation. Of the cuts whose step takes at most `GOOD_ENOUGH` times the shortest, the one is taken whose fullest
    stage needs the least memory; among equals, the one with the shortest step.

    Args:
        found: as for `pipeline`.
        stages: how many.
        microbatches: of a batch.
        schedule: of `schedules.SCHEDULES`.
        link: between the stages.
        memory_limit: bytes that no stage may need more than; None for no limit.
        apart: as for `pipeline`.

    Raises:
        ValueError: there are not so many stages in the network, no cut keeps within the limit, or as `schedules.check`.
    """
    known = candidates(found)
    if not 1 <= stages <= len(known) + 1:
        raise ValueError(f"the network can be planned in 1 to {len(known) + 1} stages, got {stages}")
    tried = [pipeline(found, at, microbatches, schedule, link, apart=apart) for at in combinations(known, stages - 1)]
    fitting = [one for one in tried if memory_limit is None or one.most_memory <= memory_limit]
    if not fitting:
        least = min(one.most_memory for one in tried)
        raise ValueError(
            f"no cut into {stages} stages keeps within {memory_limit:,.0f} bytes a device, the least is {least:,}: "
            "take more stages, or smaller microbatches"
        )
    shortest = float("inf")
    good: list[Pipeline] = []
    for one in sorted(fitting, key=lambda one: one.bound):
        if one.bound > GOOD_ENOUGH * shortest:
            break
        good.append(one)
        shortest = min(shortest, one.step)
    return min(
        (one for one in good if one.step <= GOOD_ENOUGH * shortest), key=lambda one: (one.most_memory, one.step)
    ).at


def cut_table(
    found: Sequence[Layer],
    microbatches: int,
    schedule: str,
    link: Link,
    *,
    images: int | None = None,
    apart: bool = True,
) -> list[Pipeline]:
    """What each single cut costs: the pipelines of two stages, in the order of the layers; arguments as `pipeline`."""
    return [
        pipeline(found, (name,), microbatches, schedule, link, images=images, apart=apart) for name in candidates(found)
    ]


def auto_cut(
    model: AlexNet,
    stages: int,
    example_shape: Sequence[int],
    *,
    microbatches: int | None = None,
    schedule: str = "1f1b",
    link: Link | None = None,
    times: Times | None = None,
    dtype: torch.dtype | None = None,
    memory_limit: float | None = None,
) -> tuple[str, ...]:
    """The cuts that `split` makes unless it is told where.

    Args:
        model: the network.
        stages: how many.
        example_shape: of a batch of images, (N, 3, H, W).
        microbatches: of that batch; None is four for each stage.
        schedule: of `schedules.SCHEDULES`.
        link: between the stages; None is NVLink, and loopback where this machine has no GPU.
        times: the source of the layers' seconds, as `Table(measure(model, images), NEUTRAL)` with a microbatch of
            images; None is `NEUTRAL`, and `PROCESSOR` where this machine has no GPU.
        dtype: of activations and parameters; None is bfloat16, and float32 where this machine has no GPU.
        memory_limit: as for `best_cuts`.

    Raises:
        ValueError: as `best_cuts`, or as `work.layers`.
    """
    gpu = torch.cuda.is_available()
    roofs = NEUTRAL if gpu else PROCESSOR
    microbatches = microbatches or 4 * stages
    shape = (max(1, -(-example_shape[0] // microbatches)), *example_shape[1:])
    dtype = dtype or (torch.bfloat16 if gpu else torch.float32)
    found = layers(model, shape, times or roofs, roofs, dtype)
    link = link or LINKS["nvlink4" if gpu else "loopback"]
    return best_cuts(found, stages, microbatches, schedule, link, memory_limit)
