"""Preparing images: a folder of class folders becomes a packed dataset, in parallel; after a kill it goes on.

All happens in `DST.partial`, which becomes DST at the very end. Processes write chunks of images into their places in
images.bin, and a journal notes each chunk that is done. What comes of it depends on the files alone: not on the number
of processes, nor on how often they were killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from alexnet_triton.files import sync
from alexnet_triton.recipe.data.chunks import Chunk, in_order
from alexnet_triton.recipe.data.images import BadImage, ClassFolders, FolderImages, class_folders
from alexnet_triton.recipe.data.journal import Journal, Made
from alexnet_triton.recipe.data.packed import (
    IMAGES,
    PASSED_OVER,
    PackedImages,
    Slots,
    is_packed,
    open_packed,
    seal,
)
from alexnet_triton.recipe.data.sets import ColourSums, DataError
from alexnet_triton.recipe.data.sources import train_and_val

CHUNK = 128
"""Images of a chunk: a second's work of a process, and no more is lost where one is killed."""

JOURNAL = "journal.txt"

NAMED = 5
"""Bad images that are named at the end."""


def prepare(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    size: int = 256,
    *,
    workers: int | None = None,
    skip_bad: bool = False,
    progress: bool = False,
) -> list[PackedImages]:
    """Make a packed dataset of a folder of class folders, or two of `train` and `val` inside it.

    Each image is made upright RGB, its shorter side scaled to `size`, its centre cropped. It takes 3 * size^2 bytes of
    disk: ImageNet's 1,281,167 images of 256 pixels take 251.9 GB. A call that was stopped, in whatever way, is
    gone on with by the same call; one that is complete is left as it is.

    Args:
        source: holds `CLASS/IMAGE`, or `train/CLASS/IMAGE` and `val/CLASS/IMAGE`.
        destination: a folder that is made; of two datasets, it holds `train` and `val`, with the classes of `train`.
        size: side of the images in pixels.
        workers: processes that decode; 0: this one does. Default: one a core.
        skip_bad: pass over images that cannot be decoded. The datasets' `skipped` names them.
        progress: say what is done, and show a progress bar.

    Returns:
        The dataset, or those of `train` and `val`.

    Raises:
        DataError: the images cannot be used, one is bad, or `destination` is there already, or another call works on
            it.
        OSError: a file cannot be read or written, or the disk has too little room.
    """
    if size < 1:
        raise ValueError(f"the side of the images must be at least 1 pixel, got {size}")
    source, destination = Path(source), Path(os.path.abspath(destination))
    say = print if progress else _silence
    parts = _parts(source, destination, size)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _alone(destination):
        if _is_there(destination):
            done = _opened(destination, parts)
            say(f"{str(destination)!r} is complete: nothing is left to do")
        else:
            done = _made(destination, parts, _cores() if workers is None else workers, skip_bad, progress)
    for data in done:
        say(_summary(data))
    return done


# --- what there is to do ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A dataset to be made."""

    name: str
    """Of its folder in the destination; empty where it is the destination."""
    found: ClassFolders
    size: int
    names: str
    """A fingerprint of the files' names, and of what is made of them."""
    source: str
    """The same with the files' sizes and times."""
    stamps: tuple[str, ...]
    """The same of the files of each chunk."""

    @property
    def slot(self) -> int:
        """Bytes of an image."""
        return 3 * self.size**2

    @property
    def bytes(self) -> int:
        """What it takes on the disk."""
        names = sum(len(name) for name in self.found.files)
        return len(self.found.files) * (self.slot + 20) + names  # label, checksum and offset take 20


def _parts(source: Path, destination: Path, size: int) -> list[Part]:
    """What is to be made, once it is known that it can be."""
    inside = train_and_val(source)
    if any(map(is_packed, (source, *(inside or ())))):
        raise DataError(f"{str(source)!r} is packed already, and a folder of class folders is needed")
    resolved = Path(os.path.realpath(source))
    if resolved in (real := Path(os.path.realpath(destination)), *real.parents):
        raise DataError(
            f"{str(destination)!r} lies in {str(source)!r}, where it would become a class: put it elsewhere"
        )
    if inside is None:
        return [_part("", class_folders(source), size)]
    train, val = (class_folders(folder) for folder in inside)
    labels = FolderImages(val, size).with_classes(train.classes).labels
    return [_part("train", train, size), _part("val", replace(val, classes=train.classes, labels=labels), size)]


