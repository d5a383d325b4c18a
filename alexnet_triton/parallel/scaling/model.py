"""A step's time and traffic, layer by layer: see the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from alexnet_triton.info import layer_table
from alexnet_triton.parallel.scaling.machines import Cluster
from alexnet_triton.variants import VARIANTS

LAYOUTS = ("data", "pipeline", "hybrid", "towers")

IMAGENET = 1_281_167
"""Images of ILSVRC 2012's training set."""

IMAGE_BYTES = 3 * 256 * 256
"""Of an image in a packed dataset: 256x256 pixels, not compressed."""

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""Bytes of gradients at which a bucket is sent: those of torch's DistributedDataParallel (`bucket_cap_mb`)."""

UPDATE_BYTES = 20
"""That an update moves for a parameter: float32 gradient, parameter and velocity are read, the last two written. In
half precision the gradient takes two bytes, and the copy that the network uses is written."""

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Job:
    """What is trained."""

    variant: str = "merged"
    batch: int = 128
    """Images of a step and GPU."""
    dtype: str = "bfloat16"
    """Of the network's parameters, maps and gradients."""
    num_classes: int = 1000
    gradient_share: float = 1.0
    """Of the gradients' bytes, what travels: under 1 where a method sends the largest alone, as Sun et al. 2019 do."""
    one_gpu: float | None = None
    """Images a second that one GPU was measured to train; None: what the card's figures give."""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"unknown variant {self.variant!r}: choose one of {', '.join(VARIANTS)}")
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"unknown dtype {self.dtype!r}: choose one of {', '.join(ITEM_BYTES)}")
        if self.batch < 1:
            raise ValueError(f"a GPU needs at least 1 image of a step, got a batch of {self.batch}")

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Estimate:
    """A step of a job in one layout, as the model has it. Times are seconds."""

    layout: str
    gpus: int
    machines: int
    batch: int
    """Images of a step, of all GPUs."""
    computing: float
    """Forward, backward, a pipeline's bubble, and the update."""
    waiting: float
    """Communication that backward does not hide."""
    sent: float
    """Bytes that a GPU sends, the one that sends most."""
    read: float = math.inf
    """Bytes of images a second that a machine can read."""

    @property
    def step(self) -> float:
        """Seconds from one step to the next."""
        return max(self.computing + self.waiting, self.images_of_a_machine / self.read)

    @property
    def images_of_a_machine(self) -> float:
        """Bytes of a step's images that each machine reads."""
        return self.batch * IMAGE_BYTES / self.machines

    @property
    def images_per_second(self) -> float:
        """Of all GPUs."""
        return self.batch / self.step

    def seconds(self, epochs: float, images: int = IMAGENET) -> float:
        """Of so many epochs, without evaluation and start."""
        return epochs * images / self.images_per_second


# --- computing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer that costs time, for one image."""

    name: str
    kind: str
    parameters: int
    multiply_adds: int
    inputs: int
    """Numbers that it reads."""
    outputs: int
    first: bool
    """Nothing before it needs its input's gradient."""


@cache
def layers(variant: str, num_classes: int = 1000) -> tuple[Layer, ...]:
    """A variant's layers in order, for one image; ReLU and dropout are part of their neighbours."""
    found: list[Layer] = []
    inputs = 3 * VARIANTS[variant].image_size ** 2
    for row in layer_table(variant, num_classes=num_classes):
        kind, outputs = row.layer.split()[0], math.prod(row.output)
        if kind in ("Conv2d", "Linear", "MaxPool2d", "LRN"):
            name = row.name or row.module
            found.append(Layer(name, kind, row.parameters, row.multiply_adds, inputs, outputs, first=not found))
        inputs = outputs
    return tuple(found)


