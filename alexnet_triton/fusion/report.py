"""What `fuse` makes of a model, run by run, and why it leaves a layer alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from alexnet_triton.backend import current_backend, why_reference
from alexnet_triton.fusion.plan import OTHER_TYPE, read, why_alone
from alexnet_triton.fusion.runs import OPS
from alexnet_triton.fusion.sequential import FusedSequential, is_read_through, why_layer_by_layer

BEGINNINGS = ("Conv2d", "Linear", "MaxPool2d", "LocalResponseNorm", "Dropout")
"""Layers that a run can begin with."""

FOLLOWING = {"LocalResponseNorm": "MaxPool2d", "Dropout": "Linear"}
"""What must stand behind those that begin one only then."""

NOT_YET = "not fused yet"


@dataclass(frozen=True)
class FusionRow:
    """A run of layers, or a layer that could have begun one and is left alone."""

    container: str
    """Name in the model of the module that calls the layers; `""` is the model itself."""
    layers: tuple[str, ...]
    """Their names in the model, as in `features.0`."""
    what: tuple[str, ...]
    """Their types, as in `Conv2d`."""
    op: str | None
    """The op that executes them, or would once they are fused; None where they are called themselves."""
    fused: bool
    """Whether the op executes them now."""
    reason: str
    """Why it does not, or why a ReLU that it could have taken is left out; `""` where nothing is to be said."""


@dataclass(frozen=True, repr=False)
class FusionReport:
    """What `fuse.report` gives: printed, an aligned table whose last line counts."""

    rows: tuple[FusionRow, ...]
    """In the order of the model's modules."""
    backend: str
    """What the ops run as, for parameters as they are now."""

    def __str__(self) -> str:
        return "\n".join([*self._table(), self._count()])

    __repr__ = __str__

    def _table(self) -> list[str]:
        if not self.rows:
            return []
        header = ("container", "layers", "what", "op", "reason")
        lines = [header, *_lines(self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        cells = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
        table = ["  ".join(line).rstrip() for line in cells]
        rule = "-" * max(map(len, table))
        ops = [f"The ops run as {self.backend}."] if any(row.op for row in self.rows) else []
        return [table[0], rule, *table[1:], rule, *ops]

    def _count(self) -> str:
        now, later = ([row for row in self.rows if row.op and row.fused == fused] for fused in (True, False))
        said = [f"{_runs(now)} executed as ops"] if now or not later else []
        said += [f"{_runs(later)} to be once fused"] if later else []
        return f"{', '.join(said)}; {_plural(sum(row.op is None for row in self.rows), 'layer')} left alone"


def report(model: nn.Module) -> FusionReport:
    """Say what is fused in `model`, or would be, and why other layers are left alone; nothing is changed.

    It says what happens to a batch of feature maps in the parameters' dtype. A container is taken to be called: where a
    model's own code goes through the children of an `nn.Sequential` one by one, no run is executed, and nothing here
    can see it.

    Args:
        model: any module, fused or not.

    Returns:
        A row for each run and for each layer that could have begun one; `print` shows a table.

    Raises:
        TypeError: `model` is no `torch.nn.Module`.

    Examples:
        >>> print(fuse.report(torchvision.models.alexnet()))
    """
    check_module("fuse.report", model)
    reader = _Reader()
    rows = list(reader.rows(model, "", None))
    return FusionReport(
        tuple(row for row, layer in rows if layer is None or id(layer) not in reader.inside), reader.backend()
    )


def check_module(name: str, module: object) -> None:
    """Refuse, in the name of a function, what is no module."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} takes a torch.nn.Module, got {type(module).__name__}")


# --- reading a model ----------------------------------------------------------------------------------------

Found = tuple[FusionRow, nn.Module | None]  # the layer where it stands in no nn.Sequential


@dataclass
class _Reader:
    """Goes through a model once, every module under the first of its names."""

    seen: set[int] = field(default_factory=set)
    inside: set[int] = field(default_factory=set)
    """Layers that an `nn.Sequential` reads: their other names are no news."""
    weights: list[Tensor] = field(default_factory=list)
    """Of the runs."""

    def rows(self, module: nn.Module, name: str, owner: nn.Module | None) -> Iterator[Found]:
        """The rows of `module`, which the `forward` of `owner` calls."""
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        if isinstance(module, torch.jit.ScriptModule):
            yield _alone(name, module.original_name, "scripted: TorchScript runs it"), None
        elif type(module) in (nn.Sequential, FusedSequential):
            yield from self._rows_of_sequential(module, name)
        elif _kind(module) in BEGINNINGS:
            yield _alone(name, _type_name(module), _why_outside(owner)), module
        else:
            has_forward = type(module).forward is not nn.Module.forward  # a ModuleList has none
            for child_name, child in module._modules.items():
                if child is not None:
                    yield from self.rows(child, _join(name, child_name), module if has_forward else owner)

    def _rows_of_sequential(self, sequential: nn.Module, name: str) -> Iterator[Found]:
        named = list(_named_leaves(sequential, name))
        names, leaves = [leaf_name for leaf_name, _ in named], tuple(leaf for _, leaf in named)
        self.inside.update(map(id, leaves))
        at = 0
        for run, layers in read(leaves):
            here, behind = tuple(names[at : at + len(layers)]), leaves[at + len(layers) :]
            what = tuple(map(_type_name, layers))
            if type(run) in OPS:
                op, fused, reason = self._verdict(sequential, run, behind)
                yield FusionRow(name, here, what, op, fused, reason), None
            elif _kind(run) in BEGINNINGS:
                yield FusionRow(name, here, what, None, False, _why_alone(run, behind)), None
            else:
                yield from self.rows(layers[0], here[0], sequential)
            at += len(layers)

    def _verdict(self, sequential: nn.Module, run: Any, behind: tuple[nn.Module, ...]) -> tuple[str | None, bool, str]:
        """The op of a run in `sequential`, whether it executes it, and the reason."""
        weight = next((layer.weight for layer in run if hasattr(layer, "weight")), None)
        why = why_layer_by_layer(torch.empty(0) if weight is None else weight)
        if why is None and "forward" in sequential.__dict__:
            why = "the forward of its nn.Sequential is replaced"
        if why is not None:
            return None, False, why
        if weight is not None:
            self.weights.append(weight)
        fused = type(sequential) is FusedSequential
        return OPS[type(run)], fused, _why_no_relu(run, behind) if fused else NOT_YET

    def backend(self) -> str:
        """What the ops run as, for the weights that were found."""
        answers = dict.fromkeys(map(why_reference, self.weights or [torch.empty(0)]))
        plain = "an error" if current_backend() == "triton" else "plain PyTorch"
        return "; ".join("Triton kernels" if why is None else f"{plain}: {why}" for why in answers)


def _alone(name: str, what: str, reason: str) -> FusionRow:
    return FusionRow(name.rpartition(".")[0], (name,), (what,), None, False, reason)


def _named_leaves(sequential: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """What `leaves` gives, each with its name in the model."""
    for child_name, child in sequential._modules.items():
        if child is None:
            continue
        if is_read_through(child):
            yield from _named_leaves(child, _join(name, child_name))
        else:
            yield _join(name, child_name), child


# --- reasons ------------------------------------------------------------------------------------------------


def _why_alone(layer: Any, behind: tuple[nn.Module, ...]) -> str:
    """Why a layer in a sequential is called itself."""
    why = _why_not(layer)
    if why is not None:
        return why
    wanted = FOLLOWING[_kind(layer)]
    if behind and _kind(behind[0]) == wanted:
        return f"the {wanted} behind it is left alone"
    return f"no {wanted} behind it"


def _why_not(layer: nn.Module) -> str | None:
    """`why_alone`, with what tells a reader more."""
    why = why_alone(layer)
    if why == OTHER_TYPE:
        return _about_type(layer)
    hooks = {"has a forward hook": layer._forward_hooks, "has a forward pre-hook": layer._forward_pre_hooks}
    if why in hooks:
        return f"{why}: {', '.join(_hook_name(hook) for hook in hooks[why].values())}"
    return why


def _about_type(layer: nn.Module) -> str:
    kind = _kind(layer)
    if parametrize.is_parametrized(layer):
        parametrizations: Any = layer.parametrizations
        return f"parametrized: {', '.join(parametrizations)}"
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return f"a {kind} only from its first batch on"
    if isinstance(layer, getattr(nn, kind)):
        return f"{type(layer).__name__}, a subclass of {kind}"
    return f"{type(layer).__module__.partition('.modules.')[0]}.{type(layer).__name__}, not torch.nn.{kind}"


def _why_no_relu(run: Any, behind: tuple[nn.Module, ...]) -> str:
    """Why the ReLU that comes after a run, if one does, is not in it."""
    if getattr(run, "relu", True) or not behind:
        return ""
    if _kind(behind[0]) == "ReLU":
        return f"without its ReLU: {_why_not(behind[0])}"
    after, alone = behind[1:2], type(read(behind[:3])[0][0]) not in OPS
    return (
        f"without a ReLU: {_type_name(behind[0])} comes first" if alone and after and _kind(after[0]) == "ReLU" else ""
    )


def _why_outside(owner: nn.Module | None) -> str:
    if owner is None:
        return "in no nn.Sequential"
    if isinstance(owner, nn.Sequential):
        return f"in {type(owner).__name__}, a subclass of nn.Sequential"
    return f"in {type(owner).__name__}, not in an nn.Sequential"


def _kind(layer: Any) -> str:
    """The layer that `layer` is, derives from, or is called after, as quantised ones are; `""` where there is none."""
    names = (*BEGINNINGS, "ReLU")
    return next((base.__name__ for base in type(layer).__mro__ if base.__name__ in names), "")


def _type_name(layer: nn.Module) -> str:
    """The name of a layer's type; a parametrization changes it for the layer's sake alone."""
    return parametrize.type_before_parametrizations(layer).__name__


def _hook_name(hook: Any) -> str:
    return getattr(hook, "__name__", type(hook).__name__)


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


# --- the table ----------------------------------------------------------------------------------------------

MOST_NAMES = 4
"""Names of layers in a line."""


def _lines(rows: tuple[FusionRow, ...]) -> list[tuple[str, ...]]:
    """A line for each run; layers left alone for one reason share one, in a container and in those that are alike."""
    groups: dict[Any, list[FusionRow]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(number if row.op else (row.container, row.reason), []).append(row)
    alike: dict[Any, tuple[list[str], tuple[str, ...]]] = {}
    for number, group in enumerate(groups.values()):
        text = _text(group)
        alike.setdefault(number if group[0].op else text, ([], text))[0].append(group[0].container or "(model)")
    lines, before = [], ""
    for containers, text in alike.values():
        name = f"{containers[0]} and {len(containers) - 1} more" if len(containers) > 1 else containers[0]
        lines.append(("" if name == before else name, *text))
        before = name
    return lines


def _text(group: list[FusionRow]) -> tuple[str, ...]:
    """What a line says of rows of one container and reason."""
    first = group[0]
    names = [layer.removeprefix(f"{first.container}.") for row in group for layer in row.layers]
    if len(names) > MOST_NAMES:
        names[MOST_NAMES - 1 :] = [f"{len(names) - MOST_NAMES + 1} more"]
    counts = Counter(" + ".join(row.what) for row in group)
    what = ", ".join(name if count == 1 else f"{count} {name}" for name, count in counts.items())
    return ", ".join(names), what, first.op or "-", first.reason


def _runs(rows: list[FusionRow]) -> str:
    return f"{_plural(len(rows), 'run')} in {_plural(len({row.container for row in rows}), 'container')}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
