"""How far an answer is from what it should be."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_error(result: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of the expected; infinite where shapes, or the places of NaNs, differ."""
    result, expected = result.detach().double(), expected.detach().double()
    if result.shape != expected.shape or not torch.equal(result.isnan(), expected.isnan()):
        return float("inf")
    difference, scale = (result - expected).nan_to_num().norm().item(), expected.nan_to_num().norm().item()
    return difference / scale if scale else difference and float("inf")
