"""What a recorded launch does, from its arguments alone: the turns of its main loop, and the bytes of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from alexnet_triton.kernels.schedule import L2_BYTES, MEMORY_BYTES
from alexnet_triton.kernels.target import Target, cdiv

if TYPE_CHECKING:
    from alexnet_triton.kernels.launch import Launch
    from alexnet_triton.tuning.compiler import Compiled


class MainLoop(NamedTuple):
    """The main loop of a program of a matrix product."""

    rows: int
    columns: int
    step: int
    """Of the sum, in a turn."""
    turns: int

    @property
    def multiply_adds(self) -> int:
        """Of a turn."""
        return self.rows * self.columns * self.step


def _conv(a: Mapping[str, Any]) -> MainLoop:
    turns = cdiv(min(a["share"], a["reduction"]), a["BLOCK_CRS"])
    return MainLoop(a["BLOCK_NPQ"], a["BLOCK_K"] + a["EXTRA_K"], a["BLOCK_CRS"], turns)


def _weight_gradient(a: Mapping[str, Any]) -> MainLoop:
    return MainLoop(a["BLOCK_CRS"], a["BLOCK_K"] + a["EXTRA_K"], a["BLOCK_NPQ"], a["steps_a_split"])


def _gemm(a: Mapping[str, Any]) -> MainLoop:
    return MainLoop(a["BLOCK_M"], a["BLOCK_N"], a["BLOCK_K"], cdiv(min(a["share"], a["reduction"]), a["BLOCK_K"]))


PRODUCTS: Mapping[str, Callable[[Mapping[str, Any]], MainLoop]] = {
    "conv_kernel": _conv,
    "shifted_conv_kernel": _conv,
    "weight_gradient_kernel": _weight_gradient,
    "gemm_kernel": _gemm,
}
"""By kernel that is a sum of matrix products, what its arguments say of its main loop."""

LOOPS: Mapping[str, Callable[[Mapping[str, Any]], int]] = {
    "add_splits_kernel": lambda a: cdiv(a["splits"], a["UNROLL"]),
    "finish_kernel": lambda a: cdiv(a["splits"], a["UNROLL"]),
    "gate_kernel": lambda a: cdiv(a["rows_padded"], a["BLOCK_M"]),
    "lrn_max_pool_kernel": lambda a: a["strip_rows"],
}
"""The turns of the other kernels that have a loop; the rest load once."""


def tiles(made: Launch) -> int:
    """Programs of a launch, without those beside a product that sum a bias or clear a border."""
    return int(made.arguments.get("products", made.programs))


def moved(made: Launch) -> int:
    """Bytes of a launch's tensors, each once."""
    return sum(tensor.numel() * tensor.itemsize for tensor in made.tensors.values())


def slack(made: Launch, compiled: Compiled, target: Target) -> float:
    """What a product waits for beside its arithmetic, over the tensor cores' cycles for it; 1 where that is less.

    The second-level cache gives a multiprocessor `L2_BYTES` a cycle, and memory its share of the launch's bytes.
    """
    loop = compiled.loop
    if loop is None or not loop.tensor_cycles or not loop.multiply_adds:
        return 1.0
    products = PRODUCTS[made.kernel.__name__](made.arguments)
    each = loop.tensor_cycles / loop.multiply_adds
    cycles = tiles(made) * products.turns * products.multiply_adds * each / target.multiprocessors
    memory = moved(made) / (target.multiprocessors * MEMORY_BYTES)
    return max(1.0, loop.bytes / loop.tensor_cycles / L2_BYTES, memory / cycles)


def issuing(made: Launch, compiled: Compiled) -> float:
    """Cycles in which a launch without loops issues its instructions, over those in which memory moves its bytes.

    A multiprocessor issues four instructions and gets `MEMORY_BYTES` in a cycle.
    """
    issued = made.programs * compiled.instructions * compiled.warps / 4
    return issued / (moved(made) / MEMORY_BYTES)
