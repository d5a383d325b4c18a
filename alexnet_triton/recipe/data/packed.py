"""Packed datasets: images of one size as plain bytes in one file, read through a memory map, all of it checksummed.

A dataset is a folder:

    images.bin      a slot an image: S * S pixels of R, G, B, uint8, row by row
    labels.npy      (slots,), int64: the class of each; -1 where a bad image was passed over
    checksums.npy   (slots,), uint32: the CRC-32 of each slot
    names.txt       the file that each image came from, a line each
    offsets.npy     (slots + 1,), int64: where each line begins in names.txt
    dataset.json    size, classes, colours, the images passed over, the CRC-32 of the other files and of itself
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alexnet_triton.files import sync
from alexnet_triton.recipe.data.sets import DataError, ImageSet, Statistics

FORMAT, VERSION = "alexnet-triton packed images", 1

IMAGES, DATASET = "images.bin", "dataset.json"
LABELS, CHECKSUMS, NAMES, OFFSETS = "labels.npy", "checksums.npy", "names.txt", "offsets.npy"

PASSED_OVER = -1
"""The label of a slot whose image was bad."""

REPAIR = "copy it again, or make it again with `alexnet-triton prepare`"


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether a packed dataset, or what is left of one, is at `path`."""
    return any((Path(path) / name).is_file() for name in (DATASET, IMAGES))


def open_packed(path: str | os.PathLike[str]) -> PackedImages:
    """Open a packed dataset. Everything but the images is checked; they are when they are read.

    Raises:
        DataError: none is there, it is damaged, or a newer version of this package has written it.
        OSError: a file cannot be read.
    """
    return PackedImages(Path(path).absolute())


class PackedImages(ImageSet):
    """Images read from a packed dataset.

    A process keeps up to 21 bytes an image, and no pixels. Threads may read at once; to another process it goes as its
    path.

    Attributes:
        folder: where it is.
        skipped: names of the bad images that were passed over, with the reasons.
        source: a fingerprint of the files that it was made from.
        verify: whether an image is held to its checksum when it is read for the first time.
    """

    def __init__(self, folder: Path) -> None:
        content = _content(folder)
        self.folder = folder
        self.verify = True
        self.skipped: list[tuple[str, str]] = [(entry["file"], entry["reason"]) for entry in content["skipped"]]
        self.source: str = content["source"]
        self._identity: int = content["checksum"]
        self._statistics = Statistics(
            *(torch.tensor(content[name], dtype=torch.float32) for name in Statistics._fields)
        )
        for name, checksum in content["checksums"].items():
            if checksum_of(folder / name) != checksum:
                raise _damaged(folder, f"{name} does not have its checksum")
        labels = np.load(folder / LABELS)
        self._checksums = np.load(folder / CHECKSUMS)
        self._checked = np.zeros(len(labels), bool)
        good = np.flatnonzero(labels != PASSED_OVER)
        self._slots = None if len(good) == len(labels) else torch.from_numpy(good)
        size = content["size"]
        super().__init__(folder.name, tuple(content["classes"]), torch.from_numpy(labels[good]), size)
        self._map = _map(folder, len(labels) * size * size * 3)
        self._pixels = np.frombuffer(self._map, np.uint8).reshape(len(labels), -1)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.folder, self._identity, self.verify)

    def read(self, indices: Tensor) -> Tensor:
        """The images at `indices`: (B, 3, S, S), uint8, RGB, channels-last.

        Raises:
            DataError: an image does not have its checksum (its name is given).
            IndexError: an index is none of the images.
        """
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"{self.name!r} has images 0 to {len(self) - 1}, got {indices.tolist()}")
        slots = (indices if self._slots is None else self._slots[indices]).tolist()
        self._fetch(slots)
        images = torch.empty(len(slots), self.size, self.size, 3, dtype=torch.uint8)
        for pixels, slot in zip(images.flatten(1).numpy(), slots, strict=True):
            pixels[:] = self._pixels[slot]
            if self.verify and not self._checked[slot]:
                if zlib.crc32(pixels) != self._checksums[slot]:
                    raise _damaged(self.folder, f"in {IMAGES} {self._name(slot)!r} does not have its checksum")
                self._checked[slot] = True
        return images.permute(0, 3, 1, 2)

    def _fetch(self, slots: Sequence[int]) -> None:
        """Have the system fetch images from the disk, all at once; it would fetch page after page as they are read."""
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        length = self._pixels.shape[1]
        for slot in slots:
            start = slot * length
            page = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, start + length - page)

    def file_name(self, index: int) -> str:
        """The file that an image came from, in the folder of class folders."""
        return self._name(index if self._slots is None else int(self._slots[index]))

    def _name(self, slot: int) -> str:
        start, end = np.load(self.folder / OFFSETS, mmap_mode="r")[slot : slot + 2].tolist()
        with (self.folder / NAMES).open("rb") as file:
            file.seek(start)
            return _text(file.read(end - start - 1))

    def statistics(self, indices: Tensor | None = None) -> Statistics:
        """Of the colours of all the images, those at `indices` or not: they were taken when the dataset was made."""
        return self._statistics


