"""A pipeline's processes beside one process that has the whole network and the whole batch."""

from __future__ import annotations

from itertools import pairwise

import groups
import narrow
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pipeline_cases import CPU, Case, one_process, optimizer
from plain import error
from torch import nn

from alexnet_triton import use_backend
from alexnet_triton.parallel.pipeline.engine import PipelineEngine
from alexnet_triton.parallel.processes.world import World

CLOSE = 1e-5
"""Float32 rounding: sums come in another order."""


def engine_of(case, rank, size, stages, **more):
    world = World(CPU, rank, size, stages)
    told = {"at": case.at, "schedule": case.schedule, "microbatches": case.microbatches, "batch": case.batch}
    return PipelineEngine(case.network(), world, image_size=narrow.SIZE, **{**told, **more})


def steps(engine, case):
    """The steps by a pipeline, as `one_process`."""
    world = engine.world
    rule = optimizer(engine.module)
    torch.set_rng_state(torch.Generator().manual_seed(50 + engine.stream).get_state())
    counted, gradients = [], []
    engine.train()
    for images, labels in case.batches():
        rule.zero_grad()
        images, share = world.share(images), world.share(labels)
        with use_backend(case.backend), torch.autocast("cpu", torch.bfloat16, enabled=case.half):
            sums = engine.step(images if engine.reads else None, share, len(labels))
        dist.all_reduce(sums)
        counted.append(sums)
        gradients.append({name: grad.clone() for name, grad in narrow.gradients(engine.module).items()})
        if case.clip is not None:
            engine.clip_gradients(case.clip)
        rule.step()
    return counted, gradients, engine.module.state_dict(), torch.get_rng_state()


def compare(rank, size, stages, cases):
    """For each case the worst errors of this process, and whether its generator ended in one process's state."""
    found = []
    for case in cases:
        engine = engine_of(case, rank, size, stages)
        counted, gradients, parameters, state = steps(engine, case)
        counted_one, gradients_one, parameters_one, states = one_process(case, engine.world.replicas)
        own = [{name: grads[name] for name in grads if name in parameters} for grads in gradients_one]
        found.append(
            {
                "loss and right": max(map(error, counted, counted_one)),
                "gradients": narrow.worst(gradients[0], own[0]),
                "later gradients": 0.01 * max(map(narrow.worst, gradients, own)),  # a ReLU may turn over
                "parameters": narrow.worst(parameters, {name: parameters_one[name] for name in parameters}),
                "state": torch.equal(state, states[engine.world.replica]),
            }
        )
    return found


def check(cases, processes=2, stages=2, limit=CLOSE, seconds=60):
    results = groups.run(compare, processes, stages, cases, seconds=seconds)
    for number, case in enumerate(cases):
        for rank, result in enumerate(results):
            state = result[number].pop("state")
            assert state, (rank, case)
            assert max(result[number].values()) < limit, (rank, case, result[number])


VARIANTS = ("merged", "paper", "torchvision", "caffe")
SCHEDULES = ("gpipe", "1f1b", "zero-bubble")
CUTS = ("conv2", "features.1", "features.2", "features.7", "features.9", "avgpool", "fc6", "classifier.2", "fc8")


# --- two processes ----------------------------------------------------------------------------------------------------


def test_every_variant_schedule_and_cut_takes_the_steps_of_one_process():
    cases = [Case(variant, schedule=schedule) for variant in VARIANTS for schedule in SCHEDULES]
    cases.append(Case(at="auto", images=(10,)))
    check([*cases, *(Case(at=(cut,), schedule=SCHEDULES[n % 3], images=(10,)) for n, cut in enumerate(CUTS))])


def test_any_number_of_images_in_any_number_of_microbatches():
    """pytorch#126600: with uneven microbatches, gradients must be weighted by their images."""
    check(
        [
            Case("torchvision", schedule=schedule, microbatches=number, batch=batch, images=(batch,))
            for batch in (1, 5, 7, 10)
            for number in range(1, 9)
            for schedule in ["gpipe" if number == 1 else SCHEDULES[(number + batch) % 3]]
            if schedule != "zero-bubble" or number % 2 == 0
        ]
    )


def test_a_last_partial_batch_takes_what_microbatches_the_schedule_demands():
    check([Case(schedule=schedule, batch=8, microbatches=8, images=(8, 1, 3, 5)) for schedule in SCHEDULES])


def test_frozen_parts_take_no_gradient_and_stop_none():
    cases = [
        Case(frozen=frozen, at=at, schedule=schedule, images=(10, 7))
        for frozen, at in ((("features",), ("avgpool",)), (("features",), ("fc7",)), (("classifier",), ("avgpool",)))
        for schedule in ("1f1b", "zero-bubble")
    ]
    check([*cases, Case(frozen=("features.0", "classifier.4"))])


