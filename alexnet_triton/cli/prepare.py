"""The command that packs images: prepare."""

from __future__ import annotations

import argparse
from pathlib import Path

from alexnet_triton.cli.words import Commands, positive


def add_prepare(commands: Commands) -> None:
    """Add `prepare`."""
    prepare = commands.add_parser(
        "prepare",
        help="pack a folder of images, to train on it at speed",
        description="Make a packed dataset of a folder of class folders: upright RGB images of one size, with their "
        "classes, names and colours. It takes 3 * size^2 bytes an image: of ImageNet's 1,281,167 images at 256 pixels, "
        "251.9 GB. It may be stopped, and killed, at any moment: the same command goes on.",
    )
    source = "holds CLASS/IMAGE, or train/CLASS/IMAGE and val/CLASS/IMAGE"
    prepare.add_argument("source", type=Path, metavar="SRC", help=source)
    prepare.add_argument("destination", type=Path, metavar="DST", help="a new folder; until all is done, DST.partial")
    size = "shorter side, and side of the centre that is kept; default: %(default)s"
    prepare.add_argument("--size", type=positive, default=256, metavar="PIXELS", help=size)
    workers = "processes that decode; default: one a core"
    prepare.add_argument("--workers", type=positive, metavar="N", help=workers)
    prepare.add_argument("--skip-bad", action="store_true", help="pass over images that cannot be decoded")
    prepare.set_defaults(run=_prepare)


def _prepare(options: argparse.Namespace) -> None:
    from alexnet_triton.recipe.data.prepare import prepare

    o = options
    prepare(o.source, o.destination, o.size, workers=o.workers, skip_bad=o.skip_bad, progress=True)
