"""Triton's interpreter, mended where a release of it fails on what its compiler takes."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.runtime import interpreter

RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])


def mend() -> None:
    """Mend the interpreter of this process, as its release needs it."""
    if RELEASE < (3, 7):
        bound_loops_by_items()
    if RELEASE == (3, 9):
        mask_by_bits()


def bound_loops_by_items() -> None:
    """Let loops end at a tensor: 3.6 makes a number of an array of one element, which NumPy refuses from 2.4 on."""
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def mask_by_bits() -> None:
    """Let masks hold comparisons of two numbers: those are integers in 3.9.0, which its loads and stores refuse."""
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def bits(mask: Any) -> Any:
        return interpreter.TensorHandle(mask.data.astype(bool), tl.int1)

    builder.create_masked_load = lambda self, at, mask, *rest: load(self, at, bits(mask), *rest)
    builder.create_masked_store = lambda self, at, value, mask, *rest: store(self, at, value, bits(mask), *rest)
