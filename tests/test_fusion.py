import copy
import gc
import io
import pickle

import pytest
import torch
import torchvision
from plain import error
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from alexnet_triton import FusedSequential, fuse, ops, unfuse, use_backend
from alexnet_triton.fusion import cpu, plan, sequential
from alexnet_triton.layers import GroupedLocalResponseNorm


def net(*layers):
    return FusedSequential(*layers)


def conv(channels=4, filters=4, **options):
    return nn.Conv2d(channels, filters, 3, **options)


IMAGE = torch.randn(2, 4, 9, 9)
ROW = torch.randn(2, 6)

SENTENCES = [
    ("conv relu", [conv(), nn.ReLU()], ["conv2d_relu"]),
    ("conv alone", [conv()], ["conv2d_relu"]),
    ("conv in place relu", [conv(), nn.ReLU(inplace=True)], ["conv2d_relu"]),
    ("pool", [nn.MaxPool2d(3, 2)], ["lrn_max_pool"]),
    ("lrn pool", [nn.LocalResponseNorm(3), nn.MaxPool2d(2)], ["lrn_max_pool"]),
    ("grouped lrn pool", [GroupedLocalResponseNorm(3, 2), nn.MaxPool2d(2)], ["lrn_max_pool"]),
    ("conv relu pool", [conv(), nn.ReLU(), nn.MaxPool2d(3, 2)], ["conv2d_relu", "lrn_max_pool"]),
    ("conv pool", [conv(), nn.MaxPool2d(3, 2)], ["conv2d_relu", "lrn_max_pool"]),
    ("conv relu lrn pool", [conv(), nn.ReLU(), nn.LocalResponseNorm(3), nn.MaxPool2d(2)],
     ["conv2d_relu", "lrn_max_pool"]),
    ("three convs", [conv(), nn.ReLU(), conv(), conv(), nn.ReLU()], ["conv2d_relu"] * 3),
    ("nested", [nn.Sequential(conv(), nn.Sequential(nn.ReLU())), nn.MaxPool2d(2)],
     ["conv2d_relu", "lrn_max_pool"]),
    ("same padding", [conv(padding="same"), nn.ReLU()], ["conv2d_relu"]),
    ("no bias, groups, stride", [conv(bias=False, groups=2, stride=2)], ["conv2d_relu"]),
    ("relu first", [nn.ReLU(), conv()], ["conv2d_relu"]),
    ("relu twice", [conv(), nn.ReLU(), nn.ReLU()], ["conv2d_relu"]),
    ("lrn alone", [nn.LocalResponseNorm(3), nn.ReLU()], []),
    ("dilated conv", [conv(dilation=2), nn.ReLU()], []),
    ("reflecting conv", [conv(padding=1, padding_mode="reflect")], []),
    ("dilated pool", [nn.MaxPool2d(2, dilation=2)], []),
    ("other layers", [nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.Tanh()], []),
    ("linear", [nn.Flatten(), nn.Linear(324, 5)], ["dropout_linear"]),
    ("dropout linear relu", [nn.Flatten(), nn.Dropout(), nn.Linear(324, 5), nn.ReLU()], ["dropout_linear"]),
    ("dropout alone", [nn.Dropout(), nn.Flatten(), nn.Linear(324, 5)], ["dropout_linear"]),
    ("in place dropout", [nn.Flatten(), nn.Dropout(inplace=True), nn.Linear(324, 5)], ["dropout_linear"]),
    ("dropout conv", [nn.Dropout(), conv()], ["conv2d_relu"]),
]  # fmt: skip


@pytest.mark.parametrize("layout", ["as torch", "channels last inside"])
@pytest.mark.parametrize(("name", "layers", "expected"), SENTENCES, ids=[case[0] for case in SENTENCES])
def test_runs_become_ops_and_numbers_stay(name, layers, expected, layout, calls, monkeypatch):
    monkeypatch.setattr(cpu, "CHANNELS_LAST_PIXELS", 0 if layout == "channels last inside" else 10**9)
    fused = net(*copy.deepcopy(layers))
    plain = nn.Sequential(*copy.deepcopy(layers))
    results = []
    for model in (fused, plain):
        x = IMAGE.clone().requires_grad_()
        torch.manual_seed(3)
        y = model(x * 1)
        y.square().sum().backward()
        results.append((y, [x.grad, *(p.grad for p in model.parameters())]))
    assert calls == expected
    assert results[0][0].stride() == results[1][0].stride()
    assert error(results[0][0], results[1][0]) < 1e-6
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert error(ours, theirs) < 1e-5


def touch_forward_hook(layer):
    layer.register_forward_hook(lambda module, args, output: None)