class Device:
    """A job on one of a cluster's GPUs: seconds of layers, and bytes of their gradients."""

    def __init__(self, job: Job, cluster: Cluster) -> None:
        self.job, self.card, self.slowness = job, cluster.card, 1.0
        self.layers = layers(job.variant, job.num_classes)
        self.convolutions = tuple(layer for layer in self.layers if layer.kind != "Linear")
        self.linear = tuple(layer for layer in self.layers if layer.kind == "Linear")
        if job.one_gpu is not None:
            self.slowness = job.batch / job.one_gpu / self.whole(self.layers, job.batch)

    def forward(self, layer: Layer, images: float, share: float = 1.0) -> float:
        """Seconds of a layer's product, of a share of its outputs."""
        moved = images * (layer.inputs + share * layer.outputs) + share * layer.parameters
        flop = 2 * share * images * layer.multiply_adds
        busy = max(flop / self.card.products(self.job.dtype), self.job.itemsize * moved / self.card.copies)
        return self.slowness * busy

    def backward(self, layer: Layer, images: float, share: float = 1.0) -> float:
        """Seconds of the gradients of its input and of its parameters, as far as there are such."""
        products = 2 if layer.parameters and not layer.first else 1
        return products * self.forward(layer, images, share)

    def both(self, of: Sequence[Layer], images: float, share: float = 1.0) -> float:
        """Seconds of several layers, forward and backward."""
        return sum(self.forward(layer, images, share) + self.backward(layer, images, share) for layer in of)

    def update(self, of: Sequence[Layer], share: float = 1.0) -> float:
        """Seconds of the update of several layers' parameters."""
        parameters = sum(layer.parameters for layer in of)
        return self.slowness * share * parameters * UPDATE_BYTES / self.card.copies

    def whole(self, of: Sequence[Layer], images: float) -> float:
        """Seconds of a step of one GPU alone."""
        return self.both(of, images) + self.update(of)

    def gradients(self, of: Sequence[Layer]) -> float:
        """Bytes of the gradients of several layers that travel."""
        return sum(layer.parameters for layer in of) * self.job.itemsize * self.job.gradient_share


Parts = tuple[float, float, float]
"""Seconds of computing, seconds of waiting, and bytes that a GPU sends."""


# --- layouts ----------------------------------------------------------------------------------------------------------


