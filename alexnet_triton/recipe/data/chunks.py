"""Chunks of a packed dataset: a few files, decoded into their slots of images.bin by one process of several."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from alexnet_triton.recipe.data.images import BadImage, read_image
from alexnet_triton.recipe.data.journal import Made
from alexnet_triton.recipe.data.sets import ColourSums
from alexnet_triton.workers import Task, WorkerDied, Workers


class Chunk(NamedTuple):
    """Files of which a process makes slots."""

    images: Path
    """The file that they are written into."""
    first: int
    """The first slot."""
    folder: Path
    files: tuple[str, ...]
    size: int
    stamp: str


def make(chunk: Chunk, skip_bad: bool, known: Made | None) -> Made | None:
    """Decode files into their slots.

    Args:
        chunk: the files.
        skip_bad: leave the slots of bad images 0.
        known: what an earlier process has noted of these slots.

    Returns:
        What to note; None where the slots hold what `known` says.

    Raises:
        BadImage: an image is bad, and not to be skipped.
        OSError: a file cannot be read or written.
    """
    length = 3 * chunk.size**2
    sums, checksums, reasons = ColourSums.none(), [], {}
    with chunk.images.open("r+b") as file:
        file.seek(chunk.first * length)
        if known is not None and all(zlib.crc32(file.read(length)) == checksum for checksum in known.checksums):
            return None
        file.seek(chunk.first * length)
        for place, name in enumerate(chunk.files):
            try:
                image = read_image(chunk.folder / name, chunk.size)
            except BadImage as bad:
                if not skip_bad:
                    raise
                reasons[place] = bad.reason
                pixels = bytes(length)
            else:
                sums += ColourSums.of(image[None])
                pixels = image.permute(1, 2, 0).numpy().tobytes()
            checksums.append(zlib.crc32(pixels))
            file.write(pixels)
    return Made(chunk.stamp, np.array(checksums, np.uint32), sums, reasons)


def in_order(tasks: Iterable[tuple[Chunk, bool, Made | None]], workers: int) -> Generator[Made | None, None, None]:
    """What `make` gives for each task, in order; processes are a few tasks ahead.

    Args:
        tasks: the arguments of `make`.
        workers: processes; 0: this one does it.

    Raises:
        RuntimeError: a process dies of a chunk.
        BadImage, OSError: as `make` does.
    """
    if not workers:
        yield from (make(*task) for task in tasks)
        return
    with Workers(workers, (__name__, "PIL.Image")) as pool:
        waiting: deque[tuple[Chunk, Task]] = deque()
        for task in tasks:
            waiting.append((task[0], pool.submit(_make_alone, *task)))
            if len(waiting) > 2 * workers:
                yield _answer(pool, *waiting.popleft())
        while waiting:
            yield _answer(pool, *waiting.popleft())


def _answer(pool: Workers, chunk: Chunk, task: Task) -> Made | None:
    try:
        made: Made | None = pool.result(task)
    except WorkerDied:
        raise RuntimeError(
            f"a process died twice of the files {chunk.files[0]!r} to {chunk.files[-1]!r} of {str(chunk.folder)!r}: "
            "one of them, or too little memory, ends it (decode them one by one to find it, or take fewer --workers), "
            "or the script that calls prepare() lacks its `if __name__ == '__main__':`"
        ) from None
    return made


def _make_alone(chunk: Chunk, skip_bad: bool, known: Made | None) -> Made | None:
    torch.set_num_threads(1)  # of a process a core
    return make(chunk, skip_bad, known)
