"""The least work of a layer, and the least time that it takes under a device's roofs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from alexnet_triton.bench.checks import Conv, Layer, Pool
from alexnet_triton.bench.plans import name_of


def least(layer: Layer, direction: str, itemsize: int) -> tuple[int, int]:
    """Floating-point operations of a layer's direction, 2 a multiply-add, and the bytes that it cannot but move.

    Normalisation and pooling count as no arithmetic. The mask of a gradient, the places of maxima and the bias's
    gradient count as no bytes: those can travel otherwise, and whatever reads the output's gradient can sum the last.

    Args:
        layer: of `checks.layers`.
        direction: of `launches.DIRECTIONS`.
        itemsize: bytes of an element.
    """
    if isinstance(layer, Pool):
        x, y = math.prod(layer.x), math.prod(layer.stage.out_size(layer.x))
        again = x if direction != "forward" and layer.stage.size else 0  # LRN's gradient needs the map itself
        return 0, (x + y + again) * itemsize
    if isinstance(layer, Conv):
        x, y = math.prod(layer.x), math.prod(layer.stage.out_size(layer.x, layer.weight, None))
        weight, bias = math.prod(layer.weight), layer.weight[0]
    else:
        x, y = layer.batch * layer.inputs, layer.batch * layer.outputs
        weight, bias = layer.inputs * layer.outputs, layer.outputs
    moved = x + y + weight + (bias if direction == "forward" else 0)
    return 2 * y * layer.terms()["forward"], moved * itemsize


def floor(flop: int, moved: int, dtype: torch.dtype, roofs: Mapping[str, Any]) -> float:
    """Seconds that the arithmetic or the memory takes at least, whichever is longer, under roofs of `roofs.measure`."""
    tflops, gbs = float(roofs["tflops"][name_of(dtype)]), float(roofs["copy_gbs"])
    return max(flop / (1e12 * tflops), moved / (1e9 * gbs))
