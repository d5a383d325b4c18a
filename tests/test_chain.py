"""Chains of convolutions and poolings, and whole networks, on the interpreter."""

import random

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import LIMITS, rms_error
from torch import nn

from alexnet_triton import AlexNet, chain, fuse, use_backend
from alexnet_triton.kernels import halo, launch
from alexnet_triton.stages import ConvStage, PoolStage, decode, encode
from alexnet_triton.variants import VARIANTS


def gradients(model, x, dtype=None):
    """The output, and the gradients of a fixed weighted sum of it: of `x` and of every parameter."""
    x = x.detach().clone().to(dtype or x.dtype).requires_grad_()
    y = model(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).half().to(y.dtype)
    return y.detach(), torch.autograd.grad((y * weights).sum(), [x, *model.parameters()])


def hold(layers, x, limit=1e-6, dtype=torch.float32):
    """The layers as one chain on Triton are the layers in float64."""
    model = nn.Sequential(*layers).to(dtype)
    exact = nn.Sequential(*layers_like(layers)).double()
    exact.load_state_dict(model.state_dict())
    y64, grads64 = gradients(exact, x.to(dtype), torch.float64)
    with use_backend("triton"):
        y, grads = gradients(fuse(model), x, dtype)
    assert rms_error(y, y64) < limit
    for got, wanted in zip(grads, grads64, strict=True):
        assert rms_error(got, wanted) < limit
    return y, grads


def layers_like(layers):
    return [type(layer)(**options_of(layer)) for layer in layers]


def options_of(layer):
    if isinstance(layer, nn.Conv2d):
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups")
        return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}
    if isinstance(layer, nn.MaxPool2d):
        return {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "ceil_mode")}
    if isinstance(layer, nn.LocalResponseNorm):
        return {name: getattr(layer, name) for name in ("size", "alpha", "beta", "k")}
    return {}


def conv(*sizes, **options):
    return nn.Conv2d(*sizes, **options)


def norm():
    return nn.LocalResponseNorm(5, 0.5, 0.75, 2.0)


# Every way in which one stage hands its map to the next.
CHAINS = {
    "convolution alone, folded": [conv(3, 6, 5, stride=2)],
    "handed on in the same rows": [conv(3, 16, 3, padding=1), nn.ReLU(), conv(16, 16, 3, padding=1), nn.ReLU()],
    "without ReLU between": [conv(3, 16, 3, padding=1), conv(16, 16, 3, padding=1)],
    "handed on in other rows": [conv(3, 32, 3), nn.ReLU(), conv(32, 8, 5, padding=2, groups=2), nn.ReLU()],
    "odd channels enter again": [conv(3, 7, 3, padding=1), nn.ReLU(), conv(7, 5, 3, padding=1), nn.ReLU()],
    "groups that cut a sixteen": [conv(3, 16, 3), nn.ReLU(), conv(16, 4, 3, groups=2), nn.ReLU()],
    "groups whose halves are sixteens": [conv(3, 4, 1), conv(4, 16, 3, groups=2), nn.ReLU(), conv(16, 4, 3)],
    "strided inside": [conv(3, 16, 3, padding=1), nn.ReLU(), conv(16, 8, 3, stride=2, padding=1), nn.ReLU()],
    "pool to convolution": [
        conv(3, 16, 3),
        nn.ReLU(),
        norm(),
        nn.MaxPool2d(3, 2),
        conv(16, 8, 3, padding=1),
        nn.ReLU(),
    ],
    "pool with odd channels": [conv(3, 7, 3), nn.ReLU(), nn.MaxPool2d(2), conv(7, 8, 3, padding=1)],
    "pool to pool": [conv(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2, 1), norm(), nn.MaxPool2d(2, padding=1, ceil_mode=True)],
    "pool first": [norm(), nn.MaxPool2d(2), conv(3, 16, 1), nn.ReLU()],
    "pool alone": [nn.MaxPool2d(3, 2)],
    "no ReLU before the pool": [conv(3, 16, 3, padding=1), nn.MaxPool2d(3, 2)],
    "no bias": [conv(3, 16, 3, bias=False), nn.ReLU(), conv(16, 16, 1, bias=False), nn.ReLU()],
    "padding past the filter": [conv(3, 16, 1, padding=2), nn.ReLU(), conv(16, 16, (1, 3), padding=(1, 1)), nn.ReLU()],
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_its_layers(name):
    hold(CHAINS[name], torch.randn(2, 3, 11, 10))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_chain_in_half_precision(dtype):
    layers = [conv(3, 16, 5, stride=2), nn.ReLU(), conv(16, 32, 3, padding=1, groups=2), nn.ReLU(), conv(32, 8, 3)]
    hold(layers, torch.randn(2, 3, 15, 15), 3 * LIMITS[dtype], dtype)


def test_a_drawn_chain():
    draw = random.Random(0)
    for _ in range(8):
        layers, channels = [], 3
        for _ in range(draw.randint(2, 4)):
            if draw.random() < 0.6:
                groups = draw.choice([g for g in (1, 2) if channels % g == 0])
                filters = groups * draw.choice([1, 8, 16])
                layers.append(conv(channels, filters, draw.choice([1, 3]), draw.choice([1, 1, 2]), 1, groups=groups))
                channels = filters
                if draw.random() < 0.7:
                    layers.append(nn.ReLU())
            else:
                layers += [norm(), nn.MaxPool2d(2, draw.choice([1, 2]), ceil_mode=draw.random() < 0.5)]
        hold(layers, torch.randn(draw.randint(1, 3), 3, 9, 12))


def views():
    base = torch.randn(6, 12, 14, 15)
    yield "permuted", base.permute(1, 0, 3, 2)[:2, :3]
    yield "sliced", base[:2, 3:6, ::2, 1:]
    yield "expanded", base[:1, :3].expand(2, 3, 14, 15)
    yield "channels last", base[:2, :3].contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("name", "x"), list(views()), ids=[name for name, _ in views()])
