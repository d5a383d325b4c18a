"""The command line: `alexnet-triton ...`, also `python -m alexnet_triton ...`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from alexnet_triton.cli import measure, pipeline, prepare, scale, train, use


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and give its exit code: 0, 2 for what a user can mend, 130 after Ctrl-C.

    `train` gives 143 after SIGTERM; `inspect` 1 where a budget is broken, `bench gpu` where a check failed, `bench
    readme --check` where a page is not what the results give.

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
        return 128 + int(getattr(error, "signal", signal.SIGINT))
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
    measure.add_info(commands)
    train.add_demo(commands)
    prepare.add_prepare(commands)
    train.add_train(commands)
    use.add_evaluate(commands)
    use.add_predict(commands)
    use.add_features(commands)
    use.add_filters(commands)
    measure.add_bench(commands)
    measure.add_plot(commands)
    measure.add_autotune(commands)
    measure.add_inspect(commands)
    pipeline.add_pipeline(commands)
    scale.add_scale(commands)
    return parser


def _show_warning(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
    print(f"alexnet-triton: warning: {message}", file=sys.stderr)
