"""Caffe's files: the weights of bvlc_alexnet and the mean of its images, read without Caffe and without protobuf.

Messages and the numbers of their fields are those of src/caffe/proto/caffe.proto in BVLC/caffe; names and shapes of the
layers those of models/bvlc_alexnet/train_val.prototxt there.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LAYERS: dict[str, tuple[str, tuple[int, ...]]] = {
    "conv1": ("features.0", (96, 3, 11, 11)),
    "conv2": ("features.3", (256, 48, 5, 5)),
    "conv3": ("features.6", (384, 256, 3, 3)),
    "conv4": ("features.8", (384, 192, 3, 3)),
    "conv5": ("features.10", (256, 192, 3, 3)),
    "fc6": ("classifier.1", (4096, 256 * 6 * 6)),
    "fc7": ("classifier.4", (4096, 4096)),
    "fc8": ("classifier.6", (1000, 4096)),
}
"""The name here and the weights' shape, by Caffe's name. fc8 may have any number of classes."""


def read_caffemodel(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights of bvlc_alexnet, or of a network trained from it, for `AlexNet(variant="caffe")`.

    Both formats are read, `layers` (the older one, bvlc_alexnet.caffemodel's) and `layer`. conv1 is turned
    from Caffe's B, G, R to R, G, B, so that the network takes RGB images: pixels from 0 to 255, less the mean of the
    training images (see `read_mean`). Groups, and the order in which fc6 takes the maps, are torch's as they are.
    The file is mapped, so that what is allocated is the parameters alone.

    Args:
        path: a binary NetParameter (`.caffemodel`).

    Returns:
        Parameters by name, float32, marked as of variant `"caffe"`.

    Raises:
        ValueError: there is no such file, or it is another kind of file, or it is cut short.
        RuntimeError: it is of another network: layers are missing, have other shapes, or come in another order.
    """
    with _mapped(path, "a caffemodel") as message:
        layers = list(_layers(message))
        blobs = {name: found for name, found in layers if found}
        _check_network(str(path), [name for name, _ in layers], blobs)
        state_dict: OrderedDict[str, Tensor] = OrderedDict()
        for name, (key, shape) in _LAYERS.items():
            weight, bias = _parameters(str(path), name, shape, [_blob(blob) for blob in blobs[name]])
            if name == "conv1":
                weight = weight[:, ::-1]
            for kind, values in (("weight", weight), ("bias", bias)):
                copied = np.array(values, dtype=np.float32, order="C")
                state_dict[f"{key}.{kind}"] = torch.from_numpy(copied)
    # As a state dict of the model would have it: shapes alone do not tell "caffe" from "paper".
    state_dict._metadata = {"": {"version": 1, "variant": "caffe"}}  # type: ignore[attr-defined]
    return state_dict


def read_mean(path: str | os.PathLike[str]) -> Tensor:
    """Read the mean of the images that a network was trained on, averaged over the image.

    Args:
        path: a binary BlobProto of 3xHxW numbers, B, G, R (`imagenet_mean.binaryproto`).

    Returns:
        (3,), float32, which are R, G and B of pixels from 0 to 255.

    Raises:
        ValueError: there is no such file, or it is another kind of file, or it is cut short.
    """
    with _mapped(path, "a mean image") as message:
        values = _trimmed(_blob(message), 3)
        if values.ndim != 3 or values.shape[0] != 3 or values.size == 0:
            raise ValueError(f"it has shape {values.shape}, expected (3, height, width)")
        mean = values.mean(axis=(1, 2), dtype=np.float64)
    return torch.from_numpy(mean[::-1].astype(np.float32))


def _check_network(path: str, names: list[str], blobs: dict[str, Any]) -> None:
    """Raise RuntimeError where layers are missing, or are not in the order of bvlc_alexnet."""
    missing = [name for name in _LAYERS if name not in blobs]
    if missing:
        present = ", ".join(map(repr, [*blobs][:10])) or "none"
        present += f" and {len(blobs) - 10} more" if len(blobs) > 10 else ""
        raise RuntimeError(
            f"{path!r} lacks parameters of {', '.join(map(repr, missing))}, which bvlc_alexnet has: its layers with "
            f"parameters are {present}"
        )
    if {"norm1", "pool1"} <= set(names) and names.index("pool1") < names.index("norm1"):
        raise RuntimeError(
            f"{path!r} is of a network that pools before it normalises, as CaffeNet does, and AlexNet(variant='caffe') "
            "normalises first: take bvlc_alexnet.caffemodel"
        )


