import json
from types import SimpleNamespace

import pytest
import torch

from alexnet_triton import library
from alexnet_triton.bench import cpu, dispatch, memory, plans, results, roofs, timing
from alexnet_triton.bench.checks import Measure
from alexnet_triton.kernels import launch


def test_functions_are_timed_in_turn_and_the_first_round_does_not_count():
    order = []
    samples = timing.in_turn({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3)
    assert "".join(order) == "abbaabba"
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3}


def test_figures_are_medians_over_the_rounds():
    assert timing.speedup({"a": [1.0, 1.0, 10.0], "b": [2.0, 3.0, 10.0]}, "a", "b") == 2.0
    figures = timing.summary([1.0, 2.0, 3.0, 4.0, 100.0])
    assert figures["median"] == 3
    assert figures["samples"] == 5
    assert figures["p20"] < 3 < figures["p80"]
    assert timing.summary([2.0])["p80"] == 2


def test_machine_names_what_a_figure_must_name():
    facts = timing.machine()
    assert facts["device"].startswith("CPU: ")
    assert {"cores", "threads", "torch", "python", "date"} <= set(facts)


def test_times_of_the_interpreter_are_called_so(monkeypatch):
    for answer in (True, False):
        monkeypatch.setattr(timing, "interpreting", lambda answer=answer: answer)
        assert ("interpreter" in timing.machine()["device"]) == answer


def test_sets_are_taken_in_turn_and_rounds_end_with_the_seconds():
    taken = []
    again = timing.over_sets(taken.append, "abc")
    samples = timing.in_turn({"a": again}, 100, seconds=0.0)
    assert "".join(taken) == "abca"  # one that does not count, and the three that always do
    assert len(samples["a"]) == 3


def test_a_card_is_named_with_driver_and_clocks(monkeypatch):
    answer = ", ".join(["a card", "580.1", "1980 MHz", "2619 MHz", "1981 MHz", "2620 MHz", *["x"] * 5])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(timing.shutil, "which", lambda name: name)
    monkeypatch.setattr(timing.subprocess, "run", lambda *args, **options: SimpleNamespace(stdout=answer + "\n"))
    facts = timing.machine("cuda")
    assert (facts["device"], facts["driver"]) == ("a card", "580.1")
    assert facts["clocks"] == "1980 MHz of 1981 MHz (SM), 2619 MHz of 2620 MHz (memory)"
    assert timing.heading(facts).startswith(f"a card, torch {torch.__version__}")
    assert "threads" in timing.heading(timing.machine())


def test_roofs_are_the_fastest_rounds(monkeypatch):
    monkeypatch.setattr(roofs, "in_turn", lambda functions, *rest, **how: {name: [2.0, 1.0] for name in functions})
    found = roofs.measure(torch.device("cpu"), [torch.float32, torch.bfloat16], side=100, copied_bytes=4000)
    assert found["copy_gbs"] == 8000 / 1e9
    assert found["tflops"] == {"float32": 2e6 / 1e12, "bfloat16": 2e6 / 1e12}


def test_roofs_are_measured():
    found = roofs.measure(torch.device("cpu"), [torch.float32], side=32, copied_bytes=4096, rounds=2)
    assert found["copy_gbs"] > 0
    assert found["tflops"]["float32"] > 0


HEAD = {"benchmark": "layers", "machine": {}, "method": "", "measured": True, "roofs": {}}


def test_a_result_file_is_whole_after_every_row(tmp_path):
    path = tmp_path / "out" / "layers.json"
    seen = []

    def rows():
        for number in range(2):
            yield {"number": number}
            seen.append(len(results.read(path, "layers")["rows"]))

    assert results.measure_cases(path, HEAD, [("case", rows)], False)["rows"] == [{"number": 0}, {"number": 1}]
    assert seen == [1, 2]
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.add_row(path, HEAD, {"number": float("nan")})
    assert len(results.read(path, "layers")["rows"]) == 2
    assert [file.name for file in path.parent.iterdir()] == ["layers.json"]
    with pytest.raises(ValueError, match='expected "model"'):
        results.read(path, "model")
    results.measure_cases(path, HEAD, [], False)
    assert results.read(path, "layers")["rows"] == []


