"""`bench layers`: what it counts, what it refuses to time, and what it writes."""

import pytest
import torch
import torch.nn.functional as F

from alexnet_triton import ops
from alexnet_triton.bench import checks, layers, results
from alexnet_triton.bench.checks import Conv, Linear, Pool, Scale
from alexnet_triton.bench.plans import Plan
from alexnet_triton.stages import ConvStage, PoolStage
from alexnet_triton.tuning.inspect import DIRECTIONS, LAYERS

CPU = torch.device("cpu")
PLAN = Plan(CPU, ("paper",), (2,), (torch.float32,), 1, scale=Scale((2,), 8, 67, 0, 1))
ROOFS = {"copy_gbs": 10.0, "tflops": {"float32": 0.1, "bfloat16": 0.2}}

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


def test_the_operations_of_a_network_are_its_multiply_adds_twice():
    total = 0
    for _, layer in checks.layers("paper", 1, checks.FULL):
        counts = {layers.least_work(layer, direction, torch.float32)[0] for direction in layers.directions(layer)}
        assert len(counts) == 1
        total += counts.pop()
    assert round(total / 2e6, 1) == 724.4  # million, as published for one image


def test_the_bytes_are_each_tensor_once():
    conv, half = SMALL["convolution in groups"], torch.bfloat16
    x, weight, y = 2 * 8 * 25, 12 * 4 * 9, 2 * 12 * 25
    assert layers.least_work(conv, "forward", half)[1] == 2 * (x + weight + 12 + y)
    assert layers.least_work(conv, "data gradient", half)[1] == 2 * (2 * y + weight + x)
    assert layers.least_work(conv, "weight gradient", half)[1] == 2 * (2 * y + x + weight + 12)
    assert layers.least_work(SMALL["linear"], "data gradient", half)[1] == 2 * (18 + 16 * 9 + 32)  # no ReLU
    normed, pooled = (layers.least_work(SMALL[name], "data gradient", torch.float32)[1] for name in list(SMALL)[1:3])
    assert normed == 4 * (2 * 12 * 9 + 2 * 2 * 12 * 49) + 2 * 12 * 9
    assert pooled == 4 * (2 * 8 * 16 + 2 * 8 * 36) + 2 * 8 * 16


def test_the_floor_is_the_longer_of_arithmetic_and_memory():
    assert layers.floor(10**11, 10, torch.float32, ROOFS) == 1.0
    assert layers.floor(10, 10**10, torch.bfloat16, ROOFS) == 1.0
    assert layers.floor(10**11, 10, torch.bfloat16, ROOFS) == 0.5


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
        rows = list(layers.rows_of("paper", "a", SMALL[name], torch.float32, 2, PLAN, ROOFS))
    assert [row["direction"] for row in rows if "failed" in row] == ["data gradient"]
    assert all(("times" in row) != ("failed" in row) for row in rows)
    monkeypatch.setattr(ops, op, lambda *args: right(*args) * 1.01)
    assert not layers.check(SMALL[name], torch.float32, CPU)["forward"].holds


def test_a_mask_of_another_rate_fails(plain, monkeypatch):
    monkeypatch.setattr(ops, "dropout_linear", lambda x, w, b, p, relu: F.linear(F.dropout(x, 0.3), w, b).relu())
    assert not layers.check(SMALL["dropout and linear"], torch.float32, CPU)["forward"].holds


def test_every_layer_and_direction_is_written_with_its_floor_and_printed(tmp_path, plain, monkeypatch, capsys):
    monkeypatch.setattr(layers, "plan", lambda device: PLAN)
    monkeypatch.setattr(layers.roofs, "measure", lambda *args: ROOFS)
    result = layers.run(tmp_path, device="cpu", progress=False)
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
    names = [name for name, _ in layers.cases(plan, lambda: ROOFS)]
    assert len(names) == len(set(names)) < 4 * len(LAYERS)
    assert sum(name.startswith("conv1 ") for name in names) == 2
    assert sum(name.startswith("pool1 ") for name in names) == 4  # the two normalise differently
