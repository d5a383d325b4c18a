"""A first look at an installed alexnet-triton: `python tests/smoke.py` ends with one line that names what it ran with.

It wants no pytest and nothing of this folder, so that it runs in any environment that the package is in. What the
package takes as it finds it, torchvision and Triton's compiler, is tried where it is there. A failed assertion ends it.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run on CPU tensors

import torch
from torch import nn

import alexnet_triton
from alexnet_triton import AlexNet, alexnet, fuse, ops, read_state_dict, reference, unfuse, use_backend

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
HAS_TRITON = importlib.util.find_spec("triton") is not None


def same(result, expected, limit=1e-5):
    """Whether the RMS of the difference is within `limit` of the expected's."""
    result, expected = result.detach().double(), expected.detach().double()
    assert result.shape == expected.shape, (result.shape, expected.shape)
    error = (result - expected).norm() / expected.norm()
    assert error < limit, f"an error of {error:.2e}, at most {limit} was expected"


def same_network(ours, theirs):
    """Hold a network's output and gradients, the image's among them, to those of another."""
    images = torch.randn(2, 3, 79, 79)
    answers = []
    for network in (ours, theirs):
        x = images.clone().requires_grad_()
        logits = network(x)
        logits.square().sum().backward()
        answers.append([logits, x.grad, *(parameter.grad for parameter in network.parameters())])
        network.zero_grad()
    for result, expected in zip(*answers, strict=True):
        same(result, expected)


def narrowed(network):
    """An AlexNet that was made on the meta device, with few units in its linear layers, in memory."""
    for index, sizes in {1: (9216, 64), 4: (64, 32), 6: (32, 10)}.items():
        network.classifier[index] = nn.Linear(*sizes, device="meta")
    return network.to_empty(device="cpu").eval()


def plain_network():
    """torchvision's AlexNet where there is torchvision, else the same layers without what makes them faster."""
    with torch.device("meta"):
        if HAS_TORCHVISION:
            from torchvision.models import alexnet as torchvisions

            network = torchvisions(weights=None)
        else:
            network = unfuse(alexnet())
    network = narrowed(network)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    return network


def check_network():
    """The network, `fuse`, `unfuse` and state dicts, on the backend that a machine without a GPU has."""
    theirs, ours = plain_network(), narrowed(AlexNet(variant="torchvision", device="meta"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.pth")
        torch.save(theirs.state_dict(), path)
        ours.load_state_dict(read_state_dict(path))
    with use_backend("reference"):
        same_network(ours, theirs)
        same_network(fuse(copy.deepcopy(theirs)), theirs)
    assert type(unfuse(ours).features) is nn.Sequential


def check_op(name, sizes, **options):
    """Hold an op's kernels, forward and backward, to its meaning in float64."""
    tensors = [torch.randn(size).requires_grad_() for size in sizes]
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    with use_backend("triton"):
        result = getattr(ops, name)(*tensors, **options)
        gradient = torch.randn_like(result)
        found = torch.autograd.grad(result, tensors, gradient)
    with use_backend("reference"):
        expected = getattr(ops, name)(*doubles, **options)
    wanted = torch.autograd.grad(expected, doubles, gradient.double())
    for one, other in zip((result, *found), (expected, *wanted), strict=True):
        same(one, other)


def check_kernels():
    """Every op as Triton kernels, in Triton's interpreter."""
    check_op("conv2d_relu", [(2, 6, 9, 8), (8, 3, 3, 3), (8,)], stride=2, padding=1, groups=2)
    check_op("lrn_max_pool", [(2, 8, 9, 9)], k=2.0, ceil_mode=True)
    check_op("lrn_max_pool", [(2, 8, 9, 9)], size=0)
    check_op("dropout_linear", [(3, 20), (7, 20), (7,)], relu=True)
    x, weight = torch.randn(4, 40), torch.randn(5, 40)
    with use_backend("triton"):
        torch.manual_seed(1)
        dropped = ops.dropout_linear(x, weight, p=0.5)
        torch.manual_seed(1)
        mask = ops.dropout_mask(x, 0.5, x.shape)
    same(dropped, reference.dropout_linear(x * mask, weight, None, 0.0, False))
    assert 0 < mask.count_nonzero() < mask.numel()


def command(*words):
    """What `alexnet-triton WORDS` prints, in a process without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = shutil.which("alexnet-triton", path=Path(sys.executable).parent)
    result = subprocess.run([program, *words], capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, f"alexnet-triton {' '.join(words)}: {result.stdout}{result.stderr}"
    return result.stdout


def check_command():
    """The command line, and a kernel compiled for a GPU that is not there."""
    version = alexnet_triton.__version__
    assert version == metadata.version("alexnet-triton"), "the installed package is another one"
    assert command("--version") == f"alexnet-triton {version}\n"
    assert "62,378,344" in command("info", "--variant", "merged")
    if HAS_TRITON:
        found = json.loads(command("inspect", "--target", "sm_90", "--variant", "paper", "--layer", "fc8", "--json"))
        assert all(row["compiled"]["registers"] > 0 for row in found["rows"])


def main():
    """Run every check, and print what with."""
    torch.manual_seed(0)
    check_network()
    check_command()
    if HAS_TRITON:
        check_kernels()
    names = [name for name in ("torch", "triton", "torchvision", "numpy") if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    print(f"alexnet-triton {alexnet_triton.__version__}: Python {platform.python_version()}, {versions}: all is well")


if __name__ == "__main__":
    main()
