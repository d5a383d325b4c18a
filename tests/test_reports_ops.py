"""What users of fused layers stumble over, through the public ops and a small network, on both backends."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DTYPES, rms_error
from plain import error
from torch import nn

from alexnet_triton import AlexNet, fuse, ops, unfuse, use_backend

pytestmark = pytest.mark.usefixtures("backend")

LAST = torch.channels_last
HALF = (torch.float16, torch.bfloat16)


def network(channels=3, p=0.5):
    """Every op, as the paper has them: a strided convolution, groups, both poolings, dropout."""
    torch.manual_seed(1)
    return fuse(
        nn.Sequential(
            nn.Conv2d(channels, 16, 5, stride=2), nn.ReLU(), nn.LocalResponseNorm(5, 0.1, 0.75, 2.0),
            nn.MaxPool2d(3, 2), nn.Conv2d(16, 8, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Flatten(), nn.Dropout(p), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4),
        )
    )  # fmt: skip


def images(channels=3):
    return torch.randn(2, channels, 17, 17, generator=torch.Generator().manual_seed(2))


def plain(model):
    return unfuse(copy.deepcopy(model))


def results(model, x):
    """The answer, and the gradients of a weighted sum of it for `x` and every parameter, by name."""
    x = x.detach().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    leaves = {"x": x, **dict(model.named_parameters())}
    gradients = torch.autograd.grad((y * weights).sum(), [*leaves.values()])
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "k", "middle"),
    [(5e-4, 2.0, 23.2368), (1e-4, 2.0, 43.8691), (1e-4, 1.0, 59.4604)],
    ids=["the paper's", "torch's with the paper's k", "Caffe's"],
)
def test_lrn_of_five_equal_channels_divides_alpha_by_size_as_torch_does(alpha, k, middle):
    x = torch.full((1, 5, 1, 1), 100.0)
    y = ops.lrn_max_pool(x, 5, alpha, 0.75, k, kernel_size=1, stride=1)
    assert y[0, 2].item() == pytest.approx(middle, rel=2e-6)
    torch.testing.assert_close(y, F.local_response_norm(x, 5, alpha, 0.75, k), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
@pytest.mark.parametrize(
    ("window", "stride", "padding", "ceil_mode"), [(3, 2, 0, False), (3, 2, 1, True), ((2, 3), (1, 3), (1, 0), True)]
)
def test_nan_in_any_pixel_reaches_every_pooling_window_that_touches_it(window, stride, padding, ceil_mode, layout):
    """pytorch#7645, #39846, tensorflow#2501: a window of NaN gave -3.4e38. A map for each pixel, whose pixel it is."""
    height, width = 5, 7
    x = torch.randn(height * width, 4, height, width)
    x.view(height * width, 4, -1)[torch.arange(height * width), 2, torch.arange(height * width)] = math.nan
    window_of = (window, stride, padding)
    for size, dtype in ((0, torch.bfloat16), (3, torch.float32)):
        leaf = x.to(dtype).contiguous(memory_format=layout).requires_grad_()
        y = ops.lrn_max_pool(leaf, size, 0.5, 0.75, 1.0, *window_of, ceil_mode)
        exact = leaf.detach().float().requires_grad_()
        normal = F.local_response_norm(exact, size, 0.5, 0.75, 1.0) if size else exact
        expected = F.max_pool2d(normal, *window_of, 1, ceil_mode)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isnan().any((0, 2, 3)), torch.tensor([False, size > 0, True, size > 0]))
        got, wanted = (torch.autograd.grad(out.sum(), t)[0] for out, t in ((y, leaf), (expected, exact)))
        assert torch.equal(got.isnan(), wanted.isnan())
        if not size:
            assert torch.equal(got.float(), wanted)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_of_ties_and_of_minus_infinity_give_their_gradient_to_the_first_pixel(dtype, layout):
    """pytorch PR#23161: such windows had the index -1. With a border too, which is never the first."""
    for value, (padding, ceil_mode) in itertools.product((-math.inf, 1.0), ((0, False), (1, True))):
        x = torch.full((1, 4, 5, 5), value, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
        y = ops.lrn_max_pool(x, 0, padding=padding, ceil_mode=ceil_mode)
        y.sum().backward()
        first = [max(0, 2 * window - padding) for window in range(y.shape[2])]
        expected = torch.zeros(5, 5)
        for row, column in itertools.product(first, first):
            expected[row, column] += 1
        assert (y == value).all()
        assert torch.equal(x.grad.float(), expected.expand(1, 4, 5, 5))


def test_nan_in_any_parameter_reaches_the_logits_and_every_gradient_that_plain_layers_give_it():
    """pytorch#7999, #10238: relu(NaN) = 0 hides that a network has diverged.

    Where a filter's NaN meets the border of zeros, the kernels may give NaN to a pixel more.
    """
    for name, _ in network().named_parameters():
        model = network(p=0.0)
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] = math.nan
            assert model(images()).isnan().any(1).all(), name
    for name in ("0.weight", "4.bias"):
        model = network(p=0.0)
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] = math.nan
        ours, theirs = results(model, images()), results(plain(model), images())
        for key, value in theirs.items():
            assert (ours[key].isnan() >= value.isnan()).all(), (name, key)


