"""Which implementation of an op runs: its Triton kernels, or its meaning in plain PyTorch."""

from __future__ import annotations

import importlib.util
import os
from contextvars import ContextVar
from types import TracebackType

import torch
from torch.autograd import forward_ad

BACKENDS = ("auto", "triton", "reference")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Those that the Triton kernels compute in. Images are bytes, which `Augment`'s kernel reads."""


def _installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # something has put None into sys.modules
        return False


TRITON_INSTALLED = _installed()

_selected: ContextVar[str | None] = ContextVar("alexnet_triton_backend", default=None)


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; the backends are {', '.join(map(repr, BACKENDS))}")
    return name


class use_backend:
    """Select the implementation of the ops, as a function or for the length of a `with` block.

    Like `torch.set_grad_enabled`, a call takes effect at once; as a context manager it puts back what was
    there before. The choice belongs to the calling thread (and asyncio task) and is seen by no other;
    the environment variable `ALEXNET_TRITON_BACKEND` sets the default of the whole process.

    Args:
        name: `"auto"` takes the Triton kernels for GPU tensors, and for CPU tensors only where Triton's
            interpreter is on (`TRITON_INTERPRET=1`); where no kernel can run, the reference does.
            `"triton"` raises where a kernel cannot run. `"reference"` is plain PyTorch everywhere. An export to ONNX
            takes plain PyTorch under any of them.

    Raises:
        ValueError: the name is none of the three.

    Examples:
        >>> with use_backend("reference"):
        ...     logits = model(images)
    """

    def __init__(self, name: str) -> None:
        _checked(name, "the backend")
        self._before = _selected.get()
        self._name = name
        _selected.set(name)

    def __enter__(self) -> use_backend:
        _selected.set(self._name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _selected.set(self._before)


def current_backend() -> str:
    """Name of the backend selected in this thread: `"auto"`, `"triton"` or `"reference"`."""
    name = _selected.get()
    if name is None:
        name = _checked(os.environ.get("ALEXNET_TRITON_BACKEND") or "auto", "the variable ALEXNET_TRITON_BACKEND")
    return name


def interpreting() -> bool:
    """Whether Triton's interpreter is on, so that kernels run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "True", "on", "ON", "y", "Y")


def exporting_to_onnx() -> bool:
    """Whether `torch.onnx.export` is under way, whose programs hold no Triton kernels."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def sees_plain_pytorch_only() -> str:
    """Who is at work, as in "torch.jit.trace sees", to whom kernels are opaque; empty where nobody is."""
    if torch.compiler.is_compiling():
        return "torch.onnx.export sees" if exporting_to_onnx() else ""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms (vmap, grad, jacrev) see"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation sees"
    return "torch.jit.trace sees" if torch._C._is_tracing() else ""


def takes_triton(op: str, x: torch.Tensor) -> bool:
    """Whether op `op` on tensor `x` runs as Triton kernels under the selected backend.

    Args:
        op: name of the op, for the error.
        x: the op's first tensor; its device and dtype decide.

    Raises:
        RuntimeError: the backend is `"triton"`, and no kernel can run on `x`.
    """
    why = why_reference(x)
    if why is not None and current_backend() == "triton" and not exporting_to_onnx():
        raise RuntimeError(f"{op} cannot run on the Triton backend: {why}; use_backend('auto') runs it")
    return why is None


def why_reference(x: torch.Tensor) -> str | None:
    """Why an op on tensor `x` is plain PyTorch under the selected backend, in words; None where Triton kernels run."""
    if current_backend() == "reference":
        return "the backend is 'reference'"
    if x.device.type == "cpu" and not interpreting():
        return "Triton kernels need a GPU tensor, or TRITON_INTERPRET=1 in the environment, for a CPU one"
    if x.device.type not in ("cpu", "cuda", "xpu"):
        return f"there are no Triton kernels for the device {x.device.type!r}"
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if x.dtype not in (*DTYPES, torch.uint8):
        return f"the Triton kernels take float16, bfloat16 and float32, not {str(x.dtype).removeprefix('torch.')}"
    onlooker = sees_plain_pytorch_only()
    return f"{onlooker} through plain PyTorch only" if onlooker else None
