"""The checks of `bench gpu`, in Triton's interpreter: they pass on right kernels, and fail on broken ones."""

import copy
import json
import os
import signal
import stat
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from test_package import TESTS_OWN
from test_random import mask
from torch import nn

from alexnet_triton import AlexNet, FusedSequential, cli, ops
from alexnet_triton.bench import checks, gpu, graph_checks, launches, results
from alexnet_triton.bench.checks import Case, Conv, Linear, Measure, Pool, Scale
from alexnet_triton.bench.plans import Plan
from alexnet_triton.bench.report import LOST, RESULTS, Report, Run, run_cases
from alexnet_triton.kernels import conv, launch, linear, norm_pool, random, sgd, weight_gradient
from alexnet_triton.stages import ConvStage, PoolStage
from alexnet_triton.variants import VARIANTS

CPU = torch.device("cpu")
SMALL = Scale((2,), 8, 17, 1000, 1)

LAYERS = {
    "strided convolution": Conv((2, 3, 15, 15), (8, 3, 5, 5), ConvStage((2, 2), (1, 1), 1, True, True)),
    "convolution in groups": Conv((2, 8, 5, 5), (12, 4, 3, 3), ConvStage((1, 1), (1, 1), 2, True, True)),
    "normalised pool": Pool((2, 12, 7, 7), PoolStage(5, 1e-3, 0.75, 2.0, (3, 3), (2, 2), (0, 0), False, 2)),
    "pool": Pool((2, 8, 6, 6), PoolStage(0, 0.0, 0.0, 0.0, (3, 3), (2, 2), (0, 0), True, 1)),
    "dropout and linear": Linear(3, 37, 20, 0.5, True),
    "linear": Linear(2, 16, 9, 0.0, False),
}


def broken(measures):
    return {m.name for m in measures if not m.holds}


def check(layer, dtype=torch.float32):
    return checks.check_layer(Case("layer", LAYERS[layer], dtype), CPU)


class Small(nn.Module):
    """A chain and a linear layer, and little else."""

    def __init__(self, dropout):
        super().__init__()
        self.features = FusedSequential(
            nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()
        )
        self.classifier = FusedSequential(nn.Dropout(dropout), nn.Linear(144, 10))

    def forward(self, x):
        return self.classifier(torch.flatten(self.features(x), 1))


@pytest.fixture
def small(monkeypatch):
    """Networks are small ones."""
    first = Conv((1, 3, 17, 17), (8, 3, 5, 5), ConvStage((2, 2), (0, 0), 1, True, True))
    monkeypatch.setattr(checks, "layers", lambda *_: iter([("conv1", first)]))
    monkeypatch.setattr(checks, "network", lambda variant, scale, device, dtype, dropout=0.0: Small(dropout).to(dtype))


@pytest.fixture
def linear_alone(monkeypatch):
    """Networks are one layer, for what is not about kernels."""

    def network(variant, scale, device, dtype, dropout=0.0):
        return FusedSequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(3 * 17 * 17, 10)).to(dtype)

    monkeypatch.setattr(checks, "network", network)


# --- layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_layers_that_are_checked_are_the_networks(variant):
    layers = dict(checks.layers(variant, 4, checks.FULL))
    assert list(layers) == ["conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5", "fc6", "fc7", "fc8"]
    model = AlexNet(variant=variant, device="meta")
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    convs = [layer for layer in layers.values() if isinstance(layer, Conv)]
    fulls = [layer for layer in layers.values() if isinstance(layer, Linear)]
    assert [layer.weight for layer in convs] == [tuple(w.shape) for w in weights[:5]]
    assert [(layer.outputs, layer.inputs) for layer in fulls] == [tuple(w.shape) for w in weights[5:]]
    for layer, module in zip(convs, (m for m in model.modules() if isinstance(m, nn.Conv2d)), strict=True):
        assert layer.stage[:3] == (module.stride, module.padding, module.groups)
    before = {"merged": [0.5, 0.5, 0], "torchvision": [0.5, 0.5, 0]}.get(variant, [0, 0.5, 0.5])
    assert [layer.p for layer in fulls] == before
    assert [layer.relu for layer in fulls] == [True, True, False]
    norms = [m for m in model.modules() if isinstance(m, nn.LocalResponseNorm)]
    assert [p.stage.size for p in (layers["pool1"], layers["pool2"])] == [5 * bool(norms)] * 2
    if norms:
        stage = layers["pool1"].stage
        assert (stage.alpha, stage.k, stage.lrn_groups) == (norms[0].alpha, norms[0].k, getattr(norms[0], "groups", 1))


