"""`bench model`: which peers, that they agree, and that nothing is timed where they do not."""

import sys

import pytest
import torch

from alexnet_triton import FusedSequential
from alexnet_triton.bench import benchmark, checks, layers, model, results
from alexnet_triton.bench.checks import Scale
from alexnet_triton.bench.plans import Plan

CPU = torch.device("cpu")
PLAN = Plan(CPU, ("torchvision",), (2,), (torch.float32,), 1, scale=Scale((2,), 16, 67, 0, 1))


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """As on a CPU with no interpreter."""
    monkeypatch.setattr(layers, "interpreting", lambda: False)


def test_graphs_are_a_gpus_torchvision_its_own_variants_and_compiling_asked_for():
    assert model.peers("paper", CPU, False) == ["alexnet_triton", "eager", "eager, channels-last"]
    assert model.peers("torchvision", CPU, True)[-2:] == ["torch.compile", "torchvision"]
    assert sum("CUDA graph" in name for name in model.peers("paper", torch.device("cuda"), False)) == 2


@pytest.mark.parametrize("task", model.TASKS)
def test_every_peer_computes_what_ours_does(task):
    ours = checks.network("torchvision", PLAN.scale, CPU, torch.float32)
    images = checks.images_for("torchvision", PLAN.scale, CPU, torch.float32)
    found = {}
    for name in ("alexnet_triton", "eager", "eager, channels-last"):
        net = model.network(name, ours)
        assert isinstance(net.features, FusedSequential) == (name == "alexnet_triton")
        before = net.classifier[6].weight.clone()
        found[name] = model.step_of(name, task, net, torch.float32)(images)
        assert torch.equal(before, net.classifier[6].weight) == (task == "inference")
    for answer in found.values():
        torch.testing.assert_close(answer, found["eager"], rtol=1e-3, atol=1e-4)


def test_torchvisions_network_has_our_weights():
    ours = checks.network("torchvision", checks.FULL, CPU, torch.float32)
    theirs = model.network("torchvision", ours)
    assert type(theirs).__module__.startswith("torchvision")
    assert torch.equal(theirs.classifier[6].weight, ours.classifier[6].weight)


def test_half_precision_trains_under_autocast_on_float32_weights():
    net = checks.network("torchvision", PLAN.scale, CPU, torch.float32)
    seen = []
    net.classifier[6].register_forward_hook(lambda layer, args, out: seen.append((layer.weight.dtype, out.dtype)))
    images = checks.images_for("torchvision", PLAN.scale, CPU, torch.float32)
    model.step_of("eager", "training step", net, torch.bfloat16)(images)
    assert seen == [(torch.float32, torch.bfloat16)]


def test_a_peer_that_cannot_run_is_absent_and_the_others_are_timed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    names = model.peers("torchvision", CPU, False)
    row = model.row_of("inference", "torchvision", torch.float32, 2, names, PLAN)
    assert list(row["times"]) == names[:-1]
    assert row["absent"]["torchvision"].startswith("ModuleNotFoundError")
    assert "torchvision: absent" in model.times_table(row)[-1]


@pytest.mark.parametrize("name", [name for name, peer in model.PEERS.items() if peer.graph])
def test_one_graph_of_inference_is_fed_every_set(name):
    ours = checks.network("torchvision", PLAN.scale, CPU, torch.float32).eval()
    sets = [checks.images_for("torchvision", PLAN.scale, CPU, torch.float32) for _ in range(3)]
    function, held = model._ready(name, "inference", ours, sets, torch.float32)
    for images in sets:
        got = function()
        torch.testing.assert_close(got, ours(images).detach(), rtol=1e-3, atol=1e-4)
        assert not got.requires_grad
    assert held is None


@pytest.mark.parametrize("task", model.TASKS)
def test_networks_that_differ_have_no_time(task, monkeypatch):
    right = FusedSequential.forward
    monkeypatch.setattr(FusedSequential, "forward", lambda self, x: right(self, x) * 1.1)
    row = model.row_of(task, "paper", torch.float32, 2, ["alexnet_triton", "eager"], PLAN)
    assert "times" not in row
    assert "off by" in row["failed"]


def test_a_gradient_that_differs_has_no_time(monkeypatch):
    right = FusedSequential.forward
    monkeypatch.setattr(FusedSequential, "forward", lambda self, x: right(self, 2 * x - x.detach()))
    assert "times" not in model.row_of("training step", "paper", torch.float32, 2, ["alexnet_triton"], PLAN)
    assert "times" in model.row_of("inference", "paper", torch.float32, 2, ["alexnet_triton"], PLAN)


def test_every_row_is_written_and_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.roofs, "measure", lambda *args: {"copy_gbs": 1.0, "tflops": {"float32": 1.0}})
    small = model.BENCHMARK._replace(plan=lambda device: PLAN)
    result = benchmark.run(small, tmp_path, "cpu", progress=False, variants=["paper"], batches=[1, 2])
    assert results.read(tmp_path / "model.json", "model") == result
    assert [(row["task"], row["batch"]) for row in result["rows"]] == [
        (task, batch) for batch in (1, 2) for task in ("training step", "inference")
    ]
    table = capsys.readouterr().out
    assert table.startswith("AlexNet: CPU: ")
    assert "inference, paper, float32, batch 2" in table
