"""What a pipeline would come to: the cut, why it is there, time, memory, traffic, and the picture of its schedule."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from alexnet_triton.model import AlexNet
from alexnet_triton.parallel.links import Link
from alexnet_triton.parallel.pipeline.costs import (
    GOOD_ENOUGH,
    Part,
    Pipeline,
    best_cuts,
    cut_table,
    pipeline,
)
from alexnet_triton.parallel.pipeline.picture import draw
from alexnet_triton.parallel.pipeline.schedules import check, is_possible
from alexnet_triton.parallel.pipeline.simulation import Timeline
from alexnet_triton.parallel.pipeline.work import ORIGINS, Layer, Roofs, Times, layers


@dataclass(frozen=True)
class Plan:
    """A pipeline, what the other cuts would cost, and one device alone."""

    network: str
    """Its variant and dtype."""
    side: str
    """Of its images."""
    chosen: Pipeline
    free: bool
    """Whether the cut was not given."""
    memory_limit: float | None
    """Bytes a device, for the choice of the cut."""
    single_cuts: tuple[Pipeline, ...]
    """Of two stages: each cut alone."""
    by_count: tuple[Pipeline, ...]
    """With other numbers of microbatches, each with its best cut unless that was given."""
    whole: Part
    """The network on one device, for the whole batch at once."""
    source: str
    """Where the times are from, in words."""
    card: str
    """What a device is called in the text, as `GPU`."""

    @property
    def title(self) -> str:
        """What is planned."""
        chosen = self.chosen
        return (
            f"{self.network}, {chosen.images:,} images of {self.side} in {chosen.microbatches} microbatches, "
            f"{len(chosen.parts)} stages, {chosen.schedule}"
        )

    @property
    def alone(self) -> float:
        """Seconds of a step on one device."""
        return self.whole.forward + self.whole.backward + self.whole.update

    @property
    def memory_alone(self) -> int:
        """Bytes that one device needs."""
        return self.whole.state + self.whole.kept

    @property
    def choice(self) -> str:
        """Why the cut is where it is."""
        places = ", ".join(
            f"{name} ({part.layers[0].name})" for name, part in zip(self.chosen.at, self.chosen.parts[1:], strict=True)
        )
        if not self.chosen.at:
            return "One stage: nothing is cut."
        if not self.free:
            return f"Cut before {places}, as asked."
        limit = "" if self.memory_limit is None else f" and need at most {self.memory_limit / 1e9:,.3g} GB a device"
        return (
            f"Cut before {places}: of the cuts that tear no op apart{limit}, those whose step takes at most "
            f"{GOOD_ENOUGH - 1:.0%} more than the shortest; of these, the one that needs least memory in one device."
        )

    @property
    def provenance(self) -> str:
        """Where a microbatch's times are from."""
        return f"Times of layers: {origins(self.chosen.parts)}; {self.source}"


def origins(parts: Sequence[Part]) -> str:
    """How many of the times were measured, carried over and estimated, in words."""
    counts = Counter(origin for part in parts for layer in part.layers for origin in layer.origins.values())
    found = [f"{counts[origin]} {origin}" for origin in ORIGINS if counts[origin]]
    return f"all {next(iter(counts))}" if len(found) == 1 else ", ".join(found)


