"""What the layers of a network have to do for a batch of images, and how long they take over it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from alexnet_triton.fusion import FusedSequential, leaves
from alexnet_triton.info import NAMES
from alexnet_triton.model import AlexNet
from alexnet_triton.parallel.pipeline.names import layer_names

DIRECTIONS = ("forward", "input gradient", "weight gradient")

_TOGETHER = (
    (nn.Identity, nn.Module),
    (nn.Conv2d, nn.ReLU),
    (nn.LocalResponseNorm, nn.MaxPool2d),
    (nn.Dropout, nn.Linear),
    (nn.Linear, nn.ReLU),
)
"""A layer and the next that execute as one op, or that it would be idle to part."""


class Work(NamedTuple):
    """A direction of a layer, for some number of images."""

    layer: str
    """Of `Layer.name`."""
    direction: str
    """Of `DIRECTIONS`."""
    images: int
    flop_per_image: int
    """Floating-point operations, 2 a multiply-add; normalisation and pooling count as none."""
    bytes_per_image: int
    """That cannot but be moved: input and output, once."""
    bytes_of_parameters: int

    @property
    def flop(self) -> int:
        """Of all images."""
        return self.images * self.flop_per_image

    @property
    def moved(self) -> int:
        """Bytes, of all images and the parameters."""
        return self.images * self.bytes_per_image + self.bytes_of_parameters


# --- where times come from --------------------------------------------------------------------------------------------


ORIGINS = ("measured", "carried over", "estimated")
"""Of a time; carried over is what was measured for another number of images."""


class Times(Protocol):
    """Gives the seconds of work."""

    def seconds(self, work: Work) -> float:
        """That the work takes."""

    def origin(self, work: Work) -> str:
        """Where that is from, of `ORIGINS`."""


class Roofs(NamedTuple):
    """What a device can do; a layer is estimated to take what it cannot but take (the roofline)."""

    flop_per_second: float
    """Of its products."""
    bytes_per_second: float
    """Of a copy, read and written."""

    def seconds(self, work: Work) -> float:
        """The longer of the arithmetic and of moving the bytes once."""
        return max(work.flop / self.flop_per_second, work.moved / self.bytes_per_second)

    def origin(self, work: Work) -> str:
        """Always estimated."""
        return "estimated"


NEUTRAL = Roofs(300e12, 3e12)
"""A GPU of which nothing is known: 100 operations in the time of a byte, between an H100's 22 in float32 and 263 in
bfloat16."""

PROCESSOR = Roofs(0.27e12, 20e9)
"""A CPU of which nothing is known: what two cores of a Xeon were measured to do in float32."""


@dataclass(frozen=True)
class Table:
    """Times from a table, and for a layer that is not in it, those of the roofs.

    Where the table has another number of images, a layer's time for the nearest one is carried over in proportion to
    the roofs' estimates.
    """

    times: Mapping[tuple[str, str, int], float]
    """Seconds by layer, direction of `DIRECTIONS` and number of images."""
    roofs: Roofs
    measured: bool = True
    """False where the times are a model's."""

    def seconds(self, work: Work) -> float:
        """As in the table, or in proportion to it."""
        counts = [images for layer, direction, images in self.times if (layer, direction) == work[:2]]
        if not counts:
            return self.roofs.seconds(work)
        images = min(counts, key=lambda count: abs(math.log(count / work.images)))
        known = self.times[work.layer, work.direction, images]
        if images == work.images:
            return known
        return known * self.roofs.seconds(work) / self.roofs.seconds(work._replace(images=images))

    def origin(self, work: Work) -> str:
        """Measured, carried over, or estimated."""
        if not self.measured or not any(key[:2] == work[:2] for key in self.times):
            return "estimated"
        return "measured" if (work.layer, work.direction, work.images) in self.times else "carried over"


# --- layers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A run of a network's layers that executes as one op, and its costs for a batch of images."""

    name: str
    """The paper's, as `conv1`, or `pool1` behind it, or else the module's."""
    begins: str | None
    """The name of the model's layer that it begins with, of `layer_names`; None where it begins inside one, so that no
    stage can begin here."""
    works: Mapping[str, Work]
    """By direction: those that training needs. A layer has no gradient of its input where nothing before it learns, and
    none of frozen parameters."""
    seconds: Mapping[str, float]
    """By the same directions."""
    origins: Mapping[str, str]
    """Where the seconds are from, of `ORIGINS`, by direction."""
    accumulate: float
    """Seconds of adding a microbatch's gradients of the parameters to those before it."""
    output: int
    """Bytes of the activations that leave it."""
    parameters: int
    state: int
    """Bytes that training holds for the parameters (`STATE_BYTES`)."""
    update: float
    """Seconds of the update rule, a step."""
    kept: int
    """Bytes of activations that it keeps for the backward pass: its input, and a byte for each maximum's place."""

    @property
    def forward(self) -> float:
        """Seconds."""
        return self.seconds["forward"]

    @property
    def input_gradient(self) -> float:
        """Seconds; 0 where there is none."""
        return self.seconds.get("input gradient", 0.0)

    @property
    def weight_gradient(self) -> float:
        """Seconds; 0 where there is none."""
        return self.seconds.get("weight gradient", 0.0)


STATE_BYTES = 12
"""Of a parameter that learns: itself, its gradient and its velocity in float32, or itself and its gradient in half
precision, with velocity and master in float32 (`KrizhevskySGD`)."""

UPDATE_BYTES = 20
"""Moved by the update rule for a parameter: velocity and values read and written, the gradient read; in half precision
the gradient takes 2 bytes less, and the rounded parameter 2 more."""


