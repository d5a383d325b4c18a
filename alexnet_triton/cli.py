"""The command line: `alexnet-triton ...`, also `python -m alexnet_triton ...`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

VARIANT_NAMES = ("merged", "paper", "torchvision", "caffe")
INIT_NAMES = (*VARIANT_NAMES, "kaiming")
SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
DTYPE_NAMES = (*SHORT_DTYPES, *SHORT_DTYPES.values())
PLOT_NAMES = ("roofline", "throughput", "layers", "tuning")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and give its exit code: 0, 2 for what a user can mend, 130 after Ctrl-C.

    `inspect` gives 1 where a budget is broken, `bench gpu` where a check failed, `bench readme --check` where a page is
    not what the results give.

    Args:
        arguments: the words after the program's name; None takes the process's own.
    """
    options = _parser().parse_args(arguments)
    warnings.showwarning = _show_warning
    try:
        code = options.run(options) or 0
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        print(f"\nalexnet-triton: {str(error) or 'stopped'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("ALEXNET_TRITON_TRACEBACK"):
            raise
        print(f"alexnet-triton: {error}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    from alexnet_triton import __version__

    parser = argparse.ArgumentParser(
        "alexnet-triton", description="AlexNet on fused ops: train, tune, measure, inspect."
    )
    parser.add_argument("--version", action="version", version=f"alexnet-triton {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_info(commands)
    _add_demo(commands)
    _add_bench(commands)
    _add_plot(commands)
    _add_autotune(commands)
    _add_inspect(commands)
    return parser


Commands = Any
"""What `ArgumentParser.add_subparsers` gives."""


def _add_info(commands: Commands) -> None:
    info = commands.add_parser("info", help="print the table of layers")
    _add_variant(info)
    info.add_argument("--batch", type=_positive, default=1, metavar="N", help="images; default: %(default)s")
    info.add_argument("--num-classes", type=_positive, default=1000, metavar="N", help="default: %(default)s")
    info.add_argument("--image-size", type=_positive, metavar="PIXELS", help="default: the variant's own")
    info.set_defaults(run=_info)


def _add_demo(commands: Commands) -> None:
    demo = commands.add_parser("demo", help="train on real images and write a page of what was learned")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="default: %(default)s")
    demo.add_argument("--data", type=Path, metavar="FOLDER", help="folder of class folders; default: scanned digits")
    _add_variant(demo)
    demo.add_argument("--epochs", type=_positive, default=5, metavar="N", help="default: %(default)s")
    demo.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="default: %(default)s")
    demo.add_argument("--lr", type=_positive_float, metavar="RATE", help="learning rate; default: 0.03")
    demo.add_argument("--init", choices=INIT_NAMES, default="kaiming", help="default: %(default)s")
    demo.add_argument("--image-size", type=_positive, metavar="PIXELS", help="default: 67, of a folder 128")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    demo.add_argument("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    demo.set_defaults(run=_demo)


def _add_bench(commands: Commands) -> None:
    bench = commands.add_parser("bench", help="measure this machine, or predict another")
    benches = bench.add_subparsers(required=True, metavar="BENCHMARK")

    cpu = benches.add_parser("cpu", help="this network beside torchvision's on the CPU")
    _add_out(cpu)
    cpu.add_argument("--rounds", type=_positive, default=15, metavar="N", help="default: %(default)s")
    cpu.set_defaults(run=_bench_cpu)

    dispatch = benches.add_parser("dispatch", help="what a call of an op costs beside its kernels")
    _add_out(dispatch)
    dispatch.set_defaults(run=_bench_dispatch)

    layers = benches.add_parser("layers", help="each layer and direction, against torch's op and its floor")
    model = benches.add_parser("model", help="inference and training steps, against their peers")
    lpips = benches.add_parser("lpips", help="the trunk of LPIPS, to the gradient of the image")
    for measured in (layers, model, lpips):
        _add_out(measured)
        if measured is not lpips:
            measured.add_argument("--variant", choices=VARIANT_NAMES, action="append", help="may be repeated")
        measured.add_argument("--batch", type=_numbers, default=(), metavar="N,N,...", help="images")
        measured.add_argument("--dtype", choices=DTYPE_NAMES, action="append", metavar="NAME", help="may be repeated")
        measured.add_argument("--rounds", type=_positive, metavar="N", help="samples of each time")
        measured.add_argument("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    lpips.add_argument("--size", type=_numbers, default=(), metavar="N,N,...", help="pixels a side")
    compiled = "measure torch.compile too, which takes minutes; default: on a GPU alone"
    model.add_argument("--compile", action=argparse.BooleanOptionalAction, help=compiled)
    for name, measured in (("layers", layers), ("model", model), ("lpips", lpips)):
        measured.set_defaults(run=_bench_measured, benchmark=name)

    data = benches.add_parser("data", help="images a second of each stage from files to the network's input")
    _add_out(data)
    data.add_argument("--images", type=_positive, default=64, metavar="N", help="generated; default: %(default)s")
    data.add_argument("--batch", type=_positive, default=32, metavar="N", help="default: %(default)s")
    workers = "processes of a DataLoader; default: 0, 1, 2, ... up to one a core"
    data.add_argument("--workers", type=_counts, metavar="N,N,...", help=workers)
    data.add_argument("--rounds", type=_positive, default=7, metavar="N", help="default: %(default)s")
    data.add_argument("--size", type=_positive, default=224, metavar="PIXELS", help="default: %(default)s")
    data.add_argument("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    data.set_defaults(run=_bench_data)

    predict = benches.add_parser("predict", help="a model's estimate of every layer on a card that need not be there")
    _add_out(predict)
    _add_variant(predict)
    predict.add_argument("--card", default="h100", metavar="NAME", help="h100, h200, a100; default: %(default)s")
    predict.add_argument("--batch", type=_numbers, default=(1, 16, 128, 1024), metavar="N,N,...", help="a table each")
    _add_dtype(predict)
    predict.add_argument("--results", type=Path, metavar="FILE", help="a measured layers.json to stand beside")
    predict.add_argument("--schedules", action="store_true", help="how the launches fill the card, and nothing else")
    predict.set_defaults(run=_bench_predict)

    readme = benches.add_parser("readme", help="write the tables and pictures of this repository's pages anew")
    readme.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something would be")
    readme.set_defaults(run=_bench_readme)

    gpu = benches.add_parser("gpu", help="check the kernels on the GPU and time them, in under nine minutes")
    out = Path(os.environ.get("OUT") or "gpu-out")
    gpu.add_argument("--out", type=Path, default=out, metavar="DIR", help="default: $OUT, else gpu-out")
    gpu.add_argument("--budget", type=_positive_float, default=500.0, metavar="SECONDS", help="default: %(default)g")
    gpu.add_argument("--parts", nargs="+", default=(), metavar="NAME", help="some parts alone; default: all")
    gpu.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, small, interpreted")
    gpu.set_defaults(run=_bench_gpu)


def _add_plot(commands: Commands) -> None:
    plot = commands.add_parser("plot", help="draw what a benchmark has measured, as PNG and SVG")
    plot.add_argument("kind", choices=PLOT_NAMES, help="what to draw")
    results = "of the benchmarks; default: this machine is measured first"
    plot.add_argument("--results", type=Path, nargs="+", default=(), metavar="FILE", help=results)
    _add_out(plot)
    plot.set_defaults(run=_plot)


def _add_autotune(commands: Commands) -> None:
    tune = commands.add_parser("autotune", help="find the fastest config of every launch, and keep it for this GPU")
    _add_variant(tune)
    tune.add_argument("--batch", type=_numbers, default=(1, 128, 1024), metavar="N,N,...", help="default: 1,128,1024")
    _add_dtype(tune)
    tune.add_argument("--layer", metavar="NAME", help="one layer alone, as in conv2, pool5, fc6")
    directions = ("forward", "data gradient", "weight gradient")
    tune.add_argument("--direction", choices=directions, help="one direction alone")
    budget = "as in 180s, 5m; default: 180s, of a dry run none"
    tune.add_argument("--budget", type=_seconds, metavar="TIME", help=budget)
    tune.add_argument("--jobs", type=_positive, metavar="N", help="processes that compile; default: one a core")
    tune.add_argument("--export", type=Path, metavar="FILE", help="write the configs there; its name is the card's")
    tune.add_argument("--log", type=Path, metavar="FILE", help="write every trial there, as `plot tuning` takes it")
    tune.add_argument("--dry-run", action="store_true", help="needs no GPU: compile, prune, print what would be timed")
    tune.add_argument("--target", default="sm_90", metavar="NAME", help="of a dry run; default: %(default)s")
    tune.set_defaults(run=_autotune)


def _add_inspect(commands: Commands) -> None:
    inspect = commands.add_parser("inspect", help="compile every kernel for a GPU that need not be here; check budgets")
    inspect.add_argument("--target", default="sm_90", metavar="NAME", help="as in sm_80, gfx942; default: %(default)s")
    _add_variant(inspect)
    _add_dtype(inspect)
    inspect.add_argument("--batch", type=_positive, default=128, metavar="N", help="images; default: %(default)s")
    inspect.add_argument("--layer", metavar="NAME", help="one layer alone, as in conv2, pool5, fc6")
    inspect.add_argument("--all", action="store_true", help="also copies, packed filters and sums of parts")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)


def _add_variant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variant", choices=VARIANT_NAMES, default="merged", help="default: %(default)s")


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    names = f"{', '.join(SHORT_DTYPES)} or torch's names; default: %(default)s"
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="bfloat16", metavar="NAME", help=names)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("bench-out"), metavar="DIR", help="default: %(default)s")


def _info(options: argparse.Namespace) -> None:
    from alexnet_triton.info import format_table, layer_table

    rows = layer_table(options.variant, options.batch, options.num_classes, options.image_size)
    print(format_table(rows))


def _demo(options: argparse.Namespace) -> None:
    from alexnet_triton.demo.run import DemoOptions, run
    from alexnet_triton.recipe.memory import keep_freed_memory

    keep_freed_memory()
    given = {name: value for name, value in vars(options).items() if name != "run" and value is not None}
    run(DemoOptions(**given))


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
    run(measured, options.out, options.device, dtypes=_dtypes(options.dtype), **asked)


def _bench_data(options: argparse.Namespace) -> None:
    from alexnet_triton.bench.data import run

    o = options
    run(o.out, o.images, o.batch, o.workers, o.rounds, o.size, o.device)


def _bench_predict(options: argparse.Namespace) -> int:
    from alexnet_triton.bench.predict import run

    o = options
    return run(o.card, o.variant, o.batch, _dtype(o.dtype), o.results, o.schedules, o.out)


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
    return run(o.target, o.variant, _dtype(o.dtype), o.batch, o.layer, o.all, o.json)


def _autotune(options: argparse.Namespace) -> int:
    from alexnet_triton.tuning.autotune import Options, run

    o = options
    budget = o.budget or (float("inf") if o.dry_run else 180.0)
    chosen = (o.variant, o.batch, _dtype(o.dtype), o.layer, o.direction, budget, o.jobs)
    return run(Options(*chosen, o.dry_run, o.target, o.export, o.log))


def _dtype(name: str) -> str:
    return SHORT_DTYPES.get(name, name)


def _dtypes(names: Sequence[str] | None) -> list[torch.dtype]:
    import torch

    return [getattr(torch, _dtype(name)) for name in names or ()]


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_positive(word) for word in text.split(","))


def _counts(text: str) -> tuple[int, ...]:
    values = tuple(int(word) for word in text.split(","))
    if min(values) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {min(values)}")
    return values


def _seconds(text: str) -> float:
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    try:
        return _positive_float(text[:-1]) * unit if unit else _positive_float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a time, as in 180s or 5m, got {text!r}") from None


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def _show_warning(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
    print(f"alexnet-triton: warning: {message}", file=sys.stderr)
