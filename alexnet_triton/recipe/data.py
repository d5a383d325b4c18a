"""Images with labels, held in memory as bytes: scanned digits, or a folder of class folders."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from PIL import Image


class DataError(ValueError):
    """A data set that cannot be used; the message names the path and what to do."""


@dataclass(frozen=True)
class LabelledImages:
    """Images of one size with their classes."""

    name: str
    images: Tensor
    """(N, 3, S, S), uint8, RGB."""
    labels: Tensor
    """(N,), int64, indices into `classes`."""
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> LabelledImages:
        """The images at `indices`, in that order."""
        return LabelledImages(self.name, self.images[indices], self.labels[indices], self.classes)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, (3,) and (3,), of pixels scaled to [0, 1]."""
        pixels = self.images.double() / 255
        deviation = pixels.std((0, 2, 3)).clamp_min(1e-3)
        return pixels.mean((0, 2, 3)).float(), deviation.float()


def digits(size: int = 67) -> LabelledImages:
    """The 1,797 scanned digits of scikit-learn (8x8 pixels, 16 levels), enlarged to `size` pixels a side.

    They are the test set of the UCI handwritten digits (Alpaydin and Kaynak, 1998).

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: pip install 'alexnet-triton[demo]', or "
            "give a folder of images"
        ) from error
    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)
    grey = F.interpolate(grey, size=(size, size), mode="bilinear", align_corners=False)
    images = grey.mul(255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(bunch.target).long()
    return LabelledImages("scikit-learn digits", images, labels, tuple(str(name) for name in bunch.target_names))


def image_folder(folder: str | os.PathLike[str], size: int = 128, *, progress: bool = False) -> LabelledImages:
    """Read a folder of class folders: `folder/CLASS/IMAGE`, of any format that Pillow reads.

    Each image is turned upright (EXIF), made RGB, scaled so that its shorter side has `size` pixels, and
    cropped to its centre. Hidden files are passed over. Memory: 3 * size^2 bytes an image.

    Args:
        folder: the folder; the names of its folders, sorted, are the classes.
        size: side of the images in pixels.
        progress: show a progress bar.

    Raises:
        DataError: the folder is missing or has fewer than two classes, a class has fewer than two images, or
            a file is no image (its path is named).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder of images at {str(folder)!r}")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _hidden(entry))
    if len(classes) < 2:
        raise DataError(
            f"{str(folder)!r} holds {len(classes)} class folders, and at least 2 are needed: put the images of "
            "each class into a folder of their own"
        )
    files = []
    for label, name in enumerate(classes):
        found = sorted(path for path in (folder / name).rglob("*") if path.is_file() and not _hidden(path))
        if len(found) < 2:
            raise DataError(
                f"{str(folder / name)!r} holds {len(found)} images, and at least 2 are needed: one to learn from "
                "and one to hold out"
            )
        files += [(path, label) for path in found]
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for index, (path, _) in enumerate(tqdm(files, "reading images", unit="img", disable=not progress)):
        images[index] = read_image(path, size)
    return LabelledImages(folder.name, images, torch.tensor([label for _, label in files]), tuple(classes))


def read_image(path: str | os.PathLike[str], size: int) -> Tensor:
    """Read one image as (3, size, size), uint8, RGB: upright, shorter side scaled to `size`, centre cropped.

    Raises:
        DataError: the file is no image, or is damaged.
    """
    return fit(decode(path), size)


def decode(source: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """Decode one image, of any format that Pillow reads: upright (EXIF) and RGB, on white where it is transparent.

    Args:
        source: its path, or a file of its bytes.

    Raises:
        DataError: it is no image, or is damaged.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(source) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
                image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
            image = image.convert("RGBA" if _transparent(opened) else "RGB")
    except Exception as error:
        name = repr(str(source)) if isinstance(source, str | os.PathLike) else "what was given"
        raise DataError(f"{name} is no image, or is damaged: remove it ({_first_line(error)})") from error
    if image.mode == "RGBA":
        backed = Image.new("RGB", image.size, "white")
        backed.paste(image, mask=image.getchannel("A"))
        image = backed
    return image


def fit(image: Image.Image, size: int) -> Tensor:
    """An image as (3, size, size), uint8: its shorter side scaled to `size`, its centre cropped."""
    from torchvision.transforms.v2 import functional as transform

    image = transform.resize(image, [size], antialias=True)
    return transform.pil_to_tensor(transform.center_crop(image, [size, size]))


def stratified_split(data: LabelledImages, held_out: float, seed: int = 0) -> tuple[LabelledImages, LabelledImages]:
    """Split into images to learn from and images held out, each class in the same proportion.

    Args:
        data: the images; each class has at least two.
        held_out: share to hold out, in (0, 1); the number is rounded up, and each class gives at least one
            and keeps at least one.
        seed: of the draw.

    Raises:
        ValueError: `held_out` is outside (0, 1).
    """
    if not 0 < held_out < 1:
        raise ValueError(f"the share to hold out must lie in (0, 1), got {held_out}")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    members = [order[data.labels[order] == label] for label in range(len(data.classes))]
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


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _transparent(image: object) -> bool:
    return getattr(image, "mode", "") in ("RGBA", "LA", "PA") or "transparency" in getattr(image, "info", {})


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
