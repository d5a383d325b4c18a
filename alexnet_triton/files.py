"""Files that are written whole or not at all: new ones, and ones in the place of others."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def check_new(paths: Iterable[Path]) -> None:
    """Say before any work that a file could not be written.

    Raises:
        FileExistsError: one of the files is there.
        FileNotFoundError: the folder of one is not.
    """
    for path in paths:
        if path.exists():
            raise FileExistsError(
                f"{str(path)!r} is there already, and nothing is overwritten: remove it, or name another"
            )
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {str(path.parent)!r} for {path.name!r}: make it first")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write in the place of `path`, with its ending, which becomes `path` when the block ends well.

    Raises:
        FileExistsError: `path` is there, or has come to be.
        FileNotFoundError: its folder is not.
    """
    check_new([path])
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, mode)  # as the system has it for new files, whatever a library made of it
        try:
            os.link(temporary, path)  # unlike a renaming, it fails where another file has come in between
        except OSError:  # as it does on a file system without links
            check_new([path])
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Files to write, which take the places of `paths` when the block ends well.

    Whoever reads one of `paths` sees the old file or the new one, never half of one, and so does the next reader after
    a kill or a power cut. All are on the disk before the first takes its place.

    Raises:
        OSError: the folder is missing, or the disk does not take them.
    """
    token = f"{os.getpid()}.{secrets.token_hex(4)}"
    temporary = tuple(path.with_name(f".{path.name}.{token}.writing") for path in paths)
    try:
        modes = []
        for new in temporary:
            new.touch(exist_ok=False)
            modes.append(new.stat().st_mode)
        yield temporary
        for new, mode in zip(temporary, modes, strict=True):
            os.chmod(new, mode)  # as the system has it for new files, whatever a library made of it
            sync(new)
        for new, path in zip(temporary, paths, strict=True):
            os.replace(new, path)
    finally:
        for new in temporary:
            new.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of them, is on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # where folders cannot be opened
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
