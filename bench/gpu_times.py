"""A first table of times on a GPU: roofs, whole networks, each launch of a step, each layer beside torch's own op.

Medians of many rounds after a warm-up, both sides in turn in every round, random data in several sets, the second-level
cache overwritten before every sample. A layer is timed as a user's op, which brings its maps into the kernels' layout
and out of it; inside a network most of that does not happen, which is what the launches show.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_triton import reference, unfuse
from alexnet_triton.backend import use_backend
from alexnet_triton.bench import checks
from alexnet_triton.bench.checks import Conv, Layer, Pool, Scale
from alexnet_triton.bench.timing import Samples, speedup, summary

OURS, THEIRS = "alexnet_triton", "torch"
SETS = 3
"""Sets of random inputs, taken in turn."""
AHEAD = 2_000_000
"""Cycles that the device is kept busy while the host puts a sample's launches into its queue, about a millisecond."""

Function = Callable[[int], Any]


def sample(
    functions: Mapping[str, Function], device: torch.device, rounds: int, ahead: int = AHEAD, warm: int = 3
) -> Samples:
    """Seconds of each function in each of `rounds` rounds, in turn, after `warm` rounds that do not count.

    Args:
        functions: by name; each is given the number of the set of inputs to take.
        device: where they run.
        rounds: samples of each.
        ahead: cycles by which the host gets ahead of the device; 0 counts the host's time too.
        warm: rounds before.
    """
    if device.type != "cuda":
        return _sample_on_cpu(functions, rounds)
    flushed = torch.empty(256 * 2**20, dtype=torch.int8, device=device)
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in functions}
    names = list(functions)
    for number in range(warm + rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flushed.zero_()
            if ahead:
                torch.cuda._sleep(ahead)
            else:
                torch.cuda.synchronize(device)
            start.record()
            functions[name](number % SETS)
            end.record()
            if number >= warm:
                marks[name].append((start, end))
        torch.cuda.synchronize(device)
    return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in marks.items()}


def _sample_on_cpu(functions: Mapping[str, Function], rounds: int) -> Samples:
    samples: Samples = {name: [] for name in functions}
    for number in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function(number % SETS)
            samples[name].append(time.perf_counter() - start)
    return samples


def compared(samples: Samples) -> dict[str, Any]:
    """Figures of two sides and the ratio of theirs to ours, round by round."""
    return {"ratio": speedup(samples, OURS, THEIRS), **{name: summary(values) for name, values in samples.items()}}


# --- roofs ------------------------------------------------------------------------------------------------------


def roofs(scale: Scale, device: torch.device) -> dict[str, Any]:
    """TFLOP/s of a large bfloat16 product, and GB/s (read and written) of a large copy."""
    side = 8192 // scale.thin**2
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randn(2**28 // scale.thin**4, device=device)
    target = torch.empty_like(source)
    functions: dict[str, Function] = {
        "product": lambda _: torch.mm(a, b, out=product),
        "copy": lambda _: target.copy_(source),
    }
    samples = sample(functions, device, scale.rounds)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "tflops": 2 * side**3 / medians["product"] / 1e12,
        "copy_gbs": 2 * source.numel() * source.itemsize / medians["copy"] / 1e9,
        "side": side,
        "copied_bytes": source.numel() * source.itemsize,
    }


# --- whole networks ---------------------------------------------------------------------------------------------


def _pair(variant: str, scale: Scale, device: torch.device) -> dict[str, nn.Module]:
    torch.manual_seed(20)
    ours = checks.network(variant, scale, device, torch.float32, dropout=0.5).to(memory_format=torch.channels_last)
    return {OURS: ours, THEIRS: unfuse(copy.deepcopy(ours))}


def _sets(variant: str, scale: Scale, device: torch.device) -> list[Tensor]:
    last = torch.channels_last
    images = (checks.images_for(variant, scale, device, torch.float32) for _ in range(SETS))
    return [batch.to(memory_format=last) for batch in images]


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)  # a graph must not keep its casts


def _backend(name: str) -> use_backend:
    return use_backend("triton" if name == OURS else "reference")


def inference(variant: str, scale: Scale, device: torch.device, graph: bool) -> dict[str, Any]:
    """Inference of one batch: ours beside torch's own layers, both channels-last and under autocast."""
    models = {name: model.eval() for name, model in _pair(variant, scale, device).items()}
    sets = _sets(variant, scale, device)

    def once(name: str, images: Tensor) -> Tensor:
        with torch.no_grad(), _autocast(device), _backend(name):
            return models[name](images)

    _hold(once(OURS, sets[0]), once(THEIRS, sets[0]))
    return compared(_sample_networks(once, sets, scale, device, graph))