def test_every_layer_is_checked_in_every_dtype_and_batch():
    cases = checks.cases(checks.FULL)
    for variant in VARIANTS:
        for name in ("conv1", "pool2", "fc8"):
            assert sum(f"{name} of {variant}" in case.name for case in cases) == 3 * 2
    assert len({case.name for case in cases}) == len({case[1:] for case in cases}) == len(cases)


@pytest.mark.parametrize("layer", LAYERS)
def test_right_layers_pass(layer):
    for dtype in checks.FULL.dtypes:
        assert not broken(check(layer, dtype))


KERNELS = [
    ("strided convolution", "enter_kernel"),
    ("strided convolution", "pack_kernel"),
    ("strided convolution", "conv_kernel"),
    ("strided convolution", "leave_kernel"),
    ("convolution in groups", "weight_gradient_kernel"),
    ("convolution in groups", "add_splits_kernel"),
    ("normalised pool", "lrn_max_pool_kernel"),
    ("pool", "lrn_max_pool_backward_kernel"),
    ("dropout and linear", "drop_kernel"),
    ("dropout and linear", "gemm_kernel"),
    ("linear", "gate_kernel"),
]


@pytest.mark.parametrize(("layer", "kernel"), KERNELS)
def test_a_program_that_does_not_run_is_seen(layer, kernel, monkeypatch):
    made = launch.launch

    def one_less(which, programs, **arguments):
        made(which, programs - (which.__name__ == kernel), **arguments)

    monkeypatch.setattr(launch, "launch", one_less)
    assert broken(check(layer))


def scaled(module, name, by=1.01, of=lambda answer: answer):
    """A function that gives a hundredth too much."""
    right = getattr(module, name)

    def wrong(*args, **options):
        answer = right(*args, **options)
        of(answer).mul_(by)
        return answer

    return module, name, wrong


WRONG = [
    ("convolution in groups", scaled(conv, "conv2d_relu"), {"forward"}),
    ("convolution in groups", scaled(conv, "data_gradient"), {"data gradient"}),
    ("convolution in groups", scaled(weight_gradient, "weight_gradient", of=lambda a: a[0]), {"weight gradient"}),
    ("convolution in groups", scaled(weight_gradient, "weight_gradient", of=lambda a: a[1]), {"bias gradient"}),
    ("normalised pool", scaled(norm_pool, "lrn_max_pool", of=lambda a: a[0]), {"forward"}),
    ("normalised pool", scaled(norm_pool, "lrn_max_pool", 0, lambda a: a[1]), {"place"}),
    ("normalised pool", scaled(norm_pool, "lrn_max_pool_backward"), {"gradient"}),
    ("dropout and linear", scaled(linear, "dropout_linear"), {"forward"}),
    ("dropout and linear", scaled(linear, "dropout_linear_backward", of=lambda a: a[0]), {"data gradient"}),
    ("dropout and linear", scaled(linear, "dropout_linear_backward", of=lambda a: a[1]), {"weight gradient"}),
    ("dropout and linear", scaled(linear, "dropout_linear_backward", of=lambda a: a[2]), {"bias gradient"}),
]


@pytest.mark.parametrize(("layer", "change", "expected"), WRONG)
def test_a_direction_that_is_wrong_is_named(layer, change, expected, monkeypatch):
    monkeypatch.setattr(*change)
    for dtype in (torch.float32, torch.bfloat16):
        assert broken(check(layer, dtype)) == expected


def test_a_product_in_tf32_is_not_a_float32_product(monkeypatch):
    right = linear.gemm

    def rounded(a, b, *rest, **options):
        right((a.view(torch.int32) & -(2**13)).view(torch.float32), b, *rest, **options)

    monkeypatch.setattr(linear, "gemm", rounded)
    assert broken(check("linear"))