def test_a_row_whose_check_fails_has_no_figures():
    asked = []
    held = results.checked(Measure("forward", 0.1, 0.2), lambda: asked.append(1) or {"times": 1})
    assert held == {"check": {"error": 0.1, "limit": 0.2}, "times": 1}
    for wrong in (0.3, float("nan"), float("inf")):
        row = results.checked(Measure("forward", wrong, 0.2), lambda: asked.append(1) or {"times": 1})
        assert "times" not in row
        assert row["failed"].startswith("forward: off by")
        assert row["check"]["error"] == (0.3 if wrong == 0.3 else None)
    assert len(asked) == 1


def test_a_plan_takes_what_is_asked_for_and_refuses_what_there_is_not():
    own = plans.Plan(torch.device("cpu"), ("paper",), (4,), (torch.float32,), 7)
    assert plans.choose(own) == own
    assert plans.choose(own, ["caffe"], [1, 2], rounds=3) == own._replace(variants=("caffe",), batches=(1, 2), rounds=3)
    with pytest.raises(ValueError, match="unknown variant 'papr': choose one of merged"):
        plans.choose(own, ["papr"])
    for wrong in ({"batches": [1, 0]}, {"rounds": 0}, {"sizes": [-1]}):
        with pytest.raises(ValueError, match="must be at least 1"):
            plans.choose(own, **wrong)


def test_bench_cpu_measures_every_pair_and_writes_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cpu, "peak_bytes", lambda name, task, batch: 2**30)
    monkeypatch.setattr(cpu, "_training", lambda *args: cpu._row("training step, batch 32", "s", SAMPLES))
    monkeypatch.setattr(cpu, "BATCHES", ((1, 1), (2, 1)))
    result = cpu.run(tmp_path / "out", 2, progress=False)
    assert json.loads((tmp_path / "out" / "cpu.json").read_text()) == result
    table = capsys.readouterr().out
    for what in (
        "inference, batch 2",
        "training step, batch 32",
        "the images' gradient, batch 8",
        "LPIPS and its gradient, batch 4",
        "unfuse(LPIPS), then fuse",
        "peak memory, training, batch 32",
        "1,024 MiB",
    ):
        assert what in table


def test_lpips_is_timed_where_it_is_installed_and_right(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "rms_error", lambda found, right: 0.02)
    with pytest.raises(RuntimeError, match="LPIPS gives different numbers when fused; no time is reported"):
        cpu._lpips(1, 1)
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: None)
    assert cpu._lpips(1, 1) == []
    assert "the package lpips is not installed" in capsys.readouterr().out


SAMPLES = {"alexnet_triton": [1.0, 1.0], "torchvision": [1.5, 1.5]}


def test_numbers_that_differ_report_no_time():
    a, b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="no time is reported"):
        cpu._check(a, b, torch.randn(2, 3))


def test_training_step_trains():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 1000))
    before = model[1].weight.clone()
    cpu.training_step(model, torch.randn(4, 3, 2, 2))()
    assert not torch.equal(model[1].weight, before)


def test_peak_memory_of_a_fresh_process_holds_at_least_the_parameters():
    assert memory.peak_bytes("alexnet_triton", "inference", 1) > 61_100_840 * 4


def test_dispatch_is_measured_without_kernels_and_leaves_them_in_place(tmp_path, monkeypatch, capsys):
    before = library._run_stages, library._run_dropout_linear, launch.launch
    monkeypatch.setattr(dispatch, "CALLS", 2)
    dispatch.run(tmp_path, rounds=1)
    rows = json.loads((tmp_path / "dispatch.json").read_text())["rows"]
    assert len(rows) == 10
    assert all(row["us"] > 0 and row["host_us"] > 0 for row in rows)
    assert "conv2d_relu, recorded" in capsys.readouterr().out
    assert (library._run_stages, library._run_dropout_linear, launch.launch) == before
