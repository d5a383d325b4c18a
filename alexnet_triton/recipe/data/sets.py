"""Images with labels: what training and evaluation ask of them, wherever their bytes lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor


class DataError(ValueError):
    """A dataset that cannot be used; the message names the path and what to do."""


class Statistics(NamedTuple):
    """The colours of a set of images, of pixels scaled to [0, 1]; float32."""

    mean: Tensor
    """(3,)."""
    std: Tensor
    """(3,), at least 1/255: a channel that is the same everywhere is not divided by zero."""
    eigenvalues: Tensor
    """(3,), of the covariance of R, G and B, the largest first; at least 0."""
    eigenvectors: Tensor
    """(3, 3): column i belongs to eigenvalue i, and its largest component is positive."""


class ColourSums(NamedTuple):
    """Sums over the pixels of images, exact, so that no order of adding them changes what comes of them."""

    pixels: int
    channels: Tensor
    """(3,), int64: sums of R, G and B."""
    products: Tensor
    """(3, 3), int64: sums of their products."""

    @staticmethod
    def none() -> ColourSums:
        """Of no images."""
        return ColourSums(0, torch.zeros(3, dtype=torch.int64), torch.zeros(3, 3, dtype=torch.int64))

    @staticmethod
    def of(images: Tensor) -> ColourSums:
        """Of images (N, 3, H, W), uint8."""
        sums = ColourSums.none()
        for image in images:
            pixels = image.reshape(3, -1).double()  # sums of squares of bytes are exact up to 2^53
            one = ColourSums(pixels.shape[1], pixels.sum(1).long(), (pixels @ pixels.t()).long())
            sums += one
        return sums

    def __add__(self, other: ColourSums) -> ColourSums:  # type: ignore[override]
        return ColourSums(self.pixels + other.pixels, self.channels + other.channels, self.products + other.products)

    def statistics(self) -> Statistics:
        """Mean, standard deviation and principal components."""
        count = max(1, self.pixels)
        mean = self.channels.double() / count
        covariance = (self.products.double() / count - mean.outer(mean)) / 255**2
        std = covariance.diagonal().clamp_min(0).sqrt().clamp_min(1 / 255)
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        return Statistics(*(t.float() for t in (mean / 255, std, values, vectors * largest.sign())))


class ImageSet(ABC):
    """Images of one size with their classes, read as bytes.

    Attributes:
        name: what to call it.
        classes: names of the classes.
        labels: (N,), int64, indices into `classes`.
        size: S, side of the images in pixels.
    """

    SAMPLE = 1024
    """Images whose colours are looked at, where there are more."""

    def __init__(self, name: str, classes: tuple[str, ...], labels: Tensor, size: int) -> None:
        self.name, self.classes, self.labels, self.size = name, classes, labels, size

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, indices: Tensor) -> Tensor:
        """The images at `indices`: (B, 3, S, S), uint8, RGB, of any strides."""

    def file_name(self, index: int) -> str:
        """Where image `index` came from."""
        return f"image {index}"

    def statistics(self, indices: Tensor | None = None) -> Statistics:
        """Of the colours of all images or those at `indices`; where they are many, of `SAMPLE` spread among them."""
        chosen = torch.arange(len(self)) if indices is None else indices
        if len(chosen) > self.SAMPLE:
            chosen = chosen[torch.linspace(0, len(chosen) - 1, self.SAMPLE, dtype=torch.float64).long()]
        sums = ColourSums.none()
        for part in chosen.split(16):
            sums += ColourSums.of(self.read(part))
        return sums.statistics()

    def subset(self, indices: Tensor) -> ImageSet:
        """The images at `indices`, in that order."""
        return Selection(self, indices, self.labels[indices], self.classes)

    def with_classes(self, classes: tuple[str, ...]) -> ImageSet:
        """The same images with the indices that their classes have in `classes`, those that a network was trained on.

        Raises:
            DataError: a class of an image is not among them.
        """
        if classes == self.classes:
            return self
        places = {name: place for place, name in enumerate(classes)}
        used = self.labels.unique().tolist()
        unknown = [self.classes[label] for label in used if self.classes[label] not in places]
        if unknown:
            raise DataError(
                f"class {unknown[0]!r} of {self.name!r} is none of the {len(classes)} classes that were trained on"
                f"{f', nor are {len(unknown) - 1} more' if len(unknown) > 1 else ''}: name the class folders alike"
            )
        table = torch.tensor([places.get(name, -1) for name in self.classes])
        return Selection(self, torch.arange(len(self)), table[self.labels], classes)


class Selection(ImageSet):
    """Some images of a set, in an order of their own and with labels of their own; nothing is copied."""

    def __init__(self, base: ImageSet, rows: Tensor, labels: Tensor, classes: tuple[str, ...]) -> None:
        super().__init__(base.name, classes, labels, base.size)
        self.base, self.rows = base, rows

    def read(self, indices: Tensor) -> Tensor:
        """The images at `indices`."""
        return self.base.read(self.rows[indices])

    def file_name(self, index: int) -> str:
        """Where image `index` came from."""
        return self.base.file_name(int(self.rows[index]))

    def statistics(self, indices: Tensor | None = None) -> Statistics:
        """Of these images' colours, where they are cheaply had."""
        return self.base.statistics(self.rows if indices is None else self.rows[indices])


class LabelledImages(ImageSet):
    """Images in memory.

    Args:
        name: what to call them.
        images: (N, 3, S, S), uint8, RGB.
        labels: (N,), int64, indices into `classes`.
        classes: names of the classes.
    """

    def __init__(self, name: str, images: Tensor, labels: Tensor, classes: tuple[str, ...]) -> None:
        super().__init__(name, classes, labels, images.shape[-1])
        self.images = images

    def read(self, indices: Tensor) -> Tensor:
        """The images at `indices`."""
        return self.images[indices]

    def statistics(self, indices: Tensor | None = None) -> Statistics:
        """Of the images' colours."""
        return ColourSums.of(self.images if indices is None else self.images[indices]).statistics()


def stratified_split(data: ImageSet, held_out: float, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Split into images to learn from and images held out, each class in the same proportion.

    Args:
        data: the images; each class has at least two.
        held_out: share to hold out, in (0, 1); the number is rounded up, and each class gives at least one
            and keeps at least one.
        seed: of the draw.

    Raises:
        ValueError: `held_out` is outside (0, 1).
        DataError: a class has one image alone, or none.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"the share to hold out must lie in (0, 1), got {held_out}")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    members = [order[data.labels[order] == label] for label in range(len(data.classes))]
    for name, member in zip(data.classes, members, strict=True):
        if len(member) < 2:
            raise DataError(
                f"class {name!r} of {data.name!r} has {len(member)} images, and at least 2 are needed: one to learn "
                "from and one to hold out"
            )
    shares = [held_out * len(member) for member in members]
    counts = [min(max(1, int(share)), len(member) - 1) for share, member in zip(shares, members, strict=True)]
    wanted = -int(-held_out * len(data) // 1)
    by_remainder = sorted(range(len(counts)), key=lambda label: int(shares[label]) - shares[label])
    for label in by_remainder:
        if sum(counts) < wanted and counts[label] + 1 < len(members[label]):
            counts[label] += 1
    held = torch.cat([member[:count] for member, count in zip(members, counts, strict=True)])
    kept = torch.cat([member[count:] for member, count in zip(members, counts, strict=True)])
    return data.subset(kept), data.subset(held)