def _parameters(path: str, name: str, shape: tuple[int, ...], blobs: list[Any]) -> tuple[Any, Any]:
    """A layer's weight and bias in the shapes that torch has for them, or RuntimeError."""
    found = [_trimmed(blob, rank) for blob, rank in zip(blobs, (len(shape), 1), strict=False)]
    if name == "fc8" and found[0].ndim == 2:
        shape = (found[0].shape[0], shape[1])
    expected = [shape, shape[:1]]
    shapes = [values.shape for values in found]
    if shapes != expected or len(blobs) != 2:
        raise RuntimeError(
            f"{path!r} has {name!r} with parameters of shapes {', '.join(str(blob.shape) for blob in blobs)}, and "
            f"bvlc_alexnet's are {shape}, {shape[:1]}: it is of another network"
        )
    return found[0], found[1]


def _trimmed(values: Any, rank: int) -> Any:
    """Without the leading ones that fill up the four dimensions of old files."""
    ones = max(0, values.ndim - rank)
    return values.reshape(values.shape[ones:]) if values.shape[:ones] == (1,) * ones else values


# --- messages of caffe.proto ------------------------------------------------------------------------------------------


@contextmanager
def _mapped(path: str | os.PathLike[str], kind: str) -> Iterator[memoryview]:
    """The bytes of a file, which are read when they are looked at; a ValueError about them comes to name the file."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file at {str(path)!r}")
    try:
        yield np.memmap(path, mode="r").data
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not {kind} or is damaged: {error}; download it again") from error


def _layers(network: memoryview) -> Iterator[tuple[str, list[memoryview]]]:
    """Name and blobs of each layer of a NetParameter, in the file's order."""
    fields = _fields(network)
    found = False
    # V1LayerParameter: name 4, blobs 6. LayerParameter: name 1, blobs 7.
    for number, name, blobs in ((2, 4, 6), (100, 1, 7)):
        for layer in _messages(fields, number):
            inner = _fields(layer)
            title = b"".join(bytes(text) for text in _messages(inner, name)[-1:])
            yield title.decode(errors="replace"), _messages(inner, blobs)
            found = True
    if not found:
        raise ValueError("it holds no layers")


def _blob(message: memoryview) -> Any:
    """The numbers of a BlobProto in their shape, still in the file."""
    fields = _fields(message)
    legacy = [_integers(fields, number) for number in (1, 2, 3, 4)]  # num, channels, height, width
    if any(legacy):
        shape = tuple(integers[-1] if integers else 0 for integers in legacy)
    else:
        shape = tuple(size for dims in _messages(fields, 7) for size in _integers(_fields(dims), 1))
    parts = _floats(fields, 8, "<f8") or _floats(fields, 5, "<f4")  # double_data, data
    values = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.float32), *parts])
    if math.prod(shape) != values.size:
        raise ValueError(f"{values.size:,} numbers stand where shape {shape} says {math.prod(shape):,}")
    return values.reshape(shape)


# --- protobuf's wire format: https://protobuf.dev/programming-guides/encoding -----------------------------------------

_Fields = dict[int, list[int | memoryview]]


def _fields(message: memoryview) -> _Fields:
    """The values of a message by their field's number: integers, and the bytes of whatever is none."""
    fields: _Fields = {}
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire_type = key >> 3, key & 7
        if wire_type not in (0, 1, 2, 5):
            raise ValueError(f"field {number} has wire type {wire_type}, which caffe.proto has not")
        value: int | memoryview
        if wire_type == 0:
            value, at = _varint(message, at)
        else:
            size, at = _varint(message, at) if wire_type == 2 else ({1: 8, 5: 4}[wire_type], at)
            value, at = message[at : at + size], at + size
            if at > len(message):
                raise ValueError(f"it is cut short by {at - len(message):,} bytes")
        fields.setdefault(number, []).append(value)
    return fields


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """An integer of seven bits a byte, the lowest first, and the place after it."""
    value = 0
    for place in range(10):
        if at + place >= len(message):
            raise ValueError("it is cut short within a number")
        byte = message[at + place]
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise ValueError("a number is longer than protobuf's 64 bits")


def _messages(fields: _Fields, number: int) -> list[memoryview]:
    """The messages, or texts, of a field."""
    values = fields.get(number, [])
    if any(isinstance(value, int) for value in values):
        raise ValueError(f"field {number} holds an integer where a message is expected")
    return values  # type: ignore[return-value]


def _integers(fields: _Fields, number: int) -> list[int]:
    """The integers of a field, packed or one by one."""
    integers: list[int] = []
    for value in fields.get(number, []):
        if isinstance(value, int):
            integers.append(value)
            continue
        at = 0
        while at < len(value):
            integer, at = _varint(value, at)
            integers.append(integer)
    return integers


def _floats(fields: _Fields, number: int, dtype: str) -> list[Any]:
    """The numbers of a field, packed or one by one, as arrays over the file's bytes; ValueError at half a number."""
    return [np.frombuffer(part, dtype) for part in _messages(fields, number) if len(part)]