def touch_pre_hook(layer):
    layer.register_forward_pre_hook(lambda module, args: None)


def touch_backward_hook(layer):
    layer.register_full_backward_hook(lambda module, inputs, outputs: None)


def touch_backward_pre_hook(layer):
    layer.register_full_backward_pre_hook(lambda module, outputs: None)


def touch_forward(layer):
    original = layer.forward
    layer.forward = lambda x: original(x)


def touch_class(layer):
    layer.__class__ = type("Sub", (type(layer),), {})


def touch_compile(layer):
    layer.compile(backend="eager")


TOUCHES = [value for name, value in list(globals().items()) if name.startswith("touch_")]


@pytest.mark.parametrize("touch", TOUCHES, ids=lambda touch: touch.__name__)
@pytest.mark.parametrize("index", range(6))
def test_a_touched_layer_is_called_itself(touch, index, calls):
    model = net(conv(), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(36, 5), nn.ReLU())
    expected = model(IMAGE)
    untouched = list(calls)
    calls.clear()
    touch(model[index])
    assert error(model(IMAGE), expected) < 1e-6
    alone = {0: 0, 2: 1, 4: 2}  # the op that the touched layer would have begun
    assert calls == [op for number, op in enumerate(untouched) if number != alone.get(index)]


def test_parametrized_layers_are_called_themselves(calls):
    for wrap in (parametrizations.weight_norm, weight_norm, parametrizations.spectral_norm):
        layer = wrap(nn.Linear(6, 5))
        assert error(net(layer, nn.ReLU())(ROW), layer(ROW).relu()) < 1e-5
    assert calls == []


def test_a_hooked_inner_sequential_is_called_itself():
    inner = nn.Sequential(conv(), nn.ReLU())
    model, seen = net(inner, nn.MaxPool2d(2)), []
    model(IMAGE)
    inner.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model(IMAGE)
    assert seen == [(2, 4, 7, 7)]


def test_global_hooks_see_every_layer():
    model, seen = net(conv(), nn.ReLU(), nn.MaxPool2d(2)), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    try:
        model(IMAGE)
    finally:
        handle.remove()
    assert seen == ["Conv2d", "ReLU", "MaxPool2d", "FusedSequential"]


def test_the_plan_is_made_once_and_remade_when_children_or_hooks_change(monkeypatch):
    made = []
    original = plan.steps
    monkeypatch.setattr(sequential, "steps", lambda leaves: (made.append(len(leaves)), original(leaves))[1])
    model = net(conv(), nn.ReLU(), nn.Sequential(nn.MaxPool2d(2)))
    model(IMAGE)
    model.train(), model(IMAGE), model.eval(), model(IMAGE)
    assert len(made) == 1
    changes = [
        lambda: model.append(nn.Flatten()),
        lambda: model.__setitem__(0, conv()),
        lambda: model.__delitem__(3),
        lambda: model[1].register_forward_hook(lambda *args: None),
        lambda: model[1]._forward_hooks.clear(),
        lambda: model[2].append(nn.Identity()),
    ]
    for number, change in enumerate(changes, start=2):
        change()
        for _ in range(2):
            assert error(model(IMAGE), nn.Sequential(*model)(IMAGE)) < 1e-6
        assert len(made) == number


def test_values_are_read_at_each_call():
    model = net(conv(), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 4))
    model(IMAGE)
    model[0].weight = nn.Parameter(torch.randn(4, 4, 3, 3))
    model[1].ceil_mode = True
    model[3].p = 1.0
    assert torch.equal(model(IMAGE), model[4].bias.expand(2, 4))
    model.eval()
    assert error(model(IMAGE), nn.Sequential(*model)(IMAGE)) < 1e-6


def test_dropout_follows_its_own_mode_not_the_containers():
    model = net(nn.Dropout(1.0), nn.Linear(6, 4))
    model[0].eval()
    assert error(model(ROW), model[1](ROW)) < 1e-6


def test_plans_go_when_their_modules_go():
    model = net(conv())
    model(IMAGE)
    before = len(sequential._plans)
    del model
    gc.collect()
    assert len(sequential._plans) < before


def test_what_layers_take_beside_batches_still_works():
    model = net(conv(), nn.ReLU(), nn.MaxPool2d(2))
    assert model(IMAGE[0]).shape == (4, 3, 3)
    layers = nn.Sequential(*copy.deepcopy(model).to(torch.complex64)[:1])
    assert fuse(layers)(IMAGE.to(torch.complex64)).is_complex()
    assert net(nn.Linear(6, 5), nn.ReLU())(ROW[0]).shape == (5,)
    assert net()(ROW) is ROW


