"""`fuse` and `unfuse`: a swap of classes, in place."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from alexnet_triton.fusion.maps import MapRuns
from alexnet_triton.fusion.plan import steps
from alexnet_triton.fusion.runs import LinearRun
from alexnet_triton.fusion.sequential import FusedSequential, forget, leaves

Module = TypeVar("Module", bound=nn.Module)


def fuse(module: Module) -> Module:
    """Let every plain `nn.Sequential` in `module` execute runs of its layers as fused ops.

    Nothing is copied or replaced: the class of each `nn.Sequential` that holds a run becomes
    `FusedSequential`, in place, so parameters, names, hooks and references stay what they are.
    `unfuse` takes it back.

    Args:
        module: any module (torchvision's AlexNet or VGG, an LPIPS net, a single `nn.Sequential`).

    Returns:
        `module` itself.

    Raises:
        TypeError: `module` is no `torch.nn.Module`.
    """
    _check_module("fuse", module)
    for child in module.modules():
        if type(child) is nn.Sequential and _holds_a_run(child):
            child.__class__ = FusedSequential
    return module


def unfuse(module: Module) -> Module:
    """Turn every `FusedSequential` in `module` back into a plain `nn.Sequential`, in place.

    Args:
        module: any module.

    Returns:
        `module` itself.

    Raises:
        TypeError: `module` is no `torch.nn.Module`.
    """
    _check_module("unfuse", module)
    for child in module.modules():
        if type(child) is FusedSequential:
            child.__class__ = nn.Sequential  # type: ignore[assignment]
            forget(child)
    return module


def _holds_a_run(sequential: nn.Sequential) -> bool:
    return any(isinstance(step, (MapRuns, LinearRun)) for step in steps(tuple(leaves(sequential))))


def _check_module(name: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} takes a torch.nn.Module, got {type(module).__name__}")
