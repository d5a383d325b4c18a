"""`fuse` on the networks of other packages: the numbers of their unfused twins, whatever is wrapped round them."""

import copy
import io
import pickle

import groups
import lpips
import others
import pytest
import torch
import torchmetrics
import torchvision
from plain import error
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, weight_norm
from torch.testing._internal.two_tensor import TwoTensor

from alexnet_triton import AlexNet, FusedSequential, fuse, unfuse, use_backend

OLD = (".*torch.ao.quantization is deprecated", "`torch.jit", "`torch.nn.utils.weight_norm`", "torch.quantize_per_")
"""What torch calls old is what people have."""

pytestmark = [pytest.mark.filterwarnings(f"ignore:{said}") for said in OLD]

LIMIT = 5e-5


def image(height=32, width=None, batch=1):
    return torch.rand(batch, 3, height, width or height) * 2 - 1


def last_line(model):
    return str(fuse.report(model)).splitlines()[-1]


# --- numbers and gradients ---------------------------------------------------------------------------------


NETWORKS = [
    ("alexnet", 63, "11 runs in 2 containers executed as ops; 0 layers left alone"),
    ("vgg11", 32, "16 runs in 2 containers executed as ops; 0 layers left alone"),
    ("vgg16_bn", 32, "21 runs in 2 containers executed as ops; 0 layers left alone"),
    ("squeezenet1_1", 47, "5 runs in 2 containers executed as ops; 25 layers left alone"),
    ("resnet18", 32, "3 runs in 3 containers executed as ops; 19 layers left alone"),
]
ON_TRITON = {"alexnet", "squeezenet1_1", "resnet18"}


@pytest.mark.parametrize(("name", "size", "count"), NETWORKS, ids=[name for name, *_ in NETWORKS])
@pytest.mark.parametrize("training", [False, True])
def test_torchvisions_networks_keep_their_numbers(name, size, count, training):
    model = others.torchvisions(name).train(training)
    assert others.furthest(model, image(size, batch=2)) < LIMIT
    assert last_line(fuse(model)) == count


@pytest.mark.parametrize("name", sorted(ON_TRITON))
def test_torchvisions_networks_keep_their_numbers_on_the_kernels(name, launches):
    size = next(size for network, size, _ in NETWORKS if network == name)
    with use_backend("triton"):
        assert others.furthest(others.torchvisions(name).eval(), image(size)) < LIMIT
    assert launches


def test_double_precision_is_kept():
    model = others.torchvisions("vgg11_bn").eval().double()
    assert others.furthest(model, image().double()) < 1e-9
    assert fuse(model)(image().double()).dtype == torch.float64


def test_googlenet_keeps_its_numbers():
    model = others.torchvisions("googlenet", init_weights=False, aux_logits=False).eval()
    assert others.furthest(model, image(64)) < LIMIT
    assert "9 runs in 9 containers" in last_line(fuse(model))


@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18"])
def test_a_step_in_training_updates_running_statistics_once(name, backend):
    model = others.torchvisions(name).train()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0  # the kernels draw their own masks
    twin, x = fuse(copy.deepcopy(model)), image(batch=2)
    model(x), twin(x)
    expected, found = dict(model.named_buffers()), dict(twin.named_buffers())
    assert {int(value) for name, value in found.items() if name.endswith("tracked")} == {1}
    assert max(error(found[name].float(), expected[name].float()) for name in expected) < LIMIT


# --- LPIPS -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
@pytest.mark.parametrize(
    ("built", "called"),
    [({}, {}), ({"spatial": True}, {"retPerLayer": True}), ({"lpips": False}, {"normalize": True})],
    ids=["plain", "spatial", "baseline"],
)
def test_lpips_keeps_its_distance_and_its_gradient_to_the_images(net, built, called):
    model = others.perceptual(net, **built)
    assert others.furthest(model, image(47), image(47), **called) < LIMIT


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_lpips_keeps_both_on_the_kernels(net, launches):
    with use_backend("triton"):
        assert others.furthest(others.perceptual(net), image(47), image(47)) < LIMIT
    assert launches


