"""Convolutions and poolings that follow one another, run on the Triton kernels, forward and backward.

The maps between them stay in the layout that the next one reads (`kernels.halo`): a convolution's epilogue or a pooling
writes the border of the next convolution, backward likewise, so from the first convolution to the last pooling nothing
is copied.

    forward    x -> enter -> [conv -> pool | conv -> conv ...] -> out
    backward   grad -> enter, masked by out > 0 -> [weight gradient; data gradient, masked by its input > 0] ... -> dx

A ReLU's mask is applied by whatever brings the gradient into its convolution's layout: the entering copy, the pooling's
backward, or the epilogue of the next convolution's data gradient. So no matrix product has a mask in its loop, and
nothing is saved for ReLU. Where a map cannot be handed over (a strided convolution inside a chain, channels that are no
multiple of sixteen) it passes as an ordinary channels-last tensor, and enters again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from alexnet_triton.folded import Folded
from alexnet_triton.kernels import conv, halo, launch, norm_pool, weight_gradient
from alexnet_triton.kernels.conv_shape import Convolution, convolution
from alexnet_triton.kernels.halo import Layout
from alexnet_triton.stages import ConvStage, PoolStage, Size, Stage

MOST_ROWS = 2**31 - 2**16
"""Rows of a matrix are counted in 32 bits, with room for a tile; elements in 64."""


class _Conv(NamedTuple):
    """A convolution in its place in a chain."""

    stage: ConvStage
    weight: int
    """Number of its filters among the parameters; its bias follows."""
    shape: Convolution
    enters: bool
    """Whether its input must be brought into the layout here."""
    y_layout: Layout
    out_size: tuple[int, int, int, int]


class _Pool(NamedTuple):
    """A pooling in its place in a chain."""

    stage: PoolStage
    x_size: Size
    y_layout: Layout
    out_size: tuple[int, int, int, int]


_Link = _Conv | _Pool


def plan(x_size: Size, weights: Sequence[Size], stages: Sequence[Stage]) -> tuple[_Link, ...]:
    """Fix the layout of every map between the stages.

    Args:
        x_size: (N, C, H, W).
        weights: shape of each convolution's filters.
        stages: the chain.

    Raises:
        ValueError: a stage does not fit.
    """
    links: list[_Link] = []
    size, convs, parameters = x_size, 0, 0
    for stage in stages:
        if isinstance(stage, ConvStage):
            weight = weights[convs]
            out = stage.out_size(size, weight, None)
            shape = convolution(tuple(size), tuple(weight), stage.stride, stage.padding, stage.groups)
            links.append(_Conv(stage, parameters, shape, True, shape.y_dense, out))
            convs, parameters = convs + 1, parameters + 1 + stage.bias
        else:
            out = stage.out_size(size)
            links.append(_Pool(stage, tuple(size), halo.dense(out[0], out[1], out[2], out[3]), out))
        size = out
    for i in range(len(links) - 1):
        following = links[i + 1]
        if isinstance(following, _Conv) and following.shape.reads_plain_channels:
            links[i] = links[i]._replace(y_layout=following.shape.x_layout)
            links[i + 1] = following._replace(enters=False)
    return tuple(links)


_kept_plan = functools.lru_cache(maxsize=256)(plan)


def _weight_sizes(parameters: Sequence[Tensor], stages: Sequence[Stage]) -> list[Size]:
    at = 0
    sizes: list[Size] = []
    for stage in stages:
        if isinstance(stage, ConvStage):
            sizes.append(parameters[at].shape)
            at += 1 + stage.bias
    return sizes


def _plan_of(x: Tensor, parameters: Sequence[Tensor], stages: tuple[Stage, ...]) -> tuple[_Link, ...]:
    links = _kept_plan(tuple(x.shape), tuple(map(tuple, _weight_sizes(parameters, stages))), stages)
    for link in links:
        rows = link.shape.x_layout.rows if isinstance(link, _Conv) else link.x_size[0] * link.x_size[2] * link.x_size[3]
        if rows > MOST_ROWS:
            raise ValueError(
                f"the Triton kernels count at most {MOST_ROWS:,} pixels of a map in a batch, got {rows:,}: split the "
                "batch"
            )
    return links


# --- forward ------------------------------------------------------------------------------------------------


def forward(
    x: Tensor, parameters: Sequence[Tensor], stages: tuple[Stage, ...], save: bool, channels_last: bool
) -> tuple[Tensor, list[Tensor]]:
    """Run a chain.

    Args:
        x: (N, C, H, W), of any strides; float16, bfloat16 or float32.
        parameters: each convolution's filters and, where it has one, bias, in order.
        stages: the chain.
        save: whether `backward` will follow.
        channels_last: give a channels-last answer.

    Returns:
        The answer, (N, K, P, Q) of the dtype of `x`, and what `backward` needs beside it.
    """
    links = _plan_of(x, parameters, stages)
    x = _readable(x, links[0])
    saved: list[Tensor] = []
    value, matrix = x, None  # a map is an ordinary tensor, or a matrix in the next convolution's layout as well
    for number, link in enumerate(links):
        if save and _keeps_tensor(links, number):
            saved.append(_dense_matrix(value))
        if isinstance(link, _Conv):
            shape = link.shape
            if link.enters:
                matrix = value.matrix if isinstance(value, Folded) else halo.enter(value, shape.x_layout, shape.fold)
            assert matrix is not None
            if save:
                saved.append(matrix)
            weight = parameters[link.weight]
            bias = parameters[link.weight + 1] if link.stage.bias else None
            packed = conv.pack(weight, shape, x.dtype)
            matrix = conv.conv2d_relu(matrix, packed, bias, shape, link.stage.relu, link.y_layout)
        else:
            s = link.stage
            matrix, index = norm_pool.lrn_max_pool(
                value, s.size, s.alpha, s.beta, s.k, s.window, s.stride, s.padding, s.lrn_groups, link.y_layout, save
            )
            if index is not None:
                saved.append(index)
        value = halo.view(matrix, link.y_layout)
    return _in_format(value, channels_last), saved


def _readable(x: Tensor, first: _Link) -> Tensor:
    """The input as the chain's first link can read it: `Folded` where it lies in that very layout."""
    if not isinstance(x, Folded):
        return x
    fits = isinstance(first, _Conv) and (x.matrix_layout, x.fold) == (first.shape.x_layout, first.shape.fold)
    return x if fits else x.unfold_pixels()


