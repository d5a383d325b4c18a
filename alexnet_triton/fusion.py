"""Runs of ordinary layers execute as fused ops, while the layers stay what they were.

| run of children                                       | op               |
|-------------------------------------------------------|------------------|
| Conv2d [+ ReLU]                                       | `conv2d_relu`    |
| [LocalResponseNorm +] MaxPool2d                       | `lrn_max_pool`   |
| [Dropout +] Linear [+ ReLU]                           | `dropout_linear` |
| anything else                                         | the child itself |

A `FusedSequential` reads its children as a sentence (nested `nn.Sequential`s included) and makes a plan of
such runs. A child joins a run only while it is exactly the layer that the table names: one with a hook, a
parametrization, a `forward` of its own, a subclass or an option that the op does not have is called itself,
so that everything that people do to layers goes on working.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from alexnet_triton import ops
from alexnet_triton.backend import takes_triton
from alexnet_triton.layers import GroupedLocalResponseNorm
from alexnet_triton.stages import ConvStage, PoolStage

Module = TypeVar("Module", bound=nn.Module)


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` that executes runs of its children as fused ops.

    Same children, same names, same state dict, same numbers, same errors where a child is called itself.
    Slices are again `FusedSequential`s. A run's layers are called themselves, one by one, wherever somebody
    could tell the difference: under hooks (global ones too), parametrizations, symbolic tracing and
    `torch.jit`. See the module's docstring for the runs.
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
        if not _can_fuse(input):
            for module in self:
                input = module(input)
            return input
        for step in _plan(self):
            input = step(input)
        return input


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
            _plans.pop(child, None)
    return module


def _holds_a_run(sequential: nn.Sequential) -> bool:
    return any(isinstance(step, (_MapRuns, _LinearRun)) for step in _steps(tuple(leaves(sequential))))


def _check_module(name: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} takes a torch.nn.Module, got {type(module).__name__}")


def _can_fuse(x: object) -> bool:
    """Whether ops may stand in for layers on this input; a trace, a script or a global hook sees layers."""
    return (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and x.layout == torch.strided
        and not torch.jit.is_tracing()
        and not module_hooks._has_any_global_hook()
    )


# --- the plan -----------------------------------------------------------------------------------------------


class _ConvRun(NamedTuple):
    conv: nn.Conv2d
    relu: bool

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x, self.relu)

    def run(self, x: Tensor, relu: bool) -> Tensor:
        c: Any = self.conv  # torch declares its pairs as tuple[int, ...]
        return ops.conv2d_relu(x, c.weight, c.bias, c.stride, c.padding, c.groups, relu)

    def link(self) -> ops.Run | None:
        """What a chain is told of this run; None where it cannot stand in one (uneven padding)."""
        c: Any = self.conv
        padding, more = c.padding, (0, 0)
        if isinstance(padding, str):
            padding, more = ops.named_padding(c.weight, c.stride, padding)
        if more != (0, 0):
            return None
        return ConvStage(c.stride, padding, c.groups, self.relu, c.bias is not None), c.weight, c.bias


class _PoolRun(NamedTuple):
    norm: nn.LocalResponseNorm | None
    pool: nn.MaxPool2d

    def __call__(self, x: Tensor) -> Tensor:
        n, p = self.norm, self.pool
        window = (p.kernel_size, p.stride, p.padding, p.ceil_mode)
        if n is None:
            return ops.lrn_max_pool(x, 0, 0.0, 0.0, 0.0, *window)
        return ops.lrn_max_pool(x, n.size, n.alpha, n.beta, n.k, *window, getattr(n, "groups", 1))

    def link(self) -> ops.Run:
        """What a chain is told of this run."""
        n, p = self.norm, self.pool
        norm = (0, 0.0, 0.0, 0.0) if n is None else (n.size, n.alpha, n.beta, n.k)
        window = (ops.pair(p.kernel_size), ops.pair(p.stride), ops.pair(p.padding), p.ceil_mode)
        return PoolStage(*norm, *window, getattr(n, "groups", 1)), None, None


class _LinearRun(NamedTuple):
    dropout: nn.Dropout | None
    linear: nn.Linear
    relu: bool

    def __call__(self, x: Tensor) -> Tensor:
        d, layer = self.dropout, self.linear
        p, training = (0.0, False) if d is None else (d.p, d.training)
        return ops.dropout_linear(x, layer.weight, layer.bias, p, self.relu, training)


class _MapRuns(NamedTuple):
    """Convolution and pooling runs that follow one another, and the layers they stand for."""

    runs: tuple[_ConvRun | _PoolRun, ...]
    layers: tuple[nn.Module, ...]

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() != 4:  # the layers take a single image (C, H, W) too, and know best what else is wrong
            for layer in self.layers:
                x = layer(x)
            return x
        if takes_triton("conv2d_relu", x):
            return _run_on_triton(self.runs, x)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _run_on_cpu(self.runs, x)
        for run in self.runs:
            x = run(x)
        return x


Step = Any  # a run, or a layer: takes a tensor and gives one
Key = tuple[tuple[nn.Module, type, bool], ...]

# Plans live beside the modules, not in them: nothing to pickle, to copy, or to take out again.
_plans: WeakKeyDictionary[nn.Module, tuple[Key, tuple[Step, ...]]] = WeakKeyDictionary()


def _plan(sequential: nn.Sequential) -> tuple[Step, ...]:
    """The steps of `sequential`: made once, and again when a child, its type or its hooks have changed.

    Values (weights, strides, p, training or evaluation) are read from the layers at each call, and are no
    part of a plan.
    """
    found = tuple(leaves(sequential))
    if torch.compiler.is_compiling():
        return _steps(found)
    key = tuple((leaf, type(leaf), fits(leaf)) for leaf in found)
    kept = _plans.get(sequential)
    if kept is None or kept[0] != key:
        kept = _plans[sequential] = (key, _steps(found))
    return kept[1]


def leaves(sequential: nn.Module) -> Iterator[nn.Module]:
    """The layers that `sequential` is read as: its children, those of plain `nn.Sequential`s in it in their place."""
    for child in sequential._modules.values():
        assert child is not None
        if type(child) in (nn.Sequential, FusedSequential) and _untouched(child):
            yield from leaves(child)
        else:
            yield child


def _untouched(module: nn.Module) -> bool:
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
    return plain is not None and plain(module) and _untouched(module)


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


def _steps(leaves: tuple[nn.Module, ...]) -> tuple[Step, ...]:
    """Read `leaves` from left to right, the longest run first."""
    steps: list[Step] = []
    maps: list[_ConvRun | _PoolRun] = []
    layers: list[nn.Module] = []
    at = 0
    while at < len(leaves):
        run, length = _run_at(leaves, at)
        if isinstance(run, (_ConvRun, _PoolRun)):
            maps.append(run)
            layers.extend(leaves[at : at + length])
        else:
            if maps:
                steps.append(_MapRuns(tuple(maps), tuple(layers)))
                maps, layers = [], []
            steps.append(run)
        at += length
    if maps:
        steps.append(_MapRuns(tuple(maps), tuple(layers)))
    return tuple(steps)


def _run_at(leaves: tuple[nn.Module, ...], at: int) -> tuple[Any, int]:
    """The run that begins with child `at`, and its number of children."""
    first, second, third = (_layer(leaves, at + i) for i in range(3))
    if isinstance(first, nn.Conv2d):
        relu = isinstance(second, nn.ReLU)
        return _ConvRun(first, relu), 1 + relu
    if isinstance(first, nn.MaxPool2d):
        return _PoolRun(None, first), 1
    if isinstance(first, nn.LocalResponseNorm) and isinstance(second, nn.MaxPool2d):
        return _PoolRun(first, second), 2
    if isinstance(first, nn.Linear):
        relu = isinstance(second, nn.ReLU)
        return _LinearRun(None, first, relu), 1 + relu
    if isinstance(first, nn.Dropout) and isinstance(second, nn.Linear):
        relu = isinstance(third, nn.ReLU)
        return _LinearRun(first, second, relu), 2 + relu
    return leaves[at], 1


def _layer(leaves: tuple[nn.Module, ...], at: int) -> nn.Module | None:
    """Child `at` where it may join a run, else None."""
    return leaves[at] if at < len(leaves) and fits(leaves[at]) else None


# --- feature maps on Triton ---------------------------------------------------------------------------------


def _run_on_triton(runs: tuple[_ConvRun | _PoolRun, ...], x: Tensor) -> Tensor:
    """Run map runs in as few chains as can be: one, but for a convolution whose padding is uneven."""
    links: list[ops.Run] = []
    for run in runs:
        link = run.link()
        if link is not None:
            links.append(link)
            continue
        x = run(ops.map_chain(x, links) if links else x)
        links = []
    return ops.map_chain(x, links) if links else x


# --- feature maps on a CPU ----------------------------------------------------------------------------------

CHANNELS_LAST_PIXELS = 1_400
"""Output pixels (N*P*Q) from which a convolution is given channels-last maps; half of it where its map is pooled next.

