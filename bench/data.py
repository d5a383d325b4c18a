"""The input path, stage by stage: from files of images to the network's input, and what a training step asks of it.

`STAGES` is the list. A stage finds what comes before it done, does its work for every image, and is held to the pixels
that `recipe.data.read_image` gives. Whoever adds a way for images to travel adds a stage.
"""

from __future__ import annotations

import io
import itertools
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, features
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from alexnet_triton.bench import results
from alexnet_triton.bench.checks import Absent, Measure
from alexnet_triton.bench.model import TASKS
from alexnet_triton.bench.plans import device_of
from alexnet_triton.bench.plots import files
from alexnet_triton.bench.results import OURS, Rows, checked
from alexnet_triton.bench.timing import duration, heading, in_turn, summary
from alexnet_triton.recipe.data import LabelledImages
from alexnet_triton.recipe.evaluate import Normalise
from alexnet_triton.recipe.images import decode, fit, read_image

PIXELS = (500, 375)
"""Width and height of the generated images: ImageNet's most common size."""

QUALITY = 92
"""Of the JPEG files, at which they have some 110 kB, as ImageNet's (138 GB, 1,281,167 images) have."""

METHOD = (
    "Random images with a photograph's spectrum, as files in the system's memory, each stage alone with its input at "
    "hand, after a check of its output against the pixels that the data set reads. What a worker of a DataLoader does "
    "takes one thread, the rest torch's. The whole path is an epoch of a DataLoader whose workers are there already."
)