def estimate(
    layout: str, gpus: int, job: Job, cluster: Cluster, *, microbatches: int = 8, group: int | None = None
) -> Estimate:
    """A step of a job on so many GPUs.

    Args:
        layout: of `LAYOUTS`; on one GPU all but the towers are the same.
        gpus: of all machines.
        job: what is trained.
        cluster: where.
        microbatches: into which a pipeline's pair of GPUs cuts its images.
        group: GPUs that share the fully connected layers of `hybrid`; None: all, as `train --hybrid` does.

    Raises:
        ValueError: an unknown layout; GPUs that fill no machines, pairs or groups; microbatches without images; towers
            of another network than the paper's.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    machines, device = cluster.machines(gpus), Device(job, cluster)
    if layout == "towers":
        parts = _towers(gpus, device, cluster)
    elif gpus == 1:
        parts = device.whole(device.layers, job.batch), 0.0, 0.0
    elif layout == "pipeline":
        parts = _pipeline(gpus, device, cluster, microbatches)
    elif layout == "hybrid":
        parts = _hybrid(gpus, device, cluster, group or gpus)
    else:
        parts = _data(gpus, device, cluster)
    return Estimate(layout, gpus, machines, gpus * job.batch, *parts, read=cluster.read)


def _data(gpus: int, device: Device, cluster: Cluster) -> Parts:
    """Whole copies."""
    batch = device.job.batch
    backward = [(device.backward(layer, batch), device.gradients([layer])) for layer in reversed(device.layers)]
    waiting = left_over(backward, lambda size: cluster.all_reduce(size, gpus))
    sent = 2 * (gpus - 1) / gpus * device.gradients(device.layers)
    return device.whole(device.layers, batch), waiting, sent


def left_over(
    backward: Sequence[tuple[float, float]], all_reduce: Callable[[float], float], taken: float = 0.0
) -> float:
    """Seconds for which gradients are still under way when backward has ended.

    Args:
        backward: seconds and gradient bytes of each layer, in the order of backward.
        all_reduce: seconds of so many bytes. One bucket travels at a time.
        taken: seconds from the start for which other gradients travel.
    """
    clock, free, held = 0.0, taken, 0.0
    limit = FIRST_BUCKET
    for number, (seconds, size) in enumerate(backward, 1):
        clock += seconds
        held += size
        if held >= limit or (held and number == len(backward)):
            free = max(clock, free) + all_reduce(held)
            held, limit = 0.0, BUCKET
    return max(0.0, free - clock)


def _pipeline(gpus: int, device: Device, cluster: Cluster, microbatches: int) -> Parts:
    """Pairs of stages, at the cut that is fastest.

    A pair takes the images of two GPUs. Its gradients are whole after its last microbatch alone, so that nothing hides
    their sum over the pairs.
    """
    if gpus % 2:
        raise ValueError(f"a pipeline of two stages needs an even number of GPUs, got {gpus}")
    images = 2 * device.job.batch
    if not 1 <= microbatches <= images:
        raise ValueError(f"{images} images of a pair make 1 to {images} microbatches, got {microbatches}")
    link = cluster.inside if cluster.gpus_per_machine > 1 else cluster.network
    found = []
    for place, layer in enumerate(device.layers):
        if place == 0 or not layer.parameters:
            continue  # pooling and normalisation stay with the convolution before them
        stages = device.layers[:place], device.layers[place:]
        busy = [device.both(stage, images / microbatches) for stage in stages]
        crossing = images * layer.inputs * device.job.itemsize
        hop = link.seconds(crossing / microbatches)
        slowest = max(*busy, hop)  # what is sent waits for no one, unless the link is what takes longest
        filled = sum(busy) + (microbatches - 1) * slowest + max(device.update(stage) for stage in stages)
        sizes = [device.gradients(stage) for stage in stages]
        summed = cluster.all_reduce(sum(sizes), gpus, 2, max(sizes))
        pairs = gpus // 2
        found.append((filled, 2 * hop + summed, crossing + 2 * (pairs - 1) / pairs * max(sizes)))
    return min(found, key=lambda parts: parts[0] + parts[1])


def _hybrid(gpus: int, device: Device, cluster: Cluster, group: int) -> Parts:
    """Copies of the convolutions, fully connected layers split over groups.

    Scheme (a) of Krizhevsky 2014, section 4: the group's images are gathered before the first fully connected layer,
    and each GPU computes its share of the outputs for all of them. Nothing hides that. Several groups sum their shares
    of the gradients as copies do.
    """
    if gpus % group:
        raise ValueError(f"groups of {group} do not divide {gpus} GPUs: take another group size")
    batch, together = device.job.batch, group * device.job.batch
    split, copied = device.linear, device.convolutions
    moved = _moved(device, together)
    shared = device.gradients(split)
    between = cluster.all_reduce(shared, gpus, group)
    backward = [(device.backward(layer, batch), device.gradients([layer])) for layer in reversed(copied)]
    waiting = sum(cluster.gather(size, group) for size in moved)
    waiting += left_over(backward, lambda size: cluster.all_reduce(size, gpus), between)
    sent = (group - 1) / group * sum(moved) + 2 * (gpus - 1) / gpus * device.gradients(copied)
    sent += 2 * (gpus - group) / gpus * shared / group
    computing = device.whole(copied, batch) + device.both(split, together, 1 / group) + device.update(split, 1 / group)
    return computing, waiting, sent


def _towers(gpus: int, device: Device, cluster: Cluster) -> Parts:
    """Pairs of GPUs with half of every layer's outputs each, and the images of both.

    Both halves are gathered before conv3 and around the fully connected layers (Krizhevsky et al. 2012, section 3.5 and
    figure 2). A pair has one copy of every parameter; several pairs sum their gradients after backward.
    """
    if device.job.variant != "paper":
        raise ValueError(f"towers are of variant='paper', got {device.job.variant!r}: nothing keeps its halves apart")
    if gpus % 2:
        raise ValueError(f"two towers need an even number of GPUs, got {gpus}")
    images = 2 * device.job.batch
    conv3 = next(layer for layer in device.layers if layer.name == "conv3")
    moved = _moved(device, images, conv3.inputs)
    summed = device.gradients(device.layers)
    waiting = sum(cluster.gather(size, 2) for size in moved) + cluster.all_reduce(summed, gpus, 2)
    computing = device.both(device.layers, images, 1 / 2) + device.update(device.layers, 1 / 2)
    return computing, waiting, sum(moved) / 2 + 2 * (gpus - 2) / gpus * summed / 2


def _moved(device: Device, images: int, *before: int) -> list[int]:
    """Bytes that are gathered, and in backward summed and scattered.

    Of an image these are so many numbers `before` the fully connected layers, what each of those reads, and the logits,
    whose gradient every GPU has.
    """
    read = [*before, *(layer.inputs for layer in device.linear)]
    return [images * number * device.job.itemsize for number in (*read, *read, device.linear[-1].outputs)]


def alone(job: Job, cluster: Cluster) -> Estimate:
    """A step of one GPU, with what it must read.

    Args:
        job: what is trained.
        cluster: the machines, one GPU of which computes; however fast they read, it does not wait for images.
    """
    return estimate("data", 1, job, replace(cluster, read=math.inf))
