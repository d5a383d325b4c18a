"""Where images come from: a packed dataset or a folder of class folders, told apart by what lies there."""

from __future__ import annotations

import os
from pathlib import Path

from alexnet_triton.recipe.data.images import FolderImages, class_folders
from alexnet_triton.recipe.data.packed import is_packed, open_packed
from alexnet_triton.recipe.data.sets import DataError, ImageSet


def open_images(path: str | os.PathLike[str], size: int = 256) -> ImageSet:
    """Open a packed dataset, or a folder of class folders, whose images are decoded whenever they are read.

    Args:
        path: where they are.
        size: side, in pixels, that the images of a folder are brought to; a packed dataset has its own.

    Raises:
        DataError: neither is there, it is damaged, or it holds one for training and one for validation.
    """
    path = Path(path)
    if is_packed(path):
        return open_packed(path)
    if not path.is_dir():
        raise DataError(f"there is no packed dataset and no folder of class folders at {str(path)!r}")
    if inside := train_and_val(path):
        raise DataError(f"{str(path)!r} holds two sets of images: name {str(inside[0])!r} or {str(inside[1])!r}")
    return FolderImages(class_folders(path), size)


def train_and_val(path: str | os.PathLike[str]) -> tuple[Path, Path] | None:
    """The folders `train` and `val` inside, where each is a packed dataset or holds folders as of classes."""
    train, val = Path(path) / "train", Path(path) / "val"
    return (train, val) if _holds_images(train) and _holds_images(val) else None


def _holds_images(path: Path) -> bool:
    if is_packed(path):
        return True
    return path.is_dir() and any(entry.is_dir() and not entry.name.startswith(".") for entry in path.iterdir())
