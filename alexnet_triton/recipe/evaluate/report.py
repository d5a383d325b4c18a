"""What an evaluation leaves to read: tables as CSV, the matrix as a picture, the figures as JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alexnet_triton.files import check_new, new_file
from alexnet_triton.recipe.data.sets import ImageSet
from alexnet_triton.recipe.evaluate import pictures
from alexnet_triton.recipe.evaluate.evaluation import BEST, Evaluation, Score

FILES = ("evaluation.json", "classes.csv", "classes.png", "confusion.csv", "confusion.png", "predictions.csv")


def check_folder(folder: Path) -> None:
    """Make the folder of a report where it is missing.

    Raises:
        FileExistsError: it holds a file of a report, or is itself a file.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{str(folder)!r} is a file, and --out needs a folder")
    folder.mkdir(parents=True, exist_ok=True)
    check_new(folder / name for name in FILES)


def write(folder: Path, evaluation: Evaluation, data: ImageSet, about: dict[str, Any]) -> None:
    """Write `FILES` into a folder.

    `classes.csv` has a row a class, `confusion.csv` a row a true class and a column a guessed one, in images, and
    `predictions.csv` a row an image, in the order of `data`.

    Args:
        folder: exists, and holds none of them (see `check_folder`).
        evaluation: of all images of `data`.
        data: the images, with the networks' classes.
        about: what `evaluation.json` says besides the figures.

    Raises:
        FileExistsError: one of the files is there.
    """
    score, names = evaluation.score, data.classes
    with new_file(folder / "predictions.csv") as path:
        columns = ("file", "true", "guess", "probability_of_guess", "probability_of_true")
        _write_csv(path, columns, _predictions(evaluation, data))
    with new_file(folder / "classes.csv") as path:
        header = ("class", "images", "top1", f"top{min(BEST, len(names))}", "most_confused_with", "times")
        _write_csv(path, header, per_class(score, names))
    with new_file(folder / "classes.png") as path:
        confusion, k = score.confusion.cpu(), min(BEST, len(names))
        pictures.per_class(confusion.diagonal(), score.best.cpu(), confusion.sum(1), names, k, path)
    with new_file(folder / "confusion.csv") as path:
        rows = ([name, *row] for name, row in zip(names, score.confusion.tolist(), strict=True))
        _write_csv(path, ("true \\ guess", *names), rows)
    with new_file(folder / "confusion.png") as path:
        pictures.confusion(score.confusion.cpu(), names, path)
    with new_file(folder / "evaluation.json") as path:
        path.write_text(json.dumps({**about, **figures(evaluation, len(names))}, indent=1) + "\n", encoding="utf-8")


def figures(evaluation: Evaluation, classes: int) -> dict[str, Any]:
    """The figures of an evaluation, those of each network alone among them; shares from 0 to 1, loss in nats."""

    def of(score: Score) -> dict[str, float]:
        top = f"top{min(BEST, classes)}"
        return {"top1": score.top1, top: score.top5, "cross_entropy": score.cross_entropy}

    images = evaluation.score.images
    return {
        **of(evaluation.score),
        "each": [of(score) for score in evaluation.members],
        "images": images,
        "classes": classes,
        "seconds": evaluation.seconds,
        "images_per_second": images / max(evaluation.seconds, 1e-9),
    }


def per_class(score: Score, names: tuple[str, ...]) -> list[tuple[str, int, str, str, str, int]]:
    """Of each class: name, images, shares among the best guess and the best few, and what it is most taken for.

    The last two are empty and 0 where no image was taken for another class, and shares are empty without images.
    """
    confusion, best = score.confusion.cpu(), score.best.cpu()
    images, right = confusion.sum(1), confusion.diagonal()
    wrong = confusion - torch.diag(right)
    times, other = wrong.max(1)
    rows = []
    for i, name in enumerate(names):
        shares = (_share(right[i], images[i]), _share(best[i], images[i]))
        rows.append((name, int(images[i]), *shares, names[int(other[i])] if times[i] else "", int(times[i])))
    return rows


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Text in columns: the first one to the left, the others to the right."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    first, *others = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], others, strict=True))])
        for line in lines
    )


def _predictions(evaluation: Evaluation, data: ImageSet) -> Iterable[tuple[object, ...]]:
    chances = evaluation.probabilities.tolist()
    for i, (guess, (of_guess, of_true)) in enumerate(zip(evaluation.guesses.tolist(), chances, strict=True)):
        true = data.classes[int(data.labels[i])]
        yield data.file_name(i), true, data.classes[guess], f"{of_guess:.6g}", f"{of_true:.6g}"


def _share(part: Tensor, whole: Tensor) -> str:
    return f"{int(part) / int(whole):.6g}" if whole else ""


def _write_csv(path: Path, header: Iterable[object], rows: Iterable[Iterable[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
