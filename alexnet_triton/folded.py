"""Images that lie as the first convolution reads them: no copy brings them into its layout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from alexnet_triton.kernels.halo import Fold, Layout

OPERATORS: dict[Any, Callable[..., Any]] = {}
"""By operator that takes a `Folded` as it is, what runs it."""


class Folded(Tensor):
    """Images (N, 3, H, W) that hold a matrix in a convolution's layout instead of pixels.

    To everybody it is a channels-last tensor: whatever is done to it is done to the pixels, which are brought back
    first. Only the chain whose first convolution reads that layout takes the matrix. What is read from it, views too,
    is a copy; writing into it is refused. Its copies (`copy.deepcopy`, `pickle`) are ordinary tensors.

    Args:
        matrix: (layout.rows, layout.channels).
        layout: where its pixels lie.
        fold: how pixels have become channels; it leaves out no pixel.
        size: (N, 3, H, W).
    """

    matrix: Tensor
    matrix_layout: Layout
    fold: Fold

    @staticmethod
    def __new__(cls, matrix: Tensor, layout: Layout, fold: Fold, size: tuple[int, int, int, int]) -> Folded:
        """Wrap a matrix."""
        _, c, h, w = size
        folded = Tensor._make_wrapper_subclass(
            cls, size, (h * w * c, 1, w * c, c), dtype=matrix.dtype, device=matrix.device
        )
        folded.matrix, folded.matrix_layout, folded.fold = matrix, layout, fold
        return folded

    def unfold_pixels(self) -> Tensor:
        """The images as an ordinary channels-last tensor."""
        n, c, h, w = self.shape
        layout, fold = self.matrix_layout, self.fold
        (rows, columns), (top, left) = fold.block, fold.origin
        lines = self.matrix[layout.lead : layout.lead + layout.pixels]
        lines = lines.view(n, layout.pitch_h, layout.pitch_w, fold.groups, fold.depth_padded)
        blocks = lines[:, : layout.height, : layout.width, :, : fold.depth * rows * columns]
        blocks = blocks.unflatten(4, (fold.depth, rows, columns)).permute(0, 1, 5, 2, 6, 3, 4)
        pixels: Tensor = blocks.reshape(n, layout.height * rows, layout.width * columns, c)
        return pixels[:, top : top + h, left : left + w].contiguous().permute(0, 3, 1, 2)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["matrix"], (self.matrix_layout, self.fold)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, strides: Any) -> Folded:
        layout, fold = context
        return Folded(inner["matrix"], layout, fold, size)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in OPERATORS and not torch.compiler.is_compiling():
            return OPERATORS[func](*args, **kwargs)
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            x = args[0]
            return Folded(x.matrix, x.matrix_layout, x.fold, tuple(x.shape))
        if func is torch.ops.aten.record_stream.default:
            return func(args[0].matrix, *args[1:])
        for number, argument in enumerate(func._schema.arguments):
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            if isinstance(given, Folded) and argument.alias_info is not None and argument.alias_info.is_write:
                raise _refused(str(func))
        args, kwargs = tree_map_only(Folded, Folded.unfold_pixels, (args, kwargs))
        return func(*args, **kwargs)

    # What torch does past the dispatcher, with memory that a `Folded` has not.

    def __setitem__(self, index: Any, value: Any) -> None:
        raise _refused("an assignment")

    def data_ptr(self) -> int:
        """Refuse: the pixels lie nowhere."""
        raise _refused("data_ptr")

    def share_memory_(self) -> Tensor:
        """Refuse: the pixels lie nowhere."""
        raise _refused("share_memory_")

    def numpy(self, **options: Any) -> Any:
        """As of the pixels."""
        return self.unfold_pixels().numpy(**options)

    def tolist(self) -> Any:
        """As of the pixels."""
        return self.unfold_pixels().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.unfold_pixels(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.unfold_pixels().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Folded({self.unfold_pixels()!r})"


def _refused(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what} needs the memory of images that lie as the first convolution reads them: take a copy, x.clone()"
    )
