"""`fuse.report`: what it says of a model is what runs, and each layer left alone has its reason."""

import copy
import inspect
import pickle
import random

import pytest
import torch
import torchvision
from plain import error
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.testing._internal.two_tensor import TwoTensor

from alexnet_triton import AlexNet, FusedSequential, fuse, unfuse, use_backend
from alexnet_triton.fusion import report

OLD = ("ignore:.*is deprecated:DeprecationWarning", "ignore:.*deprecated:FutureWarning", "ignore::UserWarning:torch")
"""What torch calls old is what people have."""

pytestmark = [pytest.mark.filterwarnings(warning) for warning in OLD]


def conv(**options):
    return nn.Conv2d(4, 4, 3, **options)


def only(layer, *behind):
    """The one row of a layer, and what stands behind it, in a fused sequential with a convolution that is no news."""
    rows = fuse.report(fuse(nn.Sequential(layer, *behind, nn.Sequential(conv())))).rows
    return next(row for row in rows if row.layers[0].split(".")[0] == "0")


# --- what it says is what runs -----------------------------------------------------------------------------


class Mine(nn.Sequential):
    """A subclass, which may have a forward of its own."""


class Block(nn.Module):
    """A layer, and a container, that a forward calls itself."""

    def __init__(self):
        super().__init__()
        self.conv = conv(padding=1)
        self.part = nn.Sequential(conv(padding=1), nn.ReLU())

    def forward(self, x):
        return self.part(self.conv(x))


def hooked(layer):
    layer.register_forward_hook(lambda module, args, output: None)
    return layer


LAYERS = [
    lambda: conv(padding=1),
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    lambda: nn.LocalResponseNorm(3),
    lambda: nn.MaxPool2d(3, 1, 1),
    lambda: nn.MaxPool2d(2, 1, 1, dilation=2),
    nn.Dropout,
    lambda: nn.Dropout(inplace=True),
    lambda: nn.Linear(7, 7),
    nn.Tanh,
    lambda: nn.BatchNorm2d(4),
    lambda: conv(padding=2, dilation=2),
    lambda: conv(padding=1, padding_mode="reflect"),
    lambda: hooked(conv(padding=1)),
    lambda: hooked(nn.ReLU()),
    lambda: parametrizations.weight_norm(nn.Linear(7, 7)),
    lambda: nn.Sequential(conv(padding=1), nn.ReLU()),
    lambda: nn.Sequential(nn.ReLU(), nn.LocalResponseNorm(3)),
    lambda: hooked(nn.Sequential(conv(padding=1), nn.ReLU())),
    lambda: Mine(conv(padding=1), nn.ReLU()),
    Block,
]


@pytest.mark.parametrize("seed", range(40))
def test_the_ops_of_the_report_are_those_that_run(seed, calls):
    draw = random.Random(seed)
    model = nn.Sequential(*(draw.choice(LAYERS)() for _ in range(draw.randint(1, 9)))).eval()
    before = fuse.report(model)
    assert not any(row.fused for row in before.rows)
    x = torch.randn(2, 4, 7, 7)
    expected = copy.deepcopy(model)(x)
    assert calls == []
    assert error(fuse(model)(x), expected) < 1e-5
    after = fuse.report(model)
    assert [row.op for row in after.rows if row.fused] == calls
    assert [(row.layers, row.op) for row in before.rows] == [(row.layers, row.op) for row in after.rows]
    for row in after.rows:
        for name, what in zip(row.layers, row.what, strict=True):
            assert what in type(model.get_submodule(name)).__name__
        assert (row.op is None) <= bool(row.reason)
    calls.clear()
    hooked(draw.choice(list(model)))
    assert error(model(x), expected) < 1e-5
    assert [row.op for row in fuse.report(model).rows if row.fused] == calls


def test_it_changes_nothing_and_says_what_fuse_would_do():
    with torch.device("meta"):
        model, twin = torchvision.models.alexnet(), torchvision.models.alexnet()
    bytes_before = pickle.dumps(model)
    text = str(fuse.report(model))
    assert pickle.dumps(model) == bytes_before
    assert text.splitlines()[-1] == "11 runs in 2 containers to be once fused; 0 layers left alone"
    assert text.count("not fused yet") == 11
    fuse(model.features)
    partly = fuse.report(model)
    assert str(partly).splitlines()[-1] == (
        "8 runs in 1 container executed as ops, 3 runs in 1 container to be once fused; 0 layers left alone"
    )
    assert fuse.report(unfuse(model)).rows == fuse.report(twin).rows