@pytest.mark.parametrize("dtype", HALF)
def test_small_whole_numbers_are_exact_in_half_precision_forward_and_backward(dtype):
    """triton-lang/triton#4972: an interpreter that computes on bfloat16's bits is wrong by 1e10."""

    def whole(*size):
        return torch.randint(-2, 3, size).float()

    cases = [
        (ops.conv2d_relu, lambda x, w, b: F.conv2d(x, w, b).relu(), (whole(2, 3, 6, 5), whole(4, 3, 2, 2), whole(4))),
        (lambda x: ops.lrn_max_pool(x, 0), lambda x: F.max_pool2d(x, 3, 2), (whole(2, 3, 7, 7),)),
        (
            lambda x, w, b: ops.dropout_linear(x, w, b, relu=True),
            lambda x, w, b: F.linear(x, w, b).relu(),
            (whole(3, 9), whole(4, 9), whole(4)),
        ),
    ]
    for op, meaning, tensors in cases:
        outcomes = []
        for function, kind in ((op, dtype), (meaning, torch.float64)):
            leaves = [tensor.to(kind).requires_grad_() for tensor in tensors]
            y = function(*leaves)
            outcomes.append((y, *torch.autograd.grad((y * whole_like(y)).sum(), leaves)))
        for got, wanted in zip(*outcomes, strict=True):
            assert got.dtype == dtype
            assert torch.equal(got.double(), wanted)


def whole_like(y):
    return (torch.arange(y.numel()).view(y.shape) % 3 - 1).to(y.dtype)


# --- layouts ----------------------------------------------------------------------------------------------------------


def laid_out(*size):
    """Tensors of one shape, by how they lie in memory."""
    dims = len(size)
    wide = torch.randn([2 * n + 3 for n in size])
    yield "permuted", torch.randn(size[::-1]).permute(*range(dims)[::-1])
    yield "every other, from the second on", wide[tuple(slice(1, 2 * n + 1, 2) for n in size)]
    yield "dense rows of a wider tensor", wide[tuple(slice(1, n + 1) for n in size)]
    yield "first dimensions swapped", torch.randn(size[1], size[0], *size[2:]).transpose(0, 1)
    yield "behind an offset", torch.randn(7 + math.prod(size))[7:].view(size)
    yield "expanded rows", torch.randn(1, *size[1:]).expand(size)
    yield "expanded columns", torch.randn(*size[:-1], 1).expand(size)
    yield "one number", torch.randn(()).expand(size)
    yield "overlapping", torch.randn(sum(size)).as_strided(size, [1] * dims)
    if dims == 4:
        yield "channels last", torch.randn(size).contiguous(memory_format=LAST)
        yield (
            "channels last, and a part of it",
            torch.randn(size[0], 2 * size[1], *size[2:]).contiguous(memory_format=LAST)[:, : size[1]],
        )


OPS = {
    "convolution": (lambda x, w: ops.conv2d_relu(x, w, None, 2, 1, 2), ((3, 4, 7, 6), (6, 2, 3, 2))),
    "convolution of one channel": (lambda x, w: ops.conv2d_relu(x, w, None, 1, 1), ((2, 1, 5, 4), (3, 1, 3, 3))),
    "normalised pool": (lambda x: ops.lrn_max_pool(x, 3, 0.5), ((3, 4, 7, 6),)),
    "linear": (lambda x, w: ops.dropout_linear(x, w, relu=True), ((5, 6), (4, 6))),
}


def outcome(op, tensors, grad):
    """The answer, and the gradient of each tensor."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = op(*leaves)
    return y, *torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("name", OPS)
def test_tensors_of_any_strides_give_what_their_contiguous_copies_give(name):
    """TransformerEngine#2734, triton-lang/triton#2150: strides that were taken for granted. Input, weight, gradient."""
    op, sizes = OPS[name]
    out = op(*map(torch.zeros, sizes)).shape
    for alike in zip(*(laid_out(*size) for size in (*sizes, out)), strict=True):
        how, (*tensors, grad) = alike[0][0], [tensor for _, tensor in alike]
        got = outcome(op, tensors, grad)
        with use_backend("reference"):
            wanted = outcome(op, [tensor.contiguous() for tensor in tensors], grad.contiguous())
        for a, b in zip(got, wanted, strict=True):
            assert error(a, b) < 2e-6, how


def negated(*size):
    """A view whose memory holds its negative, as the imaginary part of a conjugate does."""
    view = torch.randn(size, dtype=torch.complex64).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize("name", OPS)