def _keeps_tensor(links: Sequence[_Link], number: int) -> bool:
    """Whether backward wants the tensor that comes to link `number`, and can find it nowhere else."""
    if number == 0:
        return False
    link, before = links[number], links[number - 1]
    return isinstance(link, _Pool) or (link.enters and isinstance(before, _Conv) and before.stage.relu)


def _dense_matrix(value: Tensor) -> Tensor:
    """The matrix of a map in a dense layout."""
    n, c, h, w = value.shape
    return value.as_strided((n * h * w, c), (c, 1))


def _in_format(value: Tensor, channels_last: bool) -> Tensor:
    """A map in the layout that is asked for, with the strides of a fresh tensor on axes of length 1 as well.

    No view of anything: torch lets what an `autograd.Function` gives be changed in place only where it is none.
    """
    _, c, h, w = value.shape
    if not channels_last:
        value = value.contiguous()
    strides = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    return value.new_empty(0).set_(value.untyped_storage(), value.storage_offset(), value.shape, strides)


def like(x: Tensor, parameters: Sequence[Tensor], stages: Sequence[Stage], save: bool) -> tuple[Size, list[Tensor]]:
    """Shape of the answer of `forward`, and empty tensors like those it saves; sizes may be symbolic."""
    links = plan(x.shape, _weight_sizes(parameters, stages), stages)
    return links[-1].out_size, _saved_like(x, links) if save else []


def _saved_like(x: Tensor, links: Sequence[_Link]) -> list[Tensor]:
    saved = []
    for number, link in enumerate(links):
        if _keeps_tensor(links, number):
            n, c, h, w = links[number - 1].out_size
            saved.append(x.new_empty((n * h * w, c)))
        if isinstance(link, _Conv):
            layout = link.shape.x_layout
            saved.append(x.new_empty((layout.rows, layout.channels)))
        else:
            n, c, p, q = link.out_size
            saved.append(x.new_empty((n * p * q, c), dtype=norm_pool.index_dtype(link.stage.window)))
    return saved


# --- backward -----------------------------------------------------------------------------------------------


