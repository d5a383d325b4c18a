"""What the layers of a network and the cuts through it cost, and where it is cut."""

import math
import random
import re
from itertools import combinations

import pytest
import torch
from plan_cases import ROOFS, Given, costs, on_meta
from torch import nn

from alexnet_triton import AlexNet
from alexnet_triton.bench.checks import FULL
from alexnet_triton.bench.checks import layers as bench_layers
from alexnet_triton.bench.floors import least
from alexnet_triton.parallel.links import LINKS, Link
from alexnet_triton.parallel.pipeline import split
from alexnet_triton.parallel.pipeline.costs import GOOD_ENOUGH, auto_cut, best_cuts, candidates, cut_table, pipeline
from alexnet_triton.parallel.pipeline.measuring import measure
from alexnet_triton.parallel.pipeline.schedules import SCHEDULES, Action
from alexnet_triton.parallel.pipeline.work import DIRECTIONS, Roofs, Table, Work, layers
from alexnet_triton.variants import VARIANTS

FREE = Link("free", math.inf, 0.0)


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_does_and_moves_what_the_benchmarks_count(variant):
    found = {layer.name: layer for layer in costs(variant, 3)}
    for name, theirs in bench_layers(variant, 3, FULL):
        for direction, ours in found[name].works.items():
            assert (ours.flop, ours.moved) == least(theirs, direction.replace("input", "data"), 2), (name, direction)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_are_the_models_and_no_cut_tears_an_op_apart(variant):
    model = on_meta(variant)
    found = costs(variant)
    names = ["conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5", "avgpool", "fc6", "fc7", "fc8"]
    assert [layer.name for layer in found] == names
    assert sum(layer.parameters for layer in found) == sum(p.numel() for p in model.parameters())
    pools = ["features.2", "features.5"] if VARIANTS[variant].norm is None else []  # else the norm is inside a layer
    last = ["classifier.6"] if VARIANTS[variant].dropout_first else []  # else its dropout is
    convs = ["features.3", "features.6", "features.8", "features.10", "features.12"]
    expected = {*pools, *convs, "avgpool", "classifier.0", "classifier.3", *last}
    assert set(candidates(found)) == expected
    for name in candidates(found):
        assert len(split(model, at=[name])) == 2


def test_nothing_before_the_first_that_learns_has_a_gradient():
    model = on_meta("torchvision")
    first, *others = costs("torchvision", model=model)
    assert set(first.works) == {"forward", "weight gradient"}
    assert all("input gradient" in layer.works for layer in others)
    model.features.requires_grad_(False)
    frozen = {layer.name: layer for layer in costs("torchvision", model=model)}
    for name in ("conv1", "pool1", "conv5", "avgpool"):
        assert set(frozen[name].works) == {"forward"}
        assert frozen[name].kept == frozen[name].accumulate == frozen[name].update == 0
    assert set(frozen["fc6"].works) == {"forward", "weight gradient"}
    assert set(frozen["fc7"].works) == set(DIRECTIONS)
    assert frozen["conv2"].state == 2 * frozen["conv2"].parameters  # the half-precision values alone
    there, back = pipeline(tuple(frozen.values()), ["classifier.0"], 4, "gpipe", FREE).traffic(0)
    assert (there, back) == (16 * 256 * 36 * 2, 0)


def test_bytes_of_a_layer():
    found = {layer.name: layer for layer in costs("merged", 16)}
    conv2, pool2, fc6 = found["conv2"], found["pool2"], found["fc6"]
    assert conv2.output == 16 * 256 * 27 * 27 * 2
    assert conv2.kept == 16 * 96 * 27 * 27 * 2
    assert pool2.kept == 16 * 256 * (27 * 27 * 2 + 13 * 13)  # its input, and a byte for the place of each maximum
    assert fc6.state == 12 * fc6.parameters == 12 * (9216 + 1) * 4096
    assert fc6.update == pytest.approx(20 * fc6.parameters / 3e12)
    assert fc6.accumulate == pytest.approx(3 * 2 * fc6.parameters / 3e12)
    single = {layer.name: layer for layer in costs("merged", 16, dtype=torch.float32)}
    assert single["conv2"].output == 2 * conv2.output
    assert single["fc6"].state == fc6.state


