"""The public API as a user's type checker sees it: read by mypy in `make check`, run by nobody."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from alexnet_triton import VARIANTS, AlexNet, FusedSequential, alexnet, fuse, ops, read_state_dict, unfuse, use_backend
from alexnet_triton.fusion import FusionReport
from alexnet_triton.graphs import Graphed
from alexnet_triton.parallel import pipeline
from alexnet_triton.recipe import augment, optim
from alexnet_triton.variants import Variant


class Head(AlexNet):
    """A user's subclass."""

    classes: list[str]


def network(images: Tensor, path: Path) -> None:
    """What builds a network, and what it gives."""
    model = AlexNet(num_classes=10, dropout=0.5, variant="paper", init="kaiming", device="cpu", dtype=torch.float32)
    assert_type(model.forward(images), Tensor)
    assert_type(model.get_feature_vector(images, layer="fc7"), Tensor)
    assert_type(model.graphed(images), Graphed)
    assert_type(alexnet(weights="DEFAULT", num_classes=1000), AlexNet)
    assert_type(Head.from_pretrained(path), Head)
    assert_type(read_state_dict(path), dict[str, Tensor])
    assert_type(VARIANTS, Mapping[str, Variant])


def fused(model: AlexNet, other: nn.Linear, images: Tensor) -> None:
    """A module stays of its type, and what is told of it has one."""
    assert_type(fuse(model), AlexNet)
    assert_type(unfuse(other), nn.Linear)
    assert_type(fuse.report(model), FusionReport)
    assert_type([row.op for row in fuse.report(model).rows], list[str | None])
    assert_type(FusedSequential(other).forward(images), Tensor)
    with use_backend("reference") as chosen:
        assert_type(chosen, use_backend)


def operations(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The ops, in all that they take."""
    assert_type(ops.conv2d_relu(x, weight, bias, stride=(2, 1), padding="same", groups=2, relu=False), Tensor)
    assert_type(ops.lrn_max_pool(x, size=5, kernel_size=3, stride=(2, 2), ceil_mode=True), Tensor)
    assert_type(ops.dropout_linear(x, weight, p=0.5, relu=True, training=False), Tensor)
    ops.conv2d_relu(x, weight, stride="2")  # type: ignore[arg-type]
    ops.dropout_linear(x, weight, 0.5)  # type: ignore[arg-type]


def trained(model: AlexNet, images: Tensor) -> None:
    """The recipe in a user's own loop."""
    optimizer = optim.KrizhevskySGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    assert_type(optim.biases_apart(model, 0.01, 5e-4), list[dict[str, Any]])
    torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    assert_type(augment.ten_crop(images, 227), Tensor)
    augment.PCAColor(torch.ones(3), torch.eye(3), std=0.1)


def split(model: AlexNet, images: Tensor) -> None:
    """The network in stages."""
    stages = pipeline.split(model, stages=2, at="auto")
    assert_type(stages, list[pipeline.Stage])
    assert_type(stages[0].forward(images), Tensor)
