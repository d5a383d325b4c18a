"""How trained networks are judged: alone or averaged, by the centre of each image or by ten crops."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from alexnet_triton.recipe.augment import centre, ten
from alexnet_triton.recipe.data.loader import Loader
from alexnet_triton.recipe.trained import Trained

BEST = 5
"""Guesses that count for top-5; with fewer classes, all of them."""


class Score(NamedTuple):
    """What came of judging images, in sums: those of several processes add up."""

    loss: Tensor
    """(), float64: cross-entropy, in nats, summed over the images."""
    best: Tensor
    """(classes,), int64: images of each class that is among their `BEST` best guesses."""
    confusion: Tensor
    """(classes, classes), int64: images by true class (row) and best guess (column)."""

    @staticmethod
    def none(classes: int, device: torch.device | None = None) -> Score:
        """Of no images."""
        return Score(
            torch.zeros((), dtype=torch.float64, device=device),
            torch.zeros(classes, dtype=torch.int64, device=device),
            torch.zeros(classes, classes, dtype=torch.int64, device=device),
        )

    @staticmethod
    def of(log_probabilities: Tensor, labels: Tensor) -> Score:
        """Of guesses (N, classes) about images of classes (N,)."""
        classes = log_probabilities.shape[1]
        among = log_probabilities.topk(min(BEST, classes), dim=1).indices.eq(labels[:, None]).any(1)
        loss = -log_probabilities.gather(1, labels[:, None]).double().sum()
        return Score(
            loss, torch.bincount(labels[among], minlength=classes), confusion_matrix(log_probabilities, labels)
        )

    def __add__(self, other: Score) -> Score:  # type: ignore[override]
        return Score(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    @property
    def images(self) -> int:
        """How many were judged."""
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Share of images whose class is the best guess."""
        return int(self.confusion.diagonal().sum()) / max(1, self.images)

    @property
    def top5(self) -> float:
        """Share of images whose class is among the `BEST` best guesses."""
        return int(self.best.sum()) / max(1, self.images)

    @property
    def cross_entropy(self) -> float:
        """Mean of the images, in nats."""
        return self.loss.item() / max(1, self.images)


@dataclass(frozen=True)
class Evaluation:
    """What came of judging networks; per image in the order of the indices that were given."""

    score: Score
    """Of the networks together: their probabilities averaged."""
    members: list[Score]
    """Of each network alone."""
    guesses: Tensor
    """(N,), int64: the best guess about each image."""
    probabilities: Tensor
    """(N, 2), float32: that of the best guess, and that of the true class."""
    seconds: float
    """From the first image read to the last one judged."""


def evaluate(
    networks: Sequence[Trained],
    loader: Loader,
    indices: Tensor | None = None,
    *,
    batch_size: int = 128,
    ten_crop: bool = False,
    amp: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Judge networks by images, each counted once.

    Args:
        networks: at least one, on the loader's device; several are judged together, as the average of their
            probabilities, and must know the same classes in the same order.
        loader: reads the images, whose labels are the networks' (see `Trained.labels`).
        indices: of the images; None takes all. Processes that share the work take a part each, and add their scores.
        batch_size: images at a time; changes nothing but speed and memory.
        ten_crop: average the probabilities of the ten crops of `augment.ten`, one after another (memory is that of
            one), instead of taking the centre alone.
        amp: compute in half precision where autocast does.
        progress: show a progress bar.

    Raises:
        ValueError: no network, networks of different classes, or a crop larger than the images.
        DataError: an image cannot be read.
    """
    if not networks:
        raise ValueError("evaluation needs at least one network, got none")
    classes = networks[0].classes
    for other in networks[1:]:
        if other.classes != classes:
            raise ValueError(
                f"networks that are averaged must have the same classes in the same order, and one has {len(classes)} "
                f"from {classes[0]!r} to {classes[-1]!r}, another {len(other.classes)} from {other.classes[0]!r} to "
                f"{other.classes[-1]!r}"
            )
    labels = loader.data.labels
    parts = (torch.arange(len(loader.data)) if indices is None else indices).split(batch_size)
    score = Score.none(len(classes), loader.device)
    members = [score] * len(networks)
    guesses, chances = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, 2)]
    start = time.perf_counter()
    with tqdm(total=sum(map(len, parts)), desc="evaluating", unit="img", disable=not progress) as bar:
        answers = log_probabilities(networks, loader, parts, ten_crop=ten_crop, amp=amp)
        for part, each in zip(parts, answers, strict=True):
            truth, together = labels[part].to(loader.device), average(each)
            score += Score.of(together, truth)
            members = [sofar + Score.of(own, truth) for sofar, own in zip(members, each, strict=True)]
            best = together.max(1)
            guesses.append(best.indices.cpu())
            chances.append(torch.stack([best.values, together.gather(1, truth[:, None])[:, 0]], 1).exp().cpu())
            bar.update(len(part))
    return Evaluation(score, members, torch.cat(guesses), torch.cat(chances), time.perf_counter() - start)


def average(log_probabilities: Tensor) -> Tensor:
    """The logarithm of the mean over dimension 0 of probabilities, whose logarithms are given and given back."""
    return log_probabilities.logsumexp(0) - torch.tensor(float(len(log_probabilities))).log().to(log_probabilities)


@torch.no_grad()
def log_probabilities(
    networks: Sequence[Trained], loader: Loader, parts: Iterable[Tensor], *, ten_crop: bool = False, amp: bool = False
) -> Iterator[Tensor]:
    """What networks think of images, in evaluation mode; their modes are put back at the end.

    Logarithms, because a probability of a wrong class can be too small for a float32.

    Args:
        networks: on the loader's device.
        loader: reads the images.
        parts: indices of the images of each batch.
        ten_crop: average the probabilities of ten crops instead of taking the centre alone.
        amp: compute in half precision where autocast does.

    Yields:
        Of each part (networks, B, classes), float32, on the loader's device: logarithms of probabilities.

    Raises:
        ValueError: a crop larger than the images.
        DataError: an image cannot be read.
    """
    device, size = loader.device, loader.data.size
    half = autocast_dtype(device) if amp else None
    augments = [network.augment(half) for network in networks]
    for network in networks:
        centre(0, size, network.crop)  # a crop that does not fit is refused before any image is read
    with _evaluating([network.model for network in networks]):
        for images in loader.batches(parts):
            answers = []
            for network, augment in zip(networks, augments, strict=True):
                count = len(images)
                crops = ten(count, size, network.crop) if ten_crop else [centre(count, size, network.crop)]
                with torch.autocast(device.type, half, enabled=amp):
                    each = [network.model(augment(images, draws)) for draws in crops]
                answers.append(average(torch.stack(each).float().log_softmax(-1)))
            yield torch.stack(answers)


def autocast_dtype(device: torch.device) -> torch.dtype:
    """The half precision of mixed-precision evaluation: bfloat16, or float16 on a GPU that computes no bfloat16."""
    return torch.float16 if device.type == "cuda" and not torch.cuda.is_bf16_supported() else torch.bfloat16


@contextmanager
def _evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """(classes, classes) int64: row = true class, column = best guess."""
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).reshape(classes, classes)
