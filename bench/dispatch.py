"""What a call of an op costs beside its kernels: checks, dispatch and autograd, in eager mode."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from alexnet_triton import library, ops, use_backend
from alexnet_triton.bench import results
from alexnet_triton.bench.timing import machine

CALLS, ROUNDS = 2_000, 9


def run(out: Path, rounds: int = ROUNDS) -> None:
    """Time the ops on the Triton backend with the kernels left out, print a table and write `out`/dispatch.json.

    Twice: `us` with the allocation of the answers in the place of all that the kernels need, so that what is left is
    checks, dispatch and autograd; `host_us` with all that the host does, layouts, buffers and arguments included, but
    for Triton's own launches. Beside them, in the same run, torch's own ops on the same small tensors, which include
    their arithmetic.

    Args:
        out: folder for the results.
        rounds: of `CALLS` calls each; the fastest counts, since all else is noise of the machine.
    """
    os.environ["TRITON_INTERPRET"] = "1"  # no kernel runs; the backend asks for it before it takes a CPU tensor
    torch.set_num_threads(1)
    rows = []
    with use_backend("triton"), _without_launches():
        for name, call in tqdm(_calls().items(), desc="dispatch", leave=False):
            host = min(_time(call) for _ in range(rounds)) * 1e6
            with _without_kernels():
                dispatch = min(_time(call) for _ in range(rounds)) * 1e6
            rows.append({"call": name, "us": dispatch, "host_us": host})
    result = {**machine(), "calls": CALLS, "rounds": rounds, "rows": rows}
    results.write(out / "dispatch.json", result)
    print(format_table(result))


def format_table(result: dict[str, Any]) -> str:
    """The rows of a result, one a line."""
    lines = [f"{result['device']}, torch {result['torch']}, {result['date']}"]
    lines.append(f"{'us a call':<48} {'dispatch':>9} {'up to the launches':>19}")
    lines += [f"{row['call']:<48} {row['us']:>9.1f} {row['host_us']:>19.1f}" for row in result["rows"]]
    return "\n".join(lines)


@contextmanager
def _without_launches() -> Iterator[None]:
    """Within the block kernels are handed to nobody."""
    from alexnet_triton.kernels import launch

    def leave_out(kernel: Any, programs: int, **arguments: Any) -> None:
        pass

    kept, launch.launch = launch.launch, leave_out
    try:
        yield
    finally:
        launch.launch = kept


class _without_kernels:
    """Within the block the Triton implementation allocates its answers and launches nothing."""

    def __enter__(self) -> None:
        def forward(x: Any, *rest: Any) -> Any:
            return x.new_empty(1, 16, 3, 3), []

        def backward(grad: Any, x: Any, out: Any, saved: Any, parameters: Any, stages: Any, needs: Any, _: Any) -> Any:
            return [torch.empty_like(t) for t, needed in zip((x, *parameters), needs, strict=True) if needed]

        def linear(x: Any, weight: Any, *rest: Any) -> Any:
            return x.new_empty(x.shape[0], weight.shape[0])

        def linear_backward(grad: Any, x: Any, weight: Any, bias: Any, *rest: Any) -> Any:
            return [torch.empty_like(t) for t, needed in zip((x, weight, bias), rest[-1], strict=True) if needed]

        stand_ins = {
            "_run_stages": forward,
            "_run_stages_backward": backward,
            "_run_dropout_linear": linear,
            "_run_dropout_linear_backward": linear_backward,
        }
        self.kept = {name: getattr(library, name) for name in stand_ins}
        for name, stand_in in stand_ins.items():
            setattr(library, name, stand_in)

    def __exit__(self, *error: object) -> None:
        for name, function in self.kept.items():
            setattr(library, name, function)


def _calls() -> dict[str, Callable[[], Any]]:
    x, weight, bias = torch.randn(1, 16, 5, 5), torch.randn(16, 16, 3, 3), torch.randn(16)
    features, matrix, offset = torch.randn(2, 16), torch.randn(4, 16), torch.randn(4)
    conv2d_relu: Callable[..., Any] = ops.conv2d_relu
    dropout_linear: Callable[..., Any] = ops.dropout_linear
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    rows = [t.clone().requires_grad_() for t in (features, matrix, offset)]

    def with_gradients(op: Callable[..., Any], tensors: list[torch.Tensor]) -> Callable[[], Any]:
        grad = torch.ones_like(op(*tensors))
        return lambda: torch.autograd.grad(op(*tensors), tensors, grad)

    def torchs(x: Any, weight: Any, bias: Any) -> Any:
        return torch.relu_(F.conv2d(x, weight, bias))

    def torchs_linear(x: Any, weight: Any, bias: Any) -> Any:
        return torch.relu_(F.linear(x, weight, bias))

    return {
        "conv2d_relu": lambda: ops.conv2d_relu(x, weight, bias),
        "lrn_max_pool": lambda: ops.lrn_max_pool(x),
        "dropout_linear": lambda: ops.dropout_linear(features, matrix, offset, relu=True),
        "conv2d_relu, recorded": lambda: conv2d_relu(*leaves),
        "lrn_max_pool, recorded": lambda: ops.lrn_max_pool(leaves[0]),
        "dropout_linear, recorded": lambda: dropout_linear(*rows, relu=True),
        "conv2d_relu, forward and backward": with_gradients(ops.conv2d_relu, leaves),
        "torch conv2d, relu_, forward and backward": with_gradients(torchs, leaves),
        "dropout_linear, forward and backward": with_gradients(ops.dropout_linear, rows),
        "torch linear, relu_, forward and backward": with_gradients(torchs_linear, rows),
    }


def _time(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS
