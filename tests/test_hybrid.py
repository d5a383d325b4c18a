"""The hybrid: convolutions in copies and linear layers in parts are, together, the network in one process."""

import groups
import narrow
import pytest
import torch
from narrow import Case
from plain import error
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from alexnet_triton import AlexNet
from alexnet_triton.parallel import hybrid as module
from alexnet_triton.parallel.hybrid import hybrid
from alexnet_triton.parallel.towers import towers
from alexnet_triton.variants import VARIANTS


def even(images, rank, size):
    return images.tensor_split(size)[rank]


def all_in_the_last(images, rank, size):
    return images[: len(images) * (rank == size - 1)]


def all_but_one_in_the_first(images, rank, size):
    return images.tensor_split([len(images) - 1, *[len(images)] * (size - 2)])[rank]


def channels_last(model):
    model.to(memory_format=torch.channels_last)


CASES = {
    **{variant: Case(variant, steps=3 if variant == "merged" else 0) for variant in VARIANTS},
    "one image": Case(count=1, steps=0),
    "no image": Case(count=0, steps=1),
    "seven classes": Case(classes=7, count=8, steps=1),
    "one class": Case("torchvision", classes=1, steps=1),
}
MORE_CASES = {
    "evaluation": Case(train=False, steps=0),
    "features frozen": Case(frozen="features", steps=1),
    "fc7 frozen": Case(frozen="classifier.4", steps=1),
    "conv3 frozen": Case(frozen="features.6", steps=1),
    "channels-last": Case("merged", change=channels_last, steps=1),
}


def test_the_hybrid_is_the_network_in_one_process():
    narrow.check(2, hybrid, even, {**CASES, **MORE_CASES})


def test_four_processes_are_the_network_in_one():
    narrow.check(4, hybrid, even, CASES)


def test_one_process_alone_is_the_network_itself():
    narrow.check(1, hybrid, even, {"alone": Case(steps=1)}, limit=1e-6)


@pytest.mark.parametrize("share", [all_in_the_last, all_but_one_in_the_first])
def test_any_shares_of_the_images_will_do(share):
    narrow.check(2, hybrid, share, {"paper": Case(), "merged": Case("merged", change=channels_last, steps=1)})


def test_the_hybrid_under_autocast_is_the_network_to_bfloat16s_rounding():
    narrow.check(2, hybrid, even, {"autocast": Case("torchvision", autocast=True, steps=0)}, limit=0.03)


# --- batches ----------------------------------------------------------------------------------------------------------


def told_and_asked(rank, size, counts):
    network = hybrid(narrow.network().eval())
    found = []
    for count in counts:
        images = even(narrow.batch(count)[0], rank, size)
        with narrow.counted(size) as sent:
            told = network(images, batch=count)
        with torch.inference_mode():
            asked = network(images)
        found.append((torch.equal(told, asked), len(told), sorted(sent)))
    with pytest.raises(ValueError, match=f"process {rank} of {size} has 10 images of a batch of 40, got {len(images)}"):
        network(images, batch=40)
    with pytest.raises(ValueError, match="AlexNet needs a 4-D batch of images"):
        network(torch.zeros(3, 67, 67))
    return found


def test_a_process_that_is_told_the_batch_need_not_ask():
    counts = (0, 1, 6)
    expected = [(True, count, ["all_gather_into_tensor"]) for count in counts]
    assert groups.run(told_and_asked, 4, counts) == [expected] * 4


# --- what is sent, and what is held -----------------------------------------------------------------------------------


def sends(rank, size, count):
    network = hybrid(narrow.network())
    images, labels = narrow.batch(count)
    with narrow.counted(size) as sent:
        logits = network(even(images, rank, size), batch=count)
        forward = dict(sent)
        narrow.loss_of(logits, labels).backward()
        backward = dict(sent)
        network.reduce_gradients()
    return forward, backward, sent, {name: tuple(p.shape) for name, p in network.named_parameters()}


