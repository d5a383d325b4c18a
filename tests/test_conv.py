import random

import kernel_cases
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DTYPES, limit, rms_error
from triton.runtime.interpreter import interpreter_builder

from alexnet_triton.kernels import config, conv, halo, launch
from alexnet_triton.kernels.conv_shape import convolution
from alexnet_triton.kernels.weight_gradient import weight_gradient
from alexnet_triton.variants import VARIANTS


def reference(x, weight, bias, grad, stride, padding, groups, relu):
    """Output and gradients in float64."""
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = F.conv2d(*leaves, stride, padding, 1, groups)
    y = F.relu(y) if relu else y
    return y.detach(), *torch.autograd.grad(y, leaves, grad.double())


def draw(x_size, w_size, stride, padding, groups, dtype):
    x = torch.randn(x_size).to(dtype)
    weight = (torch.randn(w_size) / (w_size[1] * w_size[2] * w_size[3]) ** 0.5).to(dtype)
    bias = torch.randn(w_size[0]).to(dtype)
    shape = convolution(x_size, w_size, stride, padding, groups)
    grad = torch.randn(x_size[0], w_size[0], *shape.out_size).to(dtype)
    return x, weight, bias, grad, shape


def by_kernels(x, weight, bias, grad, shape, relu, conv_config=None, weight_config=None):
    """Output and gradients, each kernel by itself."""
    matrix = halo.enter(x, shape.x_layout, shape.fold)
    packed, turned = (conv.pack(weight, shape, x.dtype, turned) for turned in (False, True))
    y = halo.view(conv.conv2d_relu(matrix, packed, bias, shape, relu, shape.y_dense, conv_config), shape.y_dense)
    dy = halo.enter(grad, shape.dy_layout, shape.dy_fold, y if relu else None)
    dx = halo.view(conv.data_gradient(dy, turned, shape, shape.dx_dense, None, conv_config), shape.dx_dense)
    if shape.folds:
        dx = halo.leave(dx, torch.full_like(x, float("nan")), shape.fold)
    dw, db = weight_gradient(dy, matrix, shape, weight, bias, weight_config)
    return y, dx, dw, db


def check(sizes, relu, dtype, **configs):
    x, weight, bias, grad, shape = draw(*sizes, dtype)
    result = by_kernels(x, weight, bias, grad, shape, relu, **configs)
    expected = reference(x, weight, bias, grad, *sizes[2:], relu)
    for name, got, wanted in zip(("y", "dx", "dw", "db"), result, expected, strict=True):
        assert rms_error(got, wanted) < limit(dtype, wanted), name


ALEXNETS = {
    f"{name} of {variant}": sizes for variant in VARIANTS for name, *sizes in kernel_cases.convolutions(variant)
}
OWN = {str(sizes): (name, sizes) for name, sizes in ALEXNETS.items()}.values()  # each shape once


@pytest.mark.parametrize(("name", "sizes"), OWN, ids=[name for name, _ in OWN])
def test_alexnets_convolutions_at_full_size(name, sizes):
    x_size, w_size, stride, padding, groups = sizes
    for batch, dtype in ((3, torch.float32), *((1, dtype) for dtype in DTYPES)):
        check(((batch, *x_size), w_size, (stride, stride), (padding, padding), groups), True, dtype)


def drawn(seed):
    """A small convolution of any kind that nn.Conv2d takes with dilation 1."""
    r = random.Random(seed)
    window = r.choice([1, 2, 3, 5, 7]), r.choice([1, 2, 3, 4])
    stride = (1, 1) if r.random() < 0.3 else (r.randint(1, 4), r.randint(1, 4))
    padding = r.randint(0, 3), r.randint(0, 3)
    groups, depth, filters = r.choice([1, 1, 2, 4]), r.choice([1, 3, 5, 16, 17]), r.choice([1, 2, 7, 16, 33])
    size = [r.randint(max(1, w - 2 * p), 9) for w, p in zip(window, padding, strict=True)]
    return (r.randint(1, 3), groups * depth, *size), (groups * filters, depth, *window), stride, padding, groups


