"""What a run of training is told, and what it measures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What decides how a run goes.

    Two runs of equal settings, data, number of processes and kind of device are the same to the last bit. Defaults are
    those of Krizhevsky et al. (2012), section 5: the document's Table 2.
    """

    epochs: int = 90
    batch_size: int = 128
    """Images of a step and process."""
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    bias_lr: float = 1.0
    """The rate of biases, as a multiple of the weights'; 2012's own code took 2."""
    bias_decay: float = 1.0
    """The weight decay of biases, likewise; 2012's own code took 0."""
    lr_scheduler: str = "plateau"
    """`"plateau"`: times `lr_gamma` whenever the held-out loss has not fallen for `lr_patience` epochs, three times at
    most; `"step"`: every `lr_step_size` epochs; `"cosine"`: to zero over all epochs."""
    lr_step_size: int = 30
    lr_gamma: float = 0.1
    lr_patience: int = 5
    clip_grad_norm: float | None = None
    """Largest norm of all gradients together; longer ones are scaled down to it."""
    crop: int = 227
    """Side of the network's input, in pixels."""
    mirror: bool = True
    """Whether half of the training images are mirrored."""
    pca_std: float = 0.1
    """Standard deviation of the multiples of the principal components of colour that an image is shifted by."""
    amp: bool = False
    """Mixed precision: parameters, maps and gradients in bfloat16, beside parameters and velocities in float32 that are
    updated."""
    seed: int = 0
    """Of the parameters, the order of the images, their crops and dropout."""

    def __post_init__(self) -> None:
        schedulers = ("plateau", "step", "cosine")
        if self.lr_scheduler not in schedulers:
            raise ValueError(f"unknown schedule {self.lr_scheduler!r}: choose one of {', '.join(schedulers)}")
        for name in ("epochs", "batch_size", "lr_step_size", "crop"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "bias_lr", "lr_gamma"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")
        for name in ("weight_decay", "bias_decay", "lr_patience", "pca_std"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm must be positive, got {self.clip_grad_norm}")
        if self.lr_scheduler == "plateau" and self.lr_gamma >= 1:
            raise ValueError(f"lr_gamma must be below 1, so that the rate falls on a plateau, got {self.lr_gamma}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be a number of 64 bits, got {self.seed}")

    def changed(self, other: dict[str, Any]) -> str | None:
        """The first setting that is not as in `other` and must be for a run to go on, in words.

        More epochs (or fewer) are no such change, but where the rate falls along a cosine.
        """
        for name, value in asdict(self).items():
            free = name == "epochs" and self.lr_scheduler != "cosine"
            if not free and other.get(name) != value:
                return f"{name} was {other.get(name)} and is {value}"
        return None


@dataclass
class History:
    """What a run of training has measured."""

    step_loss: list[float] = field(default_factory=list)
    """Cross-entropy of each step's images, in nats, before the step."""
    epochs: list[dict[str, float]] = field(default_factory=list)
    """A row an epoch, `COLUMNS`."""
    seconds: float = 0.0
    """Of training and evaluation together."""

    def column(self, name: str) -> list[float]:
        """One of `COLUMNS`, epoch by epoch."""
        return [row[name] for row in self.epochs]


COLUMNS = (
    "epoch",
    "step",
    "lr",
    "loss",
    "top1",
    "held_out_loss",
    "held_out_top1",
    "held_out_top5",
    "images_per_second",
    "waiting",
    "seconds",
)
"""Of an epoch: its number, the steps so far, the rate, training loss and accuracy (as drawn, in training mode), those
of the held-out images (centre crop), training images a second, the share of that time spent waiting for images, and
the run's seconds so far. Losses are in nats, accuracies and shares from 0 to 1."""
