"""Training: epochs of steps, judged after each, and a run that goes on where it stopped, to the last bit.

Everything that is drawn for an epoch, the order of the images and each image's crop, follows from the seed and the
epoch's number alone, and belongs to a place in the order. So it is the same for any number of threads that read, any
number of processes that share the work, and for a run that was stopped and goes on. Dropout's stream is kept in the
checkpoints.
"""

from __future__ import annotations

import math
import signal
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from alexnet_triton.model import AlexNet
from alexnet_triton.parallel.layout import Layout
from alexnet_triton.parallel.processes.world import World
from alexnet_triton.recipe import augment
from alexnet_triton.recipe.augment import Augment, Draws
from alexnet_triton.recipe.data.loader import Loader
from alexnet_triton.recipe.data.sets import ImageSet, Statistics
from alexnet_triton.recipe.evaluate.evaluation import Score
from alexnet_triton.recipe.train.checkpoint import LAST, CheckpointError, Checkpoints
from alexnet_triton.recipe.train.record import Record
from alexnet_triton.recipe.train.rule import Rule
from alexnet_triton.recipe.train.settings import History, Settings
from alexnet_triton.recipe.train.signals import Interrupted, StopSignals
from alexnet_triton.recipe.trained import Trained

FLAT_STEPS = 2000
"""Steps after which a loss that is still that of guessing is warned about; of small sets of images fewer."""

TRACED = 8
"""Number of the step that is drawn, when all has been made that the first steps make; of a short epoch the last whole
step."""

FEW_STEPS = 100
"""The fewest, after three epochs; and so many losses are averaged."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and the way out."""