SMALL = [
    {"conv_config": config.ConvConfig(16, 16, 0, 16, 4, 1)},
    {"conv_config": config.ConvConfig(16, 32, 16, 64, 4, 1)},
    {"conv_config": config.ConvConfig(16, 16, 0, 16, 4, 1, loop="shifted")},
    {"conv_config": config.ConvConfig(32, 16, 16, 16, 4, 1, splits=3, loop="shifted")},
    {"conv_config": config.ConvConfig(16, 32, 0, 32, 4, 1, splits=2)},
    {"conv_config": config.ConvConfig(16, 16, 0, 16, 4, 1, splits=2)},  # whose second part begins inside a run
    {"conv_config": config.ConvConfig(16, 16, 0, 16, 4, 1, splits=20)},  # more parts than are asked for at once
    {"weight_config": config.WeightGradientConfig(16, 16, 0, 16, 20, 4, 1)},
    {"weight_config": config.WeightGradientConfig(16, 16, 16, 16, 3, 4, 1)},
    {"weight_config": config.WeightGradientConfig(64, 32, 0, 64, 2, 4, 1)},
]


@pytest.mark.parametrize("seed", range(80))
def test_drawn_convolutions(seed):
    """With the default blocks and with small ones."""
    dtype = DTYPES[0] if seed % 3 else DTYPES[seed // 3 % 3]
    configs = SMALL[seed // 2 % len(SMALL)] if seed % 2 else {}
    check(drawn(seed), seed % 5 < 3, dtype, **configs)


def test_a_first_row_of_an_image_sees_nothing_of_the_image_before():
    x = torch.zeros(2, 16, 4, 4)
    x[0, :, 3] = float("inf")
    shape = convolution((2, 16, 4, 4), (16, 16, 3, 3), (1, 1), (1, 1), 1)
    packed = conv.pack(torch.ones(16, 16, 3, 3), shape, x.dtype)
    y = conv.conv2d_relu(halo.enter(x, shape.x_layout, shape.fold), packed, None, shape, False, shape.y_dense)
    assert halo.view(y, shape.y_dense)[1].abs().max() == 0


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("loop", ["gathered", "shifted"])
@pytest.mark.parametrize("stride", [1, 2])
def test_nan_reaches_the_pixels_that_see_it_and_no_others(stride, loop, splits):
    """Also where a step takes columns past the last: they must not be multiplied in, even by zero.

    A strided window that is no multiple of its stride is rounded up with zeros, and may see one pixel more.
    """
    x = torch.randn(1, 17, 9, 8)
    x[0, -1, 2, 3] = float("nan")
    weight = torch.randn(5, 17, 3, 3)
    shape = convolution(x.shape, weight.shape, (stride, stride), (1, 1), 1)
    packed = conv.pack(weight, shape, x.dtype)
    blocks = config.ConvConfig(32, 16, 0, 16 if loop == "shifted" else 64, 4, 1, splits, loop)
    matrix = halo.enter(x, shape.x_layout, shape.fold)
    y = conv.conv2d_relu(matrix, packed, None, shape, True, shape.y_dense, blocks)
    got, expected = halo.view(y, shape.y_dense).isnan(), F.conv2d(x, weight, None, stride, 1).isnan()
    assert (got == expected).all() if stride == 1 else (got >= expected).all()


@pytest.mark.parametrize("loop", ["gathered", "shifted"])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("same_rows", [True, False])
def test_a_map_is_handed_on_with_its_border(same_rows, splits, loop):
    """In the layout of the next convolution, with its rows or with others."""
    blocks = config.ConvConfig(32, 16, 0, 16, 4, 1, splits, loop)
    x, weight, bias, _, shape = draw((2, 5, 6, 7), (16, 5, 3, 3), (1, 1), (1, 1), 1, torch.float32)
    if same_rows:
        following = convolution((2, 16, 6, 7), (8, 16, 3, 3), (1, 1), (1, 1), 1)
    else:
        following = convolution((2, 16, 6, 7), (8, 16, 5, 1), (1, 1), (3, 0), 1)
    layout = following.x_layout
    matrix = halo.enter(x, shape.x_layout, shape.fold)
    y = conv.conv2d_relu(matrix, conv.pack(weight, shape, x.dtype), bias, shape, True, layout, blocks)
    expected = F.conv2d(x, weight, bias, padding=1).relu()
    assert rms_error(halo.view(y, layout), expected) < 1e-6
    border = y.clone()
    halo.view(border, layout).zero_()
    assert border.abs().max() == 0

    # Backward: the following convolution's data gradient, masked by its input, in this one's layout.
    dy = torch.randn(2, 8, *following.out_size)
    turned = conv.pack(torch.randn(8, 16, *following.window), following, x.dtype, turned=True)
    entered = halo.enter(dy, following.dy_layout, following.dy_fold)
    masked = conv.data_gradient(entered, turned, following, shape.dy_layout, y, blocks)
    dense = following.dx_dense
    plain = halo.view(conv.data_gradient(entered, turned, following, dense, None, blocks), dense)
    assert torch.equal(halo.view(masked, shape.dy_layout), torch.where(expected > 0, plain, 0))
    border = masked.clone()
    halo.view(border, shape.dy_layout).zero_()
    assert border.abs().max() == 0


def test_filters_that_lie_as_they_are_read_are_not_copied():
    """So that channels-last filters of a stride-1 convolution are packed once and for all, whoever writes them."""
    x, weight, bias, grad, shape = draw((2, 32, 6, 5), (16, 16, 3, 3), (1, 1), (1, 1), 2, torch.float16)
    last = weight.contiguous(memory_format=torch.channels_last)
    packed = conv.pack(last, shape, torch.float16)
    assert packed.data_ptr() == last.data_ptr()
    assert torch.equal(packed, conv.pack(weight, shape, torch.float16))
    answers = [by_kernels(x, filters, bias, grad, shape, True) for filters in (last, weight)]
    for a, b in zip(*answers, strict=True):
        assert torch.equal(a, b)
    others = [
        (weight, shape, torch.float16, False),
        (last, shape, torch.float32, False),
        (last, shape, torch.float16, True),
        (last, convolution((2, 32, 6, 5), (16, 16, 3, 3), (2, 2), (1, 1), 2), torch.float16, False),
    ]
    for filters, folded, dtype, turned in others:
        assert conv.pack(filters, folded, dtype, turned).data_ptr() != filters.data_ptr()
    elsewhere = torch.randn(16 * 9 * 16 + 1)[1:].half().as_strided(last.shape, last.stride())
    misplaced = torch.empty(16 * 9 * 16 + 1, dtype=torch.float16)[1:].as_strided(last.shape, last.stride())
    misplaced.copy_(elsewhere)  # two bytes past what 16-byte loads take
    assert conv.pack(misplaced, shape, torch.float16).data_ptr() != misplaced.data_ptr()


def test_steps_that_do_not_divide_a_run_are_refused_by_the_shifted_loop():
    x, weight, bias, _, shape = draw((1, 48, 5, 5), (16, 48, 3, 3), (1, 1), (1, 1), 1, torch.float32)
    matrix, packed = halo.enter(x, shape.x_layout, shape.fold), conv.pack(weight, shape, x.dtype)
    blocks = config.ConvConfig(16, 16, 0, 64, 4, 1, loop="shifted")
    with pytest.raises(ValueError, match="divide 144 columns, got 64"):
        conv.conv2d_relu(matrix, packed, bias, shape, True, shape.y_dense, blocks)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_weight_gradients_have_their_parameters_layout(form):
    x, weight, bias, grad, shape = draw((2, 8, 5, 5), (6, 4, 3, 3), (1, 1), (1, 1), 2, torch.float32)
    weight = weight.contiguous(memory_format=form)
    _, _, dw, _ = by_kernels(x, weight, bias, grad, shape, True)
    assert dw.stride() == weight.stride()
    assert rms_error(dw, reference(x, weight, bias, grad, 1, 1, 2, True)[2]) < 1e-6


def test_parameters_may_be_wider_than_the_maps():
    """As under autocast: half-precision maps, float32 filters and gradients of filters."""
    x, weight, bias, grad, shape = draw((2, 16, 5, 5), (16, 16, 3, 3), (1, 1), (1, 1), 1, torch.float32)
    y, _, dw, db = by_kernels(x.half(), weight, bias, grad.half(), shape, False)
    assert (y.dtype, dw.dtype, db.dtype) == (torch.float16, torch.float32, torch.float32)
    expected = reference(x.half(), weight.half(), bias, grad.half(), 1, 1, 1, False)
    assert rms_error(dw, expected[2]) < 1e-6
    assert rms_error(db, expected[3]) < 1e-6


def test_two_runs_agree_to_the_last_bit():
    x, weight, bias, grad, shape = draw((3, 16, 9, 9), (16, 16, 3, 3), (1, 1), (1, 1), 1, torch.float32)
    splits = config.WeightGradientConfig(64, 16, 0, 16, 5, 4, 1)
    first, second = (by_kernels(x, weight, bias, grad, shape, True, weight_config=splits) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def last_program(monkeypatch):
    """Of each launch the last program runs alone, and none adds up splits; the arguments of all, by kernel."""
    made = {}

    def launched(kernel, programs, **arguments):
        made[kernel.__name__] = arguments
        if kernel.__name__ == "add_splits_kernel":
            return
        with monkeypatch.context() as patch:
            place = lambda *_: setattr(interpreter_builder, "grid_idx", (programs - 1, 0, 0))  # noqa: E731
            patch.setattr(interpreter_builder, "set_grid_idx", place)
            kernel[(1,)](**arguments)

    monkeypatch.setattr(launch, "launch", launched)
    monkeypatch.setattr(launch, "empty", lambda shape, like, dtype=None: torch.empty(shape, dtype=dtype or like.dtype))
    return made


TAIL = 2048


def end_of(rows):
    """A matrix of 16 channels, of which the last rows hold numbers; memory that is not touched is not taken."""
    try:
        matrix = torch.empty(rows, 16, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no 4 GB of addresses")
    matrix[-TAIL:] = torch.randn(TAIL, 16)
    return matrix


@pytest.mark.parametrize("loop", ["gathered", "shifted"])
def test_pixels_past_two_billion_elements_are_found(loop, last_program):
    """The last ones of a batch of 8,200 maps: numbers of elements pass 2^31 in each of the tensors."""
    shape = convolution((8200, 16, 128, 128), (16, 16, 1, 1), (1, 1), (0, 0), 1)
    weight = torch.randn(16, 16, 1, 1).half()
    x, gate = (end_of(layout.rows) for layout in (shape.x_layout, shape.dy_layout))
    assert min(x.numel(), gate.numel()) > 2**31
    blocks = config.ConvConfig(256, 16, 0, 16, 4, 1, loop=loop)
    end, filters = shape.y_dense.pixels, weight.view(16, 16).float()

    y = conv.conv2d_relu(x, conv.pack(weight, shape, x.dtype), None, shape, True, shape.y_dense, blocks)
    assert rms_error(y[end - 256 :], (x[end - 256 : end].float() @ filters.T).relu()) < 1e-3
    turned = conv.pack(weight, shape, x.dtype, turned=True)
    dx = conv.data_gradient(x, turned, shape, shape.y_dense, gate, blocks)
    product = x[end - 256 : end].float() @ filters
    assert rms_error(dx[end - 256 :], torch.where(gate[end - 256 : end] > 0, product, 0)) < 1e-3

    weight_gradient(gate, x, shape, weight, None, config.WeightGradientConfig(16, 16, 0, 64, end // 1024, 4, 1))
    partial = last_program["weight_gradient_kernel"]["partial"]  # the sum over the last split's 1,024 pixels
    assert partial.shape == (end // 1024, 1, 16, 16)
    assert rms_error(partial[-1, 0], x[end - 1024 : end].float().T @ gate[end - 1024 : end].float()) < 1e-6
