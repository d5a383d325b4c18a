"""What is done to an image between its file and the network, a stage at a time.

`STAGES` is the list. A stage finds what comes before it done, does its work for every image, and is held to the pixels
that `read_image` gives. Whoever adds a way for images to travel adds a stage.
"""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from alexnet_triton.bench.checks import Absent, Measure
from alexnet_triton.recipe.augment import Augment, Draws, draw, training_transform
from alexnet_triton.recipe.data.images import FolderImages, class_folders, decode, fit, read_image
from alexnet_triton.recipe.data.packed import PackedImages, open_packed
from alexnet_triton.recipe.data.prepare import prepare
from alexnet_triton.recipe.data.sets import LabelledImages, Statistics

PIXELS = (500, 375)
"""Width and height of the generated images: ImageNet's most common size."""

QUALITY = 92
"""Of the JPEG files, at which they have some 110 kB, as ImageNet's (138 GB, 1,281,167 images) have."""

CLASSES = 10


# --- what is worked on ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Material:
    """Generated images, and what each stage finds done before it. N images of 3 channels, S pixels a side."""

    pixels: list[Tensor]
    """As drawn: (H, W, 3), uint8."""
    paths: Mapping[str, list[Path]]
    """Their files, by format: `"JPEG"`, in class folders, and `"PNG"`."""
    encoded: Mapping[str, list[bytes]]
    """What the files hold, by format."""
    decoded: list[Image.Image]
    """From the JPEG files."""
    data: LabelledImages
    """As `read_image` reads them from the JPEG files: what every stage is held to."""
    folder: FolderImages
    """The JPEG files."""
    packed: PackedImages
    """What `prepare` makes of them."""
    crop: int
    """Side of the network's input in pixels."""
    batch: int
    device: torch.device

    @property
    def size(self) -> int:
        """S."""
        return self.data.size

    @property
    def augment(self) -> Augment:
        """From bytes to the network's input."""
        return Augment(self.statistics, self.crop)

    @property
    def statistics(self) -> Statistics:
        """Of the images' colours."""
        return self.packed.statistics()

    def numbers(self, count: int) -> Tensor:
        """The first `count` of the images' numbers, over and over."""
        return torch.arange(count) % len(self.data)

    def draws(self, count: int) -> Draws:
        """Drawn for `count` images, the same at every call."""
        return draw(count, self.size, self.crop, torch.Generator().manual_seed(0))

    def batches(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """A tensor of N images, or what belongs to them, in batches."""
        parts: tuple[Tensor, ...] = tensor.split(self.batch)
        return parts


def photograph(width: int, height: int, generator: torch.Generator) -> Tensor:
    """A random image, (height, width, 3), uint8, whose spectrum falls off as a photograph's does."""
    rows, columns = torch.fft.fftfreq(height)[:, None] * height, torch.fft.rfftfreq(width) * width
    frequency = (rows.square() + columns.square()).sqrt()
    frequency[0, 0] = torch.inf  # the mean is given below
    noise = torch.view_as_complex(torch.randn(4, height, width // 2 + 1, 2, generator=generator))
    maps = torch.fft.irfft2(noise / frequency**1.2, s=(height, width))
    grey, colour = (maps / maps.std((1, 2), keepdim=True)).tensor_split([1])
    image: Tensor = (0.5 + 0.2 * grey + 0.06 * colour).clamp(0, 1)
    return image.mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous()


def generate(
    folder: Path,
    images: int,
    size: int,
    crop: int,
    batch: int,
    device: torch.device,
    pixels: tuple[int, int] = PIXELS,
) -> Material:
    """Draw images, write them into `folder`, and do every stage once.

    Args:
        folder: of the files; must exist.
        images: how many.
        size: side that the images are brought to, in pixels.
        crop: side of the network's input, in pixels.
        batch: images of a batch.
        device: where batches go.
        pixels: width and height of the files.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = [photograph(*pixels, generator) for _ in range(images)]
    paths: dict[str, list[Path]] = {}
    for form, options in (("JPEG", {"quality": QUALITY}), ("PNG", {})):
        labels = (number * CLASSES // images for number in range(images))
        names = [f"{label}/{number:06}.{form.lower()}" for number, label in enumerate(labels)]
        paths[form] = [folder / form / name for name in names]
        for path, image in zip(paths[form], drawn, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(path, form, **options)
    encoded = {form: [path.read_bytes() for path in of_form] for form, of_form in paths.items()}
    read = torch.stack([read_image(path, size) for path in paths["JPEG"]])
    found = FolderImages(class_folders(folder / "JPEG"), size)
    data = LabelledImages("generated", read, found.labels, found.classes)
    [packed] = prepare(folder / "JPEG", folder / "packed", size, workers=0)
    decoded = [decode(path) for path in paths["JPEG"]]
    return Material(drawn, paths, encoded, decoded, data, found, packed, crop, batch, device)


# --- what a stage is --------------------------------------------------------------------------------------------------


WORKER, HOST, DEVICE = "a worker", "the host", "the device"
"""A worker has one thread, the process that trains has torch's, and the device what it has."""

FOLDERS, PACKED = "folders", "packed"
"""The ways that images go: from files that are decoded in every epoch, and from a packed dataset."""


class Stage(NamedTuple):
    """A stage of the input path, or the whole of one."""

    name: str
    begin: Callable[[Material], Callable[[], Iterable[Any]]]
    """Gets ready, and gives what does the stage: at each call for every image, its outputs as they come.

    Raises `Absent` where the machine lacks what it needs.
    """
    check: Callable[[Material, Iterable[Any]], Measure]
    """Of the outputs of the first call."""
    ways: tuple[str, ...] = ()
    """Those on which images pass through it: `FOLDERS`, `PACKED`; none of a stage that stands there for comparison."""
    where: str = WORKER
    """Who does it: `WORKER`, `HOST` or `DEVICE`."""
    images: Callable[[Material], int] = lambda material: len(material.data)
    """How many a call does."""
    whole: str | None = None
    """Of a whole path: whose it is."""


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors; infinite where shape or dtype are not the same."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    return (found.cpu().double() - expected.cpu().double()).abs().max().item()


def worst(
    name: str,
    limit: float,
    found: Iterable[Any],
    expected: Iterable[Any],
    error: Callable[[Any, Any], float] = off,
) -> Measure:
    """The output that differs most from what is expected; one too few or too many is infinitely off."""
    pairs = itertools.zip_longest(found, expected)
    errors = [float("inf") if a is None or b is None else error(a, b) for a, b in pairs]
    return Measure(name, max(errors, default=float("inf")), limit)


# --- files, and what is made of them ----------------------------------------------------------------------------------


def _each(function: Callable[[Any], Any], of: Callable[[Material], Iterable[Any]]) -> Callable[[Material], Any]:
    """The `begin` of a stage that is a function of each of its inputs."""

    def begin(material: Material) -> Callable[[], Iterable[Any]]:
        inputs = list(of(material))
        return lambda: map(function, inputs)

    return begin


def _check_bytes(material: Material, found: Iterable[Any]) -> Measure:
    return worst("bytes of a file", 0.0, found, material.encoded["JPEG"], lambda a, b: float(a != b))


def _check_jpeg(material: Material, found: Iterable[Any]) -> Measure:
    return worst("pixels", 0.0, (fit(image, material.size) for image in found), material.data.images)


def _check_png(material: Material, found: Iterable[Any]) -> Measure:
    return worst("pixels", 0.0, (torch.from_numpy(np.array(image)) for image in found), material.pixels)


def _check_pixels(material: Material, found: Iterable[Any]) -> Measure:
    return worst("pixels", 0.0, found, material.data.images)


def _read(material: Material) -> Callable[[], Iterable[Any]]:
    return lambda: (read_image(path, material.size) for path in material.paths["JPEG"])


def _samples(material: Material) -> list[list[tuple[Tensor, int]]]:
    pairs = list(zip(material.data.images, material.data.labels.tolist(), strict=True))
    return [pairs[start : start + material.batch] for start in range(0, len(pairs), material.batch)]


def _check_collated(material: Material, found: Iterable[Any]) -> Measure:
    images, labels = zip(*found, strict=True)
    expected = (*material.batches(material.data.images), *material.batches(material.data.labels))
    return worst("batches", 0.0, (*images, *labels), expected)


def _prepare(material: Material) -> Callable[[], Iterator[Any]]:
    """In a new folder each time: what is there already is not made again."""

    def prepared() -> Iterator[Tensor]:
        beside = material.packed.folder.parent
        with tempfile.TemporaryDirectory(dir=beside) as folder:
            [data] = prepare(material.folder.found.folder, Path(folder) / "packed", material.size, workers=0)
            yield data.read(material.numbers(len(data)))
            del data  # whose file is mapped

    return prepared


def _check_whole(material: Material, found: Iterable[Any]) -> Measure:
    return worst("pixels", 0.0, found, [material.data.images])


# --- packed and in memory ---------------------------------------------------------------------------------------------


def _order(material: Material) -> Tensor:
    return torch.randperm(len(material.data), generator=torch.Generator().manual_seed(1))


def _shuffled(read: Callable[[Material], Callable[[Tensor], Tensor]]) -> Callable[[Material], Any]:
    """The `begin` of a stage that reads batches in an epoch's random order."""

    def begin(material: Material) -> Callable[[], Iterable[Any]]:
        of, parts = read(material), material.batches(_order(material))
        return lambda: map(of, parts)

    return begin


def _check_shuffled(material: Material, found: Iterable[Any]) -> Measure:
    expected = material.batches(material.data.images[_order(material)])
    return worst("pixels", 0.0, found, expected)


def _first_epoch(material: Material) -> Callable[[Tensor], Tensor]:
    data = open_packed(material.packed.folder)

    def read(part: Tensor) -> Tensor:
        data._checked[part] = False  # an image is held to its checksum when it is read for the first time
        return data.read(part)

    return read


# --- on the device ----------------------------------------------------------------------------------------------------


def _to_device(material: Material) -> Callable[[], Iterable[Any]]:
    if material.device.type == "cpu":
        raise Absent("no GPU: a batch stays where it is")
    batches = material.batches(material.data.images)
    return lambda: (batch.to(material.device) for batch in batches)


def _check_batches(material: Material, found: Iterable[Any]) -> Measure:
    return worst("pixels", 0.0, found, material.batches(material.data.images))


AUGMENTED = 1e-5
"""What a pixel of the network's input, whose standard deviation is 1, may be off by."""


def augmented(material: Material, images: Tensor, draws: Draws) -> Tensor:
    """What augmentation is: crop, mirror, PCA colour, normalisation, in float64, given as float32.

    Args:
        material: whose crop and statistics it takes.
        images: (N, 3, S, S), uint8.
        draws: for these images.
    """
    mean, std, values, vectors = (t.double() for t in material.statistics)
    crop, out = material.crop, []
    places = zip(draws.top.tolist(), draws.left.tolist(), draws.mirror.tolist(), strict=True)
    for image, (top, left, mirror), alpha in zip(images, places, draws.colour.double(), strict=True):
        pixels = image[:, top : top + crop, left : left + crop].double() / 255
        pixels = pixels.flip(2) if mirror else pixels
        shift = vectors @ (alpha * values)
        out.append(((pixels + (shift - mean)[:, None, None]) / std[:, None, None]).float())
    return torch.stack(out)


def _augment(material: Material) -> Callable[[], Iterable[Any]]:
    """In the layout that packed images have."""
    batches = [
        batch.to(material.device, memory_format=torch.channels_last) for batch in material.batches(material.data.images)
    ]
    draws = [material.draws(len(material.data)).at(part) for part in material.batches(_all(material))]
    augment = material.augment
    return lambda: map(augment, batches, draws)


def _all(material: Material) -> Tensor:
    return material.numbers(len(material.data))


def _check_augmented(material: Material, found: Iterable[Any]) -> Measure:
    expected = augmented(material, material.data.images, material.draws(len(material.data)))
    return worst("network input", AUGMENTED, found, material.batches(expected))


def _transform(material: Material) -> Callable[[], Iterator[Tensor]]:
    """`training_transform` on images that are read already, of draws that a seed decides."""
    transform = training_transform(material.statistics, material.crop)

    def transformed() -> Iterator[Tensor]:
        torch.manual_seed(0)
        yield from map(transform, material.data.images)

    return transformed


def torchvision_draws(material: Material, generator: torch.Generator, count: int) -> Draws:
    """What `training_transform` draws for `count` images, one after another."""
    room = material.size - material.crop
    draws = []
    for _ in range(count):
        top, left = (torch.randint(0, room + 1, (), generator=generator) if room else torch.tensor(0) for _ in "yx")
        mirror = torch.rand((), generator=generator) < 0.5
        draws.append((top, left, mirror, torch.randn(3, generator=generator) * 0.1))
    return Draws(*map(torch.stack, zip(*draws, strict=True)))


def _check_transformed(material: Material, found: Iterable[Any]) -> Measure:
    draws = torchvision_draws(material, torch.Generator().manual_seed(0), len(material.data))
    return worst("network input", AUGMENTED, found, augmented(material, material.data.images, draws))


BOTH = (FOLDERS, PACKED)

STAGES: list[Stage] = [
    Stage("read the file", _each(Path.read_bytes, lambda m: m.paths["JPEG"]), _check_bytes, (FOLDERS,)),
    Stage("decode, JPEG", _each(lambda f: decode(io.BytesIO(f)), lambda m: m.encoded["JPEG"]), _check_jpeg, (FOLDERS,)),
    Stage("decode, PNG", _each(lambda f: decode(io.BytesIO(f)), lambda m: m.encoded["PNG"]), _check_png),
    Stage("resize, crop, to tensor", lambda m: lambda: (fit(i, m.size) for i in m.decoded), _check_pixels, (FOLDERS,)),
    Stage("file to tensor (read_image)", _read, _check_pixels),
    Stage("collate a batch", _each(default_collate, _samples), _check_collated, (FOLDERS,)),
    Stage("prepare, one process", _prepare, _check_whole),
    Stage("read packed, first epoch", _shuffled(_first_epoch), _check_shuffled),
    Stage("read packed, later epochs", _shuffled(lambda m: m.packed.read), _check_shuffled, (PACKED,)),
    Stage("read from memory", _shuffled(lambda m: m.data.read), _check_shuffled),
    Stage("copy to the device", _to_device, _check_batches, BOTH, DEVICE),
    Stage("augment", _augment, _check_augmented, BOTH, DEVICE),
    Stage("augment, torchvision", _transform, _check_transformed),
]
"""In the order in which images pass; whole paths are `data_paths`'s."""
