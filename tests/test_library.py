"""The operators as torch.library, torch.compile, torch.export, autocast and checkpointing see them."""

import subprocess
import sys

import narrow
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import rms_error
from test_package import TESTS_OWN
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from alexnet_triton import VARIANTS, AlexNet, fuse, library, ops, use_backend
from alexnet_triton.stages import ConvStage, PoolStage, encode

STAGES = (
    ConvStage((2, 2), (1, 1), 1, True, True),
    PoolStage(5, 1e-4, 0.75, 2.0, (3, 3), (2, 2), (0, 0), False, 1),
    ConvStage((1, 1), (1, 1), 2, True, False),
)


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


def chain_arguments(grad):
    x = torch.randn(2, 3, 19, 17, requires_grad=grad)
    sizes = ((32, 3, 3, 3), (32,), (8, 16, 3, 3))
    return x, [torch.randn(size, requires_grad=grad) for size in sizes], *encode(STAGES)


def small_network(seed=0):
    torch.manual_seed(seed)
    features = [
        nn.Conv2d(3, 16, 5, 2),
        nn.ReLU(),
        nn.LocalResponseNorm(5),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(16, 8, 3),
        nn.ReLU(),
    ]
    classifier = [nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 4)]
    return fuse(nn.Sequential(*features, *classifier))


IMAGES = (3, 17, 17)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_map_chain_passes_opcheck(grad, channels_last):
    arguments = (*chain_arguments(grad), False, channels_last)
    torch.library.opcheck(torch.ops.alexnet_triton.map_chain.default, arguments)


def test_map_chain_backward_passes_opcheck():
    x, parameters, whole, real = chain_arguments(False)
    out, saved = torch.ops.alexnet_triton.map_chain(x, parameters, whole, real, True, False)
    needs = [True, True, False, True]
    arguments = (torch.randn_like(out), x, out, saved, parameters, whole, real, needs, False)
    torch.library.opcheck(torch.ops.alexnet_triton.map_chain_backward.default, arguments)


@pytest.mark.parametrize("grad", [False, True])
def test_dropout_linear_passes_opcheck(grad):
    x, weight, bias = (torch.randn(size, requires_grad=grad) for size in ((4, 7), (5, 7), (5,)))
    seed = torch.tensor([3])
    torch.library.opcheck(torch.ops.alexnet_triton.dropout_linear.default, (x, weight, bias, seed, 0.5, True))
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    y = torch.ops.alexnet_triton.dropout_linear(x, weight, bias, seed, 0.5, True)
    arguments = (torch.randn(4, 5), x, weight, bias, y, seed, 0.5, True, [True, False, True])
    torch.library.opcheck(torch.ops.alexnet_triton.dropout_linear_backward.default, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_network_gives_the_eager_one_s_numbers(backend):
    """In one graph, for changing batches, in evaluation and in training with dropout."""
    torch._dynamo.reset()
    model = small_network()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for batch in (2, 3, 5):
        x = torch.randn(batch, *IMAGES)
        model.eval()
        assert rms_error(compiled(x), model(x)) < 1e-6
    model.train()
    results = []
    for run in (compiled, model):
        torch.manual_seed(7)
        y = run(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))))
    if backend == "inductor":  # which draws random numbers in a way of its own
        assert results[0][0].shape == results[1][0].shape
        return
    for got, wanted in zip(*results, strict=True):
        assert rms_error(got, wanted) < 1e-6


def test_alexnet_compiles_to_two_calls_of_operators_and_exports():
    model = narrow.network("merged").eval()
    x = torch.randn(2, 3, 67, 67)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    calls = [str(node.target) for node in exported.graph.nodes if "alexnet_triton" in str(node.target)]
    assert [call.split(".")[1] for call in calls] == ["map_chain"] + 3 * ["dropout_linear"]
    y = torch.randn(1, 3, 67, 67).repeat(3, 1, 1, 1)
    assert rms_error(exported.module()(y), model(y)) < 1e-6


