"""`bench layers`: what it counts, what it refuses to time, and what it writes."""

import pytest
import torch
import torch.nn.functional as F

from alexnet_triton import ops
from alexnet_triton.bench import benchmark, layers, results
from alexnet_triton.bench.checks import Conv, Linear, Pool, Scale
from alexnet_triton.bench.plans import Plan
from alexnet_triton.stages import ConvStage, PoolStage
from alexnet_triton.tuning.launches import DIRECTIONS, LAYERS

CPU = torch.device("cpu")
ROOFS = {"copy_gbs": 10.0, "tflops": {"float32": 0.1, "bfloat16": 0.2}}
PLAN = Plan(CPU, ("paper",), (2,), (torch.float32,), 1, scale=Scale((2,), 8, 67, 0, 1), roofs=lambda: ROOFS)

SMALL = {
    "convolution in groups": Conv((2, 8, 5, 5), (12, 4, 3, 3), ConvStage((1, 1), (1, 1), 2, True, True)),
    "normalised pool": Pool((2, 12, 7, 7), PoolStage(5, 1e-3, 0.75, 2.0, (3, 3), (2, 2), (0, 0), False, 2)),
    "padded pool": Pool((2, 8, 6, 6), PoolStage(0, 0.0, 0.0, 0.0, (3, 3), (2, 2), (1, 1), True, 1)),
    "dropout and linear": Linear(3, 37, 20, 0.5, True),
    "linear": Linear(2, 16, 9, 0.0, False),
}


@pytest.fixture
def plain(monkeypatch):
    """As on a CPU with no interpreter."""
    monkeypatch.setattr(layers, "interpreting", lambda: False)


@pytest.mark.parametrize("name", SMALL)
def test_both_sides_compute_the_same(name, plain):
    layer = SMALL[name]
    x, *parameters, _ = layer.draw(CPU, torch.float32)
    torch.manual_seed(1)
    expected = layers.theirs(layer, x, parameters)
    torch.manual_seed(1)
    torch.testing.assert_close(layers.ours(layer, x, parameters), expected)


@pytest.mark.parametrize("name", SMALL)
def test_right_layers_pass_on_either_backend(name, monkeypatch):
    for interpreted in (True, False):
        monkeypatch.setattr(layers, "interpreting", lambda answer=interpreted: answer)
        found = layers.check(SMALL[name], torch.float32, CPU)
        assert tuple(found) == layers.directions(SMALL[name])
        assert all(measure.holds for measure in found.values()), found


class Doubled(torch.autograd.Function):
    """Itself, with a gradient that is twice what it should be."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("convolution in groups", "conv2d_relu"),
        ("normalised pool", "lrn_max_pool"),
        ("padded pool", "lrn_max_pool"),
        ("dropout and linear", "dropout_linear"),
    ],
)
def test_a_direction_that_is_wrong_is_named_and_has_no_time(name, op, plain, monkeypatch):
    right = getattr(ops, op)
    with monkeypatch.context() as patch:
        patch.setattr(ops, op, lambda x, *rest: right(Doubled.apply(x), *rest))
        rows = list(layers.rows_of("paper", "a", SMALL[name], torch.float32, 2, PLAN))
    assert [row["direction"] for row in rows if "failed" in row] == ["data gradient"]
    assert all(("times" in row) != ("failed" in row) for row in rows)
    monkeypatch.setattr(ops, op, lambda *args: right(*args) * 1.01)
    assert not layers.check(SMALL[name], torch.float32, CPU)["forward"].holds


def test_a_mask_of_another_rate_fails(plain, monkeypatch):
    monkeypatch.setattr(ops, "dropout_linear", lambda x, w, b, p, relu: F.linear(F.dropout(x, 0.3), w, b).relu())
    assert not layers.check(SMALL["dropout and linear"], torch.float32, CPU)["forward"].holds


def test_every_layer_and_direction_is_written_with_its_floor_and_printed(tmp_path, plain, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.roofs, "measure", lambda *args: ROOFS)
    small = layers.BENCHMARK._replace(plan=lambda device: PLAN)
    result = benchmark.run(small, tmp_path, "cpu", progress=False)
    assert results.read(tmp_path / "layers.json", "layers") == result
    places = [(row["layer"], row["direction"]) for row in result["rows"]]
    expected = [(name, d) for name in LAYERS for d in DIRECTIONS if not name.startswith("pool") or d in DIRECTIONS[:2]]
    assert places == expected
    assert result["machine"]["device"].startswith("CPU: ")
    assert result["roofs"] == ROOFS
    for row in result["rows"]:
        assert row["floor"] > 0
        assert row["check"]["error"] <= row["check"]["limit"]
        assert {"median", "p20", "p80", "samples"} == set(row["times"]["torch"]) == set(row["times"]["alexnet_triton"])
    table = capsys.readouterr().out
    assert table.startswith("Layers of AlexNet: CPU: ")
    assert "conv5 weight gradient" in table
    failed = {**result, "rows": [{**result["rows"][0], "failed": "so"}]}
    assert "no time: so" in layers.format_result(failed)


def test_a_layer_of_two_variants_is_measured_once():
    plan = PLAN._replace(variants=("paper", "caffe"), dtypes=(torch.float32, torch.bfloat16))
    names = [name for name, _ in layers.cases(plan)]
    assert len(names) == len(set(names)) < 4 * len(LAYERS)
    assert sum(name.startswith("conv1 ") for name in names) == 2
    assert sum(name.startswith("pool1 ") for name in names) == 4  # the two normalise differently
