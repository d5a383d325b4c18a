"""The commands about networks in stages: pipeline plan."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from alexnet_triton.cli.words import (
    LINK_NAMES,
    SCHEDULE_NAMES,
    Commands,
    add_dtype,
    add_variant,
    dtype_name,
    positive,
    positive_float,
)

if TYPE_CHECKING:
    from alexnet_triton.bench.plots.files import Result
    from alexnet_triton.parallel.pipeline.work import Roofs, Times


def add_pipeline(commands: Commands) -> None:
    """Add `pipeline` and its commands."""
    pipeline = commands.add_parser("pipeline", help="a network in stages over several GPUs")
    actions = pipeline.add_subparsers(required=True, metavar="ACTION")
    plan = actions.add_parser(
        "plan",
        help="where to cut, and what comes of it",
        description="Print where to cut a network into stages, and what time, memory, traffic and throughput come of "
        "it; draw the schedule. Nothing is run. Times of layers are measured ones where there are results for the "
        "variant and the card, else estimates from the card's roofs.",
    )
    add_variant(plan)
    plan.add_argument("--batch", type=positive, default=128, metavar="N", help="images of a step; default: %(default)s")
    plan.add_argument("--microbatches", type=positive, default=8, metavar="N", help="of a batch; default: %(default)s")
    plan.add_argument("--schedule", choices=SCHEDULE_NAMES, default="1f1b", help="default: %(default)s")
    plan.add_argument("--stages", type=positive, metavar="N", help="one a GPU; default: 2, or what --at makes")
    at = "begin a stage at these layers, as in features.6 or conv3; default: what is planned to be fastest"
    plan.add_argument("--at", nargs="+", default=(), metavar="NAME", help=at)
    link = "between GPUs: nvlink and pcie (those of an H100), nvlink2 ..., pcie2 ..., loopback; default: %(default)s"
    names = ("nvlink", "pcie", *LINK_NAMES, "loopback")
    plan.add_argument("--link", choices=names, default="nvlink", metavar="NAME", help=link)
    plan.add_argument("--card", metavar="NAME", help="h100, h200, a100; default: h100, or that of --results")
    add_dtype(plan)
    plan.add_argument("--num-classes", type=positive, default=1000, metavar="N", help="default: %(default)s")
    plan.add_argument("--image-size", type=positive, metavar="PIXELS", help="default: the variant's own")
    plan.add_argument("--memory", type=positive_float, metavar="GB", help="that a stage may need; default: any")
    results = "times of `bench layers` or `bench predict`; default: those of this repository for the card"
    plan.add_argument("--results", type=Path, metavar="FILE", help=results)
    out = Path("bench-out/pipeline.png")
    plan.add_argument("--out", type=Path, default=out, metavar="FILE", help="of the picture; default: %(default)s")
    plan.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    import torch

    from alexnet_triton.model import AlexNet
    from alexnet_triton.parallel.links import LINKS, USUAL
    from alexnet_triton.parallel.pipeline.names import MODULES
    from alexnet_triton.parallel.pipeline.picture import check_path
    from alexnet_triton.parallel.pipeline.plan import draw_plan, format_plan, make_plan
    from alexnet_triton.variants import VARIANTS

    o = options
    check_path(o.out)
    device = _device(o)
    side = o.image_size or VARIANTS[o.variant].image_size
    plan = make_plan(
        AlexNet(o.num_classes, variant=o.variant, device="meta"),
        (o.batch, 3, side, side),
        stages=o.stages or (len(o.at) + 1 if o.at else 2),
        microbatches=o.microbatches,
        schedule=o.schedule,
        link=LINKS[USUAL.get(o.link, o.link)],
        times=device.times,
        roofs=device.roofs,
        source=device.source,
        dtype=getattr(torch, dtype_name(o.dtype)),
        at=[MODULES.get(name, name) for name in o.at],
        memory_limit=None if o.memory is None else o.memory * 1e9,
        apart=device.apart,
        card=device.name,
    )
    print(format_plan(plan))
    print(f"written to {draw_plan(plan, o.out)}")


class _Device(NamedTuple):
    """What is known of the devices that are planned for."""

    name: str
    times: Times
    roofs: Roofs
    source: str
    """Of the times, in words."""
    apart: bool
    """Whether its ops compute one gradient without the other (`costs.Part`)."""


def _device(options: argparse.Namespace) -> _Device:
    """The device of the results that were given, or a card, with the results that this repository has for it."""
    import alexnet_triton.bench
    from alexnet_triton.bench.cards import CARDS
    from alexnet_triton.bench.plots.files import read
    from alexnet_triton.parallel.pipeline.work import Roofs

    path, dtype = options.results, dtype_name(options.dtype)
    if options.card is not None and options.card not in CARDS:
        raise ValueError(f"unknown card {options.card!r}: choose one of {', '.join(CARDS)}")
    card = CARDS[options.card or "h100"]
    if path is not None:
        result = read(path, ["layers", "predict"])
        if options.card is not None and card.name not in str(result.machine["device"]):
            raise ValueError(f"{path} is of {str(result.machine['device'])!r}, and the plan is for an {card.name}")
        if found := _measured(result, options):
            return found
        raise ValueError(
            f"{path} has no times or no roofs of {options.variant} in {dtype}: measure them with `alexnet-triton bench "
            "layers`, or plan without --results"
        )
    shipped = Path(alexnet_triton.bench.__file__).parent / "results" / "layers.json"
    if shipped.exists():
        result = read(shipped, ["layers"])
        if card.name in str(result.machine["device"]) and (found := _measured(result, options)):
            return found
    tflops = card.tflops[dtype]
    roofs = Roofs(1e12 * tflops, 1e9 * card.copy_gbs)
    return _Device(
        card.name, roofs, roofs, f"roofs of an {card.name}, {tflops:.4g} TFLOP/s, {card.copy_gbs:.4g} GB/s", False
    )


def _measured(result: Result, options: argparse.Namespace) -> _Device | None:
    """The device of a result file; None where the file has nothing of the variant and the dtype."""
    from alexnet_triton.parallel.pipeline.work import Roofs, Table

    times = _times(result, options)
    tflops = result.roofs.get("tflops", {}).get(dtype_name(options.dtype))
    if not times or tflops is None:
        return None
    roofs = Roofs(1e12 * tflops, 1e9 * result.roofs["copy_gbs"])
    batches = ", ".join(f"{images:,}" for images in sorted({images for _, _, images in times}))
    name = "CPU" if result.on_cpu else str(result.machine["device"])
    source = f"{result.path.name}, {result.title}, batch {batches}"
    return _Device(name, Table(times, roofs, result.measured), roofs, source, result.on_cpu)


def _times(result: Result, options: argparse.Namespace) -> dict[tuple[str, str, int], float]:
    """Seconds of this package's layers, as `work.Table` takes them.

    What two variants have in common is measured once, so rows of another variant count where the layer is the same.
    """
    from alexnet_triton.bench.checks import FULL, layers
    from alexnet_triton.bench.results import OURS
    from alexnet_triton.variants import VARIANTS

    changed = {"fc8"} if options.num_classes != 1000 else set()
    if options.image_size not in (None, VARIANTS[options.variant].image_size):
        changed |= {name for name, _ in layers(options.variant, 1, FULL) if not name.startswith("fc")}
    times: dict[tuple[str, str, int], float] = {}
    for row in sorted(result.rows, key=lambda row: row["variant"] == options.variant):  # its own decide
        name, images, direction = row["layer"], row["batch"], row["direction"]
        own, other = (dict(layers(variant, images, FULL)).get(name) for variant in (options.variant, row["variant"]))
        if row["dtype"] == dtype_name(options.dtype) and own == other and name not in changed and OURS in row["times"]:
            times[name, direction.replace("data", "input"), images] = row["times"][OURS]["median"]
    return times
