"""The Triton implementation as operators of `torch.library`: schemas, fakes, autograd, autocast, device guards.

Registered this way, torch.compile, torch.export, fake tensors, functionalisation and CUDA graphs see two operators and
their gradients, without looking into them. They are registered on the dispatcher itself rather than by
`torch.library.custom_op`, whose bookkeeping costs an eager call more than the operator's own; and where nobody
watches (no compiler, no dispatch mode, no autocast) an eager call does not pass the dispatcher at all.

Gradients come from the kernels. Those that are to be differentiated again, or are taken in batches, are plain PyTorch's
(`alexnet_triton.recompute`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from alexnet_triton import recompute, reference
from alexnet_triton import stages as stages_of
from alexnet_triton.folded import OPERATORS as FOLDED_OPERATORS
from alexnet_triton.folded import Folded
from alexnet_triton.stages import ConvStage, Size, Stage

_library = torch.library.Library("alexnet_triton", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_DEVICES = ("CPU", "CUDA", "XPU")

_library.define(
    "map_chain(Tensor x, Tensor[] parameters, int[] stages, float[] norms, bool save, bool channels_last)"
    " -> (Tensor, Tensor[])",
    tags=_TAGS,
)
_library.define(
    "map_chain_backward(Tensor grad, Tensor x, Tensor? out, Tensor[] saved, Tensor[] parameters, int[] stages,"
    " float[] norms, bool[] needs, bool channels_last) -> Tensor[]",
    tags=_TAGS,
)
_library.define(
    "dropout_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? seed, float p, bool relu) -> Tensor", tags=_TAGS
)
_library.define(
    "dropout_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? y, Tensor? seed,"
    " float p, bool relu, bool[] needs) -> Tensor[]",
    tags=_TAGS,
)

_map_chain: Callable[..., tuple[Tensor, list[Tensor]]] = torch.ops.alexnet_triton.map_chain.default
_map_chain_backward: Callable[..., list[Tensor]] = torch.ops.alexnet_triton.map_chain_backward.default
_dropout_linear: Callable[..., Tensor] = torch.ops.alexnet_triton.dropout_linear.default
_dropout_linear_backward: Callable[..., list[Tensor]] = torch.ops.alexnet_triton.dropout_linear_backward.default


def map_chain(x: Tensor, parameters: Sequence[Tensor], stages: Sequence[Stage], channels_last: bool) -> Tensor:
    """Run convolutions and poolings that follow one another (see `alexnet_triton.chain`).

    Args:
        x: (N, C, H, W), float16, bfloat16 or float32.
        parameters: each convolution's filters and, where it has one, bias, in order.
        stages: the chain, whose shapes fit.
        channels_last: give a channels-last answer, and such a gradient of `x`.
    """
    if not _is_plain(x):
        return _map_chain(x, parameters, *stages_of.encode(stages), False, channels_last)[0]
    if _tracked(x, *parameters):
        out: Tensor = _MapChain.apply(x, tuple(stages), False, channels_last, *parameters)[0]
        return out
    return _run_stages(x, parameters, tuple(stages), False, channels_last)[0]


def dropout_linear(x: Tensor, weight: Tensor, bias: Tensor | None, p: float, relu: bool) -> Tensor:
    """Dropout with probability `p`, a linear layer, and ReLU where asked.

    The seed of the mask is drawn here, outside the operator, so that nothing random is inside it.

    Args:
        x: (..., features in).
        weight: (features out, features in).
        bias: (features out,), or None.
        p: probability of dropping an element; 0 for none.
        relu: apply ReLU.
    """
    from alexnet_triton.kernels import random

    seed = random.seed(x.device) if p else None
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y: Tensor
    if not _is_plain(x):
        y = _dropout_linear(rows, weight, bias, seed, p, relu)
    elif _tracked(x, weight, bias):
        y = _DropoutLinear.apply(rows, weight, bias, seed, p, relu)
    else:
        y = _run_dropout_linear(rows, weight, bias, seed, p, relu)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def dropout(x: Tensor, p: float) -> Tensor:
    """The dropout of `dropout_linear` alone, without gradients.

    Args:
        x: (rows, columns).
        p: probability of dropping an element.
    """
    from alexnet_triton.kernels import random

    return _dropped(x, random.seed(x.device), p)


def _dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    with on_device(x):
        dropped: Tensor = _linear().drop(x, seed, p, 16)
        return dropped[:, : x.shape[1]]


@functools.cache
def _chain() -> Any:
    """`alexnet_triton.chain`, with tuned configs. Triton is imported here and not before."""
    from alexnet_triton import chain, configs

    configs.install()
    return chain


@functools.cache
def _linear() -> Any:
    """`alexnet_triton.kernels.linear`, likewise."""
    from alexnet_triton import configs
    from alexnet_triton.kernels import linear

    configs.install()
    return linear


def _is_plain(x: Tensor) -> bool:
    """Whether nobody watches what runs: then calls go past the dispatcher, which costs more than all the rest."""
    return (
        type(x) in (Tensor, torch.nn.Parameter, Folded)
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch.is_autocast_enabled(x.device.type)
    )


# --- the operators ------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _stages(whole: tuple[int, ...], real: tuple[float, ...]) -> tuple[Stage, ...]:
    return stages_of.decode(whole, real)


def on_device(x: Tensor) -> Any:
    """A context in which kernels are launched on the device of `x`.

    Raises:
        RuntimeError: it is a CPU's, and this process's kernels are compiled ones.
    """
    if x.device.type == "cuda":
        return torch.cuda.device(x.device)
    if x.device.type == "xpu":
        return torch.xpu.device(x.device)
    from alexnet_triton.kernels import launch

    if not launch.INTERPRETED and x.device.type == "cpu":
        raise RuntimeError(
            f"the Triton kernels need a GPU tensor, got one on {x.device}: set TRITON_INTERPRET=1 in the environment "
            "before Python starts to run them on CPU tensors, or use_backend('reference')"
        )
    return nullcontext()


def _in_memory(*tensors: Any) -> list[Any]:
    """The tensors; a copy of each that torch negates lazily, as it is read, or whose zeros take up no memory."""
    return [t.clone() if t is not None and (t.is_neg() or t._is_zerotensor()) else t for t in tensors]


def _run_stages(
    x: Tensor, parameters: Sequence[Tensor], stages: tuple[Stage, ...], save: bool, channels_last: bool
) -> tuple[Tensor, list[Tensor]]:
    x, *parameters = _in_memory(x, *parameters)
    with on_device(x):
        chain = _chain()
        if x.shape[0] == 0:
            size, saved = chain.like(x, parameters, stages, save)
            return _in_format(x, size, channels_last), saved
        answer: tuple[Tensor, list[Tensor]] = chain.forward(x, parameters, stages, save, channels_last)
        return answer


def _run_map_chain(
    x: Tensor, parameters: list[Tensor], stages: list[int], norms: list[float], save: bool, channels_last: bool
) -> tuple[Tensor, list[Tensor]]:
    return _run_stages(x, parameters, _stages(tuple(stages), tuple(norms)), save, channels_last)


def _run_stages_backward(
    grad: Tensor, x: Tensor, out: Tensor | None, saved: Sequence[Tensor], parameters: Sequence[Tensor],
    stages: tuple[Stage, ...], needs: Sequence[bool], channels_last: bool,
) -> list[Tensor]:  # fmt: skip
    grad, x, *parameters = _in_memory(grad, x, *parameters)
    with on_device(x):
        chain = _chain()
        if x.shape[0] == 0:
            return [torch.zeros_like(t) for t, needed in zip((x, *parameters), needs, strict=True) if needed]
        gradients: list[Tensor] = chain.backward(grad, x, out, saved, parameters, stages, needs, channels_last)
        return gradients


def _run_map_chain_backward(
    grad: Tensor, x: Tensor, out: Tensor | None, saved: list[Tensor], parameters: list[Tensor], stages: list[int],
    norms: list[float], needs: list[bool], channels_last: bool,
) -> list[Tensor]:  # fmt: skip
    decoded = _stages(tuple(stages), tuple(norms))
    return _run_stages_backward(grad, x, out, saved, parameters, decoded, needs, channels_last)


def _run_dropout_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, p: float, relu: bool
) -> Tensor:
    x, weight, bias = _in_memory(x, weight, bias)
    with on_device(x):
        y: Tensor = _linear().dropout_linear(x, weight, bias, seed, p, relu)
        return y


def _run_dropout_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor | None, seed: Tensor | None,
    p: float, relu: bool, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    grad, x, weight = _in_memory(grad, x, weight)
    with on_device(x):
        linear = _linear()
        wanted = (needs[0], needs[1], needs[2])
        found = linear.dropout_linear_backward(grad, x, weight, y if relu else None, seed, p, wanted)
        return [gradient for gradient in found if gradient is not None]


# --- fakes --------------------------------------------------------------------------------------------------


def _in_format(x: Tensor, size: Size, channels_last: bool) -> Tensor:
    """An empty map; no view of anything, so that it may be changed in place."""
    _, c, h, w = size
    strides = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    return x.new_empty_strided(tuple(size), strides)


def _fake_map_chain(
    x: Tensor, parameters: list[Tensor], stages: list[int], norms: list[float], save: bool, channels_last: bool
) -> tuple[Tensor, list[Tensor]]:
    from alexnet_triton import chain

    size, saved = chain.like(x, parameters, stages_of.decode(stages, norms), save)
    return _in_format(x, size, channels_last), saved


def _fake_map_chain_backward(
    grad: Tensor, x: Tensor, out: Tensor | None, saved: list[Tensor], parameters: list[Tensor], stages: list[int],
    norms: list[float], needs: list[bool], channels_last: bool,
) -> list[Tensor]:  # fmt: skip
    dx = [_in_format(x, x.shape, channels_last)] if needs[0] else []
    return dx + [torch.empty_like(t) for t, needed in zip(parameters, needs[1:], strict=True) if needed]


def _fake_dropout_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, p: float, relu: bool
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_dropout_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor | None, seed: Tensor | None,
    p: float, relu: bool, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    dx = [x.new_empty(x.shape)] if needs[0] else []
    return dx + [
        torch.empty_like(t) for t, needed in zip((weight, bias), needs[1:], strict=True) if needed and t is not None
    ]


# --- autograd -----------------------------------------------------------------------------------------------


class _MapChain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stages: tuple[Stage, ...], save: bool, channels_last: bool, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        if _is_plain(x):
            out, saved = _run_stages(x, parameters, stages, True, channels_last)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                out, saved = _map_chain(x, parameters, *stages_of.encode(stages), True, channels_last)
        # What backward does not read is not kept, and may be changed in place, as the answers of torch's own layers.
        last = stages[-1]
        out_is_read = isinstance(last, ConvStage) and last.relu
        ctx.save_for_backward(x, out if out_is_read else None, *saved, *parameters)
        ctx.rest = stages, channels_last, len(parameters)
        if not save:
            return (out,)
        ctx.mark_non_differentiable(*saved)
        return out, *saved

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *of_saved: Tensor) -> tuple[Tensor | None, ...]:
        stages, channels_last, count = ctx.rest
        x, out, *tensors = ctx.saved_tensors
        saved, parameters = tensors[: len(tensors) - count], tensors[len(tensors) - count :]
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]
        if recompute.wanted(grad):
            inputs = (x, *parameters)
            dx, *rest = recompute.gradients(lambda x, *p: recompute.chain(x, p, stages), inputs, needs, grad)
            return dx, None, None, None, *rest
        if _is_plain(x):
            gradients = _run_stages_backward(grad, x, out, saved, parameters, stages, needs, channels_last)
        else:
            whole, real = stages_of.encode(stages)
            gradients = _map_chain_backward(grad, x, out, saved, parameters, whole, real, needs, channels_last)
        found = iter(gradients)
        dx, *rest = [next(found) if needed else None for needed in needs]
        return dx, None, None, None, *rest


class _DropoutLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, p: float, relu: bool
    ) -> Tensor:
        if _is_plain(x):
            y = _run_dropout_linear(x, weight, bias, seed, p, relu)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                y = _dropout_linear(x, weight, bias, seed, p, relu)
        ctx.save_for_backward(x, weight, bias, y if relu else None, seed)
        ctx.rest = p, relu
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, y, seed = ctx.saved_tensors
        p, relu = ctx.rest
        needs = list(ctx.needs_input_grad[:3])
        if recompute.wanted(grad):
            mask = None if seed is None else _dropped(torch.ones_like(x), seed, p)

            def function(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                return reference.dropout_linear(x if mask is None else x * mask, weight, bias, 0.0, relu)

            gradients = recompute.gradients(function, (x, weight, bias), needs, grad)
            return *gradients, None, None, None
        run: Any = _run_dropout_linear_backward if _is_plain(x) else _dropout_linear_backward
        found = iter(run(grad, x, weight, bias, y, seed, p, relu, needs))
        return *(next(found) if needed else None for needed in needs), None, None, None


class _Once(torch.autograd.Function):
    """Stands where the gradient of a gradient would."""

    @staticmethod
    def forward(ctx: Any, name: str, operator: Any, arguments: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(operator(*arguments))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"{ctx.name} can be differentiated once on the Triton backend: use_backend('reference') has its second "
            "derivative"
        )


def _tracked(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autograd_map_chain(
    x: Tensor, parameters: list[Tensor], stages: list[int], norms: list[float], save: bool, channels_last: bool
) -> tuple[Tensor, list[Tensor]]:
    if _tracked(x, *parameters):
        out, *saved = _MapChain.apply(x, _stages(tuple(stages), tuple(norms)), save, channels_last, *parameters)
        return out, saved
    with torch._C._AutoDispatchBelowAutograd():
        return _map_chain(x, parameters, stages, norms, save, channels_last)


def _autograd_dropout_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, p: float, relu: bool
) -> Tensor:
    if _tracked(x, weight, bias):
        y: Tensor = _DropoutLinear.apply(x, weight, bias, seed, p, relu)
        return y
    with torch._C._AutoDispatchBelowAutograd():
        return _dropout_linear(x, weight, bias, seed, p, relu)


def _autograd_once(name: str, operator: Callable[..., list[Tensor]], *arguments: Any) -> list[Tensor]:
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    tensors += [t for a in arguments if isinstance(a, (list, tuple)) for t in a if isinstance(t, Tensor)]
    if _tracked(*tensors):
        return list(_Once.apply(name, operator, arguments, *tensors))
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


# --- autocast -----------------------------------------------------------------------------------------------


def _autocast_map_chain(
    device: str, key: Any, x: Tensor, parameters: list[Tensor], stages: list[int], norms: list[float], save: bool,
    channels_last: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    # Filters are brought to the map's dtype as they are packed, and their gradients are made in their own.
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        plan = stages_of.decode(stages, norms)
        first = next((i for i, stage in enumerate(plan) if isinstance(stage, ConvStage)), len(plan))
        dtype = torch.get_autocast_dtype(device)
        if first and first < len(plan) and x.dtype != dtype:  # poolings keep the dtype that comes
            x = _map_chain(x, [], *stages_of.encode(plan[:first]), save, channels_last)[0]
            plan = plan[first:]
        if first < len(stages_of.decode(stages, norms)):
            x = x.to(dtype)
        return _map_chain(x, parameters, *stages_of.encode(plan), save, channels_last)


def _autocast_dropout_linear(
    device: str, key: Any, x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, p: float, relu: bool
) -> Tensor:
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        dtype = torch.get_autocast_dtype(device)
        return _dropout_linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), seed, p, relu)


# --- registration -------------------------------------------------------------------------------------------

_OPERATORS: tuple[tuple[str, Any, Any, Any], ...] = (
    ("map_chain", _run_map_chain, _fake_map_chain, _autograd_map_chain),
    (
        "map_chain_backward",
        _run_map_chain_backward,
        _fake_map_chain_backward,
        functools.partial(_autograd_once, "a chain of convolutions and poolings", _map_chain_backward),
    ),
    ("dropout_linear", _run_dropout_linear, _fake_dropout_linear, _autograd_dropout_linear),
    (
        "dropout_linear_backward",
        _run_dropout_linear_backward,
        _fake_dropout_linear_backward,
        functools.partial(_autograd_once, "dropout_linear", _dropout_linear_backward),
    ),
)

for _name, _run, _fake, _autograd in _OPERATORS:
    for _device in _DEVICES:
        _library.impl(_name, _run, _device)
    torch.library.register_fake(f"alexnet_triton::{_name}", _fake, lib=_library)
    _library.impl(_name, _autograd, "Autograd")

FOLDED_OPERATORS[_map_chain] = _run_map_chain
FOLDED_OPERATORS[_map_chain_backward] = _run_map_chain_backward

for _device in _DEVICES:
    _key = getattr(torch._C.DispatchKey, f"Autocast{_device}", None)
    if _key is not None:
        _library.impl("map_chain", functools.partial(_autocast_map_chain, _device.lower(), _key), f"Autocast{_device}")
        _library.impl(
            "dropout_linear", functools.partial(_autocast_dropout_linear, _device.lower(), _key), f"Autocast{_device}"
        )
