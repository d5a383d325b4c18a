"""Several devices of one process beside one that has the whole network."""

from __future__ import annotations

import contextlib

import narrow
import pytest
import torch
from pipeline_cases import Case, one_process, optimizer
from plain import error

from alexnet_triton import use_backend
from alexnet_triton.parallel.pipeline import LocalPipeline, local, split

CLOSE = 1e-5
"""Float32 rounding: sums come in another order."""

VARIANTS = ("merged", "paper", "torchvision", "caffe")
SCHEDULES = ("gpipe", "1f1b", "zero-bubble")
TWO = ("cpu", "cpu")


def local_of(case, devices=TWO, **more):
    told = {"at": case.at, "schedule": case.schedule, "microbatches": case.microbatches, "image_size": narrow.SIZE}
    return LocalPipeline(case.network(), devices, **{**told, **more})


def check(case, pipeline=None, limit=CLOSE):
    """That a pipeline takes the case's steps as one process does."""
    pipeline = pipeline or local_of(case)
    parameters = {name: p for stage in pipeline.stages for name, p in stage.named_parameters()}
    rule = optimizer(torch.nn.ModuleList(pipeline.stages))
    counted, gradients, state, (generator,) = one_process(case)
    torch.set_rng_state(torch.Generator().manual_seed(50).get_state())
    for number, (images, labels) in enumerate(case.batches()):
        rule.zero_grad()
        with use_backend(case.backend), torch.autocast("cpu", torch.bfloat16, enabled=case.half):
            loss = pipeline.step(images, labels)
        assert loss.dtype == torch.float32
        assert error(loss, counted[number][0]) < limit
        found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        assert narrow.worst(found, gradients[number]) < (limit if number == 0 else 100 * limit)  # a ReLU may turn over
        rule.step()
    assert narrow.worst({name: p.detach() for name, p in parameters.items()}, state) < limit
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_takes_the_steps_of_the_whole_network(schedule):
    check(Case(schedule=schedule))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_does(variant):
    check(Case(variant, images=(10,)))


@pytest.mark.parametrize("cut", ["conv2", "features.1", "features.7", "avgpool", "fc6", "classifier.2", "fc8"])
def test_every_cut_does(cut):
    check(Case(at=(cut,), images=(10,)))


def test_any_number_of_images_in_any_number_of_microbatches_does():
    for batch in (1, 5, 7, 10):
        for microbatches in (2, 3, 8):
            check(Case("merged", microbatches=microbatches, images=(batch,), schedule=SCHEDULES[batch % 2]))


def test_three_stages_with_frozen_layers_and_in_half_precision_do():
    cuts = ("features.4", "fc6")
    three = ("cpu",) * 3
    for frozen in (("features",), ("classifier",), ("features.0", "classifier.4")):
        case = Case(at=cuts, frozen=frozen, images=(10, 7))
        check(case, local_of(case, three))
    case = Case(at=cuts, half=True, images=(10,))
    check(case, local_of(case, three), limit=0.02)


def test_no_images_give_no_loss_and_gradients_of_zeros():
    pipeline = local_of(Case())
    assert pipeline.step(*narrow.batch(0)) == 0
    assert not any(p.grad.any() for p in pipeline.parameters())
    assert pipeline(narrow.batch(0)[0]).shape == (0, 4)


def test_stages_that_were_cut_before_are_taken_too():
    case = Case()
    model = case.network()
    pipeline = LocalPipeline(split(model, at=case.at), TWO, microbatches=3, image_size=narrow.SIZE)
    check(case, pipeline)
    images, _ = narrow.batch(10)
    assert all(not layer.training for stage in pipeline.eval().stages for layer in stage.modules())
    logits = pipeline(images)
    assert not logits.requires_grad
    assert error(logits, model.eval()(images)) < CLOSE
    assert pipeline.train().stages[1].classifier[6].training


