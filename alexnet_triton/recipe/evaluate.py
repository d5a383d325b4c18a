"""How a trained network is judged."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alexnet_triton.recipe.data import ImageSet


class Normalise(nn.Module):
    """Bytes to network input: scaled to [0, 1], then (x - mean) / std, channel by channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.reshape(-1, 1, 1))
        self.register_buffer("std", std.reshape(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> float32 of the same shape."""
        return (images.float() / 255 - self.mean) / self.std


@torch.no_grad()
def predict(model: nn.Module, data: ImageSet, normalise: nn.Module, batch_size: int = 64) -> Tensor:
    """Logits (N, classes) of every image, on the CPU, in evaluation mode; the model's mode is put back."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        batches = torch.arange(len(data)).split(batch_size)
        return torch.cat([model(normalise(data.read(batch).to(device))).float().cpu() for batch in batches])
    finally:
        model.train(training)


def accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of images whose class is among the k best guesses; k beyond the number of classes counts as all.

    Args:
        logits: (N, classes).
        labels: (N,).
        k: number of guesses.
    """
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return best.eq(labels.reshape(-1, 1)).any(1).double().mean().item()


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """(classes, classes) int64: row = true class, column = best guess."""
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).reshape(classes, classes)
