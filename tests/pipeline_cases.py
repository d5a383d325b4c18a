"""Steps of a pipeline beside those of one process that has the whole network and the whole batch."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import narrow
import torch
from torch import nn

from alexnet_triton import use_backend
from alexnet_triton.parallel.engine import loss_and_right
from alexnet_triton.recipe.optim import KrizhevskySGD

CPU = torch.device("cpu")


@dataclass
class Case:
    """A run of a few steps."""

    variant: str = "paper"
    at: object = ("features.6",)
    schedule: str = "1f1b"
    microbatches: int = 4
    batch: int = 10
    """Images of a full step."""
    images: tuple = (10, 10, 7)
    """Of each step."""
    dropout: float = 0.5
    frozen: tuple = ()
    """Parts of the network that do not learn."""
    half: bool = False
    """Compute in bfloat16 where autocast does."""
    clip: float | None = None
    backend: str = "reference"
    change: object = None
    """Of the network, before it is cut."""

    def network(self):
        model = narrow.network(self.variant, dropout=self.dropout)
        if self.change is not None:
            self.change(model)
        for name in self.frozen:
            model.get_submodule(name).requires_grad_(False)
        return model.train()

    def batches(self):
        return [narrow.batch(count, seed=number) for number, count in enumerate(self.images)]


def optimizer(module):
    """The rule, at a rate at which three steps change much."""
    return KrizhevskySGD([p for p in module.parameters() if p.requires_grad] or [{"params": []}], lr=0.01)


def one_process(case, shares=1):
    """The steps by one process: what each counted, the gradients of each, and how it ended.

    Where the batch is shared among copies of the network, each draws dropout for its share from its own stream.
    """
    model = case.network()
    rule = optimizer(model)
    states = [torch.Generator().manual_seed(50 + share).get_state() for share in range(shares)]
    counted, gradients = [], []
    with use_backend(case.backend):
        for images, labels in case.batches():
            rule.zero_grad()
            sums = torch.zeros(2)
            parts = zip(images.tensor_split(shares), labels.tensor_split(shares), strict=True)
            for share, (some, theirs) in enumerate(parts):
                torch.set_rng_state(states[share])
                with torch.autocast("cpu", torch.bfloat16, enabled=case.half):
                    loss, right = loss_and_right(model(some), theirs, len(labels))
                loss.backward()
                states[share] = torch.get_rng_state()
                sums += torch.stack([loss.detach(), right.float()])
            counted.append(sums)
            gradients.append({name: grad.clone() for name, grad in narrow.gradients(model).items()})
            if case.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), case.clip)
            rule.step()
    return counted, gradients, copy.deepcopy(model.state_dict()), states