@pytest.mark.parametrize(
    ("devices", "told", "said"),
    [
        (("cpu", "cpu:x"), {}, "device 'cpu:x' cannot be used here"),
        (("cpu", "meta"), {}, "device 'meta' cannot be used here"),
        (("cpu", "cuda:7"), {}, "device 'cuda:7' cannot be used here"),
        (("cpu",) * 3, {}, "1 cuts make 2 stages, got stages=3"),
        ((), {}, "a pipeline needs at least 1 stage, got 0"),
        (TWO, {"microbatches": 1}, "1f1b needs at least as many microbatches as stages, got 1 for 2"),
    ],
)
def test_wrong_devices_are_refused_in_a_sentence(devices, told, said):
    with pytest.raises(ValueError, match=said):
        local_of(Case(), devices, **told)


def test_a_step_without_gradients_is_refused_in_a_sentence():
    pipeline = local_of(Case())
    with torch.no_grad(), pytest.raises(RuntimeError, match="a step needs gradients"):
        pipeline.step(*narrow.batch(3))


def test_wrong_stages_and_labels_are_refused_in_a_sentence():
    stages = split(narrow.network(), at="fc6")
    with pytest.raises(ValueError, match="each stage needs a device, got 2 stages and 1 devices"):
        LocalPipeline(stages, ["cpu"], image_size=narrow.SIZE)
    images, labels = narrow.batch(3)
    with pytest.raises(ValueError, match="each image needs a label, got 3 images and 2 labels"):
        LocalPipeline(stages, TWO, image_size=narrow.SIZE).step(images, labels[:2])


# --- two GPUs, stood in for by the CPU --------------------------------------------------------------------------------


class Stream:
    """Of `torch.cuda`: writes down who waits for whom."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        return f"what {self.name} has done"

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")


@pytest.fixture
def two_gpus(monkeypatch):
    """What is done on the streams of two GPUs, in order."""
    log, made = [], []
    working = {index: Stream(log, f"GPU {index}") for index in (0, 1)}
    current = dict(working)

    def stream(device):
        made.append(Stream(log, f"side {len(made)} of GPU {device.index}"))
        made[-1].index = device.index
        return made[-1]

    @contextlib.contextmanager
    def on(stream):
        before, current[stream.index] = current[stream.index], stream
        yield
        current[stream.index] = before

    def to(tensor, *told, **how):
        if "non_blocking" in how:
            log.append(f"copy to GPU {told[0].index} on {current[0].name} and {current[1].name}")
        return real(tensor, *told, **how)

    real = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(f"kept for {stream.name}"))
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[device.index])
    monkeypatch.setattr(local, "GPU", "cpu")
    monkeypatch.setattr(local, "_usable", torch.device)
    return log


def test_copies_between_gpus_run_beside_their_work(two_gpus):
    link = local._Link(torch.device("cpu:0"), torch.device("cpu:1"))
    sent = link.send(torch.ones(2, requires_grad=True))
    assert two_gpus == [
        "side 0 of GPU 0 waits for GPU 0",
        "copy to GPU 1 on side 0 of GPU 0 and side 1 of GPU 1",
        "kept for side 0 of GPU 0",
    ]
    two_gpus.clear()
    assert sent.received().requires_grad
    assert two_gpus == ["GPU 1 waits for what side 1 of GPU 1 has done", "kept for GPU 1"]


def test_two_gpus_take_the_steps_of_the_whole_network(two_gpus):
    case = Case(microbatches=2, images=(10, 7))
    check(case, local_of(case, ("cpu:0", "cpu:1")))
    sides = [done for done in two_gpus if "copy" in done and "side" in done]
    onwards, back = (
        "copy to GPU 1 on side 0 of GPU 0 and side 1 of GPU 1",
        "copy to GPU 0 on side 3 of GPU 0 and side 2 of GPU 1",
    )
    assert sorted(sides) == sorted([onwards, back] * 4)
    assert sum(done.startswith("GPU") for done in two_gpus) == len(sides)