def test_slices_are_fused_too_and_share_their_layers():
    model = net(conv(), nn.ReLU(), nn.MaxPool2d(2))
    part = model[:2]
    assert type(part) is FusedSequential
    assert part[0] is model[0]


def test_output_layout_is_torchs(channels_last_always):
    def layout(model, x):
        return model(x).stride()

    layers = [conv(), nn.ReLU(), nn.MaxPool2d(3, 2)]
    last = torch.channels_last
    for x in (IMAGE, IMAGE.contiguous(memory_format=last), IMAGE[:, :, ::2, 1:], IMAGE[:1, :, :4, :3]):
        for module_format in (torch.contiguous_format, last):
            ours = net(*copy.deepcopy(layers)).to(memory_format=module_format)
            theirs = nn.Sequential(*copy.deepcopy(layers)).to(memory_format=module_format)
            if min(x.shape[2:]) > 4:
                assert layout(ours, x) == layout(theirs, x)
            assert layout(ours[:2], x) == layout(theirs[:2], x)


SHAPES = [(1, 1, 5, 5), (3, 1, 5, 5), (2, 4, 1, 1), (1, 4, 1, 1), (0, 4, 5, 5), (2, 4, 5, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_channels_last_is_read_as_torch_reads_it(shape):
    batch, channels, height, width = shape
    for x in (
        torch.randn(shape),
        torch.randn(shape).contiguous(memory_format=torch.channels_last),
        torch.randn(batch, channels, height, width + 1)[..., :-1],
        torch.randn(batch, height, width, channels).permute(0, 3, 1, 2),
        torch.randn(batch, 1, height, width).expand(shape),
    ):
        torch_says = torch._prims_common.suggest_memory_format(x) == torch.channels_last
        assert ops.is_channels_last(x) == torch_says, x.stride()


def test_fuse_swaps_classes_and_unfuse_swaps_them_back():
    model = torchvision.models.vgg11(num_classes=3, init_weights=False).eval()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    assert fuse(model) is model
    assert type(model.features) is type(model.classifier) is FusedSequential
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    model(torch.randn(1, 3, 32, 32))
    before = dict(model.features.__dict__)
    assert unfuse(model) is model
    assert type(model.features) is type(model.classifier) is nn.Sequential
    assert model.features.__dict__.keys() == before.keys()


def test_fuse_leaves_alone_what_holds_no_run():
    class Mine(nn.Sequential):
        pass

    model = nn.ModuleList([nn.Sequential(nn.Tanh()), Mine(conv()), nn.Sequential(conv(), nn.Tanh())])
    fuse(model)
    assert [type(child) for child in model] == [nn.Sequential, Mine, FusedSequential]
    for function in (fuse, unfuse):
        with pytest.raises(TypeError, match=r"takes a torch.nn.Module, got str"):
            function("model")


def test_fused_networks_of_others_give_their_numbers(calls):
    model = torchvision.models.vgg11_bn(num_classes=3).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert error(fuse(model)(x), expected) < 1e-5
    assert calls.count("conv2d_relu") == 8
    assert calls.count("lrn_max_pool") == 5
    assert calls.count("dropout_linear") == 3


def test_pickles_copies_and_saves_without_a_trace_of_its_plan():
    model = net(conv(), nn.ReLU()).eval()
    expected = model(IMAGE)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
        torch.load(file, weights_only=False),
    ):
        assert type(copied) is FusedSequential
        assert torch.equal(copied(IMAGE), expected)
    assert "plan" not in " ".join(model.__dict__)


def test_demanding_triton_reaches_the_ops_through_the_layers():
    with use_backend("triton"), pytest.raises(RuntimeError, match="conv2d_relu cannot run.*float64"):
        net(conv()).double()(IMAGE.double())


def test_ops_see_a_late_relu_only_where_nothing_can_tell(channels_last_always):
    """ReLU after the pool gives the numbers of ReLU before it, NaN and ties included."""
    layers = [nn.Conv2d(1, 2, 1), nn.ReLU(), nn.MaxPool2d(2)]
    x = torch.tensor([[-1.0, -1.0, 2.0, 2.0], [-1.0, -1.0, 2.0, 2.0], [0, -0.0, float("nan"), 1], [-3, 0, 1, 1]])
    x = x.reshape(1, 1, 4, 4)
    grads = []
    for model in (net(*copy.deepcopy(layers)), nn.Sequential(*copy.deepcopy(layers))):
        with torch.no_grad():
            model[0].weight.fill_(1)
            model[0].bias.zero_()
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.nan_to_num(0.0).sum().backward()
        grads.append((y.detach(), leaf.grad))
    torch.testing.assert_close(grads[0], grads[1], equal_nan=True)
