"""The networks that are called AlexNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Norm:
    """Local response normalisation in torch's terms (`alpha` is divided by the 5 channels), beta 0.75."""

    alpha: float
    k: float
    groups: int = 1


PAPER_FORMULA = Norm(alpha=5e-4, k=2.0)
"""Krizhevsky et al. 2012, section 3.3: alpha is 1e-4 a channel there, so five times that here."""


@dataclass(frozen=True)
class Variant:
    """One of the networks that are called AlexNet."""

    name: str
    description: str
    filters: tuple[int, int, int, int, int]
    """Of conv1 to conv5."""
    groups: int
    """Of conv2, conv4 and conv5."""
    padding: int
    """Of conv1, in pixels."""
    norm: Norm | None
    """After the ReLUs of conv1 and conv2; None: no normalisation unless it is asked for."""
    dropout_first: bool
    """Dropout stands before fc6 and fc7 rather than after them."""
    ceil_mode: bool
    """The pools round their output sizes up."""
    image_size: int
    """Side of the images that it was made for, in pixels."""


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        variant.name: variant
        for variant in (
            Variant(
                name="merged",
                description="2012 filters on one device: no groups, no LRN",
                filters=(96, 256, 384, 384, 256),
                groups=1,
                padding=0,
                norm=None,
                dropout_first=True,
                ceil_mode=False,
                image_size=227,
            ),
            Variant(
                name="paper",
                description="2012 as published: two towers (groups), LRN inside each",
                filters=(96, 256, 384, 384, 256),
                groups=2,
                padding=0,
                norm=Norm(alpha=5e-4, k=2.0, groups=2),
                dropout_first=False,
                ceil_mode=False,
                image_size=227,
            ),
            Variant(
                name="torchvision",
                description="2014 filters (One weird trick), as torchvision has them",
                filters=(64, 192, 384, 256, 256),
                groups=1,
                padding=2,
                norm=None,
                dropout_first=True,
                ceil_mode=False,
                image_size=224,
            ),
            Variant(
                name="caffe",
                description="bvlc_alexnet: groups, LRN across all channels, pools round up",
                filters=(96, 256, 384, 384, 256),
                groups=2,
                padding=0,
                norm=Norm(alpha=1e-4, k=1.0),
                dropout_first=False,
                ceil_mode=True,
                image_size=227,
            ),
        )
    }
)
"""The variants by name. Their state dicts have the same keys; their weights are not interchangeable."""
