"""Checks of the kernels that run on whatever device they are given: layers, whole networks, repeatability.

A check gives measures, each a figure and the limit that it must not pass. Gradients are held to float64 given the
decisions that the kernel took (which outputs a ReLU let pass, where a window's maximum is, checked by themselves): two
numbers that float32 cannot tell apart may be decided either way, and one such decision among millions is no error.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_triton import ops, reference
from alexnet_triton.backend import use_backend
from alexnet_triton.model import AlexNet
from alexnet_triton.recipe.optim import KrizhevskySGD
from alexnet_triton.stages import ConvStage, PoolStage, encode
from alexnet_triton.tuning.accuracy import rms_error
from alexnet_triton.variants import VARIANTS

LIMITS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 6e-3}
"""Of `rms_error`, before the reduction's share (see `limit`)."""

NETWORK_FLOORS = {torch.float32: 5e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""What a network's gradients may be off by whatever torch's own are: a few ReLUs and maxima decided otherwise."""


class Scale(NamedTuple):
    """How large the checks are."""

    batches: tuple[int, ...]
    """The first one is that of whole networks too."""
    thin: int
    """Channels and features are divided by this."""
    image_size: int | None
    """Pixels a side; None: each variant's own."""
    most_elements: int
    """The large batch's first map has more elements."""
    rounds: int
    """Of a timing."""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32, torch.float16)


FULL = Scale((128, 1), 1, None, 2**31, 50)
TINY = Scale((2,), 8, 67, 2**13, 2)
"""For a dry run in Triton's interpreter."""


class Measure(NamedTuple):
    """A figure, and the most that it may be."""

    name: str
    value: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the figure is within its limit; a NaN is not."""
        return self.value <= self.limit


class Absent(Exception):
    """What a check needs is not on this machine; the message names it."""


def limit(dtype: torch.dtype, terms: int) -> float:
    """The limit of an error: rounding the answer, and a float32 sum of `terms` terms, whose error grows as a walk."""
    return float(LIMITS[dtype] + 2.0**-25 * terms**0.5)


def differing(a: Tensor, b: Tensor) -> float:
    """How many elements are not the same, NaN being the same as NaN."""
    return float((~((a == b) | (a.isnan() & b.isnan()))).sum().item())


# --- the layers of the networks -------------------------------------------------------------------------------


class Conv(NamedTuple):
    """A convolution."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    stage: ConvStage

    def draw(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Input, filters, bias and the output's gradient."""
        out = self.stage.out_size(self.x, self.weight, None)
        x, weight, grad = (torch.randn(size, device=device) for size in (self.x, self.weight, out))
        weight = weight / (self.weight[1] * self.weight[2] * self.weight[3]) ** 0.5
        bias = torch.randn(self.weight[0], device=device)
        last = torch.channels_last
        return [t.to(dtype) for t in (x.to(memory_format=last), weight, bias, grad.to(memory_format=last))]

    def ours(self, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> dict[str, Tensor]:
        """Output and gradients by the kernels."""
        x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
        s = self.stage
        with use_backend("triton"):
            y = ops.conv2d_relu(x, weight, bias, s.stride, s.padding, s.groups, s.relu)
            found = torch.autograd.grad(y, (x, weight, bias), grad)
        names = ("forward", "data gradient", "weight gradient", "bias gradient")
        return dict(zip(names, (y.detach(), *found), strict=True))

    def expected(self, results: dict[str, Tensor], *inputs: Tensor) -> dict[str, Tensor]:
        """The same in float64."""
        x, weight, bias, grad = (t.double().requires_grad_() for t in inputs)
        s = self.stage
        z = F.conv2d(x, weight, bias, s.stride, s.padding, 1, s.groups)
        dz = grad.detach() * (results["forward"] > 0)
        found = torch.autograd.grad(z, (x, weight, bias), dz)
        return dict(zip(results, (z.detach().relu(), *found), strict=True))

    def terms(self) -> dict[str, int]:
        """Length of the sum behind an element of each answer."""
        images, filters, height, width = self.stage.out_size(self.x, self.weight, None)
        depth, window = self.weight[1], self.weight[2] * self.weight[3]
        pixels = images * height * width
        own = filters // self.stage.groups * window
        return dict(
            forward=depth * window, **{"data gradient": own, "weight gradient": pixels, "bias gradient": pixels}
        )


class Pool(NamedTuple):
    """Normalisation, where its size is not 0, and pooling."""

    x: tuple[int, ...]
    stage: PoolStage

    def draw(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """A map as a ReLU gives it, zeros and so ties in it, large enough to be normalised; the output's gradient."""
        x = torch.randn(self.x, device=device).relu_() * 30
        grad = torch.randn(self.stage.out_size(self.x), device=device)
        return [t.to(memory_format=torch.channels_last).to(dtype) for t in (x, grad)]

    def ours(self, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
        """Output, place of the maxima (N, C, P, Q) and gradient by the operators that the layer is."""
        whole, real = encode([self.stage])
        operators = torch.ops.alexnet_triton
        y, saved = operators.map_chain(x, [], whole, real, True, True)
        dx = operators.map_chain_backward(grad, x, y, saved, [], whole, real, [True], True)[0]
        place = saved[0].view(y.shape[0], y.shape[2], y.shape[3], y.shape[1]).permute(0, 3, 1, 2)
        return {"forward": y, "place": place, "gradient": dx}

    def expected(self, results: dict[str, Tensor], *inputs: Tensor) -> dict[str, Tensor]:
        """The same in float64, of the elements at the places found; under "place" those elements themselves."""
        x, grad = (t.double() for t in inputs)
        x = x.requires_grad_()
        s = self.stage
        b = reference.local_response_norm(x, s.size, s.alpha, s.beta, s.k, s.lrn_groups) if s.size else x
        y = F.max_pool2d(b, s.window, s.stride, s.padding, 1, s.ceil_mode)
        place = results["place"].long()
        rows, columns = (torch.arange(length, device=x.device) for length in y.shape[2:])
        row = rows[:, None] * s.stride[0] - s.padding[0] + place // s.window[1]
        column = columns * s.stride[1] - s.padding[1] + place % s.window[1]
        inside = (
            (row >= 0)
            & (row < x.shape[2])
            & (column >= 0)
            & (column < x.shape[3])
            & (place < s.window[0] * s.window[1])
        )
        at = torch.where(inside, row * x.shape[3] + column, 0).flatten(2)
        taken = b.flatten(2).gather(2, at).view_as(y)
        dx = torch.autograd.grad(taken, x, grad)[0]
        results["place"] = torch.where(inside, taken.detach(), float("nan"))
        return {"forward": y.detach(), "place": y.detach(), "gradient": dx}

    def terms(self) -> dict[str, int]:
        """Length of the sum behind an element of each answer."""
        return dict.fromkeys(("forward", "place", "gradient"), max(1, self.stage.size))


class Linear(NamedTuple):
    """Dropout of the input, and a fully connected layer."""

    batch: int
    inputs: int
    outputs: int
    p: float
    relu: bool

    def draw(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Input, weights, bias and the output's gradient."""
        x = torch.randn(self.batch, self.inputs, device=device)
        weight = torch.randn(self.outputs, self.inputs, device=device) / self.inputs**0.5
        bias = torch.randn(self.outputs, device=device)
        grad = torch.randn(self.batch, self.outputs, device=device)
        return [t.to(dtype) for t in (x, weight, bias, grad)]

    def ours(self, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> dict[str, Tensor]:
        """Output and gradients by the kernels, and the seed of the mask."""
        from alexnet_triton.kernels import random

        x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
        torch.manual_seed(self.inputs)
        seed = random.seed(x.device)
        torch.manual_seed(self.inputs)
        with use_backend("triton"):
            y = ops.dropout_linear(x, weight, bias, self.p, self.relu)
            found = torch.autograd.grad(y, (x, weight, bias), grad)
        names = ("forward", "data gradient", "weight gradient", "bias gradient")
        return {**dict(zip(names, (y.detach(), *found), strict=True)), "seed": seed}

    def expected(self, results: dict[str, Tensor], *inputs: Tensor) -> dict[str, Tensor]:
        """The same in float64, with a mask that NumPy draws."""
        x, weight, bias, grad = (t.double() for t in inputs)
        seed = int(results.pop("seed").item())
        factor = torch.ones_like(x)
        if self.p:
            factor = mask(seed, self.batch, self.inputs, self.p).to(x.device).double() / (1 - self.p)
        dropped = x * factor
        y = F.linear(dropped, weight, bias)
        if self.relu:
            y, grad = y.relu(), grad * (results["forward"] > 0)
        found = (grad @ weight * factor, grad.t() @ dropped, grad.sum(0))
        return dict(zip(results, (y, *found), strict=True))

    def terms(self) -> dict[str, int]:
        """Length of the sum behind an element of each answer."""
        own = {"data gradient": self.outputs, "weight gradient": self.batch, "bias gradient": self.batch}
        return {"forward": self.inputs, **own}


Layer = Conv | Pool | Linear


class Case(NamedTuple):
    """A layer to be checked in one dtype."""

    name: str
    layer: Layer
    dtype: torch.dtype


def layers(variant: str, batch: int, scale: Scale) -> Iterator[tuple[str, Layer]]:
    """The layers of a variant by their names, each with what it is given in a training step."""
    spec = VARIANTS[variant]
    side = scale.image_size or spec.image_size
    size: tuple[int, ...] = (batch, 3, side, side)
    filters = [k // scale.thin for k in spec.filters]
    plan = (
        (11, 4, spec.padding, 1),
        (5, 1, 2, spec.groups),
        (3, 1, 1, 1),
        (3, 1, 1, spec.groups),
        (3, 1, 1, spec.groups),
    )
    for number, (window, stride, padding, groups) in enumerate(plan, 1):
        weight = (filters[number - 1], size[1] // groups, window, window)
        conv = ConvStage((stride, stride), (padding, padding), groups, True, True)
        yield f"conv{number}", Conv(size, weight, conv)
        size = conv.out_size(size, weight, None)
        if number in (1, 2, 5):
            norm = spec.norm if number < 3 else None
            how = (5, norm.alpha, 0.75, norm.k) if norm else (0, 0.0, 0.0, 0.0)
            pool = PoolStage(*how, (3, 3), (2, 2), (0, 0), spec.ceil_mode, norm.groups if norm else 1)
            yield f"pool{number}", Pool(size, pool)
            size = pool.out_size(size)
    wide = 4096 // scale.thin
    for number, (inputs, outputs) in enumerate(((filters[4] * 36, wide), (wide, wide), (wide, 1000 // scale.thin)), 6):
        drops = number < 8 if spec.dropout_first else number > 6
        yield f"fc{number}", Linear(batch, inputs, outputs, 0.5 if drops else 0.0, number < 8)


def cases(scale: Scale) -> list[Case]:
    """Every layer of every variant in every dtype, each shape once, the ones that matter most first."""
    found = []
    for batch in scale.batches:
        owners: dict[Layer, list[str]] = {}
        for variant in VARIANTS:
            for name, layer in layers(variant, batch, scale):
                owners.setdefault(layer, []).append(f"{name} of {variant}")
        for dtype in scale.dtypes:
            what = f"{str(dtype).removeprefix('torch.')}, batch {batch}"
            found += [Case(f"{' = '.join(names)}, {what}", layer, dtype) for layer, names in owners.items()]
    return found


def check_layer(case: Case, device: torch.device) -> list[Measure]:
    """Output and gradients of a layer against float64, its outputs' buffers poisoned."""
    from alexnet_triton.kernels import launch

    torch.manual_seed(zlib.crc32(case.name.encode()))
    inputs = case.layer.draw(device, case.dtype)
    with launch.poisoned():
        results = case.layer.ours(*inputs)
    expected = case.layer.expected(results, *inputs)
    terms = case.layer.terms()
    return [
        Measure(name, rms_error(results[name], expected[name]), limit(case.dtype, terms[name])) for name in expected
    ]


# --- dropout's mask -------------------------------------------------------------------------------------------


def mask(seed: int, rows: int, columns: int, p: float) -> Tensor:
    """Which elements dropout keeps, (rows, columns), from the description of Philox4x32-10 (Salmon et al. 2011).

    Element e of the matrix, counted row by row, is word e % 4 of counter e // 4, and is kept from p * 2^32 on.
    """
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    counter = np.arange(-(-rows * columns // 4), dtype=np.uint64)
    c0, c1, c2, c3 = counter & low, counter >> half, np.zeros_like(counter), np.zeros_like(counter)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        left, right = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = (right >> half) ^ c1 ^ np.uint64(k0), right & low
        c2, c3 = (left >> half) ^ c3 ^ np.uint64(k1), left & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words = np.stack([c0, c1, c2, c3], -1).reshape(-1)[: rows * columns]
    return torch.from_numpy(words.astype(np.float64) >= p * 2.0**32).view(rows, columns)


def check_mask(device: torch.device, rows: int, columns: int, p: float) -> list[Measure]:
    """The kernel's mask is NumPy's, element for element, for seeds of either sign."""
    from alexnet_triton.kernels import launch, linear

    measures = []
    for seed in (0, 1, -1, 0x1234_5678_9ABC_DEF0, -(2**63)):
        ones = torch.ones(rows, columns, device=device)
        with launch.poisoned():
            kept = linear.drop(ones, torch.tensor([seed], device=device), p, 16)
        expected = mask(seed, rows, columns, p).to(device)
        measures.append(Measure(f"seed {seed}", differing((kept[:, :columns] != 0).int(), expected.int()), 0.0))
    return measures


# --- whole networks -------------------------------------------------------------------------------------------


def network(variant: str, scale: Scale, device: torch.device, dtype: torch.dtype, dropout: float = 0.0) -> AlexNet:
    """A network with random weights through which signals neither die nor grow."""
    model = AlexNet(dropout=dropout, variant=variant, init="torchvision", device="meta")
    if scale.thin > 1:
        for layers_ in (model.features, model.classifier):
            for name, layer in layers_.named_children():
                setattr(layers_, name, _thinner(layer, scale.thin))
    model.to_empty(device=device)
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.normal_(layer.bias, std=0.1)
    return model.to(dtype)


def _thinner(layer: nn.Module, by: int) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        inputs = 3 if layer.in_channels == 3 else layer.in_channels // by
        how: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
        return nn.Conv2d(inputs, layer.out_channels // by, layer.kernel_size, **how, device="meta")  # type: ignore[arg-type]
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features // by, layer.out_features // by, device="meta")
    return layer


def images_for(
    variant: str, scale: Scale, device: torch.device, dtype: torch.dtype, batch: int | None = None
) -> Tensor:
    """Random images of the variant's size."""
    side = scale.image_size or VARIANTS[variant].image_size
    return torch.randn(batch or scale.batches[0], 3, side, side, device=device, dtype=dtype)


def gradients(model: nn.Module, images: Tensor, backend: str) -> dict[str, Tensor]:
    """Logits, and the gradients of a sum of them, of the images and of every parameter."""
    images = images.detach().requires_grad_()
    names, parameters = zip(*model.named_parameters(), strict=True)
    with use_backend(backend):
        logits = model(images)
        weights = torch.linspace(-1, 1, logits.numel(), device=images.device).view_as(logits)
        found = torch.autograd.grad((logits * weights.to(logits.dtype)).sum(), (images, *parameters))
    return dict(zip(("logits", "images", *names), (logits.detach(), *found), strict=True))


def check_network(variant: str, scale: Scale, device: torch.device, dtype: torch.dtype) -> list[Measure]:
    """Logits and all gradients of a network against the reference in float64.

    What a decision taken otherwise in an early layer does to later ones is no error of a kernel: the kernels may be
    off by twice what torch's own layers in the same dtype are, and by the floor in any case.
    """
    from alexnet_triton.kernels import launch

    torch.manual_seed(7)
    model = network(variant, scale, device, dtype).train()
    images = images_for(variant, scale, device, dtype)
    with launch.poisoned():
        ours = gradients(model, images, "triton")
    theirs = gradients(model, images, "reference")
    exact = gradients(copy.deepcopy(model).double(), images.double(), "reference")
    measures = []
    for name in exact:
        floor = 20 * LIMITS[dtype] if name == "logits" else NETWORK_FLOORS[dtype]
        most = max(floor, 2 * rms_error(theirs[name], exact[name]))
        measures.append(Measure(name, rms_error(ours[name], exact[name]), min(most, 0.5)))
    return measures


def check_repeats(variant: str, scale: Scale, device: torch.device, dtype: torch.dtype) -> list[Measure]:
    """Two passes forward and backward, dropout included, from one state of the generator agree bit for bit."""
    torch.manual_seed(8)
    model = network(variant, scale, device, dtype, dropout=0.5).train()
    images = images_for(variant, scale, device, dtype)
    runs = []
    for _ in range(2):
        torch.manual_seed(9)
        runs.append(gradients(model, images, "triton"))
    return [Measure(name, differing(runs[0][name], runs[1][name]), 0.0) for name in runs[0]]


def check_large(variant: str, scale: Scale, device: torch.device) -> list[Measure]:
    """A batch whose first map has more elements than 32 bits count: its ends are what they are in a small batch."""
    dtype = torch.bfloat16
    name, first = next(layers(variant, 1, scale))
    assert name == "conv1"
    assert isinstance(first, Conv)
    _, channels, height, width = first.stage.out_size(first.x, first.weight, None)
    batch = scale.most_elements // (channels * height * width) + 3
    if device.type == "cuda":
        needed = 2 * batch * (3 * channels * height * width + 6 * first.x[2] * first.x[3])
        free = torch.cuda.mem_get_info(device)[0]
        if free < needed:
            raise Absent(f"{needed / 2**30:.0f} GiB of free memory ({free / 2**30:.0f} GiB are)")
    torch.manual_seed(10)
    model = network(variant, scale, device, dtype).eval()
    images = images_for(variant, scale, device, dtype, batch)
    ends = torch.tensor([0, 1, batch - 2, batch - 1], device=device)
    with torch.no_grad(), use_backend("triton"):
        weight, bias = list(model.features[0].parameters())
        stride, padding = first.stage.stride, first.stage.padding
        first_maps = ops.conv2d_relu(images, weight, bias, stride, padding)[ends]
        maps = model.features(images)
        few_first = ops.conv2d_relu(images[ends], weight, bias, stride, padding)
        few = model.features(images[ends])
    return [
        Measure("conv1", rms_error(first_maps, few_first), LIMITS[dtype]),
        Measure("features", rms_error(maps[ends], few), 3 * LIMITS[dtype]),
        Measure("NaN", float(maps.isnan().sum().item()), 0.0),
    ]


def check_other_device(variant: str, scale: Scale, current: torch.device, other: torch.device) -> list[Measure]:
    """A network on `other`, while `current` is the current device, gives what it gives on `current`."""
    torch.manual_seed(11)
    model = network(variant, scale, current, torch.float32)
    images = images_for(variant, scale, current, torch.float32)
    here = gradients(model, images, "triton")
    there = gradients(copy.deepcopy(model).to(other), images.to(other), "triton")
    return [
        Measure(name, rms_error(there[name].to(current), here[name]), NETWORK_FLOORS[torch.float32]) for name in here
    ]


# --- a short run for a sanitizer --------------------------------------------------------------------------------


def small_run(device: torch.device) -> None:
    """One small op of each kind, forward and backward, and an update, in half and single precision, with odd ends."""
    for dtype in (torch.bfloat16, torch.float32):
        for layer in (
            Conv((2, 3, 23, 23), (24, 3, 11, 11), ConvStage((4, 4), (2, 2), 1, True, True)),
            Conv((2, 32, 9, 9), (48, 16, 5, 5), ConvStage((1, 1), (2, 2), 2, True, True)),
            Pool((2, 24, 9, 9), PoolStage(5, 1e-4, 0.75, 1.0, (3, 3), (2, 2), (0, 0), True, 2)),
            Pool((2, 24, 9, 9), PoolStage(0, 0.0, 0.0, 0.0, (3, 3), (2, 2), (0, 0), False, 1)),
            Linear(3, 130, 70, 0.5, True),
        ):
            layer.ours(*layer.draw(device, dtype))
        parameters = [torch.zeros(n, device=device, dtype=dtype, requires_grad=True) for n in (3, 5000)]
        optimizer = KrizhevskySGD(parameters, 0.1)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        with use_backend("triton"):
            optimizer.step()
