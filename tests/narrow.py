"""AlexNets with few filters and units, in one process and shared by several, compared."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import NamedTuple

import groups
import plain
import torch
import torch.nn.functional as F
import torchvision
from plain import error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_triton import AlexNet, use_backend
from alexnet_triton.parallel.sharded import ShardedNetwork
from alexnet_triton.recipe.optim import KrizhevskySGD

SIZE = 67
FILTERS = {0: 8, 3: 16, 6: 12, 8: 12, 10: 8}
UNITS = {1: 20, 4: 18}


def network(variant="paper", classes=4, dropout=0.5, seed=0):
    """A variant with few filters, and biases that are not zero."""
    torch.manual_seed(seed)
    model = AlexNet(classes, dropout, variant=variant, device="meta")
    depth = 3
    for index, filters in FILTERS.items():
        old = model.features[index]
        model.features[index] = nn.Conv2d(depth, filters, old.kernel_size, old.stride, old.padding, groups=old.groups)
        depth = filters
    width = depth * 36
    for index, units in {**UNITS, 6: classes}.items():
        model.classifier[index] = nn.Linear(width, units)
        width = units
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight)
                layer.bias.normal_(std=0.1)
    return model


def twins(variant="torchvision", classes=4, dropout=0.5):
    """A narrow network, and the same in torch's own layers: in torchvision's class where that is the variant."""
    ours = network(variant, classes, dropout)
    with torch.device("meta"):
        if variant == "torchvision":
            theirs = torchvision.models.alexnet(num_classes=classes, dropout=dropout)
        else:
            theirs = plain.alexnet(variant, classes, dropout)
    for part in ("features", "classifier"):
        for index, layer in enumerate(getattr(ours, part)):
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                getattr(theirs, part)[index] = copy.deepcopy(layer)
    return ours, theirs


def batch(count, classes=4, seed=1):
    """Images and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return images, torch.randint(0, classes, (count,), generator=generator)


def loss_of(logits, labels):
    """A mean loss of a batch, which may be empty, with a gradient where there is one class too."""
    logits = logits.float()
    return (F.cross_entropy(logits, labels, reduction="sum") + 0.1 * logits.square().sum()) / max(1, len(labels))


def gradients(module):
    """By name, of the parameters that have one."""
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def worst(found, expected):
    """The largest error among tensors by name; infinite where the names are others."""
    if found.keys() != expected.keys():
        return float("inf")
    return max((error(found[name], expected[name]) for name in expected), default=0.0)


class Case(NamedTuple):
    """A network and what it is given."""

    variant: str = "paper"
    classes: int = 4
    dropout: float = 0.5
    count: int = 5
    """Images of the batch."""
    frozen: str = "none"
    """How the names of parameters begin that require no gradient."""
    train: bool = True
    autocast: bool = False
    steps: int = 3
    backend: str = "reference"
    change: Callable[[AlexNet], object] | None = None
    """What is done to the network before: a function of a module's top level."""

    def model(self):
        model = network(self.variant, self.classes, self.dropout).train(self.train)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(self.frozen))
        if self.change is not None:
            self.change(model)
        return model


class Outcome(NamedTuple):
    """What comes of a case; of networks that processes share, what is by name is there in the first process alone."""

    logits: torch.Tensor
    loss: torch.Tensor
    norm: torch.Tensor
    gradients: dict[str, torch.Tensor]
    velocities: dict[str, torch.Tensor]
    """After the last step, and the weights likewise."""
    weights: dict[str, torch.Tensor]
    generator: torch.Tensor
    """Its state at the end."""


def outcome(case, module, share=lambda images: images):
    """Of a network, which is the case's model or shared by processes: then `share` gives one's part of the images."""
    shared = isinstance(module, ShardedNetwork)
    images, labels = batch(case.count, case.classes)
    rule = KrizhevskySGD([p for p in module.parameters() if p.requires_grad], lr=0.01)
    torch.manual_seed(3)

    def whole(named):
        return module.whole(named) if shared else {name: value.clone() for name, value in named.items()}

    def forward_and_backward():
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            logits = module(share(images))
        loss = loss_of(logits, labels)
        rule.zero_grad()
        loss.backward()
        if shared:
            module.reduce_gradients()
        return logits.detach().float(), loss.detach()

    with use_backend(case.backend):
        logits, loss = forward_and_backward()
        norm = module.grad_norm() if shared else nn.utils.get_total_norm(gradients(module).values())
        found = whole(gradients(module))
        for _ in range(case.steps):
            rule.step()
            forward_and_backward()
    velocities = {n: rule.state[p]["velocity"] for n, p in module.named_parameters() if p in rule.state}
    weights = module.whole_state_dict() if shared else module.state_dict()
    return Outcome(logits, loss, norm, found, whole(velocities), weights, torch.get_rng_state())


def outcomes(rank, size, make, share, cases):
    """Of networks that processes share.

    Args:
        make: from a model to what processes share.
        share: a process's part of the images, from (images, rank, size).
        cases: by name.
    """
    return {
        name: outcome(case, make(case.model()), lambda images: share(images, rank, size))
        for name, case in cases.items()
    }


@contextlib.contextmanager
def one_thread():
    """Compute with one thread, as the processes do: networks so small gain nothing by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check(processes, make, share, cases, limit=3e-6, steps_limit=2e-5):
    """Share the networks of cases among processes, and demand what comes of them in one process."""
    results = groups.run(outcomes, processes, make, share, cases, seconds=200)
    for name, case in cases.items():
        first, *others = (result[name] for result in results)
        with one_thread():
            alone = outcome(case, case.model())
        errors = {key: error(getattr(first, key), getattr(alone, key)) for key in ("logits", "loss", "norm")}
        errors["gradients"] = worst(first.gradients, alone.gradients)
        assert max(errors.values()) < limit, (name, errors)
        if case.steps:
            errors = {key: worst(getattr(first, key), getattr(alone, key)) for key in ("velocities", "weights")}
            assert max(errors.values()) < steps_limit, (name, errors)
        for other in (*others, alone):
            assert torch.equal(first.generator, other.generator), f"{name}: the draws differ"
        for other in others:
            assert all(map(torch.equal, first[:3], other[:3])), f"{name}: the processes differ"
            assert not other.gradients


SENT = {
    "all_gather_into_tensor": (0, lambda size: size - 1),
    "allgather_": (1, lambda size: size - 1),
    "reduce_scatter_tensor": (0, lambda size: (size - 1) / size),
    "allreduce_": (0, lambda size: 2 * (size - 1) / size),
}
"""Collectives: which argument is this process's, and how many times that it sends in a ring of `size`."""


@contextlib.contextmanager
def counted(size):
    """The bytes that this process sends by collectives of `size` processes, by collective."""
    sent = {}

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.__name__.split(".")[0]
            if name in SENT:
                index, times = SENT[name]
                tensors = args[index] if isinstance(args[index], list) else [args[index]]
                sent[name] = sent.get(name, 0) + times(size) * sum(t.numel() * t.itemsize for t in tensors)
            else:
                assert func.namespace not in COLLECTIVES or name in NOT_SENT, name
            return func(*args, **(kwargs or {}))

    with Counting():
        yield sent


COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
NOT_SENT = ("wait_tensor", "_wrap_tensor_autograd")


def gathered(model, side):
    """Numbers of an image that are gathered: before conv3, whose maps have `side` pixels a side, and fc6 to fc8."""
    linear = [layer.in_features for layer in model.classifier if isinstance(layer, nn.Linear)]
    return [model.features[6].in_channels * side * side, *linear]