def test_a_mask_of_another_rate_or_seed_is_seen(monkeypatch):
    assert not broken(checks.check_mask(CPU, 5, 36, 0.5) + checks.check_mask(CPU, 4, 35, 0.3))
    assert torch.equal(checks.mask(-5, 6, 37, 0.3), mask(-5, 6, 37, 0.3))
    right = random.seed
    with monkeypatch.context() as patch:
        patch.setattr(random, "last_dropped", lambda p: int(p * 1.2 * 2**32))
        assert len(broken(checks.check_mask(CPU, 5, 36, 0.5))) == 5
        assert broken(check("dropout and linear"))
    drawn = []
    monkeypatch.setattr(random, "seed", lambda device: drawn.append(0) or right(device) + len(drawn))
    assert broken(check("dropout and linear"))


def test_the_limit_grows_with_the_sum():
    assert checks.limit(torch.float32, 1) < 1.1e-6
    assert 1e-5 < checks.limit(torch.float32, 387_200) < 3e-5
    assert Measure("", float("nan"), 1.0).holds is False


# --- networks ---------------------------------------------------------------------------------------------------


def test_a_network_passes_and_fails():
    paper = Scale((1,), 16, 67, 0, 1)
    assert not broken(checks.check_network("paper", paper, CPU, torch.float32))


def test_a_network_with_a_wrong_gradient_fails(small, monkeypatch):
    assert not broken(checks.check_network("", SMALL, CPU, torch.float16))
    monkeypatch.setattr(*scaled(conv, "data_gradient", 1.1))
    assert {"features.0.weight", "images"} <= broken(checks.check_network("paper", SMALL, CPU, torch.float16))


def test_two_passes_that_differ_are_seen(linear_alone, monkeypatch):
    assert not broken(checks.check_repeats("", SMALL, CPU, torch.bfloat16))
    right = random.seed
    drawn = []
    monkeypatch.setattr(random, "seed", lambda device: drawn.append(0) or right(device) + len(drawn))
    assert "logits" in broken(checks.check_repeats("", SMALL, CPU, torch.float32))


def test_an_end_of_a_large_batch_that_is_wrong_is_seen(small, monkeypatch):
    assert not broken(checks.check_large("", SMALL, CPU))
    right = ops.conv2d_relu

    def wrong(x, *rest):
        y = right(x, *rest)
        return y if len(x) == 4 else y * (torch.arange(len(x)) < len(x) - 1).view(-1, 1, 1, 1)

    monkeypatch.setattr(ops, "conv2d_relu", wrong)
    assert broken(checks.check_large("", SMALL, CPU)) == {"conv1"}


def test_a_network_on_another_device_is_compared(linear_alone):
    assert not broken(checks.check_other_device("", SMALL, CPU, CPU))


def test_graphs_that_replay_what_was_are_seen(linear_alone, monkeypatch):
    one = SMALL._replace(batches=(1,))
    assert not broken(
        graph_checks.check_inference_graph("", one, CPU) + graph_checks.check_training_graph("", one, CPU)
    )

    def stale(function, device):
        result = function()
        return lambda: result

    monkeypatch.setattr(graph_checks, "captured", stale)
    names = broken(graph_checks.check_training_graph("", one, CPU))
    assert {"masks that came again", "p=0.0: parameters left as they were", "p=0.5: replay, 2.weight"} <= names

    def deaf(model, *examples):
        """To values that change; and its answers are all one tensor."""
        before = copy.deepcopy(model)
        answer = torch.empty(1, 10, dtype=torch.bfloat16)
        return lambda images: answer.copy_(before(images).detach())

    monkeypatch.setattr(graph_checks, "graphed", deaf)
    found = broken(graph_checks.check_inference_graph("", one, CPU))
    assert {"an answer that is kept", "values that changed in place", "values that did not count"} <= found


def test_masks_that_do_not_follow_the_generator_are_seen(linear_alone, monkeypatch):
    from alexnet_triton.kernels import random

    one = SMALL._replace(batches=(1,))
    drawn = iter(range(100))
    monkeypatch.setattr(random, "seed", lambda device: torch.tensor([next(drawn)]))
    assert "p=0.5: replay, 2.weight" in broken(graph_checks.check_training_graph("", one, CPU))


