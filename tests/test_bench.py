import json
from pathlib import Path

import pytest
import torch

from alexnet_triton import library
from alexnet_triton.bench import cpu, dispatch, memory, timing
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
        "peak memory, training, batch 32",
        "1,024 MiB",
    ):
        assert what in table


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


def test_the_readme_shows_the_committed_results():
    root = Path(__file__).parents[1]
    readme = (root / "README.md").read_text()
    assert cpu.format_result(json.loads((root / "bench" / "results" / "cpu.json").read_text())) in readme
    demo = json.loads((root / "bench" / "results" / "demo.json").read_text())
    assert f"{demo['accuracy']:.1%} of {demo['data']['held_out']} held-out digits" in readme
    assert f"{demo['history']['seconds']:.0f} s of training" in readme


def test_dispatch_is_measured_without_kernels_and_leaves_them_in_place(tmp_path, monkeypatch, capsys):
    before = library._run_stages, library._run_dropout_linear, launch.launch
    monkeypatch.setattr(dispatch, "CALLS", 2)
    dispatch.run(tmp_path, rounds=1)
    rows = json.loads((tmp_path / "dispatch.json").read_text())["rows"]
    assert len(rows) == 10
    assert all(row["us"] > 0 and row["host_us"] > 0 for row in rows)
    assert "conv2d_relu, recorded" in capsys.readouterr().out
    assert (library._run_stages, library._run_dropout_linear, launch.launch) == before
