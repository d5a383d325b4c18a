"""The container that executes runs of its children as ops, and the plan that it keeps of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from alexnet_triton.fusion.plan import Step, steps, why_alone, why_touched


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` that executes runs of its children as fused ops.

    Same children, same names, same state dict, same numbers, same errors where a child is called itself.
    Slices are again `FusedSequential`s. A run's layers are called themselves, one by one, wherever somebody
    could tell the difference: under hooks (global ones too), parametrizations, symbolic tracing and
    `torch.jit`. See `alexnet_triton.fusion` for the runs.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the children to `input` in order, runs of them as fused ops."""
        if torch.jit.is_scripting():
            for module in self:
                input = module(input)
            return input
        else:
            return self._run_plan(input)

    @torch.jit.unused
    def _run_plan(self, input: Tensor) -> Tensor:
        if why_layer_by_layer(input) is not None:
            for module in self:
                input = module(input)
            return input
        for step in plan(self):
            input = step(input)
        return input


def why_layer_by_layer(x: object) -> str | None:
    """Why ops cannot stand in for layers on this input, in a phrase; a trace, a script or a global hook sees layers."""
    if not isinstance(x, Tensor):
        return "no tensor"
    if not x.is_floating_point():
        return f"{str(x.dtype).removeprefix('torch.')}: ops take floating-point tensors"
    if x.layout != torch.strided:
        return f"{str(x.layout).removeprefix('torch.')}: ops take strided tensors"
    if torch.jit.is_tracing():
        return "traced"
    return "a global module hook is registered" if module_hooks._has_any_global_hook() else None


# --- the plan ---

Key = tuple[tuple[nn.Module, type, str | None], ...]

# Plans live beside the modules, not in them: nothing to pickle, to copy, or to take out again.
_plans: WeakKeyDictionary[nn.Module, tuple[Key, tuple[Step, ...]]] = WeakKeyDictionary()


def plan(sequential: nn.Sequential) -> tuple[Step, ...]:
    """The steps of `sequential`: made once, and again when a child, its type or its hooks have changed.

    Values (weights, strides, p, training or evaluation) are read from the layers at each call, and are no
    part of a plan.
    """
    found = tuple(leaves(sequential))
    if torch.compiler.is_compiling():
        return steps(found)
    key = tuple((leaf, type(leaf), why_alone(leaf)) for leaf in found)
    kept = _plans.get(sequential)
    if kept is None or kept[0] != key:
        kept = _plans[sequential] = (key, steps(found))
    return kept[1]


def leaves(sequential: nn.Module) -> Iterator[nn.Module]:
    """The layers that `sequential` is read as: its children, those of plain `nn.Sequential`s in it in their place."""
    children: Any = sequential._modules.values()  # None may be one: it is no layer, and fails where torch's would
    for child in children:
        if is_read_through(child):
            yield from leaves(child)
        else:
            yield child


def is_read_through(child: nn.Module) -> bool:
    """Whether the children of `child` are read in its place."""
    return type(child) in (nn.Sequential, FusedSequential) and why_touched(child) is None


def forget(sequential: nn.Module) -> None:
    """Drop what is kept of `sequential`."""
    _plans.pop(sequential, None)
