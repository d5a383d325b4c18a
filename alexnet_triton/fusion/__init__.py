"""Runs of ordinary layers execute as fused ops, while the layers stay what they were.

| run of children                                       | op               |
|-------------------------------------------------------|------------------|
| Conv2d [+ ReLU]                                       | `conv2d_relu`    |
| [LocalResponseNorm +] MaxPool2d                       | `lrn_max_pool`   |
| [Dropout +] Linear [+ ReLU]                           | `dropout_linear` |
| anything else                                         | the child itself |

A `FusedSequential` reads its children as a sentence (nested `nn.Sequential`s included) and makes a plan of
such runs. A child joins a run only while it is exactly the layer that the table names: one with a hook, a
parametrization, a `forward` of its own, a subclass or an option that the op does not have is called itself,
so that everything that people do to layers goes on working.
"""

from __future__ import annotations

from alexnet_triton.fusion.plan import fits
from alexnet_triton.fusion.report import FusionReport, FusionRow
from alexnet_triton.fusion.sequential import FusedSequential, leaves
from alexnet_triton.fusion.swap import fuse, unfuse

__all__ = ["FusedSequential", "fuse", "unfuse", "FusionReport", "FusionRow", "fits", "leaves"]