def test_fakes_know_shapes_dtypes_and_strides():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 3, 19, 17, dtype=torch.float16)
        parameters = [torch.empty(size, dtype=torch.float16) for size in ((32, 3, 3, 3), (32,), (8, 16, 3, 3))]
        y = library.map_chain(x, parameters, STAGES, channels_last=True)
        assert (tuple(y.shape), y.dtype) == ((2, 8, 4, 4), torch.float16)
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("first", ["convolution", "pool"])
def test_autocast_lowers_products_keeps_pools_and_gives_parameters_their_own_dtype(first):
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.LocalResponseNorm(5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 5)]
    if first == "pool":
        layers = [nn.MaxPool2d(3, 1, 1), *layers]
    model = fuse(nn.Sequential(*layers))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    results = []
    for backend in ("triton", "reference"):
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            maps, y = model[:-2](x), model(x)
        assert (maps.dtype, y.dtype) == (torch.bfloat16, torch.bfloat16)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), [x, *model.parameters()])))
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == wanted.dtype
        assert rms_error(got, wanted) < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        assert fuse(nn.Sequential(nn.MaxPool2d(2)))(x).dtype == torch.float32


def test_autocast_normalises_in_the_dtype_that_comes_before_a_convolution_lowers_it():
    model = fuse(nn.Sequential(nn.LocalResponseNorm(5, alpha=1.0), nn.MaxPool2d(2), nn.Conv2d(16, 16, 1, bias=False)))
    nn.init.dirac_(model[-1].weight)  # gives what it is given
    x = torch.randn(2, 16, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert torch.equal(y, model[:-1](x).bfloat16())
    assert not torch.equal(y, model[:-1](x.bfloat16()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_masks_again(reentrant):
    model = small_network()
    x = torch.randn(3, *IMAGES, requires_grad=True)
    results = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        x.grad = None
        torch.manual_seed(5)
        run(x).square().sum().backward()
        results.append([t.grad for t in (x, *model.parameters())])
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


def test_dropout_follows_the_generator_whatever_else_is_seeded():
    x, weight = torch.ones(64, 40), torch.eye(40)
    masks = []
    for _ in range(2):
        torch.manual_seed(11)
        masks.append([ops.dropout_linear(x, weight, p=0.5) for _ in range(2)])
    assert torch.equal(masks[0][0], masks[1][0])
    assert torch.equal(masks[0][1], masks[1][1])
    assert not torch.equal(masks[0][0], masks[0][1])
    state = torch.get_rng_state()
    ops.dropout_linear(x, weight, p=0.0)
    ops.dropout_linear(x, weight, p=0.5, training=False)
    assert torch.equal(state, torch.get_rng_state())


def test_what_backward_does_not_read_may_be_changed_in_place():
    """As of torch's own layers: not what a ReLU gave, but what a convolution, a pooling or a linear layer did."""
    weight, matrix = torch.randn(8, 4, 3, 3, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    x, rows = torch.randn(2, 4, 9, 9, requires_grad=True), torch.randn(3, 7)
    free = [
        lambda: ops.conv2d_relu(x, weight, relu=False),
        lambda: ops.conv2d_relu(x.to(memory_format=torch.channels_last), weight, relu=False),
        lambda: ops.lrn_max_pool(x),
        lambda: ops.dropout_linear(rows, matrix),
    ]
    for op in free:
        op().mul_(2).relu_().sum().backward()
    for op in (lambda: ops.conv2d_relu(x, weight), lambda: ops.dropout_linear(rows, matrix, relu=True)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            op().add_(1).sum().backward()


def test_kernels_are_launched_on_the_device_of_their_tensor(monkeypatch):
    entered = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(torch.cuda, "device", Guard)

    class OnSecond:
        device = torch.device("cuda", 1)

    with library.on_device(OnSecond()):
        assert entered == [torch.device("cuda", 1)]
    guarded = []
    original = library.on_device
    monkeypatch.setattr(library, "on_device", lambda x: (guarded.append(x.device), original(x))[1])
    model = small_network()
    model(torch.randn(2, *IMAGES)).sum().backward()
    assert len(guarded) == 2 * 3  # a chain and two linear layers, forward and backward


READERS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "cpu", "nonzero")


@pytest.fixture
def unreadable(monkeypatch):
    """Nobody may look at a tensor's value, or wait for a device."""

    def refuse(*arguments, **options):
        raise AssertionError("a value was read, or a device was waited for")

    for name in READERS:
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for name in ("synchronize", "Stream.synchronize", "Event.synchronize", "Event.query"):
        monkeypatch.setattr(f"torch.cuda.{name}", refuse)


class OnOneDevice(TorchFunctionMode):
    """Nothing goes from the host to the device, or back."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            assert not isinstance(tensor, torch.Tensor) or tensor.is_meta, f"{func} on {tensor.device}"
        return out


def on_one_device(function):
    def run(*arguments):
        with OnOneDevice():
            return function(*arguments)

    return run


def step_of(model, images):
    """A training step, as a function."""
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_call_reads_a_value_or_leaves_out_what_an_earlier_one_did(variant, monkeypatch, unreadable):
    """At full size, with an H100's launches and tensors that hold nothing: a CUDA graph can hold all of it."""
    from alexnet_triton.kernels import launch
    from alexnet_triton.kernels.target import TARGETS

    for module in ("ops", "fusion.maps"):
        monkeypatch.setattr(f"alexnet_triton.{module}.takes_triton", lambda op, x: True)
    monkeypatch.setattr(library, "_is_plain", lambda x: True)  # which asks after an autocast that "meta" has not
    for name in ("_run_stages_backward", "_run_dropout_linear_backward"):  # which a mode around autograd does not see
        monkeypatch.setattr(library, name, on_one_device(getattr(library, name)))
    size = VARIANTS[variant].image_size
    model = AlexNet(variant=variant, device="meta", dtype=torch.bfloat16).train()
    images = torch.empty(128, 3, size, size, device="meta", dtype=torch.bfloat16)
    step = step_of(model, images)

    def infer():
        with torch.no_grad():
            model(images)

    for call, kernels in (
        (step, {"weight_gradient_kernel", "lrn_max_pool_backward_kernel"}),
        (infer, {"pack_kernel", "conv_kernel", "lrn_max_pool_kernel", "gemm_kernel"}),
    ):
        made = []
        for _ in range(3):
            with launch.recording(TARGETS["sm_90"]) as launches, OnOneDevice():
                call()
            made.append([(each.kernel, each.programs) for each in launches])
        assert made[0] == made[1] == made[2]
        assert kernels <= {kernel.__name__ for kernel, _ in made[0]}
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("lowered", [False, True])
def test_nothing_is_read_back_where_the_dispatcher_is_passed(lowered, monkeypatch, unreadable):
    from alexnet_triton.kernels import launch

    monkeypatch.setattr(launch, "launch", lambda kernel, programs, **arguments: None)
    step = step_of(small_network(), torch.randn(2, *IMAGES))
    with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
        step()


def test_empty_batches_launch_nothing(monkeypatch):
    from alexnet_triton.kernels import launch

    def refuse(kernel, programs, **arguments):
        assert programs == 0

    monkeypatch.setattr(launch, "launch", refuse)
    model = small_network()
    x = torch.zeros(0, *IMAGES, requires_grad=True)
    y = model(x)
    assert y.shape == (0, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape
    for parameter in model.parameters():
        assert parameter.grad.abs().max() == 0


def test_float32_is_exact_unless_torchs_switch_allows_tf32(monkeypatch):
    from alexnet_triton.kernels import launch
    from alexnet_triton.kernels.target import TARGETS

    before = torch.get_float32_matmul_precision()
    seen = {}
    x, weight = torch.empty(128, 64, device="meta"), torch.empty(32, 64, device="meta")
    image, filters = torch.empty(2, 16, 9, 9, device="meta"), torch.empty(8, 16, 3, 3, device="meta")
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            with launch.recording(TARGETS["sm_90"]) as launches:
                from alexnet_triton import chain
                from alexnet_triton.kernels import linear

                linear.dropout_linear(x, weight, None, None, 0.0, False)
                stages = (ConvStage((1, 1), (1, 1), 1, True, False),)
                out, saved = chain.forward(image, [filters], stages, True, False)
                chain.backward(out, image, out, saved, [filters], stages, [True, True], False)
            seen[precision] = {made.arguments["PRECISION"] for made in launches if "PRECISION" in made.arguments}
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {"highest": {"ieee"}, "high": {"tf32"}}


# --- processes of their own ---------------------------------------------------------------------------------


def run(code, **environment):
    import os

    kept = {name: value for name, value in os.environ.items() if name not in TESTS_OWN}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**kept, **environment})


ONE_OP = "print(ops.conv2d_relu(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)).item())"


def test_the_interpreter_works_at_the_first_import():
    result = run(f"import torch; from alexnet_triton import ops; {ONE_OP}", TRITON_INTERPRET="1")
    assert result.stdout.strip() == "4.0", result.stderr


def test_the_interpreter_may_be_asked_for_after_the_import_but_not_after_tritons():
    asked = "os.environ['TRITON_INTERPRET'] = '1'"
    result = run(f"import os, torch; from alexnet_triton import ops; {asked}; {ONE_OP}")
    assert result.stdout.strip() == "4.0", result.stderr
    result = run(f"import os, torch, triton; from alexnet_triton import ops; {asked}; {ONE_OP}")
    assert "TRITON_INTERPRET was set after Triton had been imported" in result.stderr
    result = run(f"import os, torch, alexnet_triton.kernels.launch; from alexnet_triton import ops; {asked}; {ONE_OP}")
    assert "set TRITON_INTERPRET=1 in the environment before Python starts" in result.stderr


def test_a_cpu_tensor_without_the_interpreter_runs_the_reference_or_says_what_is_missing():
    result = run(f"import torch; from alexnet_triton import ops; {ONE_OP}")
    assert result.stdout.strip() == "4.0", result.stderr
    result = run(f"import torch; from alexnet_triton import ops, use_backend; use_backend('triton'); {ONE_OP}")
    assert "Triton kernels need a GPU tensor" in result.stderr


def test_tensors_on_two_devices_are_named():
    for op, tensors in (
        (ops.conv2d_relu, (torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1, device="meta"))),
        (ops.dropout_linear, (torch.ones(2, 3), torch.ones(4, 3, device="meta"))),
    ):
        with pytest.raises(ValueError, match=r"one device.*cpu.*meta"):
            op(*tensors)


def test_bfloat16_counts_as_numbers_not_as_bits():
    """Small whole numbers are exact in every dtype."""
    x = torch.randint(-2, 3, (2, 3, 9, 9)).float()
    weight, bias = torch.randint(-2, 3, (16, 3, 3, 3)).float(), torch.randint(-2, 3, (16,)).float()
    matrix = torch.randint(-2, 3, (5, 9)).float()
    expected = F.conv2d(x, weight, bias, 2).relu()
    for dtype in (torch.bfloat16, torch.float16):
        got = ops.conv2d_relu(x.to(dtype), weight.to(dtype), bias.to(dtype), 2)
        assert torch.equal(got.float(), expected)
        assert torch.equal(ops.lrn_max_pool(got, 0).float(), F.max_pool2d(expected, 3, 2))
        assert torch.equal(ops.dropout_linear(x[0, 0].to(dtype), matrix.to(dtype)).float(), x[0, 0] @ matrix.T)
