"""The commands that train the network: demo, train."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from alexnet_triton.cli.words import (
    INIT_NAMES,
    READERS,
    SCHEDULE_NAMES,
    VARIANT_NAMES,
    Commands,
    add_variant,
    count,
    positive,
    positive_float,
)

DEFAULT = "default: %(default)s"


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


def add_train(commands: Commands) -> None:
    """Add `train`."""
    train = commands.add_parser(
        "train",
        help="train on a packed dataset or a folder of class folders",
        description="Train as Krizhevsky et al. did in 2012, whose settings are the defaults. On several GPUs: "
        "torchrun --nproc-per-node N -m alexnet_triton train DATA ...",
    )
    _add_images(train)
    _add_network(train)
    _add_rule(train)
    _add_layout(train)
    _add_run(train)
    train.set_defaults(run=_train)


def _add_images(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("images")
    group.add_argument("data", type=Path, metavar="DATA", help="made by `prepare`, or a folder CLASS/IMAGE")
    val = "images to judge by; default: `val` in DATA where it holds `train` and `val`, else some held out by the seed"
    group.add_argument("--val", type=Path, metavar="DATA", help=val)
    group.add_argument("--held-out", type=float, default=0.1, metavar="SHARE", help=f"how many; {DEFAULT}")
    size = "side that a folder's images are brought to; default: 256, or that of the checkpoint that is judged"
    group.add_argument("--size", type=positive, metavar="PIXELS", help=size)
    group.add_argument("--crop", type=positive, metavar="PIXELS", help="network input; default: the variant's own")
    group.add_argument("--no-mirror", dest="mirror", action="store_false", help="mirror no images, as of digits")
    colour = f"spread of the multiples of PCA colour; {DEFAULT}"
    group.add_argument("--pca-std", type=float, default=0.1, metavar="STD", help=colour)


def _add_network(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("network")
    group.add_argument("--variant", choices=VARIANT_NAMES, help="default: merged, or that of --init-from")
    group.add_argument("--init", choices=INIT_NAMES, help="fresh parameters; default: the variant's own, of 2012")
    init_from = "start from these parameters with a new last layer: a checkpoint, torchvision's file, a .caffemodel"
    group.add_argument("--init-from", metavar="FILE", help=init_from)
    frozen = "modules whose parameters stay as they are, as in features"
    group.add_argument("--freeze", nargs="+", default=(), metavar="NAME", help=frozen)
    group.add_argument("--dropout", type=float, default=0.5, metavar="P", help=DEFAULT)


def _add_rule(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("rule")
    group.add_argument("--epochs", type=positive, default=90, metavar="N", help=DEFAULT)
    batch = f"images of a step and process; {DEFAULT}"
    group.add_argument("-b", "--batch-size", type=positive, default=128, metavar="N", help=batch)
    group.add_argument("--lr", type=positive_float, default=0.01, metavar="RATE", help=DEFAULT)
    group.add_argument("--momentum", type=float, default=0.9, metavar="M", help=DEFAULT)
    decay = ("--wd", "--weight-decay")
    group.add_argument(*decay, dest="weight_decay", type=float, default=5e-4, metavar="W", help=DEFAULT)
    bias_lr, bias_decay = (
        f"{what} of biases, as a multiple of the weights'; 2012's own code took {own}; {DEFAULT}"
        for what, own in (("rate", 2), ("decay", 0))
    )
    group.add_argument("--bias-lr", type=positive_float, default=1.0, metavar="X", help=bias_lr)
    group.add_argument("--bias-decay", type=float, default=1.0, metavar="X", help=bias_decay)
    schedule = f"when the rate falls; {DEFAULT}"
    group.add_argument("--lr-scheduler", choices=("plateau", "step", "cosine"), default="plateau", help=schedule)
    group.add_argument("--lr-step-size", type=positive, default=30, metavar="EPOCHS", help=f"of step; {DEFAULT}")
    group.add_argument("--lr-gamma", type=positive_float, default=0.1, metavar="X", help=f"by what; {DEFAULT}")
    patience = f"epochs without a lower loss that make a plateau; {DEFAULT}"
    group.add_argument("--lr-patience", type=count, default=5, metavar="EPOCHS", help=patience)
    group.add_argument("--clip-grad-norm", type=positive_float, metavar="NORM", help="default: no clipping")
    group.add_argument("--amp", action="store_true", help="mixed precision: bfloat16, beside float32 parameters")
    group.add_argument("--seed", type=int, default=0, metavar="N", help=DEFAULT)


def _add_layout(train: argparse.ArgumentParser) -> None:
    what = (
        "Started by torchrun, each has the whole network and a part of every batch, unless one of these shares it out."
    )
    group = train.add_argument_group("several processes", what)
    pipeline = f"cut the network into stages, one a process; {DEFAULT}"
    group.add_argument("--pipeline", type=positive, default=1, metavar="STAGES", help=pipeline)
    microbatches = f"parts of a batch that go through the stages one behind the other; {DEFAULT}"
    group.add_argument("--microbatches", type=positive, default=8, metavar="N", help=microbatches)
    group.add_argument("--schedule", choices=SCHEDULE_NAMES, default="1f1b", help=f"order of their work; {DEFAULT}")
    cut = "layers that begin a stage, but for the first, as in conv4; default: chosen by time, traffic and memory"
    group.add_argument("--cut", nargs="+", default=(), metavar="LAYER", help=cut)
    trace = "draw one step of a pipeline: when each stage worked on what"
    group.add_argument("--trace", type=Path, metavar="FILE.png", help=trace)
    group.add_argument("--towers", action="store_true", help="half of every layer of variant paper in each of two")
    hybrid = "convolutions in each, fully connected layers shared out (Krizhevsky 2014)"
    group.add_argument("--hybrid", action="store_true", help=hybrid)


def _add_run(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("run")
    group.add_argument("--output-dir", type=Path, default=Path("runs"), metavar="DIR", help=DEFAULT)
    resume = "go on from a checkpoint; without FILE from the newest in --output-dir, or from the start"
    group.add_argument("--resume", nargs="?", const="newest", metavar="FILE", help=resume)
    group.add_argument("--test-only", action="store_true", help="judge the network of --resume or --init-from")
    readers = "threads that read; default: one a core, 8 at most"
    group.add_argument("-j", "--workers", type=count, default=READERS, metavar="N", help=readers)
    looks = f"from one look at the loss to the next, on a GPU; {DEFAULT}"
    group.add_argument("--print-freq", type=positive, default=10, metavar="STEPS", help=looks)
    group.add_argument("--keep", type=positive, default=3, metavar="N", help=f"newest checkpoints to keep; {DEFAULT}")
    group.add_argument(
        "--compile", dest="compiled", action="store_true", help="with torch.compile, which needs a C++ compiler"
    )
    group.add_argument("--device", metavar="NAME", help="default: cuda where there is one, else cpu")


def _demo(options: argparse.Namespace) -> None:
    from alexnet_triton.demo.run import DemoOptions, run
    from alexnet_triton.recipe.train.memory import keep_freed_memory

    keep_freed_memory()
    given = {name: value for name, value in vars(options).items() if name != "run" and value is not None}
    run(DemoOptions(**given))


def _train(options: argparse.Namespace) -> None:
    from alexnet_triton.parallel.layout import Layout
    from alexnet_triton.recipe.train.memory import keep_freed_memory
    from alexnet_triton.recipe.train.run import Options, judge, run
    from alexnet_triton.recipe.train.settings import Settings

    keep_freed_memory()
    given = vars(options)
    names = {field.name for field in fields(Settings)} - {"crop"}
    settings = Settings(**{name: given[name] for name in names})
    layout = Layout(**{field.name: given[field.name] for field in fields(Layout)})
    names = {field.name for field in fields(Options)} - {"settings", "layout"}
    told = Options(**{name: given[name] for name in names}, settings=settings, layout=layout)
    (judge if options.test_only else run)(told)