def test_roofs_take_the_longer_of_arithmetic_and_bytes():
    work = Work("conv", "forward", 4, 600, 50, 100)
    assert Roofs(100.0, 1000.0).seconds(work) == 24.0
    assert Roofs(1e9, 10.0).seconds(work) == 30.0
    assert Roofs(1.0, 1.0).origin(work) == "estimated"


def test_a_table_is_carried_over_to_other_batches_by_the_roofs():
    roofs = Roofs(1e9, 1.0)
    table = Table({("conv", "forward", 8): 900.0, ("conv", "forward", 64): 1.0}, roofs)
    exact, near, far = (Work("conv", "forward", images, 0, 10, 20) for images in (8, 4, 50))
    assert (table.seconds(exact), table.origin(exact)) == (900.0, "measured")
    assert table.seconds(near) == pytest.approx(900 * 60 / 100)  # the parameters' 20 bytes stay
    assert table.origin(near) == "carried over"
    assert table.seconds(far) == pytest.approx(520 / 660)
    other = exact._replace(direction="weight gradient")
    assert (table.seconds(other), table.origin(other)) == (100.0, "estimated")
    assert Table(table.times, roofs, measured=False).origin(exact) == "estimated"


def test_layers_that_a_user_put_in_are_costed_and_the_model_is_left_as_it_was():
    model = AlexNet(7, variant="torchvision", device="meta")
    model.features[1] = nn.Sequential(nn.BatchNorm2d(64), nn.ReLU(inplace=True))
    model.to_empty(device="cpu")
    model.classifier[4] = nn.Identity()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    found = costs("torchvision", model=model)
    assert [layer.name for layer in found][:4] == ["conv1", "features.1.0", "features.1.1", "pool1"]
    assert sum(layer.parameters for layer in found) == sum(p.numel() for p in model.parameters())
    assert before == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert not any(module._forward_hooks for module in model.modules())


def test_one_module_in_several_places_is_costed_at_each():
    model = on_meta("torchvision")
    expected = costs("torchvision")
    model.features[5] = model.features[12] = model.features[2]
    model.features[4] = model.features[7] = model.features[1]
    model.classifier[3] = model.classifier[0]
    assert costs("torchvision", model=model) == expected


def test_only_an_alexnet_has_a_plan():
    with pytest.raises(ValueError, match="only an AlexNet can be cut into stages, got Sequential"):
        costs(model=nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="needs images of at least"):
        layers(on_meta(), (4, 3, 40, 40), ROOFS, ROOFS)


def narrow():
    """AlexNet with few filters and units, and a normalisation that works in place behind."""
    model = AlexNet(3, variant="torchvision", device="meta")
    for index, depth in ((0, 3), (3, 8), (6, 8), (8, 8), (10, 8)):
        old = model.features[index]
        model.features[index] = nn.Conv2d(depth, 8, old.kernel_size, old.stride, old.padding)
    model.features[1] = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    for index, width in ((1, 8 * 36), (4, 16)):
        model.classifier[index] = nn.Linear(width, 16)
    model.classifier[6] = nn.Linear(16, 3)
    return model


def test_measuring_times_every_direction_and_changes_nothing():
    model = narrow()
    model.features[0].requires_grad_(False)
    images = torch.rand(2, 3, 67, 67)
    running = model.features[1][0].running_mean.clone()
    state = torch.get_rng_state()
    model.train()
    model.classifier[0].eval()
    times = measure(model, images, seconds=0.0)
    assert [module.training for module in (model, model.classifier[0], model.classifier[3])] == [True, False, True]
    found = layers(model, images.shape, Table(times, ROOFS), ROOFS)
    assert set(times) == {(layer.name, direction, 2) for layer in found for direction in layer.works}
    assert all(seconds > 0 for seconds in times.values())
    assert all(origin == "measured" for layer in found for origin in layer.origins.values())
    assert all(layer.seconds[d] == times[layer.name, d, 2] for layer in found for d in layer.works)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.features[1][0].running_mean, running)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


# --- cuts -------------------------------------------------------------------------------------------------------------


