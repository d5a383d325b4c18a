"""The commands that train the network: demo, train."""

from __future__ import annotations

import argparse
from pathlib import Path

from alexnet_triton.cli.words import INIT_NAMES, Commands, add_variant, positive, positive_float


def add_demo(commands: Commands) -> None:
    """Add `demo`."""
    demo = commands.add_parser("demo", help="train on real images and write a page of what was learned")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="default: %(default)s")
    demo.add_argument("--data", type=Path, metavar="FOLDER", help="folder of class folders; default: scanned digits")
    add_variant(demo)
    demo.add_argument("--epochs", type=positive, default=5, metavar="N", help="default: %(default)s")
    demo.add_argument("--batch-size", type=positive, default=32, metavar="N", help="default: %(default)s")
    demo.add_argument("--lr", type=positive_float, metavar="RATE", help="learning rate; default: 0.03")
    demo.add_argument("--init", choices=INIT_NAMES, default="kaiming", help="default: %(default)s")
    demo.add_argument("--image-size", type=positive, metavar="PIXELS", help="default: 67, of a folder 128")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    demo.add_argument("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    from alexnet_triton.demo.run import DemoOptions, run
    from alexnet_triton.recipe.memory import keep_freed_memory

    keep_freed_memory()
    given = {name: value for name, value in vars(options).items() if name != "run" and value is not None}
    run(DemoOptions(**given))