def test_lpips_with_its_published_linear_layers():
    model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    x = image(64, 53), image(64, 53)
    assert others.furthest(model, *x) < LIMIT
    assert last_line(fuse(model)) == "12 runs in 10 containers executed as ops; 5 layers left alone"
    assert float(model(x[0], x[0])) == 0.0


@pytest.mark.parametrize("size", [(31, 31), (32, 31), (31, 200), (63, 63), (100, 37)])
def test_lpips_takes_every_size_that_it_took(size):
    assert others.furthest(others.perceptual(), image(*size, batch=2), image(*size, batch=2)) < LIMIT


@pytest.mark.parametrize("size", [(30, 64), (64, 30), (5, 5)])
def test_lpips_refuses_images_that_it_refused(size, backend):
    model = others.perceptual()
    with pytest.raises(RuntimeError, match=r"(?i)size"):
        model(image(*size), image(*size))
    with pytest.raises(ValueError, match=r"needs maps of at least .* got \d+x\d+: use larger images"):
        fuse(model)(image(*size), image(*size))


def test_a_frozen_trunk_gets_no_gradient_and_stays_frozen(backend):
    model = fuse(others.perceptual())
    x = image(31).requires_grad_()
    model(x, image(31)).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in model.net.parameters())


def test_an_image_is_optimised_to_the_same_end():
    plain = others.perceptual()
    ends = []
    for model in (plain, fuse(copy.deepcopy(plain))):
        torch.manual_seed(2)
        target, x = image(31), image(31).requires_grad_()
        optimiser = torch.optim.Adam([x], 0.05)
        for _ in range(4):
            optimiser.zero_grad()
            loss = model(x, target).sum()
            loss.backward()
            optimiser.step()
        ends.append((x.detach(), loss.detach()))
    for found, expected in zip(*ends, strict=True):
        assert error(found, expected) < 1e-3


def test_torchmetrics_lpips_keeps_its_distance(monkeypatch):
    def untrained(name, pretrained):
        return others.lively(getattr(torchvision.models, name)(weights=None).features)

    monkeypatch.setattr("torchmetrics.functional.image.lpips._get_tv_model_features", untrained)
    metric = torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity(net_type="alex")
    assert others.furthest(metric, image(35, batch=2), image(35, batch=2)) < LIMIT
    x, distances = (image(35, batch=2), image(35, batch=2)), []
    for swap in (unfuse, fuse):
        swap(metric).reset()
        metric.update(*x)
        distances.append(metric.compute())
    assert error(distances[1], distances[0]) < LIMIT
    assert last_line(metric) == "12 runs in 10 containers executed as ops; 5 layers left alone"


# --- wrapped -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_data_parallel_keeps_the_numbers(when, backend):
    def make(model):
        return nn.DataParallel(fuse(model)) if when == "before" else fuse(nn.DataParallel(model))

    model = others.torchvisions("resnet18").eval()
    assert others.furthest(model, image(32), make=make) < LIMIT
    assert last_line(make(model)).startswith("3 runs in 3 containers executed")


def step_in_each_process(rank, size):
    """The gradients of a plain and of two fused networks, each of whose processes sees another image."""
    torch.manual_seed(3)
    model = others.torchvisions("vgg11_bn").eval()
    before, after = copy.deepcopy(model), copy.deepcopy(model)
    wrapped = [DistributedDataParallel(model), DistributedDataParallel(fuse(before))]
    wrapped.append(fuse(DistributedDataParallel(after)))
    torch.manual_seed(10 + rank)
    x = image(32)
    for network in wrapped:
        network(x).square().sum().backward()
    assert all(type(network.module.features) is FusedSequential for network in wrapped[1:])
    return [[parameter.grad for parameter in network.parameters()] for network in wrapped]


def test_distributed_data_parallel_keeps_the_gradients():
    of_rank = groups.run(step_in_each_process, 2)
    plain = of_rank[0][0]
    for gradients in (gradients for of_network in of_rank for gradients in of_network):
        assert max(error(a, b) for a, b in zip(gradients, plain, strict=True)) < LIMIT