def test_the_small_run_meets_every_kernel(monkeypatch):
    met = set()
    monkeypatch.setattr(Conv, "ours", lambda self, *tensors: met.add("conv"))
    monkeypatch.setattr(Pool, "ours", lambda self, *tensors: met.add(("pool", self.stage.size > 0)))
    monkeypatch.setattr(Linear, "ours", lambda self, *tensors: met.add("linear"))
    monkeypatch.setattr(sgd, "sgd", lambda steps, rates: met.add("update"))
    checks.small_run(CPU)
    assert met == {"conv", ("pool", True), ("pool", False), "linear", "update"}


# --- results ----------------------------------------------------------------------------------------------------


def a_run(tmp_path, seconds=60.0):
    return Run(CPU, SMALL, seconds, tmp_path)


def test_every_check_leaves_a_result_whatever_becomes_of_it(tmp_path):
    report = Report(tmp_path / RESULTS)

    def raises():
        raise RuntimeError("no")

    def lacks():
        raise checks.Absent("a tool")

    found = {
        "good": lambda: [Measure("a", 0.1, 0.2)],
        "bad": lambda: [Measure("a", 0.1, 0.2), Measure("b", float("inf"), 0.2)],
        "raises": raises,
        "lacks": lacks,
        "nothing": lambda: [],
        "figures": lambda: {"x": float("nan")},
        "good again": lambda: [Measure("a", 0.1, 0.2)],
    }
    assert run_cases(report, "layers", found.items(), a_run(tmp_path)) == 1
    rows = {row["case"]: row for row in report.rows()}
    statuses = ["passed", "failed", "failed", "skipped", "failed", "noted", "passed"]
    assert [row["status"] for row in rows.values()] == statuses
    assert rows["bad"]["measures"]["b"] == ["inf", 0.2]
    assert rows["bad"]["why"] == "b is inf, the limit 0.2"
    assert rows["raises"]["why"] == "RuntimeError: no"
    assert rows["lacks"]["why"] == "absent: a tool"
    assert rows["figures"]["x"] == "nan"
    text = gpu.summary(list(rows.values()))
    assert "failed: layers: bad: b is inf" in text
    # Made once; and what there is no time for is named.
    assert run_cases(report, "layers", [*found.items(), ("late", raises)], a_run(tmp_path, -1.0)) == 0
    assert report.rows()[7:] == [report.rows()[-1]]
    assert (report.rows()[-1]["case"], report.rows()[-1]["status"]) == ("late", "skipped")


def test_a_device_that_is_lost_ends_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr("alexnet_triton.bench.report._device_answers", lambda device: False)
    report = Report(tmp_path / RESULTS)
    cases = [("a", lambda: 1 / 0), ("b", lambda: [Measure("", 0.0, 0.0)])]
    assert run_cases(report, "graphs", cases, a_run(tmp_path)) == LOST
    assert run_cases(report, "graphs", cases, a_run(tmp_path)) == 0
    assert [(row["case"], row["status"]) for row in report.rows()] == [("a", "failed"), ("b", "passed")]


class Process:
    """Stands for a part's process; each takes the next fate."""

    def __init__(self, fates):
        self.fates = fates

    def __call__(self, command, env):
        return self

    def wait(self, timeout=None):
        if timeout is None:
            return 0
        fate = self.fates.pop(0)
        return fate() if callable(fate) else fate

    def kill(self):
        pass


def test_a_process_that_dies_costs_its_own_check_alone(tmp_path, monkeypatch):
    report = Report(tmp_path / RESULTS)

    def dies():
        report.begin("layers", "conv1")
        return -11

    def hangs():
        report.begin("layers", "conv2")
        raise subprocess.TimeoutExpired("", 1)

    def ends():
        report.write("layers", "conv3", "passed")
        return 0

    monkeypatch.setattr(gpu.subprocess, "Popen", Process([dies, hangs, LOST, ends, -9]))
    gpu._run_part(report, "layers", time.monotonic() + 60, "cuda")
    cases = [(row["case"], row["status"]) for row in report.rows()]
    assert cases == [("conv1", "failed"), ("conv2", "failed"), ("conv3", "passed")]
    assert report.rows()[0]["why"] == "its process ended with code -11"
    gpu._run_part(report, "graphs", time.monotonic() + 60, "cuda")
    assert (report.rows()[-1]["part"], report.rows()[-1]["status"]) == ("graphs", "failed")


