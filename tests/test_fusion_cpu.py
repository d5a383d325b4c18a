"""Runs on a CPU: layouts that change nothing, and the gradient for images of a strided convolution."""

import copy

import pytest
import torch
from plain import error
from torch import nn
from torch.autograd import forward_ad

from alexnet_triton import FusedSequential
from alexnet_triton.fusion import cpu, pointwise, strided

LAST = torch.channels_last

CONVOLUTIONS = {
    "AlexNet's, at LPIPS's size": (nn.Conv2d(3, 8, 11, 4, 2), (2, 3, 64, 64)),
    "the paper's": (nn.Conv2d(3, 8, 11, 4), (1, 3, 67, 83)),
    "pixels that meet no window": (nn.Conv2d(3, 8, 5, 4), (2, 3, 32, 31)),
    "a window that its stride divides": (nn.Conv2d(3, 4, 4, 4), (2, 3, 12, 16)),
    "two strides": (nn.Conv2d(4, 6, (3, 5), (2, 3), (1, 0)), (2, 4, 20, 21)),
    "windows with gaps between": (nn.Conv2d(3, 4, 2, 3), (1, 3, 31, 32)),
    "a window of one pixel": (nn.Conv2d(3, 4, 1, 2), (2, 3, 9, 8)),
    "more padding than image": (nn.Conv2d(3, 4, 5, 2, 4), (1, 3, 3, 2)),
    "groups": (nn.Conv2d(6, 4, 7, 2, 3, groups=2), (2, 6, 19, 22)),
    "one output": (nn.Conv2d(3, 4, 11, 4), (1, 3, 12, 13)),
    "no bias": (nn.Conv2d(3, 4, 7, 2, bias=False), (2, 3, 16, 16)),
    "valid": (nn.Conv2d(3, 4, 7, 2, padding="valid"), (2, 3, 16, 17)),
    "no images": (nn.Conv2d(3, 4, 7, 2), (0, 3, 16, 16)),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_gradient_of_a_strided_convolution_is_that_of_float64(name, layout):
    conv, shape = copy.deepcopy(CONVOLUTIONS[name])
    conv.reset_parameters()  # from the test's seed
    x = torch.randn(shape).to(memory_format=layout).requires_grad_()
    assert strided.pays(conv, x)
    y = strided.conv2d(conv, x)
    assert torch.equal(y, conv(x))
    weights = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *conv.parameters()], weights)
    conv.double()
    right = torch.autograd.grad(conv(x.double()), [x, *conv.parameters()], weights.double())
    for ours, exact in zip(found, right, strict=True):
        assert error(ours, exact) < 5e-6


def test_a_strided_convolution_is_differentiable_twice():
    conv = nn.Conv2d(2, 3, 3, 2, 1).double()
    x = torch.randn(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)

    def run(x, weight, bias):
        return strided._FoldedGradient.apply(x, weight, bias, (2, 2), (1, 1), 1)

    inputs = (x, *conv.parameters())
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_only_gradients_that_are_wanted_are_made(frozen):
    conv = nn.Conv2d(3, 4, 5, 2)
    for name in frozen:
        getattr(conv, name).requires_grad_(False)
    x = torch.randn(1, 3, 9, 9, requires_grad=True)
    strided.conv2d(conv, x).sum().backward()
    assert x.grad is not None
    assert {name for name, p in conv.named_parameters() if p.grad is None} == set(frozen)


def test_a_wrong_input_is_refused_as_by_the_op():
    with pytest.raises(ValueError, match="channels"):
        FusedSequential(nn.Conv2d(3, 4, 5, 2))(torch.randn(1, 4, 9, 9, requires_grad=True))


def test_the_fold_is_left_to_images_whose_gradient_is_slow_otherwise():
    images = torch.randn(1, 3, 16, 16, requires_grad=True)
    conv = nn.Conv2d(3, 4, 5, 2)
    assert strided.pays(conv, images)
    for other in (nn.Conv2d(3, 4, 5), nn.Conv2d(3, 4, 5, padding="same"), nn.Conv2d(3, 4, 5, (1, 2))):
        assert not strided.pays(other, images)
    assert not strided.pays(nn.Conv2d(16, 4, 5, 2), torch.randn(1, 16, 16, 16, requires_grad=True))
    assert not strided.pays(conv, images.detach())
    assert not strided.pays(conv.double(), images.double())
    with torch.no_grad():
        assert not strided.pays(conv, images)


def network():
    return FusedSequential(nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(8, 8, 3), nn.ReLU())


def test_forward_mode_goes_through(channels_last_always):
    model, plain = network(), nn.Sequential()
    plain.extend(model)
    x, tangent = torch.randn(2, 3, 31, 31, requires_grad=True), torch.randn(2, 3, 31, 31)
    tangents = []
    for each in (model, plain):
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(each(forward_ad.make_dual(x, tangent))).tangent)
    assert error(*tangents) < 1e-5