@pytest.mark.parametrize("wrap", [weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm])
def test_normalised_weights_are_left_to_their_layers(wrap, calls):
    model, x = others.torchvisions("alexnet").eval(), image(63)
    twin = copy.deepcopy(model)
    for network in (model, twin):
        torch.manual_seed(1)
        for layer in (network.features[3], network.features[8], network.classifier[4]):
            wrap(layer)
    assert others.apart(others.answers(fuse(twin), x), others.answers(model, x)) < LIMIT
    assert calls.count("conv2d_relu") == 3
    assert calls.count("dropout_linear") == 2
    reasons = {row.layers[0]: row.reason for row in fuse.report(twin).rows if row.op is None}
    why = "has a forward pre-hook: WeightNorm" if wrap is weight_norm else "parametrized: weight"
    assert reasons == {
        "features.3": why,
        "features.8": why,
        "classifier.3": "the Linear behind it is left alone",
        "classifier.4": why,
    }


def test_dynamically_quantised_layers_are_left_to_themselves(backend):
    model = torch.ao.quantization.quantize_dynamic(others.torchvisions("alexnet").eval(), {nn.Linear})
    x = image(63)
    with torch.no_grad():
        expected = model(x)
        assert error(fuse(model)(x), expected) < LIMIT
    assert last_line(model) == "8 runs in 1 container executed as ops; 5 layers left alone"


def test_statically_quantised_layers_are_left_to_themselves():
    quantization = torch.ao.quantization
    model = nn.Sequential(quantization.QuantStub(), nn.Conv2d(3, 4, 3), nn.ReLU(), quantization.DeQuantStub()).eval()
    model.qconfig = quantization.default_qconfig
    prepared = quantization.prepare(quantization.fuse_modules(model, [["1", "2"]]))
    prepared(image())
    model, x = quantization.convert(prepared), image()
    expected = model(x)
    assert torch.equal(fuse(model)(x), expected)
    assert type(model) is nn.Sequential
    row = fuse.report(model).rows[0]
    assert row.reason == "torch.ao.nn.intrinsic.quantized.ConvReLU2d, not torch.nn.Conv2d"


def test_weights_that_wrap_other_tensors_are_left_to_their_layers(backend):
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    weight = model[0].weight.detach()
    model[0].weight = nn.Parameter(TwoTensor(weight, 2 * weight))
    x = torch.randn(2, 6)
    expected, found = model[:2](x), fuse(model)[:2](x)
    assert torch.equal(found.a, expected.a)
    assert torch.equal(found.b, expected.b)
    assert [row.op for row in fuse.report(model).rows] == [None, "dropout_linear"]


# --- scripted, traced, compiled ----------------------------------------------------------------------------


def test_a_scripted_model_is_left_as_it_is():
    scripted = torch.jit.script(others.torchvisions("alexnet").eval())
    code, x = scripted.features.code, image(63)
    expected = scripted(x)
    assert fuse(scripted) is scripted
    assert scripted.features.code == code
    assert torch.equal(scripted(x), expected)
    assert [row.reason for row in fuse.report(scripted).rows] == ["scripted: TorchScript runs it"]


@pytest.mark.parametrize("to_graph", [torch.jit.script, lambda model: torch.jit.trace(model, image(63))])
def test_a_fused_model_is_scripted_and_traced_as_a_plain_one(to_graph):
    model, x = others.torchvisions("alexnet").eval(), image(63)
    graph = to_graph(fuse(model))
    file = io.BytesIO()
    torch.jit.save(graph, file)
    file.seek(0)
    assert error(torch.jit.load(file)(x), unfuse(model)(x)) < LIMIT


@pytest.mark.parametrize("when", ["before", "after a call", "in place"])
def test_a_compiled_model_keeps_its_numbers(when):
    model, x = others.torchvisions("alexnet").eval(), image(63)
    expected = others.answers(model, x)
    if when == "in place":
        fuse(model).compile(backend="eager", fullgraph=True)
        twin = model
    elif when == "before":
        twin = torch.compile(fuse(model), backend="eager", fullgraph=True)
    else:
        twin = torch.compile(model, backend="eager", fullgraph=True)
        twin(x)
        fuse(twin)
    for found, right in zip(others.answers(twin, x), expected, strict=True):
        assert error(found, right) < LIMIT
    assert last_line(twin).startswith("11 runs in 2 containers executed")