def test_the_exit_code_tells_of_a_failure(tmp_path, monkeypatch, capsys):
    status = "passed"
    monkeypatch.setattr(gpu, "_run_part", lambda report, name, *rest: report.write(name, "x", status, why="so"))
    assert gpu.run(tmp_path, device="cpu") == 0
    status = "failed"
    assert cli.main(["bench", "gpu", "--device", "cpu", "--out", str(tmp_path), "--parts", "layers"]) == 1
    rows = Report(tmp_path / RESULTS).rows()
    assert [row["part"] for row in rows] == list(gpu.PARTS)
    assert {row["status"] for row in rows if row["part"] != "layers"} == {"skipped"}
    assert "failed: layers: x: so" in capsys.readouterr().out


def test_the_parts_fit_the_budget():
    assert sum(part.seconds for part in gpu.PARTS.values()) == gpu.BUDGET < 8.5 * 60


def test_an_unknown_part_is_refused(tmp_path, capsys):
    assert cli.main(["bench", "gpu", "--device", "cpu", "--out", str(tmp_path), "--parts", "laiers"]) == 2
    assert "there is no part 'laiers': the parts are machine, compile" in capsys.readouterr().err


def environment():
    return {name: value for name, value in os.environ.items() if name not in TESTS_OWN}


def test_without_a_gpu_and_optional_packages_it_says_what_it_needs():
    code = (
        "import sys\n"
        "for name in ('tqdm', 'safetensors', 'torchvision', 'matplotlib', 'sklearn', 'pytest', 'xdist'):\n"
        "    sys.modules[name] = None\n"
        "from alexnet_triton.cli import main\n"
        "sys.exit(main(['bench', 'gpu']))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**environment(), "CUDA_VISIBLE_DEVICES": ""}
    )
    assert result.returncode == 2
    assert result.stderr.strip().endswith("bench gpu needs a GPU, and torch finds none on this machine")
    assert result.stdout == ""


def test_a_part_without_time_names_what_it_skips(tmp_path):
    assert gpu.run(tmp_path, budget=1e-3, parts=["graphs"], device="cpu") == 0
    rows = [row for row in Report(tmp_path / RESULTS).rows() if row["part"] == "graphs"]
    assert [row["why"] for row in rows] == ["no time was left"] * 10
    assert rows[0]["case"] == "inference of paper"


def test_the_interpreter_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        gpu.run("nowhere")


def test_a_run_that_is_killed_leaves_what_it_had(tmp_path):
    command = [sys.executable, "-m", "alexnet_triton", "bench", "gpu", "--device", "cpu", "--parts", "layers"]
    log = subprocess.DEVNULL
    process = subprocess.Popen(
        command, stdout=log, stderr=log, start_new_session=True, env={**environment(), "OUT": str(tmp_path)}
    )
    report = Report(tmp_path / RESULTS)
    end = time.monotonic() + 100
    try:
        while time.monotonic() < end and not any(row["part"] == "layers" for row in report.rows()):
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    rows = [json.loads(line) for line in report.path.read_text().splitlines()]
    assert [row["status"] for row in rows if row["part"] == "layers"][:1] == ["passed"]


# --- what surrounds the checks ----------------------------------------------------------------------------------


def test_machine_facts_name_what_a_figure_must_name(tmp_path, monkeypatch):
    cases = dict(gpu.PARTS["machine"].cases(a_run(tmp_path)))
    assert {"device", "torch", "triton", "python", "date"} <= set(cases["machine"]())
    answer = ", ".join(["a card", "580.1"] + ["1 MHz"] * 9)
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: "nvidia-smi")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *args, **options: SimpleNamespace(stdout=answer + "\n"))
    facts = cases["clocks"]()
    assert (facts["name"], facts["driver_version"], facts["clocks.sm"]) == ("a card", "580.1", "1 MHz")


