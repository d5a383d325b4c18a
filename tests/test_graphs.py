"""`model.graphed`, through a stand-in for CUDA graphs that replays torch's operators at their addresses."""

import copy
import dataclasses
import gc
import pickle
import threading
import weakref

import pytest
import torch
from fake_cuda import FakeCuda
from torch import nn

from alexnet_triton import VARIANTS, AlexNet, graphs, unfuse
from alexnet_triton.bench import graph_checks
from alexnet_triton.graphs import Graphed

SIZES = 4, 67
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda().install(monkeypatch)


@pytest.fixture(autouse=True)
def thin(monkeypatch):
    """AlexNet with few filters and features."""
    merged = dataclasses.replace(VARIANTS["merged"], filters=(8, 16, 16, 16, 16))
    monkeypatch.setattr("alexnet_triton.model.VARIANTS", {**VARIANTS, "merged": merged})
    monkeypatch.setattr("alexnet_triton.model.FEATURES", 32)


@pytest.fixture
def model():
    return AlexNet(10, init="kaiming").eval()


def pictures(batch=2, **options):
    return torch.randn(batch, 3, 67, 67, **options)


def exact(model, images):
    with torch.no_grad():
        return model(images)


# --- what it answers ------------------------------------------------------------------------------------------


def test_it_answers_what_the_model_does_in_a_tensor_of_the_callers_own(cuda, model):
    graph = model.graphed(pictures())
    first, second = pictures(), pictures()
    kept = graph(first)
    assert torch.equal(graph(second), exact(model, second))
    assert torch.equal(kept, exact(model, first))
    assert not kept.requires_grad
    kept.zero_()
    assert torch.equal(graph(first), exact(model, first))


def test_images_of_any_strides_serve_and_the_example_chooses_the_layout(cuda, model):
    last = pictures().to(memory_format=torch.channels_last)
    grey = pictures()[:, :1].expand(-1, 3, -1, -1)
    for example in (last, grey):
        before = example.clone()
        graph = model.graphed(example)
        for images in (last, last.contiguous(), grey):
            like = torch.empty_like(example).copy_(images)
            assert torch.equal(graph(images), exact(model, like))
        assert torch.equal(example, before)


def test_no_layer_runs_in_a_call(cuda, model, monkeypatch):
    graph = model.graphed(pictures())

    def refuse(*arguments):
        raise AssertionError("the network's own Python ran")

    monkeypatch.setattr(AlexNet, "forward", refuse)
    graph(pictures())


def test_other_batches_have_graphs_in_the_same_memory_the_largest_first(cuda, model):
    graph = model.graphed(pictures(1), pictures(3), pictures(3), pictures(2))
    assert len(cuda.memory) == 3
    assert len(set(cuda.memory)) == 1
    assert None not in cuda.memory
    known = " or ".join(f"({batch}, 3, 67, 67) float32 on cpu" for batch in (3, 2, 1))
    assert repr(graph) == f"Graphed(AlexNet: {known})"
    for batch in (1, 3, 2, 3):
        images = pictures(batch)
        assert torch.equal(graph(images), exact(model, images))


def test_values_that_change_in_place_are_seen(cuda, model):
    graph = model.graphed(pictures())
    images = pictures()
    old = graph(images)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()
    model(pictures()).square().sum().backward()
    optimizer.step()
    model.eval()
    assert torch.equal(graph(images), exact(model, images))
    model.load_state_dict(AlexNet(10, init="kaiming").state_dict())
    assert torch.equal(graph(images), exact(model, images))
    model.classifier[6].weight.data.zero_()
    model.classifier[6].bias.data.fill_(7)
    assert torch.equal(graph(images), torch.full_like(old, 7))


