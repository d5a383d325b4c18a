"""The layers of a network, timed one by one on the device where it is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_triton.fusion import FusedSequential
from alexnet_triton.model import AlexNet
from alexnet_triton.parallel.pipeline.work import Run, ends, runs_of


def measure(model: AlexNet, example: Tensor, seconds: float = 0.1) -> dict[tuple[str, str, int], float]:
    """Time each layer of this very network, in each direction, on the device where it is.

    A layer is called by itself, on what it is given in the network; on Triton it then brings its maps into the kernels'
    layout and out of it, most of which does not happen inside the network. Parameters, gradients, buffers and the
    state of generators stay what they were.

    Args:
        model: the network, in the mode that is to be timed.
        example: images (N, 3, H, W), as the model takes them; the values do not matter.
        seconds: for which each is repeated, at least; the time is the median.

    Returns:
        Seconds, as `Table.times`.

    Raises:
        ValueError: the model is no `AlexNet`, or takes no such images.
    """
    runs = runs_of(model, example.shape)
    times: dict[tuple[str, str, int], float] = {}
    devices = [example.device] if example.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        around = ends(runs, lambda: torch.func.functional_call(model, _copies(model), (example,)))
        learns = False
        for run, (x, _) in zip(runs, around, strict=True):
            works = run.works(len(example), example.element_size(), learns)
            learns |= "weight gradient" in works
            module = _alone(model, run)
            for direction in works:
                timed = _prepared(module, x, direction)
                times[run.name, direction, len(example)] = _median(timed, example.device, seconds)
    return times


def _alone(model: AlexNet, run: Run) -> nn.Module:
    """A run as a module that leaves its input as it is."""
    first, *rest = (module for _, module in run.modules)
    if getattr(first, "inplace", False):
        first = copy(first)
        first.inplace = False  # type: ignore[assignment]
    parent = type(getattr(model, run.modules[0][0].split(".")[0]))
    sequence = parent if parent is FusedSequential else nn.Sequential
    return sequence(first, *rest)


def _prepared(module: nn.Module, x: Tensor, direction: str) -> Callable[[], Any]:
    """One direction of a module; what it needs of the forward pass has been done."""
    buffers = _copies(module)
    if direction == "forward":
        return partial(torch.func.functional_call, module, buffers, (x,)) if buffers else partial(module, x)
    of_input = direction == "input gradient"
    values = {name: p.detach() if of_input else p for name, p in module.named_parameters()}
    x = x.detach().requires_grad_(of_input)
    y = torch.func.functional_call(module, {**values, **buffers}, (x,))
    wanted = [x] if of_input else [p for p in values.values() if p.requires_grad]
    return partial(torch.autograd.grad, y, wanted, torch.ones_like(y), retain_graph=True)


def _copies(module: nn.Module) -> dict[str, Tensor]:
    """Its buffers, such as running means, to be changed in their place."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def _median(timed: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """The median time of a call, of five at least, after two that do not count."""
    taken: list[float] = []
    while len(taken) < 7 or sum(taken) < seconds:
        start = time.perf_counter()
        timed()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])