def training_step(variant: str, scale: Scale, device: torch.device, graph: bool) -> dict[str, Any]:
    """Forward, backward and SGD with momentum on one batch: ours beside torch's own layers, as `inference`."""
    models = _pair(variant, scale, device)
    sets = _sets(variant, scale, device)
    labels = torch.arange(scale.batches[0], device=device) % 10
    for model in models.values():
        model.eval()
    with torch.no_grad(), _autocast(device):
        _hold(models[OURS](sets[0]), models[THEIRS](sets[0]))
    optimizers = {name: torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9) for name, model in models.items()}
    for model in models.values():
        model.train()

    def step(name: str, images: Tensor) -> Tensor:
        optimizers[name].zero_grad(set_to_none=True)
        with _backend(name):
            with _autocast(device):
                loss = F.cross_entropy(models[name](images), labels)
            loss.backward()
        optimizers[name].step()
        return loss.detach()

    return compared(_sample_networks(step, sets, scale, device, graph))


def _hold(ours: Tensor, theirs: Tensor) -> None:
    error = checks.rms_error(ours, theirs)
    if not error < 0.05:
        raise RuntimeError(f"the two networks differ by {error:.3g} of their scale; no time is reported")


def _sample_networks(
    once: Callable[[str, Tensor], Tensor], sets: Sequence[Tensor], scale: Scale, device: torch.device, graph: bool
) -> Samples:
    def eager(name: str, number: int) -> Any:
        return once(name, sets[number])

    if not graph:
        return sample({name: partial(eager, name) for name in (OURS, THEIRS)}, device, scale.rounds, ahead=0)
    replays = {
        name: [checks.captured(partial(once, name, images), device) for images in sets] for name in (OURS, THEIRS)
    }

    def replayed(name: str, number: int) -> Any:
        return replays[name][number]()

    return sample({name: partial(replayed, name) for name in (OURS, THEIRS)}, device, scale.rounds)


# --- launches ---------------------------------------------------------------------------------------------------

TOLD = ("filters", "groups", "depth", "reduction", "rows", "columns", "channels", "CHANNELS", "height", "width")
"""Arguments of a launch that tell which layer's it is."""


def launches(variant: str, scale: Scale, device: torch.device) -> dict[str, Any]:
    """Microseconds of every launch of a step forward and backward, in order: the kernels as a network runs them.

    The marks between launches add about a microsecond to each.
    """
    from alexnet_triton.kernels import launch

    if device.type != "cuda":
        raise checks.Absent("a GPU's clock")
    torch.manual_seed(21)
    model = checks.network(variant, scale, device, torch.bfloat16, dropout=0.5).train()
    images = checks.images_for(variant, scale, device, torch.bfloat16)
    made = launch.launch
    log: list[tuple[str, dict[str, Any], torch.cuda.Event, torch.cuda.Event]] = []

    def marked(kernel: Any, programs: int, **arguments: Any) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        made(kernel, programs, **arguments)
        end.record()
        told = {key: arguments[key] for key in TOLD if isinstance(arguments.get(key), int)}
        log.append((kernel.__name__, {"programs": programs, **told}, start, end))

    parameters = list(model.parameters())
    times: list[list[float]] = []
    for number in range(3 + min(20, scale.rounds)):
        log.clear()
        launch.launch = marked
        try:
            torch.cuda._sleep(10 * AHEAD)
            with use_backend("triton"):
                torch.autograd.grad(model(images).float().square().mean(), parameters)
        finally:
            launch.launch = made
        torch.cuda.synchronize(device)
        if number >= 3:
            times.append([start.elapsed_time(end) * 1e3 for _, _, start, end in log])
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    rows = [{"kernel": name, "us": round(us, 1), **told} for (name, told, _, _), us in zip(log, medians, strict=True)]
    return {"launches": rows, "sum_us": round(sum(medians), 1)}


# --- layers -----------------------------------------------------------------------------------------------------