@pytest.mark.parametrize("code", [0, 9])
def test_memcheck_is_run_where_it_is_and_heard(code, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$@"\necho "Invalid __global__ read"\nexit {code}\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    report = Report(tmp_path / RESULTS)
    assert run_cases(report, "sanitizer", gpu._sanitizer(a_run(tmp_path)), a_run(tmp_path)) == (code > 0)
    assert report.rows()[0]["status"] == ("failed" if code else "passed")
    if code:
        assert "--tool memcheck --error-exitcode 9" in report.rows()[0]["why"]
        assert "Invalid __global__ read" in report.rows()[0]["why"]


def test_what_the_machine_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: None)
    for part, what in (("sanitizer", "compute-sanitizer"), ("second GPU", "a second GPU")):
        report = Report(tmp_path / RESULTS)
        assert run_cases(report, part, gpu.PARTS[part].cases(a_run(tmp_path)), a_run(tmp_path)) == 0
        assert report.rows()[-1]["status"] == "skipped"
        assert report.rows()[-1]["why"].startswith(f"absent: {what}")


def test_a_shard_goes_on_after_a_kernel_that_does_not_compile(tmp_path, monkeypatch, capsys):
    met = []
    monkeypatch.setattr(gpu, "_meet_layer", lambda case, run: met.append(case) or 1 / 0)
    monkeypatch.setattr(gpu, "_meet_network", lambda *args: met.append(args))
    monkeypatch.setattr(gpu, "_meet_recipe", met.append)
    run = a_run(tmp_path)._replace(scale=checks.TINY)
    for number in range(3):
        gpu.compile_shard(run, number, 3)
    assert len(met) == len(checks.cases(checks.TINY)) + 2 * len(VARIANTS) + 1
    assert "ZeroDivisionError" in capsys.readouterr().out


# --- times ------------------------------------------------------------------------------------------------------


def test_the_times_name_every_layer_and_step_and_the_most_telling_come_first(tmp_path):
    names = [name for name, _ in gpu.PARTS["times"].cases(Run(torch.device("cuda"), checks.FULL, 60.0, tmp_path))]
    order = [
        "roofs",
        "model: training step, paper, bfloat16, batch 128",
        "model: inference, torchvision, bfloat16, batch 1",
        "layers: conv2 of paper, bfloat16, batch 128",
        "layers: fc6 of torchvision, bfloat16, batch 128",
        "lpips: forward and backward, bfloat16, batch 16, 64 pixels",
        "launches of a step, paper, batch 128",
        "model: inference, paper, bfloat16, batch 1024",
    ]
    assert [name for name in names if name in order] == order
    assert len(set(names)) == len(names)


def test_rows_go_into_result_files_as_they_come_and_their_checks_count(tmp_path, monkeypatch):
    report = Report(tmp_path / RESULTS)
    run = a_run(tmp_path)
    monkeypatch.setattr(checks, "layers", lambda *_: iter([("fc6", LAYERS["linear"])]))
    right = ops.dropout_linear
    monkeypatch.setattr(ops, "dropout_linear", lambda x, *rest: right(2 * x - x.detach(), *rest))
    assert run_cases(report, "times", [("roofs", lambda: gpu._roofs(run))], run) == 0
    measured = report.rows()[0]
    cases = gpu._timings("layers", CASE_PLAN._replace(roofs=lambda: gpu._measured_roofs(run)), run)
    assert run_cases(report, "times", cases, run) == 1
    kept = results.read(tmp_path / "layers.json", "layers")
    assert kept["roofs"]["copy_gbs"] == measured["copy_gbs"]  # measured once
    assert ["times" in row for row in kept["rows"]] == [True, False, True]
    assert "data gradient is" in report.rows()[1]["why"]


CASE_PLAN = Plan(CPU, ("paper",), (2,), (torch.float32,), 1, scale=SMALL)


def test_a_run_begins_new_result_files_and_prints_their_tables(tmp_path, monkeypatch, capsys):
    stale = tmp_path / "model.json"
    stale.write_text("of an earlier run")
    row = {"task": "inference", "variant": "paper", "dtype": "float32", "batch": 2, "failed": "so"}
    head = results.envelope("model", "cpu", "")
    monkeypatch.setattr(gpu, "_run_part", lambda *args: results.add_row(stale, head, row))
    gpu.run(tmp_path, parts=["times"], device="cpu")
    assert results.read(stale, "model")["rows"] == [row]
    assert "inference, paper, float32, batch 2\n  no time: so" in capsys.readouterr().out


def test_launches_are_a_gpus():
    with pytest.raises(checks.Absent, match="a GPU's clock"):
        launches.launches("paper", SMALL, CPU)
