"""The training loop: SGD with momentum on images in memory, with checkpoints that survive Ctrl-C."""

from __future__ import annotations

import math
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from alexnet_triton.recipe.data import ImageSet
from alexnet_triton.recipe.evaluate import Normalise, accuracy, predict

Augmentation = Callable[[Tensor], Tensor]


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and the way out."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after a checkpoint has been written to `checkpoint`."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"stopped; the network as trained so far is in {checkpoint}")
        self.checkpoint = checkpoint


@dataclass(frozen=True)
class Settings:
    """What a run of training is told."""

    epochs: int = 5
    batch_size: int = 32
    lr: float = 0.03
    """Learning rate of the first step; it falls to zero along a cosine."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 1.0
    """Largest norm of all gradients together; longer ones are scaled down to it."""
    seed: int = 0


@dataclass
class History:
    """What a run of training measured."""

    step_loss: list[float] = field(default_factory=list)
    """Cross-entropy of each step's batch, in nats."""
    epoch_loss: list[float] = field(default_factory=list)
    """Mean over an epoch of the training loss."""
    held_out_loss: list[float] = field(default_factory=list)
    held_out_accuracy: list[float] = field(default_factory=list)
    seconds: float = 0.0
    """Of training and evaluation together."""


def train(
    model: nn.Module,
    learn: ImageSet,
    held_out: ImageSet,
    normalise: Normalise,
    settings: Settings,
    checkpoint: Path,
    augment: Augmentation | None = None,
    *,
    progress: bool = True,
) -> History:
    """Train `model` in place, and write it to `checkpoint` after every epoch and on Ctrl-C.

    Args:
        model: takes (N, 3, S, S) and gives (N, classes); trained where its parameters are.
        learn: images to learn from.
        held_out: images to judge by after every epoch.
        normalise: from bytes to the model's input.
        settings: epochs, batch size, rates, seed.
        checkpoint: file that is written; see `save_checkpoint`.
        augment: changes each image (3, S, S) uint8 when it is drawn.
        progress: show progress bars.

    Raises:
        TrainingError: the loss is not finite; the checkpoint keeps the last finite state.
        Interrupted: Ctrl-C came, and the checkpoint has been written. A second Ctrl-C does not wait.
    """
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.SGD(
        model.parameters(), settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    steps = math.ceil(len(learn) / settings.batch_size) * settings.epochs
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    history, start = History(), time.perf_counter()

    def save() -> None:
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise _diverged("a parameter is not finite", history, settings, checkpoint)
        history.seconds = time.perf_counter() - start
        save_checkpoint(checkpoint, model, learn, normalise, settings, history)

    save()  # so that there is a place to say, whenever Ctrl-C comes
    with _stop_flag() as stop_asked:
        for epoch in range(1, settings.epochs + 1):
            model.train()
            order = torch.randperm(len(learn), generator=draw)
            losses: list[float] = []
            with tqdm(
                total=len(learn), desc=f"epoch {epoch}/{settings.epochs}", unit="img", disable=not progress
            ) as bar:
                for indices in order.split(settings.batch_size):
                    images, labels = learn.read(indices), learn.labels[indices].to(device)
                    if augment is not None:
                        images = torch.stack([augment(image) for image in images])
                    loss = F.cross_entropy(model(normalise(images.to(device))), labels)
                    value = loss.item()
                    if not math.isfinite(value):
                        raise _diverged(f"the loss is {value}", history, settings, checkpoint)
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
                    optimizer.step()
                    scheduler.step()
                    history.step_loss.append(value)
                    losses.append(value)
                    bar.update(len(indices))
                    bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}")
                    if stop_asked():
                        save()
                        raise Interrupted(checkpoint)
                logits = predict(model, held_out, normalise)
                history.epoch_loss.append(sum(losses) / len(losses))
                history.held_out_loss.append(F.cross_entropy(logits, held_out.labels).item())
                history.held_out_accuracy.append(accuracy(logits, held_out.labels))
                bar.set_postfix(loss=f"{history.epoch_loss[-1]:.3f}", held_out=f"{history.held_out_accuracy[-1]:.1%}")
            _warn_of_a_plateau(history, len(learn.classes))
            save()
            if stop_asked():
                raise Interrupted(checkpoint)
    return history


def _diverged(what: str, history: History, settings: Settings, checkpoint: Path) -> TrainingError:
    return TrainingError(
        f"{what} at step {len(history.step_loss) + 1}: use a learning rate below {settings.lr:g}; the last good "
        f"network is in {checkpoint}"
    )


def save_checkpoint(
    path: Path,
    model: nn.Module,
    data: ImageSet,
    normalise: Normalise,
    settings: Settings,
    history: History,
) -> None:
    """Write tensors and plain types only, atomically: `path` is the old file or the new one, never half of one.

    Keys: `model` (state dict), `variant`, `classes`, `mean`, `std`, `image_size`, `settings`, `history`.
    `torch.load(path, weights_only=True)` reads it, and `alexnet_triton.read_state_dict` its state dict.
    """
    content: dict[str, Any] = {
        "model": model.state_dict(),
        "variant": getattr(model, "variant", None),
        "classes": list(data.classes),
        "mean": normalise.mean.flatten(),
        "std": normalise.std.flatten(),
        "image_size": data.size,
        "settings": asdict(settings),
        "history": asdict(history),
    }
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextmanager
def _stop_flag() -> Iterator[Callable[[], bool]]:
    """While active, a first Ctrl-C is only noted; a second one interrupts as usual."""
    asked = False

    def note(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)

    try:
        before = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread, which alone gets signals
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def _warn_of_a_plateau(history: History, classes: int) -> None:
    flat = math.log(classes)
    if len(history.epoch_loss) == 3 and all(abs(loss - flat) < 0.02 * flat for loss in history.epoch_loss):
        warnings.warn(
            f"the loss has stayed at ln({classes}) = {flat:.3f} for 3 epochs, that of guessing: the initialisation "
            "of 2012 can do so for long, and init='kaiming' (--init kaiming) does not",
            stacklevel=3,
        )