def _reopen(folder: Path, identity: int, verify: bool) -> PackedImages:
    data = open_packed(folder)
    if data._identity != identity:
        raise DataError(f"{str(folder)!r} has become another dataset since it was opened: begin again")
    data.verify = verify
    return data


# --- files ------------------------------------------------------------------------------------------------------------


class Slots(NamedTuple):
    """What is known of each slot of a dataset."""

    labels: npt.NDArray[np.int64]
    """Indices of classes; `PASSED_OVER` where the image was bad."""
    checksums: npt.NDArray[np.uint32]
    names: Sequence[str]
    reasons: dict[int, str]
    """Why images were passed over, by slot."""


def seal(folder: Path, size: int, classes: Sequence[str], slots: Slots, colours: Statistics, source: str) -> None:
    """Make a folder that holds images.bin a packed dataset, in which everything is on the disk.

    Args:
        folder: the folder.
        size: side of the images in pixels.
        classes: names of the classes.
        slots: what images.bin holds.
        colours: of the images that are good.
        source: a fingerprint of the files that they were made from.
    """
    lines = [name.encode("utf-8", "surrogateescape") + b"\n" for name in slots.names]
    offsets = np.cumsum([0, *map(len, lines)], dtype=np.int64)
    for name, array in ((LABELS, slots.labels), (CHECKSUMS, slots.checksums), (OFFSETS, offsets)):
        np.save(folder / name, array)
    with (folder / NAMES).open("wb") as file:
        file.writelines(lines)
    sealed = (LABELS, CHECKSUMS, NAMES, OFFSETS)
    for name in (IMAGES, *sealed):
        sync(folder / name)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "size": size,
        "images": int((slots.labels != PASSED_OVER).sum()),
        "classes": list(classes),
        **{name: tensor.tolist() for name, tensor in colours._asdict().items()},
        "skipped": [{"file": slots.names[slot], "reason": reason} for slot, reason in sorted(slots.reasons.items())],
        "source": source,
        "checksums": {name: checksum_of(folder / name) for name in sealed},
    }
    written = folder / f"{DATASET}.writing"
    written.write_text(json.dumps({**content, "checksum": _checksum(content)}, indent=1), encoding="utf-8")
    sync(written)
    os.replace(written, folder / DATASET)
    sync(folder)


def checksum_of(path: Path) -> int:
    """The CRC-32 of a file."""
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            checksum = zlib.crc32(part, checksum)
    return checksum


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _content(folder: Path) -> dict[str, Any]:
    """What dataset.json says, once it is known to be whole."""
    if not is_packed(folder):
        raise DataError(f"there is no packed dataset at {str(folder)!r}: `alexnet-triton prepare` makes one")
    if not (folder / DATASET).is_file():
        raise DataError(
            f"{str(folder)!r} has {IMAGES} and no {DATASET}: its `alexnet-triton prepare` has not come to its end, or "
            "its copy; let it"
        )
    try:
        content = json.loads((folder / DATASET).read_text(encoding="utf-8"))
        checksum = content.pop("checksum")
        form, version = content["format"], content["version"]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _damaged(folder, f"{DATASET} is not what was written") from None
    if form == FORMAT and isinstance(version, int) and version > VERSION:
        raise DataError(
            f"{str(folder)!r} is a dataset of version {version}, and this alexnet-triton reads those up to {VERSION}: "
            "upgrade it, or make the dataset again with `alexnet-triton prepare`"
        )
    if form != FORMAT or checksum != _checksum(content):
        raise _damaged(folder, f"{DATASET} does not have its checksum")
    for name in content["checksums"]:
        if not (folder / name).is_file():
            raise _damaged(folder, f"{name} is missing")
    return {**content, "checksum": checksum}


def _map(folder: Path, length: int) -> mmap.mmap:
    """Map images.bin. Read-only: of a private map that can be written, Linux wants the whole length in memory."""
    try:
        with (folder / IMAGES).open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found == length:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise _damaged(folder, f"{IMAGES} is missing") from None
    raise _damaged(folder, f"{IMAGES} has {found:,} bytes in place of {length:,}")


def _damaged(folder: Path, what: str) -> DataError:
    return DataError(f"the packed dataset {str(folder)!r} is damaged: {what}; {REPAIR}")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
