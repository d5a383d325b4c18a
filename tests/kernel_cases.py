"""What the kernels' tests share: the error that they are held to, poisoned outputs, AlexNet's own shapes."""

from __future__ import annotations

import numpy
import torch

from alexnet_triton.kernels import launch
from alexnet_triton.variants import VARIANTS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

LIMITS = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}
"""Of `rms_error`, for one kernel and an answer of many numbers: rounding an answer once makes 2e-4 and 1.7e-3 of it."""


def rms_error(result, expected):
    """RMS of the difference over RMS of the expected; infinite where one has a NaN that the other has not."""
    result, expected = result.double(), expected.double()
    assert result.shape == expected.shape
    if not torch.equal(result.isnan(), expected.isnan()):
        return float("inf")
    difference, scale = (result - expected).nan_to_num().norm().item(), expected.nan_to_num().norm().item()
    return difference / scale if scale else difference and float("inf")


def limit(dtype, expected):
    """Of `rms_error` for an answer that should be `expected`: one sum that cancels shows among a few numbers."""
    return LIMITS[dtype] * (1 if expected.numel() >= 100 else 4)


MARGIN = 1 << 15
"""Bytes before and behind a poisoned buffer."""


class Poison:
    """Buffers that kernels are to fill hold 255 in every byte before, which is NaN, and lie between margins of it.

    So what a kernel leaves out shows, and what it reads beside a buffer; `check` finds what it has written there.
    """

    MOST = 1 << 22
    """Bytes of the buffers whose margins are checked: larger ones are not kept until then."""

    def __init__(self, monkeypatch):
        self.kept = []
        empty, empty_like = launch.empty, launch.empty_like
        monkeypatch.setattr(launch, "empty", lambda *args, **options: self.between_margins(empty(*args, **options)))
        monkeypatch.setattr(launch, "empty_like", lambda parameter: self.between_margins(empty_like(parameter)))

    def between_margins(self, tensor):
        if tensor.device.type != "cpu" or not tensor.numel():
            return tensor
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        memory = numpy.full(extent * tensor.itemsize + 2 * MARGIN, 255, numpy.uint8)
        if memory.size <= self.MOST:
            self.kept.append(memory)
        # Neither a view nor a storage with an offset: torch must not see that there is more.
        inner = torch.frombuffer(memory, dtype=tensor.dtype, count=extent, offset=MARGIN)
        return inner.new_empty(0).set_(inner.untyped_storage(), 0, tensor.shape, tensor.stride())

    def check(self):
        for memory in self.kept:
            assert (memory[:MARGIN] == 255).all(), "a kernel wrote before its buffer"
            assert (memory[-MARGIN:] == 255).all(), "a kernel wrote behind its buffer"


def convolutions(variant):
    """The five convolutions of a variant: (name, (C, H, W), (K, C / groups, R, S), stride, padding, groups)."""
    spec = VARIANTS[variant]
    k1, k2, k3, k4, k5 = spec.filters
    g, size = spec.groups, spec.image_size
    return [
        ("conv1", (3, size, size), (k1, 3, 11, 11), 4, spec.padding, 1),
        ("conv2", (k1, 27, 27), (k2, k1 // g, 5, 5), 1, 2, g),
        ("conv3", (k2, 13, 13), (k3, k2, 3, 3), 1, 1, 1),
        ("conv4", (k3, 13, 13), (k4, k3 // g, 3, 3), 1, 1, g),
        ("conv5", (k4, 13, 13), (k5, k4 // g, 3, 3), 1, 1, g),
    ]
