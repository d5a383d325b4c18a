"""Gradients that are differentiated again, and batches of them, on the Triton backend: plain PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from plain import error
from torch import nn

from alexnet_triton import FusedSequential, library, ops, use_backend

ON_TRITON = [
    (lambda x, w, b: ops.conv2d_relu(x, w, b, 2, 1, 2), ((2, 4, 7, 6), (6, 2, 3, 3), (6,))),
    (lambda x, w, b: ops.conv2d_relu(x, w, b, relu=False), ((2, 4, 5, 5), (3, 4, 3, 3), (3,))),
    (lambda x: ops.lrn_max_pool(x, 3, 0.9, 0.75, 2.0), ((1, 6, 5, 5),)),
    (lambda x, w, b: ops.dropout_linear(x, w, b, 0.5, relu=True), ((3, 8), (5, 8), (5,))),
    (lambda x, w: ops.dropout_linear(x, w), ((3, 8), (5, 8))),
]


def dropped_as_kernels_do(monkeypatch):
    """Let the reference draw the kernels' masks."""
    monkeypatch.setattr(F, "dropout", lambda x, p: x * library.dropout(torch.ones_like(x), p))


@pytest.mark.parametrize(("function", "shapes"), ON_TRITON)
def test_a_gradient_on_triton_can_be_differentiated_again(function, shapes, monkeypatch):
    """What the forward pass dropped stays dropped, and a tensor that is not asked for gets nothing."""
    dropped_as_kernels_do(monkeypatch)
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    seconds = []
    for backend in ("triton", "reference"):
        torch.manual_seed(4)
        with use_backend(backend):
            answer = function(*inputs)
            firsts = torch.autograd.grad(answer.square().sum(), inputs, create_graph=True)
            again = torch.autograd.grad(sum(first.square().sum() for first in firsts), inputs)
            only = torch.autograd.grad(function(inputs[0], *(t.detach() for t in inputs[1:])).sum(), inputs[:1])
        seconds.append([*firsts, *again, *only])
    for ours, expected in zip(*seconds, strict=True):
        assert error(ours, expected) < 1e-5


@pytest.mark.parametrize(("function", "shapes"), ON_TRITON)
def test_gradients_on_triton_can_be_taken_in_batches(function, shapes):
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    with use_backend("triton"):
        answer = function(*inputs)
        several = torch.randn(3, *answer.shape)
        expected = [torch.stack(each) for each in zip(*(
            torch.autograd.grad(answer, inputs, one, retain_graph=True) for one in several
        ), strict=True)]  # fmt: skip
        batched = torch.autograd.grad(answer, inputs, several, retain_graph=True, is_grads_batched=True)
        mapped = torch.func.vmap(lambda one: torch.autograd.grad(answer, inputs, one, retain_graph=True))(several)
    for found in (batched, mapped):
        for ours, wanted in zip(found, expected, strict=True):
            assert error(ours, wanted) < 1e-5


def test_a_parameter_in_two_places_gets_each_place_s_gradient_when_differentiated_again():
    weight = torch.randn(4, 4, 3, 3, requires_grad=True)
    layers = FusedSequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    layers[0].weight = layers[2].weight = nn.Parameter(weight.detach())
    x, found = torch.randn(2, 4, 9, 9), []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            (first,) = torch.autograd.grad(layers(x).square().sum(), layers[0].weight, create_graph=True)
            found.append([first, *torch.autograd.grad(first.square().sum(), layers[0].weight)])
    for ours, expected in zip(*found, strict=True):
        assert error(ours, expected) < 1e-5
