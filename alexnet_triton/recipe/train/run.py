"""A run of training from its options: images, network, folder; then `train.Training`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from torch import nn

from alexnet_triton.model import AlexNet
from alexnet_triton.parallel.layout import Layout
from alexnet_triton.parallel.pipeline.picture import check_path
from alexnet_triton.parallel.processes.watch import ProcessLost
from alexnet_triton.parallel.processes.world import World, world
from alexnet_triton.recipe.augment import centre
from alexnet_triton.recipe.data import sources
from alexnet_triton.recipe.data.loader import Loader, readers
from alexnet_triton.recipe.data.sets import DataError, ImageSet, stratified_split
from alexnet_triton.recipe.evaluate.evaluation import Score, evaluate
from alexnet_triton.recipe.evaluate.use import of_size
from alexnet_triton.recipe.train import checkpoint
from alexnet_triton.recipe.train.checkpoint import LAST, CheckpointError, Checkpoints
from alexnet_triton.recipe.train.loop import Training
from alexnet_triton.recipe.train.record import Record
from alexnet_triton.recipe.train.settings import History, Settings
from alexnet_triton.recipe.train.signals import Interrupted
from alexnet_triton.recipe.trained import SIZE, Trained, load_trained
from alexnet_triton.variants import VARIANTS

NEWEST = "newest"
"""In the place of a checkpoint to resume: the newest of the run's folder, or the start where it has none."""


@dataclass(frozen=True)
class Options:
    """What `alexnet-triton train` is told; its options of the same names."""

    data: Path
    val: Path | None = None
    held_out: float = 0.1
    """Share of the images that is held out by the seed, where nothing else is given to judge by."""
    output_dir: Path = Path("runs")
    variant: str | None = None
    """None: `"merged"`, or that of `init_from`."""
    init: str | None = None
    init_from: str | None = None
    freeze: tuple[str, ...] = ()
    """Names of modules, such as `features` or `classifier.1`, whose parameters stay as they are."""
    dropout: float = 0.5
    resume: str | None = None
    """Path of a checkpoint, or `NEWEST`."""
    size: int | None = None
    """Side, in pixels, that images of a folder are brought to; a packed dataset has its own. None: 256, or, to judge,
    that of the checkpoint."""
    crop: int | None = None
    """None: the variant's own size; or, of smaller images, the same share of them."""
    workers: int = field(default_factory=readers)
    print_freq: int = 10
    keep: int = 3
    compiled: bool = False
    layout: Layout = field(default_factory=Layout)
    """How several processes hold the network."""
    trace: Path | None = None
    """Where to draw one step of a pipeline."""
    device: str | None = None
    settings: Settings = field(default_factory=Settings)
    """Its `crop` is decided here."""


def run(options: Options, *, progress: bool = True) -> History:
    """Train as the options say, and print what happens.

    Args:
        options: what, how, and where to.
        progress: show progress bars.

    Returns:
        What came of each epoch.

    Raises:
        DataError: the images cannot be used.
        CheckpointError: the run's folder or the checkpoint to resume cannot be used.
        ValueError: options that do not fit together, or are out of their range.
        TrainingError: training cannot go on.
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint has been written.
        ProcessLost: another process of the run has died, hangs or has failed.
    """
    if options.trace is not None:
        check_path(options.trace)
        if options.layout.pipeline == 1:
            raise ValueError(f"--trace {options.trace} draws a step of a pipeline: add --pipeline STAGES")
    with _joined(options, options.layout.per_replica) as here:
        return _run(options, here, progress)


@contextmanager
def _joined(options: Options, per_replica: int = 1) -> Iterator[World]:
    """The processes of a run; where all end for one reason, one of them says it."""
    leads = True
    try:
        with world(options.device, per_replica=per_replica) as here:
            leads = here.leads
            yield here
    except ProcessLost as error:
        if error.to_be_said:
            raise
        raise SystemExit(2) from None
    except Interrupted as error:
        if leads:
            raise
        raise SystemExit(128 + error.signal) from None
    except (ValueError, OSError, RuntimeError):  # which the first says too, or hears of and says that
        if leads or os.environ.get("ALEXNET_TRITON_TRACEBACK"):
            raise
        raise SystemExit(2) from None


def _run(options: Options, here: World, progress: bool) -> History:
    torch.manual_seed(options.settings.seed)
    learn, held_out = images(options)
    _check_apart(options)
    trained = network(options, learn)
    settings = replace(options.settings, crop=trained.crop)
    freeze(trained.model, options.freeze)
    with _folder(options, here) as (checkpoints, found):
        training = Training(
            trained,
            learn,
            held_out,
            settings,
            checkpoints,
            here,
            workers=options.workers,
            print_freq=options.print_freq,
            layout=options.layout,
            trace=options.trace,
            compiled=options.compiled,
            progress=progress,
        )
        torch.manual_seed(options.settings.seed + training.engine.stream)
        if found is not None:
            training.resume(found.content, repr(str(found.path)))
        if here.leads:
            _announce(training, options, found is not None)
        history = training.run()
        if here.leads:
            _conclude(history, options.output_dir)
    return history


