"""What every test shares: threads, seeds, and whole networks that are built once."""

from __future__ import annotations

import copy
import functools
import os

# Kernels run in Triton's interpreter, which reads this when Triton is imported; a test of them asks for
# them with use_backend("triton"), the others run what a machine without a GPU runs.
os.environ["TRITON_INTERPRET"] = "1"
os.environ["ALEXNET_TRITON_BACKEND"] = "reference"

import fashion as fashion_reader
import kernel_cases
import plain
import pytest
import torch
import torchvision

from alexnet_triton import AlexNet, ops, use_backend
from alexnet_triton.kernels import launch

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison = kernel_cases.Poison(monkeypatch)
    yield
    poison.check()


@functools.cache
def _pair(variant: str):
    """A network of ours and the same network in plain torch layers, with the same random weights."""
    ours = AlexNet(10, variant=variant, init="kaiming")
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    is_torchvisions = variant == "torchvision"
    theirs = torchvision.models.alexnet(num_classes=10) if is_torchvisions else plain.alexnet(variant, 10)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.fixture
def pair():
    """Factory of (ours, plain) by variant; copies, so that a test may change them."""
    return lambda variant: copy.deepcopy(_pair(variant))


@pytest.fixture
def channels_last_always(monkeypatch):
    monkeypatch.setattr("alexnet_triton.fusion.cpu.CHANNELS_LAST_PIXELS", 0)


@pytest.fixture
def fashion():
    """Reader of Fashion-MNIST, `fashion(train)`; a test of it is skipped, by name, where it is not installed."""
    read = functools.partial(fashion_reader.fashion_mnist, folder=fashion_reader.FOLDER)
    if read(False) is None:
        pytest.skip(fashion_reader.NOT_INSTALLED)
    return read


@pytest.fixture(params=["triton", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def calls(monkeypatch):
    """Names of the ops that ran, in order."""
    names = []
    for name in ops.__all__:
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, op=op, name=name, **k: (names.append(name), op(*a, **k))[1])
    return names


@pytest.fixture
def launches(monkeypatch):
    """Every launch that is made."""
    made, real = [], launch.launch

    def noted(kernel, programs, **arguments):
        made.append((kernel.__name__, programs, arguments))
        real(kernel, programs, **arguments)

    monkeypatch.setattr(launch, "launch", noted)
    return made
