"""The model of training on many GPUs: its formulas, the published runs, the page that shows it."""

import contextlib
import io
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from alexnet_triton import AlexNet
from alexnet_triton.bench import cards
from alexnet_triton.cli import _parser, main, scale
from alexnet_triton.info import layer_table
from alexnet_triton.parallel import links
from alexnet_triton.parallel.scaling import (
    CARDS,
    LAYOUTS,
    LINKS,
    Card,
    Cluster,
    Job,
    Link,
    alone,
    estimate,
    machines,
    model,
    network,
    published,
)
from alexnet_triton.parallel.scaling.table import duration, waits_for

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"

H100 = Cluster(CARDS["h100"], LINKS["nvlink4"], network(400))
SLOW = Cluster(CARDS["h100"], LINKS["pcie3"], network(10))
ARITHMETIC = Card("no memory's limit", 1e12, 1e30)
BYTES = Card("no arithmetic's limit", 1e30, 1e12)


def cluster(card=ARITHMETIC, gpus_per_machine=8, inside=1e9, between=1e9, latency=0.0):
    """One whose links reach so many bytes a second."""
    links = [Link("", rate, latency) for rate in (inside, between)]
    return Cluster(card, *links, gpus_per_machine)


# --- collectives ------------------------------------------------------------------------------------------------------


def test_an_all_reduce_in_a_ring_is_the_textbooks():
    links = cluster(inside=2e9, latency=1e-3)
    for n in (1, 2, 3, 8):
        assert links.all_reduce(6e9, n) == pytest.approx(2 * (n - 1) / n * 6e9 / 2e9 + 2 * (n - 1) * 1e-3)
        assert links.gather(6e9, n) == pytest.approx(links.all_reduce(6e9, n) / 2)


def test_between_machines_a_network_carries_every_byte_twice_in_and_out():
    links = cluster(inside=1e15, between=1e9)
    for count in (2, 4, 128):
        assert links.all_reduce(1e9, 8 * count) == pytest.approx(2 * (count - 1) / count, rel=1e-4)


def test_levels_are_taken_where_one_ring_through_all_has_too_many_steps():
    links = cluster(inside=1e9, between=1e9, latency=1e-3)
    one_ring = 2 * (1023 / 1024 * 1e6 / 1e9 + 1023 * 1e-3)
    in_levels = 2 * 7 * (1e6 / 8 / 1e9 + 1e-3) + 2 * 1e6 / 1e9 + 2 * 7 * 1e-3  # trees of 128 machines
    assert links.all_reduce(1e6, 1024) == pytest.approx(in_levels)
    assert in_levels < one_ring / 10


def test_one_ring_through_all_is_taken_where_the_links_are_alike_and_bytes_many():
    links = cluster(inside=1e9, between=1e9)
    assert links.all_reduce(1e9, 16) == pytest.approx(2 * 15 / 16)


def test_trees_beat_rings_of_many_machines_for_few_bytes_alone():
    links = cluster(gpus_per_machine=1, latency=1e-3)
    assert links.all_reduce(8, 256) == pytest.approx(2 * 8 * 1e-3, rel=1e-4)
    assert links.all_reduce(1e12, 256) == pytest.approx(2 * 255 / 256 * 1e3 + 2 * 255e-3)


def test_a_copy_in_parts_shares_the_network_and_not_the_links_inside():
    links = cluster(inside=1e9, between=1e9)
    assert links.all_reduce(8e9, 8, parts=8) == 0
    assert links.all_reduce(8e9, 8, parts=2) == pytest.approx(2 * 3 / 4 * 4)
    assert links.all_reduce(8e9, 8, parts=2, largest=6e9) == pytest.approx(2 * 3 / 4 * 6)
    assert links.all_reduce(8e9, 16, parts=8) == pytest.approx(2 * 1 / 2 * 8)
    assert links.all_reduce(8e9, 16, parts=2) == pytest.approx(2 * 3 / 4 * 4 + 2 * 1 / 2 * 8)
    assert links.all_reduce(8e9, 64, parts=32) == pytest.approx(2 * 1 / 2 * 8 * 8 / 32)
    assert links.all_reduce(8e9, 64, parts=64) == 0