def judge(options: Options, *, progress: bool = True) -> Score:
    """Judge the network of a checkpoint by the images that `run` would hold out, and print what comes of it.

    Args:
        options: as for `run`; `resume` or `init_from` names the checkpoint.
        progress: show a progress bar.

    Returns:
        Sums over those images.

    Raises:
        DataError: the images cannot be used.
        ValueError: no checkpoint is given, it cannot be read, or its crop is larger than the images.
    """
    source = options.resume or options.init_from
    if options.resume == NEWEST:
        source = str(options.output_dir / LAST)
    if source is None:
        raise ValueError("--test-only judges the network of a checkpoint: name it with --resume or --init-from")
    with _joined(options) as here:
        trained = load_trained(source, variant=options.variant, device=here.device)
        held_out = images(replace(options, size=options.size or trained.size))[1]
        held_out = trained.labels(of_size(held_out, trained.size))
        indices = here.share(torch.arange(len(held_out)))
        loader = Loader(held_out, options.workers, here.device)
        part = evaluate(
            [trained], loader, indices, batch_size=options.settings.batch_size, progress=progress and here.leads
        )
        score = Score(*(here.sum(value) for value in part.score))
        if here.leads:
            print(
                f"{score.top1:.2%} of {score.images:,} held-out images right, top-5 {score.top5:.2%}, cross-entropy "
                f"{score.cross_entropy:.4f}: {source}"
            )
    return score


# --- what a run stands on ---------------------------------------------------------------------------------------------


def images(options: Options) -> tuple[ImageSet, ImageSet]:
    """Images to learn from, and images held out, whose labels are indices into the same classes.

    Raises:
        DataError: they cannot be used, are of two sizes, or a class that is held out is not learned.
    """
    inside, size = sources.train_and_val(options.data), options.size or SIZE
    learn = sources.open_images(inside[0] if inside else options.data, size)
    val = options.val or (inside and inside[1])
    if len(learn.classes) < 2:
        raise DataError(f"{learn.name!r} has {len(learn.classes)} classes, and at least 2 are needed")
    if val is None:
        return stratified_split(learn, options.held_out, options.settings.seed)
    held_out = sources.open_images(val, size)
    if held_out.size != learn.size:
        raise DataError(
            f"{held_out.name!r} has images of {held_out.size}x{held_out.size} pixels and {learn.name!r} of "
            f"{learn.size}x{learn.size}: prepare both with one --size"
        )
    return learn, held_out.with_classes(learn.classes)


def network(options: Options, learn: ImageSet) -> Trained:
    """The network to train, fresh or from a checkpoint with a new last layer.

    Raises:
        ValueError: there is no such checkpoint, it is of another variant, or the crop or the dropout does not fit.
    """
    if not 0 <= options.dropout <= 1:
        raise ValueError(f"dropout must be a probability, from 0 to 1, got {options.dropout}")
    if options.crop is not None:
        centre(0, learn.size, options.crop)  # says what is wrong with a crop
    classes, colours = learn.classes, learn.statistics()
    if options.init_from is None:
        variant = options.variant or "merged"
        model = AlexNet(len(classes), options.dropout, variant=variant, init=options.init)
        own, statistics = VARIANTS[variant].image_size, colours
    else:
        if options.init is not None:
            raise ValueError("--init draws fresh parameters and --init-from takes a checkpoint's: give one of them")
        start = load_trained(options.init_from, variant=options.variant)
        model, own = start.model, start.crop
        statistics = colours._replace(mean=start.statistics.mean, std=start.statistics.std)  # as it is used to
        head = nn.Linear(model.get_parameter("classifier.6.weight").shape[1], len(classes))
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        model.classifier[6] = head
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = options.dropout
    crop = options.crop or crop_of(learn.size, own)
    model.train()
    model.get_feature_vector(torch.zeros(1, 3, crop, crop))  # what does not fit is said before any work
    return Trained(model, classes, statistics, learn.size, crop)


