"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017) from Debian's package, as an image set and as class folders."""

from __future__ import annotations

import functools
import gzip
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import FashionMNIST
from torchvision.transforms.v2 import functional as transform

from alexnet_triton.recipe.data.sets import ImageSet, LabelledImages

FOLDER = Path("/usr/share/datasets/fashion-mnist")
NOT_INSTALLED = "Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist"


@functools.cache
def fashion_mnist(train: bool, folder: Path = FOLDER) -> LabelledImages | None:
    """The 60,000 images to learn from or the 10,000 to test with, 28x28, grey made RGB; None where not installed.

    Classes are in the data set's order of labels. A slash in a name is a dash here, as names become folders.
    """
    paths = [folder / f"{'train' if train else 't10k'}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    if not all(path.is_file() for path in paths):
        return None
    pixels, labels = map(_read_idx, paths)
    images = torch.from_numpy(pixels).unsqueeze(1).expand(-1, 3, -1, -1)
    classes = tuple(name.replace("/", "-") for name in FashionMNIST.classes)
    return LabelledImages("Fashion-MNIST", images, torch.from_numpy(labels).long(), classes)


def write_folder(data: ImageSet, folder: Path, count: int, size: int) -> Path:
    """Write PNG files `folder/CLASS/INDEX.png` of `size` pixels a side, and return `folder`.

    They are the first images of every class, alike in number (one apart where `count` does not divide).
    """
    for index in _first_of_every_class(data.labels, count).tolist():
        image = transform.to_pil_image(data.read(torch.tensor([index]))[0])
        path = folder / data.classes[data.labels[index]] / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        transform.resize(image, [size, size]).save(path, compress_level=1)
    return folder


def _first_of_every_class(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of `count` images: of each class the first, then of each the second, and so on."""
    order = labels.argsort(stable=True)
    starts = torch.searchsorted(labels[order], labels[order])
    rank = torch.empty_like(labels)
    rank[order] = torch.arange(len(labels)) - starts
    return (rank * (labels.max() + 1) + labels).argsort()[:count]


def _read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format: two zeros, type 8 (bytes), the number of sizes, big-endian sizes, values."""
    with gzip.open(path) as file:
        content = file.read()
    rank = content[3]
    assert content[:3] == b"\0\0\x08", f"{path} is no IDX file of bytes"
    sizes = np.frombuffer(content, ">i4", rank, offset=4)
    return np.frombuffer(bytearray(content), np.uint8, offset=4 + 4 * rank).reshape(tuple(sizes))
