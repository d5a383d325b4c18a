"""A run's update rule, schedule and precision, as its settings say."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from alexnet_triton.recipe.optim import KrizhevskySGD, biases_apart
from alexnet_triton.recipe.train.settings import Settings

DROPS = 3
"""How often a plateau lowers the rate at most: from 0.01 to 0.00001 in 2012."""


class Rule:
    """What updates a network's parameters.

    In mixed precision the network's parameters are bfloat16 copies of those in float32 that the rule updates.

    Args:
        model: the network, or the part of it that this process has, in float32; in mixed precision it is converted in
            place. Parameters that require no gradient are left as they are.
        settings: of the run.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model = model
        exact = {name: parameter.detach() for name, parameter in model.named_parameters()}
        if settings.amp:
            model.to(torch.bfloat16)
        self._frozen = {name: exact[name] for name, p in model.named_parameters() if not p.requires_grad}
        groups = biases_apart(model, settings.lr, settings.weight_decay, settings.bias_lr, settings.bias_decay)
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
        groups = [group for group in groups if group["params"]] or [{"params": []}]  # a frozen stage has none
        self.optimizer = KrizhevskySGD(groups, settings.lr, settings.momentum, settings.weight_decay)
        self.set_parameters(exact)
        self.scheduler = _scheduler(self.optimizer, settings)

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by name, in float32: what the rule updates, not copies."""
        return {
            name: self.optimizer.master_of(p) if p.requires_grad else self._frozen[name]
            for name, p in self.model.named_parameters()
        }

    def set_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Set every parameter, by name; those of the network are rounded where they are in bfloat16."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                self.optimizer.set_master(parameter, values[name])
            else:
                self._frozen[name] = values[name].float()
                with torch.no_grad():
                    parameter.copy_(values[name])

    def end_epoch(self, held_out_loss: float) -> None:
        """Lower the rate where the schedule says so."""
        if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(held_out_loss)
            return
        with warnings.catch_warnings():  # of a run that goes on at the end of an epoch, no step has been taken here
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()

    @property
    def lr(self) -> float:
        """The learning rate of the moment."""
        return float(self.optimizer.param_groups[0]["lr"])

    def velocities(self) -> dict[str, Tensor]:
        """The velocity of every parameter that has been updated, by name."""
        state = self.optimizer.state
        return {
            name: state[p]["velocity"] for name, p in self.model.named_parameters() if "velocity" in state.get(p, {})
        }

    def set_velocities(self, values: Mapping[str, Tensor]) -> None:
        """Set velocities, by parameter name."""
        for name, parameter in self.model.named_parameters():
            if name in values:
                self.optimizer.set_velocity(parameter, values[name])

    def state_dict(self) -> dict[str, Any]:
        """The rate and its schedule: what beside parameters and velocities decides how the run goes on."""
        return {"lr": self.lr, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        for group in self.optimizer.param_groups:
            group["lr"] = state["lr"]
        self.scheduler.load_state_dict(state["scheduler"])


def _scheduler(optimizer: torch.optim.Optimizer, s: Settings) -> Any:
    if s.lr_scheduler == "plateau":
        return lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=s.lr_gamma, patience=s.lr_patience, min_lr=s.lr * s.lr_gamma**DROPS, eps=0.0
        )
    if s.lr_scheduler == "step":
        return lr_scheduler.StepLR(optimizer, s.lr_step_size, s.lr_gamma)
    return lr_scheduler.CosineAnnealingLR(optimizer, s.epochs)