def crop_of(size: int, own: int) -> int:
    """Side of the network's input, in pixels, where none is asked for.

    Args:
        size: of the images.
        own: that the network was made for: taken where it fits, and else 227 parts of 256, as in 2012.
    """
    return own if size >= own else max(1, size * 227 // 256)


def freeze(model: nn.Module, names: tuple[str, ...]) -> None:
    """Let the parameters of modules (or single parameters) of these names stay as they are.

    Raises:
        ValueError: there is no such module.
    """
    for name in names:
        found = [p for key, p in model.named_parameters() if key == name or key.startswith(f"{name}.")]
        if not found:
            raise ValueError(
                f"--freeze {name}: the network has no parameters of that name; it has features, classifier"
            )
        for parameter in found:
            parameter.requires_grad_(False)


class Found(NamedTuple):
    """A checkpoint to go on from."""

    path: Path
    content: dict[str, Any]


@contextmanager
def _folder(options: Options, here: World) -> Iterator[tuple[Checkpoints, Found | None]]:
    """The run's folder, this run's alone, and the checkpoint to go on from."""
    folder = options.output_dir
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r} is a file, and --output-dir needs a folder")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder, options.keep)
    lock = FileLock(folder / ".lock")
    try:
        if here.leads:
            lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(f"another run writes into {str(folder)!r}: choose another --output-dir") from None
    try:
        if here.leads:
            checkpoints.clear_temporary()
        path = checkpoints.newest() if options.resume == NEWEST else Path(options.resume) if options.resume else None
        found = None if path is None else Found(path, checkpoint.read(path))
        _check_unused(checkpoints, found)
        _check_same(found, here)
        yield checkpoints, found
    finally:
        lock.release()


def _check_unused(checkpoints: Checkpoints, found: Found | None) -> None:
    """Refuse a folder whose checkpoints would be lost."""
    newest, folder = checkpoints.newest(), str(checkpoints.folder)
    if newest is None:
        return
    if found is None or found.path.parent.resolve() != checkpoints.folder.resolve():
        raise CheckpointError(
            f"{folder!r} holds a run already: --resume without FILE goes on with it, or choose another --output-dir"
        )
    step = checkpoint.step_of(newest)
    if step > checkpoint.steps(found.content):
        raise CheckpointError(
            f"{folder!r} holds later checkpoints than {str(found.path)!r}, up to step {step:,}: choose another "
            "--output-dir"
        )


def _check_same(found: Found | None, here: World) -> None:
    """Refuse to go on where one process sees another checkpoint than the others."""
    steps = here.gather(-1 if found is None else checkpoint.steps(found.content))
    if len(set(steps)) > 1:
        raise CheckpointError(
            "the processes see different checkpoints to go on from: --output-dir and --resume must be on a disk that "
            "all of them share"
        )


def _check_apart(options: Options) -> None:
    """Refuse to write among the images of a folder, where the run would be one of the classes when it goes on."""
    out, inside = options.output_dir.resolve(), sources.train_and_val(options.data)
    for folder in (*(inside or (options.data,)), options.val):
        if folder is not None and out.is_relative_to(folder.resolve()):
            raise ValueError(
                f"--output-dir {str(options.output_dir)!r} lies among the images of {str(folder)!r}, where it would "
                "pass for a class: choose a folder outside of it"
            )


# --- what is said -----------------------------------------------------------------------------------------------------


def _announce(training: Training, options: Options, resumed: bool) -> None:
    t, model = training, training.model
    others = f" and {t.world.size - 1} more" if t.world.size > 1 else ""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"AlexNet ({model.variant}), {parameters:,} parameters to train, on {t.world.device}{others}"
        f"{', ' if t.engine.description else ''}{t.engine.description}"
        f"{', mixed precision' if t.settings.amp else ''}\n"
        f"{len(t.learn):,} images to learn from, {len(t.held_out):,} held out, {len(t.trained.classes)} classes; "
        f"{t.learn.size}x{t.learn.size} pixels, cropped to {t.settings.crop}x{t.settings.crop}\n"
        f"checkpoints and log.csv in {options.output_dir}; Ctrl-C stops and keeps {options.output_dir / LAST}"
    )
    if not Record.has_tensorboard():
        print("TensorBoard is not installed, so no events are written for it: pip install tensorboard")
    if resumed:
        print(f"going on after {len(t.history.epochs)} epochs and {t.step:,} steps")


def _conclude(history: History, folder: Path) -> None:
    if not history.epochs:
        return
    best = min(history.epochs, key=lambda row: row["held_out_loss"])
    last = history.epochs[-1]
    print(
        f"{last['held_out_top1']:.2%} of the held-out images right (top-5 {last['held_out_top5']:.2%}) after "
        f"{len(history.epochs)} epochs and {history.seconds:,.0f} s: {folder / LAST}"
    )
    if (folder / checkpoint.BEST).exists():  # a run that went on in another folder may have left it in the first
        print(
            f"lowest loss {best['held_out_loss']:.4f} in epoch {best['epoch']} ({best['held_out_top1']:.2%}): "
            f"{folder / checkpoint.BEST}"
        )
