"""The demo, from images to page: prepare, train, evaluate, look."""

from __future__ import annotations

import copy
import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import alexnet_triton
from alexnet_triton.bench.cpu import training_step
from alexnet_triton.bench.timing import in_turn, machine
from alexnet_triton.demo import figures
from alexnet_triton.demo.digits import write_digits
from alexnet_triton.demo.page import write_page
from alexnet_triton.fusion import unfuse
from alexnet_triton.info import layer_table
from alexnet_triton.model import AlexNet
from alexnet_triton.recipe.data.images import class_folders
from alexnet_triton.recipe.data.loader import Loader
from alexnet_triton.recipe.data.prepare import prepare
from alexnet_triton.recipe.data.sets import ImageSet
from alexnet_triton.recipe.evaluate import pictures
from alexnet_triton.recipe.evaluate.evaluation import Score, evaluate, log_probabilities
from alexnet_triton.recipe.train import run as training
from alexnet_triton.recipe.train.checkpoint import LAST
from alexnet_triton.recipe.train.settings import History, Settings
from alexnet_triton.recipe.train.signals import Interrupted
from alexnet_triton.recipe.trained import Trained, load_trained
from alexnet_triton.variants import VARIANTS

BENCH_BATCH, BENCH_ROUNDS = 32, 3

PACKED, RUN = "packed", "run"
"""Folders that the demo makes, and makes anew."""


@dataclass(frozen=True)
class DemoOptions:
    """What the demo is told; the command line's options of the same names."""

    out: Path = Path("demo-out")
    data: Path | None = None
    variant: str = "merged"
    epochs: int = 5
    batch_size: int = 32
    lr: float = 0.03
    init: str = "kaiming"
    image_size: int | None = None
    seed: int = 0
    device: str | None = None

    @property
    def crop(self) -> int:
        """Side of the network's input in pixels."""
        return self.image_size or (67 if self.data is None else 128)


def run(options: DemoOptions, *, progress: bool = True) -> dict[str, Any]:
    """Prepare, train, judge, measure, and write `index.html`, its pictures, `metrics.json`, and the run's checkpoints.

    Returns:
        What `metrics.json` holds.

    Raises:
        DataError: the images cannot be used.
        ValueError: an option is out of its range.
        Interrupted: Ctrl-C, after the checkpoint has been written.
    """
    out = _made(options.out)
    told = _told(options)
    _check(options)
    for folder in (PACKED, RUN):
        shutil.rmtree(out / folder, ignore_errors=True)
    _prepare(options, progress)
    history = training.run(told, progress=progress)
    checkpoint = out / RUN / LAST
    print("evaluating, drawing and measuring")
    try:
        metrics = _shown(options, told, history, load_trained(checkpoint, device=options.device))
        write_page(metrics, out / "index.html")
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; the network as trained is in {checkpoint}") from None
    print(
        f"{metrics['accuracy']:.1%} of the held-out images right after {history.seconds:.0f} s of training; by ten "
        f"crops, mirrors among them, {metrics['ten_crop_accuracy']:.1%}"
    )
    for row in metrics["throughput"]["images_per_second"]:
        print(f"  {row['network']:32}{row['inference']:8,.0f} images/s inference{row['training']:8,.0f} training")
    print(f"open {out / 'index.html'}")
    return metrics


def _told(options: DemoOptions) -> training.Options:
    """What the run is told. Digits, which have a left and a right, are not mirrored."""
    settings = Settings(
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        lr_scheduler="cosine",
        clip_grad_norm=1.0,
        mirror=options.data is not None,
        seed=options.seed,
    )
    return training.Options(
        options.out / PACKED,
        held_out=0.2,
        output_dir=options.out / RUN,
        variant=options.variant,
        init=options.init,
        crop=options.crop,
        keep=1,
        device=options.device,
        settings=settings,
    )


def _check(options: DemoOptions) -> None:
    """Say what does not fit before any work."""
    torch.empty(0, device=options.device)
    if options.data is not None:
        class_folders(options.data, least=2)
    AlexNet(2, variant=options.variant, device="meta")(torch.empty(1, 3, options.crop, options.crop, device="meta"))