# --- containers of containers ------------------------------------------------------------------------------


class Mine(nn.Sequential):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return super().forward(x) + 1


class Nested(nn.Module):
    """Containers in containers, one of them twice, a list of them, and a subclass."""

    def __init__(self):
        super().__init__()
        shared = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.stem = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU())), nn.MaxPool2d(2), shared)
        self.parts = nn.ModuleList([nn.Sequential(shared, nn.BatchNorm2d(4)), shared, Mine(nn.Conv2d(4, 4, 3))])

    def forward(self, x):
        x = self.stem(x)
        for part in self.parts:
            x = part(x)
        return x


def test_containers_in_containers_keep_their_numbers(backend):
    model = others.lively(Nested()).eval()
    assert others.furthest(model, image(16)) < LIMIT
    fused = fuse(model)
    assert type(fused.parts[2]) is Mine
    assert fused.stem[2] is fused.parts[0][0] is fused.parts[1]
    assert last_line(fused) == "5 runs in 3 containers executed as ops; 1 layer left alone"


# --- unfuse ------------------------------------------------------------------------------------------------


def state_of(model):
    """Everything that a model holds, as objects: classes, attributes, and the objects in its tables."""
    return [
        (
            type(module),
            {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()},
        )
        for module in model.modules()
    ]


def used(model, size=63):
    """A model that has run, with hooks on a container and on a layer."""
    for module in (model.features, model.features[1]):
        module.register_forward_hook(hooked)
    model(image(size)).sum().backward()
    model.zero_grad()
    return model


def hooked(module, args, output):
    pass


@pytest.mark.parametrize("name", ["alexnet", "vgg11_bn"])
def test_unfuse_gives_back_what_was_there(name):
    model = used(others.torchvisions(name).eval())
    objects, keys, pickled = state_of(model), list(model.state_dict()), pickle.dumps(model)
    twin = pickle.loads(pickled)
    for _ in range(2):
        fuse(fuse(model))
        assert pickle.dumps(model) != pickled
        model(image(63))
        assert unfuse(unfuse(model)) is model
        assert pickle.dumps(model) == pickled
    assert list(model.state_dict()) == keys
    for (kind, found), (right_kind, right) in zip(state_of(model), objects, strict=True):
        assert kind is right_kind
        assert found.keys() == right.keys()
        for attribute, value in right.items():
            if isinstance(value, dict):
                assert list(found[attribute]) == list(value)
                assert all(found[attribute][key] is value[key] for key in value)
            else:
                assert found[attribute] is value or found[attribute] == value
    assert [type(module) for module in model.modules()] == [type(module) for module in twin.modules()]


def test_unfuse_after_layers_were_replaced_keeps_the_new_layers():
    model = fuse(others.torchvisions("alexnet").eval())
    model(image(63))
    model.classifier[6] = nn.Linear(256, 2)
    model.features = nn.Sequential(*model.features[:6], nn.Conv2d(12, 16, 3), nn.Tanh())
    expected = model(image(63)).shape
    unfuse(model)
    assert not any(isinstance(module, FusedSequential) for module in model.modules())
    assert model(image(63)).shape == expected == (1, 2)
    assert type(model.features[7]) is nn.Tanh


def test_a_network_built_of_fused_containers_becomes_plain_and_fuse_undoes_it():
    model = AlexNet(10, variant="paper", device="meta")
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in fuse(model).modules()] == kinds
    unfuse(model)
    assert type(model.features) is type(model.classifier) is nn.Sequential
    assert [type(module) for module in fuse(model).modules()] == kinds


def test_a_fused_model_that_was_copied_or_stored_can_be_unfused():
    model = fuse(others.torchvisions("alexnet").eval())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(isinstance(module, FusedSequential) for module in unfuse(twin).modules())
    assert type(model.features) is FusedSequential


def test_slices_stay_fused():
    model = fuse(others.torchvisions("alexnet"))
    part = model.features[:3]
    unfuse(model)
    assert type(part) is FusedSequential
    assert type(model.features[:3]) is nn.Sequential
