"""`fuse` and `unfuse`: a swap of classes, in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

from torch import nn

from alexnet_triton.fusion.plan import read
from alexnet_triton.fusion.report import FusionReport, check_module, report
from alexnet_triton.fusion.runs import OPS
from alexnet_triton.fusion.sequential import FusedSequential, forget, leaves

Module = TypeVar("Module", bound=nn.Module)


class _Fuse(Protocol):
    """The type of `fuse`: a function of modules, with another one beside it."""

    def __call__(self, module: Module) -> Module: ...

    @staticmethod
    def report(model: nn.Module) -> FusionReport: ...


def _with_report(function: Callable[[Module], Module]) -> _Fuse:
    """Set `report` on `fuse`, which stays the function that it is, for `help`, `inspect` and `pickle`."""
    fuse = cast(_Fuse, function)
    fuse.report = report  # type: ignore[method-assign]
    return fuse


@_with_report
def fuse(module: Module) -> Module:
    """Let every plain `nn.Sequential` in `module` execute runs of its layers as fused ops.

    Nothing is copied or replaced: the class of each `nn.Sequential` that holds a run becomes
    `FusedSequential`, in place, so parameters, names, hooks and references stay what they are.
    `unfuse` takes it back. What is left alone: layers in no `nn.Sequential`, subclasses of `nn.Sequential`, scripted
    modules. `print(fuse.report(module))` shows each run and its op, and why other layers have none.

    Args:
        module: any module (torchvision's AlexNet or VGG, an LPIPS net, a single `nn.Sequential`).

    Returns:
        `module` itself.

    Raises:
        TypeError: `module` is no `torch.nn.Module`.
    """
    check_module("fuse", module)
    for child in module.modules():
        if type(child) is nn.Sequential and _holds_a_run(child):
            child.__class__ = FusedSequential
    return module


def unfuse(module: Module) -> Module:
    """Turn every `FusedSequential` in `module` back into a plain `nn.Sequential`, in place.

    What `fuse` has been given is again what it was, to the bytes of its pickle. An `AlexNet` of this package, which is
    built of `FusedSequential`s, becomes a network of plain containers, and `fuse` makes it what it was. Slices taken
    before are containers of their own, and stay fused.

    Args:
        module: any module.

    Returns:
        `module` itself.

    Raises:
        TypeError: `module` is no `torch.nn.Module`.
    """
    check_module("unfuse", module)
    for child in module.modules():
        if type(child) is FusedSequential:
            child.__class__ = nn.Sequential  # type: ignore[assignment]
            forget(child)
    return module


def _holds_a_run(sequential: nn.Sequential) -> bool:
    return any(type(run) in OPS for run, _ in read(tuple(leaves(sequential))))
