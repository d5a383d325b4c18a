"""The table of a network's layers: output shapes, parameters, multiply-adds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alexnet_triton.model import AlexNet
from alexnet_triton.variants import VARIANTS

NAMES = dict(
    zip(
        (
            f"{part}.{index}"
            for part, indices in (("features", (0, 3, 6, 8, 10)), ("classifier", (1, 4, 6)))
            for index in indices
        ),
        ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"),
        strict=True,
    )
)
"""The paper's names of the layers, by module."""


@dataclass(frozen=True)
class LayerRow:
    """One layer of a network."""

    module: str
    """Its name in the model, as in `features.0`."""
    name: str
    """The paper's name, where it has one."""
    layer: str
    """What it is, with its sizes."""
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int
    """For the whole batch; convolutions and linear layers only."""


def layer_table(
    variant: str = "merged", batch: int = 1, num_classes: int = 1000, image_size: int | None = None
) -> list[LayerRow]:
    """Rows for every layer of a variant, in order of execution. Nothing is computed: shapes alone travel.

    Args:
        variant: of `alexnet_triton.AlexNet`.
        batch: number of images, at least 1.
        num_classes: width of the last layer.
        image_size: side of the images in pixels; None is the variant's own.

    Raises:
        ValueError: what `AlexNet` refuses, or a batch below 1.
    """
    if batch < 1:
        raise ValueError(f"the batch must hold at least 1 image, got {batch}")
    model = AlexNet(num_classes, variant=variant, device="meta").eval()
    size = image_size or VARIANTS[variant].image_size
    rows: list[LayerRow] = []
    for name, module in model.named_modules():
        if not module._modules:
            module.register_forward_hook(lambda m, args, y, name=name: rows.append(_row(name, m, y)))
    model(torch.empty(batch, 3, size, size, device="meta"))
    return rows


def _row(module_name: str, module: nn.Module, y: Tensor) -> LayerRow:
    parameters = sum(parameter.numel() for parameter in module.parameters())
    products = 0
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        products = y.numel() * math.prod(module.weight.shape[1:])
    return LayerRow(module_name, NAMES.get(module_name, ""), _describe(module), tuple(y.shape), parameters, products)


def _describe(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d):
        text = f"Conv2d {module.kernel_size[0]}x{module.kernel_size[1]}"
        text += f" /{module.stride[0]}" if module.stride[0] > 1 else ""
        text += f" pad {module.padding[0]}" if module.padding[0] else ""
        return text + (f" groups {module.groups}" if module.groups > 1 else "")
    if isinstance(module, nn.MaxPool2d):
        return f"MaxPool2d {module.kernel_size} /{module.stride}" + (" ceil" if module.ceil_mode else "")
    if isinstance(module, nn.LocalResponseNorm):
        groups = getattr(module, "groups", 1)
        return f"LRN {module.size} alpha {module.alpha:g} k {module.k:g}" + (f" groups {groups}" if groups > 1 else "")
    if isinstance(module, nn.Dropout):
        return f"Dropout {module.p:g}"
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return "AdaptiveAvgPool2d 6x6"
    return type(module).__name__


def format_table(rows: list[LayerRow]) -> str:
    """The rows as aligned text, with totals."""
    header = ("layer", "module", "what", "output", "parameters", "multiply-adds")
    lines = [
        (
            row.name,
            row.module,
            row.layer,
            " x ".join(map(str, row.output)),
            _count(row.parameters),
            _count(row.multiply_adds),
        )
        for row in rows
    ]
    totals = (
        "total",
        "",
        "",
        "",
        _count(sum(r.parameters for r in rows)),
        _count(sum(r.multiply_adds for r in rows)),
    )
    widths = [max(len(line[column]) for line in (header, totals, *lines)) for column in range(len(header))]

    def text(line: tuple[str, ...]) -> str:
        cells = [
            cell.rjust(width) if i >= 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([text(header), rule, *map(text, lines), rule, text(totals)])


def _count(number: int) -> str:
    return f"{number:,}" if number else ""
