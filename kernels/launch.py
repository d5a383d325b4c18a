"""The one door through which kernels are launched, and what they are told about the device.

Every launch of the package goes through `launch`, and every buffer that a kernel fills comes from `empty`. So a
test can poison outputs in one place, and the compiler's tool can run the very code that launches, with meta
tensors and an absent GPU's name, and see which kernels would run with which arguments (`recording`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from alexnet_triton.kernels import interpreter
from alexnet_triton.kernels.target import INTERPRETER, TARGETS, Target, cdiv, power_of_two

__all__ = ["TARGETS", "Target", "cdiv", "power_of_two"]


class Launch(NamedTuple):
    """A launch that was recorded instead of made."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors among the arguments by name, those behind descriptors too."""
        found = {
            name: value.base if isinstance(value, TensorDescriptor) else value for name, value in self.arguments.items()
        }
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}


@triton.jit
def _probe_kernel():
    pass


INTERPRETED = isinstance(_probe_kernel, InterpretedFunction)
"""Whether this process's kernels run in Triton's interpreter: fixed when this module is imported."""

if INTERPRETED and not isinstance(tl.zeros, InterpretedFunction):
    raise RuntimeError(
        "TRITON_INTERPRET was set after Triton had been imported, which leaves Triton's own functions compiled: "
        "set it in the environment before Python starts, or before anything imports triton"
    )
if INTERPRETED:
    interpreter.mend()

ROUNDS_BY_HAND = tl.constexpr(INTERPRETED)


@triton.jit
def rounded(value, pointer):
    """`value` in the dtype that `pointer` points to, rounded to the nearest, ties to even.

    A GPU's conversion does that by itself; the interpreter's cuts bfloat16 off.
    """
    if ROUNDS_BY_HAND and pointer.dtype.element_ty == tl.bfloat16 and value.dtype == tl.float32:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536  # the upper half: bfloat16's bits
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(pointer.dtype.element_ty)


_recording: ContextVar[tuple[Target, list[Launch]] | None] = ContextVar("alexnet_triton_recording", default=None)


def launch(kernel: Any, programs: int, **arguments: Any) -> None:
    """Launch `programs` programs of `kernel`, on the current device and stream; none where there are none.

    Args:
        kernel: a `triton.jit` function whose programs are numbered along the first axis.
        programs: how many.
        **arguments: the kernel's arguments by name, `num_warps` and `num_stages` among them.
    """
    if not programs:
        return
    recording = _recording.get()
    if recording is not None:
        recording[1].append(Launch(kernel, programs, arguments))
        return
    kernel[(programs,)](**arguments)


class Offer(NamedTuple):
    """Work whose config may be chosen, and how to do it once more with another."""

    problem: Any
    """Of `config.Problem`."""
    again: Callable[[Any], Any]
    """Does the work with the config that it is given, on the same tensors, and gives its answer."""


_offers: ContextVar[list[Offer] | None] = ContextVar("alexnet_triton_offers", default=None)


def offer(problem: Any, again: Callable[[Any], Any]) -> None:
    """Say that a config was chosen for `problem`; `offered` keeps it."""
    offers = _offers.get()
    if offers is not None:
        offers.append(Offer(problem, again))


@contextmanager
def offered() -> Iterator[list[Offer]]:
    """Within the block, all work whose config may be chosen is kept, with its tensors."""
    offers: list[Offer] = []
    token = _offers.set(offers)
    try:
        yield offers
    finally:
        _offers.reset(token)


@contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Within the block launches are recorded, as they would be made on `target`, and none is made."""
    launches: list[Launch] = []
    token = _recording.set((target, launches))
    try:
        yield launches
    finally:
        _recording.reset(token)


def target_of(device: torch.device) -> Target:
    """What a configuration must know of `device`; within `recording`, of the target there."""
    recording = _recording.get()
    if recording is not None:
        return recording[0]
    if device.type != "cuda":
        return INTERPRETER
    return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _cuda_target(index: int) -> Target:
    device = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = device.gcnArchName.split(":")[0]
        return Target("hip", arch, device.multi_processor_count, 65_536, device.name)
    memory = getattr(device, "shared_memory_per_block_optin", 101_376)
    return Target("cuda", device.major * 10 + device.minor, device.multi_processor_count, memory, device.name)


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor on the device of `like`, for a kernel to fill; of its dtype unless given."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def empty_like(parameter: Tensor) -> Tensor:
    """As `empty`, for the gradient of a parameter: of its shape, dtype and, where they are dense, its strides."""
    return torch.empty_like(parameter)


@contextmanager
def poisoned() -> Iterator[None]:
    """Within the block, every buffer that a kernel is to fill holds NaN (or 255) before: what it leaves out shows."""
    global empty, empty_like
    kept = empty, empty_like

    def filled(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 255)

    empty = lambda *args, **options: filled(kept[0](*args, **options))  # noqa: E731
    empty_like = lambda parameter: filled(kept[1](parameter))  # noqa: E731
    try:
        yield
    finally:
        empty, empty_like = kept


def dot_precision(target: Target) -> str:
    """`input_precision` of float32 products: TF32 only where torch's own switch for products allows it.

    The switch is `torch.backends.cuda.matmul.allow_tf32` / `torch.set_float32_matmul_precision`.
    """
    return "tf32" if target.backend == "cuda" and _tf32_allowed() else "ieee"


def is_exact(dtype: torch.dtype, target: Target) -> bool:
    """Whether products of `dtype` are sums of float32 products, which no tensor core of NVIDIA's does."""
    return dtype == torch.float32 and dot_precision(target) == "ieee"


def _tf32_allowed() -> bool:
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if precision not in (None, "none"):
        return bool(precision == "tf32")
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # torch refuses to answer by the old name where the new one was used
        return False
