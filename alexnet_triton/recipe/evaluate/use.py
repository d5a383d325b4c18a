"""Images that a trained network is asked about, and its guesses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from alexnet_triton.recipe.data.images import BadImage, read_image
from alexnet_triton.recipe.data.loader import Loader
from alexnet_triton.recipe.data.packed import is_packed, open_packed
from alexnet_triton.recipe.data.sets import DataError, ImageSet
from alexnet_triton.recipe.data.sources import open_images, train_and_val
from alexnet_triton.recipe.evaluate.evaluation import log_probabilities
from alexnet_triton.recipe.trained import Trained

# --- images -----------------------------------------------------------------------------------------------------------


class ImageFiles(ImageSet):
    """Image files without classes, decoded whenever they are read, as `read_image` does.

    Args:
        files: their paths.
        size: side that they are brought to, in pixels.
        skip_bad: read a file that is no image, or is damaged, as black, and note it in `bad`.

    Attributes:
        bad: what is wrong with the images that could not be read, by their indices.
    """

    def __init__(self, files: Sequence[Path], size: int, skip_bad: bool = False) -> None:
        super().__init__("the images", (), torch.zeros(len(files), dtype=torch.int64), size)
        self.files, self.skip_bad = files, skip_bad
        self.bad: dict[int, BadImage] = {}

    def read(self, indices: Tensor) -> Tensor:
        """Decode images: (B, 3, S, S), uint8.

        Raises:
            BadImage: a file is no image, where `skip_bad` is off.
        """
        images = torch.zeros(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        for image, index in zip(images, indices.tolist(), strict=True):
            try:
                image.copy_(read_image(self.files[index], self.size))
            except BadImage as error:
                if not self.skip_bad:
                    raise
                self.bad[index] = error
        return images

    def file_name(self, index: int) -> str:
        """The image's path."""
        return str(self.files[index])


def gather(paths: Sequence[str | os.PathLike[str]], size: int, skip_bad: bool = False) -> ImageSet:
    """The images that paths name.

    Args:
        paths: of files; of folders, whose images are taken with those of the folders inside, sorted (what has another
            ending than images have is passed over, and so is what is hidden); or of one packed dataset.
        size: side that files are brought to, in pixels.
        skip_bad: pass over files that are no images, or damaged (see `ImageFiles`).

    Raises:
        DataError: a path is missing, a folder holds no image, or a packed dataset is damaged, of another size or not
            alone.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir() and is_packed(path):
            if len(paths) > 1:
                raise DataError(
                    f"{str(path)!r} is a packed dataset, which is taken alone: give it without other images"
                )
            return of_size(open_packed(path), size)
        if path.is_dir():
            inside = _images_inside(path)
            if not inside:
                raise DataError(f"{str(path)!r} holds no images")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"there is no image, and no folder of images, at {str(path)!r}")
    return ImageFiles(found, size, skip_bad)


def labelled(path: str | os.PathLike[str], networks: Sequence[Trained]) -> ImageSet:
    """Images to judge networks by, with the networks' classes.

    Networks that do not know the names of their classes (see `Trained.named`) take them from the images.

    Args:
        path: a packed dataset or a folder of class folders; or what holds two of these, `train` and `val`, of which
            `val` is taken.
        networks: at least one.

    Raises:
        DataError: the images are missing or damaged, or of another size or other classes than the networks'.
        ValueError: the networks take images of different sizes.
    """
    sizes = sorted({network.size for network in networks})
    if len(sizes) > 1:
        raise ValueError(f"the networks take images of {' and '.join(map(str, sizes))} pixels: judge them one by one")
    inside = train_and_val(path)
    data = of_size(open_images(inside[1] if inside else path, sizes[0]), sizes[0])
    for network in networks:
        data = network.labels(data)
        network.classes, network.named = data.classes, True
    return data


def unreadable(data: ImageSet) -> dict[int, BadImage]:
    """What is wrong with those of the images that were read so far and could not be, by their indices."""
    return data.bad if isinstance(data, ImageFiles) else {}


def of_size(data: ImageSet, size: int) -> ImageSet:
    """The same images, which must be of the size that a network was trained on.

    Raises:
        DataError: they are not.
    """
    if data.size != size:
        raise DataError(
            f"{data.name!r} is packed in {data.size}x{data.size} pixels, and the network was trained on images of "
            f"{size}x{size}: prepare it with --size {size}"
        )
    return data


def _images_inside(folder: Path) -> list[Path]:
    from PIL import Image

    endings = set(Image.registered_extensions())
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in endings
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


# --- guesses ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """What a network thinks of one image."""

    file: str
    guesses: list[tuple[str, float]]
    """Classes and their probabilities, the most probable first."""


def predict(
    network: Trained,
    loader: Loader,
    *,
    top: int = 5,
    batch_size: int = 128,
    ten_crop: bool = False,
    amp: bool = False,
    progress: bool = False,
) -> list[Prediction]:
    """Guess what images show.

    Args:
        network: on the loader's device.
        loader: reads the images; those that it notes as bad are left out.
        top: guesses about each; no more than there are classes.
        batch_size: images at a time.
        ten_crop: average the probabilities of ten crops instead of taking the centre alone.
        amp: compute in half precision where autocast does.
        progress: show a progress bar.

    Raises:
        ValueError: a crop larger than the images.
        DataError: an image cannot be read.
    """
    top = min(top, len(network.classes))
    parts = torch.arange(len(loader.data)).split(batch_size)
    predictions = []
    with tqdm(total=len(loader.data), desc="predicting", unit="img", disable=not progress) as bar:
        answers = log_probabilities([network], loader, parts, ten_crop=ten_crop, amp=amp)
        for part, (answer,) in zip(parts, answers, strict=True):
            best = answer.exp().topk(top, dim=1)
            for index, chances, classes in zip(part.tolist(), best.values.tolist(), best.indices.tolist(), strict=True):
                guesses = [(network.classes[label], chance) for label, chance in zip(classes, chances, strict=True)]
                predictions.append((index, Prediction(loader.data.file_name(index), guesses)))
            bar.update(len(part))
    bad = unreadable(loader.data)
    return [prediction for index, prediction in predictions if index not in bad]
