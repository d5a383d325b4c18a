"""The roofs of a device, measured: its fastest large matrix product in each dtype, and its fastest large copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from alexnet_triton.bench.plans import name_of
from alexnet_triton.bench.timing import in_turn


def measure(
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    *,
    side: int | None = None,
    copied_bytes: int | None = None,
    rounds: int | None = None,
) -> dict[str, Any]:
    """Measure the roofs, on random numbers, as the fastest of the rounds: what the device has been seen to do.

    Products take float32 as float32 (no TF32) unless `torch.set_float32_matmul_precision` allows otherwise.

    Args:
        device: whose.
        dtypes: of the products.
        side: of their square matrices; None is 8,192 on a GPU, 2,048 on a CPU.
        copied_bytes: of the copy; None is 1 GiB on a GPU, 256 MiB on a CPU, both beyond the caches.
        rounds: of each; None is 30 on a GPU, 10 on a CPU.

    Returns:
        `copy_gbs`, GB/s read and written together; `tflops`, TFLOP/s by dtype; `side` and `copied_bytes`.
    """
    gpu = device.type == "cuda"
    side = side or (8192 if gpu else 2048)
    copied_bytes = copied_bytes or (2**30 if gpu else 2**28)
    rounds = rounds or (30 if gpu else 10)
    functions: dict[str, Callable[[], Any]] = {}
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        functions[name_of(dtype)] = partial(torch.mm, a, b, out=torch.empty_like(a))
    source = torch.randn(copied_bytes // 4, device=device)
    functions["copy"] = partial(torch.empty_like(source).copy_, source)
    fastest = {name: min(times) for name, times in in_turn(functions, rounds, device, host=False).items()}
    copy = fastest.pop("copy")
    return {
        "copy_gbs": 2 * source.numel() * source.itemsize / copy / 1e9,
        "tflops": {name: 2 * side**3 / seconds / 1e12 for name, seconds in fastest.items()},
        "side": side,
        "copied_bytes": copied_bytes,
    }