def _theirs(layer: Layer, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    if isinstance(layer, Conv):
        s = layer.stage
        weight, bias = parameters
        return F.relu(F.conv2d(x, weight, bias, s.stride, s.padding, 1, s.groups))
    if isinstance(layer, Pool):
        p = layer.stage
        b = reference.local_response_norm(x, p.size, p.alpha, p.beta, p.k, p.lrn_groups) if p.size else x
        return F.max_pool2d(b, p.window, p.stride, p.padding, 1, p.ceil_mode)
    y = F.linear(F.dropout(x, layer.p) if layer.p else x, *parameters)
    return F.relu(y) if layer.relu else y


def _ours(layer: Layer, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    from alexnet_triton import ops

    with use_backend("triton"):
        if isinstance(layer, Pool):
            p = layer.stage
            return ops.lrn_max_pool(
                x, p.size, p.alpha, p.beta, p.k, p.window, p.stride, p.padding, p.ceil_mode, p.lrn_groups
            )
        weight, bias = parameters
        if isinstance(layer, Conv):
            s = layer.stage
            return ops.conv2d_relu(x, weight, bias, s.stride, s.padding, s.groups, s.relu)
        return ops.dropout_linear(x, weight, bias, layer.p, layer.relu)


def time_layer(layer: Layer, direction: str, scale: Scale, device: torch.device) -> dict[str, Any]:
    """One direction of a layer in bfloat16, channels-last: ours beside torch's op for the same.

    Args:
        layer: which.
        direction: `"forward"`, `"data gradient"` or `"weight gradient"` (the bias's with it).
        scale: rounds.
        device: where.
    """
    torch.manual_seed(22)
    drawn = [layer.draw(device, torch.bfloat16) for _ in range(SETS)]
    functions: dict[str, Function] = {}
    for name, op in ((OURS, _ours), (THEIRS, _theirs)):
        if direction == "forward":
            functions[name] = _forward(op, layer, drawn)
        else:
            functions[name] = _backward(op, layer, drawn, direction == "data gradient")
    return compared(sample(functions, device, scale.rounds))


Op = Callable[[Layer, Tensor, Sequence[Tensor]], Tensor]


def _forward(op: Op, layer: Layer, drawn: Sequence[Sequence[Tensor]]) -> Function:
    def run(number: int) -> Tensor:
        x, *parameters, _ = drawn[number]
        with torch.no_grad():
            return op(layer, x, parameters)

    return run


def _backward(op: Op, layer: Layer, drawn: Sequence[Sequence[Tensor]], of_data: bool) -> Function:
    made = []
    for x, *parameters, grad in drawn:
        x = x.detach().requires_grad_(of_data)
        parameters = [t.detach().requires_grad_(not of_data) for t in parameters]
        made.append((op(layer, x, parameters), [x] if of_data else parameters, grad))

    def run(number: int) -> tuple[Tensor, ...]:
        y, wanted, grad = made[number]
        return torch.autograd.grad(y, wanted, grad, retain_graph=True)

    return run


# --- all of it --------------------------------------------------------------------------------------------------


def cases(scale: Scale, device: torch.device) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The timings by name, the most telling first."""
    torch.backends.cudnn.benchmark = True  # torch's side takes the fastest that cuDNN has
    yield "roofs", partial(roofs, scale, device)
    batch = scale.batches[0]
    for graph in (False, True):
        how = "as CUDA graphs" if graph else "eager"
        for variant in ("paper", "torchvision"):
            yield (
                f"training step, {variant}, batch {batch}, {how}",
                partial(training_step, variant, scale, device, graph),
            )
            yield f"inference, {variant}, batch {batch}, {how}", partial(inference, variant, scale, device, graph)
    for variant in ("paper", "torchvision"):
        yield f"launches of a step, {variant}, batch {batch}", partial(launches, variant, scale, device)
    seen: set[Layer] = set()
    for variant in ("paper", "torchvision"):
        for name, layer in checks.layers(variant, batch, scale):
            if layer in seen:
                continue
            seen.add(layer)
            directions = ("forward", "data gradient", "weight gradient")
            for direction in directions[:2] if isinstance(layer, Pool) else directions:
                yield f"{name} of {variant}, {direction}", partial(time_layer, layer, direction, scale, device)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of text: the roofs, and every pair of times with its ratio."""
    lines = []
    for row in rows:
        if "tflops" in row:
            lines.append(f"roofs: {row['tflops']:,.0f} TFLOP/s (bfloat16 product), {row['copy_gbs']:,.0f} GB/s (copy)")
        if "ratio" in row:
            ours, theirs = (row[name]["median"] * 1e6 for name in (OURS, THEIRS))
            lines.append(f"{row['case']:52}{ours:>11,.1f} us{theirs:>11,.1f} us{row['ratio']:>7.2f}x")
    return lines
