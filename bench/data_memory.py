"""Memory of a process that reads a packed dataset: `python -m alexnet_triton.bench.data_memory FOLDER CROP`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alexnet_triton.bench.checks import Absent, Measure
from alexnet_triton.bench.results import checked
from alexnet_triton.recipe.data import packed
from alexnet_triton.recipe.data.packed import PackedImages, Slots
from alexnet_triton.recipe.data.sets import Statistics

STATUS = Path("/proc/self/status")

NAME = "memory after an epoch, packed"

SETS = (512, 2048)
"""Images of the two datasets whose epochs are compared."""

BATCH = 8
"""Small, since batches that happen to be under way at the end count."""

LIMIT = 0.05
"""Of the bytes of the larger set's further images, what a process may have grown by; to keep its images would be 1."""


def packed_set(folder: Path, images: int, size: int, block: bytes = b"") -> PackedImages:
    """Make a packed dataset of two classes whose content does not matter.

    Args:
        folder: of the dataset; made.
        images: how many.
        size: their side in pixels.
        block: an image's bytes, `3 * size**2`; empty for zeros, which take no room on most disks.
    """
    folder.mkdir(parents=True)
    slot = 3 * size**2
    with (folder / packed.IMAGES).open("wb") as file:
        if block:
            file.writelines(block for _ in range(images))
        file.truncate(images * slot)
    checksums = np.full(images, zlib.crc32(block or bytes(slot)), np.uint32)
    slots = Slots(np.arange(images) % 2, checksums, [f"{number % 2}/{number}" for number in range(images)], {})
    half = torch.full((3,), 0.5)
    packed.seal(folder, size, ("0", "1"), slots, Statistics(half, half, torch.zeros(3), torch.eye(3)), "generated")
    return packed.open_packed(folder)


def anonymous_bytes() -> int:
    """Memory of this process that no file backs.

    Raises:
        Absent: the system does not say.
    """
    try:
        lines = STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        raise Absent(f"RssAnon in {STATUS}") from None


def after_an_epoch(folder: Path, crop: int) -> int:
    """Anonymous memory, in bytes, of a fresh process that has read and augmented each image of a dataset once.

    Args:
        folder: of the dataset.
        crop: side of the network's input in pixels.
    """
    command = [sys.executable, "-m", "alexnet_triton.bench.data_memory", str(folder), str(crop)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return int(result.stdout)


def row(size: int, crop: int, sets: tuple[int, int] = SETS) -> dict[str, Any]:
    """The memory after an epoch of two datasets, one larger than the other, or why there is none.

    Args:
        size: side of the images in pixels.
        crop: side of the network's input in pixels.
        sets: images of the two.
    """
    about = {"stage": NAME, "images": list(sets)}
    try:
        anonymous_bytes()
    except Absent as absent:
        return {**about, "absent": str(absent)}
    found = []
    with tempfile.TemporaryDirectory(prefix="alexnet-triton-") as folder:
        for images in sets:
            data = packed_set(Path(folder) / str(images), images, size)
            found.append(after_an_epoch(data.folder, crop))
    growth = (found[1] - found[0]) / (3 * size**2 * (sets[1] - sets[0]))
    return {**about, **checked(Measure("growth", max(0.0, growth), LIMIT), lambda: {"bytes": found})}


def _main(folder: Path, crop: int) -> None:
    from alexnet_triton.recipe.augment import Augment, draw
    from alexnet_triton.recipe.data.loader import Loader

    data = packed.open_packed(folder)
    order = torch.randperm(len(data))
    augment, draws = Augment(data.statistics(), crop), draw(len(data), data.size, crop)
    parts = torch.arange(len(data)).split(BATCH)
    images = Loader(data, 2, torch.device("cpu")).batches(order[part] for part in parts)
    for part, read in zip(parts, images, strict=True):
        augment(read, draws.at(part))
    print(anonymous_bytes())


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
