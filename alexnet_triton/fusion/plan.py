"""How layers are read: which fit, and which run begins where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from alexnet_triton.fusion.maps import MapRuns
from alexnet_triton.fusion.runs import ConvRun, LinearRun, PoolRun
from alexnet_triton.layers import GroupedLocalResponseNorm

Step = Any  # a run, or a layer: takes a tensor and gives one


def untouched(module: nn.Module) -> bool:
    """Whether calling `module` is calling its class's `forward`, and nothing else.

    A parametrization shows in the type, weight norm of the older kind as a hook.
    """
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
    )


def fits(module: nn.Module) -> bool:
    """Whether `module` is a layer of the table, exactly as the table's ops know it."""
    plain = _LAYERS.get(type(module))
    return plain is not None and plain(module) and untouched(module)


def _plain_conv(conv: Any) -> bool:
    return conv.padding_mode == "zeros" and conv.dilation in ((1, 1), 1)


def _plain_pool(pool: Any) -> bool:
    return pool.dilation in (1, (1, 1)) and not pool.return_indices


_LAYERS: dict[type, Callable[[Any], bool]] = {
    nn.Conv2d: _plain_conv,
    nn.ReLU: lambda relu: True,
    nn.LocalResponseNorm: lambda norm: True,
    GroupedLocalResponseNorm: lambda norm: True,
    nn.MaxPool2d: _plain_pool,
    nn.Dropout: lambda dropout: not dropout.inplace,  # in place, it changes a tensor that others hold
    nn.Linear: lambda linear: True,
}


def steps(leaves: tuple[nn.Module, ...]) -> tuple[Step, ...]:
    """Read `leaves` from left to right, the longest run first."""
    steps: list[Step] = []
    maps: list[ConvRun | PoolRun] = []
    layers: list[nn.Module] = []
    at = 0
    while at < len(leaves):
        run, length = _run_at(leaves, at)
        if isinstance(run, (ConvRun, PoolRun)):
            maps.append(run)
            layers.extend(leaves[at : at + length])
        else:
            if maps:
                steps.append(MapRuns(tuple(maps), tuple(layers)))
                maps, layers = [], []
            steps.append(run)
        at += length
    if maps:
        steps.append(MapRuns(tuple(maps), tuple(layers)))
    return tuple(steps)


def _run_at(leaves: tuple[nn.Module, ...], at: int) -> tuple[Any, int]:
    """The run that begins with child `at`, and its number of children."""
    first, second, third = (_layer(leaves, at + i) for i in range(3))
    if isinstance(first, nn.Conv2d):
        relu = isinstance(second, nn.ReLU)
        return ConvRun(first, relu), 1 + relu
    if isinstance(first, nn.MaxPool2d):
        return PoolRun(None, first), 1
    if isinstance(first, nn.LocalResponseNorm) and isinstance(second, nn.MaxPool2d):
        return PoolRun(first, second), 2
    if isinstance(first, nn.Linear):
        relu = isinstance(second, nn.ReLU)
        return LinearRun(None, first, relu), 1 + relu
    if isinstance(first, nn.Dropout) and isinstance(second, nn.Linear):
        relu = isinstance(third, nn.ReLU)
        return LinearRun(first, second, relu), 2 + relu
    return leaves[at], 1


def _layer(leaves: tuple[nn.Module, ...], at: int) -> nn.Module | None:
    """Child `at` where it may join a run, else None."""
    return leaves[at] if at < len(leaves) and fits(leaves[at]) else None