def test_autocast_goes_through(channels_last_always):
    model, plain = network(), nn.Sequential()
    plain.extend(model)
    grads = []
    for each in (model, plain):
        x = torch.randn(2, 3, 31, 31, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = each(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        grads.append(x.grad)
    assert error(*grads) < 0.05


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "channels last"])
def test_gradients_inside_a_network_have_torchs_layout(layout, channels_last_always):
    model, strides = network(), []
    for each in (model, nn.Sequential(*model)):
        leaf = torch.randn(2, 3, 31, 31, requires_grad=True)
        x = leaf.to(memory_format=layout) * 1
        x.register_hook(lambda grad: strides.append(grad.stride()))
        each(x).square().sum().backward()
    assert strides[0] == strides[1]


def test_a_pool_in_front_is_run_channels_last_on_large_maps_alone(monkeypatch):
    seen = []
    real = torch.nn.functional.max_pool2d

    def noted(x, *args):
        seen.append(x.is_contiguous(memory_format=LAST))
        return real(x, *args)

    monkeypatch.setattr(torch.nn.functional, "max_pool2d", noted)
    model = FusedSequential(nn.MaxPool2d(3, 2))
    for size in (64, 8):
        x = torch.randn(1, 4, size, size)
        y = model(x)
        assert torch.equal(y, real(x, 3, 2))
        assert y.is_contiguous()
    model(torch.randn(1, 4, 64, 64, dtype=torch.bfloat16))
    FusedSequential(nn.MaxPool2d(2))(torch.randn(1, 4, 64, 64))  # windows that do not overlap
    FusedSequential(nn.MaxPool2d((1, 3), (2, 2)))(torch.randn(1, 4, 64, 64))  # those that do on one axis alone
    assert seen == [True, False, False, False, True]


POINTWISE = {
    "LPIPS's head": (nn.Conv2d(64, 1, 1, bias=False), (2, 64, 9, 7)),
    "some filters": (nn.Conv2d(5, 16, 1), (3, 5, 4, 4)),
    "same": (nn.Conv2d(5, 2, 1, padding="same"), (1, 5, 3, 1)),
    "no images": (nn.Conv2d(5, 2, 1), (0, 5, 4, 4)),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_a_convolution_of_single_pixels_is_a_product(name):
    conv, shape = copy.deepcopy(POINTWISE[name])
    conv.reset_parameters()  # from the test's seed
    x = torch.randn(shape, requires_grad=True)
    assert pointwise.pays(conv, x)
    y = FusedSequential(conv, nn.ReLU())(x)
    assert y.is_contiguous()
    weights = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *conv.parameters()], weights)
    conv.double()
    exact = conv(x.double()).relu()
    assert error(y, exact) < 1e-6
    right = torch.autograd.grad(exact, [x, *conv.parameters()], weights.double())
    for ours, theirs in zip(found, right, strict=True):
        assert error(ours, theirs) < 1e-5


def test_other_convolutions_are_no_products():
    x = torch.randn(1, 4, 8, 8)
    for other in (
        nn.Conv2d(4, 17, 1), nn.Conv2d(4, 2, 1, 2), nn.Conv2d(4, 2, 1, padding=1), nn.Conv2d(4, 2, 1, groups=2),
        nn.Conv2d(4, 2, 3), nn.Conv2d(5, 2, 1), nn.Conv2d(4, 2, 1).double(),
    ):  # fmt: skip
        assert not pointwise.pays(other, x)
    conv = nn.Conv2d(4, 2, 1)
    assert pointwise.pays(conv, x)
    assert not pointwise.pays(conv, x.bfloat16())
    assert not pointwise.pays(conv, x.to(memory_format=LAST))
    with torch.autocast("cpu", torch.bfloat16):
        assert not pointwise.pays(conv, x)


def test_a_convolution_alone_is_left_in_its_layout(channels_last_always, monkeypatch):
    """It wins less than two copies cost: VGG with batch norms, and LPIPS's first slice, are full of such."""
    asked = []
    monkeypatch.setattr(cpu, "in_layout", lambda x, last: (asked.append(last), x)[1])
    x = torch.randn(1, 8, 9, 9)
    FusedSequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())(x)
    assert not any(asked)
    asked.clear()
    FusedSequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))(x)
    assert asked == [True, True, False]


def test_a_convolution_of_few_products_keeps_its_layout(channels_last_always):
    """A map is copied only for what takes longer than the copy."""
    x = torch.randn(1, 8, 9, 9)
    for filters, copied in ((1, False), (16, True)):
        run, following = cpu_runs(nn.Conv2d(8, filters, 1), nn.MaxPool2d(3, 2))
        assert cpu._faster_channels_last(run, following, x, last=False) == copied


def cpu_runs(*layers):
    from alexnet_triton.fusion.sequential import plan

    (step,) = plan(FusedSequential(*layers))
    return step.runs