def test_any_strides_in_forward_and_backward(name, x):
    layers = [conv(3, 16, 3, padding=1), nn.ReLU(), norm(), nn.MaxPool2d(3, 2), conv(16, 4, 3)]
    y, _ = hold(layers, x)
    model = fuse(nn.Sequential(*layers))
    x = x.detach()
    with use_backend("triton"):
        for grad in (torch.ones(()).expand(y.shape), torch.randn(y.shape[::-1]).permute(3, 2, 1, 0)):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            (got,) = torch.autograd.grad(model(leaf), leaf, grad)
            with use_backend("reference"):
                (wanted,) = torch.autograd.grad(model(leaf), leaf, grad.contiguous())
            assert rms_error(got, wanted) < 1e-6


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_answer_and_gradient_have_the_layout_that_torch_would_give(channels_last, stride):
    form = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=form).requires_grad_()
    model = fuse(nn.Sequential(conv(3, 16, 3, stride=stride), nn.ReLU(), nn.MaxPool2d(2)))
    with use_backend("triton"):
        y = model(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.is_contiguous(memory_format=form)
    assert dx.is_contiguous(memory_format=form)


def test_frozen_layers_cost_no_gradient(monkeypatch):
    """What needs no gradient is not computed: the backward pass ends at the first layer that needs one."""
    made = []
    original = launch.launch
    monkeypatch.setattr(
        launch, "launch", lambda kernel, *a, **o: (made.append(kernel.fn.__name__), original(kernel, *a, **o))
    )
    layers = [conv(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), conv(16, 16, 3, padding=1), nn.ReLU()]
    model = fuse(nn.Sequential(*layers))
    model[0].requires_grad_(False)
    with use_backend("triton"):
        y = model(torch.randn(1, 3, 9, 9))
        made.clear()
        y.sum().backward()
    assert made == ["enter_kernel", "weight_gradient_kernel", "add_splits_kernel"]
    model.requires_grad_(False)
    x = torch.randn(1, 3, 9, 9, requires_grad=True)
    with use_backend("triton"):
        y = model(x)
        made.clear()
        y.sum().backward()
    assert "weight_gradient_kernel" not in made
    assert x.grad is not None


def test_inference_keeps_no_map():
    stages = (ConvStage((1, 1), (1, 1), 1, True, False), PoolStage(0, 0.0, 0.0, 0.0, (2, 2), (2, 2), (0, 0), False, 1))
    x, weight = torch.randn(1, 16, 4, 4), torch.randn(16, 16, 3, 3)
    assert chain.forward(x, [weight], stages, save=False, channels_last=False)[1] == []
    assert len(chain.forward(x, [weight], stages, save=True, channels_last=False)[1]) == 3


def test_maps_are_kept_only_where_a_gradient_may_be_asked_for(monkeypatch):
    kept = []
    original = chain.forward
    monkeypatch.setattr(
        chain, "forward", lambda x, p, stages, save, last: (kept.append(save), original(x, p, stages, save, last))[1]
    )
    model = fuse(nn.Sequential(conv(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2)))
    with use_backend("triton"):
        model(torch.randn(1, 3, 9, 9))
        with torch.no_grad():
            model(torch.randn(1, 3, 9, 9))
        model.requires_grad_(False)(torch.randn(1, 3, 9, 9))
    assert kept == [True, False, False]


def test_alexnets_maps_are_copied_nowhere_between_its_layers(monkeypatch):
    """One copy brings the images in, one the gradient; between conv1 and pool5 there is none."""
    made = []
    monkeypatch.setattr(launch, "launch", lambda kernel, programs, **a: made.append(kernel.fn.__name__))
    for variant in VARIANTS:
        model = AlexNet(10, variant=variant)
        with use_backend("triton"):
            made.clear()
            y = model.features(torch.randn(1, 3, 227, 227))
            assert made.count("enter_kernel") == 1
            assert made.count("conv_kernel") == 5
            made.clear()
            y.sum().backward()
        assert made.count("enter_kernel") == 0  # pool5's backward reads the gradient as it is
        assert made.count("conv_kernel") == 4
        assert made.count("weight_gradient_kernel") == 5
        assert "leave_kernel" not in made


def test_more_pixels_than_are_counted_are_refused_in_words():
    x = torch.empty(1, 1, 1, 1).expand(2**20, 1, 2**6, 2**6)
    model = fuse(nn.Sequential(conv(1, 1, 1), nn.ReLU()))
    with use_backend("triton"), pytest.raises(ValueError, match="split the batch"):
        model(x)


def test_an_error_of_a_stage_inside_a_chain_is_the_ops_own():
    model = fuse(nn.Sequential(conv(3, 16, 3), nn.ReLU(), nn.MaxPool2d(9), conv(16, 4, 1)))
    for backend in ("triton", "reference"):
        with use_backend(backend), pytest.raises(ValueError, match="lrn_max_pool needs maps of at least 9x9.*got 8x8"):
            model(torch.randn(1, 3, 10, 10))


def test_stages_survive_their_encoding():
    stages = (
        ConvStage((4, 3), (2, 1), 2, True, False),
        PoolStage(5, 5e-4, 0.75, 2.0, (3, 2), (2, 1), (1, 0), True, 2),
        ConvStage((1, 1), (0, 0), 1, False, True),
        PoolStage(0, 0.0, 0.0, 0.0, (3, 3), (2, 2), (0, 0), False, 1),
    )
    assert decode(*encode(stages)) == stages


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_pooled_sizes_are_torchs(ceil_mode):
    draw = random.Random(1)
    for _ in range(300):
        window = draw.randint(1, 5), draw.randint(1, 5)
        padding = tuple(draw.randint(0, w // 2) for w in window)
        stride = draw.randint(1, 6), draw.randint(1, 6)
        size = [max(w, draw.randint(1, 12)) for w in window]
        stage = PoolStage(0, 0.0, 0.0, 0.0, window, stride, padding, ceil_mode, 1)
        expected = F.max_pool2d(torch.zeros(1, 1, *size), window, stride, padding, 1, ceil_mode).shape
        assert stage.out_size((1, 1, *size)) == tuple(expected)


# --- whole networks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_whole_network_forward_and_backward(variant, pair):
    """Full size, each gradient, against plain torch layers in float64."""
    ours, theirs = pair(variant)
    x = torch.randn(1, 3, VARIANTS[variant].image_size, VARIANTS[variant].image_size)
    y64, grads64 = gradients(theirs.eval().double(), x, torch.float64)
    with use_backend("triton"):
        y, grads = gradients(ours.eval(), x)
    assert rms_error(y, y64) < 1e-6
    for got, wanted in zip(grads, grads64, strict=True):
        assert rms_error(got, wanted) < 1e-6


def test_a_training_step_of_the_demo(monkeypatch):
    """Images of the demo's size, dropout, momentum, a clipped gradient: the parameters after it agree."""
    after = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        model = AlexNet(10, init="kaiming", dropout=0.0)
        optimiser = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)
        images, labels = torch.rand(4, 3, 67, 67), torch.tensor([1, 2, 3, 4])
        with use_backend(backend):
            for _ in range(2):
                optimiser.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
        after.append([p.detach() for p in model.parameters()])
    for got, wanted in zip(*after, strict=True):
        assert rms_error(got, wanted) < 1e-5


def test_a_handed_on_border_is_zero_in_every_map_that_alexnet_keeps(pair):
    ours, _ = pair("paper")
    seen = []
    original = halo.view
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halo, "view", lambda matrix, layout: (seen.append((matrix, layout)), original(matrix, layout))[1])
        with use_backend("triton"):
            ours.features(torch.randn(1, 3, 67, 67))
    bordered = [(m, layout) for m, layout in seen if not layout.is_dense]
    assert len(bordered) == 4
    for matrix, layout in bordered:
        rest = matrix.detach().clone()
        original(rest, layout).zero_()
        assert rest.abs().max() == 0
