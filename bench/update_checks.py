"""Checks of the update rule: the kernel against float64, and replayed by a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alexnet_triton.backend import use_backend
from alexnet_triton.bench.checks import Measure, Scale, differing
from alexnet_triton.bench.graph_checks import captured, no_waiting
from alexnet_triton.recipe.optim import KrizhevskySGD
from alexnet_triton.tuning.accuracy import rms_error

RATES = (0.1, 0.1, 0.01)
MOMENTUM, DECAY = 0.9, 0.1
LIMIT = 1e-6
"""Of the float32 values' error: a few roundings."""


def _parameters(scale: Scale, dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    """Of AlexNet's sizes and of odd ones; the last lies where no 16 bytes begin."""
    sizes = (1, 10, 1000, 4097, 9216 * 4096 // scale.thin**2)
    drawn = [torch.randn(n, device=device, dtype=dtype) for n in sizes]
    return [nn.Parameter(x) for x in [*drawn, torch.randn(5000, device=device, dtype=dtype)[1:]]]


def check_update(dtype: torch.dtype, scale: Scale, device: torch.device) -> list[Measure]:
    """Steps over a drop of the rate are those of float64; the host waits for none of them."""
    torch.manual_seed(16)
    parameters = _parameters(scale, dtype, device)
    optimizer = KrizhevskySGD(parameters, RATES[0], MOMENTUM, DECAY)
    exact = [(p.detach().double(), torch.zeros_like(p, dtype=torch.float64)) for p in parameters]
    for rate in RATES:
        optimizer.param_groups[0]["lr"] = rate
        for parameter, (w, v) in zip(parameters, exact, strict=True):
            parameter.grad = torch.randn_like(parameter)
            v.mul_(MOMENTUM).sub_(rate * (DECAY * w + parameter.grad.double()))
            w.add_(v)
        with use_backend("triton"), no_waiting(device):
            optimizer.step()
    masters = [optimizer.master_of(parameter) for parameter in parameters]
    velocities = [optimizer.state[parameter]["velocity"] for parameter in parameters]
    rounded = sum(differing(p.detach(), w.to(dtype)) for p, w in zip(parameters, masters, strict=True))
    return [
        Measure("weights", rms_error(torch.cat(masters), torch.cat([w for w, _ in exact])), LIMIT),
        Measure("velocities", rms_error(torch.cat(velocities), torch.cat([v for _, v in exact])), LIMIT),
        Measure("not the weight rounded", rounded, 0.0),
    ]


def check_update_graph(scale: Scale, device: torch.device) -> list[Measure]:
    """A captured step whose rate is a tensor leaves what eager steps leave, bit for bit, over a drop of the rate."""
    torch.manual_seed(17)
    parameters = _parameters(scale, torch.bfloat16, device)
    gradients = [torch.randn_like(parameter) for parameter in parameters]
    lr = torch.tensor(RATES[0], device=device)
    optimizer = KrizhevskySGD(parameters, lr, MOMENTUM, DECAY)
    start = [optimizer.master_of(parameter).clone() for parameter in parameters]

    def step() -> Tensor:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        with use_backend("triton"):
            optimizer.step()
        return lr

    replay = captured(step, device)
    ends = []
    for run in (replay, step):
        for parameter, values in zip(parameters, start, strict=True):
            optimizer.set_master(parameter, values)
            optimizer.state[parameter]["velocity"].zero_()
        for rate in RATES:
            lr.fill_(rate)
            run()
        ends.append([optimizer.master_of(parameter).clone() for parameter in parameters])
    measures = [
        Measure(f"{one.numel():,} elements", differing(one, other), 0.0) for one, other in zip(*ends, strict=True)
    ]
    still = sum(not differing(one, first) for one, first in zip(ends[0], start, strict=True))
    return [*measures, Measure("parameters left as they were", float(still), 0.0)]
