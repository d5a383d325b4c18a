"""A network cut into stages, and dropout of a batch that comes in parts."""

from __future__ import annotations

import copy

import narrow
import pytest
import torch
import torch.nn.functional as F
from plain import error
from torch import nn

from alexnet_triton import AlexNet, ops, use_backend
from alexnet_triton.fusion import FusedSequential
from alexnet_triton.parallel.pipeline import load_whole_state_dict, split, whole_state_dict
from alexnet_triton.parallel.pipeline.masks import Dropped, Masks
from alexnet_triton.parallel.pipeline.names import layer_names
from alexnet_triton.parallel.pipeline.stages import dropouts

VARIANTS = ("merged", "paper", "torchvision", "caffe")
CPU = torch.device("cpu")


def whole(variant="paper", device="meta", **more):
    return AlexNet(10, variant=variant, device=device, **more)


def in_turn(stages, x):
    for stage in stages:
        x = stage(x)
    return x


# --- names ------------------------------------------------------------------------------------------------------------


def test_layers_are_named_in_order_of_execution():
    names = layer_names(whole())
    assert names == (*(f"features.{i}" for i in range(13)), "avgpool", *(f"classifier.{i}" for i in range(7)))


def test_a_part_that_is_one_layer_or_has_a_hook_is_named_whole():
    model = whole()
    model.classifier = nn.Linear(256 * 36, 3)
    assert layer_names(model)[-2:] == ("avgpool", "classifier")
    model.features.register_forward_hook(lambda *_: None)
    assert layer_names(model) == ("features", "avgpool", "classifier")
    model.classifier = nn.Sequential()
    assert layer_names(model)[-1] == "classifier"


@pytest.mark.parametrize(
    ("stages", "at", "said"),
    [
        (None, "features.0", "no stage can begin at 'features.0': choose of features.1, "),
        (None, "conv1", "no stage can begin at 'conv1'"),
        (None, "fc9", "no stage can begin at 'fc9'.*or of conv2 to fc8"),
        (None, ("fc6", "conv3"), "different and in the order of the layers, got fc6, conv3"),
        (None, ("conv3", "features.6"), "different and in the order of the layers"),
        (3, "conv3", "1 cuts make 2 stages, got stages=3"),
        (0, "auto", "1 to 21 stages, one a layer, got stages=0"),
        (22, "auto", "1 to 21 stages, one a layer, got stages=22"),
    ],
)
def test_a_cut_that_makes_no_sense_is_refused_in_a_sentence(stages, at, said):
    with pytest.raises(ValueError, match=said):
        split(whole(), stages, at)


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(1, 1)), nn.DataParallel(whole())])
def test_another_network_is_refused_in_a_sentence(model):
    with pytest.raises(ValueError, match=f"only an AlexNet can be cut into stages, got {type(model).__name__}"):
        split(model, at="conv2")


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_stages_in_turn_are_the_model_wherever_it_is_cut(variant):
    model = narrow.network(variant).eval()
    images, labels = narrow.batch(2)
    expected = model(images)
    F.cross_entropy(expected, labels).backward()
    gradients = {name: gradient.clone() for name, gradient in narrow.gradients(model).items()}
    for cut in layer_names(model)[1 + VARIANTS.index(variant) :: len(VARIANTS)]:
        model.zero_grad()
        logits = in_turn(split(model, at=cut), images)
        assert error(logits, expected) < 1e-6, cut
        F.cross_entropy(logits, labels).backward()
        assert narrow.worst(narrow.gradients(model), gradients) < 1e-5, cut


def test_stages_hold_the_models_own_layers_under_its_own_names():
    model = whole().eval()
    model.classifier[3].train()
    stages = split(model, at=("conv3", "features.10", "avgpool", "fc7"))
    assert [(stage.names[0], stage.names[-1]) for stage in stages] == [
        ("features.0", "features.5"),
        ("features.6", "features.9"),
        ("features.10", "features.12"),
        ("avgpool", "classifier.3"),
        ("classifier.4", "classifier.6"),
    ]
    for stage in stages:
        for name in stage.names:
            assert stage.get_submodule(name) is model.get_submodule(name)
        assert not stage.training
    assert isinstance(stages[0].features, FusedSequential)
    assert stages[3].classifier[3].training
    assert "features.6 to features.9" in repr(stages[1])


def test_every_layer_may_be_a_stage():
    model = narrow.network("torchvision").eval()
    stages = split(model, 21, layer_names(model)[1:])
    images, _ = narrow.batch(2)
    assert error(in_turn(stages, images), model(images)) < 1e-6
    (one,) = split(model, 1)
    assert torch.equal(one(images), model(images))