@pytest.mark.parametrize("processes", [2, 4])
def test_activations_before_linear_layers_and_gradients_of_convolutions_are_all_that_is_sent(processes):
    model = narrow.network(classes=4)
    _, *numbers = narrow.gathered(model, side=3)
    numbers = [numbers[0], 20, 20 if processes == 4 else 18]  # 18 units in four parts are sent as four times 5
    gradients = sum(p.numel() for p in model.features.parameters()) * 4
    own = (processes - 1) / processes
    for forward, backward, sent, shapes in groups.run(sends, processes, 8):
        assert forward == {"all_gather_into_tensor": (sum(numbers) + 4) * 8 * 4 * own}
        assert backward == {**forward, "reduce_scatter_tensor": sum(numbers) * 8 * 4 * own}
        assert sent == {**backward, "allreduce_": 2 * own * gradients}
        for name, whole in model.named_parameters():
            if name.startswith("features"):
                assert shapes[name] == tuple(whole.shape)
            else:
                assert shapes[name][0] <= -(-len(whole) // processes)
                assert shapes[name][1:] == tuple(whole.shape[1:])


def test_the_traffic_that_is_told_is_that_of_the_network():
    told = " ".join(module.__doc__.split())
    model = AlexNet(variant="merged", device="meta")
    _, *numbers = narrow.gathered(model, side=13)
    convolutions = sum(p.numel() for p in model.features.parameters()) * 4
    whole = sum(p.numel() for p in model.parameters()) * 4
    for processes in (2, 8):
        own = (processes - 1) / processes
        sent = (2 * sum(numbers) + 1000) * 128 * processes * 4 * own + 2 * convolutions * own
        assert f"{sent / 1e6:.0f} MB" in told
        assert f"{2 * whole * own / 1e6:.0f} MB" in told


# --- whole models in and out, and meshes ------------------------------------------------------------------------------


def state_in_and_out(rank, size):
    model, other = narrow.network("merged", 7, seed=rank), narrow.network("merged", 7, seed=9)
    network = hybrid(model)
    first = network.whole_state_dict()
    network.load_whole_state_dict(other.state_dict())
    parts = network.part(other.state_dict())
    assert all(torch.equal(parts[name], p) for name, p in network.named_parameters())
    return first, network.whole_state_dict()


@pytest.mark.parametrize("processes", [2, 4])
def test_a_whole_state_dict_goes_in_and_comes_out_to_the_last_bit(processes):
    (first, second), *others = groups.run(state_in_and_out, processes)
    assert others == [({}, {})] * (processes - 1)
    for found, seed in ((first, 0), (second, 9)):
        whole = narrow.network("merged", 7, seed=seed).state_dict()
        assert list(found) == list(whole)
        assert all(torch.equal(found[name], whole[name]) for name in whole)
        assert found._metadata[""]["variant"] == "merged"


def replicas(rank, size):
    """Two replicas of two processes each, which see images of their own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "place"))["place"]
    replica, place = divmod(rank, 2)
    errors = []
    for make in (towers, hybrid):
        model = narrow.network(seed=replica, dropout=0.0)
        for processes in (mesh, mesh.get_group()):
            network = make(model, processes)
            images, labels = narrow.batch(3, seed=replica)
            logits = network(images.tensor_split(2)[place] if make is hybrid else images)
            narrow.loss_of(logits, labels).backward()
            network.reduce_gradients()
            model.zero_grad()
            expected = model(images)
            narrow.loss_of(expected, labels).backward()
            found = network.whole(narrow.gradients(network))
            errors += [error(logits, expected), narrow.worst(found, narrow.gradients(model) if place == 0 else {})]
    return max(errors)


def test_replicas_share_a_network_each_on_one_dimension_of_a_mesh():
    assert max(groups.run(replicas, 4)) < 3e-6


# --- what is refused --------------------------------------------------------------------------------------------------


class Deeper(AlexNet):
    def forward(self, x):
        return super().forward(x)


def with_classifier(*layers):
    def change(model):
        model.classifier = nn.Sequential(*layers)

    return change


def hooked_slot(model):
    model.classifier[5].register_forward_hook(lambda *_: None)


def weight_normed(model):
    nn.utils.parametrizations.weight_norm(model.classifier[1])


def with_buffer(model):
    model.classifier[4].register_buffer("steps", torch.zeros(1))


def batch_normed(model):
    model.features[1] = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())


def dropped(model):
    model.features[7] = nn.Dropout2d(0.5)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (with_classifier(nn.Linear(288, 9), nn.Softmax(1)), "plain Dropout, .*, and classifier.1 is a Softmax: train"),
        (with_classifier(nn.Linear(288, 9), nn.Dropout()), "ends with a Linear, and this one has dropout after it"),
        (with_classifier(nn.ReLU(), nn.Dropout()), "ends with a Linear, and this one has none"),
        (lambda model: setattr(model, "classifier", nn.Linear(288, 9)), "that is an nn.Sequential, got Linear"),
        (hooked_slot, "classifier.5 is a Sequential: train the network in whole copies"),
        (weight_normed, "classifier.1 is a ParametrizedLinear"),
        (with_buffer, "classifier.4 is a Linear with parameters or buffers of its own"),
        (batch_normed, r"features.1.0 \(BatchNorm2d\) looks at the whole batch: train it in whole copies"),
        (dropped, r"features.7 \(Dropout2d\) draws for the whole batch: train it in whole copies"),
        (lambda model: setattr(model, "__class__", Deeper), "takes an AlexNet, got Deeper"),
    ],
)
def test_what_cannot_be_shared_so_is_refused(change, why):
    model = narrow.network()
    change(model)
    with pytest.raises(ValueError, match=f"^hybrid .*{why}") as error:
        hybrid(model)
    assert "\n" not in str(error.value)


def test_the_hybrid_needs_processes():
    with pytest.raises(RuntimeError, match="start them with torchrun"):
        hybrid(narrow.network())