def test_an_action_takes_what_torch_does_in_it():
    times = Given(conv1={"forward": 2.0, "weight gradient": 5.0}, fc8={"forward": 3.0, "input gradient": 7.0})
    found = costs(times=times, roofs=Roofs(1.0, 1e9))
    first, last = pipeline(found, ["classifier.3"], 4, "zero-bubble", FREE).parts
    assert [layer.name for layer in last.layers] == ["fc7", "fc8"]
    assert last.seconds(Action("F", 1, 0)) == 4.0
    assert (last.input_gradient, last.weight_gradient) == (8.0, 2.0)
    assert last.seconds(Action("I", 1, 2)) == 8.0
    assert last.seconds(Action("W", 1, 0)) == 2.0
    assert last.seconds(Action("B", 1, 0)) == 10.0
    added = 3 * 2 * last.parameters / 1e9
    assert last.seconds(Action("W", 1, 1)) == pytest.approx(2.0 + added)
    assert last.seconds(Action("B", 1, 3)) == pytest.approx(10.0 + added)
    assert first.seconds(Action("I", 0, 1)) == 0.0
    assert first.seconds(Action("W", 0, 0)) == first.backward == pytest.approx(5 + 9 + 5)
    first, fused = pipeline(found, ["classifier.3"], 4, "zero-bubble", FREE, apart=False).parts
    assert fused.seconds(Action("I", 1, 0)) == 10.0
    assert fused.seconds(Action("I", 1, 1)) == pytest.approx(10.0 + added)
    assert fused.seconds(Action("W", 1, 1)) == first.seconds(Action("I", 0, 1)) == 0.0
    assert first.seconds(Action("W", 0, 0)) == first.backward


def test_traffic_and_step_of_three_stages_by_hand():
    # Transfers take a second a byte of a scale in which each cut's activations are one number of seconds.
    found = costs(times=Given(), roofs=Roofs(1.0, math.inf))
    made = pipeline(found, ["features.6", "classifier.0"], 1, "gpipe", Link("slow", 1e6, 0.5))
    a, b = made.traffic(0)[0] / 1e6 + 0.5, made.traffic(1)[0] / 1e6 + 0.5
    assert made.traffic(0) == (16 * 256 * 13 * 13 * 2,) * 2
    assert made.traffic(1) == (16 * 9216 * 2,) * 2
    forward = [part.forward for part in made.parts]
    backward = [part.backward for part in made.parts]
    starts = [0, forward[0] + a, sum(forward[:2]) + a + b]
    assert [made.timeline.of(stage)[0].start for stage in range(3)] == pytest.approx(starts)
    last = starts[2] + forward[2] + backward[2] + b + backward[1] + a + backward[0]
    assert made.step == pytest.approx(last)
    assert made.images_per_second == pytest.approx(16 / last)


def test_each_device_updates_its_own_parameters_at_the_end_of_its_work():
    found = costs(times=Given(), roofs=Roofs(1.0, 1e9))
    made = pipeline(found, ["classifier.0"], 4, "gpipe", FREE)
    first, last = made.parts
    ends = [made.timeline.end(0) + 20 * first.parameters / 1e9, made.timeline.end(1) + 20 * last.parameters / 1e9]
    assert made.step == pytest.approx(max(ends))
    assert made.step >= made.bound


def test_memory_is_of_parameters_and_of_the_microbatches_in_flight():
    found = costs("merged", 4)
    kept = sum(layer.kept for layer in found[:8]), sum(layer.kept for layer in found[8:])
    state = sum(layer.state for layer in found[:8]), sum(layer.state for layer in found[8:])
    for schedule, apart, held in (
        ("gpipe", True, (6, 6)),
        ("1f1b", True, (2, 1)),
        ("zero-bubble", True, (2, 2)),
        ("zero-bubble", False, (2, 1)),
    ):
        made = pipeline(found, ["avgpool"], 6, schedule, FREE, apart=apart)
        assert [made.memory(0), made.memory(1)] == [s + n * k for s, n, k in zip(state, held, kept, strict=True)]
        assert made.most_memory == max(made.memory(0), made.memory(1))