def backward(
    grad: Tensor, x: Tensor, out: Tensor | None, saved: Sequence[Tensor], parameters: Sequence[Tensor],
    stages: tuple[Stage, ...], needs: Sequence[bool], channels_last: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of a chain.

    Args:
        grad: of the answer, of any strides.
        x: the chain's input.
        out: its answer; it may be None where no ReLU comes last.
        saved: what `forward` gave beside it.
        parameters: as `forward` was given them.
        stages: the chain.
        needs: whether a gradient is wanted, of `x` and of each parameter.
        channels_last: give a channels-last gradient of `x`.

    Returns:
        The gradients that are wanted, in the order of `needs`; each parameter's has its parameter's dtype and layout.
    """
    links = _plan_of(x, parameters, stages)
    x = _readable(x, links[0])
    kept = list(saved)
    found: dict[int, Tensor] = {}  # by number in `needs`
    value: Tensor | None = grad  # the gradient as an ordinary tensor, or
    matrix: Tensor | None = None  # masked, in the layout that its convolution reads
    output: Tensor | None = out
    for number in reversed(range(len(links))):
        link = links[number]
        before = links[number - 1] if number else None
        goes_on = needs[0] or any(needs[1 : 1 + _parameters_before(links, number)])
        if isinstance(link, _Conv):
            shape = link.shape
            x_matrix = kept.pop()
            if matrix is None:
                assert value is not None
                matrix = halo.enter(value, shape.dy_layout, shape.dy_fold, output if link.stage.relu else None)
            _parameter_gradients(link, matrix, x_matrix, parameters, needs, found)
            source = _view(kept.pop(), links[number - 1].out_size) if _keeps_tensor(links, number) else None
            if not goes_on:
                break
            turned = conv.pack(parameters[link.weight], shape, matrix.dtype, turned=True)
            if isinstance(before, _Conv) and not link.enters and before.shape.takes_plain_gradients:
                gate = x_matrix if before.stage.relu else None
                matrix = conv.data_gradient(matrix, turned, shape, before.shape.dy_layout, gate)
                value = None
            else:
                value = halo.view(conv.data_gradient(matrix, turned, shape, shape.dx_dense), shape.dx_dense)
                matrix = None
                if shape.folds:
                    size = links[number - 1].out_size if number else x.shape
                    last = channels_last or number > 0
                    value = halo.leave(value, _empty_map(size, grad, last), shape.fold)
            # What the convolution before gave, for its ReLU: kept, or in the layout.
            output = source if link.enters else halo.view(x_matrix, shape.x_layout)
        else:
            s = link.stage
            index = kept.pop()
            source = _view(kept.pop(), link.x_size) if number else x
            if not goes_on:
                break
            assert value is not None
            direct = isinstance(before, _Conv) and before.shape.takes_plain_gradients
            relu = direct and isinstance(before, _Conv) and before.stage.relu
            n, c, h, w = link.x_size
            layout = before.shape.dy_layout if direct and isinstance(before, _Conv) else halo.dense(n, c, h, w)
            gradient = norm_pool.lrn_max_pool_backward(
                source, index, value, s.size, s.alpha, s.beta, s.k, s.window, s.stride, s.padding, s.lrn_groups,
                layout, relu,
            )  # fmt: skip
            matrix, value = (gradient, None) if direct else (None, halo.view(gradient, layout))
            output = source
    if needs[0]:
        assert value is not None
        found[0] = _in_format(value, channels_last)
    return [found[i] for i, needed in enumerate(needs) if needed]


def _parameters_before(links: Sequence[_Link], number: int) -> int:
    return sum(1 + link.stage.bias for link in links[:number] if isinstance(link, _Conv))


def _parameter_gradients(
    link: _Conv, dy: Tensor, x: Tensor, parameters: Sequence[Tensor], needs: Sequence[bool], found: dict[int, Tensor]
) -> None:
    at = link.weight
    wants_bias = link.stage.bias and needs[at + 2]
    if not (needs[at + 1] or wants_bias):
        return
    bias = parameters[at + 1] if wants_bias else None
    dw, db = weight_gradient.weight_gradient(dy, x, link.shape, parameters[at], bias)
    found[at + 1] = dw
    if db is not None:
        found[at + 2] = db


def _view(matrix: Tensor, size: Size) -> Tensor:
    n, c, h, w = size
    return halo.view(matrix, halo.dense(n, c, h, w))


def _empty_map(size: Size, like: Tensor, channels_last: bool) -> Tensor:
    n, c, h, w = size
    if channels_last:
        return launch.empty((n, h, w, c), like).permute(0, 3, 1, 2)
    return launch.empty((n, c, h, w), like)
