"""The two towers: two processes with half of every layer each are the network in one."""

import copy

import groups
import narrow
import pytest
import torch
import torch.distributed as dist
from narrow import Case
from plain import error
from torch import nn

import alexnet_triton.kernels.launch  # noqa: F401  (before the processes are forked)
from alexnet_triton import AlexNet
from alexnet_triton.layers import GroupedLocalResponseNorm
from alexnet_triton.parallel import towers as module
from alexnet_triton.parallel.towers import Towers, towers


def same(images, rank, size):
    return images


def four_groups(model):
    model.features[8] = nn.Conv2d(12, 12, 3, padding=1, groups=4)
    model.features[1][1].groups = 4


def another_classifier(model):
    model.classifier = nn.Sequential(
        nn.Identity(), nn.Dropout(0.3), nn.Sequential(nn.Linear(288, 9, bias=False), nn.Identity()),
        nn.Dropout(0.5, inplace=True), nn.ReLU(), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(),
    )  # fmt: skip


def hooked(model):
    for layer in (model.features[3], model.classifier[4]):
        layer.register_forward_hook(lambda layer, inputs, output: 2 * output)


def channels_last(model):
    model.to(memory_format=torch.channels_last)


CASES = {
    "training": Case(),
    "evaluation": Case(train=False, steps=0),
    "no dropout": Case(dropout=0.0, steps=0),
    "all dropped": Case(dropout=1.0, steps=1),
    "one image": Case(count=1, steps=0),
    "no image": Case(count=0, steps=1),
    "seven classes": Case(classes=7, steps=0),
    "one class": Case(classes=1, steps=1),
    "features frozen": Case(frozen="features", steps=1),
    "fc6 frozen": Case(frozen="classifier.1", steps=1),
    "conv3 frozen": Case(frozen="features.6", steps=1),
    "four groups": Case(change=four_groups, steps=0),
    "another classifier": Case(change=another_classifier, steps=0),
    "hooks": Case(change=hooked, steps=0),
    "channels-last": Case(change=channels_last, steps=1),
}


def test_towers_are_the_network_in_one_process():
    narrow.check(2, towers, same, CASES)


def test_towers_under_autocast_are_the_network_to_bfloat16s_rounding():
    narrow.check(2, towers, same, {"autocast": Case(autocast=True, steps=0)}, limit=0.03)


def test_towers_run_on_the_kernels():
    narrow.check(2, towers, same, {"kernels": Case(backend="triton", count=1, steps=0, classes=1)})


# --- what is in a tower -----------------------------------------------------------------------------------------------


def held(rank, size):
    tower = towers(narrow.network())
    layers = [tower.features[i] for i in (0, 3, 6, 8, 10)]
    assert [layer.in_channels for layer in layers] == [3, 4, 16, 6, 6]
    assert [layer.out_channels for layer in layers] == [4, 8, 6, 6, 4]
    assert {layer.groups for layer in layers} == {1}
    assert tower.features[1][1].groups == 1
    return {name: tuple(p.shape) for name, p in tower.named_parameters()}, len(repr(tower))


