"""Files that are written whole or not at all, and never over another."""

from __future__ import annotations

import os
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
