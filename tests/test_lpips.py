"""`bench lpips`: the trunk is LPIPS's, fused and not, and nothing is timed where the two differ."""

import pytest
import torch

from alexnet_triton import FusedSequential
from alexnet_triton.bench import benchmark, checks, layers, lpips, results
from alexnet_triton.bench.checks import Scale
from alexnet_triton.bench.plans import Plan

CPU = torch.device("cpu")
PLAN = Plan(CPU, ("torchvision",), (2,), (torch.float32,), 1, (63,), Scale((2,), 8, None, 0, 1))


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """As on a CPU with no interpreter."""
    monkeypatch.setattr(layers, "interpreting", lambda: False)


def test_the_maps_are_the_networks_behind_each_relu():
    network = checks.network("torchvision", PLAN.scale, CPU, torch.float32)
    x = torch.randn(2, 3, 63, 63)
    with torch.no_grad():
        maps = lpips.Trunk(network.features)(x)
        for end, found in zip((2, 5, 8, 10, 12), maps, strict=True):
            torch.testing.assert_close(found, network.features[:end](x))
    assert not any(parameter.requires_grad for parameter in network.features.parameters())


def test_ours_alone_is_fused_and_all_have_the_same_weights():
    peers = lpips.trunks(PLAN, torch.float32)
    for name, trunk in peers.items():
        assert all(isinstance(part, FusedSequential) == (name == "alexnet_triton") for part in trunk.slices)
        for parameter, expected in zip(trunk.parameters(), peers["eager"].parameters(), strict=True):
            assert torch.equal(parameter, expected)


@pytest.mark.parametrize("task", lpips.TASKS)
def test_trunks_that_differ_have_no_time(task, monkeypatch):
    right = FusedSequential.forward
    monkeypatch.setattr(FusedSequential, "forward", lambda self, x: right(self, x) * 1.01)
    row = lpips.row_of(task, torch.float32, 2, 63, PLAN)
    assert "times" not in row
    assert row["failed"].startswith(("relu", "the image's gradient"))


def test_a_gradient_that_differs_has_no_time(monkeypatch):
    right = FusedSequential.forward
    monkeypatch.setattr(FusedSequential, "forward", lambda self, x: right(self, 2 * x - x.detach()))
    assert lpips.row_of("forward and backward", torch.float32, 2, 63, PLAN)["failed"].startswith("the image's gradient")
    assert "times" in lpips.row_of("forward", torch.float32, 2, 63, PLAN)


def test_every_row_is_written_and_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.roofs, "measure", lambda *args: {"copy_gbs": 1.0, "tflops": {"float32": 1.0}})
    small = lpips.BENCHMARK._replace(plan=lambda device: PLAN)
    result = benchmark.run(small, tmp_path, "cpu", progress=False, sizes=[63])
    assert results.read(tmp_path / "lpips.json", "lpips") == result
    assert [(row["task"], row["size"]) for row in result["rows"]] == [(task, 63) for task in lpips.TASKS]
    assert all(list(row["times"]) == ["alexnet_triton", "eager", "eager, channels-last"] for row in result["rows"])
    table = capsys.readouterr().out
    assert table.startswith("LPIPS's trunk: CPU: ")
    assert "forward and backward, float32, batch 2, 63x63" in table
