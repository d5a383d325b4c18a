"""Image files: decoded to right RGB, and read from a folder of class folders."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from alexnet_triton.recipe.data.sets import DataError, ImageSet

if TYPE_CHECKING:
    from PIL import Image


class BadImage(DataError):
    """A file that is no image, or is damaged.

    Attributes:
        name: what to call it.
        reason: what is wrong with it, in a few words.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} is no image, or is damaged: remove it ({self.reason})"


def read_image(path: str | os.PathLike[str], size: int) -> Tensor:
    """Read one image as (3, size, size), uint8, RGB: upright, shorter side scaled to `size`, centre cropped.

    Raises:
        BadImage: the file is no image, or is damaged, or its sides are too unlike.
        OSError: the file cannot be read.
    """
    image = decode(path)
    try:
        return fit(image, size)
    except ValueError as error:
        raise BadImage(repr(str(path)), str(error)) from error


def decode(source: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """Decode one image, of any format that Pillow reads: upright (EXIF) and RGB, on white where it is transparent.

    Of several frames the first is taken; 16 bits become 8; colour profiles are passed over.

    Args:
        source: its path, or a file of its bytes.

    Raises:
        BadImage: it is no image, is damaged, or has more than twice `PIL.Image.MAX_IMAGE_PIXELS` pixels, as a file
            made to fill the memory has.
        OSError: the file cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(source) as opened:
            return _upright_rgb(opened)
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of what the file holds
            raise
        name = repr(str(source)) if isinstance(source, str | os.PathLike) else "what was given"
        unknown = isinstance(error, UnidentifiedImageError)  # which would name the file once more
        raise BadImage(name, "of no format that Pillow reads" if unknown else _first_line(error)) from error


def _upright_rgb(opened: Image.Image) -> Image.Image:
    from PIL import Image, ImageOps

    if opened.mode == "F":
        raise ValueError("its pixels are floating-point numbers, and nothing says which of them is white")
    image = ImageOps.exif_transpose(opened)
    clear = opened.info.get("transparency")
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
        wide = np.asarray(image.convert("I")).clip(0, 65535)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
        if clear is not None:
            image.putalpha(Image.fromarray(np.where(wide == clear, 0, 255).astype(np.uint8)))
    elif clear is None and image.mode not in ("LA", "La", "PA", "RGBA", "RGBa"):
        return image.convert("RGB")
    image = image.convert("RGBA")
    backed = Image.new("RGB", image.size, "white")
    backed.paste(image, mask=image.getchannel("A"))
    return backed


def fit(image: Image.Image, size: int) -> Tensor:
    """An image as (3, size, size), uint8: its shorter side scaled to `size`, its centre cropped.

    The pixels are those of torchvision's `Resize(size)` and `CenterCrop(size)`.

    Raises:
        ValueError: one side is so much longer than the other that the image would be enlarged beyond
            `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    from PIL import Image

    shorter = min(image.size)
    width, height = (size * side // shorter for side in image.size)
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(
            f"of {image.width}x{image.height} pixels, which a shorter side of {size} would make {width}x{height}"
        )
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# --- folders ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassFolders:
    """The files of a folder of class folders, `folder/CLASS/IMAGE`; hidden ones are passed over."""

    folder: Path
    classes: tuple[str, ...]
    """Names of the folders, sorted."""
    files: tuple[str, ...]
    """Paths in `folder`, with `/` between their parts, class by class, sorted."""
    labels: Tensor
    """(N,), int64, indices into `classes`."""


def class_folders(folder: str | os.PathLike[str], least: int = 1) -> ClassFolders:
    """Find the files of a folder of class folders.

    Args:
        folder: holds `CLASS/IMAGE`.
        least: images that a class must have; the folder must have as many classes.

    Raises:
        DataError: the folder is missing, or has too few classes or too few images of one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder of images at {str(folder)!r}")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _hidden(entry.name))
    if len(classes) < least:
        raise DataError(
            f"{str(folder)!r} holds {len(classes)} class folders, and at least {least} are needed: put the images of "
            "each class into a folder of their own"
        )
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _files(folder / name)
        if len(found) < least:
            reason = "one to learn from and one to hold out" if least == 2 else "remove the folder, or fill it"
            raise DataError(
                f"{str(folder / name)!r} holds {len(found)} images, and at least {least} are needed: {reason}"
            )
        files += [f"{name}/{file}" for file in found]
        labels += [label] * len(found)
    return ClassFolders(folder, tuple(classes), tuple(files), torch.tensor(labels))


class FolderImages(ImageSet):
    """Images that are decoded whenever they are read, as `read_image` does."""

    def __init__(self, found: ClassFolders, size: int) -> None:
        super().__init__(found.folder.name, found.classes, found.labels, size)
        self.found = found

    def read(self, indices: Tensor) -> Tensor:
        """Decode images: (B, 3, S, S), uint8.

        Raises:
            DataError: a file is no image (its path is named).
        """
        paths = [self.found.folder / self.found.files[index] for index in indices.tolist()]
        images = [read_image(path, self.size) for path in paths]
        return torch.stack(images) if images else torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)

    def file_name(self, index: int) -> str:
        """The image's path in the folder."""
        return self.found.files[index]


def _files(folder: Path) -> list[str]:
    """The files in a folder and in those that it holds, sorted; a million take seconds."""
    found: list[str] = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _hidden(name)]
        inside = "" if Path(root) == folder else f"{Path(root).relative_to(folder).as_posix()}/"
        found += [inside + name for name in files if not _hidden(name) and os.path.isfile(os.path.join(root, name))]
    return sorted(found)


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
