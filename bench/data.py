"""The input path, from files of images to the network's input: its stages and whole paths, and what a step asks of it.

The stages are `data_stages.STAGES`, the whole paths `data_paths.paths`.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, features

from alexnet_triton.bench import data_memory, results
from alexnet_triton.bench.checks import Absent
from alexnet_triton.bench.data_paths import IMAGE_FOLDER, PACKED_IMAGES, paths
from alexnet_triton.bench.data_stages import DEVICE, FOLDERS, PACKED, PIXELS, STAGES, WORKER, Material, Stage, generate
from alexnet_triton.bench.model import TASKS
from alexnet_triton.bench.plans import device_of
from alexnet_triton.bench.plots import files
from alexnet_triton.bench.results import OURS, Rows, checked
from alexnet_triton.bench.timing import duration, heading, in_turn, summary
from alexnet_triton.recipe import augment

METHOD = (
    "Random images with a photograph's spectrum, as files in the system's memory, each stage alone with its input at "
    "hand, after a check of its output against the pixels that the data set reads, or against float64. What a worker "
    "does takes one thread, the rest torch's. Whole paths are epochs, taken in turn; a DataLoader's processes are "
    "there already."
)

SECONDS = 40.0
"""After which no round begins, once three have been counted: a machine that does other things too takes its time."""

AIM = 5
"""What packed images, augmented, are to be over ImageFolder with the same augmentation."""


# --- the rows ---------------------------------------------------------------------------------------------------------


def rows_of(stages: Sequence[Stage], material: Material, rounds: int) -> list[dict[str, Any]]:
    """The times of stages for all their images, taken in turn, or why one has none.

    All are done by the same: a worker, the host or the device.
    """
    rows, works = [], {}
    for stage in stages:
        row: dict[str, Any] = {"stage": stage.name, "where": stage.where, "ways": list(stage.ways)}
        row |= {"whole": stage.whole, "images": stage.images(material)}
        rows.append(row)
        try:
            outputs = stage.begin(material)
        except Absent as absent:
            row["absent"] = str(absent)
            continue
        row |= checked(stage.check(material, outputs()), dict)
        if "failed" not in row:
            works[stage.name] = lambda outputs=outputs: deque(outputs(), maxlen=0)
    if not works:
        return rows
    with _threads(1 if stages[0].where == WORKER else torch.get_num_threads()):
        device = material.device if stages[0].where == DEVICE else "cpu"
        samples = in_turn(works, rounds, device, seconds=SECONDS)
    for row in rows:
        if row["stage"] in samples:
            row["times"] = {OURS: summary(samples[row["stage"]])}
    return rows


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Within the block torch's ops on the CPU take so many threads."""
    kept = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(kept)


def needed(places: Iterable[Path]) -> dict[str, Any] | None:
    """The most images a second that a training step asked for, of the first of `places` that is there.

    Args:
        places: files of `bench model`.

    Returns:
        `images_per_second`, with the row's `variant`, `dtype` and `batch`, and the file's `device` and `date`; None
        where no file is, or it has no training step.

    Raises:
        ValueError: the file is no result of `bench model`.
    """
    for path in places:
        if not path.exists():
            continue
        result = files.read(path, ["model"])
        steps = [row for row in result.rows if row["task"] == TASKS[1] and OURS in row["times"]]
        if not steps:
            return None
        row = max(steps, key=_rate)
        facts = {name: row[name] for name in ("variant", "dtype", "batch")}
        where = {name: result.machine.get(name) for name in ("device", "date")}
        return {"images_per_second": _rate(row), **facts, **where}
    return None


def _rate(row: Mapping[str, Any]) -> float:
    """Images a second, of a row of a network or of a stage."""
    images: int = row["batch"] if "batch" in row else row["images"]
    return float(images / row["times"][OURS]["median"])


def cases(
    material: Material, workers: Sequence[int], rounds: int, sets: tuple[int, int] = data_memory.SETS
) -> Iterator[tuple[str, Rows]]:
    """The stages by name, each with a function that measures its row; then the whole paths, and the memory."""
    for stage in STAGES:
        yield stage.name, lambda stage=stage: rows_of([stage], material, rounds)  # type: ignore[misc]
    whole = [path for of_one in zip(*map(paths, workers), strict=True) for path in of_one]
    yield "whole paths", lambda: rows_of(whole, material, rounds)
    yield data_memory.NAME, lambda: [data_memory.row(material.size, material.crop, sets)]


def default_workers() -> tuple[int, ...]:
    """None, then powers of two up to one a core."""
    cores = os.cpu_count() or 1
    return 0, *sorted({2**power for power in range(cores.bit_length())} | {cores})