def test_auto_makes_as_many_stages_as_asked_for():
    for stages in (None, 2, 3):
        cut = split(whole(), stages, batch=32)
        assert len(cut) == (stages or 2)
        assert sum((stage.names for stage in cut), ()) == layer_names(whole())


def test_a_stage_leaves_what_it_is_given_as_it_is():
    first, second = split(narrow.network().eval(), at="features.7")
    assert second.features[0].inplace
    x = first(narrow.batch(2)[0]).detach()
    before = x.clone()
    second(x.requires_grad_()).sum().backward()
    assert torch.equal(x, before)
    assert x.grad.any()


def test_layers_of_a_user_and_hooks_on_layers_are_kept():
    model = narrow.network()
    model.avgpool = nn.Identity()
    model.classifier[1] = nn.Linear(8, 20)
    model.classifier[6] = nn.Bilinear(18, 18, 3)
    model.classifier[6].forward = lambda x: nn.functional.bilinear(x, x, model.classifier[6].weight)
    seen = []
    model.features[8].register_forward_hook(lambda layer, inputs, output: seen.append(output.shape))
    images, _ = narrow.batch(2)
    expected = model.eval()(images)
    assert expected.shape == (2, 3)
    assert error(in_turn(split(model, at=("features.8", "avgpool")), images), expected) < 1e-6
    assert len(seen) == 2


def test_a_stage_can_be_copied():
    stages = split(narrow.network().eval(), at="conv3")
    images, _ = narrow.batch(2)
    assert torch.equal(in_turn(copy.deepcopy(stages), images), in_turn(stages, images))


# --- state dicts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_stages_state_dicts_together_are_the_models(variant):
    model = narrow.network(variant)
    expected = model.state_dict()
    stages = split(model, at=("conv2", "fc6"))
    found = whole_state_dict(stages)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found._metadata[""]["variant"] == expected._metadata[""]["variant"] == variant
    narrow.network(variant, seed=5).load_state_dict(found)


def test_a_whole_models_state_dict_loads_into_any_stages_and_a_stages_own_into_it():
    state = narrow.network(seed=5).state_dict()
    stages = split(narrow.network(), at=("features.8", "fc7"))
    load_whole_state_dict(stages, state)
    assert all(torch.equal(value, state[name]) for name, value in whole_state_dict(stages).items())
    again = split(narrow.network(), at=("features.8", "fc7"))
    load_whole_state_dict(again[1:2], state)
    again[0].load_state_dict(stages[0].state_dict())
    assert all(torch.equal(value, state[name]) for stage in again[:2] for name, value in stage.state_dict().items())


def test_a_wrong_state_dict_is_refused_and_changes_nothing():
    stages = split(narrow.network(), at="fc6")
    before = {name: value.clone() for name, value in whole_state_dict(stages).items()}
    good = narrow.network(seed=5).state_dict()
    lacking = {name: value for name, value in good.items() if name != "features.6.bias"}
    other = narrow.network("caffe", seed=5).state_dict()
    more = narrow.network(classes=7, seed=5).state_dict()
    for state, number, said in (
        (lacking, 0, "lacks 'features.6.bias'"),
        ({**good, "features.1.weight": torch.ones(1)}, 0, "unknown 'features.1.weight'"),
        ({**good, "head.weight": torch.ones(1)}, 1, "unknown 'head.weight'"),
        (other, 0, "is of variant 'caffe' and this model of variant 'paper'"),
        (more, 1, "of 7 classes and this model's of 4"),
    ):
        with pytest.raises(RuntimeError, match=said):
            stages[number].load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in whole_state_dict(stages).items())
    stages[0].load_state_dict(lacking, strict=False)


# --- dropout ----------------------------------------------------------------------------------------------------------


def test_layers_of_dropout_are_found_with_the_shapes_that_they_drop():
    found = {}
    for variant in VARIANTS:
        model = narrow.network(variant)
        found[variant] = [(dropped.shape, dropped.fused) for dropped in dropouts(model, narrow.SIZE)]
        stages = split(model, at=("features.4", "classifier.2"))
        assert dropouts(stages, narrow.SIZE) == dropouts(model, narrow.SIZE)
    assert found["merged"] == found["torchvision"] == [((288,), True), ((20,), True)]
    assert found["paper"] == found["caffe"] == [((20,), True), ((18,), True)]
    model = narrow.network("merged")
    model.features[1] = nn.Sequential(nn.ReLU(), nn.Dropout(0.2))  # a map is dropped from too
    model.classifier[0] = nn.Dropout(0.5, inplace=True)  # called itself
    model.classifier[3].register_forward_hook(lambda *_: None)  # likewise
    (dropped,) = dropouts(model, narrow.SIZE)
    assert dropped == Dropped(model.features[1][1], (8, 15, 15), False)


