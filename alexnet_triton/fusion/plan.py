"""How layers are read: which fit, and which run begins where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from alexnet_triton.fusion.maps import MapRuns
from alexnet_triton.fusion.runs import ConvRun, LinearRun, PoolRun, Run
from alexnet_triton.layers import GroupedLocalResponseNorm, LocalResponseNorm

Step = Any  # a run, or a layer: takes a tensor and gives one


def why_touched(module: nn.Module) -> str | None:
    """Why calling `module` does more than its class's `forward`, in a phrase; None where it does not.

    A parametrization shows in the type, weight norm of the older kind as a hook.
    """
    if "forward" in module.__dict__:
        return "its forward is replaced"
    if module._forward_pre_hooks:
        return "has a forward pre-hook"
    if module._forward_hooks:
        return "has a forward hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has a backward hook"
    return None if module._compiled_call_impl is None else "compiled by itself"


def why_alone(module: nn.Module) -> str | None:
    """Why `module` joins no run, in a phrase; None where it is a layer of the table, exactly as its ops know it."""
    why_not = _LAYERS.get(type(module))
    return OTHER_TYPE if why_not is None else why_not(module) or why_touched(module)


def fits(module: nn.Module) -> bool:
    """Whether `module` is a layer of the table, exactly as the table's ops know it."""
    return why_alone(module) is None


OTHER_TYPE = "of another type"


def _why_not_conv(conv: Any) -> str | None:
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}"
    return _why_not_dilated(conv) or _why_not_weighted(conv)


def _why_not_pool(pool: Any) -> str | None:
    return "return_indices=True" if pool.return_indices else _why_not_dilated(pool)


def _why_not_dilated(layer: Any) -> str | None:
    return None if layer.dilation in ((1, 1), 1) else f"dilation={layer.dilation}"


def _why_not_weighted(layer: nn.Module) -> str | None:
    """A tensor that wraps others (quantised, sharded) has its own way of being multiplied, and no memory to read."""
    weight = layer._parameters.get("weight")
    if type(weight) is nn.Parameter or not is_traceable_wrapper_subclass(weight):
        return None
    return f"its weight is a {type(weight).__name__}"


def _why_not_dropout(dropout: Any) -> str | None:
    return "inplace=True" if dropout.inplace else None  # in place, it changes a tensor that others hold


_LAYERS: dict[type, Callable[[Any], str | None]] = {
    nn.Conv2d: _why_not_conv,
    nn.ReLU: lambda relu: None,
    nn.LocalResponseNorm: lambda norm: None,
    LocalResponseNorm: lambda norm: None,
    GroupedLocalResponseNorm: lambda norm: None,
    nn.MaxPool2d: _why_not_pool,
    nn.Dropout: _why_not_dropout,
    nn.Linear: _why_not_weighted,
}


def steps(leaves: tuple[nn.Module, ...]) -> tuple[Step, ...]:
    """What is executed in the place of `leaves`, in order: runs on maps that follow one another are one step."""
    steps: list[Step] = []
    maps: list[ConvRun | PoolRun] = []
    layers: list[nn.Module] = []
    for run, its_layers in read(leaves):
        if isinstance(run, (ConvRun, PoolRun)):
            maps.append(run)
            layers.extend(its_layers)
            continue
        if maps:
            steps.append(MapRuns(tuple(maps), tuple(layers)))
            maps, layers = [], []
        steps.append(run)
    if maps:
        steps.append(MapRuns(tuple(maps), tuple(layers)))
    return tuple(steps)


def read(leaves: tuple[nn.Module, ...]) -> list[tuple[Run | nn.Module, tuple[nn.Module, ...]]]:
    """Read `leaves` from left to right, the longest run first: each run, or layer alone, and the layers it is."""
    found: list[tuple[Run | nn.Module, tuple[nn.Module, ...]]] = []
    at = 0
    while at < len(leaves):
        run, length = _run_at(leaves, at)
        found.append((run, leaves[at : at + length]))
        at += length
    return found


def _run_at(leaves: tuple[nn.Module, ...], at: int) -> tuple[Run | nn.Module, int]:
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
