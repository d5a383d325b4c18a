"""Kernels are launched on the device of their tensors, be it a second GPU: shown where there is none.

torch's fake tensors have a device and no memory, and launches are recorded instead of made; so the code that launches
runs as it is.
"""

from contextlib import contextmanager

import pytest
import small_run
import torch
from torch._subclasses import FakeTensorMode

from alexnet_triton import library, use_backend
from alexnet_triton.kernels import launch, random
from alexnet_triton.recipe import augment
from alexnet_triton.recipe.optim import KrizhevskySGD
from alexnet_triton.tuning.launches import stages_of

SECOND = torch.device("cuda", 1)


class Guards:
    """In the place of `torch.cuda.device`: which device is the current one."""

    def __init__(self):
        self.entered = [torch.device("cuda", 0)]

    def __call__(self, device):
        self.asked = torch.device(device)
        return self

    def __enter__(self):
        self.entered.append(self.asked)

    def __exit__(self, *error):
        self.entered.pop()


@pytest.fixture
def launches(monkeypatch):
    """Launches of the test, made on fake tensors: name of the kernel, current device, devices of its tensors."""
    guards, made, original = Guards(), [], launch.launch

    def spied(kernel, programs, **arguments):
        devices = {tensor.device for tensor in launch.Launch(kernel, programs, arguments).tensors.values()}
        made.append((kernel.__name__, guards.entered[-1], devices))
        original(kernel, programs, **arguments)

    monkeypatch.setattr(torch.cuda, "device", guards)
    monkeypatch.setattr(launch, "launch", spied)
    with FakeTensorMode(allow_non_fake_inputs=True), launch.recording(launch.TARGETS["sm_90"]), use_backend("triton"):
        yield made


def assert_on_second(launches, *kernels):
    assert {name for name, _, _ in launches} >= set(kernels)
    for name, current, devices in launches:
        assert current == SECOND, name
        assert devices == {SECOND}, name
    launches.clear()


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=SECOND)


def test_convolutions_and_poolings_are_launched_on_the_device_of_their_tensors_both_ways(launches):
    stages, parameters = stages_of(small_run.network(variant="paper").features)
    parameters = [empty(*p.shape) for p in parameters]
    x = empty(2, 3, 67, 67)
    out, saved = library._run_stages(x, parameters, stages, True, False)
    assert_on_second(launches, "enter_kernel", "pack_kernel", "lrn_max_pool_kernel")
    needs = [True] * (1 + len(parameters))
    library._run_stages_backward(empty(*out.shape), x, out, saved, parameters, stages, needs, False)
    assert_on_second(launches, "weight_gradient_kernel", "lrn_max_pool_backward_kernel")


def test_linear_layers_and_their_dropout_are_launched_on_the_device_of_their_tensors_both_ways(launches):
    x, weight, bias, seed = empty(4, 32), empty(16, 32), empty(16), random.seed(SECOND)
    y = library._run_dropout_linear(x, weight, bias, seed, 0.5, True)
    assert_on_second(launches, "drop_kernel", "gemm_kernel")
    library._run_dropout_linear_backward(empty(*y.shape), x, weight, bias, y, seed, 0.5, True, [True] * 3)
    assert_on_second(launches, "gate_kernel", "gemm_kernel")
    library.dropout(x, 0.5)
    assert_on_second(launches, "drop_kernel")


# --- those that read a tensor or its address, as no fake one lets them: by the guard that they ask for ----------------


@pytest.fixture
def guarded(monkeypatch):
    """Of each launch of the test, the tensors whose guards it is made within."""
    entered, made, original = [], [], launch.launch

    @contextmanager
    def guard(x):
        entered.append(x)
        yield
        entered.pop()

    def spied(kernel, programs, **arguments):
        made.append([*entered])
        original(kernel, programs, **arguments)

    monkeypatch.setattr(library, "on_device", guard)
    monkeypatch.setattr(augment, "on_device", guard)
    monkeypatch.setattr(launch, "launch", spied)
    with use_backend("triton"):
        yield made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_update_is_launched_on_the_device_of_what_it_updates(dtype, guarded):
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((16, 32), (16,))]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = KrizhevskySGD(parameters, 0.01)
    optimizer.step()
    assert guarded
    for [tensor] in guarded:
        assert any(tensor is optimizer.master_of(p) or tensor is p for p in parameters)


def test_augmentation_is_launched_on_the_device_of_its_images(guarded):
    images, statistics = torch.zeros(2, 3, 75, 75, dtype=torch.uint8), small_run.patterns(4).statistics()
    augment.Augment(statistics, 67)(images, augment.draw(2, 75, 67, torch.Generator()))
    assert guarded
    for [tensor] in guarded:
        assert tensor is images