def _part(name: str, found: ClassFolders, size: int) -> Part:
    files = found.files
    about = np.array([(s.st_size, s.st_mtime_ns) for s in (os.stat(found.folder / file) for file in files)], np.int64)
    names = _fingerprint([name, str(size), *found.classes, "", *files])
    parts = (slice(first, first + CHUNK) for first in range(0, len(files), CHUNK))
    stamps = tuple(_fingerprint(files[part], about[part].tobytes()) for part in parts)
    return Part(name, found, size, names, _fingerprint([names], about.tobytes()), stamps)


def _fingerprint(words: Sequence[str], numbers: bytes = b"") -> str:
    return hashlib.sha256(json.dumps(words).encode() + numbers).hexdigest()


def _is_there(destination: Path) -> bool:
    return destination.exists() and not (destination.is_dir() and not any(destination.iterdir()))


def _opened(destination: Path, parts: Sequence[Part]) -> list[PackedImages]:
    """The datasets that are there, where they are those that are to be made.

    Raises:
        DataError: they are not.
    """
    folders = [destination / part.name for part in parts]
    data = [open_packed(folder) for folder in folders] if all(map(is_packed, folders)) else []
    if [one.source for one in data] != [part.source for part in parts]:
        raise DataError(
            f"{str(destination)!r} is there already, and is not made of these files in this size: remove it, or name "
            "another"
        )
    return data


