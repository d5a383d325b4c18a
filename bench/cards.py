"""What the cards that `predict` knows can do: roofs, clocks and multiprocessors, each with its source.

The roofs of products in half precision and of copies are what programs reach, not what data sheets name. On an H100
they were measured; the other cards are assumed to reach the same share of their data sheets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from alexnet_triton.kernels.target import TARGETS, Target

HALF = ("bfloat16", "float16")

MEASURED_TFLOPS, SHEET_TFLOPS = 790.0, 989.4
"""Of an H100, dense bfloat16: measured on random data; data sheet."""

MEASURED_COPY_GBS, SHEET_COPY_GBS = 3000.0, 3350.0
"""Of an H100, bytes read and written: measured; data sheet."""

PRODUCT_SHARE, COPY_SHARE = MEASURED_TFLOPS / SHEET_TFLOPS, MEASURED_COPY_GBS / SHEET_COPY_GBS
"""Of a data sheet's figure, what is reached: the H100's shares, assumed of every card."""


@dataclass(frozen=True)
class Card:
    """A GPU as far as the model of `predict` depends on it."""

    name: str
    """As in the device's own name."""
    target: Target
    tflops: Mapping[str, float]
    """The roof of products by dtype; float32 is exact, without TF32."""
    copy_gbs: float
    """The roof of a copy, bytes read and written."""
    float32_lanes: int
    """Multiply-adds of float32 that a multiprocessor does in a cycle."""
    l2_bytes_a_cycle: float
    """That a multiprocessor draws from the second-level cache."""
    source: str
    """Where each fact is from."""

    def products_a_cycle(self, dtype: str) -> int:
        """Multiply-adds that a multiprocessor does in a cycle."""
        from alexnet_triton.tuning.compiler import PRODUCTS_PER_CYCLE  # which needs Triton

        return self.float32_lanes if dtype == "float32" else PRODUCTS_PER_CYCLE[self.target.arch]

    def clock(self, dtype: str) -> float:
        """Hertz at which every multiprocessor's full rate of products comes to the roof."""
        return self.tflops[dtype] * 1e12 / (2 * self.products_a_cycle(dtype) * self.target.multiprocessors)


def _by_dtype(half: float, full: float) -> dict[str, float]:
    return {**dict.fromkeys(HALF, half), "float32": full}


_ASSUMED = "roofs: the data sheet's times the share that an H100 was measured to reach of its own, assumed"
_HOPPER = (
    "132 multiprocessors, 66.9 TFLOP/s and 128 lanes of float32: NVIDIA H100 Tensor Core GPU Architecture whitepaper; "
    "64 bytes a cycle from L2: as in `tuning.compiler`"
)

CARDS: Mapping[str, Card] = {
    "h100": Card(
        name="H100",
        target=TARGETS["sm_90"],
        tflops=_by_dtype(MEASURED_TFLOPS, 66.9),
        copy_gbs=MEASURED_COPY_GBS,
        float32_lanes=128,
        l2_bytes_a_cycle=64,
        source=f"790 TFLOP/s bfloat16 on random data and 3.0 TB/s copy: measured on an H100 SXM; {_HOPPER}",
    ),
    "h200": Card(
        name="H200",
        target=TARGETS["sm_90"]._replace(card="H200"),
        tflops=_by_dtype(PRODUCT_SHARE * 989.4, 66.9),
        copy_gbs=COPY_SHARE * 4800,
        float32_lanes=128,
        l2_bytes_a_cycle=64,
        source=f"989.4 TFLOP/s bfloat16 and 4.8 TB/s: NVIDIA H200 data sheet; {_ASSUMED}; {_HOPPER}",
    ),
    "a100": Card(
        name="A100",
        target=TARGETS["sm_80"],
        tflops=_by_dtype(PRODUCT_SHARE * 312, 19.5),
        copy_gbs=COPY_SHARE * 2039,
        float32_lanes=64,
        l2_bytes_a_cycle=5120 / 108,
        source="312 TFLOP/s bfloat16, 19.5 TFLOP/s float32 and 2,039 GB/s: NVIDIA A100 80GB SXM data sheet; "
        f"{_ASSUMED}; 108 multiprocessors, 64 float32 lanes, 5,120 bytes a cycle from L2: NVIDIA A100 Tensor Core GPU "
        "Architecture whitepaper",
    ),
}
"""By the name that `predict --card` takes."""