def masks_of(layer, width, fused=True, dtype=torch.float32):
    return Masks([Dropped(layer, (width,), fused)], CPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_parts_of_a_batch_are_dropped_by_the_rows_of_its_mask(dtype):
    layer, other = nn.Dropout(0.4), nn.Dropout(0.2)
    # Expected in float32: in another dtype it is drawn once more, out of its turn.
    masks = Masks([Dropped(layer, (33,), True), Dropped(other, (7,), True)], CPU, torch.float32)
    x = torch.randn(11, 33).to(dtype)
    torch.manual_seed(4)
    expected, others = layer(x), other(x[:, :7])
    state = torch.get_rng_state()
    for _ in range(2):
        torch.manual_seed(4)
        masks.draw(11)
        parts = [masks.apply(layer, part, first) for part, first in ((x[8:], 8), (x[:5], 0), (x[5:8], 5))]
        assert torch.equal(torch.cat([parts[1], parts[2], parts[0]]), expected)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(masks.apply(other, x[:, :7], 0), others)
    rows = (expected == 0)[:, :20]
    assert len({tuple(row.tolist()) for row in rows}) == 11
    masks.draw(11)
    assert not torch.equal(masks.apply(layer, x, 0), expected)


def test_rows_that_fill_up_a_part_become_zeros_and_take_no_gradient():
    layer = nn.Dropout(0.5)
    masks = masks_of(layer, 6)
    masks.draw(4)
    x = torch.ones(3, 6, requires_grad=True)
    y = masks.apply(layer, x, 2)
    assert y[:2].any()
    assert not y[2].any()
    y.sum().backward()
    assert not x.grad[2].any()
    assert not masks.apply(layer, x, 6).any()


def test_dropout_of_everything_and_of_nothing():
    x = torch.randn(3, 6)
    for p, expected in ((1.0, torch.zeros(3, 6)), (0.0, x)):
        layer = nn.Dropout(p)
        masks = masks_of(layer, 6)
        masks.draw(3)
        assert torch.equal(masks.apply(layer, x, 0), expected)
    layer = nn.Dropout(0.5).eval()
    masks = masks_of(layer, 6)
    before = torch.get_rng_state()
    masks.draw(3)
    masks.draw(0)
    assert torch.equal(masks.apply(layer, x, 0), x)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_layer_that_has_got_a_hook_is_called():
    layer, seen = nn.Dropout(0.5), []
    masks = masks_of(layer, 6)
    layer.register_forward_hook(lambda *_: seen.append(1))
    masks.draw(3)
    masks.apply(layer, torch.ones(3, 6), 0)
    assert seen == [1]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_masks_are_what_the_fused_op_drops(backend):
    layer = nn.Dropout(0.3)
    masks = masks_of(layer, 50)
    x, eye = torch.rand(9, 50) + 1, torch.eye(50)
    with use_backend(backend):
        torch.manual_seed(2)
        expected = ops.dropout_linear(x, eye, p=0.3)
        state = torch.get_rng_state()
        torch.manual_seed(2)
        masks.draw(9)
        found = torch.cat([masks.apply(layer, x[:4], 0), masks.apply(layer, x[4:], 4)])
    assert error(found, expected) < 1e-6
    assert torch.equal(found == 0, expected == 0)
    assert 0.1 < (found == 0).float().mean() < 0.5
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("variant", ["merged", "paper"])
def test_a_stage_with_masks_drops_what_the_model_drops(variant):
    model = narrow.network(variant)
    images, _ = narrow.batch(5)
    torch.manual_seed(8)
    expected = model(images)
    stages = split(model, at=("fc6", "classifier.3"))
    masks = Masks(dropouts(stages, narrow.SIZE), CPU, torch.float32)
    torch.manual_seed(8)
    masks.draw(5)
    for stage in stages:
        stage.masks = masks
    parts = []
    for first, part in ((0, images[:2]), (2, images[2:])):
        for stage in stages:
            stage.first_row = first
        parts.append(in_turn(stages, part))
    assert error(torch.cat(parts), expected) < 1e-6