class Training:
    """A run: a network, its images, its rule, and how far it has come.

    Args:
        trained: the network, in float32, with its classes and how its input is made. It is trained in place, where
            `world` has its device; parameters that require no gradient stay as they are.
        learn: images to learn from; their labels are indices into the network's classes, as are those of `held_out`.
        held_out: images to judge by after each epoch.
        settings: what decides how the run goes.
        checkpoints: where it is written.
        world: the processes that share it.
        layout: how they hold the network.
        trace: where to draw one step of a pipeline: when each stage worked on what.
        workers: threads that read images.
        print_freq: steps from one look at the loss to the next on a GPU, which is not waited for in between.
        compiled: compile the network with `torch.compile`.
        progress: show progress bars.

    Raises:
        ValueError: the crop is larger than the images, or no parameter requires a gradient.
    """

    def __init__(
        self,
        trained: Trained,
        learn: ImageSet,
        held_out: ImageSet,
        settings: Settings,
        checkpoints: Checkpoints,
        world: World,
        *,
        workers: int = 2,
        print_freq: int = 10,
        layout: Layout | None = None,
        trace: Path | None = None,
        compiled: bool = False,
        progress: bool = True,
    ) -> None:
        if not any(parameter.requires_grad for parameter in trained.model.parameters()):
            raise ValueError("no parameter is left to train: --freeze leaves none that requires a gradient")
        augment.centre(0, learn.size, settings.crop)  # says what is wrong with a crop
        augment.centre(0, held_out.size, settings.crop)
        self.trained, self.settings, self.world = trained, settings, world
        self.learn, self.held_out = learn, held_out
        self.checkpoints = checkpoints
        self.print_freq = 1 if world.device.type == "cpu" else print_freq
        self.progress = progress and world.leads
        self.model = trained.model
        self._described = _describe(self.model)  # before the processes share it out
        layout = layout or Layout()
        self.engine = layout.engine(self.model, world, settings.batch_size, settings.crop, compiled)
        if world.device.type == "cuda":
            self.engine.module.to(memory_format=torch.channels_last)  # as the kernels read filters: no copies of them
        self.rule = Rule(self.engine.module, settings)
        dtype = torch.bfloat16 if settings.amp else torch.float32
        self.augment = Augment(trained.statistics, settings.crop, dtype, self.engine.first)
        self.loader = Loader(learn, workers, world.device)
        self.held_out_loader = Loader(held_out, workers, world.device)
        self.history = History()
        self.step = 0
        """Steps taken of the epoch that is under way; epochs that are over have a row in `history`."""
        self._right = 0
        """Right guesses among the images of those steps."""
        self._unread: list[Tensor] = []
        """Of each step since the last look: the loss, and the right guesses, of this process's images."""
        self._record: Record | None = None
        self._trace = trace
        self._signals = StopSignals(insist=world.size == 1)
        self._mark = 0.0
        self._epoch_began = (0.0, 0.0)
        """The time when the epoch began, or went on, and the seconds waited for images before."""
        self._warned = False

    @property
    def batch(self) -> int:
        """Images of a step, of all copies of the network together."""
        return self.settings.batch_size * self.world.replicas

    # --- the run ----------------------------------------------------------------------------------------------

    def run(self) -> History:
        """Train to the end from wherever the run is, writing a checkpoint after each epoch.

        Raises:
            TrainingError: a loss or a parameter is not finite; the checkpoints hold finite ones.
            Interrupted: Ctrl-C or SIGTERM came, and a checkpoint has been written. A second Ctrl-C does not wait.
            DataError: an image cannot be read.
        """
        self._mark = time.perf_counter()
        if self.world.leads:
            self._record = Record(self.checkpoints.folder, len(self.history.step_loss))
        try:
            with self._signals:
                # A network to point at, whatever happens; and one that was killed may not have come to all its files.
                self.save(self._is_best())
                if self._record is not None and self.history.epochs:
                    self._record.table(self.history)
                while len(self.history.epochs) < self.settings.epochs:
                    self._epoch()
        finally:
            if self._record is not None:
                self._record.close()
        return self.history

    def _epoch(self) -> None:
        done = self.step * self.batch
        self._epoch_began = time.perf_counter(), self.loader.waited
        self._learn()
        seconds, waiting = self._waiting()
        losses = self.history.step_loss[-self.step :]
        counts = [len(batch) for batch in torch.arange(len(self.learn)).split(self.batch)]
        held_out_loss, top1, top5 = self.judge()
        if not math.isfinite(held_out_loss):
            raise self._diverged(f"the held-out loss is {held_out_loss}")
        row = {
            "epoch": len(self.history.epochs) + 1,
            "step": len(self.history.step_loss),
            "lr": self.rule.lr,
            "loss": sum(loss * count for loss, count in zip(losses, counts, strict=True)) / len(self.learn),
            "top1": self._right / len(self.learn),
            "held_out_loss": held_out_loss,
            "held_out_top1": top1,
            "held_out_top5": top5,
            "images_per_second": max(0, len(self.learn) - done) / seconds,
            "waiting": waiting,
            "seconds": self._seconds(),
        }
        self.history.epochs.append(row)
        self.step = self._right = 0
        self.rule.end_epoch(held_out_loss)
        self._warn_if_flat()
        self.save(self._is_best())
        if self._record is not None:
            self._record.epoch(self.history)

    def _learn(self) -> None:
        """Take the steps that the epoch has left."""
        order, draws = self._drawn(len(self.history.epochs))
        batches = torch.arange(len(self.learn)).split(self.batch)
        left = batches[self.step :]
        shares = [self.world.share(batch) for batch in left]
        self.engine.train()
        done = min(self.step * self.batch, len(self.learn))
        with self._bar(f"epoch {len(self.history.epochs) + 1}/{self.settings.epochs}", self.learn, done) as bar:
            images = self._read(self.loader, [order[share] for share in shares])
            for batch, share, bytes_ in zip(left, shares, images, strict=True):
                labels = self.learn.labels[order[share]]
                self._unread.append(self._step(bytes_, labels, draws.at(share), len(batch)))
                self.step += 1
                bar.update(len(batch))
                if self.step % self.print_freq == 0 or self.step == len(batches):
                    self._look(bar)

    def _read(self, loader: Loader, batches: list[Tensor]) -> Iterable[Tensor | None]:
        """The images of batches; None for each where another process reads them."""
        return loader.batches(batches) if self.engine.reads else [None] * len(batches)

    def _drawn(self, epoch: int) -> tuple[Tensor, Draws]:
        """The order of an epoch's images, and what is drawn for each place in it."""
        generator = torch.Generator().manual_seed((self.settings.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(len(self.learn), generator=generator)
        s = self.settings
        draws = augment.draw(len(order), self.learn.size, s.crop, generator, mirror=s.mirror, colour=s.pca_std)
        return order, draws

    def _step(self, images: Tensor | None, labels: Tensor, draws: Draws, total: int) -> Tensor:
        """A step on this replica's part of a batch of `total` images.

        Returns:
            (2,), on the device: what this process counts of the batch's mean loss, and of its right guesses.
        """
        labels = labels.to(self.world.device, non_blocking=True)
        self.rule.optimizer.zero_grad(set_to_none=True)
        images = None if images is None else self.augment(images, draws)
        if self._trace is not None and self.step == max(0, min(TRACED, len(self.learn) // self.batch - 1)):
            from alexnet_triton.parallel.pipeline.tracing import draw_step

            counted = draw_step(self.engine, images, labels, total, self._trace)  # type: ignore[arg-type]
            self._trace = None
        else:
            counted = self.engine.step(images, labels, total)
        if self.settings.clip_grad_norm is not None:
            self.engine.clip_gradients(self.settings.clip_grad_norm)
        self.rule.optimizer.step()
        return counted

    def _look(self, bar: Any) -> None:
        """Read the steps since the last look, in all processes, and whether one of them is to stop."""
        *steps, (asked, _) = self._summed([*self._unread, self._asked()])
        self._unread.clear()
        for loss, right in steps:
            self.history.step_loss.append(loss)
            self._right += int(right)
            if not math.isfinite(loss):
                raise self._diverged(f"the loss is {loss}")
            if self._record is not None:
                self._record.step(len(self.history.step_loss), loss, self.rule.lr)
        recent = self.history.step_loss[-min(20, self.step) :]
        seen = min(self.step * self.batch, len(self.learn))
        bar.set_postfix(
            loss=f"{sum(recent) / len(recent):.3f}",
            top1=f"{self._right / seen:.1%}",
            waiting=f"{self._waiting()[1]:.0%}",
            refresh=False,
        )
        self._warn_if_flat()
        if asked:
            self._leave()

    @torch.no_grad()
    def judge(self) -> tuple[float, float, float]:
        """Mean cross-entropy in nats, and top-1 and top-5 accuracy, of the held-out images, each counted once."""
        self.engine.train(False)
        batches = torch.arange(len(self.held_out)).split(self.batch)
        shares = [self.world.share(batch) for batch in batches]
        score = Score.none(len(self.trained.classes), self.world.device)
        with self._bar("held out", self.held_out) as bar:
            images = self._read(self.held_out_loader, shares)
            for number, (batch, share, bytes_) in enumerate(zip(batches, shares, images, strict=True), 1):
                draws = augment.centre(len(share), self.held_out.size, self.settings.crop)
                cropped = None if bytes_ is None else self.augment(bytes_, draws)
                logits = self.engine.logits(cropped, len(share))
                if logits is not None:
                    score += Score.of(logits.log_softmax(1), self.held_out.labels[share].to(self.world.device))
                bar.update(len(batch))
                if number % self.print_freq == 0 and self._summed([self._asked()])[0][0]:
                    self._leave()
        score = Score(*(self.world.sum(part) for part in score))
        return score.cross_entropy, score.top1, score.top5

    # --- stopping ---------------------------------------------------------------------------------------------

    def _asked(self) -> Tensor:
        return torch.tensor([float(self._signals.asked > 0), 0.0], device=self.world.device)

    def _summed(self, rows: list[Tensor]) -> list[list[float]]:
        return self.world.sum(torch.stack(rows)).tolist()

    def _leave(self) -> None:
        path = self.save()
        raise Interrupted(
            f"stopped; the network as trained so far is in {path}, and --resume goes on from there",
            self._signals.asked or signal.SIGTERM,
        )

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what} at step {len(self.history.step_loss)}: use a learning rate below {self.settings.lr:g}, or "
            f"--clip-grad-norm; the last good network is in {self.checkpoints.folder / LAST}"
        )

    def _warn_if_flat(self) -> None:
        """Say once that the loss has stayed at that of guessing, and what to do."""
        steps = len(self.history.step_loss)
        if self._warned or steps < (FEW_STEPS if len(self.history.epochs) >= 3 else FLAT_STEPS):
            return
        self._warned = True
        recent, flat = self.history.step_loss[-FEW_STEPS:], math.log(len(self.trained.classes))
        if self.world.leads and abs(sum(recent) / len(recent) - flat) < 0.02 * flat:
            warnings.warn(
                f"after {steps:,} steps the loss is still ln({len(self.trained.classes)}) = {flat:.3f}, that of "
                "guessing: the initialisation of 2012 can stay there for long, and init='kaiming' (--init kaiming) "
                "does not",
                stacklevel=2,
            )

    def _waiting(self) -> tuple[float, float]:
        """Seconds of this epoch's steps so far, and the share of them spent waiting for images."""
        start, waited = self._epoch_began
        seconds = max(1e-9, time.perf_counter() - start)
        return seconds, (self.loader.waited - waited) / seconds

    def _bar(self, what: str, images: ImageSet, done: int = 0) -> Any:
        stays = images is self.learn
        return tqdm(total=len(images), initial=done, desc=what, unit="img", disable=not self.progress, leave=stays)

    # --- checkpoints ------------------------------------------------------------------------------------------

    def _is_best(self) -> bool:
        """Whether this is the end of the epoch of the lowest held-out loss so far."""
        *before, last = [math.inf, *self.history.column("held_out_loss")]
        return self.step == 0 and last < min(before, default=math.inf)

    def save(self, best: bool = False) -> Path:
        """Write a checkpoint of the run as it is.

        Returns:
            The path of the newest checkpoint.

        Raises:
            TrainingError: a parameter is not finite, and nothing was written.
        """
        parameters = self.rule.parameters()
        strange = any(not value.isfinite().all() for value in parameters.values())
        if self.world.sum(torch.tensor(float(strange), device=self.world.device)):
            raise self._diverged("a parameter is not finite")
        self._seconds()
        streams = dict(self.world.gather((self.engine.stream, _random_state(self.world.device))))
        parameters, velocities = self.engine.whole(parameters), self.engine.whole(self.rule.velocities())
        if self.world.leads:
            training = {
                "settings": asdict(self.settings),
                "run": self._description(),
                "history": asdict(self.history),
                "step": self.step,
                "right": self._right,
                "rule": self.rule.state_dict(),
                "velocities": velocities,
                "random": [streams[stream] for stream in range(self.engine.streams)],
            }
            content = {**self.trained.content(parameters), "training": training}
            self.checkpoints.save(content, len(self.history.step_loss), best)
        return self.checkpoints.folder / LAST

    def resume(self, content: dict[str, Any], name: str) -> None:
        """Take up a run where a checkpoint left it.

        Args:
            content: of the checkpoint.
            name: what errors call it.

        Raises:
            CheckpointError: the checkpoint is of another run: other settings, network, images or processes.
        """
        training = content["training"]
        changed = self.settings.changed(training["settings"]) or self._changed(training["run"])
        if not changed and not _alike(content, self.trained.statistics):
            changed = "the colours that the input is normalised by were others"
        if changed:
            raise CheckpointError(
                f"{name} is of a run that was told otherwise ({changed}): resume it as it was started, or start "
                "another with --init-from"
            )
        self.rule.set_parameters(self.engine.part(content["model"]))
        self.rule.set_velocities(self.engine.part(training["velocities"]))
        self.rule.load_state_dict(training["rule"])
        self.history = History(**training["history"])
        self.step, self._right = training["step"], training["right"]
        _set_random_state(training["random"][self.engine.stream], self.world.device)

    def _changed(self, before: dict[str, Any]) -> str | None:
        """What is not as in `before`, in words."""
        for key, value in self._description().items():
            if before.get(key) != value:
                return f"{key} was {_short(before.get(key))} and is {_short(value)}"
        return None

    def _description(self) -> dict[str, Any]:
        """What must be the same when the run goes on, beside its settings."""
        return {
            **self._described,
            "classes": list(self.trained.classes),
            "images to learn from": len(self.learn),
            "images held out": len(self.held_out),
            "size of the images": self.learn.size,
            "images of a step": self.batch,
            "streams of dropout": self.engine.streams,
        }

    def _seconds(self) -> float:
        now = time.perf_counter()
        self.history.seconds += now - self._mark
        self._mark = now
        return self.history.seconds


def _describe(model: AlexNet) -> dict[str, Any]:
    """What must be the same of the network when the run goes on."""
    return {
        "variant": model.variant,
        "dropout": [layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)],
        "frozen parameters": [name for name, p in model.named_parameters() if not p.requires_grad],
    }


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """Of the generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _alike(content: dict[str, Any], colours: Statistics) -> bool:
    """Whether a checkpoint's mean and deviation are these, but for the last bits, which a machine may round its way."""
    return all(torch.allclose(content[name], getattr(colours, name), atol=1e-5) for name in ("mean", "std"))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