def test_autocast_gives_the_bfloat16_of_one_process():
    cuts = zip(SCHEDULES, ("conv3", "fc6", "fc7"), strict=True)
    cases = [Case(half=True, schedule=schedule, at=(cut,), images=(10,)) for schedule, cut in cuts]
    check([*cases, Case(half=True, images=(10,), change=double_gradients_under_autocast)], limit=0.02)


def double_gradients_under_autocast(model):
    """Which is for forward passes."""
    model.classifier[6].register_full_backward_hook(
        lambda layer, inputs, outputs: (inputs[0] * (1 + torch.is_autocast_enabled("cpu")),)
    )


def test_layers_of_a_user_take_the_steps_of_one_process():
    check(
        [Case(change=change, schedule="zero-bubble", at=("features.8",)) for change in (share_weights, watch_gradients)]
    )


def share_weights(model):
    """Two uses of a parameter, by a layer that the fused ops do not know."""
    model.classifier[3] = Twice(model.classifier[4].in_features)


def watch_gradients(model):
    """A hook that changes what comes back."""
    model.classifier[6].register_full_backward_hook(lambda layer, inputs, outputs: (2 * inputs[0],))


def watch_pooled_gradients(model):
    model.avgpool.register_full_backward_hook(lambda layer, inputs, outputs: (2 * inputs[0],))


class Twice(nn.Module):
    """x -> tanh(A tanh(A x))."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return self.linear(self.linear(x).tanh()).tanh()


def channels_last(model):
    model.to(memory_format=torch.channels_last)


def test_channels_last_maps_arrive_as_they_were_sent():
    check([Case(change=channels_last, schedule=schedule, images=(10,)) for schedule in SCHEDULES])


def test_fused_ops_run_in_a_pipeline():
    check([Case(backend="triton", schedule="zero-bubble", microbatches=2, batch=2, images=(2,))], seconds=120)


# --- four processes ---------------------------------------------------------------------------------------------------


def test_four_stages_in_four_processes():
    cuts = ("features.2", "features.8", "fc6")
    check([Case(at=cuts, schedule=schedule, dropout=0.3, images=(10, 3)) for schedule in SCHEDULES], 4, 4)


def test_replicas_of_a_pipeline_share_a_batch_that_may_leave_one_empty():
    check([Case("caffe", batch=5, images=(10, 7, 1), schedule=schedule) for schedule in SCHEDULES], processes=4)


def test_clipped_gradients_are_those_of_one_process():
    check([Case(clip=0.5), Case(clip=0.5, change=channels_last)], processes=4)


# --- beside the steps -------------------------------------------------------------------------------------------------


def in_two_replicas(rank, size):
    """What else a pipeline of two stages does, by name."""
    case = Case(microbatches=3, batch=7)
    engine, model = engine_of(case, rank, size, 2, trace=True), case.network()
    found = {"states": (engine.stream, engine.streams, engine.reads, engine.module.names[0])}
    evaluate(engine, model, found)
    collect(engine, model, found)
    accumulate(engine, model, found)
    return found


def evaluate(engine, model, found):
    """Logits of a batch, of none, and of more than a step's."""
    engine.train(False)
    model.eval()
    images, _ = narrow.batch(15)
    with torch.no_grad():
        pairs = [(engine.logits(images[:count], count), model(images[:count])) for count in (7, 0, 15)]
    found["logits"] = [None if logits is None else error(logits, expected) for logits, expected in pairs]
    found["in training"] = [layer for layer in engine.model.modules() if layer.training]