def _prepare(options: DemoOptions, progress: bool) -> None:
    """Pack the images, as much larger than the network's input as 256 is than 227."""
    source = options.data
    if source is None:
        source = options.out / "digits"
        write_digits(source)
    prepare(source, options.out / PACKED, -(-options.crop * 256 // 227), progress=progress)


def _shown(options: DemoOptions, told: training.Options, history: History, trained: Trained) -> dict[str, Any]:
    """Judge the network, draw the pictures, and give the page's numbers."""
    learn, held_out = training.images(told)
    loader = Loader(held_out, 2, next(trained.model.parameters()).device)
    centre, ten = (evaluate([trained], loader, batch_size=64, ten_crop=crops).score for crops in (False, True))
    _draw(options, trained, _born(told, learn), loader, centre, history)
    model = trained.model
    return {
        "version": alexnet_triton.__version__,
        "variant": options.variant,
        "settings": {**asdict(told.settings), "init": options.init},
        "data": {
            "name": "scikit-learn digits" if options.data is None else options.data.resolve().name,
            "learned_from": len(learn),
            "held_out": centre.images,
            "classes": len(learn.classes),
            "image_size": trained.crop,
            "grey": _is_grey(learn),
        },
        "accuracy": centre.top1,
        "top5_accuracy": centre.top5,
        "ten_crop_accuracy": ten.top1,
        "confusion": centre.confusion.tolist(),
        "class_names": list(learn.classes),
        "history": asdict(history),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "filters": len(model.get_parameter("features.0.weight")),
        "throughput": _throughput(model, options.variant, loader.device),
        "layers": _layers(options.variant, len(learn.classes), trained.crop),
        "machine": machine(loader.device.type),
    }


def _born(told: training.Options, learn: ImageSet) -> Tensor:
    """The first layer's filters as they were before training."""
    torch.manual_seed(told.settings.seed)
    return training.network(told, learn).model.get_parameter("features.0.weight").detach()


def _draw(options: DemoOptions, trained: Trained, born: Tensor, loader: Loader, score: Score, history: History) -> None:
    out = options.out
    figures.curves(history, out / "curves.png")
    pictures.confusion(score.confusion.cpu(), trained.classes, out / "confusion.png")
    chosen = torch.tensor(figures.choose(len(loader.data), seed=options.seed))
    guesses = next(log_probabilities([trained], loader, [chosen]))[0].exp().cpu()
    figures.guesses(loader.data.subset(chosen), guesses, out / "guesses.png")
    first = trained.model.get_parameter("features.0.weight").detach().cpu()
    pictures.filters(first, out / "filters.png")
    pictures.filters(first - born, out / "learned.png")


def _is_grey(data: ImageSet) -> bool:
    images = data.read(torch.arange(min(len(data), 256)))
    return bool((images == images[:, :1]).all())


def _made(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"{str(out)!r} is a file, and --out needs a folder") from error
    return out


def _layers(variant: str, classes: int, size: int) -> list[dict[str, Any]]:
    rows = layer_table(variant, 1, classes, size)
    return [{**asdict(row), "output": list(row.output)} for row in rows]


def _throughput(model: AlexNet, variant: str, device: torch.device) -> dict[str, Any]:
    """Images per second of this network fused, of the same layers unfused, and of torchvision's AlexNet."""
    from torchvision.models import alexnet as torchvision_alexnet

    classes = model.classifier[6].out_features
    networks: dict[str, nn.Module] = {
        f"alexnet_triton ({variant})": model,
        "the same in plain layers": unfuse(copy.deepcopy(model)),
        "torchvision": torchvision_alexnet(num_classes=classes).to(device),
    }
    size = VARIANTS[variant].image_size
    images = torch.randn(BENCH_BATCH, 3, size, size, device=device)

    def inference(network: nn.Module) -> Callable[[], None]:
        def look() -> None:
            with torch.inference_mode():
                network(images)

        return look

    rates = []
    for task, mode in ((inference, False), (lambda network: training_step(network, images), True)):
        for network in networks.values():
            network.train(mode)
        functions = {name: task(network) for name, network in networks.items()}
        times = in_turn(functions, BENCH_ROUNDS, device.type)
        rates.append({name: BENCH_BATCH / statistics.median(values) for name, values in times.items()})
    rows = [{"network": name, "inference": rates[0][name], "training": rates[1][name]} for name in networks]
    return {"batch": BENCH_BATCH, "image_size": size, "rounds": BENCH_ROUNDS, "images_per_second": rows}
