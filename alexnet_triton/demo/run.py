"""The demo, from images to page."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

import alexnet_triton
from alexnet_triton.bench.cpu import training_step
from alexnet_triton.bench.timing import in_turn, machine
from alexnet_triton.demo import figures
from alexnet_triton.demo.page import write_page
from alexnet_triton.fusion import unfuse
from alexnet_triton.info import layer_table
from alexnet_triton.model import AlexNet
from alexnet_triton.recipe import pictures
from alexnet_triton.recipe.data import ImageSet, digits, stratified_split
from alexnet_triton.recipe.evaluate import Normalise, accuracy, confusion_matrix, predict
from alexnet_triton.recipe.images import image_folder
from alexnet_triton.recipe.train import Augmentation, History, Interrupted, Settings, train
from alexnet_triton.variants import VARIANTS

BENCH_BATCH, BENCH_ROUNDS = 32, 3


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


def run(options: DemoOptions, *, progress: bool = True) -> dict[str, Any]:
    """Train, judge, measure, and write `index.html`, its pictures, `metrics.json` and `checkpoint.pt`.

    Returns:
        What `metrics.json` holds.

    Raises:
        DataError: the images cannot be used.
        ValueError: an option is out of its range.
        Interrupted: Ctrl-C, after the checkpoint has been written.
    """
    out = _made(options.out)
    checkpoint = out / "checkpoint.pt"
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(options.seed)
    learn, held_out = stratified_split(_load(options, progress), 0.2, options.seed)
    normalise = Normalise(*learn.statistics()[:2]).to(device)
    model = AlexNet(len(learn.classes), variant=options.variant, init=options.init).to(device)
    print(
        f"AlexNet ({options.variant}) on {learn.name}: {len(learn):,} images to learn from, {len(held_out):,} "
        f"held out, {len(learn.classes)} classes, on {device}; Ctrl-C stops and keeps {checkpoint}"
    )
    model.get_feature_vector(
        normalise(learn.read(torch.arange(1)).to(device))
    )  # what does not fit is said before any work
    born = model.get_parameter("features.0.weight").detach().clone()
    settings = Settings(options.epochs, options.batch_size, options.lr, seed=options.seed)
    augment = _augmentation(options)
    history = train(model, learn, held_out, normalise, settings, checkpoint, augment, progress=progress)
    print("drawing and measuring")
    try:
        logits = predict(model, held_out, normalise)
        _draw(out, model, born, held_out, logits, history, options.seed)
        metrics = _metrics(options, model, learn, held_out, logits, settings, history)
        write_page(metrics, out / "index.html")
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    except KeyboardInterrupt:
        raise Interrupted(checkpoint) from None
    print(f"{metrics['accuracy']:.1%} of the held-out images right after {history.seconds:.0f} s of training")
    for row in metrics["throughput"]["images_per_second"]:
        print(f"  {row['network']:32}{row['inference']:8,.0f} images/s inference{row['training']:8,.0f} training")
    print(f"open {out / 'index.html'}")
    return metrics


def _draw(
    out: Path, model: AlexNet, born: Tensor, held_out: ImageSet, logits: Tensor, history: History, seed: int
) -> None:
    figures.curves(history, out / "curves.png")
    pictures.confusion(confusion_matrix(logits, held_out.labels), held_out.classes, out / "confusion.png")
    figures.guesses(held_out, logits, figures.choose(len(held_out), seed=seed), out / "guesses.png")
    first = model.get_parameter("features.0.weight")
    pictures.filters(first, out / "filters.png")
    pictures.filters(first - born, out / "learned.png")


def _metrics(
    options: DemoOptions,
    model: AlexNet,
    learn: ImageSet,
    held_out: ImageSet,
    logits: Tensor,
    settings: Settings,
    history: History,
) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {
        "version": alexnet_triton.__version__,
        "variant": options.variant,
        "settings": {**asdict(settings), "init": options.init},
        "data": {
            "name": learn.name,
            "learned_from": len(learn),
            "held_out": len(held_out),
            "classes": len(learn.classes),
            "image_size": learn.size,
            "grey": _is_grey(learn),
        },
        "accuracy": accuracy(logits, held_out.labels),
        "top5_accuracy": accuracy(logits, held_out.labels, 5),
        "confusion": confusion_matrix(logits, held_out.labels).tolist(),
        "class_names": list(learn.classes),
        "history": asdict(history),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "filters": len(model.get_parameter("features.0.weight")),
        "throughput": _throughput(model, options.variant, device),
        "layers": _layers(options.variant, learn),
        "machine": machine(device.type),
    }


def _is_grey(data: ImageSet) -> bool:
    images = data.read(torch.arange(min(len(data), 256)))
    return bool((images == images[:, :1]).all())


def _made(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"{str(out)!r} is a file, and --out needs a folder") from error
    return out


def _load(options: DemoOptions, progress: bool) -> ImageSet:
    if options.data is None:
        return digits(options.image_size or 67)
    return image_folder(options.data, options.image_size or 128, progress=progress)


def _augmentation(options: DemoOptions) -> Augmentation | None:
    """Photographs are shifted, turned, scaled a little and mirrored; the digits, cut out and centred, are not."""
    if options.data is None:
        return None
    shift = v2.RandomAffine(8, (0.06, 0.06), (0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR)
    return v2.Compose([shift, v2.RandomHorizontalFlip()])


def _layers(variant: str, data: ImageSet) -> list[dict[str, Any]]:
    rows = layer_table(variant, 1, len(data.classes), data.size)
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