def test_it_is_a_table():
    with torch.device("meta"), use_backend("reference"):
        text = str(fuse.report(AlexNet(variant="torchvision")))
    assert text == repr(fuse.report(AlexNet(variant="torchvision", device="meta")))
    assert text.splitlines() == [
        "container   layers   what                     op              reason",
        "--------------------------------------------------------------------",
        "features    0, 1     Conv2d + ReLU            conv2d_relu",
        "            2        MaxPool2d                lrn_max_pool",
        "            3, 4     Conv2d + ReLU            conv2d_relu",
        "            5        MaxPool2d                lrn_max_pool",
        "            6, 7     Conv2d + ReLU            conv2d_relu",
        "            8, 9     Conv2d + ReLU            conv2d_relu",
        "            10, 11   Conv2d + ReLU            conv2d_relu",
        "            12       MaxPool2d                lrn_max_pool",
        "classifier  0, 1, 2  Dropout + Linear + ReLU  dropout_linear",
        "            3, 4, 5  Dropout + Linear + ReLU  dropout_linear",
        "            6        Linear                   dropout_linear",
        "--------------------------------------------------------------------",
        "The ops run as plain PyTorch: the backend is 'reference'.",
        "11 runs in 2 containers executed as ops; 0 layers left alone",
    ]


# --- why a layer is left alone -----------------------------------------------------------------------------


def compiled(layer):
    layer.compile(backend="eager")
    return layer


def backward_hooked(layer):
    layer.register_full_backward_hook(lambda module, inputs, outputs: None)
    return layer


def replaced(layer):
    layer.forward = layer.forward
    return layer


def quantised():
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(6, 5)), {nn.Linear})[0]


def complex_(layer):
    layer.weight = nn.Parameter(layer.weight.to(torch.complex64))
    return layer


def wrapping(layer):
    """A layer whose weight wraps other tensors, as torchao's quantised ones and DTensor do."""
    weight = layer.weight.detach()
    layer.weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    return layer


class Padded(nn.Conv2d):
    pass


REASONS = [
    (lambda: conv(dilation=2), "dilation=(2, 2)"),
    (lambda: conv(padding_mode="circular"), "padding_mode='circular'"),
    (lambda: nn.MaxPool2d(2, return_indices=True), "return_indices=True"),
    (lambda: nn.MaxPool2d(2, dilation=2), "dilation=2"),
    (lambda: nn.Dropout(inplace=True), "inplace=True"),
    (lambda: nn.LocalResponseNorm(3), "no MaxPool2d behind it"),
    (nn.Dropout, "no Linear behind it"),
    (lambda: hooked(conv()), "has a forward hook: <lambda>"),
    (lambda: backward_hooked(conv()), "has a backward hook"),
    (lambda: weight_norm(nn.Linear(6, 5)), "has a forward pre-hook: WeightNorm"),
    (lambda: prune.l1_unstructured(conv(), "weight", 0.5), "has a forward pre-hook: L1Unstructured"),
    (lambda: parametrizations.weight_norm(nn.Linear(6, 5)), "parametrized: weight"),
    (lambda: parametrizations.spectral_norm(conv()), "parametrized: weight"),
    (lambda: replaced(conv()), "its forward is replaced"),
    (lambda: compiled(conv()), "compiled by itself"),
    (lambda: Padded(4, 4, 3), "Padded, a subclass of Conv2d"),
    (lambda: nn.LazyConv2d(4, 3), "a Conv2d only from its first batch on"),
    (lambda: nn.LazyLinear(4), "a Linear only from its first batch on"),
    (quantised, "torch.ao.nn.quantized.dynamic.Linear, not torch.nn.Linear"),
    (lambda: torch.jit.script(conv()), "scripted: TorchScript runs it"),
    (lambda: complex_(conv()), "complex64: ops take floating-point tensors"),
    (lambda: wrapping(conv()), "its weight is a TwoTensor"),
    (lambda: wrapping(nn.Linear(6, 5)), "its weight is a TwoTensor"),
    (lambda: Mine(conv()), "in Mine, a subclass of nn.Sequential"),
    (Block, "in Block, not in an nn.Sequential"),
]


@pytest.mark.parametrize(("make", "reason"), REASONS, ids=[reason for _, reason in REASONS])
def test_a_layer_that_is_left_alone_has_its_reason(make, reason):
    row = only(make())
    assert (row.op, row.fused, row.reason) == (None, False, reason)


def test_a_pool_that_is_left_alone_leaves_its_norm_alone():
    behind = nn.MaxPool2d(2, return_indices=True)
    assert only(nn.LocalResponseNorm(3), behind).reason == "the MaxPool2d behind it is left alone"


@pytest.mark.parametrize(
    ("behind", "reason"),
    [
        ([nn.BatchNorm2d(4), nn.ReLU()], "without a ReLU: BatchNorm2d comes first"),
        ([hooked(nn.ReLU())], "without its ReLU: has a forward hook: <lambda>"),
        ([nn.ReLU()], ""),
        ([nn.BatchNorm2d(4), nn.Tanh()], ""),
        ([nn.MaxPool2d(2), nn.ReLU()], ""),
        ([], ""),
    ],
)
def test_a_run_says_why_it_is_without_the_relu_that_comes_later(behind, reason):
    row = only(conv(), *behind)
    assert row.fused
    assert row.reason == reason


def test_under_a_global_hook_nothing_runs_as_an_op(calls):
    model = fuse(nn.Sequential(conv(), nn.ReLU()))
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        row = fuse.report(model).rows[0]
        model(torch.randn(1, 4, 5, 5))
    finally:
        handle.remove()
    assert (row.op, row.reason, calls) == (None, "a global module hook is registered", [])