def test_gathering_over_machines_takes_the_network_once():
    assert cluster(inside=1e15).gather(1e9, 16) == pytest.approx(1 / 2, rel=1e-4)
    assert cluster(inside=1e9, between=1e15).gather(8e9, 16) == pytest.approx(7, rel=1e-4)


# --- computing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["merged", "paper", "torchvision", "caffe"])
def test_computing_is_three_products_a_layer_but_for_the_first(variant):
    rows = layer_table(variant, batch=32)
    products = 3 * sum(row.multiply_adds for row in rows) - rows[0].multiply_adds
    e = alone(Job(variant, 32, "float32"), cluster(ARITHMETIC))
    assert e.computing == pytest.approx(2 * products / (machines.PRODUCT_SHARE * 1e12))


def test_a_layer_without_arithmetic_moves_what_it_reads_writes_and_keeps():
    rows = {row.name or row.module: row for row in layer_table("torchvision", batch=2)}
    layers = {layer.name: layer for layer in model.layers("torchvision")}
    names = "conv1 features.2 conv2 features.5 conv3 conv4 conv5 features.12 fc6 fc7 fc8"
    assert list(layers) == names.split()
    device = model.Device(Job("torchvision", 2, "float16"), cluster(BYTES))
    before = {
        "conv1": 2 * 3 * 224 * 224,
        "features.2": math.prod(rows["conv1"].output),
        "fc6": 2 * 9216,
        "fc7": 2 * 4096,
    }
    for name, inputs in before.items():
        moved = 2 * (inputs + math.prod(rows[name].output) + rows[name].parameters)
        assert device.forward(layers[name], 2) == pytest.approx(moved / (machines.COPY_SHARE * 1e12))
    assert device.backward(layers["conv1"], 2) == device.forward(layers["conv1"], 2)
    assert device.backward(layers["features.2"], 2) == device.forward(layers["features.2"], 2)
    assert device.backward(layers["fc6"], 2) == 2 * device.forward(layers["fc6"], 2)


def test_an_update_moves_20_bytes_for_each_parameter():
    device = model.Device(Job("torchvision", 2), cluster(BYTES))
    parameters = sum(row.parameters for row in layer_table("torchvision"))
    assert alone(device.job, cluster(BYTES)).computing == pytest.approx(
        device.both(device.layers, 2) + 20 * parameters / (machines.COPY_SHARE * 1e12)
    )


def test_normalisation_is_a_layer_of_its_own():
    names = [layer.name for layer in model.layers("paper")]
    assert names[:4] == ["conv1", "features.1.1", "features.2", "conv2"]


def test_the_speed_of_one_gpu_can_be_given():
    given = Job("torchvision", 128, one_gpu=1234.5)
    assert alone(given, H100).images_per_second == pytest.approx(1234.5)
    estimated = Job("torchvision", 128)
    speed = alone(estimated, H100).images_per_second
    e = estimate("hybrid", 8, replace(estimated, one_gpu=speed), H100)
    assert e.images_per_second == pytest.approx(estimate("hybrid", 8, estimated, H100).images_per_second)


def test_half_precision_doubles_nothing_but_speed_where_a_card_has_no_such_products():
    p40, a100 = CARDS["p40"], CARDS["a100"]
    assert p40.products("float16") == p40.products("float32")
    assert a100.products("bfloat16") == pytest.approx(16 * a100.products("float32"))


@pytest.mark.parametrize("name", ["a100", "h100", "h200"])
def test_cards_have_the_data_sheets_that_predict_has(name):
    card, other = CARDS[name], cards.CARDS[name]
    assert card.float32 == pytest.approx(other.tflops["float32"] * 1e12)
    assert card.half * cards.PRODUCT_SHARE == pytest.approx(other.tflops["bfloat16"] * 1e12)
    assert card.memory * cards.COPY_SHARE == pytest.approx(other.copy_gbs * 1e9)


# --- hiding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["merged", "paper", "torchvision", "caffe"])
def test_gradients_travel_in_the_buckets_of_distributed_data_parallel(variant, dtype):
    network = AlexNet(variant=variant, device="meta", dtype=dtype)
    parameters = list(network.parameters())[::-1]
    limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, 25 * 2**20]
    buckets, _ = dist._compute_bucket_assignment_by_size(parameters, limits)
    expected = [sum(parameters[i].numel() * dtype.itemsize for i in bucket) for bucket in buckets]
    device = model.Device(Job(variant, 1, str(dtype).removeprefix("torch.")), H100)
    sizes = []
    model.left_over(
        [(0.0, device.gradients([layer])) for layer in reversed(device.layers)], lambda x: sizes.append(x) or 0
    )
    assert sizes == expected
    assert sum(sizes[:3]) / sum(sizes) > 0.93


