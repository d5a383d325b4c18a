"""The commands that look at the network and measure it: info, bench, plot, autotune, inspect."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from alexnet_triton.cli.words import (
    DTYPE_NAMES,
    VARIANT_NAMES,
    Commands,
    add_dtype,
    add_out,
    add_variant,
    counts,
    dtype_name,
    dtypes,
    numbers,
    positive,
    positive_float,
    seconds,
)

PLOT_NAMES = ("roofline", "throughput", "layers", "tuning", "schedules")


def add_info(commands: Commands) -> None:
    """Add `info`."""
    info = commands.add_parser("info", help="print the table of layers")
    add_variant(info)
    info.add_argument("--batch", type=positive, default=1, metavar="N", help="images; default: %(default)s")
    info.add_argument("--num-classes", type=positive, default=1000, metavar="N", help="default: %(default)s")
    info.add_argument("--image-size", type=positive, metavar="PIXELS", help="default: the variant's own")
    info.set_defaults(run=_info)


def add_bench(commands: Commands) -> None:
    """Add `bench` and its benchmarks."""
    bench = commands.add_parser("bench", help="measure this machine, or predict another")
    benches = bench.add_subparsers(required=True, metavar="BENCHMARK")

    cpu = benches.add_parser("cpu", help="this network beside torchvision's on the CPU")
    add_out(cpu)
    cpu.add_argument("--rounds", type=positive, default=15, metavar="N", help="default: %(default)s")
    cpu.set_defaults(run=_bench_cpu)

    dispatch = benches.add_parser("dispatch", help="what a call of an op costs beside its kernels")
    add_out(dispatch)
    dispatch.set_defaults(run=_bench_dispatch)

    layers = benches.add_parser("layers", help="each layer and direction, against torch's op and its floor")
    model = benches.add_parser("model", help="inference and training steps, against their peers")
    lpips = benches.add_parser("lpips", help="the trunk of LPIPS, to the gradient of the image")
    parallel = benches.add_parser("parallel", help="training steps in several processes, against one; simulations")
    for measured in (layers, model, lpips, parallel):
        add_out(measured)
        if measured is not lpips:
            measured.add_argument("--variant", choices=VARIANT_NAMES, action="append", help="may be repeated")
        measured.add_argument("--batch", type=numbers, default=(), metavar="N,N,...", help="images")
        measured.add_argument("--dtype", choices=DTYPE_NAMES, action="append", metavar="NAME", help="may be repeated")
        measured.add_argument("--rounds", type=positive, metavar="N", help="samples of each time")
        measured.add_argument("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    lpips.add_argument("--size", type=numbers, default=(), metavar="N,N,...", help="pixels a side")
    compiled = "measure torch.compile too, which takes minutes; default: on a GPU alone"
    model.add_argument("--compile", action=argparse.BooleanOptionalAction, help=compiled)
    for name, measured in (("layers", layers), ("model", model), ("lpips", lpips), ("parallel", parallel)):
        measured.set_defaults(run=_bench_measured, benchmark=name)

    data = benches.add_parser("data", help="images a second of each stage from files to the network's input")
    add_out(data)
    data.add_argument("--images", type=positive, default=64, metavar="N", help="generated; default: %(default)s")
    data.add_argument("--batch", type=positive, default=32, metavar="N", help="default: %(default)s")
    workers = "that read on whole paths; default: 0, 1, 2, ... up to one a core"
    data.add_argument("--workers", type=counts, metavar="N,N,...", help=workers)
    data.add_argument("--rounds", type=positive, default=7, metavar="N", help="default: %(default)s")
    size = "side that images are brought to; default: %(default)s"
    data.add_argument("--size", type=positive, default=256, metavar="PIXELS", help=size)
    crop = "network input; default: %(default)s"
    data.add_argument("--crop", type=positive, default=227, metavar="PIXELS", help=crop)
    data.add_argument("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    data.set_defaults(run=_bench_data)

    predict = benches.add_parser("predict", help="a model's estimate of every layer on a card that need not be there")
    add_out(predict)
    add_variant(predict)
    predict.add_argument("--card", default="h100", metavar="NAME", help="h100, h200, a100; default: %(default)s")
    predict.add_argument("--batch", type=numbers, default=(1, 16, 128, 1024), metavar="N,N,...", help="a table each")
    add_dtype(predict)
    predict.add_argument("--results", type=Path, metavar="FILE", help="a measured layers.json to stand beside")
    predict.add_argument("--schedules", action="store_true", help="how the launches fill the card, and nothing else")
    predict.set_defaults(run=_bench_predict)

    readme = benches.add_parser("readme", help="write the tables and pictures of this repository's pages anew")
    readme.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something would be")
    readme.set_defaults(run=_bench_readme)

    gpu = benches.add_parser("gpu", help="check the kernels on the GPU and time them, in under nine minutes")
    out = Path(os.environ.get("OUT") or "gpu-out")
    gpu.add_argument("--out", type=Path, default=out, metavar="DIR", help="default: $OUT, else gpu-out")
    gpu.add_argument("--budget", type=positive_float, default=500.0, metavar="SECONDS", help="default: %(default)g")
    gpu.add_argument("--parts", nargs="+", default=(), metavar="NAME", help="some parts alone; default: all")
    gpu.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, small, interpreted")
    gpu.set_defaults(run=_bench_gpu)


def add_plot(commands: Commands) -> None:
    """Add `plot`."""
    plot = commands.add_parser("plot", help="draw what a benchmark has measured, as PNG and SVG")
    plot.add_argument("kind", choices=PLOT_NAMES, help="what to draw")
    results = "of the benchmarks; default: this machine is measured first"
    plot.add_argument("--results", type=Path, nargs="+", default=(), metavar="FILE", help=results)
    add_out(plot)
    plot.set_defaults(run=_plot)


def add_autotune(commands: Commands) -> None:
    """Add `autotune`."""
    tune = commands.add_parser("autotune", help="find the fastest config of every launch, and keep it for this GPU")
    add_variant(tune)
    tune.add_argument("--batch", type=numbers, default=(1, 128, 1024), metavar="N,N,...", help="default: 1,128,1024")
    add_dtype(tune)
    tune.add_argument("--layer", metavar="NAME", help="one layer alone, as in conv2, pool5, fc6")
    directions = ("forward", "data gradient", "weight gradient")
    tune.add_argument("--direction", choices=directions, help="one direction alone")
    budget = "as in 180s, 5m; default: 180s, of a dry run none"
    tune.add_argument("--budget", type=seconds, metavar="TIME", help=budget)
    tune.add_argument("--jobs", type=positive, metavar="N", help="processes that compile; default: one a core")
    tune.add_argument("--export", type=Path, metavar="FILE", help="write the configs there; its name is the card's")
    tune.add_argument("--log", type=Path, metavar="FILE", help="write every trial there, as `plot tuning` takes it")
    tune.add_argument("--dry-run", action="store_true", help="needs no GPU: compile, prune, print what would be timed")
    tune.add_argument("--target", default="sm_90", metavar="NAME", help="of a dry run; default: %(default)s")
    tune.set_defaults(run=_autotune)


def add_inspect(commands: Commands) -> None:
    """Add `inspect`."""
    inspect = commands.add_parser("inspect", help="compile every kernel for a GPU that need not be here; check budgets")
    inspect.add_argument("--target", default="sm_90", metavar="NAME", help="as in sm_80, gfx942; default: %(default)s")
    add_variant(inspect)
    add_dtype(inspect)
    inspect.add_argument("--batch", type=positive, default=128, metavar="N", help="images; default: %(default)s")
    inspect.add_argument("--layer", metavar="NAME", help="one layer alone, as in conv2, pool5, fc6")
    inspect.add_argument("--all", action="store_true", help="also copies, packed filters and sums of parts")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)


def _info(options: argparse.Namespace) -> None:
    from alexnet_triton.info import format_table, layer_table

    rows = layer_table(options.variant, options.batch, options.num_classes, options.image_size)
    print(format_table(rows))


def _bench_cpu(options: argparse.Namespace) -> None:
    from alexnet_triton.bench.cpu import run

    run(options.out, options.rounds)


def _bench_dispatch(options: argparse.Namespace) -> None:
    from alexnet_triton.bench.dispatch import run

    run(options.out)


def _bench_measured(options: argparse.Namespace) -> None:
    from importlib import import_module

    from alexnet_triton.bench.benchmark import run

    words = {"variant": "variants", "batch": "batches", "size": "sizes", "rounds": "rounds", "compile": "compiled"}
    asked = {name: getattr(options, word) for word, name in words.items() if getattr(options, word, None) is not None}
    measured = import_module(f"alexnet_triton.bench.{options.benchmark}").BENCHMARK
    run(measured, options.out, options.device, dtypes=dtypes(options.dtype), **asked)


def _bench_data(options: argparse.Namespace) -> None:
    from alexnet_triton.bench.data import run
    from alexnet_triton.recipe.train.memory import keep_freed_memory

    keep_freed_memory()  # as training does
    o = options
    run(o.out, o.images, o.batch, o.workers, o.rounds, o.size, o.crop, o.device)


def _bench_predict(options: argparse.Namespace) -> int:
    from alexnet_triton.bench.predict import run

    o = options
    return run(o.card, o.variant, o.batch, dtype_name(o.dtype), o.results, o.schedules, o.out)


def _bench_readme(options: argparse.Namespace) -> int:
    from alexnet_triton.bench.readme import run

    return run(options.check)


def _plot(options: argparse.Namespace) -> None:
    from alexnet_triton.bench.plots import run

    run(options.kind, options.results, options.out)


def _bench_gpu(options: argparse.Namespace) -> int:
    from alexnet_triton.bench.gpu import run

    return run(options.out, options.budget, options.parts, options.device)


def _inspect(options: argparse.Namespace) -> int:
    from alexnet_triton.tuning.inspect import run

    o = options
    return run(o.target, o.variant, dtype_name(o.dtype), o.batch, o.layer, o.all, o.json)


def _autotune(options: argparse.Namespace) -> int:
    from alexnet_triton.tuning.autotune import Options, run

    o = options
    budget = o.budget or (float("inf") if o.dry_run else 180.0)
    chosen = (o.variant, o.batch, dtype_name(o.dtype), o.layer, o.direction, budget, o.jobs)
    return run(Options(*chosen, o.dry_run, o.target, o.export, o.log))
