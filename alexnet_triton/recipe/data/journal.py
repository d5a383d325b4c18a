"""The journal of a preparation: a line for each chunk of images that is done, read back after a kill."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from alexnet_triton.recipe.data.sets import ColourSums, DataError


class Made(NamedTuple):
    """A chunk of images that is done."""

    stamp: str
    """A fingerprint of the files that it was made from: names, sizes, times."""
    checksums: npt.NDArray[np.uint32]
    """CRC-32 of each slot."""
    sums: ColourSums
    """Of the good images."""
    reasons: dict[int, str]
    """Why images are bad, by their place in the chunk."""


class Journal:
    """A file of lines, each with its CRC-32 before it; a line that is cut short, or damaged, is as good as none.

    Args:
        path: the file; begun where there is none.
        header: its first line, which says what is being made.

    Raises:
        DataError: it is the journal of something else.
    """

    def __init__(self, path: Path, header: str) -> None:
        found = _lines(path)
        if found and found[0] != header:
            raise DataError("it is of other images, or of another size")
        self.made: dict[int, Made] = dict(_parsed(line) for line in found[1:])
        """Chunks that are done, by number: what was true when they were written."""
        self._file = path.open("ab" if found else "wb")
        if not found:
            self._write(header)
        elif not path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")

    def add(self, number: int, made: Made) -> None:
        """Note that a chunk is done."""
        self.made[number] = made
        sums = [made.sums.pixels, made.sums.channels.tolist(), made.sums.products.tolist()]
        self._write(json.dumps([number, made.stamp, made.checksums.tolist(), sums, sorted(made.reasons.items())]))

    def _write(self, line: str) -> None:
        self._file.write(_checksum(line) + b" " + line.encode() + b"\n")
        self._file.flush()  # not to the disk: where that loses what it was given, checksums tell

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _lines(path: Path) -> list[str]:
    """The lines that are whole; none, where the first is not."""
    if not path.exists():
        return []
    pairs = [line.split(b" ", 1) for line in path.read_bytes().split(b"\n")]
    whole = [len(pair) == 2 and pair[0] == _checksum(pair[1]) for pair in pairs]
    return [pair[1].decode() for pair, good in zip(pairs, whole, strict=True) if good] if whole[0] else []


def _checksum(line: str | bytes) -> bytes:
    return b"%08x" % zlib.crc32(line.encode() if isinstance(line, str) else line)


def _parsed(line: str) -> tuple[int, Made]:
    number, stamp, checksums, (pixels, channels, products), reasons = json.loads(line)
    sums = ColourSums(pixels, torch.tensor(channels), torch.tensor(products))
    return number, Made(stamp, np.array(checksums, np.uint32), sums, dict(reasons))
