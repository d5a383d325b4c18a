"""AlexNet from torch's own layers and functions alone, one line a layer, to hold the package against.

Independent of the package: what it gets wrong, these do not. `merged` is the listing of the document that
the package implements.
"""

from __future__ import annotations

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn


@torch.jit.ignore
def tower_norm(x):
    """The formula of Krizhevsky et al. 2012, section 3.3, within two halves of the channels."""
    # type: (Tensor) -> Tensor
    channels = torch.arange(x.shape[1] // 2, device=x.device)
    neighbours = (channels[:, None] - channels).abs() <= 2
    filters = neighbours.to(x.dtype)[:, :, None, None]
    halves = [a / (2 + 1e-4 * F.conv2d(a * a, filters)) ** 0.75 for a in x.split(len(channels), 1)]
    return torch.cat(halves, 1)


torch.fx.wrap("tower_norm")


class TowerNorm(nn.Module):
    def forward(self, x):
        return tower_norm(x)


class Plain(nn.Module):
    def __init__(self, features, classifier):
        super().__init__()
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(*classifier)

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def alexnet(variant, num_classes=1000, dropout=0.5):
    groups = 1 if variant == "merged" else 2
    ceil_mode = variant == "caffe"

    def relu():
        return nn.ReLU(inplace=True)

    def relu_norm():
        if variant == "merged":
            return relu()
        norm = TowerNorm() if variant == "paper" else nn.LocalResponseNorm(5, 1e-4, 0.75, 1.0)
        return nn.Sequential(relu(), norm)

    def pool():
        return nn.MaxPool2d(3, 2, ceil_mode=ceil_mode)

    features = [
        nn.Conv2d(3, 96, 11, stride=4), relu_norm(), pool(),
        nn.Conv2d(96, 256, 5, padding=2, groups=groups), relu_norm(), pool(),
        nn.Conv2d(256, 384, 3, padding=1), relu(),
        nn.Conv2d(384, 384, 3, padding=1, groups=groups), relu(),
        nn.Conv2d(384, 256, 3, padding=1, groups=groups), relu(), pool(),
    ]  # fmt: skip
    fc6, fc7, fc8 = nn.Linear(9216, 4096), nn.Linear(4096, 4096), nn.Linear(4096, num_classes)
    if variant == "merged":
        classifier = [nn.Dropout(dropout), fc6, relu(), nn.Dropout(dropout), fc7, relu(), fc8]
    else:
        last = nn.Sequential(relu(), nn.Dropout(dropout))
        classifier = [nn.Identity(), fc6, relu(), nn.Dropout(dropout), fc7, last, fc8]
    return Plain(features, classifier)


def listing_initialisation(model):
    """The listing's: weights normal(0, 0.01), biases 0 in convolutions and 1 in linear layers."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, mean=0, std=0.01)
            nn.init.constant_(layer.bias, 0)
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, mean=0, std=0.01)
            nn.init.constant_(layer.bias, 1)


def error(result, expected):
    """Largest difference as a share of the expected tensor's scale; infinite where NaNs differ."""
    assert result.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    difference = (result.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    return difference / scale if difference == difference and scale else (difference and float("inf"))
