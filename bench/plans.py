"""What a benchmark of networks measures: on which device, in which sizes and dtypes, how often."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from alexnet_triton.bench import checks
from alexnet_triton.bench.checks import Scale
from alexnet_triton.variants import VARIANTS


class Plan(NamedTuple):
    """What is measured, and how large."""

    device: torch.device
    variants: tuple[str, ...]
    batches: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    rounds: int
    """Samples of each time."""
    sizes: tuple[int, ...] = ()
    """Pixels a side, where a benchmark takes images of more sizes than the variant's own."""
    scale: Scale = checks.FULL
    """How thin the layers are, and their images' size; the rest of it is not read."""
    compiled: bool = False
    """Whether torch.compile, which takes minutes, is a peer too."""
    roofs: Callable[[], Mapping[str, Any]] | None = None
    """Gives the device's, of `roofs.measure`; asked for where a row has a floor."""


def choose(
    plan: Plan,
    variants: Sequence[str] = (),
    batches: Sequence[int] = (),
    dtypes: Sequence[torch.dtype] = (),
    rounds: int | None = None,
    sizes: Sequence[int] = (),
    compiled: bool | None = None,
) -> Plan:
    """A plan with what somebody has asked for in the place of its own; none, and None, leave that.

    Raises:
        ValueError: an unknown variant, or a batch, a size or rounds below 1.
    """
    for variant in variants:
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    for name, values in (("batch", batches), ("size", sizes), ("number of rounds", () if rounds is None else [rounds])):
        for value in values:
            if value < 1:
                raise ValueError(f"the {name} must be at least 1, got {value}")
    return plan._replace(
        variants=tuple(variants) or plan.variants,
        batches=tuple(batches) or plan.batches,
        dtypes=tuple(dtypes) or plan.dtypes,
        rounds=rounds or plan.rounds,
        sizes=tuple(sizes) or plan.sizes,
        compiled=plan.compiled if compiled is None else compiled,
    )


def device_of(name: str | None) -> torch.device:
    """The device called `name`; None is this machine's GPU, or its CPU where it has none."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def name_of(dtype: torch.dtype) -> str:
    """As result files call it: `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")
