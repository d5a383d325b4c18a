"""Gradients by plain PyTorch, where the kernels' own will not do: to be differentiated again, or taken in batches.

The forward pass runs once more, by its meaning (`alexnet_triton.reference`), and torch differentiates that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from alexnet_triton import reference
from alexnet_triton.stages import ConvStage, Stage


def wanted(grad: Tensor) -> bool:
    """Whether the backward pass that is under way, given `grad`, needs gradients that are plain PyTorch's.

    One with `create_graph=True` does, for gradient penalties and `torch.autograd.functional.hessian`, and one that is
    given a batch of gradients: with `is_grads_batched=True`, or under `torch.func.vmap`.
    """
    return (
        torch.is_grad_enabled()
        or torch._C._functorch.is_legacy_batchedtensor(grad)
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """The gradients of `function` at `inputs`.

    Args:
        function: of plain PyTorch.
        inputs: its arguments.
        needs: for each, whether its gradient is wanted.
        grad: of the function's answer; it may be batched.

    Returns:
        For each input its gradient, or None; in the graph, where gradients are recorded.
    """
    with torch.enable_grad():
        # Each under a name of its own: one parameter may stand in two places.
        named = [t.view_as(t) if needed and t is not None else t for t, needed in zip(inputs, needs, strict=True)]
        answer = function(*named)
    differentiated = [t for t, needed in zip(named, needs, strict=True) if needed and t is not None]
    found = iter(torch.autograd.grad(answer, differentiated, grad, create_graph=torch.is_grad_enabled()))
    return [next(found) if needed else None for needed in needs]


def chain(x: Tensor, parameters: Sequence[Tensor], stages: Sequence[Stage]) -> Tensor:
    """What a chain of convolutions and poolings means; its arguments are `alexnet_triton.library.map_chain`'s."""
    rest = iter(parameters)
    for stage in stages:
        if isinstance(stage, ConvStage):
            weight = next(rest).to(x.dtype)  # under autocast a parameter keeps its own
            bias = next(rest).to(x.dtype) if stage.bias else None
            x = reference.conv2d_relu(x, weight, bias, stage.stride, stage.padding, stage.groups, stage.relu)
        else:
            x = reference.lrn_max_pool(x, *stage)
    return x