def test_views_that_torch_negates_lazily_and_zeros_without_memory_count_as_what_they_stand_for(name):
    op, sizes = OPS[name]
    sizes = (*sizes, op(*map(torch.zeros, sizes)).shape)
    for make, lazy in itertools.product((negated, torch._efficientzerotensor), range(len(sizes))):
        *tensors, grad = (make(*size) if number == lazy else torch.randn(size) for number, size in enumerate(sizes))
        got = outcome(op, tensors, grad)
        with use_backend("reference"):
            wanted = outcome(op, [tensor.clone() for tensor in tensors], grad.clone())
        for a, b in zip(got, wanted, strict=True):
            assert error(a, b) < 2e-6, (make.__name__, lazy)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_images_and_layers_give_the_same_numbers_in_torchs_layout(channels):
    """pytorch#82060, #111824."""
    model, x = network(channels).eval(), images(channels)
    expected = results(plain(model), x)
    for model_too, x_too in ((True, False), (False, True), (True, True)):
        ours = copy.deepcopy(model).to(memory_format=LAST) if model_too else model
        given = x.contiguous(memory_format=LAST) if x_too else x
        theirs = plain(ours)
        for name, value in results(ours, given).items():
            assert error(value, expected[name]) < 1e-5, name
        for end in (2, 4):  # behind a convolution and a pool
            assert ours[:end](given).stride() == theirs[:end](given).stride(), end


# --- empty, mixed and random ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_op_takes_an_empty_batch_in_any_layout_and_gives_zero_gradients(dtype):
    """pytorch#38115, #12013."""

    def parameter(*size):
        return torch.randn(size, dtype=dtype, requires_grad=True)

    filters, matrix, biases = parameter(6, 2, 3, 3), parameter(5, 8), [parameter(6), parameter(5)]
    cases = [
        (lambda x: ops.conv2d_relu(x, filters, biases[0], 2, 1, 2), (0, 4, 9, 9), (0, 6, 5, 5), [filters, biases[0]]),
        (lambda x: ops.lrn_max_pool(x), (0, 4, 9, 9), (0, 4, 4, 4), []),
        (lambda x: ops.dropout_linear(x, matrix, biases[1], 0.5, True), (0, 8), (0, 5), [matrix, biases[1]]),
        (lambda x: ops.dropout_linear(x, matrix, biases[1], 0.5, True), (3, 0, 8), (3, 0, 5), [matrix, biases[1]]),
    ]
    for op, size, out, parameters in cases:
        for layout in (torch.contiguous_format, LAST)[: len(size) - 2 or 1]:
            x = torch.zeros(size, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
            y = op(x)
            assert (y.shape, y.dtype) == (out, dtype)
            dx, *gradients = torch.autograd.grad(y.sum(), [x, *parameters])
            assert dx.shape == x.shape
            assert all(torch.equal(g, torch.zeros_like(p)) for g, p in zip(gradients, parameters, strict=True))


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_lowers_and_keeps_dtypes_as_it_does_for_plain_layers(dtype):
    """pytorch#126053: parts of a network that met in two dtypes. Between the layers too, and for empty batches."""
    model = network(p=0.0)
    for x in (images(), images()[:0]):
        with torch.autocast("cpu", dtype):
            ours, theirs = results(model, x), results(plain(model), x)
            for end in (1, 6, 10):  # behind products
                assert model[:end](x).dtype == plain(model)[:end](x).dtype == dtype, end
        for name, value in ours.items():
            assert value.dtype == (dtype if name == "y" else torch.float32)
            assert rms_error(value, theirs[name]) < 0.03, name


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_dropout_multiplies_by_zero_as_torchs_does(p, value):
    """A NaN or an infinity that is dropped is NaN; all that is dropped is zeros, with finite gradients."""
    x = torch.ones(3, 8)
    x[1] = value
    leaf, weight = x.clone().requires_grad_(), torch.ones(2, 8)
    y = ops.dropout_linear(leaf, weight, p=p)
    expected = F.linear(F.dropout(x, p), weight)
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert torch.equal(y.isnan()[1], expected.isnan()[1]) or p == 0.5
    y[[0, 2]].sum().backward()
    assert leaf.grad.isfinite().all()
    if p == 1:
        assert y[[0, 2]].abs().max() == leaf.grad.abs().max() == 0


def test_normalisation_of_half_precision_on_a_cpu_is_float32s_rounded():
    """pytorch#171948: `LocalResponseNorm` on a CPU refused float16, or squared 300 to infinity."""
    for dtype, limit in ((torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        x = torch.randn(1, 8, 4, 4).to(dtype)
        for value in (x, torch.full_like(x, 300)):
            y = ops.lrn_max_pool(value, 5, 1e-4, 0.75, 2.0, 1, 1)
            assert y.dtype == dtype
            assert error(y, F.local_response_norm(value.float(), 5, 1e-4, 0.75, 2.0)) < limit


@pytest.mark.parametrize("variant", ["caffe", "paper", "merged"])
def test_normalisations_that_are_watched_take_half_precision_as_fused_ones_do(variant):
    """A hook has a layer called itself: torch's own squares in half precision, or refuses it on a CPU."""
    norms = AlexNet(2, variant=variant, device="meta", lrn=True).features[1]
    model = fuse(nn.Sequential(*norms, nn.MaxPool2d(1)))
    x = torch.full((1, 10, 2, 2), 300.0)
    expected = model(x)
    model[1].register_forward_hook(lambda *_: None)
    for dtype in HALF:
        y = model(x.to(dtype))
        assert y.dtype == dtype
        assert error(y, expected) < 1e-2
