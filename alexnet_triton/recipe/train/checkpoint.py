"""Checkpoints of a run, in its folder: the newest few, the best, and no half-written one."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from alexnet_triton.files import replaced

LAST, BEST = "last.pt", "best.pt"
STATE = {"settings", "run", "history", "step", "right", "rule", "velocities", "random"}
"""What a checkpoint has under `training`, beside the network."""

_NUMBERED = re.compile(r"checkpoint-(\d+)\.pt")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it and what to do."""


class Checkpoints:
    """The checkpoints of a run.

    `checkpoint-STEP.pt` is written at a step, `last.pt` is the newest and `best.pt` the best, other names of the same
    files where the file system has such (hard links), copies elsewhere.

    Args:
        folder: of the run; must exist.
        keep: how many of the newest are kept.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder, self.keep = folder, keep

    def save(self, content: dict[str, Any], step: int, best: bool = False) -> Path:
        """Write a checkpoint, give it its names, and remove the oldest.

        Args:
            content: tensors and plain types.
            step: steps that were taken before it.
            best: whether it is the best so far.

        Returns:
            The path of `last.pt`.
        """
        path = self.folder / f"checkpoint-{step:09d}.pt"
        write(path, content)
        _name_too(path, self.folder / LAST)
        if best:
            _name_too(path, self.folder / BEST)
        for old in self.numbered()[: -self.keep]:
            old.unlink(missing_ok=True)
        return self.folder / LAST

    def numbered(self) -> list[Path]:
        """The files of steps, the oldest first."""
        found = [path for path in self.folder.iterdir() if _NUMBERED.fullmatch(path.name)]
        return sorted(found, key=step_of)

    def newest(self) -> Path | None:
        """The newest checkpoint, or None where the run has none."""
        found = self.numbered()
        return found[-1] if found else None

    def clear_temporary(self) -> None:
        """Remove what a process that was killed while it wrote has left."""
        for path in self.folder.glob(".*.writing"):
            path.unlink(missing_ok=True)


def step_of(path: Path) -> int:
    """Steps that were taken before a checkpoint, as its name says."""
    return int(path.stem.split("-")[1])


def steps(content: dict[str, Any]) -> int:
    """The same, as its content says."""
    return len(content["training"]["history"]["step_loss"])


def write(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain types atomically: `path` is the old file or the new one, never half of one.

    Raises:
        OSError: the disk does not take it.
    """
    try:
        with replaced(path) as (new,), new.open("wb") as file:
            torch.save(content, file)
    except Exception as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch's own says "unexpected pos"
        if isinstance(cause, OSError):
            reason = f"{str(path)!r} could not be written ({cause.strerror}): make room; what was there before is whole"
            raise OSError(reason) from error
        raise


def read(path: Path) -> dict[str, Any]:
    """Read what `write` wrote; nothing in the file is run.

    Raises:
        CheckpointError: the file is missing, damaged, or no checkpoint of a run.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {str(path)!r}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):  # which tells how to run what is in the file
            reason = "it holds something else than tensors and plain types"
        raise CheckpointError(
            f"{str(path)!r} is no checkpoint, or is damaged ({reason}): remove it, and take an older one"
        ) from error
    training = content.get("training") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(training, dict) or not training.keys() >= STATE:
        raise CheckpointError(
            f"{str(path)!r} holds a network but no state of its training: --init-from starts from it, and "
            "--resume takes a checkpoint of a run"
        )
    return content


def _name_too(path: Path, other: Path) -> None:
    """Let `other` be the file at `path` as well, atomically."""
    temporary = other.with_name(f".{other.name}.writing")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, other)
