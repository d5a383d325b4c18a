"""Every launch of a training step on a GPU, timed as a network makes it."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from alexnet_triton.backend import use_backend
from alexnet_triton.bench import checks
from alexnet_triton.bench.checks import Scale
from alexnet_triton.bench.timing import AHEAD
from alexnet_triton.recipe.optim import KrizhevskySGD

TOLD = ("filters", "groups", "depth", "reduction", "rows", "columns", "channels", "CHANNELS", "height", "width")
"""Arguments of a launch that tell which layer's it is."""


def launches(variant: str, scale: Scale, device: torch.device) -> dict[str, Any]:
    """Microseconds of every launch of a step, in order, the update of the parameters last: as a network makes them.

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
    optimizer = KrizhevskySGD(parameters, lr=0.0)  # which moves as many bytes as any rate
    times: list[list[float]] = []
    for number in range(3 + min(20, scale.rounds)):
        log.clear()
        launch.launch = marked
        try:
            torch.cuda._sleep(10 * AHEAD)
            with use_backend("triton"):
                optimizer.zero_grad()
                model(images).float().square().mean().backward()
                optimizer.step()
        finally:
            launch.launch = made
        torch.cuda.synchronize(device)
        if number >= 3:
            times.append([start.elapsed_time(end) * 1e3 for _, _, start, end in log])
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    rows = [{"kernel": name, "us": round(us, 1), **told} for (name, told, _, _), us in zip(log, medians, strict=True)]
    return {"launches": rows, "sum_us": round(sum(medians), 1)}