def test_autocast_is_that_of_the_capture_and_no_cast_of_a_weight_is_kept(cuda, model):
    unfuse(model)  # torch's own layers, whose casts autocast keeps
    images = pictures()
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
        graph = model.graphed(pictures())
        answer = exact(model, images)
    assert answer.dtype == torch.bfloat16
    assert torch.equal(graph(images), answer)
    model.classifier[6].weight.data.mul_(2)
    got = graph(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(got, exact(model, images))
        plain = AlexNet(10).eval()
        with torch.autocast("cpu", enabled=False):
            graph = plain.graphed(pictures())
        assert graph(images).dtype == torch.float32


def test_a_capture_in_inference_mode_serves_outside_and_the_other_way_round(cuda, model):
    images = pictures()
    with torch.inference_mode():
        graph = model.graphed(pictures())
    assert torch.equal(graph(images), exact(model, images))
    with torch.inference_mode():
        assert torch.equal(graph(pictures() * 0 + images), exact(model, images))


def test_dropout_that_is_left_on_draws_anew_in_every_call(cuda, model):
    model.classifier[0].train()
    graph = model.graphed(pictures())
    images = pictures()
    assert not torch.equal(graph(images), graph(images))
    answers = []
    for run in (graph, lambda images: exact(model, images)):
        torch.manual_seed(3)
        answers.append(run(images))
    assert torch.equal(*answers)


# --- streams and threads ----------------------------------------------------------------------------------------


def test_it_warms_up_on_the_stream_that_it_captures_on_and_lets_other_threads_be(cuda, model):
    runs = []
    model.register_forward_hook(lambda *_: runs.append(cuda.now.name))
    with pytest.raises(RuntimeError, match="hook"):
        model.graphed(pictures())
    graphs.capture(lambda: model(pictures()), torch.device("cpu"))
    assert runs == ["side 1"] * 4
    assert cuda.log == ["side 1 waits for default", "default waits for side 1", "side 1 captures, thread_local"]


def test_a_call_on_another_stream_waits_for_the_last_one(cuda, model):
    graph = model.graphed(pictures(1), pictures(2))
    cuda.log.clear()
    other = cuda.stream()
    graph(pictures())
    with cuda.on(other):
        graph(pictures())
        graph(pictures(1))
    graph(pictures())
    assert cuda.log == [f"{other.name} waits for default", f"default waits for {other.name}"]
    assert cuda.recorded.count(other) == 2  # the memory of both examples


def test_threads_take_turns(cuda, model):
    graph = model.graphed(pictures())
    images = [pictures() for _ in range(4)]
    expected = [exact(model, x) for x in images]
    wrong = []

    def ask(number):
        for _ in range(5):
            if not torch.equal(graph(images[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- what is refused ------------------------------------------------------------------------------------------


def test_images_that_are_like_no_example_are_refused_by_both_names(cuda, model):
    graph = model.graphed(pictures(), pictures(1))
    for images, theirs in (
        (pictures(5), r"\(5, 3, 67, 67\) float32 on cpu"),
        (pictures().double(), r"\(2, 3, 67, 67\) float64 on cpu"),
        (pictures(device="meta"), r"\(2, 3, 67, 67\) float32 on meta"),
    ):
        known = r"captured for images of \(2, 3, 67, 67\) float32 on cpu or \(1, 3, 67, 67\) float32 on cpu"
        with pytest.raises(ValueError, match=f"{known}, got {theirs}: give graphed"):
            graph(images)
    with pytest.raises(TypeError, match="takes a tensor of images, got list"):
        graph([1])
    with pytest.raises(ValueError, match=r"gives no gradients.*images\.detach\(\)"):
        graph(pictures(requires_grad=True))
    with torch.no_grad():
        graph(pictures(requires_grad=True))


def replace_the_head(model):
    model.classifier[6] = nn.Linear(32, 10).eval()


def replace_a_weight(model):
    model.classifier[6].weight = nn.Parameter(torch.zeros(10, 32))


def drop_a_bias(model):
    model.features[0].bias = None


def set_data(model):
    model.features[3].weight.data = model.features[3].weight.data.clone()


def assign(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def add_a_layer(model):
    model.classifier.append(nn.Softmax(1).eval())


def override(model):
    model.features[1].forward = torch.tanh


def parametrise(model):
    nn.utils.parametrizations.weight_norm(model.classifier[4])


CHANGES = {
    replace_the_head: r"classifier\.6 has been replaced since the graph was captured: capture again",
    replace_a_weight: r"classifier\.6\.weight has been replaced or moved",
    drop_a_bias: r"features\.0\.bias has been replaced or moved",
    set_data: r"features\.3\.weight has been replaced or moved",
    assign: r"features\.0\.weight has been replaced or moved",
    AlexNet.bfloat16: r"features\.0\.weight has been replaced or moved",
    add_a_layer: r"classifier has got 8 layers instead of 7",
    override: r"features\.1 has got another forward",
    parametrise: r"classifier\.4.* has been replaced or moved",
    AlexNet.train: r"the model is in training, and was not.*model\.eval\(\)",
    (lambda model: model.classifier[0].train()): r"classifier\.0 is in training",
    (lambda model: model.classifier[2].register_forward_hook(print)): r"classifier\.2 has a hook.*would not call",
    (lambda model: model.register_forward_pre_hook(print)): r"the model has a hook",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_has_changed_is_refused(change, cuda, model):
    graph = model.graphed(pictures())
    graph(pictures())
    change(model)
    with pytest.raises(RuntimeError, match=CHANGES[change]):
        graph(pictures())


def test_what_comes_back_serves_again(cuda, model):
    graph = model.graphed(pictures())
    images, layer = pictures(), model.classifier[6]
    handle = model.features[0].register_forward_hook(lambda *_: None)
    model.classifier[6] = nn.Linear(32, 10).eval()
    model.train()
    handle.remove()
    model.classifier[6] = layer
    model.eval()
    assert torch.equal(graph(images), exact(model, images))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="every module has a hook"):
        graph(images)
    handle.remove()
    assert torch.equal(graph(images), exact(model, images))


def test_buffers_and_layers_without_a_bias_are_watched_too(cuda, model):
    model.features[1] = nn.BatchNorm2d(8).eval()
    model.features[0] = nn.Conv2d(3, 8, 11, 4, bias=False).eval()
    graph = model.graphed(pictures())
    model.features[1].running_mean.add_(1)
    images = pictures()
    assert torch.equal(graph(images), exact(model, images))
    model.features[1].running_mean = torch.zeros(8)
    with pytest.raises(RuntimeError, match=r"features\.1\.running_mean has been replaced or moved"):
        graph(images)


def test_an_address_is_not_taken_for_the_tensor_that_lay_there(model):
    """The parameters of the capture are held, so nothing else can come to lie where they were."""
    makeup = graphs._Makeup(model)  # alone: what stands in for a graph holds them too, as a graph does not
    storage = weakref.ref(model.classifier[6].weight.untyped_storage())
    model.half().float()
    assert storage() is not None
    del makeup
    assert storage() is None


def two_devices(model):
    model.classifier.to("meta")
    return model


REFUSED = {
    "training": (lambda m: m.train(), pictures, RuntimeError, r"in training: call model\.eval\(\) first"),
    "two devices": (two_devices, pictures, ValueError, "a model on cpu and meta and examples on cpu"),
    "example": (lambda m: m, lambda: pictures(device="meta"), ValueError, "a model on cpu and examples on meta"),
    "empty": (lambda m: m, lambda: pictures(0), ValueError, r"an example with images in it, got \(0, 3, 67, 67\)"),
    "integer": (lambda m: m, lambda: pictures().byte(), TypeError, r"floating-point images, got torch\.uint8"),
    "3-D": (lambda m: m, lambda: pictures()[0], ValueError, r"4-D batch of images.*unsqueeze\(0\)"),
    "grey": (lambda m: m, lambda: pictures()[:, :1], ValueError, "3 channels, got 1"),
    "no tensor": (lambda m: m, lambda: [1], TypeError, "takes a tensor of images, got list"),
    "gradients": (lambda m: m, lambda: pictures(requires_grad=True), ValueError, "gives no gradients"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_captured_is_said_in_words(case, cuda, model):
    change, example, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        change(model).graphed(example())
    assert cuda.now is cuda.default


def test_without_a_gpu_it_says_what_does_it(model):
    with pytest.raises(ValueError, match=r"got a model on cpu and examples on cpu.*model\(images\) does it"):
        model.graphed(pictures())


def test_a_capture_within_a_capture_is_refused(cuda, model):
    graph = model.graphed(pictures())
    for inner in (lambda: graph(pictures()), lambda: model.graphed(pictures())):
        with pytest.raises(RuntimeError, match="being captured on this stream"):
            graphs.capture(lambda inner=inner: cuda.capturing and inner(), torch.device("cpu"))
        assert not cuda.capturing


def test_a_model_that_gives_no_tensor_is_refused(cuda):
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(TypeError, match="gives one tensor, got tuple"):
        Graphed(Two().eval(), torch.ones(2))


# --- what it leaves behind ------------------------------------------------------------------------------------


def test_the_model_knows_nothing_of_its_graph(cuda, model):
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    graph = model.graphed(pictures())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    images = pictures()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(exact(other, images), graph(images))
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled: copy the model"):
            copied(graph)


def test_it_is_gone_with_its_last_reference(cuda, model):
    gc.disable()
    try:
        graph = model.graphed(pictures())
        graph(pictures())
        gone = [weakref.ref(graph)] + [weakref.ref(c.graph) for c in graph._captured.values()]
        of_model = weakref.ref(model)
        del graph
        assert [ref() for ref in gone] == [None, None]
        assert of_model() is model
    finally:
        gc.enable()


# --- the page's training step -------------------------------------------------------------------------------


@pytest.fixture
def by_the_readme(monkeypatch):
    """Trains with the block of docs/graphs.md, on a CPU with a stand-in for the graph; gives what it leaves."""

    def run(device="cpu", change=None):
        code = graph_checks.recipe(torch.device(device), *SIZES)
        for old, new in (change or {}).items():
            assert old in code
            code = code.replace(old, new)
        with monkeypatch.context() as within:
            if device == "cpu":
                FakeCuda().install(within)
            names = graph_checks.train_by(code, graph_checks.batches_of(*SIZES))
        return {**names["model"].state_dict(), "loss": names["loss"]}

    return run


def eager(device="cpu"):
    return graph_checks.train_eagerly(torch.device(device), graph_checks.batches_of(*SIZES))


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("device", DEVICES)
def test_the_readmes_training_step_trains_as_an_eager_one_does(device, by_the_readme):
    """Masks, momentum and a rate that changes included; on a GPU here with PyTorch's layers, which vary a little."""
    got, expected = by_the_readme(device), eager(device)
    assert device == "cuda" or same(got, expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"torch.tensor(0.01, device='cpu')": "0.01"},
        {"number < 3": "number < 0", "number == 3": "number == 0"},
        {"    images.copy_(new_images, non_blocking=True)\n": ""},
        {"    graph.replay()": "    number < 4 and graph.replay()"},
    ],
    ids=["rate", "warm-up", "images", "replay"],
)
def test_without_any_of_its_parts_it_would_not(change, by_the_readme):
    assert not same(by_the_readme(change=change), eager())


def test_an_optimizer_that_reads_its_rate_cannot_be_captured(by_the_readme):
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        by_the_readme(change={", fused=True": ""})


def test_the_benchmarks_replays_are_of_the_same_kind(cuda):
    total = torch.zeros(1)
    replay = graph_checks.captured(lambda: total.add_(1), torch.device("cuda"))
    assert total == graphs.WARM_UPS
    assert replay() == graphs.WARM_UPS + 1
    assert "side 1 captures, thread_local" in cuda.log
