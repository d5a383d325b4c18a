import random

import pytest
import torch
import torch.nn.functional as F

from alexnet_triton.kernels import halo


def views():
    base = torch.randn(6, 12, 10, 11)
    yield "contiguous", base[:2, :5].contiguous()
    yield "channels last", base[:2, :5].contiguous(memory_format=torch.channels_last)
    yield "sliced", base[1:3, 2:7, ::2, 1:]
    yield "permuted", base.permute(1, 0, 3, 2)[:2, :5]
    yield "expanded", base[:1, :5].expand(3, 5, 10, 11)
    yield "one value", torch.ones(()).expand(2, 5, 4, 3)


@pytest.mark.parametrize(("name", "x"), list(views()), ids=[name for name, _ in views()])
def test_a_map_enters_with_a_border_of_zeros_and_leaves_as_it_was(name, x):
    n, c, h, w = x.shape
    layout = halo.for_convolution(n, 16, (h, w), (3, 5), (1, 2), (h, w))
    matrix = halo.enter(x, layout, halo.no_fold(1, c, 16))
    assert torch.equal(halo.view(matrix, layout)[:, :c], x)
    rest = matrix.clone()
    halo.view(rest, layout)[:, :c] = 0
    assert rest.abs().max() == 0
    out = torch.empty_permuted(x.shape, (0, 2, 1, 3)).fill_(float("nan"))
    assert torch.equal(halo.leave(halo.view(matrix, layout)[:, :c], out, halo.no_fold(1, c, c)), x)


def test_layout_has_room_for_every_shift_of_every_convolution():
    draw = random.Random(0)
    for _ in range(500):
        taps = draw.randint(1, 7), draw.randint(1, 7)
        padding = draw.randint(0, 8), draw.randint(0, 8)
        size = [draw.randint(max(1, t - 2 * p), 12) for t, p in zip(taps, padding, strict=True)]
        out = [s + 2 * p - t + 1 for s, p, t in zip(size, padding, taps, strict=True)]
        layout = halo.for_convolution(draw.randint(1, 3), 16, size, taps, padding, out)
        steps = (layout.rows - 2 * layout.lead) % halo.ROWS_MULTIPLE
        assert steps == 0
        last = layout.pixels - 1
        for r in (0, taps[0] - 1):
            for s in (0, taps[1] - 1):
                shift = (r - padding[0]) * layout.pitch_w + s - padding[1]
                for row in (0, last, layout.rows - 2 * layout.lead - 1):
                    assert 0 <= layout.lead + row + shift < layout.rows
                    assert 0 <= layout.lead + row - shift < layout.rows


@pytest.mark.parametrize("groups", [1, 2])
def test_blocks_of_pixels_become_channels_as_pixel_unshuffle_has_them(groups):
    x = torch.randn(2, 6, 8, 12)
    fold = halo.Fold(groups, 6 // groups, (2, 2), (2, 2), (0, 0), 24 // groups)
    layout = halo.dense(2, 24, 4, 6)
    folded = halo.view(halo.enter(x, layout, fold), layout)
    assert torch.equal(folded, F.pixel_unshuffle(x, 2))
    assert torch.equal(halo.leave(folded, torch.empty_like(x), fold), x)


def test_a_fold_with_padding_and_a_stride_past_its_window():
    x = torch.randn(1, 1, 7, 7)
    fold = halo.Fold(1, 1, (2, 1), (3, 2), (1, 0), 2)  # rows 3h - 1 and 3h, columns 2w
    layout = halo.dense(1, 2, 3, 4)
    folded = halo.view(halo.enter(x, layout, fold), layout)
    padded = F.pad(x, (0, 0, 1, 1))
    assert torch.equal(folded[:, 0], padded[:, 0, 0::3, ::2])
    assert torch.equal(folded[:, 1], padded[:, 0, 1::3, ::2])
    back = halo.leave(folded, torch.full_like(x, float("nan")), fold)
    seen = torch.zeros(7, 7, dtype=torch.bool)
    seen[[0, 2, 3, 5, 6]] = True
    seen[:, 1::2] = False
    assert torch.equal(back[0, 0], torch.where(seen, x[0, 0], 0))


def test_a_layout_smaller_than_its_source_leaves_the_rest_out():
    x = torch.randn(1, 3, 7, 9)
    layout = halo.for_convolution(1, 16, (2, 3), (3, 3), (1, 1), (2, 3))
    matrix = halo.enter(x, layout, halo.Fold(1, 3, (2, 2), (2, 2), (0, 0), 16))
    assert torch.equal(halo.view(matrix, layout)[:, :12], F.pixel_unshuffle(x[:, :, :4, :6], 2))
    halo.view(matrix, layout).zero_()
    assert matrix.abs().max() == 0


def test_gate_drops_where_the_output_is_not_positive_and_lets_nan_through():
    grad = torch.tensor([1.0, 2, 3, float("nan"), 5]).reshape(1, 1, 1, 5)
    gate = torch.tensor([1.0, 0, -1, 2, float("nan")]).reshape(1, 1, 1, 5)
    matrix = halo.enter(grad, halo.dense(1, 1, 1, 5), halo.no_fold(1, 1, 1), gate)
    expected = torch.ops.aten.threshold_backward(grad, gate, 0)
    assert torch.equal(matrix.flatten().nan_to_num(7), expected.flatten().nan_to_num(7))
    assert matrix.flatten()[3].isnan()


def test_a_map_changes_its_dtype_as_it_enters():
    x = torch.randn(1, 2, 3, 3)
    matrix = halo.enter(x, halo.dense(1, 2, 3, 3), halo.no_fold(1, 2, 2), dtype=torch.float16)
    assert matrix.dtype == torch.float16
    assert torch.equal(halo.view(matrix, halo.dense(1, 2, 3, 3)), x.half())


def test_strides_past_two_billion_elements_are_followed():
    far = 2**30 + 8  # a stride that fits 32 bits, and a place that does not
    store = torch.empty(2 * far + 64, dtype=torch.float16)  # pages that nobody touches cost nothing
    x = store.as_strided((3, 1, 2, 2), (far, 4, 2, 1))
    x.copy_(torch.arange(12.0).reshape(3, 1, 2, 2))
    layout = halo.dense(3, 1, 2, 2)
    matrix = halo.enter(x, layout, halo.no_fold(1, 1, 1))
    assert matrix.flatten().tolist() == list(range(12))
    x.zero_()
    halo.leave(halo.view(matrix, layout), x, halo.no_fold(1, 1, 1))
    assert x.flatten().tolist() == list(range(12))