@contextmanager
def _alone(destination: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(f"{destination}.partial.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise DataError(f"another process is making {str(destination)!r}: wait for it, or stop it") from None
    try:
        yield
    finally:
        with suppress(OSError):  # where an open file cannot be removed, it stays
            os.unlink(lock.lock_file)
        lock.release()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _silence(_: str) -> None:
    pass


# --- the work ---------------------------------------------------------------------------------------------------------


def _made(destination: Path, parts: Sequence[Part], workers: int, skip_bad: bool, progress: bool) -> list[PackedImages]:
    """Make what is to be made, or the rest of it."""
    partial = destination.with_name(f"{destination.name}.partial")
    _check_room(partial, parts, progress)
    partial.mkdir(exist_ok=True)
    try:
        if (partial / JOURNAL).exists() or not _is_there(partial):
            _fill(partial, parts, workers, skip_bad, progress)
            (partial / JOURNAL).unlink()
        else:  # killed when all was done
            _opened(partial, parts)
    except BadImage as bad:
        raise DataError(
            f"{bad.name} is no image, or is damaged ({bad.reason}): mend it, or pass over such images by --skip-bad; "
            f"the same command then goes on with {str(partial)!r}"
        ) from bad
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; the same command goes on with {str(partial)!r}") from None
    os.replace(partial, destination)
    sync(destination.parent)
    return _opened(destination, parts)


def _check_room(partial: Path, parts: Sequence[Part], progress: bool) -> None:
    needed = sum(part.bytes for part in parts)
    there = sum(getattr(file.stat(), "st_blocks", 0) * 512 for file in partial.rglob(IMAGES)) if partial.is_dir() else 0
    free = shutil.disk_usage(partial.parent).free
    if progress:
        for part in parts:
            images, classes = len(part.found.files), len(part.found.classes)
            print(f"{str(part.found.folder)!r}: {images:,} images of {classes:,} classes")
        print(f"{_gigabytes(needed)} of disk at {part.size}x{part.size} pixels, {_gigabytes(free)} free")
    if needed - there > free:
        raise OSError(
            f"{str(partial.parent)!r} has {_gigabytes(free)} free, and {_gigabytes(needed - there)} are needed: free "
            "some, name another disk, or take a smaller --size"
        )


def _fill(partial: Path, parts: Sequence[Part], workers: int, skip_bad: bool, progress: bool) -> None:
    """Make all chunks that the journal does not have, and seal the datasets."""
    chunks = [chunk for part in parts for chunk in _chunks(part, partial / part.name / IMAGES)]
    try:
        journal = Journal(partial / JOURNAL, _fingerprint([str(CHUNK), *(part.names for part in parts)]))
    except DataError as error:
        raise DataError(
            f"{str(partial)!r} is left of another command, and {error}: remove it, or name another destination"
        ) from None
    with journal:
        for part in parts:
            _make_room(partial / part.name / IMAGES, len(part.found.files) * part.slot)
        made = _complete(journal, chunks, workers, skip_bad, progress)
    for part in parts:
        _seal(partial / part.name, part, [made.popleft() for _ in part.stamps])


def _chunks(part: Part, images: Path) -> Iterator[Chunk]:
    for number, stamp in enumerate(part.stamps):
        first = number * CHUNK
        yield Chunk(images, first, part.found.folder, part.found.files[first : first + CHUNK], part.size, stamp)


def _make_room(images: Path, length: int) -> None:
    images.parent.mkdir(exist_ok=True)
    with images.open("ab") as file:
        if file.tell() != length:
            file.truncate(length)


def _complete(journal: Journal, chunks: Sequence[Chunk], workers: int, skip_bad: bool, progress: bool) -> deque[Made]:
    """All the chunks, those that are new noted in the journal."""
    made: deque[Made] = deque()
    fresh, start = 0, time.monotonic()
    tasks = [(chunk, skip_bad, _known(journal, number, chunk, skip_bad)) for number, chunk in enumerate(chunks)]
    images = sum(len(chunk.files) for chunk in chunks)
    with (
        tqdm(total=images, desc="prepare", unit="img", disable=not progress) as bar,
        closing(in_order(tasks, workers)) as answers,
    ):
        for number, answer in enumerate(answers):
            if answer is not None:
                journal.add(number, answer)
                fresh += len(chunks[number].files)
            made.append(journal.made[number])
            bar.update(len(chunks[number].files))
    if progress:
        elapsed = max(1e-9, time.monotonic() - start)
        print(f"{fresh:,} images in {tqdm.format_interval(elapsed)}: {fresh / elapsed:,.0f} images/s")
    return made


def _known(journal: Journal, number: int, chunk: Chunk, skip_bad: bool) -> Made | None:
    """What the journal says of a chunk, where that is of these files, and welcome."""
    made = journal.made.get(number)
    return made if made and made.stamp == chunk.stamp and (skip_bad or not made.reasons) else None


# --- the end ----------------------------------------------------------------------------------------------------------


def _seal(folder: Path, part: Part, made: Sequence[Made]) -> None:
    """Make a part's folder a packed dataset.

    Raises:
        DataError: all the images of a class are bad.
    """
    found = part.found
    pairs = enumerate(made)
    reasons = {number * CHUNK + place: why for number, one in pairs for place, why in one.reasons.items()}
    labels = found.labels.numpy().copy()
    labels[list(reasons)] = PASSED_OVER
    if lost := sorted(set(found.labels.tolist()) - set(labels.tolist())):
        raise DataError(f"all images of class {found.classes[lost[0]]!r} of {str(found.folder)!r} are bad: mend them")
    sums = sum((one.sums for one in made), ColourSums.none())
    slots = Slots(labels, np.concatenate([one.checksums for one in made]), found.files, reasons)
    seal(folder, part.size, found.classes, slots, sums.statistics(), part.source)


def _summary(data: PackedImages) -> str:
    """What a dataset holds, in a few lines."""
    mean, std = (" ".join(f"{value:.4f}" for value in tensor) for tensor in data.statistics()[:2])
    lines = [
        f"{str(data.folder)!r}: {len(data):,} images of {len(data.classes):,} classes",
        f"  mean {mean}, standard deviation {std}, of R, G, B in [0, 1]",
    ]
    if data.skipped:
        lines.append(f"  {len(data.skipped):,} bad images passed over:")
        lines += [f"    {name} ({reason})" for name, reason in data.skipped[:NAMED]]
    if len(data.skipped) > NAMED:
        lines.append(f"    and {len(data.skipped) - NAMED:,} more, which dataset.json names")
    return "\n".join(lines)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
