"""Cards, links and clusters as far as the model of scaling depends on them, and collectives between their GPUs.

Data sheets say what a machine could do; programs reach a share of it. The shares are assumptions, the same for
every machine of every year, and none was chosen for what `published` holds the model against:

- `PRODUCT_SHARE`, of a data sheet's FLOP/s, by whole training steps. On record for AlexNet on one GPU: 42 % of a
  Tesla K40's float32 (128 images in 307 ms) and 46 % of a Titan X's (177 ms), both cuda-convnet2; 85 % of a Titan
  X's (96 ms) by cuDNN R3, whose transforms save multiplications; 25 % (326 ms) by TensorFlow's first release
  (github.com/soumith/convnet-benchmarks and gist.github.com/soumith/e6297e93dd2fe3751562). `alexnet-triton bench
  predict` expects 41 % (batch 128) to 49 % (1,024) of an H100's tensor cores from this package's kernels.
- `COPY_SHARE`: of a data sheet's bytes a second, read and written.

The latter, and what `links` says of links, are assumed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from alexnet_triton.parallel.links import Link

PRODUCT_SHARE, COPY_SHARE = 0.45, 0.8


@dataclass(frozen=True)
class Card:
    """A processor, as its data sheet has it."""

    name: str
    float32: float
    """FLOP/s."""
    memory: float
    """Bytes a second."""
    half: float | None = None
    """FLOP/s in half precision, dense; None: half precision is a format of memory alone."""
    inside: str = "pcie3"
    """Of `LINKS`: what usually links it with others in its machine."""

    def products(self, dtype: str) -> float:
        """FLOP/s that products reach."""
        return PRODUCT_SHARE * (self.float32 if dtype == "float32" else self.half or self.float32)

    @property
    def copies(self) -> float:
        """Bytes a second that copies reach."""
        return COPY_SHARE * self.memory


CARDS: Mapping[str, Card] = {
    "gtx580": Card("GeForce GTX 580", 1.581e12, 192.4e9, inside="pcie2"),
    "k20": Card("Tesla K20", 3.52e12, 208e9, inside="pcie2"),
    "p40": Card("Tesla P40", 11.76e12, 346e9),
    "v100": Card("Tesla V100 SXM2", 15.7e12, 900e9, 125e12, "nvlink2"),
    "a100": Card("A100 80GB SXM", 19.5e12, 2039e9, 312e12, "nvlink3"),
    "h100": Card("H100 SXM", 66.9e12, 3350e9, 989.4e12, "nvlink4"),
    "h200": Card("H200 SXM", 66.9e12, 4800e9, 989.4e12, "nvlink4"),
}
"""NVIDIA's data sheets. A P40 computes in float32; what half precision saves there is memory and traffic."""


@dataclass(frozen=True)
class Cluster:
    """Machines that are alike, each full of GPUs before the next is taken."""

    card: Card
    inside: Link
    network: Link
    gpus_per_machine: int = 8
    read: float = math.inf
    """Bytes of images a second that a machine can read; infinite where that is not known."""

    def machines(self, gpus: int) -> int:
        """How many hold so many GPUs.

        Raises:
            ValueError: less than one GPU, or the last machine would not be full.
        """
        if gpus < 1:
            raise ValueError(f"there must be at least 1 GPU, got {gpus}")
        if gpus > self.gpus_per_machine and gpus % self.gpus_per_machine:
            raise ValueError(
                f"{gpus} GPUs do not fill machines of {self.gpus_per_machine}: take a multiple, or at most "
                f"{self.gpus_per_machine}"
            )
        return max(1, gpus // self.gpus_per_machine)

    def gather(self, size: float, gpus: int) -> float:
        """Seconds until each of `gpus` neighbours has all of `size` bytes, of which each had its part.

        The reverse, a reduce-scatter, takes as long.
        """
        machines = self.machines(gpus)
        if machines == 1:
            return _ring(size, gpus, self.inside)
        slowest = Link("", min(self.inside.bytes_per_second, self.network.bytes_per_second), self.network.latency)
        in_two = _ring(size, gpus // machines, self.inside) + _ring(size, machines, self.network)
        return min(_ring(size, gpus, slowest), in_two)

    def all_reduce(self, size: float, gpus: int, parts: int = 1, largest: float | None = None) -> float:
        """Seconds until the copies of `size` bytes of gradients are summed in all.

        Args:
            size: of one whole copy.
            gpus: all, of all copies.
            parts: neighbouring GPUs that hold a copy together.
            largest: bytes of the largest part; None: they are alike.

        Raises:
            ValueError: the parts do not divide the GPUs, or a machine's.
        """
        machines = self.machines(gpus)
        inside = gpus // machines
        if gpus % parts or (parts % inside and inside % parts):
            raise ValueError(
                f"groups of {parts} do not divide {gpus} GPUs, {inside} a machine: take another group size"
            )
        if parts > inside:  # a copy spans machines: each has its part of it, and sums that with its likes
            return self._between(size * inside / parts, machines * inside // parts)
        part = size / parts if largest is None else largest
        in_levels = 2 * _ring(part, inside // parts, self.inside) + self._between(size, machines)
        return min(in_levels, 2 * self.gather(size, gpus)) if parts == 1 else in_levels

    def _between(self, size: float, machines: int) -> float:
        """Seconds of an all-reduce between machines, in a ring or in trees."""
        if machines == 1:
            return 0.0
        trees = 2 * size / self.network.bytes_per_second + 2 * math.ceil(math.log2(machines)) * self.network.latency
        return min(2 * _ring(size, machines, self.network), trees)


def _ring(size: float, places: int, link: Link) -> float:
    """Seconds in which parts go once around a ring: n - 1 messages of size / n."""
    return (places - 1) * (size / places / link.bytes_per_second + link.latency)
