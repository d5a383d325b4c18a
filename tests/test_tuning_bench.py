"""`make gpu`'s tuning: in which order, what is on disk when, and what a network that is wrong costs."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from alexnet_triton.bench import checks, gpu, results, tuning
from alexnet_triton.bench.report import RESULTS, Report, Run, run_cases
from alexnet_triton.configs import cache
from alexnet_triton.kernels.config import LinearConfig, LinearProblem
from alexnet_triton.kernels.target import TARGETS
from alexnet_triton.tuning.trials import Trial, Tuned

CARD = "NVIDIA Test"
TIME = {"median": 2e-4, "p20": 1e-4, "p80": 3e-4, "samples": 3}


class Tuner:
    """Stands for the real one: each network has one problem a batch, and whose compiler is late has no result."""

    def __init__(self, target, dtype, source):
        assert (target.card, dtype, source) == (CARD, torch.bfloat16, "measured")

    def jobs(self, variant, batches):
        return [SimpleNamespace(variant=variant, batch=batch, name=f"fc6 of {variant}, {batch}") for batch in batches]

    def tune(self, job, seconds):
        assert 0 < seconds < 60
        if job.batch == 1024:
            return None
        problem = LinearProblem(job.batch, 8, 16, "forward", False, torch.bfloat16, False)
        half = {name: value / 2 for name, value in TIME.items()}
        trials = (
            Trial(LinearConfig(16, 16, 16, 1, 4, 1), time=TIME),
            Trial(LinearConfig(16, 32, 16, 1, 4, 1), time=half),
        )
        return Tuned(job.variant, "fc6", "forward", problem, trials, trials[1])


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(tuning.launch, "target_of", lambda device: TARGETS["sm_90"]._replace(card=CARD))
    monkeypatch.setattr(tuning.autotune, "Tuner", lambda *rest: nullcontext(Tuner(*rest)))
    head = {"benchmark": "tuning", "machine": {"device": CARD}, "method": "", "measured": True}
    monkeypatch.setattr(results, "envelope", lambda *rest: head)
    wrong = {"torchvision": 1.0, "paper": 0.01}
    monkeypatch.setattr(tuning.autotune, "reference_errors", lambda variant, *rest: {"logits": wrong[variant]})
    monkeypatch.setattr("alexnet_triton.bench.report._device_answers", lambda device: True)


def test_what_is_right_is_tuned_and_on_disk_at_once_and_what_is_wrong_is_not(card, tmp_path, monkeypatch):
    report, run = Report(tmp_path / RESULTS), Run(torch.device("cuda"), checks.FULL, 60.0, tmp_path)
    seen = []
    real = report.write
    monkeypatch.setattr(
        report, "write", lambda *what, **how: (seen.append((tmp_path / "configs.json").exists()), real(*what, **how))
    )
    assert run_cases(report, "tuning", gpu.PARTS["tuning"].cases(run), run) == 1
    rows = [(row["case"].replace(", bfloat16", ""), row["status"]) for row in report.rows()]
    expected = []
    for batch in (128, 1, 1024):
        late = "skipped" if batch == 1024 else "noted"
        for variant, check, problem in (("paper", "passed", late), ("torchvision", "failed", "skipped")):
            place = f"default configs of {variant}, batch {batch}, against the reference"
            expected += [(place, check), (f"fc6 of {variant}, {batch}", problem)]
    assert rows == expected
    assert seen[:2] == [False, True]
    assert report.rows()[1]["time"] != 1e-4  # the row's own
    assert (report.rows()[1]["median"], report.rows()[1]["default_median"]) == (1e-4, 2e-4)
    assert "nothing is tuned on others" in report.rows()[3]["why"]
    [batches] = cache.read(tmp_path / "configs.json")[CARD].values()
    assert sorted(batches) == [1, 128]
    trials = results.read(tmp_path / "tuning.json", "tuning")["rows"]
    assert [(row["batch"], row["default"], row["chosen"]) for row in trials] == [
        (128, True, False), (128, False, True), (1, True, False), (1, False, True),
    ]  # fmt: skip


def test_the_parts_after_it_run_with_its_configs_and_a_run_without_it_keeps_them(tmp_path, monkeypatch):
    assert list(gpu.PARTS).index("tuning") < list(gpu.PARTS).index("times")
    started = []
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command, env: started.append(env) or 1 / 0)
    report = Report(tmp_path / RESULTS)
    with pytest.raises(ZeroDivisionError):
        gpu._run_part(report, "times", 0.0, "cuda")
    assert started[0]["ALEXNET_TRITON_CACHE"] == str(tmp_path)
    monkeypatch.setattr(gpu, "_run_part", lambda *rest: None)
    for parts, left in ((["times"], True), (["tuning"], False), ([], False)):
        (tmp_path / "configs.json").write_text("{}")
        gpu.run(tmp_path, parts=parts, device="cpu")
        assert (tmp_path / "configs.json").exists() == left


def test_without_a_gpu_it_is_skipped_by_name(tmp_path):
    report, run = Report(tmp_path / RESULTS), Run(torch.device("cpu"), checks.TINY, 60.0, tmp_path)
    assert run_cases(report, "tuning", gpu.PARTS["tuning"].cases(run), run) == 0
    assert [row["why"] for row in report.rows()] == ["absent: a GPU whose kernels could be timed"]
    assert json.loads(report.path.read_text())["case"] == "configs of every launch"