def layers(
    model: AlexNet, shape: Sequence[int], times: Times, roofs: Roofs, dtype: torch.dtype = torch.float32
) -> tuple[Layer, ...]:
    """The costs of a network's layers for a batch of images. Nothing is computed: shapes alone travel.

    Args:
        model: the network, on any device, "meta" too; what is frozen counts as frozen.
        shape: of the images, (N, 3, H, W).
        times: the source of the seconds of layers.
        roofs: the source of those of adding gradients up, and of the update.
        dtype: of activations, parameters and gradients.

    Raises:
        ValueError: the model is no `AlexNet`, or takes no such images.
    """
    found: list[Layer] = []
    learns = False
    for run in runs_of(model, shape):
        works = run.works(shape[0], dtype.itemsize, learns)
        learns |= "weight gradient" in works
        parameters = sum(p.numel() for p in run.parameters())
        learnt = sum(p.numel() for p in run.parameters() if p.requires_grad)
        places = run.output if isinstance(run.main, nn.MaxPool2d) else 0
        found.append(
            Layer(
                name=run.name,
                begins=run.begins,
                works=works,
                seconds={direction: times.seconds(work) for direction, work in works.items()},
                origins={direction: times.origin(work) for direction, work in works.items()},
                accumulate=3 * learnt * dtype.itemsize / roofs.bytes_per_second,
                output=shape[0] * run.output * dtype.itemsize,
                parameters=parameters,
                state=learnt * STATE_BYTES + (parameters - learnt) * dtype.itemsize,
                update=learnt * UPDATE_BYTES / roofs.bytes_per_second,
                kept=shape[0] * (run.input * dtype.itemsize + places) if len(works) > 1 else 0,
            )
        )
    return tuple(found)


@dataclass
class Run:
    """Layers that execute as one op."""

    begins: str | None
    modules: list[tuple[str, nn.Module]]
    """By name, in order."""
    name: str = ""
    input: int = 0
    """Elements of an image's input, and output."""
    output: int = 0

    @property
    def main(self) -> nn.Module:
        """The one that the others serve: with parameters, or a pooling, or the first."""
        return max((module for _, module in self.modules), key=_weight)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of all its layers."""
        for _, module in self.modules:
            yield from module.parameters()

    def works(self, images: int, itemsize: int, learns: bool) -> dict[str, Work]:
        """What training needs of it.

        Args:
            images: of the batch.
            itemsize: bytes of an element.
            learns: whether something before it does.
        """
        main = self.main
        weight = bias = flop = 0
        if isinstance(main, (nn.Conv2d, nn.Linear)):
            weight, bias = main.weight.numel(), 0 if main.bias is None else main.bias.numel()
            flop = 2 * self.output * math.prod(main.weight.shape[1:])
        ends = (self.input + self.output) * itemsize
        # The gradient of a normalisation needs the map itself. See `bench.floors`, which counts alike.
        again = self.input * itemsize if isinstance(self.modules[0][1], nn.LocalResponseNorm) else 0
        made = {"forward": Work(self.name, "forward", images, flop, ends, (weight + bias) * itemsize)}
        if learns:
            work = Work(self.name, "input gradient", images, flop, ends + again, weight * itemsize)
            made["input gradient"] = work
        if any(parameter.requires_grad for parameter in self.parameters()):
            made["weight gradient"] = Work(self.name, "weight gradient", images, flop, ends, weight * itemsize)
        return made


def _weight(module: nn.Module) -> int:
    """How much a layer counts in its run."""
    return 2 * any(True for _ in module.parameters()) + isinstance(module, nn.MaxPool2d)


def runs_of(model: AlexNet, shape: Sequence[int]) -> list[Run]:
    """The runs of a model, in order of execution, with their sizes for images of a shape."""
    named = {id(module): name for name, module in model.named_modules()}
    runs: list[Run] = []
    before: nn.Module | None = None
    for name in layer_names(model):
        layer = model.get_submodule(name)
        divisible = type(layer) in (nn.Sequential, FusedSequential) and len(layer._modules)
        for place, module in enumerate(leaves(layer) if divisible else [layer]):
            if before is not None and any(isinstance(before, a) and isinstance(module, b) for a, b in _TOGETHER):
                runs[-1].modules.append((named[id(module)], module))
            else:
                runs.append(Run(None if place else name, [(named[id(module)], module)]))
            before = module
    last = ""
    for run, (x, y) in zip(runs, ends(runs, lambda: _without_values(model, shape)), strict=True):
        run.input, run.output = math.prod(x.shape[1:]), math.prod(y.shape[1:])
        name = next((NAMES[name] for name, _ in run.modules if name in NAMES), "")
        last = name or last
        pools = isinstance(run.main, nn.MaxPool2d) and last.startswith("conv")
        run.name = name or (last.replace("conv", "pool") if pools else run.modules[0][0])
    return runs


def ends(runs: Sequence[Run], forward: Callable[[], Any]) -> list[tuple[Tensor, Tensor]]:
    """What each run is given and gives when `forward` calls their model."""
    calls: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((given[0], output))

    modules = dict.fromkeys(module for run in runs for _, module in run.modules)  # one may stand in several places
    handles = [module.register_forward_hook(note) for module in modules]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for run in runs:
        own, calls = calls[: len(run.modules)], calls[len(run.modules) :]
        found.append((own[0][0], own[-1][1]))
    return found


def _without_values(model: AlexNet, shape: Sequence[int]) -> None:
    """Call a model where shapes alone travel."""
    absent = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    images = torch.empty(1, *shape[1:], device="meta", dtype=next(iter(absent.values())).dtype)
    torch.func.functional_call(model, absent, (images,))