def test_a_tower_holds_half_of_every_layer_under_the_models_names():
    whole = narrow.network().state_dict()
    for shapes, _ in groups.run(held, 2):
        assert list(shapes) == list(whole)
        for name, value in whole.items():
            assert shapes[name] == (len(value) // 2, *value.shape[1:])


def sends(rank, size, count):
    model = narrow.network()
    tower = towers(model)
    images, labels = narrow.batch(count)
    with narrow.counted(size) as sent:
        logits = tower(images)
        forward = dict(sent)
        narrow.loss_of(logits, labels).backward()
        tower.reduce_gradients()
    return forward, sent


def test_conv3_and_the_linear_layers_alone_see_both_towers():
    # conv1's 15x15 maps are pooled to 7x7, conv2's to 3x3.
    numbers = narrow.gathered(narrow.network(), side=3)
    for forward, sent in groups.run(sends, 2, 6):
        assert forward == {"all_gather_into_tensor": (sum(numbers) + 4) * 6 * 4 / 2}
        assert sent == {**forward, "reduce_scatter_tensor": sum(numbers) * 6 * 4 / 2}


def test_the_traffic_that_is_told_is_that_of_the_network():
    model = AlexNet(variant="paper", device="meta")
    numbers = narrow.gathered(model, side=13)
    forward, backward = (sum(numbers) + 1000) * 128 * 4 / 2, sum(numbers) * 128 * 4 / 2
    whole = sum(p.numel() for p in model.parameters()) * 4
    assert f"sends {(forward + backward) / 1e6:.1f} MB" in " ".join(module.__doc__.split())
    assert f"{whole / 1e6:.0f} MB" in module.__doc__


def gradient_of_images(rank, size):
    model = narrow.network(dropout=0.0)
    tower = towers(model)
    images = narrow.batch(3)[0]
    found, expected = (images.clone().requires_grad_() for _ in range(2))
    tower(found).mul_(2).square().sum().backward()  # logits are one's own, to change in place
    model(expected).mul_(2).square().sum().backward()
    return error(found.grad, expected.grad)


def test_images_have_the_gradient_of_both_towers():
    assert max(groups.run(gradient_of_images, 2)) < 3e-6


def without_gradients(rank, size):
    model = narrow.network().eval()
    tower = towers(model)
    images = narrow.batch(3)[0]
    with pytest.raises(ValueError, match="images of 3 channels"):
        tower(images[:, :1])
    with torch.inference_mode():
        return error(tower(images), model(images)), tower.training, tower.features.training


def test_inference_mode_and_the_models_mode_are_kept():
    for worst, *training in groups.run(without_gradients, 2):
        assert worst < 3e-6
        assert training == [False, False]


# --- whole models in and out ------------------------------------------------------------------------------------------


def state_in_and_out(rank, size):
    model, other = narrow.network(seed=rank), narrow.network(seed=9)
    before = copy.deepcopy(model.state_dict())
    tower = towers(model)
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    first = tower.whole_state_dict()
    tower.load_whole_state_dict(other.state_dict())
    second = tower.whole_state_dict()
    # What cannot be loaded changes nothing. Shapes alone do not tell the next one from the paper's.
    with pytest.raises(RuntimeError, match="caffe"):
        tower.load_whole_state_dict(narrow.network("caffe", seed=4).state_dict())
    with pytest.raises(RuntimeError, match="lacks 'classifier.6.bias'"):
        tower.load_whole_state_dict({name: 0 * value for name, value in list(other.state_dict().items())[:-1]})
    parts = tower.part(other.state_dict())
    assert {name: part.shape for name, part in parts.items()} == {name: p.shape for name, p in tower.named_parameters()}
    with pytest.raises(ValueError, match="has no parameter 'fc6'"):
        tower.whole({"fc6": torch.zeros(1)})
    third = tower.whole_state_dict()
    again = tower.whole(tower.part({name: value * 2 for name, value in other.state_dict().items()}))
    return first, second, third, again


def test_a_whole_state_dict_goes_in_and_comes_out_to_the_last_bit():
    (first, second, third, again), others = groups.run(state_in_and_out, 2)
    assert others == ({}, {}, {}, {})
    expected, other = narrow.network(seed=0).state_dict(), narrow.network(seed=9).state_dict()
    for found, whole in ((first, expected), (second, other), (third, other)):
        assert list(found) == list(whole)
        assert all(torch.equal(found[name], whole[name]) for name in whole)
        assert found._metadata[""]["variant"] == "paper"
    assert all(torch.equal(again[name], 2 * other[name]) for name in other)
    narrow.network(seed=3).load_state_dict(first)


# --- what is refused --------------------------------------------------------------------------------------------------


def size_refused(rank, size):
    with pytest.raises(ValueError, match=f"towers needs 2 processes, .* got {size}: hybrid takes any number"):
        towers(narrow.network())


def test_other_numbers_of_processes_are_refused():
    for size in (1, 3):
        groups.run(size_refused, size)


def mesh_refused(rank, size):
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, size), mesh_dim_names=("replica", "place"))
    with pytest.raises(ValueError, match="along one dimension of a mesh, got 2: name one, as mesh"):
        towers(narrow.network(), mesh)
    with pytest.raises(ValueError, match="the network is on 'meta' and shared by processes on 'cpu': move it with"):
        towers(narrow.network().to("meta"), mesh["place"])


def test_meshes_of_other_devices_or_several_dimensions_are_refused():
    groups.run(mesh_refused, 2)


def test_towers_need_processes():
    with pytest.raises(RuntimeError, match="start them with torchrun"):
        towers(narrow.network())


def pool_on(model):
    model.avgpool = nn.Flatten()


def replaced(name, layer):
    def change(model):
        owner, _, index = name.rpartition(".")
        model.get_submodule(owner)[int(index)] = layer

    return change


REFUSED = [
    (replaced("features.4.1", nn.LocalResponseNorm(5)), r"features.4.1 normalises across the channels of both towers"),
    (replaced("features.1.1", GroupedLocalResponseNorm(5, 1)), r"features.1.1 normalises across the channels of both"),
    (replaced("features.7", nn.BatchNorm2d(12)), r"features.7 is a BatchNorm2d with parameters or buffers of its own"),
    (replaced("features.7", nn.GELU()), r"features.7 is a GELU"),
    (replaced("features.3", nn.Conv2d(8, 15, 5)), r"features.3 has 15 filters, which cannot be halved"),
    (replaced("features.8", nn.Conv2d(12, 12, 3, groups=3)), r"features.8 is a convolution of 3 groups"),
    (replaced("features.0", nn.Conv2d(4, 8, 11, 4, groups=2)), r"features.0 is a convolution of 2 groups"),
    (pool_on, r"avgpool is a Flatten"),
    (replaced("classifier.2", nn.Softmax(1)), r"classifier.2 is a Softmax"),
    (lambda model: setattr(model, "features", nn.Identity()), r"features that are an nn.Sequential, got Identity"),
]


@pytest.mark.parametrize(("change", "why"), REFUSED)
def test_layers_that_do_not_fall_into_towers_are_refused(change, why):
    model = narrow.network()
    change(model)
    with pytest.raises(ValueError, match=why) as error:
        towers(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("variant", "why"),
    [
        ("merged", "the convolutions of 'merged' have no two groups to keep apart"),
        ("torchvision", "the convolutions of 'torchvision' have no two groups to keep apart"),
        ("caffe", "features.1.1 normalises across the channels of both towers"),
    ],
)
def test_variants_that_have_no_towers_are_refused(variant, why):
    with pytest.raises(ValueError, match=f"the layers of 'paper', and {why}.*: share the network by hybrid"):
        towers(AlexNet(4, variant=variant, device="meta"))


def test_what_is_no_alexnet_is_refused():
    with pytest.raises(ValueError, match="towers takes an AlexNet, got Sequential: give the network itself, unwrapped"):
        towers(nn.Sequential(narrow.network()))
    assert issubclass(Towers, nn.Module)
