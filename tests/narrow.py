"""AlexNets with few filters and units, in one process and shared by several, compared."""

from __future__ import annotations

import contextlib
import copy

import torch
import torch.nn.functional as F
from plain import error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_triton import AlexNet, use_backend
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


class Run:
    """A network and its rule, one step after the other.

    `share` gives a process its images of a batch.
    """

    def __init__(self, module, share=lambda images: images, autocast=False, seed=3):
        self.module, self.share, self.autocast = module, share, autocast
        self.optimizer = KrizhevskySGD([p for p in module.parameters() if p.requires_grad], lr=0.01)
        self.generator = torch.Generator().manual_seed(seed).get_state()
        self.logits = self.loss = None

    def step(self, images, labels):
        self.forward_and_backward(images, labels)
        self.optimizer.step()

    def forward_and_backward(self, images, labels):
        torch.set_rng_state(self.generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            self.logits = self.module(self.share(images))
        self.loss = loss_of(self.logits, labels)
        self.optimizer.zero_grad()
        self.loss.backward()
        if hasattr(self.module, "reduce_gradients"):
            self.module.reduce_gradients()
        self.generator = torch.get_rng_state()

    def whole(self, named):
        return self.module.whole(named) if hasattr(self.module, "whole") else named

    def velocities(self):
        state = self.optimizer.state
        return {name: state[p]["velocity"] for name, p in self.module.named_parameters() if p in state}


def compare(rank, size, make, share, cases):
    """Shared networks beside the same in one process.

    Args:
        make: from a model to what processes share.
        share: a process's part of the images, from (images, rank, size).
        cases: what `compare_one` takes, by name.

    Returns:
        For each case: errors, whether as much was drawn, and logits.
    """
    return {name: compare_one(make, lambda images: share(images, rank, size), **case) for name, case in cases.items()}


def compare_one(
    make, share, variant="paper", classes=4, dropout=0.5, count=5, frozen="", train=True, autocast=False, steps=3,
    backend="reference", change=None,
):  # fmt: skip
    """One case of `compare`.

    Args:
        frozen: how the names of parameters begin that require no gradient.
        change: what the model is changed by before.
    """
    model = network(variant, classes, dropout).train(train)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or not name.startswith(frozen))
    if change is not None:
        change(model)
    images, labels = batch(count, classes)
    with use_backend(backend):
        shared = Run(make(copy.deepcopy(model)), share, autocast)
        alone = Run(model, autocast=autocast)
        for run in (shared, alone):
            run.forward_and_backward(images, labels)
        errors = {
            "logits": error(shared.logits.float(), alone.logits.float()),
            "loss": error(shared.loss, alone.loss),
            "norm": error(shared.module.grad_norm(), nn.utils.get_total_norm(gradients(alone.module).values())),
        }
        found, expected = (run.whole(gradients(run.module)) for run in (shared, alone))
        leads = shared.module.peers.rank == 0
        errors["gradients"] = worst(found, expected if leads else {})
        for _ in range(steps):
            for run in (shared, alone):
                run.step(images, labels)
        found, expected = (run.whole(run.velocities()) for run in (shared, alone))
        errors["velocities"] = worst(found, expected if leads else {})
        found = shared.module.whole_state_dict()
        errors["weights"] = worst(found, alone.module.state_dict() if leads else {})
    return errors, torch.equal(shared.generator, alone.generator), shared.logits.detach()


def check(results, cases, limit=3e-6, steps_limit=2e-5):
    """Of `compare`'s answers in all processes: errors within limits, the same draws, and the same logits in each."""
    for rank, result in enumerate(results):
        assert result.keys() == cases.keys()
        for name, (errors, same_draws, logits) in result.items():
            assert same_draws, (name, rank)
            assert torch.equal(logits, results[0][name][2]), (name, rank)
            late = {key: errors[key] for key in ("velocities", "weights")}
            soon = {key: value for key, value in errors.items() if key not in late}
            assert max(soon.values()) < limit, (name, rank, soon)
            assert max(late.values()) < steps_limit, (name, rank, late)


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