# --- what is worked on ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Material:
    """Generated images, and what each stage finds done before it. N images of 3 channels, S pixels a side."""

    pixels: list[Tensor]
    """As drawn: (H, W, 3), uint8."""
    paths: Mapping[str, list[Path]]
    """Their files, by format: `"JPEG"`, `"PNG"`."""
    encoded: Mapping[str, list[bytes]]
    """What the files hold, by format."""
    decoded: list[Image.Image]
    """From the JPEG files."""
    data: LabelledImages
    """As the data set reads them from the JPEG files: what every stage is held to."""
    normalise: Normalise
    batch: int
    device: torch.device

    @property
    def size(self) -> int:
        """S."""
        return self.data.images.shape[-1]

    def batches(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """A tensor of N images, or what belongs to them, in batches."""
        return tensor.split(self.batch)


def photograph(width: int, height: int, generator: torch.Generator) -> Tensor:
    """A random image, (height, width, 3), uint8, whose spectrum falls off as a photograph's does."""
    rows, columns = torch.fft.fftfreq(height)[:, None] * height, torch.fft.rfftfreq(width) * width
    frequency = (rows.square() + columns.square()).sqrt()
    frequency[0, 0] = torch.inf  # the mean is given below
    noise = torch.view_as_complex(torch.randn(4, height, width // 2 + 1, 2, generator=generator))
    maps = torch.fft.irfft2(noise / frequency**1.2, s=(height, width))
    grey, colour = (maps / maps.std((1, 2), keepdim=True)).tensor_split([1])
    image = (0.5 + 0.2 * grey + 0.06 * colour).clamp(0, 1)
    return image.mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous()


def generate(
    folder: Path, images: int, size: int, batch: int, device: torch.device, pixels: tuple[int, int] = PIXELS
) -> Material:
    """Draw images, write them into `folder`, and do every stage once.

    Args:
        folder: of the files; must exist.
        images: how many.
        size: side that the data set gives them, in pixels.
        batch: images of a batch.
        device: where batches go.
        pixels: width and height of the files.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = [photograph(*pixels, generator) for _ in range(images)]
    paths: dict[str, list[Path]] = {}
    for form, options in (("JPEG", {"quality": QUALITY}), ("PNG", {})):
        paths[form] = [folder / f"{number}.{form.lower()}" for number in range(images)]
        for path, image in zip(paths[form], drawn, strict=True):
            Image.fromarray(image.numpy()).save(path, form, **options)
    encoded = {form: [path.read_bytes() for path in of_form] for form, of_form in paths.items()}
    read = torch.stack([read_image(path, size) for path in paths["JPEG"]])
    data = LabelledImages("generated", read, torch.arange(images) % 10, tuple("0123456789"))
    normalise = Normalise(*data.statistics()[:2]).to(device)
    return Material(drawn, paths, encoded, [decode(p) for p in paths["JPEG"]], data, normalise, batch, device)


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """The images of some files with their labels, over and over.

    Args:
        paths: of the files.
        labels: their classes.
        size: side of the images in pixels.
        length: of the data set.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], size: int, length: int) -> None:
        self.paths, self.labels, self.size, self.length = paths, labels, size, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        number = index % len(self.paths)
        return read_image(self.paths[number], self.size), self.labels[number]


# --- the stages -------------------------------------------------------------------------------------------------------


WORKER, HOST, DEVICE = "a worker", "the host", "the device"
"""A worker of a DataLoader has one thread, the process that trains has torch's, and the device what it has."""


class Stage(NamedTuple):
    """A stage of the input path."""

    name: str
    begin: Callable[[Material], Callable[[], Iterable[Any]]]
    """Gets ready, and gives what does the stage: at each call for every image, its outputs as they come.

    Raises `Absent` where the machine lacks what it needs.
    """
    check: Callable[[Material, Iterable[Any]], Measure]
    """Of the outputs of one call."""
    on_path: bool = True
    """Whether images pass through it on their way; the others stand beside it for comparison."""
    where: str = WORKER
    """Who does it: `WORKER`, `HOST` or `DEVICE`."""
    images: Callable[[Material], int] = lambda material: len(material.data)
    """How many a call does."""
    workers: int | None = None
    """Processes that read, of a whole path."""


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors; infinite where shape or dtype are not the same."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    return (found.cpu().double() - expected.cpu().double()).abs().max().item()


def worst(
    name: str,
    limit: float,
    found: Iterable[Any],
    expected: Iterable[Any],
    error: Callable[[Any, Any], float] = off,
) -> Measure:
    """The output that differs most from what is expected; one too few or too many is infinitely off."""
    pairs = itertools.zip_longest(found, expected)
    errors = [float("inf") if a is None or b is None else error(a, b) for a, b in pairs]
    return Measure(name, max(errors, default=float("inf")), limit)


def _each(function: Callable[[Any], Any], of: Callable[[Material], Iterable[Any]]) -> Callable[[Material], Any]:
    """The `begin` of a stage that is a function of each of its inputs."""

    def begin(material: Material) -> Callable[[], Iterable[Any]]:
        inputs = list(of(material))
        return lambda: map(function, inputs)

    return begin


def _check_bytes(material: Material, found: Iterable[Any]) -> Measure:
    return worst("bytes of a file", 0.0, found, material.encoded["JPEG"], lambda a, b: float(a != b))


def _check_jpeg(material: Material, found: Iterable[Any]) -> Measure:
    return worst("pixels", 0.0, (fit(image, material.size) for image in found), material.data.images)


def _check_png(material: Material, found: Iterable[Any]) -> Measure:
    return worst("pixels", 0.0, (torch.from_numpy(np.array(image)) for image in found), material.pixels)


def _check_pixels(material: Material, found: Iterable[Any]) -> Measure:
    return worst("pixels", 0.0, found, material.data.images)


def _read(material: Material) -> Callable[[], Iterable[Any]]:
    return lambda: (read_image(path, material.size) for path in material.paths["JPEG"])


def _check_read(material: Material, found: Iterable[Any]) -> Measure:
    """By torch's own resizing of the pixels as drawn; on the mean over an image, since JPEG loses some."""
    return worst("pixels on average", 6.0, found, material.pixels, _off_the_drawn)


def _off_the_drawn(image: Tensor, drawn: Tensor) -> float:
    size = image.shape[-1]
    height, width, _ = drawn.shape
    sides = [int(side * size / min(height, width)) for side in (height, width)]
    whole = F.interpolate(drawn.permute(2, 0, 1)[None].float(), sides, mode="bilinear", antialias=True)[0]
    top, left = (round((side - size) / 2) for side in sides)
    expected = whole[:, top : top + size, left : left + size]
    if image.shape != expected.shape or image.dtype != torch.uint8:
        return float("inf")
    return (image.float() - expected).abs().mean().item()


def _samples(material: Material) -> list[list[tuple[Tensor, int]]]:
    pairs = list(zip(material.data.images, material.data.labels.tolist(), strict=True))
    return [pairs[start : start + material.batch] for start in range(0, len(pairs), material.batch)]


def _check_collated(material: Material, found: Iterable[Any]) -> Measure:
    images, labels = zip(*found, strict=True)
    expected = (*material.batches(material.data.images), *material.batches(material.data.labels))
    return worst("batches", 0.0, (*images, *labels), expected)


def _from_memory(material: Material) -> Callable[[], Iterable[Any]]:
    order = torch.randperm(len(material.data), generator=torch.Generator().manual_seed(1))
    return lambda: ((i, material.data.images[i]) for i in order.split(material.batch))


def _check_from_memory(material: Material, found: Iterable[Any]) -> Measure:
    indices, batches = zip(*found, strict=True)
    back = torch.cat(batches)[torch.cat(indices).argsort()]
    return worst("pixels", 0.0, back, material.data.images)


def _to_device(material: Material) -> Callable[[], Iterable[Any]]:
    if material.device.type == "cpu":
        raise Absent("no GPU: a batch stays where it is")
    batches = material.batches(material.data.images)
    return lambda: (batch.to(material.device) for batch in batches)


def _check_batches(material: Material, found: Iterable[Any]) -> Measure:
    return worst("pixels", 0.0, found, material.batches(material.data.images))


def _normalise(material: Material) -> Callable[[], Iterable[Any]]:
    batches = [batch.to(material.device) for batch in material.batches(material.data.images)]
    return lambda: map(material.normalise, batches)


NORMALISED = 1e-5
"""What a normalised pixel, whose standard deviation is 1, may be off by."""


def _normalised(material: Material, images: Tensor) -> Tensor:
    """In float64, as float32."""
    mean, std = (t.cpu().double() for t in (material.normalise.mean, material.normalise.std))
    return ((images.double() / 255 - mean) / std).float()


def _check_normalised(material: Material, found: Iterable[Any]) -> Measure:
    expected = (_normalised(material, batch) for batch in material.batches(material.data.images))
    return worst("network input", NORMALISED, found, expected)


STAGES: list[Stage] = [
    Stage("read the file", _each(Path.read_bytes, lambda m: m.paths["JPEG"]), _check_bytes),
    Stage("decode, JPEG", _each(lambda file: decode(io.BytesIO(file)), lambda m: m.encoded["JPEG"]), _check_jpeg),
    Stage("decode, PNG", _each(lambda file: decode(io.BytesIO(file)), lambda m: m.encoded["PNG"]), _check_png, False),
    Stage("resize, crop, to tensor", lambda m: lambda: (fit(i, m.size) for i in m.decoded), _check_pixels),
    Stage("file to tensor (read_image)", _read, _check_read, False),
    Stage("collate a batch", _each(default_collate, _samples), _check_collated),
    Stage("batch from memory", _from_memory, _check_from_memory, False, HOST),
    Stage("copy to the device", _to_device, _check_batches, where=DEVICE),
    Stage("normalise", _normalise, _check_normalised, where=DEVICE),
]
"""In the order in which images pass; the whole paths, of `whole_path`, come after them."""


def whole_path(workers: int) -> Stage:
    """Files to network input on the device, by a DataLoader, in order.

    Args:
        workers: processes that read; 0: this one does.
    """
    return Stage(
        f"whole path, {workers} worker{'' if workers == 1 else 's'}",
        partial(_load, workers),
        partial(_check_loaded, workers),
        on_path=False,
        where=HOST,
        images=partial(_epoch, workers),
        workers=workers,
    )


def _epoch(workers: int, material: Material) -> int:
    """Images of an epoch: four batches a worker at least, so that its ends do not count for much."""
    return max(len(material.data), 4 * workers * material.batch)


def _load(workers: int, material: Material) -> Callable[[], Iterator[Tensor]]:
    data = ImageFiles(material.paths["JPEG"], material.data.labels.tolist(), material.size, _epoch(workers, material))
    loader = DataLoader(data, material.batch, num_workers=workers, persistent_workers=workers > 0)

    def epoch() -> Iterator[Tensor]:
        for images, _ in loader:
            yield material.normalise(images.to(material.device))
        if material.device.type == "cuda":
            torch.cuda.synchronize(material.device)

    return epoch


def _check_loaded(workers: int, material: Material, found: Iterable[Any]) -> Measure:
    """Each image in its turn; they come over and over."""
    numbers = torch.arange(_epoch(workers, material)) % len(material.data)
    expected = (_normalised(material, material.data.images[batch]) for batch in material.batches(numbers))
    return worst("network input", NORMALISED, found, expected)


# --- the rows ---------------------------------------------------------------------------------------------------------


def row_of(stage: Stage, material: Material, rounds: int) -> dict[str, Any]:
    """A stage's time for all its images, or why there is none."""
    about = {"stage": stage.name, "where": stage.where, "on_path": stage.on_path, "workers": stage.workers}
    row = {**about, "images": stage.images(material)}
    try:
        outputs = stage.begin(material)
    except Absent as absent:
        return {**row, "absent": str(absent)}
    device = material.device if stage.where == DEVICE else "cpu"

    def work() -> None:
        deque(outputs(), maxlen=0)

    def times() -> dict[str, Any]:
        with _threads(1 if stage.where == WORKER else torch.get_num_threads()):
            return {"times": {OURS: summary(in_turn({OURS: work}, rounds, device)[OURS])}}

    return {**row, **checked(stage.check(material, outputs()), times)}


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


def cases(material: Material, workers: Sequence[int], rounds: int) -> Iterator[tuple[str, Rows]]:
    """The stages by name, each with a function that measures its row."""
    for stage in (*STAGES, *map(whole_path, workers)):
        yield stage.name, lambda stage=stage: [row_of(stage, material, rounds)]  # type: ignore[misc]


def default_workers() -> tuple[int, ...]:
    """None, then powers of two up to one process a core."""
    cores = os.cpu_count() or 1
    return 0, *sorted({2**power for power in range(cores.bit_length())} | {cores})


def run(
    out: Path,
    images: int = 64,
    batch: int = 32,
    workers: Sequence[int] | None = None,
    rounds: int = 7,
    size: int = 224,
    device: str | None = None,
    *,
    pixels: tuple[int, int] = PIXELS,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure the input path, print a table, and write `out/data.json`, anew after every row.

    What a training step needs is read from `out/model.json`, else from this repository's `bench/results`.

    Args:
        out: folder of the JSON file; made where it is missing.
        images: generated, into a folder that is removed at the end.
        batch: images of a batch.
        workers: of the DataLoaders; None: `default_workers`.
        rounds: samples of each time.
        size: side of the network's images, in pixels.
        device: where batches go; None: this machine's GPU, or its CPU where it has none.
        pixels: width and height of the files.
        progress: show a progress bar.

    Raises:
        ValueError: a number below 1, workers below 0, or a `model.json` that is none.
    """
    named = {"number of images": images, "batch": batch, "number of rounds": rounds, "size": size}
    for name, value in named.items():
        if value < 1:
            raise ValueError(f"the {name} must be at least 1, got {value}")
    for value in workers or ():
        if value < 0:
            raise ValueError(f"the number of workers must be at least 0, got {value}")
    where = device_of(device)
    path = out / "data.json"
    head = results.envelope("data", where, METHOD)
    head["machine"]["pillow"] = _pillow()
    head["needed"] = needed([out / "model.json", Path(__file__).with_name("results") / "model.json"])
    with tempfile.TemporaryDirectory(prefix="alexnet-triton-") as folder:
        material = generate(Path(folder), images, size, batch, where, pixels)
        head["files"] = {
            "width": pixels[0], "height": pixels[1], "size": size, "batch": batch,
            "bytes": {form: sum(map(len, held)) / images for form, held in material.encoded.items()},
        }  # fmt: skip
        chosen = default_workers() if workers is None else tuple(dict.fromkeys(workers))
        result = results.measure_cases(path, head, list(cases(material, chosen, rounds)), progress)
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
    total = sum(1 / _rate(row) for row in timed if row["on_path"])
    lines = [
        f"The input path: {heading(result['machine'])}, pillow {result['machine']['pillow']}",
        f"{form['width']}x{form['height']} ({sizes}) to {form['size']}x{form['size']}, batches of {form['batch']}",
        f"{'':30}{'an image':>14}{'of the path':>13}{'images/s':>12}",
    ]
    for row in result["rows"]:
        if "times" in row:
            share = f"{1 / _rate(row) / total:.0%}" if row["on_path"] else "-"
            lines.append(f"{row['stage']:30}{duration(1 / _rate(row)):>14}{share:>13}{_rate(row):>12,.0f}")
        else:
            why = f"no time: {row['failed']}" if "failed" in row else f"absent: {row['absent']}"
            lines.append(f"{row['stage']:30}  {why}")
    return "\n".join([*lines, *_limits(result, timed)])


def _limits(result: Mapping[str, Any], timed: Sequence[Mapping[str, Any]]) -> list[str]:
    """What an image's way goes to, what a training step takes, and which of the two is behind."""
    path, whole = ([row for row in timed if row["on_path"]], [row for row in timed if row["workers"] is not None])
    lines = [f"Most of an image's way: {min(path, key=_rate)['stage']}."] if path else []
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
    if whole:
        best = max(whole, key=_rate)
        behind = "the network is what limits" if _rate(best) >= rate else "reading is what limits"
        shared = ", though both want the same cores" if device.startswith("CPU") else ""
        lines.append(f"{best['stage']}: {_rate(best) / rate:.2g} times that; {behind}{shared}.")
    return lines
