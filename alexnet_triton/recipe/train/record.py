"""What a run leaves to read: `log.csv`, and events for TensorBoard where that is installed."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
from pathlib import Path
from typing import Any

from alexnet_triton.recipe.train.settings import COLUMNS, History


class Record:
    """Writes a run's figures into its folder.

    Args:
        folder: of the run; `log.csv` and `events.out.tfevents...` are written there.
        step: steps that have been taken; later ones of an earlier process are taken back in TensorBoard.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        self._writer = _tensorboard(folder, step)

    @staticmethod
    def has_tensorboard() -> bool:
        """Whether events can be written."""
        return importlib.util.find_spec("tensorboard") is not None

    def step(self, number: int, loss: float, lr: float) -> None:
        """Note a step's loss and rate."""
        if self._writer is not None:
            self._writer.add_scalar("loss/step", loss, number)
            self._writer.add_scalar("lr", lr, number)

    def table(self, history: History) -> None:
        """Write `log.csv` anew, atomically: a row an epoch."""
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows({name: _number(row[name]) for name in COLUMNS} for row in history.epochs)
        temporary = self.folder / ".log.csv.writing"
        temporary.write_text(text.getvalue())
        os.replace(temporary, self.folder / "log.csv")

    def epoch(self, history: History) -> None:
        """Note the last epoch, and write `log.csv`."""
        self.table(history)
        if self._writer is not None:
            row = history.epochs[-1]
            for name in COLUMNS[3:]:
                self._writer.add_scalar(f"epoch/{name}", row[name], int(row["step"]))
            self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


def _number(value: float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)  # the first that is taken back