def drawn(seed):
    """Layers of times that were drawn."""
    dice = random.Random(seed)
    names = [layer.name for layer in costs("merged", 1)]
    times = {name: {direction: dice.uniform(0.1, 3) ** 2 for direction in DIRECTIONS} for name in names}
    return costs("merged", 4, times=Given(**times), roofs=Roofs(1.0, dice.choice((1e8, 1e9, 1e12))))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_best_cut_is_the_best_of_all(schedule):
    for seed in range(3):
        found, link = drawn(seed), Link("drawn", random.Random(seed).choice((1e5, 1e7)), 0.01)
        for stages, microbatches in ((2, 4), (3, 3), (4, 4)):
            every = [
                pipeline(found, at, microbatches, schedule, link) for at in combinations(candidates(found), stages - 1)
            ]
            shortest = min(one.step for one in every)
            good = [one for one in every if one.step <= GOOD_ENOUGH * shortest]
            best = best_cuts(found, stages, microbatches, schedule, link)
            assert best == min(good, key=lambda one: (one.most_memory, one.step)).at, (seed, stages)
            limit = sorted(one.most_memory for one in every)[len(every) // 4]
            held = best_cuts(found, stages, microbatches, schedule, link, limit)
            fitting = [one for one in every if one.most_memory <= limit]
            chosen = next(one for one in fitting if one.at == held)
            assert chosen.step <= GOOD_ENOUGH * min(one.step for one in fitting)


def test_a_slow_link_moves_the_cut_to_where_less_travels():
    found = costs("merged", 128)
    fast, slow = (best_cuts(found, 2, 8, "1f1b", link) for link in (LINKS["nvlink4"], LINKS["loopback"]))
    bytes_over = {one.at: one.traffic(0)[0] for one in cut_table(found, 8, "1f1b", LINKS["nvlink4"])}
    assert bytes_over[slow] < bytes_over[fast]


def test_a_single_stage_is_the_network():
    found = costs()
    assert best_cuts(found, 1, 4, "1f1b", FREE) == ()
    whole = pipeline(found, (), 4, "1f1b", FREE)
    assert whole.timeline.bubble == pytest.approx(0.0)
    assert whole.step == pytest.approx(whole.bound)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda f: pipeline(f, ["features.7"], 4, "1f1b", FREE), "no stage can begin at 'features.7' without tearing"),
        (lambda f: pipeline(f, ["avgpool", "features.3"], 4, "1f1b", FREE), "in the order of the layers, got avgpool"),
        (lambda f: pipeline(f, ["avgpool", "avgpool"], 4, "1f1b", FREE), "the cuts must be different"),
        (lambda f: best_cuts(f, 10, 16, "1f1b", FREE), "can be planned in 1 to 9 stages, got 10"),
        (lambda f: best_cuts(f, 0, 16, "1f1b", FREE), "can be planned in 1 to 9 stages, got 0"),
        (lambda f: best_cuts(f, 2, 1, "1f1b", FREE), "at least as many microbatches as stages"),
        (lambda f: best_cuts(f, 2, 4, "1f1b", FREE, 1e6), "no cut into 2 stages keeps within 1,000,000 bytes a device"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_words(call, why):
    with pytest.raises(ValueError, match=re.escape(why) if "(" in why else why):
        call(costs())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_automatic_cut_is_one_that_split_takes(variant):
    model = on_meta(variant)
    side = VARIANTS[variant].image_size
    for stages in (2, 3, 4):
        at = auto_cut(model, stages, (128, 3, side, side))
        assert len(at) == stages - 1
        assert set(at) <= set(candidates(costs(variant)))
        parts = split(model, stages, batch=128)
        assert tuple(part.names[0] for part in parts[1:]) == at


def test_the_automatic_cut_heeds_times_and_memory():
    model = on_meta("merged")
    heavy_end = Given(fc8=dict.fromkeys(DIRECTIONS, 10.0))
    heavy_start = Given(conv1=dict.fromkeys(DIRECTIONS, 15.0))
    shape = (64, 3, 227, 227)
    assert auto_cut(model, 2, shape, times=heavy_start) == ("features.2",)
    assert auto_cut(model, 2, shape, times=heavy_end) == ("classifier.6",)
    held = auto_cut(model, 2, shape, times=heavy_end, memory_limit=0.7e9, dtype=torch.bfloat16)
    assert held == ("classifier.3",)
