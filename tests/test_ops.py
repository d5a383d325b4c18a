import math

import pytest
import torch
import torch.nn.functional as F
from plain import error
from torch.autograd import gradcheck, gradgradcheck

from alexnet_triton import ops, use_backend

# AlexNet's five convolutions at batch 2 and a small size, and odd relatives of theirs.
CONVS = [
    # (x, weight, stride, padding, groups)
    ((2, 3, 67, 71), (96, 3, 11, 11), 4, 0, 1),
    ((2, 3, 63, 67), (64, 3, 11, 11), 4, 2, 1),
    ((2, 96, 7, 9), (256, 48, 5, 5), 1, 2, 2),
    ((2, 64, 7, 7), (192, 64, 5, 5), 1, 2, 1),
    ((2, 256, 4, 3), (384, 256, 3, 3), 1, 1, 1),
    ((2, 384, 3, 4), (256, 192, 3, 3), 1, 1, 2),
    ((3, 4, 5, 6), (16, 1, 2, 3), (2, 1), (1, 0), 4),
    ((1, 5, 1, 1), (7, 5, 1, 1), 3, 0, 1),
]


@pytest.fixture(params=["reference", "triton"], autouse=True)
def backend(request):
    with use_backend(request.param):
        yield request.param


def gradients(function, *tensors):
    """The output, and the gradients of a fixed weighted sum of it, for every tensor."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = function(*tensors)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return y.detach(), torch.autograd.grad((y * weights).sum(), tensors)


def hold(function, expected, *tensors, limit=2e-6):
    """`function` in float32 is `expected` in float64, output and gradients."""
    y, grads = gradients(function, *tensors)
    y64, grads64 = gradients(expected, *(tensor.double() for tensor in tensors))
    assert error(y, y64) < limit
    for grad, grad64 in zip(grads, grads64, strict=True):
        assert error(grad, grad64) < limit


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_conv2d_relu_is_the_composition(case, relu):
    shape, filters, stride, padding, groups = case
    x, weight, bias = torch.randn(shape), torch.randn(filters), torch.randn(filters[0])

    def expected(x, w, b):
        y = F.conv2d(x, w, b, stride, padding, 1, groups)
        return F.relu(y) if relu else y

    hold(lambda x, w, b: ops.conv2d_relu(x, w, b, stride, padding, groups, relu), expected, x, weight, bias)


def test_grouped_convolution_keeps_its_groups_apart():
    x = torch.zeros(1, 4, 3, 3)
    x[0, 3] = 1
    y = ops.conv2d_relu(x, torch.ones(16, 2, 1, 1), groups=2)
    assert y[:, :8].max() == 0
    assert y[:, 8:].min() == 1


@pytest.mark.parametrize("filters", [(4, 3, 3, 3), (4, 3, 2, 5), (4, 3, 4, 1)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_conv_takes_padding_by_name(filters, padding):
    x, weight = torch.randn(2, 3, 9, 8), torch.randn(filters)
    expected = F.conv2d(x, weight, padding=padding).relu()
    assert error(ops.conv2d_relu(x, weight, padding=padding), expected) < 1e-6


def test_relu_passes_nan_and_has_no_slope_at_zero():
    weight = torch.ones(1, 1, 1, 1)
    y = ops.conv2d_relu(torch.tensor([math.nan, -1.0, 2.0]).reshape(1, 1, 1, 3), weight).flatten()
    assert y[0].isnan()
    assert y[1:].tolist() == [0, 2]
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    ops.conv2d_relu(x, weight).sum().backward()
    assert x.grad.abs().max() == 0
    features = torch.zeros(1, 2, requires_grad=True)
    ops.dropout_linear(features, torch.ones(3, 2), relu=True).sum().backward()
    assert features.grad.abs().max() == 0


@pytest.mark.parametrize("lrn_groups", [1, 2])
@pytest.mark.parametrize("size", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(("window", "stride", "padding"), [(3, 2, 0), (2, 2, 1), ((3, 2), (1, 3), (1, 0))])
def test_lrn_max_pool_is_the_composition(size, lrn_groups, ceil_mode, window, stride, padding):
    def expected(x):
        if size:
            halves = x.chunk(lrn_groups, 1)
            x = torch.cat([F.local_response_norm(half, size, 0.5, 0.75, 2.0) for half in halves], 1)
        return F.max_pool2d(x, window, stride, padding, 1, ceil_mode)

    def ours(x):
        return ops.lrn_max_pool(x, size, 0.5, 0.75, 2.0, window, stride, padding, ceil_mode, lrn_groups)

    hold(ours, expected, torch.randn(2, 6, 8, 9))


def test_defaults_are_torchs_and_alexnets():
    x = torch.randn(1, 8, 7, 7) * 100
    assert torch.allclose(ops.lrn_max_pool(x), F.max_pool2d(F.local_response_norm(x, 5), 3, 2))
    features, weight = torch.randn(2, 8), torch.randn(4, 8)
    assert torch.allclose(ops.dropout_linear(features, weight), F.linear(features, weight))


def test_order_of_norm_and_pool_matters():
    x = torch.randn(1, 8, 7, 7) * 100
    pooled_first = F.local_response_norm(F.max_pool2d(x, 3, 2), 5)
    assert not torch.allclose(ops.lrn_max_pool(x), pooled_first, rtol=1e-2)


def pool(x, **options):
    return ops.lrn_max_pool(x, **{"size": 0, **options})


def test_pool_propagates_nan_to_every_window_that_touches_it():
    for column, touched in ((0, [0]), (2, [0, 1]), (6, [2])):
        x = torch.zeros(1, 1, 3, 7)
        x[0, 0, 1, column] = math.nan
        assert pool(x).flatten().isnan().nonzero().flatten().tolist() == touched
    assert pool(torch.full((1, 1, 3, 3), math.nan)).isnan().all()


def test_pool_of_minus_infinity_is_minus_infinity_with_its_gradient_in_bounds():
    x = torch.full((1, 1, 5, 5), -math.inf, requires_grad=True)
    y = pool(x)
    assert (y == -math.inf).all()
    y.sum().backward()
    assert x.grad.sum() == 4


def test_pool_gives_tied_gradient_to_the_first_maximum():
    x = torch.ones(1, 1, 5, 5, requires_grad=True)
    pool(x).sum().backward()
    assert x.grad.nonzero()[:, 2:].tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]


def test_ceil_mode_rounds_up_and_its_last_window_starts_inside():
    assert pool(torch.ones(1, 1, 54, 54), ceil_mode=True).shape[2:] == (27, 27)
    assert pool(torch.ones(1, 1, 54, 54)).shape[2:] == (26, 26)
    y = pool(torch.ones(1, 1, 6, 7), kernel_size=1, ceil_mode=True)
    assert y.shape[2:] == (3, 4)
    assert y.min() == 1


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", [(5, 12), (12,), (2, 3, 12)])
def test_dropout_linear_without_dropout_is_linear(shape, relu):
    x, weight, bias = torch.randn(shape), torch.randn(7, 12), torch.randn(7)
    hold(
        lambda x, w, b: ops.dropout_linear(x, w, b, relu=relu),
        lambda x, w, b: F.linear(x, w, b).relu() if relu else F.linear(x, w, b),
        x, weight, bias,
    )  # fmt: skip


def test_dropout_follows_torchs_generator():
    x, weight = torch.ones(64, 32), torch.eye(32)
    torch.manual_seed(5)
    first, second = (ops.dropout_linear(x, weight, p=0.5) for _ in range(2))
    torch.manual_seed(5)
    again, again_second = (ops.dropout_linear(x, weight, p=0.5) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(second, again_second)
    assert not torch.equal(first, second)


def test_dropout_drops_the_right_share_and_scales_the_rest():
    x = torch.ones(1000, 1000)
    for p in (0.1, 0.5, 0.9):
        y = ops.dropout_linear(x, torch.eye(1000), p=p)
        kept = y != 0
        assert abs(kept.double().mean().item() - (1 - p)) < 3 * math.sqrt(p * (1 - p) / x.numel())
        assert torch.allclose(y[kept], torch.tensor(1 / (1 - p)))
        assert len({tuple(row) for row in kept[:50].tolist()}) == 50


def test_dropout_at_its_ends():
    x = torch.randn(4, 8, requires_grad=True)
    weight, bias = torch.randn(3, 8), torch.randn(3)
    y = ops.dropout_linear(x, weight, bias, p=1.0)
    assert torch.equal(y, bias.expand(4, 3))
    y.sum().backward()
    assert x.grad.abs().max() == 0
    for without in ({"p": 0.0}, {"p": 0.7, "training": False}):
        assert error(ops.dropout_linear(x, weight, bias, **without), F.linear(x, weight, bias)) < 1e-6


def test_dropout_gradient_uses_the_mask_of_the_forward_pass():
    x = torch.ones(16, 32, requires_grad=True)
    torch.manual_seed(1)
    y = ops.dropout_linear(x, torch.eye(32), p=0.5)
    torch.manual_seed(2)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def views():
    base = torch.randn(6, 12, 18, 20, dtype=torch.float64)
    yield "permuted", base.permute(1, 0, 3, 2)[:2]
    yield "strided", base[:, :6, ::2, 1:]
    yield "expanded", base[:1, :6].expand(3, 6, 18, 20)
    yield "transposed", base.transpose(0, 1)[:, :6]
    yield "offset", base.flatten()[7 : 7 + 2 * 6 * 9 * 9].reshape(2, 6, 9, 9)
    yield "channels last", base[:, :6].contiguous(memory_format=torch.channels_last)
    yield "one channel, channels last", base[:, :1].contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("name", "x"), list(views()), ids=[name for name, _ in views()])
def test_strides_do_not_change_the_numbers(name, x):
    x = x.float()
    copy = x.contiguous()
    weight = torch.randn(4, x.shape[1], 3, 3)
    assert error(ops.conv2d_relu(x, weight), ops.conv2d_relu(copy, weight)) < 1e-6
    assert torch.equal(ops.lrn_max_pool(x), ops.lrn_max_pool(copy))
    matrix = torch.randn(5, x.shape[-1])
    assert error(ops.dropout_linear(x, matrix), ops.dropout_linear(copy, matrix)) < 1e-6


def test_channels_last_in_is_channels_last_out():
    x = torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    assert ops.conv2d_relu(x, torch.randn(6, 8, 3, 3)).is_contiguous(memory_format=torch.channels_last)
    assert ops.lrn_max_pool(x).is_contiguous(memory_format=torch.channels_last)


def test_empty_batch_gives_empty_answers_and_zero_gradients():
    weight, bias = torch.randn(6, 4, 3, 3, requires_grad=True), torch.randn(6, requires_grad=True)
    matrix = torch.randn(5, 7, requires_grad=True)
    y = ops.lrn_max_pool(ops.conv2d_relu(torch.zeros(0, 4, 9, 9), weight, bias))
    assert y.shape == (0, 6, 3, 3)
    z = ops.dropout_linear(torch.zeros(0, 7), matrix, p=0.5, relu=True)
    assert z.shape == (0, 5)
    (y.sum() + z.sum()).backward()
    for parameter in (weight, bias, matrix):
        assert parameter.grad.abs().max() == 0


def test_ops_are_differentiable_twice():
    def d(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    cases = [
        (lambda x, w, b: ops.conv2d_relu(x, w, b, 2, 1, 2), (d(2, 4, 5, 4), d(4, 2, 3, 3), d(4))),
        (lambda x: ops.lrn_max_pool(x, 3, 0.9, 0.75, 2.0, lrn_groups=2), (d(1, 6, 5, 5),)),
        (lambda x, w, b: ops.dropout_linear(x, w, b, relu=True), (d(3, 4), d(5, 4), d(5))),
    ]
    with use_backend("reference"):
        for function, inputs in cases:
            assert gradcheck(function, inputs)
            assert gradgradcheck(function, inputs)


def test_autocast_lowers_matrix_products_and_keeps_the_norm_in_float32_inside():
    x, weight = torch.randn(2, 8, 9, 9), torch.randn(8, 8, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.conv2d_relu(x * 100, weight)
        z = ops.lrn_max_pool(y)
        logits = ops.dropout_linear(z.flatten(1), torch.randn(3, 72), relu=True)
    assert y.dtype == z.dtype == logits.dtype == torch.bfloat16
    expected = F.max_pool2d(F.local_response_norm(y.float(), 5), 3, 2)
    assert error(z, expected) < 2**-8
    logits.sum().backward()
    assert weight.grad.dtype == torch.float32


def ones(*shape, **options):
    return torch.ones(shape, **options)


X = ones(1, 4, 8, 8)
W = ones(6, 4, 3, 3)
BAD = [
    (ops.conv2d_relu, (ones(4, 8, 8), W), {}, r"4-D.*3-D \(4, 8, 8\).*unsqueeze"),
    (ops.conv2d_relu, (ones(1, 1, 4, 8, 8), W), {}, "4-D.*5-D"),
    (ops.conv2d_relu, (X, ones(6, 4, 3)), {}, r"\(K, C/groups, R, S\), got \(6, 4, 3\)"),
    (ops.conv2d_relu, (X, ones(6, 3, 3, 3)), {}, "3 channels.*got 4 channels"),
    (ops.conv2d_relu, (X, ones(0, 4, 3, 3)), {}, r"at least 1 filter.*got filters \(0, 4, 3, 3\)"),
    (ops.conv2d_relu, (ones(1, 0, 8, 8), ones(6, 0, 3, 3)), {}, r"at least 1 channel.*\(6, 0, 3, 3\)"),
    (ops.conv2d_relu, (X, ones(6, 4, 0, 3)), {}, r"1 pixel, got filters \(6, 4, 0, 3\)"),
    (ops.conv2d_relu, (X, ones(5, 2, 3, 3)), {"groups": 2}, "2 groups divide, got 5"),
    (ops.conv2d_relu, (X, W, ones(5)), {}, r"bias of shape \(6,\), got \(5,\)"),
    (ops.conv2d_relu, (X, ones(6, 4, 11, 9)), {"padding": 1}, "at least 9x7.*got 8x8"),
    (ops.conv2d_relu, (X, W), {"stride": 0}, r"stride and groups of at least 1.*\(0, 0\)"),
    (ops.conv2d_relu, (X, W), {"padding": -1}, "padding of at least 0"),
    (ops.conv2d_relu, (X, W), {"groups": 0}, "groups 0"),
    (ops.conv2d_relu, (X, W), {"padding": "half"}, "'same', 'valid' or numbers, got 'half'"),
    (ops.conv2d_relu, (X, W), {"padding": "same", "stride": 2}, "stride 1 only"),
    (ops.lrn_max_pool, (ones(4, 8, 8),), {}, "4-D"),
    (ops.lrn_max_pool, (ones(1, 0, 8, 8),), {}, r"at least 1 channel, got \(1, 0, 8, 8\)"),
    (ops.lrn_max_pool, (X,), {"size": -1}, "at least 0.*got -1"),
    (ops.lrn_max_pool, (X,), {"lrn_groups": 3}, "divides the 4 channels, got 3"),
    (ops.lrn_max_pool, (X,), {"kernel_size": 9}, "at least 9x9.*got 8x8"),
    (ops.lrn_max_pool, (X,), {"padding": 2}, "half of the window"),
    (ops.lrn_max_pool, (X,), {"stride": 0}, "stride of at least 1"),
    (ops.dropout_linear, (ones(2, 3), ones(4, 3)), {"p": 1.1}, r"\[0, 1\], got 1.1"),
    (ops.dropout_linear, (ones(2, 3), ones(4, 3)), {"p": -0.1}, r"\[0, 1\], got -0.1"),
    (ops.dropout_linear, (ones(2, 3), ones(4, 3)), {"p": math.nan}, "got nan"),
    (ops.dropout_linear, (ones(2, 5), ones(4, 3)), {}, r"last dimension is 3.*\(2, 5\)"),
    (ops.dropout_linear, (ones(2, 3), ones(3)), {}, r"\(features out, features in\)"),
    (ops.dropout_linear, (ones(2, 3), ones(4, 3), ones(3)), {}, r"bias of shape \(4,\)"),
    (ops.conv2d_relu, (X, ones(6, 4, 3, 3, device="meta")), {}, "one device.*cpu.*meta"),
]


@pytest.mark.parametrize(("op", "tensors", "options", "message"), BAD, ids=[case[3] for case in BAD])
def test_what_does_not_fit_is_refused_in_one_sentence(op, tensors, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        op(*tensors, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("op", "tensors", "message"),
    [
        (ops.conv2d_relu, (X.byte(), W), r"floating-point.*torch.uint8.*x.float\(\)"),
        (ops.lrn_max_pool, (X.int(),), "floating-point.*torch.int32"),
        (ops.dropout_linear, (ones(2, 3).double(), ones(4, 3)), "one dtype.*float64.*float32"),
        (ops.conv2d_relu, (X.half(), W), "one dtype.*float16.*float32"),
    ],
)
def test_dtypes_that_do_not_fit_are_refused(op, tensors, message):
    with pytest.raises(TypeError, match=message):
        op(*tensors)