def run(
    out: Path,
    images: int = 64,
    batch: int = 32,
    workers: Sequence[int] | None = None,
    rounds: int = 7,
    size: int = 256,
    crop: int = 227,
    device: str | None = None,
    *,
    pixels: tuple[int, int] = PIXELS,
    sets: tuple[int, int] = data_memory.SETS,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure the input path, print a table, and write `out/data.json`, anew after every row.

    What a training step needs is read from `out/model.json`, else from this repository's `bench/results`.

    Args:
        out: folder of the JSON file; made where it is missing.
        images: generated, into a folder that is removed at the end.
        batch: images of a batch.
        workers: of whole paths; None: `default_workers`.
        rounds: samples of each time; fewer, at least three, where they would take more than `SECONDS`.
        size: side that the images are brought to, in pixels.
        crop: side of the network's input, in pixels.
        device: where batches go; None: this machine's GPU, or its CPU where it has none.
        pixels: width and height of the files.
        sets: images of the datasets whose memory is compared.
        progress: show a progress bar.

    Raises:
        ValueError: a number below 1, workers below 0, a crop larger than the images, or a `model.json` that is none.
    """
    named = {"number of images": images, "batch": batch, "number of rounds": rounds, "size": size}
    for name, value in named.items():
        if value < 1:
            raise ValueError(f"the {name} must be at least 1, got {value}")
    for value in workers or ():
        if value < 0:
            raise ValueError(f"the number of workers must be at least 0, got {value}")
    augment.centre(0, size, crop)  # says what is wrong with a crop
    where = device_of(device)
    path = out / "data.json"
    head = results.envelope("data", where, METHOD)
    head["machine"]["pillow"] = _pillow()
    head["needed"] = needed([out / "model.json", Path(__file__).with_name("results") / "model.json"])
    with tempfile.TemporaryDirectory(prefix="alexnet-triton-") as folder:
        material = generate(Path(folder), images, size, crop, batch, where, pixels)
        head["files"] = {
            "width": pixels[0], "height": pixels[1], "size": size, "crop": crop, "batch": batch,
            "bytes": {form: sum(map(len, held)) / images for form, held in material.encoded.items()},
        }  # fmt: skip
        chosen = default_workers() if workers is None else tuple(dict.fromkeys(workers))
        result = results.measure_cases(path, head, list(cases(material, chosen, rounds, sets)), progress)
    print(format_result(result))
    print(f"written to {path}")
    return result


def _pillow() -> str:
    """Pillow's version, and that of what decodes JPEG for it."""
    turbo = features.version_feature("libjpeg_turbo")
    return f"{Image.__version__} ({f'libjpeg-turbo {turbo}' if turbo else 'libjpeg without turbo'})"


# --- the table --------------------------------------------------------------------------------------------------------


def format_result(result: Mapping[str, Any]) -> str:
    """The result as a table of text, and what limits."""
    form = result["files"]
    sizes = ", ".join(f"{name} {mean / 1e3:,.0f} kB" for name, mean in form["bytes"].items())
    timed = [row for row in result["rows"] if "times" in row]
    totals = {way: sum(1 / _rate(row) for row in timed if way in row["ways"]) for way in (FOLDERS, PACKED)}
    lines = [
        f"The input path: {heading(result['machine'])}, pillow {result['machine']['pillow']}",
        f"{form['width']}x{form['height']} ({sizes}) to {form['size']}x{form['size']}, cut to "
        f"{form['crop']}x{form['crop']}, batches of {form['batch']}",
        f"{'':30}{'an image':>12}{'of folders':>12}{'of packed':>12}{'images/s':>11}",
    ]
    for row in result["rows"]:
        lines.append(f"{row['stage']:30}{_cells(row, totals)}")
    return "\n".join([*lines, *_ratio(timed), *_limits(result, timed)])


def _cells(row: Mapping[str, Any], totals: Mapping[str, float]) -> str:
    """What stands behind a row's name."""
    if "times" in row:
        seconds = 1 / _rate(row)
        shares = [f"{seconds / total:.0%}" if way in row["ways"] else "-" for way, total in totals.items()]
        return f"{duration(seconds):>12}{''.join(f'{share:>12}' for share in shares)}{1 / seconds:>11,.0f}"
    if "bytes" in row:
        pairs = zip(row["images"], row["bytes"], strict=True)
        return "  " + ", ".join(f"{held / 1e6:,.0f} MB ({images:,} images)" for images, held in pairs)
    return f"  no figure: {row['failed']}" if "failed" in row else f"  absent: {row['absent']}"


def _fastest(timed: Sequence[Mapping[str, Any]], whose: str) -> Mapping[str, Any] | None:
    return max((row for row in timed if row["whole"] == whose), key=_rate, default=None)


def _ratio(timed: Sequence[Mapping[str, Any]]) -> list[str]:
    """What packed images are over torchvision's ImageFolder, each with as many workers as suit it."""
    ours, theirs = (_fastest(timed, whose) for whose in (PACKED_IMAGES, IMAGE_FOLDER))
    if ours is None or theirs is None:
        return []
    ratio = _rate(ours) / _rate(theirs)
    return [f"{ours['stage']}, over {theirs['stage']}, with the same augmentation: {ratio:.1f} times (aim: {AIM})."]


def _limits(result: Mapping[str, Any], timed: Sequence[Mapping[str, Any]]) -> list[str]:
    """What an image's way goes to, what a training step takes, and which of the two is behind."""
    lines = []
    for way, whose in ((FOLDERS, "from folders"), (PACKED, "when packed")):
        path = [row for row in timed if way in row["ways"]]
        lines += [f"Most of an image's way {whose}: {min(path, key=_rate)['stage']}."] if path else []
    asked = result["needed"]
    if asked is None:
        return [*lines, "What a training step takes is not known: alexnet-triton bench model writes it."]
    device = result["machine"]["device"]
    rate = asked["images_per_second"]
    lines.append(
        f"A training step takes {rate:,.0f} images/s ({asked['variant']}, {asked['dtype']}, batch {asked['batch']:,}, "
        f"{asked['device']}, {asked['date']})."
    )
    if asked["device"] != device:
        return [*lines, "That is another machine's, so it says nothing of what limits here."]
    best = _fastest(timed, PACKED_IMAGES)
    if best is not None:
        behind = "the network is what limits" if _rate(best) >= rate else "reading is what limits"
        shared = ", though both want the same cores" if device.startswith("CPU") else ""
        lines.append(f"{best['stage']}: {_rate(best) / rate:.2g} times that; {behind}{shared}.")
    return lines