def make_plan(
    model: AlexNet,
    shape: Sequence[int],
    *,
    stages: int,
    microbatches: int,
    schedule: str,
    link: Link,
    times: Times,
    roofs: Roofs,
    source: str,
    dtype: torch.dtype,
    at: Sequence[str] = (),
    memory_limit: float | None = None,
    apart: bool = True,
    card: str = "GPU",
) -> Plan:
    """Plan a pipeline.

    Args:
        model: the network.
        shape: of a batch of images, (N, 3, H, W).
        stages: how many, one a device.
        microbatches: of the batch; where it does not divide, the last one is filled up.
        schedule: of `schedules.SCHEDULES`.
        link: between the devices.
        times: the source of the layers' seconds.
        roofs: of a device; see `work.layers`.
        source: where the times are from, in words.
        dtype: of activations and parameters.
        at: where to cut; none: `best_cuts` chooses.
        memory_limit: for that choice.
        apart: see `costs.Part`.
        card: what a device is called in the text.

    Raises:
        ValueError: more microbatches than images, as many cuts as do not make the stages, or as `best_cuts`,
            `costs.pipeline` and `work.layers`.
    """
    images = shape[0]
    if microbatches > images:
        raise ValueError(
            f"a batch of {images:,} images cannot be cut into {microbatches:,} microbatches: take {images:,} at most"
        )
    if at and len(at) != stages - 1:
        raise ValueError(f"{len(at)} cuts make {len(at) + 1} stages, got {stages}")
    check(schedule, stages, microbatches)

    def planned(count: int) -> tuple[tuple[Layer, ...], Pipeline]:
        found = layers(model, (-(-images // count), *shape[1:]), times, roofs, dtype)
        cuts = at or best_cuts(found, stages, count, schedule, link, memory_limit, apart=apart)
        return found, pipeline(found, cuts, count, schedule, link, images=images, apart=apart)

    found, chosen = planned(microbatches)
    of_two = schedule if stages == 2 else "1f1b" if microbatches > 1 else "gpipe"
    counts = [2**power for power in range(1, 8) if 2**power <= images and is_possible(schedule, stages, 2**power)]
    return Plan(
        network=f"AlexNet ({model.variant}), {str(dtype).removeprefix('torch.')}",
        side=f"{shape[2]}x{shape[3]}",
        chosen=chosen,
        free=not at,
        memory_limit=memory_limit,
        single_cuts=tuple(cut_table(found, microbatches, of_two, link, images=images, apart=apart)),
        by_count=tuple(planned(count)[1] for count in counts),
        whole=Part(layers(model, shape, times, roofs, dtype), apart),
        source=source,
        card=card,
    )


# --- the text ---------------------------------------------------------------------------------------------------------


def format_plan(plan: Plan) -> str:
    """A plan as text, at most 80 columns wide."""
    chosen = plan.chosen
    sentences = [
        f"{plan.title}; {chosen.link.name}: {chosen.link.bytes_per_second / 1e9:,.3g} GB/s each way, "
        f"{chosen.link.latency * 1e6:,.3g} us a transfer.",
        f"{plan.provenance}.",
    ]
    made = [*_wrapped(sentences), ""]
    made += [*_cuts(plan), ""]
    made += _wrapped([plan.choice])
    made += ["", *_stages(plan), ""]
    made += _wrapped(_sentences(plan))
    return "\n".join(made)


def _wrapped(sentences: Sequence[str]) -> list[str]:
    return [line for sentence in sentences for line in textwrap.wrap(sentence, 80, break_on_hyphens=False)]


def _cuts(plan: Plan) -> list[str]:
    """The table of single cuts."""
    lines = [
        f"Each cut alone, in two stages, {plan.single_cuts[0].schedule}:",
        f"{'':21}{'ms/microbatch':>14}{'params':>8}{'MB over':>9}{'GB a device':>13}",
        f"  {'cut before':19}{'0':>7}{'1':>7}{'in 1':>8}{'it':>9}{'0':>7}{'1':>6}{'idle':>6}{'images/s':>9}",
    ]
    for one in plan.single_cuts:
        name, layer = one.at[0], one.parts[1].layers[0].name
        mark = "*" if name in plan.chosen.at else " "
        times = "".join(f"{_three(1e3 * (part.forward + part.backward + part.accumulate)):>7}" for part in one.parts)
        share = one.parts[1].parameters / (one.parts[0].parameters + one.parts[1].parameters)
        there, back = one.traffic(0)
        moved = _three(there / 1e6) + ("" if back else "/0")
        lines.append(
            f"{mark} {name if name == layer else f'{name} {layer}':19}{times}{share:>8.1%}{moved:>9}"
            f"{one.memory(0) / 1e9:>7.2f}{one.memory(1) / 1e9:>6.2f}"
            f"{one.timeline.bubble:>6.0%}{_three(one.images_per_second):>9}"
        )
    return [*lines, "* the plan's. ms: forward, backward, gradients added. MB: a microbatch, one way."]


def _stages(plan: Plan) -> list[str]:
    """The table of the plan's stages."""
    chosen = plan.chosen
    lines = [
        f"{'':34}{'ms a microbatch':>25}{'GB a device':>14}",
        f"{'stage':20}{'parameters':>14}{'forward':>9}{'back':>8}{'adding':>8}{'state':>8}{'kept':>6}{'idle':>6}",
    ]
    for number, part in enumerate(chosen.parts):
        times = f"{_three(1e3 * part.forward):>9}{_three(1e3 * part.backward):>8}{_three(1e3 * part.accumulate):>8}"
        kept = chosen.in_flight[number] * part.kept
        lines.append(
            f"{f'{number} {span(part)}':20}{part.parameters:>14,}{times}{part.state / 1e9:>8.2f}{kept / 1e9:>6.2f}"
            f"{chosen.timeline.idle(number):>6.0%}"
        )
    return [*lines, "adding: to gradients of the microbatches before. kept: activations, at most."]


def _three(value: float) -> str:
    """A number with three digits that count."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def span(part: Part) -> str:
    """The layers of a stage in words."""
    first, last = part.layers[0].name, part.layers[-1].name
    return first if first == last else f"{first} to {last}"


def _sentences(plan: Plan) -> list[str]:
    chosen = plan.chosen
    stages, count = len(chosen.parts), chosen.microbatches
    textbook = (stages - 1) / (count + stages - 1)
    sent = [sum(chosen.traffic(stage)) * count / 1e6 for stage in range(stages - 1)]
    times = chosen.images_per_second * plan.alone / chosen.images
    speed, speed_alone = (_three(each) for each in (chosen.images_per_second, chosen.images / plan.alone))
    made = [
        f"Bubble {chosen.timeline.bubble:.1%}; equal stages and free links would have {textbook:.1%} under gpipe and "
        "1f1b.",
        f"A step takes {_ms(chosen.step)}, the update at its end included: {speed} images/s. One {plan.card} alone "
        f"takes {_ms(plan.alone)} ({origins([plan.whole])}), {speed_alone} images/s, and "
        f"{plan.memory_alone / 1e9:.2f} GB: the pipeline is {times:.2f} times as fast.",
    ]
    if sent:
        made.append(f"Traffic a step, both ways: {', '.join(f'{moved:,.3g} MB' for moved in sent)}.")
    if plan.by_count:
        best = max(plan.by_count, key=lambda one: one.images_per_second)
        tried = ", ".join(str(one.microbatches) for one in plan.by_count)
        made.append(
            f"Of {tried} microbatches, {best.microbatches} are the fastest: {_three(best.images_per_second)} images/s, "
            f"cut before {', '.join(best.at) or 'nothing'}."
        )
    if chosen.schedule == "zero-bubble" and not chosen.parts[0].apart:
        made.append(
            "The fused ops on Triton compute both gradients at once: under zero-bubble no weight gradient is left to "
            "fill the bubble with."
        )
    return made


def _ms(seconds: float) -> str:
    return f"{_three(1e3 * seconds)} ms"


# --- the picture ------------------------------------------------------------------------------------------------------


def draw_plan(plan: Plan, path: Path) -> Path:
    """Draw a plan's schedule; see `picture.draw`."""
    chosen = plan.chosen
    blocks = [
        block._replace(kind="B") if block.kind == chosen.parts[block.stage].backward_kind(block.stage) else block
        for block in chosen.timeline.blocks
    ]
    rows = [f"stage {number}\n{span(part)}" for number, part in enumerate(chosen.parts)]
    note = f"Simulated. {plan.provenance}. The update at the end of a step is not shown, and counts in images/s."
    timeline = Timeline(tuple(blocks))
    return draw(timeline, path, plan.title, images_per_second=chosen.images_per_second, rows=rows, note=note)