def collect(engine, model, found):
    """Parameters put together, and whole tensors taken apart and put together but for each stage's first."""
    whole = engine.whole(dict(engine.module.named_parameters()))
    found["whole"] = list(whole), all(torch.equal(whole[name], p) for name, p in model.named_parameters() if whole)
    velocities = {name: torch.rand(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    part = engine.part(velocities)
    found["part"] = part.keys() == dict(engine.module.named_parameters()).keys()
    back = engine.whole({name: part[name] for name in list(part)[1:]})
    found["back"] = {name: torch.equal(back[name], velocities[name]) for name in back}


def accumulate(engine, model, found):
    """Steps on gradients that are there already, and with other parameters frozen than before."""
    images, labels = narrow.batch(7)
    world, ours = engine.world, dict(engine.module.named_parameters())

    def gradients(start):
        for parameter in ours.values():
            parameter.grad = None if start is None else torch.full_like(parameter, start)
        engine.step(world.share(images), world.share(labels), 7)
        return narrow.gradients(engine.module)

    def expected():
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        return {name: gradient for name, gradient in narrow.gradients(model).items() if name in ours}

    for freeze in (True, False):
        for network in (engine.model, model):
            network.features.requires_grad_(not freeze)
        found["frozen" if freeze else "thawed"] = narrow.worst(gradients(None), expected())
    added = {name: gradient - 1 for name, gradient in gradients(1.0).items()}
    found["added"] = narrow.worst(added, expected())
    found["blocks"] = engine.trace_blocks()


def test_an_engine_evaluates_collects_adds_up_and_traces():
    results = groups.run(in_two_replicas, 4)
    states = [(0, True, "features.0"), (0, False, "features.6"), (1, True, "features.0"), (1, False, "features.6")]
    assert [result["states"] for result in results] == [(replica, 2, *rest) for replica, *rest in states]
    names = list(dict(narrow.network().named_parameters()))
    some = dict.fromkeys((name for name in names if name not in ("features.0.weight", "features.6.weight")), True)
    for rank, result in enumerate(results):
        leads, last = rank == 0, rank % 2
        assert [logits is None for logits in result["logits"]] == [not last] * 3
        assert not last or max(result["logits"]) < CLOSE
        assert not result["in training"]
        assert result["whole"] == (names if leads else [], True)
        assert result["part"]
        assert result["back"] == (some if leads else {})
        assert max(result["added"], result["frozen"], result["thawed"]) < CLOSE, result
    assert not any(result["blocks"] for result in results[1:])
    blocks = results[0]["blocks"]
    works = [(stage, stage, kind, i) for stage in range(2) for kind in "BF" for i in range(2)]
    assert sorted(block[:4] for block in blocks) == works
    begun, ended = ({block[1:4]: block[at] for block in blocks} for at in (4, 5))
    for i in range(2):
        times = [(begun[work], ended[work]) for work in ((0, "F", i), (1, "F", i), (1, "B", i), (0, "B", i))]
        assert sorted(times) == times
        assert all(end <= start for (_, end), (start, _) in pairwise(times))


# --- errors -----------------------------------------------------------------------------------------------------------


def share_a_parameter(model):
    model.features[10].weight = model.features[8].weight


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"microbatches": 1}, "1f1b needs at least as many microbatches as stages, got 1 for 2"),
        ({"schedule": "fast"}, "unknown schedule 'fast'"),
        ({"batch": 0}, "at least 1 image, got batch=0"),
        ({"at": ("features.6", "fc6")}, "2 cuts make 3 stages, got stages=2"),
        ({"at": "conv9"}, "no stage can begin at 'conv9'"),
        ({"stages": 40, "microbatches": 40}, "can be cut into 1 to 21 stages, one a layer, got stages=40"),
        ({"image_size": 20}, "needs images of at least 67x67 pixels, got 20x20"),
        ({"change": share_a_parameter, "at": "features.9"}, "stages 0 and 1 share the parameter features.10.weight"),
        ({"change": lambda model: nn.Sequential(model)}, "only an AlexNet can be cut into stages, got Sequential"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_a_sentence(told, said):
    told = dict(told)
    stages, change = told.pop("stages", 2), told.pop("change", lambda model: None)
    model = narrow.network()
    told = {"batch": 8, "at": "features.6", "image_size": narrow.SIZE, **told}
    with pytest.raises(ValueError, match=said):
        PipelineEngine(change(model) or model, World(CPU, 0, stages, stages), **told)


def refused(rank, size):
    """What the process of the first stage says to wrong images."""
    engine = engine_of(Case(), rank, size, 1, at=())
    images, labels = narrow.batch(3)
    said = []

    def step(*told):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            engine.step(*told, 3)
        said.append(str(caught.value))

    step(None, labels)
    step(images[:2], labels)
    step(images.to("meta"), labels)
    step(images[..., :66], labels)
    engine.module.features[3].to("meta")
    step(images, labels)
    with pytest.raises(RuntimeError) as caught:
        engine.trace_blocks()
    return [*said, str(caught.value)]


def test_wrong_images_and_stages_on_the_wrong_device_are_refused_in_a_sentence():
    (said,) = groups.run(refused, 1)
    assert [sentence.split(":")[0] for sentence in said] == [
        "the process of the first stage must be given the images, got None",
        "each image needs a label, got 2 images and 3 labels",
        "the first stage computes on cpu, got images on meta",
        "the pipeline was made for images of 67x67 pixels, got (3, 3, 67, 66)",
        "stage 0 computes on cpu, got its features.3.weight on meta",
        "no times of a step were noted",
    ]
