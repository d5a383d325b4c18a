"""Features of images: what a layer of a trained network makes of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from alexnet_triton.files import check_new, new_file
from alexnet_triton.recipe.augment import centre
from alexnet_triton.recipe.data.loader import Loader
from alexnet_triton.recipe.data.sets import DataError, ImageSet
from alexnet_triton.recipe.evaluate.evaluation import autocast_dtype
from alexnet_triton.recipe.evaluate.use import unreadable
from alexnet_triton.recipe.trained import Trained

LAYERS = ("conv5", "pool5", "fc6", "fc7")
"""Layers whose activations are features, each after its ReLU, as Caffe's blobs of these names are: `conv5` is the map
before the last pooling and `pool5` the one after it; `fc6` and `fc7` are 4,096 numbers, without dropout."""

ENDINGS = (".npy", ".safetensors")


@torch.no_grad()
def features(
    network: Trained, loader: Loader, parts: Sequence[Tensor], layer: str = "fc7", *, amp: bool = False
) -> Iterator[Tensor]:
    """Activations of a layer for the centre crops of images, as in evaluation.

    Args:
        network: on the loader's device.
        loader: reads the images.
        parts: indices of the images of each batch.
        layer: one of `LAYERS`.
        amp: compute in half precision where autocast does.

    Yields:
        Of each part (B, D), float32, on the loader's device; maps (C, H, W) are flattened in that order.

    Raises:
        ValueError: another layer, or a crop larger than the images.
        DataError: an image cannot be read.
    """
    if layer not in LAYERS:
        raise ValueError(f"features are those of {', '.join(LAYERS)}, got {layer!r}")
    device, model, size = loader.device, network.model, loader.data.size
    half = autocast_dtype(device) if amp else None
    augment = network.augment(half)
    centre(0, size, network.crop)  # a crop that does not fit is refused before any image is read
    for images in loader.batches(parts):
        x = augment(images, centre(len(images), size, network.crop))
        with torch.autocast(device.type, half, enabled=amp):
            if layer in ("fc6", "fc7"):
                x = model.get_feature_vector(x, layer)
            else:
                x = model.features[:12](x) if layer == "conv5" else model.features(x)
        yield x.flatten(1).float()


def write_features(
    path: Path,
    network: Trained,
    loader: Loader,
    layer: str = "fc7",
    *,
    batch_size: int = 128,
    amp: bool = False,
    progress: bool = False,
) -> tuple[int, int]:
    """Write the features of images to a file, a row an image.

    A `.npy` file is an array (N, D) of float32; the images' names are beside it in the same order, one a line, in a
    file of its name that ends in `.txt`. A `.safetensors` file has the array as `features`, and as metadata `files` (a
    list in JSON) and `layer`. The rows are gathered on the disk, so memory does not grow with the images (but when
    `.safetensors` are written).

    Args:
        path: of the file, which must be new; ends in `.npy` or `.safetensors`.
        network: on the loader's device.
        loader: reads the images; those that cannot be read and are passed over have no row.
        layer: one of `LAYERS`.
        batch_size: images at a time.
        amp: compute in half precision where autocast does.
        progress: show a progress bar.

    Returns:
        N and D.

    Raises:
        ValueError: another ending or layer, a crop larger than the images, or a name with a line break in it.
        FileExistsError: there is such a file.
        FileNotFoundError: there is no folder for it.
        DataError: an image cannot be read, or none can.
    """
    check_target(path)
    data = loader.data
    parts = torch.arange(len(data)).split(batch_size)
    # On the disk, because the number of rows is known at the end alone, and because they may be many.
    with new_file(path) as target, tempfile.TemporaryFile(dir=path.parent) as scratch:
        width = 0
        with tqdm(total=len(data), desc=layer, unit="img", disable=not progress) as bar:
            for part, values in zip(parts, features(network, loader, parts, layer, amp=amp), strict=True):
                kept = [row for row, index in enumerate(part.tolist()) if index not in unreadable(data)]
                scratch.write(values.cpu()[kept].numpy().tobytes())
                width = values.shape[1]
                bar.update(len(part))
        names = _names(data)
        if not names:
            raise DataError(f"none of the {len(data)} images can be read, so there are no features to write")
        scratch.flush()
        rows = np.memmap(scratch, np.float32, "r+", shape=(len(names), width))
        if path.suffix == ".npy":
            np.save(target, rows)
            with new_file(path.with_suffix(".txt")) as text:
                text.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        else:
            from safetensors.torch import save_file

            save_file({"features": torch.from_numpy(rows)}, target, {"files": json.dumps(names), "layer": layer})
    return len(names), width


def check_target(path: Path) -> None:
    """Say before any work that features could not be written to `path`; errors as of `write_features`."""
    if path.suffix not in ENDINGS:
        raise ValueError(f"features are written to a file that ends in {' or '.join(ENDINGS)}, got {path.name!r}")
    check_new([path, path.with_suffix(".txt")] if path.suffix == ".npy" else [path])


def _names(data: ImageSet) -> list[str]:
    names = [data.file_name(index) for index in range(len(data)) if index not in unreadable(data)]
    broken = next((name for name in names if "\n" in name), None)
    if broken is not None:
        raise ValueError(f"{broken!r} has a line break in its name, and names are written one a line: rename it")
    return names
