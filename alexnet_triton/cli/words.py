"""What the commands share: options that several have, and what a word may be."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

VARIANT_NAMES = ("merged", "paper", "torchvision", "caffe")
INIT_NAMES = (*VARIANT_NAMES, "kaiming")
SCHEDULE_NAMES = ("gpipe", "1f1b", "zero-bubble")
LINK_NAMES = ("pcie2", "pcie3", "pcie4", "pcie5", "nvlink2", "nvlink3", "nvlink4")
SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
DTYPE_NAMES = (*SHORT_DTYPES, *SHORT_DTYPES.values())


READERS = min(8, os.cpu_count() or 1)
"""As `alexnet_triton.recipe.data.loader.readers`, which is not loaded to print help."""

Commands = Any
"""What `ArgumentParser.add_subparsers` gives."""


def add_variant(parser: argparse.ArgumentParser) -> None:
    """Add `--variant`."""
    parser.add_argument("--variant", choices=VARIANT_NAMES, default="merged", help="default: %(default)s")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add `--dtype`."""
    names = f"{', '.join(SHORT_DTYPES)} or torch's names; default: %(default)s"
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="bfloat16", metavar="NAME", help=names)


def add_out(parser: argparse.ArgumentParser) -> None:
    """Add `--out`."""
    parser.add_argument("--out", type=Path, default=Path("bench-out"), metavar="DIR", help="default: %(default)s")


def dtype_name(name: str) -> str:
    """The name that torch has for a dtype."""
    return SHORT_DTYPES.get(name, name)


def dtypes(names: Sequence[str] | None) -> list[torch.dtype]:
    """The dtypes of these names."""
    import torch

    return [getattr(torch, dtype_name(name)) for name in names or ()]


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def numbers(text: str) -> tuple[int, ...]:
    """Such numbers, parted by commas."""
    return tuple(positive(word) for word in text.split(","))


def count(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0)


def counts(text: str) -> tuple[int, ...]:
    """Such numbers, parted by commas."""
    return tuple(count(word) for word in text.split(","))


def seconds(text: str) -> float:
    """A time in seconds, of a number with s, m, h or nothing behind it."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    try:
        return positive_float(text[:-1]) * unit if unit else positive_float(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be a time, as in 180s or 5m, got {text!r}") from None


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value