Measured on two cores of a Xeon (AVX-512) with torch 2.14, float32: torch's convolutions are 10 to 60 % slower in this
layout below 700 pixels, equal at 1,400 to 3,000, and 5 to 35 % faster above, gradients included; its max pool is
seven to ten times as fast.
"""


def _run_on_cpu(runs: tuple[_ConvRun | _PoolRun, ...], x: Tensor) -> Tensor:
    """Run map runs in the layouts that are faster on a CPU; the answer has the layout that torch would give."""
    layouts_are_free = (
        x.dtype != torch.float64  # torch's own convolution, for which the layouts are equals
        and torch._C._functorch.peek_interpreter_stack() is None  # vmap has its own
        and any(isinstance(run, _ConvRun) for run in runs)
    )
    if not layouts_are_free:
        for run in runs:
            x = run(x)
        return x
    last = any(ops.is_channels_last(t) for t in (x, *(run.conv.weight for run in runs if isinstance(run, _ConvRun))))
    back_to_contiguous = not last  # where the caller has chosen channels-last, torch keeps to it and so do we
    late_relu = False
    for run, following in zip(runs, (*runs[1:], None), strict=True):
        pooled_next = isinstance(following, _PoolRun)
        if isinstance(run, _ConvRun):
            if back_to_contiguous:
                last = _output_pixels(run.conv, x) >= CHANNELS_LAST_PIXELS // (2 if pooled_next else 1)
                x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            # max(relu(x)) is relu(max(x)), and so are its gradients: ReLU on the pooled map is a quarter of the
            # work. (In the contiguous layout torch's pool branches on every element, and is slower on maps of
            # both signs: 2.5 % of a whole forward at batch 1.)
            late_relu = last and run.relu and isinstance(following, _PoolRun) and following.norm is None
            x = run.run(x, run.relu and not late_relu)
        else:
            x = run(x)
            if late_relu:
                x = torch.relu_(x)
                late_relu = False
    return x.contiguous() if back_to_contiguous else x


def _output_pixels(conv: nn.Conv2d, x: Tensor) -> int:
    pixels = x.shape[0]
    padding = conv.padding if isinstance(conv.padding, tuple) else (0, 0)
    for size, window, stride, pad in zip(x.shape[2:], conv.kernel_size, conv.stride, padding, strict=True):
        pixels *= (size + 2 * pad - window) // stride + 1
    return pixels
