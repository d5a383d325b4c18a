"""The layers that AlexNet needs and torch lacks: normalisations that half precision does not break."""

from __future__ import annotations

import torch.fx
from torch import Tensor, nn

from alexnet_triton.reference import local_response_norm

torch.fx.wrap("local_response_norm")  # a symbolic trace takes it for one function, and does not look inside


class LocalResponseNorm(nn.LocalResponseNorm):
    """`torch.nn.LocalResponseNorm`, with half-precision input squared and summed in float32.

    torch's own squares 300 to infinity in float16, so that the answer is 0, and refuses float16 on a CPU.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, ...) into the same shape and dtype."""
        return local_response_norm(input, self.size, self.alpha, self.beta, self.k)


class GroupedLocalResponseNorm(nn.LocalResponseNorm):
    """Local response normalisation that stays within groups of channels.

    The two towers of 2012 held half of the maps each, and normalised within their own half
    (Krizhevsky et al. 2012, section 3.3 and figure 2). With `groups=1` it is `LocalResponseNorm`.

    Args:
        size: number of neighbouring channels.
        groups: number of groups; divides the channels of the input.
        alpha: multiplicative factor; divided by `size`, as in torch.
        beta: exponent.
        k: additive constant.
    """

    def __init__(self, size: int, groups: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> None:
        super().__init__(size, alpha, beta, k)
        self.groups = groups

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, ...) into the same shape and dtype."""
        return local_response_norm(input, self.size, self.alpha, self.beta, self.k, self.groups)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{self.size}, groups={self.groups}, alpha={self.alpha}, beta={self.beta}, k={self.k}"