def test_what_travels_is_hidden_behind_what_is_still_computed():
    mega = 2**20
    assert model.left_over([(1.0, mega), (5.0, 0.0)], lambda size: 3.0) == 0
    assert model.left_over([(1.0, mega), (2.0, 0.0)], lambda size: 3.0) == 1.0
    assert model.left_over([(1.0, mega), (0.5, 25 * mega), (4.0, 0.0)], lambda size: 3.0) == 1.5  # one after the other
    assert (
        model.left_over([(1.0, mega), (1.0, mega), (1.0, mega)], lambda size: size / mega) == 2.0
    )  # two in one bucket
    assert model.left_over([(4.0, 7.0)], lambda size: size, taken=3.0) == 7.0
    assert model.left_over([(4.0, 7.0)], lambda size: size, taken=6.0) == 9.0
    assert model.left_over([(4.0, 0.0)], lambda size: pytest.fail("nothing to send")) == 0


def test_more_images_hide_more_of_the_gradients():
    waiting = [estimate("data", 64, Job("torchvision", batch), H100).waiting for batch in (32, 128, 1024)]
    assert waiting[0] > waiting[1] > waiting[2]
    convolutions = model.Device(Job("torchvision"), H100).convolutions
    last = model.Device(Job("torchvision"), H100).gradients(convolutions)
    assert waiting[2] >= H100.all_reduce(last, 64)  # nothing is left to hide those behind


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_on_one_gpu_nothing_travels_and_nobody_waits():
    job = Job("paper", 16)
    found = {layout: estimate(layout, 1, job, H100) for layout in LAYOUTS if layout != "towers"}
    for layout, e in found.items():
        assert (e.waiting, e.sent, e.machines, e.batch) == (0, 0, 1, 16)
        assert e.step == found["data"].step, layout


def test_data_parallel_sends_244_megabytes_of_gradients_nearly_twice():
    parameters = sum(row.parameters for row in layer_table("paper"))
    for gpus in (2, 8, 1024):
        e = estimate("data", gpus, Job("paper", 128, "float32"), H100)
        assert e.sent == 2 * (gpus - 1) / gpus * 4 * parameters
    assert round(4 * parameters / 1e6) == 244


def test_hybrid_sends_what_the_fully_connected_layers_read_and_the_convolutions_gradients():
    job = Job("torchvision", 16, "float16")
    rows = layer_table("torchvision")
    convolutions = sum(row.parameters for row in rows if row.module.startswith("features"))
    linear = sum(row.parameters for row in rows if row.module.startswith("classifier"))
    numbers = 4 * 16 * (2 * (9216 + 4096 + 4096) + 1000)  # forward all, backward all but the logits
    e = estimate("hybrid", 4, job, H100)
    assert e.sent == pytest.approx(3 / 4 * 2 * numbers + 2 * 3 / 4 * 2 * convolutions)
    in_pairs = estimate("hybrid", 4, job, H100, group=2)
    assert in_pairs.sent == pytest.approx(1 / 2 * numbers + 2 * (3 / 4 * 2 * convolutions + 1 / 2 * 2 * linear / 2))
    links = cluster(inside=1e3)
    assert estimate("hybrid", 4, job, links).waiting == pytest.approx(e.sent / 1e3, rel=1e-4)


def test_hybrid_computes_a_share_of_every_image_and_updates_a_share():
    job = Job("torchvision", 16, "float32")
    one, eight = alone(job, cluster()), estimate("hybrid", 8, job, cluster())
    assert eight.computing == pytest.approx(one.computing)  # all arithmetic
    job, moves = Job("torchvision", 1, "float32"), cluster(BYTES)
    assert estimate("hybrid", 8, job, moves).computing < alone(job, moves).computing / 5  # all parameters


