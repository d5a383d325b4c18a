"""What people do with an AlexNet, done to ours and to the same network in torch's own layers, and compared.

An idiom is a function of a network in evaluation and of images. It gives all that its user would see: tensors, and
what else can be compared. Modules of idioms hold functions named `idiom_...`.
"""

from __future__ import annotations

import narrow
import pytest
import torch
from plain import error
from torch import nn
from torch.utils._pytree import tree_flatten

from alexnet_triton import VARIANTS, use_backend

ON_BOTH_BACKENDS = [("torchvision", "triton"), ("torchvision", "reference")]
ON_EVERY_VARIANT = [*ON_BOTH_BACKENDS, *((variant, "reference") for variant in VARIANTS if variant != "torchvision")]


def over(idioms, cases):
    """Parametrise a test by idiom, variant and backend."""
    return pytest.mark.parametrize(
        ("idiom", "variant", "backend"),
        [
            pytest.param(idiom, *case, id="-".join((idiom.__name__.removeprefix("idiom_"), *case)))
            for idiom in idioms
            for case in cases
        ],
    )


def of(namespace):
    """The idioms of a module."""
    return [value for name, value in namespace.items() if name.startswith("idiom_")]


def check(idiom, variant, backend, limit=1e-5):
    """Demand that an idiom gives what it gives with torch's own layers."""
    ours, theirs = (model.eval() for model in narrow.twins(variant))
    count = 1 if backend == "triton" else 2  # the interpreter takes its time
    with use_backend(backend):
        found, structure = _outcome(idiom, ours, count)
    expected, wanted = _outcome(idiom, theirs, count)
    assert structure == wanted
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(theirs, torch.Tensor):
            assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
            assert theirs.is_meta or error(ours, theirs) < limit
        else:
            assert ours == theirs


def _outcome(idiom, model, count):
    images = torch.randn(count, 3, 67, 67, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    return tree_flatten(idiom(model, images))


def answer(model, images, parameters=None):
    """Logits, and the gradients of a weighted sum of them for the images and each parameter that requires one."""
    parameters = model.parameters() if parameters is None else parameters
    images = images.clone().requires_grad_()
    logits = model(images)
    wanted = [images, *(p for p in parameters if p.requires_grad)]
    return logits.detach().clone(), torch.autograd.grad(loss_of(logits), wanted)


def loss_of(logits):
    """A sum in which every logit has another weight."""
    return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)).sum()


def gradients(model):
    """By name; None where there is none."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def without_dropout(model):
    """In training, where nothing is dropped: the backends draw in ways of their own."""
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model.train()
