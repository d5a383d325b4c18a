"""Dropout of a batch that comes in parts, the same as that of the batch in one piece.

A process that has a layer of dropout for some rows of a batch at a time draws the mask of all rows at once, as the
whole network in one process would, and each part is multiplied by its rows. All processes of a replica start a step
with the same generator state and come through the draws of all layers in the network's order, those that they do not
hold too: so each layer's mask is what one process would have drawn, wherever the network is cut, and all end with the
state that it would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_triton import ops
from alexnet_triton.fusion import fits


@dataclass(frozen=True)
class Dropped:
    """A layer of dropout in the network."""

    layer: nn.Dropout
    shape: tuple[int, ...]
    """Of what it drops of one image."""
    fused: bool
    """Whether it stands before a linear layer, whose op draws its mask."""

    def draw(self, like: Tensor, rows: int) -> Tensor:
        """The mask of so many images, from the generator of `like`'s device."""
        if self.fused:
            return ops.dropout_mask(like, self.layer.p, (rows, *self.shape))
        return F.dropout(like.new_ones((rows, *self.shape)), self.layer.p)


class Masks:
    """The masks of one batch after the other.

    Args:
        dropouts: the network's layers of dropout that drop by the whole batch, in order of execution.
        device: whose generator is drawn from.
        dtype: that the layers' inputs are expected to have.
    """

    def __init__(self, dropouts: Sequence[Dropped], device: torch.device, dtype: torch.dtype) -> None:
        self.dropouts = {id(dropped.layer): dropped for dropped in dropouts}
        self.device = device
        self._dtypes = dict.fromkeys(self.dropouts, dtype)
        self._drawn: dict[int, tuple[Tensor, Tensor]] = {}
        """By layer: the generator's state before its draw, and the mask."""

    def covers(self, layer: nn.Module) -> bool:
        """Whether this layer drops by the whole batch."""
        return id(layer) in self.dropouts

    def draw(self, rows: int) -> None:
        """Draw the masks of a batch of `rows` images."""
        self._drawn.clear()
        for key, dropped in self.dropouts.items():
            if dropped.layer.training and dropped.layer.p and fits(dropped.layer):  # which a hook may have changed
                before = _state(self.device)
                like = torch.empty(0, device=self.device, dtype=self._dtypes[key])
                self._drawn[key] = before, dropped.draw(like, rows)

    def apply(self, layer: nn.Module, x: Tensor, first: int) -> Tensor:
        """Drop of `x`, the images from number `first` of the batch on, what the batch's mask drops.

        Rows behind the batch's last, which make a part up to its full size, become zeros. A layer for which no mask has
        been drawn is called.
        """
        if id(layer) not in self._drawn:
            called: Tensor = layer(x)
            return called
        before, mask = self._drawn[id(layer)]
        if mask.dtype != x.dtype:  # as under autocast, at the first batch
            mask = self._draw_again(id(layer), x, before, len(mask))
        rows = mask[first : first + len(x)].to(x.device)
        if len(rows) < len(x):
            rows = torch.cat([rows, rows.new_zeros((len(x) - len(rows), *rows.shape[1:]))])
        return x * rows

    def _draw_again(self, key: int, x: Tensor, before: Tensor, rows: int) -> Tensor:
        self._dtypes[key] = x.dtype
        now = _state(self.device)
        _set_state(before, self.device)
        mask = self.dropouts[key].draw(torch.empty(0, device=self.device, dtype=x.dtype), rows)
        _set_state(now, self.device)
        self._drawn[key] = before, mask
        return mask


def _state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