def test_a_container_whose_forward_is_replaced_promises_nothing():
    model = nn.Sequential(conv(), nn.ReLU())
    model.forward = model.forward
    row = fuse.report(fuse(model)).rows[0]
    assert (row.op, row.reason) == (None, "the forward of its nn.Sequential is replaced")


# --- where layers stand ------------------------------------------------------------------------------------


def test_layers_in_no_sequential_are_told_by_their_owner():
    with torch.device("meta"):
        found = fuse.report(fuse(torchvision.models.resnet18()))
    rows = {row.layers[0]: row for row in found.rows}
    assert rows["conv1"].reason == "in ResNet, not in an nn.Sequential"
    assert rows["layer3.0.conv2"].reason == "in BasicBlock, not in an nn.Sequential"
    assert rows["layer3.0.downsample.0"].fused
    lines = str(found).splitlines()
    assert any(line.startswith("layer1.0 and 7 more  conv1, conv2        2 Conv2d") for line in lines)
    assert max(map(len, lines)) <= 120


def test_lists_have_no_forward_that_could_call_a_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([conv(), nn.ModuleDict({"last": conv()})])

        def forward(self, x):
            return x

    reasons = {row.layers: row.reason for row in fuse.report(Net()).rows}
    assert reasons == {
        ("layers.0",): "in Net, not in an nn.Sequential",
        ("layers.1.last",): "in Net, not in an nn.Sequential",
    }
    assert fuse.report(Net().layers).rows[0].reason == "in no nn.Sequential"
    assert fuse.report(conv()).rows[0].reason == "in no nn.Sequential"


def test_what_is_shared_is_told_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = conv()
            self.first = self.again = Block()
            self.features = nn.Sequential(self.stem, nn.ReLU(), self.stem)

        def forward(self, x):
            return self.again(self.first(self.features(x)))

    layers = [row.layers for row in fuse.report(fuse(Net())).rows]
    assert layers == [
        ("first.conv",),
        ("first.part.0", "first.part.1"),
        ("features.0", "features.1"),
        ("features.2",),
    ]


def test_wrappers_are_looked_through():
    model = fuse(nn.Sequential(conv(), nn.ReLU()))
    for wrapped, name in ((nn.DataParallel(model), "module"), (torch.compile(model, backend="eager"), "_orig_mod")):
        row = fuse.report(wrapped).rows[0]
        assert (row.container, row.op, row.fused) == (name, "conv2d_relu", True)


def test_long_lists_of_names_are_cut():
    lines = str(fuse.report(nn.ModuleList(conv() for _ in range(30)))).splitlines()
    assert "(model)    0, 1, 2, 27 more  30 Conv2d  -   in no nn.Sequential" in lines
    assert lines[-1] == "0 runs in 0 containers executed as ops; 30 layers left alone"


def test_a_model_with_nothing_to_fuse_has_no_table():
    found = fuse.report(nn.Sequential(nn.Tanh(), nn.ReLU()))
    assert found.rows == ()
    assert str(found) == "0 runs in 0 containers executed as ops; 0 layers left alone"


# --- what the ops run as -----------------------------------------------------------------------------------


def test_it_says_what_the_ops_run_as():
    model = fuse(nn.Sequential(conv(), nn.ReLU()))
    with use_backend("auto"):  # with the interpreter on, as in these tests
        assert fuse.report(model).backend == "Triton kernels"
        model.append(conv().double())
        double = "the Triton kernels take float16, bfloat16 and float32, not float64"
        assert fuse.report(model).backend == f"Triton kernels; plain PyTorch: {double}"
    with use_backend("triton"):
        assert fuse.report(model).backend == f"Triton kernels; an error: {double}"
    with use_backend("reference"):
        assert fuse.report(model).backend == "plain PyTorch: the backend is 'reference'"
        assert fuse.report(fuse(nn.Sequential(nn.MaxPool2d(2)))).backend == "plain PyTorch: the backend is 'reference'"


# --- fuse stays a plain function ---------------------------------------------------------------------------


def test_fuse_is_still_a_function_that_help_and_pickle_know():
    assert inspect.isfunction(fuse)
    assert list(inspect.signature(fuse).parameters) == ["module"]
    assert fuse.__doc__.startswith("Let every plain `nn.Sequential`")
    assert pickle.loads(pickle.dumps(fuse)) is fuse
    assert copy.deepcopy(fuse) is fuse
    assert fuse.report is report.report


def test_fuse_makes_no_report(monkeypatch):
    monkeypatch.setattr(report, "_Reader", None)
    assert type(fuse(nn.Sequential(conv()))) is FusedSequential


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"fuse\.report takes a torch\.nn\.Module, got str"):
        fuse.report("model")


def test_a_child_of_none_fails_as_in_torch():
    model = nn.Sequential(conv(), nn.ReLU())
    model[1] = None
    assert fuse.report(fuse(model)).rows[0].layers == ("0",)
    with pytest.raises(TypeError, match="not callable"):
        model(torch.randn(1, 4, 5, 5))
