"""The command line: `alexnet-triton ...`, also `python -m alexnet_triton ...`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

VARIANT_NAMES = ("merged", "paper", "torchvision", "caffe")
INIT_NAMES = (*VARIANT_NAMES, "kaiming")
SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and give its exit code: 0, 2 for what a user can mend, 130 after Ctrl-C.

    `inspect` gives 1 where a budget is broken, `bench gpu` where a check failed.

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

    parser = argparse.ArgumentParser("alexnet-triton", description="AlexNet on fused ops: inspect, train, measure.")
    parser.add_argument("--version", action="version", version=f"alexnet-triton {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="print the table of layers")
    info.add_argument("--variant", choices=VARIANT_NAMES, default="merged", help="default: %(default)s")
    info.add_argument("--batch", type=_positive, default=1, metavar="N", help="images; default: %(default)s")
    info.add_argument("--num-classes", type=_positive, default=1000, metavar="N", help="default: %(default)s")
    info.add_argument("--image-size", type=_positive, metavar="PIXELS", help="default: the variant's own")
    info.set_defaults(run=_info)

    demo = commands.add_parser("demo", help="train on real images and write a page of what was learned")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="default: %(default)s")
    demo.add_argument("--data", type=Path, metavar="FOLDER", help="folder of class folders; default: scanned digits")
    demo.add_argument("--variant", choices=VARIANT_NAMES, default="merged", help="default: %(default)s")
    demo.add_argument("--epochs", type=_positive, default=5, metavar="N", help="default: %(default)s")
    demo.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="default: %(default)s")
    demo.add_argument("--lr", type=_positive_float, metavar="RATE", help="learning rate; default: 0.03")
    demo.add_argument("--init", choices=INIT_NAMES, default="kaiming", help="default: %(default)s")
    demo.add_argument("--image-size", type=_positive, metavar="PIXELS", help="default: 67, of a folder 128")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    demo.add_argument("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="measure this machine")
    benches = bench.add_subparsers(required=True, metavar="BENCHMARK")
    cpu = benches.add_parser("cpu", help="this network beside torchvision's on the CPU")
    cpu.add_argument("--out", type=Path, default=Path("bench-out"), metavar="DIR", help="default: %(default)s")
    cpu.add_argument("--rounds", type=_positive, default=15, metavar="N", help="default: %(default)s")
    cpu.set_defaults(run=_bench_cpu)
    dispatch = benches.add_parser("dispatch", help="what a call of an op costs beside its kernels")
    dispatch.add_argument("--out", type=Path, default=Path("bench-out"), metavar="DIR", help="default: %(default)s")
    dispatch.set_defaults(run=_bench_dispatch)
    gpu = benches.add_parser("gpu", help="check the kernels on the GPU and time them, in under nine minutes")
    out = Path(os.environ.get("OUT") or "gpu-out")
    gpu.add_argument("--out", type=Path, default=out, metavar="DIR", help="default: $OUT, else gpu-out")
    gpu.add_argument("--budget", type=_positive_float, default=500.0, metavar="SECONDS", help="default: %(default)g")
    gpu.add_argument("--parts", nargs="+", default=(), metavar="NAME", help="some parts alone; default: all")
    gpu.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, small, interpreted")
    gpu.set_defaults(run=_bench_gpu)

    dtypes = (*SHORT_DTYPES, *SHORT_DTYPES.values())
    names = f"{', '.join(SHORT_DTYPES)} or torch's names; default: %(default)s"

    tune = commands.add_parser("autotune", help="find the fastest config of every launch, and keep it for this GPU")
    tune.add_argument("--variant", choices=VARIANT_NAMES, default="merged", help="default: %(default)s")
    tune.add_argument("--batch", type=_batches, default=(1, 128, 1024), metavar="N,N,...", help="default: 1,128,1024")
    tune.add_argument("--dtype", choices=dtypes, default="bfloat16", metavar="NAME", help=names)
    tune.add_argument("--layer", metavar="NAME", help="one layer alone, as in conv2, pool5, fc6")
    directions = ("forward", "data gradient", "weight gradient")
    tune.add_argument("--direction", choices=directions, help="one direction alone")
    budget = "as in 180s, 5m; default: 180s, of a dry run none"
    tune.add_argument("--budget", type=_seconds, metavar="TIME", help=budget)
    tune.add_argument("--jobs", type=_positive, metavar="N", help="processes that compile; default: one a core")
    tune.add_argument("--export", type=Path, metavar="FILE", help="write the configs there; its name is the card's")
    tune.add_argument("--dry-run", action="store_true", help="needs no GPU: compile, prune, print what would be timed")
    tune.add_argument("--target", default="sm_90", metavar="NAME", help="of a dry run; default: %(default)s")
    tune.set_defaults(run=_autotune)

    inspect = commands.add_parser("inspect", help="compile every kernel for a GPU that need not be here; check budgets")
    inspect.add_argument("--target", default="sm_90", metavar="NAME", help="as in sm_80, gfx942; default: %(default)s")
    inspect.add_argument("--variant", choices=VARIANT_NAMES, default="merged", help="default: %(default)s")
    inspect.add_argument("--dtype", choices=dtypes, default="bfloat16", metavar="NAME", help=names)
    inspect.add_argument("--batch", type=_positive, default=128, metavar="N", help="images; default: %(default)s")
    inspect.add_argument("--layer", metavar="NAME", help="one layer alone, as in conv2, pool5, fc6")
    inspect.add_argument("--all", action="store_true", help="also copies, packed filters and sums of parts")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)
    return parser


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


def _bench_gpu(options: argparse.Namespace) -> int:
    from alexnet_triton.bench.gpu import run

    return run(options.out, options.budget, options.parts, options.device)


def _inspect(options: argparse.Namespace) -> int:
    from alexnet_triton.tuning.inspect import run

    o = options
    return run(o.target, o.variant, SHORT_DTYPES.get(o.dtype, o.dtype), o.batch, o.layer, o.all, o.json)


def _autotune(options: argparse.Namespace) -> int:
    from alexnet_triton.tuning.autotune import Options, run

    o = options
    dtype = SHORT_DTYPES.get(o.dtype, o.dtype)
    budget = o.budget or (float("inf") if o.dry_run else 180.0)
    return run(Options(o.variant, o.batch, dtype, o.layer, o.direction, budget, o.jobs, o.dry_run, o.target, o.export))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _batches(text: str) -> tuple[int, ...]:
    return tuple(_positive(word) for word in text.split(","))


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
