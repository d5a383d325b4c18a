"""The commands that use a trained network: evaluate, predict, features, filters."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alexnet_triton.cli.words import READERS, VARIANT_NAMES, Commands, count, positive

if TYPE_CHECKING:
    from alexnet_triton.recipe.data.sets import ImageSet
    from alexnet_triton.recipe.evaluate.evaluation import Evaluation
    from alexnet_triton.recipe.trained import Trained

LAYER_NAMES = ("conv5", "pool5", "fc6", "fc7")
CHECKPOINT = "a checkpoint of `train`, any file of AlexNet's parameters (torchvision's, .safetensors, .caffemodel), or "
PUBLISHED = "IMAGENET1K_V1, which torchvision downloads"


def add_evaluate(commands: Commands) -> None:
    """Add `evaluate`."""
    evaluate = commands.add_parser(
        "evaluate",
        help="top-1 and top-5 of trained networks, by one crop or ten, alone or averaged",
        description="Judge trained networks by images with classes. Several are judged together, by the average of "
        "their probabilities, and each alone. Weights that do not name their classes, as torchvision's and Caffe's, "
        "are taken to have them in the order of the sorted names of DATA's folders, as ImageNet's WordNet ids are.",
    )
    data = "made by `prepare`, or a folder CLASS/IMAGE; of `train` and `val` in it, `val` is taken"
    evaluate.add_argument("data", type=Path, metavar="DATA", help=data)
    _add_network(evaluate, nargs="+", default=[])
    ensemble = "more networks; all of them are averaged, each once"
    evaluate.add_argument("--ensemble", nargs="+", default=[], metavar="FILE", help=ensemble)
    _add_classes(evaluate)
    _add_mean(evaluate)
    out = "write tables (CSV), the confusion matrix (PNG) and the figures (JSON) into this folder"
    evaluate.add_argument("--out", type=Path, metavar="DIR", help=out)
    _add_ten_crop(evaluate)
    _add_run(evaluate)
    evaluate.set_defaults(run=_evaluate)


def add_predict(commands: Commands) -> None:
    """Add `predict`."""
    predict = commands.add_parser("predict", help="what a trained network thinks that images show")
    _add_images(predict)
    _add_network(predict, required=True)
    _add_classes(predict)
    _add_mean(predict)
    predict.add_argument("--top", type=positive, default=5, metavar="K", help="guesses an image; default: %(default)s")
    predict.add_argument("--json", action="store_true", help="print JSON")
    _add_ten_crop(predict)
    _add_run(predict)
    predict.set_defaults(run=_predict)


def add_features(commands: Commands) -> None:
    """Add `features`."""
    features = commands.add_parser(
        "features",
        help="what a layer makes of images, as .npy or .safetensors",
        description="Write a layer's activations for the centre crops of images, a row of float32 an image. Each layer "
        "is taken after its ReLU: conv5 is the map before the last pooling (Caffe's blob conv5, features.11 in "
        "PyTorch), pool5 the one after it, both flattened from (channels, rows, columns); fc6 and fc7 are 4,096 "
        "numbers, without dropout.",
    )
    _add_images(features)
    _add_network(features, required=True)
    _add_mean(features)
    features.add_argument("--layer", choices=LAYER_NAMES, default="fc7", help="default: %(default)s")
    out = "an array (.npy), with the images' names in a .txt beside it; or .safetensors, with the names in its metadata"
    features.add_argument("--out", type=Path, required=True, metavar="FILE", help=out)
    _add_run(features)
    features.set_defaults(run=_features)


def add_filters(commands: Commands) -> None:
    """Add `filters`."""
    filters = commands.add_parser("filters", help="the first layer's filters, as a picture")
    _add_network(filters, required=True)
    filters.add_argument("--out", type=Path, default=Path("filters.png"), metavar="PNG", help="default: %(default)s")
    filters.set_defaults(run=_filters)


# --- options ----------------------------------------------------------------------------------------------------------


def _add_network(parser: argparse.ArgumentParser, **more: Any) -> None:
    parser.add_argument("--checkpoint", metavar="FILE", help=CHECKPOINT + PUBLISHED, **more)
    variant = "of a file that does not say: `paper` and `caffe` have the same shapes"
    parser.add_argument("--variant", choices=VARIANT_NAMES, help=variant)
    parser.set_defaults(classes=None, mean=None)


def _add_classes(parser: argparse.ArgumentParser) -> None:
    classes = "names of the network's classes in its order, a line each; default: the checkpoint's"
    parser.add_argument("--classes", type=Path, metavar="FILE", help=classes)


def _add_mean(parser: argparse.ArgumentParser) -> None:
    mean = "of a caffemodel's training images; default: ImageNet's mean pixel"
    parser.add_argument("--mean", type=Path, metavar="BINARYPROTO", help=mean)


def _add_images(parser: argparse.ArgumentParser) -> None:
    images = "files, folders of them, or one packed dataset"
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help=images)
    parser.add_argument("--skip-bad", action="store_true", help="pass over files that are no images, and count them")


def _add_ten_crop(parser: argparse.ArgumentParser) -> None:
    ten = "average four corners, the centre and their mirrors; default: the centre alone"
    parser.add_argument("--ten-crop", action="store_true", help=ten)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-b", "--batch-size", type=positive, default=128, metavar="N", help="default: %(default)s")
    workers = "threads that read; default: one a core, 8 at most"
    parser.add_argument("-j", "--workers", type=count, default=READERS, metavar="N", help=workers)
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--device", metavar="NAME", help="default: cuda where there is one, else cpu")


# --- commands ---------------------------------------------------------------------------------------------------------


def _evaluate(options: argparse.Namespace) -> None:
    from alexnet_triton.recipe.data.loader import Loader
    from alexnet_triton.recipe.evaluate import report
    from alexnet_triton.recipe.evaluate.evaluation import evaluate
    from alexnet_triton.recipe.evaluate.use import labelled
    from alexnet_triton.recipe.train.memory import keep_freed_memory

    keep_freed_memory()
    sources = list(dict.fromkeys([*options.checkpoint, *options.ensemble]))
    if not sources:
        raise ValueError("there is nothing to evaluate: name a network with --checkpoint")
    if options.out is not None:
        report.check_folder(options.out)
    networks = [_network(options, source) for source in sources]
    data = labelled(options.data, networks)
    result = evaluate(
        networks,
        Loader(data, options.workers, _device(options)),
        batch_size=options.batch_size,
        ten_crop=options.ten_crop,
        amp=options.amp,
        progress=True,
    )
    print(_summary(options, sources, data, result))
    if options.out is not None:
        about = {
            "data": str(options.data),
            "checkpoints": sources,
            "crops": 10 if options.ten_crop else 1,
            "amp": options.amp,
            "device": str(_device(options)),
        }
        report.write(options.out, result, data, about)
        print(f"tables and the confusion matrix are in {options.out}")


def _summary(options: argparse.Namespace, sources: list[str], data: ImageSet, result: Evaluation) -> str:
    from alexnet_triton.recipe.evaluate.evaluation import BEST
    from alexnet_triton.recipe.evaluate.report import table

    scores = list(zip(sources, result.members, strict=True))
    if len(sources) > 1:
        scores.append((f"all {len(sources)}, averaged", result.score))
    rows = [(name, f"{s.top1:.2%}", f"{s.top5:.2%}", f"{s.cross_entropy:.4f}") for name, s in scores]
    lines = table(("network", "top-1", f"top-{min(BEST, len(data.classes))}", "cross-entropy"), rows)
    speed = len(data) / max(result.seconds, 1e-9)
    crops = "ten crops" if options.ten_crop else "centre crop"
    return (
        f"{lines}\n{len(data):,} images of {len(data.classes):,} classes, {crops}, "
        f"{speed:,.{0 if speed >= 10 else 1}f} images/s on {_device(options)}"
    )


def _predict(options: argparse.Namespace) -> None:
    import json

    from alexnet_triton.recipe.data.loader import Loader
    from alexnet_triton.recipe.evaluate.report import table
    from alexnet_triton.recipe.evaluate.use import gather, predict

    network = _network(options, options.checkpoint)
    images = gather(options.images, network.size, options.skip_bad)
    predictions = predict(
        network,
        Loader(images, options.workers, _device(options)),
        top=options.top,
        batch_size=options.batch_size,
        ten_crop=options.ten_crop,
        amp=options.amp,
        progress=sys.stderr.isatty(),
    )
    if options.json:
        rows = [
            {"file": p.file, "guesses": [{"class": name, "probability": chance} for name, chance in p.guesses]}
            for p in predictions
        ]
        print(json.dumps(rows, indent=1))
    else:
        cells = [
            (p.file if rank == 1 else "", rank, f"{chance:.2%}", name)
            for p in predictions
            for rank, (name, chance) in enumerate(p.guesses, 1)
        ]
        print(table(("file", "rank", "probability", "class"), cells))
    _report_bad(images)


def _features(options: argparse.Namespace) -> None:
    from alexnet_triton.recipe.data.loader import Loader
    from alexnet_triton.recipe.evaluate.features import check_target, write_features
    from alexnet_triton.recipe.evaluate.use import gather
    from alexnet_triton.recipe.train.memory import keep_freed_memory

    keep_freed_memory()
    check_target(options.out)
    network = _network(options, options.checkpoint)
    images = gather(options.images, network.size, options.skip_bad)
    loader = Loader(images, options.workers, _device(options))
    batch, amp = options.batch_size, options.amp
    rows, width = write_features(options.out, network, loader, options.layer, batch_size=batch, amp=amp, progress=True)
    _report_bad(images)
    print(f"{options.layer} of {rows:,} images, {width:,} numbers each: {options.out}")


def _filters(options: argparse.Namespace) -> None:
    from alexnet_triton.files import check_new, new_file
    from alexnet_triton.recipe.evaluate import pictures
    from alexnet_triton.variants import VARIANTS

    check_new([options.out])
    model = _network(options, options.checkpoint, "cpu").model
    weight = model.get_parameter("features.0.weight")
    with new_file(options.out) as path:
        pictures.filters(weight, path, towers=VARIANTS[model.variant].groups)
    print(f"{len(weight)} filters of {weight.shape[-1]}x{weight.shape[-1]} pixels: {options.out}")


def _network(options: argparse.Namespace, source: str, device: str | None = None) -> Trained:
    from alexnet_triton.recipe.trained import load_trained, read_names

    classes = None if options.classes is None else read_names(options.classes)
    return load_trained(
        source, classes=classes, variant=options.variant, mean=options.mean, device=device or _device(options)
    )


def _device(options: argparse.Namespace) -> Any:
    import torch

    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _report_bad(images: ImageSet) -> None:
    from alexnet_triton.recipe.evaluate.use import unreadable

    bad = unreadable(images)
    for _, error in sorted(bad.items())[:5]:
        print(f"passed over: {error}", file=sys.stderr)
    if len(bad) > 5:
        print(f"passed over: {len(bad) - 5} more", file=sys.stderr)
