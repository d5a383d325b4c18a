"""Whole paths from files to the network's input on the device: this package's, and torchvision's beside them.

All give the same images in the same order, cut, mirrored and coloured by the same rule, each with draws of its own
generator, which the check draws again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from alexnet_triton.bench.checks import Measure
from alexnet_triton.bench.data_stages import AUGMENTED, HOST, Material, Stage, augmented, torchvision_draws, worst
from alexnet_triton.recipe.augment import Draws, training_transform
from alexnet_triton.recipe.data.loader import Loader
from alexnet_triton.recipe.data.sets import ImageSet

IMAGE_FOLDER, FOLDER_IMAGES, PACKED_IMAGES = "ImageFolder", "FolderImages", "PackedImages"
"""torchvision's dataset with `training_transform` in a DataLoader; ours with `Augment` behind a Loader, from the same
files and packed."""


def paths(workers: int) -> list[Stage]:
    """The paths of images that so many workers read, processes of a DataLoader or threads of a Loader.

    Args:
        workers: how many; 0: the process that trains reads.
    """
    return [
        _path(IMAGE_FOLDER, workers, 1, _image_folder, _torchvisions),
        _path(FOLDER_IMAGES, workers, 1, partial(_loaded, lambda material: material.folder), _own),
        _path(PACKED_IMAGES, workers, 4, partial(_loaded, lambda material: material.packed), _own),
    ]


def _path(
    whose: str,
    workers: int,
    times: int,
    begin: Callable[[int, int, Material], Callable[[], Iterable[Any]]],
    draws: Callable[[int, int, Material], Draws],
) -> Stage:
    """A path whose epoch has four batches a worker, or `times` that, so that its ends do not count for much."""

    def images(material: Material) -> int:
        return times * max(len(material.data), 4 * workers * material.batch)

    def check(material: Material, found: Iterable[Any]) -> Measure:
        count = images(material)
        drawn, numbers = draws(workers, count, material), material.numbers(count)
        expected = (
            augmented(material, material.data.images[numbers[part]], drawn.at(part))
            for part in material.batches(torch.arange(count))
        )
        return worst("network input", AUGMENTED, found, expected)

    name = f"{whose}, {workers} worker{'' if workers == 1 else 's'}"
    return Stage(name, lambda m: begin(workers, images(m), m), check, where=HOST, images=images, whole=whose)


def _loaded(
    of: Callable[[Material], ImageSet], workers: int, count: int, material: Material
) -> Callable[[], Iterator[Tensor]]:
    """An epoch as training has it: drawn ahead, read by threads, augmented on the device."""
    loader, augment = Loader(of(material), workers, material.device), material.augment
    parts = material.batches(material.numbers(count))

    def epoch() -> Iterator[Tensor]:
        draws = material.draws(count)
        places = material.batches(torch.arange(count))
        for images, place in zip(loader.batches(parts), places, strict=True):
            yield augment(images, draws.at(place))
        _wait(material.device)

    return epoch


def _own(_: int, count: int, material: Material) -> Draws:
    return material.draws(count)


def _image_folder(workers: int, count: int, material: Material) -> Callable[[], Iterator[Tensor]]:
    """An epoch as torchvision's reference scripts have it. Its processes are there before it begins, and stay."""
    transform = v2.Compose(
        [
            v2.Resize(material.size),
            v2.CenterCrop(material.size),
            training_transform(material.statistics, material.crop),
        ]
    )
    data = ImageFolder(str(material.folder.found.folder), transform)
    loader = DataLoader(
        Subset(data, material.numbers(count).tolist()),
        material.batch,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=material.device.type == "cuda",
        worker_init_fn=_seed,
    )

    def epoch() -> Iterator[Tensor]:
        iterator = iter(loader)  # which draws too
        if workers == 0:
            _seed(0)
        for images, _ in iterator:
            yield images.to(material.device, non_blocking=True)
        _wait(material.device)

    return epoch


def _seed(worker: int) -> None:
    """Seed a worker by its number, so that what it draws first is known."""
    torch.manual_seed(worker)


def _torchvisions(workers: int, count: int, material: Material) -> Draws:
    """Of the first epoch: a worker takes every `workers`th batch."""
    processes = max(1, workers)
    generators = [torch.Generator().manual_seed(number) for number in range(processes)]
    parts = material.batches(torch.arange(count))
    drawn = [
        torchvision_draws(material, generators[number % processes], len(part)) for number, part in enumerate(parts)
    ]
    return Draws(*map(torch.cat, zip(*drawn, strict=True)))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