def test_hybrid_wins_with_few_images_and_loses_with_many_gpus():
    def best(gpus, batch, where):
        found = [estimate(layout, gpus, Job("torchvision", batch), where) for layout in ("data", "hybrid")]
        return min(found, key=lambda e: e.step).layout

    assert best(8, 32, SLOW) == "hybrid"
    assert best(8, 1024, H100) == "data"
    assert best(1024, 128, H100) == "data"


def test_a_pipelines_bubble_is_that_of_its_stages():
    images = 64
    job, where = Job("torchvision", images // 2, "float32"), cluster(inside=1e30)
    device = model.Device(job, where)
    whole = device.both(device.layers, images)
    assert estimate("pipeline", 2, job, where, microbatches=1).computing == pytest.approx(whole)
    slowest = min(
        max(device.both(device.layers[:cut], images), device.both(device.layers[cut:], images))
        for cut, layer in enumerate(device.layers)
        if cut and layer.parameters
    )
    for parts in (2, 8, 64):
        expected = (whole + (parts - 1) * slowest) / parts
        assert estimate("pipeline", 2, job, where, microbatches=parts).computing == pytest.approx(expected)


def test_stages_update_their_parameters_at_the_same_time():
    job, where = Job("torchvision", 1, "float32"), cluster(BYTES, inside=1e30)
    device = model.Device(job, where)
    cuts = [cut for cut, layer in enumerate(device.layers) if cut and layer.parameters]
    updates = [max(device.update(device.layers[:cut]), device.update(device.layers[cut:])) for cut in cuts]
    e = estimate("pipeline", 2, job, where, microbatches=1)
    assert e.computing == pytest.approx(device.both(device.layers, 2) + min(updates))


def test_a_link_that_is_slower_than_the_stages_sets_a_pipelines_pace():
    smallest = 256 * 4096 * 4  # the hidden layers' outputs
    e = estimate("pipeline", 2, Job("torchvision", 128, "float32"), cluster(inside=1e3), microbatches=8)
    assert e.sent == smallest
    assert e.computing == pytest.approx(7 / 8 * smallest / 1e3, rel=0.01)
    assert e.waiting == pytest.approx(2 / 8 * smallest / 1e3)  # to the second stage at first, and back at last


def test_a_pipeline_reads_its_parameters_for_every_microbatch():
    job, where = Job("torchvision", 1, "float32"), cluster(BYTES, inside=1e30)
    few, many = (estimate("pipeline", 2, job, where, microbatches=parts).computing for parts in (1, 2))
    fc6 = next(row.parameters for row in layer_table("torchvision") if row.name == "fc6")
    assert many - few > 3 * 4 * fc6 / where.card.copies


def test_one_pair_sends_a_map_and_many_pairs_their_gradients_too():
    job = Job("torchvision", 128, "float32")
    crossing = {256 * layer.inputs * 4 for layer in model.layers("torchvision") if layer.parameters}
    pair = estimate("pipeline", 2, job, SLOW)
    assert pair.sent in crossing
    assert pair.waiting < 0.1 * pair.step
    pairs = estimate("pipeline", 4, job, SLOW)
    assert pairs.sent > pair.sent
    assert pairs.waiting > 10 * pair.waiting


def test_a_pair_on_a_slow_network_beats_two_copies():
    where = Cluster(CARDS["v100"], LINKS["nvlink2"], network(10), gpus_per_machine=1)
    job = Job("torchvision", 128)
    pipeline, data = (estimate(layout, 2, job, where).images_per_second for layout in ("pipeline", "data"))
    assert pipeline > 2 * data


def test_towers_gather_around_conv3_and_the_fully_connected_layers():
    job = Job("paper", 64, "float32")
    e = estimate("towers", 2, job, cluster(inside=1e9))
    numbers = 128 * (2 * (256 * 13 * 13 + 9216 + 4096 + 4096) + 1000)
    assert e.sent == pytest.approx(4 * numbers / 2)
    assert e.waiting == pytest.approx(4 * numbers / 2 / 1e9)
    assert e.computing == pytest.approx(alone(replace(job, batch=64), cluster()).computing)
    gradients = 4 * sum(row.parameters for row in layer_table("paper"))
    two_pairs = estimate("towers", 4, job, cluster(inside=1e9))
    assert two_pairs.sent - e.sent == pytest.approx(gradients / 2)
    assert two_pairs.waiting - e.waiting == pytest.approx(gradients / 2 / 1e9)


# --- a step -----------------------------------------------------------------------------------------------------------


def test_a_machine_that_reads_slowly_sets_the_pace():
    job = Job("torchvision", 128)
    free = estimate("data", 64, job, H100)
    slow = estimate("data", 64, job, replace(H100, read=1e9))
    assert slow.images_per_second == pytest.approx(8 * 1e9 / (3 * 256 * 256))
    assert (waits_for(free), waits_for(slow), waits_for(alone(job, H100))) == ("links", "images", "")
    assert free.images_of_a_machine == 8 * 128 * 3 * 256 * 256
    assert estimate("data", 64, job, replace(H100, read=1e15)).step == free.step


def test_epochs_take_their_images_time():
    e = alone(Job("torchvision", 128), H100)
    assert e.seconds(90) == pytest.approx(90 * 1_281_167 / e.images_per_second)
    assert e.seconds(2, images=500) == pytest.approx(1000 / e.images_per_second)


def test_a_better_network_never_costs():
    for layout in ("data", "pipeline", "hybrid"):
        steps = [estimate(layout, 64, Job(), replace(H100, network=network(g))).step for g in (10, 100, 400, 3200)]
        assert steps == sorted(steps, reverse=True)
        assert steps[0] > 2 * steps[-1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: estimate("ring", 2, Job(), H100),
            "unknown layout 'ring': choose one of data, pipeline, hybrid, towers",
        ),
        (lambda: estimate("data", 0, Job(), H100), "at least 1 GPU, got 0"),
        (lambda: estimate("data", 12, Job(), H100), "12 GPUs do not fill machines of 8: take a multiple, or at most 8"),
        (lambda: estimate("pipeline", 3, Job(), H100), "an even number of GPUs, got 3"),
        (lambda: estimate("pipeline", 2, Job(batch=2), H100), "4 images of a pair make 1 to 4 microbatches, got 8"),
        (lambda: estimate("hybrid", 8, Job(), H100, group=3), "groups of 3 do not divide 8 GPUs"),
        (lambda: estimate("hybrid", 48, Job(), H100, group=12), "groups of 12 do not divide 48 GPUs, 8 a machine"),
        (lambda: estimate("towers", 2, Job(), H100), "towers are of variant='paper', got 'merged'"),
        (lambda: estimate("towers", 3, Job("paper"), H100), "two towers need an even number of GPUs, got 3"),
        (lambda: Job("vgg"), "unknown variant 'vgg': choose one of merged, paper"),
        (lambda: Job(dtype="int8"), "unknown dtype 'int8': choose one of float32"),
        (lambda: Job(batch=0), "at least 1 image of a step, got a batch of 0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# --- published runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", published.HELD_AGAINST, ids=lambda run: f"{run.name}-{run.gpus}")
def test_published_runs_took_one_to_two_times_what_the_model_says(run):
    assert 1 <= run.ratio <= published.FACTOR == 2


def test_the_hybrid_speeds_up_as_in_2014():
    one = published.HYBRID[0]
    for run in published.HYBRID:
        speed_up = one.model.seconds(90) / run.model.seconds(90)
        found = one.seconds / run.seconds
        assert 1 <= speed_up / found <= 1.25
    assert found == pytest.approx(6.25, rel=1e-3)


def test_512_gpus_on_56_gigabits_could_not_send_all_gradients():
    def speed_up(share):
        run = published.sparse(share)
        return run.model.images_per_second / run.job.one_gpu

    assert speed_up(1.0) < 0.6 * published.SPARSE_SPEEDUP
    for share in (0.05, 0.1, 0.15):
        assert 1 / 1.25 <= speed_up(share) / published.SPARSE_SPEEDUP <= 1.25


def test_every_run_says_where_it_is_from_and_what_is_assumed():
    for run in published.RUNS:
        assert re.search(r"NeurIPS 2012|arXiv \d{4}\.\d{5}|arXiv 1404\.5997", run.source)
        assert run.assumed
        assert run.cluster.network.latency == links.NETWORK_LATENCY
        assert run.cluster.inside.latency == links.INSIDE_LATENCY


# --- the command and the page -----------------------------------------------------------------------------------------


def output(*words):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert main(["scale", *words]) == 0
    return text.getvalue()


def filled(page):
    """The page with the output of its `$ alexnet-triton scale` blocks made anew."""

    def made(block):
        return f"```\n$ alexnet-triton scale{block[1]}\n{output(*shlex.split(block[1]))}```"

    return re.sub(r"```\n\$ alexnet-triton scale(.*)\n[^`]*```", made, page)


def test_the_page_shows_what_the_command_prints():
    text = PAGE.read_text()
    assert text.count("$ alexnet-triton scale") >= 5
    assert filled(text) == text, "python tests/test_scaling.py writes it anew"


def test_the_pages_commands_are_torchruns_and_trains():
    from torch.distributed.run import get_args_parser

    commands = re.findall(r"^torchrun (.*)$", PAGE.read_text(), re.MULTILINE)
    assert len(commands) >= 7
    for command in commands:
        options = get_args_parser().parse_args(shlex.split(command))
        assert options.module
        assert options.training_script == "alexnet_triton"
        train = _parser().parse_args(options.training_script_args)
        assert train.run is not None


def test_the_pages_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#:]+)\)", PAGE.read_text()):
        assert (PAGE.parent / link).exists(), link


def test_figures_in_the_pages_prose_are_the_models():
    text = PAGE.read_text()
    assert f"feeds {1e10 / model.IMAGE_BYTES:,.0f} images/s" in text
    assert f"as {model.IMAGE_BYTES:,}\nbytes" in text
    one, *_, eight = published.HYBRID
    made = one.model.seconds(1) / eight.model.seconds(1)
    assert f"the hybrid should make {made:.1f}, and made {one.seconds / eight.seconds:.2f} in 2014" in text
    run = published.sparse(1.0)
    plain = estimate("data", 64, replace(run.job, dtype="float32"), run.cluster)
    assert f"where it gives {plain.images_per_second / run.job.one_gpu:.0f}:" in text
    phi = Cluster(Card("Xeon Phi 7250", 6.09e12, 460e9), LINKS["pcie3"], network(100), gpus_per_machine=1)
    assert 24 / (estimate("data", 512, Job("caffe", 64, "float32"), phi).seconds(100) / 60) == pytest.approx(
        3.5, abs=0.1
    )


def test_help_names_what_there_is():
    assert tuple(CARDS) == scale.CARD_NAMES
    assert set(LINKS) == {*scale.LINK_NAMES, "loopback"}
    assert LAYOUTS == scale.LAYOUT_NAMES


def test_options_reach_the_model():
    assert "2,000 images/s of one GPU given" in output("--gpus", "1", "--one-gpu", "2000")
    assert re.search(r"^ *1 .* 2,000 +100%", output("--gpus", "1", "--one-gpu", "2000"), re.MULTILINE)
    assert re.search(r" 5,090 .* 1\.0 GB/s +images$", output("--gpus", "8", "--read", "1"), re.MULTILINE)
    text = output("--gpus", "4", "--card", "p40", "--dtype", "fp32", "--gpus-per-machine", "2", "--network", "56")
    assert "float32, 128 images a GPU" in text
    assert "Tesla P40, 2 a machine on pcie3, 56 Gb/s a machine" in text
    assert "on pcie5" in output("--gpus", "1", "--inside", "pcie5")
    assert output("--gpus", "64", "--layout", "hybrid") != output("--gpus", "64", "--layout", "hybrid", "--group", "8")
    assert output("--gpus", "2", "--layout", "pipeline") != output(
        "--gpus", "2", "--layout", "pipeline", "--microbatches", "2"
    )
    assert "10 epochs" in output("--gpus", "1", "--epochs", "10")
    assert output("--gpus", "8", "--num-classes", "10", "--read", "1e9") != output("--gpus", "8", "--read", "1e9")
    assert " towers " in output("--variant", "paper", "--gpus", "2", "--layout", "towers")


def test_an_odd_number_of_gpus_has_no_pipeline_unless_it_is_asked_for(capsys):
    assert "pipeline" not in output("--gpus", "3")
    assert main(["scale", "--gpus", "3", "--layout", "pipeline"]) == 2
    assert capsys.readouterr().err.startswith("alexnet-triton: a pipeline of two stages needs an even number")


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.0, "1.0 s"), (119, "119.0 s"), (121, "2.0 min"), (7200, "2.0 h"), (475200, "5.5 days")]
)
def test_times_have_the_unit_that_suits_them(seconds, text):
    assert duration(seconds) == text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
