"""The command that estimates training on many GPUs: scale."""

from __future__ import annotations

import argparse
import math

from alexnet_triton.cli.words import LINK_NAMES, Commands, add_dtype, add_variant, dtype_name, positive, positive_float

CARD_NAMES = ("gtx580", "k20", "p40", "v100", "a100", "h100", "h200")
LAYOUT_NAMES = ("data", "pipeline", "hybrid", "towers")
"""As in `alexnet_triton.parallel.scaling`, which is not loaded to print help."""


def add_scale(commands: Commands) -> None:
    """Add `scale`."""
    scale = commands.add_parser(
        "scale",
        help="a model's estimate of training on many GPUs, of many machines",
        description="A model's estimate of training on many GPUs, nothing is measured. Columns: images and time of a "
        "step; the share of it that is computing, a pipeline's bubble included; images a second, and over as many "
        "times one GPU's; bytes that a GPU sends in a step; bytes of 256x256 images that a machine must read a second.",
    )
    add_variant(scale)
    scale.add_argument("--batch", type=positive, default=128, metavar="N", help="images a GPU; default: %(default)s")
    add_dtype(scale)
    scale.add_argument("--num-classes", type=positive, default=1000, metavar="N", help="default: %(default)s")
    gpus = "of all machines; a row or more for each; default: 1 2 8 64 1024"
    scale.add_argument("--gpus", type=positive, nargs="+", default=(1, 2, 8, 64, 1024), metavar="N", help=gpus)
    scale.add_argument("--layout", choices=LAYOUT_NAMES, nargs="+", help="default: data, pipeline, hybrid")
    scale.add_argument("--card", choices=CARD_NAMES, default="h100", help="default: %(default)s")
    scale.add_argument("--inside", choices=LINK_NAMES, help="between a machine's GPUs; default: the card's own")
    scale.add_argument("--gpus-per-machine", type=positive, default=8, metavar="N", help="default: %(default)s")
    network = "of a machine, all its ports together; default: %(default)g"
    scale.add_argument("--network", type=positive_float, default=400.0, metavar="GBIT/S", help=network)
    read = "of images that a machine can read; default: as many as are asked for"
    scale.add_argument("--read", type=positive_float, metavar="GB/S", help=read)
    scale.add_argument("--one-gpu", type=positive_float, metavar="IMAGES/S", help="as measured; default: from the card")
    scale.add_argument(
        "--microbatches", type=positive, default=8, metavar="N", help="of pipeline; default: %(default)s"
    )
    group = "of hybrid: GPUs that share the fully connected layers; default: all"
    scale.add_argument("--group", type=positive, metavar="N", help=group)
    scale.add_argument("--epochs", type=positive_float, default=90.0, metavar="N", help="default: %(default)g")
    scale.add_argument(
        "--published", action="store_true", help="hold the model against published runs, and nothing else"
    )
    scale.set_defaults(run=_scale)


def _scale(options: argparse.Namespace) -> None:
    from alexnet_triton.parallel.scaling import CARDS, LINKS, Cluster, Job, alone, estimate, network
    from alexnet_triton.parallel.scaling.published import compared
    from alexnet_triton.parallel.scaling.table import table

    o = options
    if o.published:
        print(compared())
        return
    card = CARDS[o.card]
    inside = o.inside or card.inside
    cluster = Cluster(card, LINKS[inside], network(o.network), o.gpus_per_machine, 1e9 * o.read if o.read else math.inf)
    job = Job(o.variant, o.batch, dtype_name(o.dtype), o.num_classes, one_gpu=o.one_gpu)
    rows = [
        estimate(layout, gpus, job, cluster, microbatches=o.microbatches, group=o.group if layout == "hybrid" else None)
        for gpus in o.gpus
        for layout in (o.layout or _layouts(gpus) if gpus > 1 else ["data"])
    ]
    speed = f", {o.one_gpu:,g} images/s of one GPU given" if o.one_gpu else ""
    print(
        f"a model's estimate, nothing is measured: {o.variant}, {job.dtype}, {o.batch:,} images a GPU{speed}\n"
        f"{card.name}, {o.gpus_per_machine:,} a machine on {inside}, {cluster.network.name} a machine"
    )
    print(f"\n{table(rows, alone(job, cluster), o.epochs)}")


def _layouts(gpus: int) -> list[str]:
    """Those that any network has on so many GPUs."""
    return ["data", "pipeline", "hybrid"] if gpus % 2 == 0 else ["data", "hybrid"]
