"""Measuring several processes: small networks, few rounds, and no figure that a test depends on."""

import json
import math
import os
import re
import subprocess
import sys
import time

import narrow
import parallel_calls
import pytest
import torch

from alexnet_triton import cli, use_backend
from alexnet_triton.bench import (
    benchmark,
    checks,
    gpu,
    parallel,
    parallel_checks,
    parallel_simulation,
    parallel_stages,
    plots,
    readme,
    results,
)
from alexnet_triton.bench.checks import Absent
from alexnet_triton.bench.parallel_processes import Processes, ProcessesFailed
from alexnet_triton.bench.parallel_simulation import Run
from alexnet_triton.bench.parallel_stages import Costs
from alexnet_triton.bench.parallel_steps import Work
from alexnet_triton.bench.parallel_traffic import Traffic
from alexnet_triton.bench.plans import Plan
from alexnet_triton.bench.report import Report, run_cases
from alexnet_triton.bench.report import Run as PartRun
from alexnet_triton.parallel.layout import Layout
from alexnet_triton.parallel.pipeline.costs import Link
from alexnet_triton.parallel.pipeline.local import LocalPipeline
from alexnet_triton.parallel.pipeline.schedules import order

CPU = torch.device("cpu")
SMALL = checks.TINY._replace(thin=16)
WORK = Work("paper", 8, torch.float32, SMALL)
PLAN = Plan(CPU, ("paper",), (8,), (torch.float32,), 1, scale=SMALL)


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def calls():
    """Processes find the tests' own calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.path.dirname(__file__), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def pair(calls):
    with Processes(2, "cpu") as group:
        yield group


def test_each_process_has_a_core_and_a_thread_of_its_own(pair):
    found = pair.call(parallel_calls.where)
    assert [each[:2] for each in found] == [(0, 2), (1, 2)]
    assert [each[3] for each in found] == [1, 1]
    assert [each[4] for each in found] == pair.ids
    assert not any(each[5] for each in found)
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1:
        cores = [each[2] for each in found]
        assert [len(each) for each in cores] == [1, 1]
        assert cores[0] != cores[1]


def test_processes_keep_what_a_call_leaves(pair):
    assert pair.call(parallel_calls.keeps, "first") == pair.call(parallel_calls.keeps, "second") == ["first", "first"]


def test_what_one_process_raises_is_said_once_and_all_end():
    with Processes(2, "cpu") as group, pytest.raises(ProcessesFailed) as failed:
        group.call(parallel_calls.fails_in_the_second)
    assert str(failed.value) == "ValueError: so it is"
    assert failed.value.said[0].startswith("ProcessLost: rank 1 of 2")
    assert not any(map(alive, group.ids))


def test_processes_that_do_not_come_to_an_end_are_ended():
    start = time.monotonic()
    with Processes(1, "cpu") as group, pytest.raises(ProcessesFailed, match="not come to an end in 0.1 s: nothing"):
        group.call(parallel_calls.sleeps, seconds=0.1)
    assert time.monotonic() - start < 60
    assert not alive(group.ids[0])


def test_processes_end_with_the_one_that_started_them():
    code = (
        "import os, signal\n"
        "from alexnet_triton.bench.parallel_processes import Processes\n"
        "with Processes(1, 'cpu') as group:\n"
        "    print(group.ids[0], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    child, end = int(result.stdout), time.monotonic() + 30
    while alive(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert not alive(child)


def alive(number):
    """Whether a process is there, and no zombie."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return os.path.exists("/proc/self") is False


# --- traffic ----------------------------------------------------------------------------------------------------------


def test_collectives_count_as_in_a_ring():
    one = torch.zeros(30)
    for name, args, group, sent in [
        ("send", ([one, one], None, 1, 0), 5, 240),
        ("all_gather_into_tensor", (one, 3, "0"), 5, 240),
        ("reduce_scatter_tensor", (one, "sum", 3, "0"), 5, 80),
        ("_allgather_base_", (torch.zeros(150), one, None), 5, 480),
        ("allgather_", ([[one] * 5], [one], None), 5, 480),
        ("allreduce_", ([one], None), 3, 160),
        ("recv_", ([one], None), 5, 0),
    ]:
        traffic = Traffic()
        traffic.add(name, args, group)
        assert traffic.bytes == sent, name
    traffic.add("alltoall_", ([one],), 3)
    assert traffic.bytes is None


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_two_devices_have_every_layout_and_four_have_copies_too():
    names = [(case.processes, case.name) for case in parallel.cases_for("paper", 3)]
    assert names == [
        (1, "one process"),
        (2, "data parallel"),
        (2, "pipeline, gpipe"),
        (2, "pipeline, 1f1b"),
        (2, "pipeline, zero-bubble"),
        (2, "towers"),
        (2, "hybrid"),
    ]
    more = parallel.cases_for("paper", 4)[len(names) :]
    assert {case.processes for case in more} == {4}
    assert {case.layout.per_replica for case in more} == {1, 2, 4}
    assert all(case.processes % case.layout.per_replica == 0 for case in more)
    assert not any(case.layout.towers for case in parallel.cases_for("torchvision", 4))
    assert parallel.cases_for("paper", 1) == [parallel.ALONE]


def test_one_device_is_refused(monkeypatch):
    monkeypatch.setattr(parallel, "devices_of", lambda device: 1)
    with pytest.raises(RuntimeError, match="needs two cores or more, and 1 is here"):
        list(parallel.cases(PLAN))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="in float32 or, in mixed precision, bfloat16, got float16"):
        list(parallel.cases(PLAN._replace(dtypes=(torch.float16,))))


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ({"loss": 2.0, "error": 0.0}, None),
        ({"loss": 2.001, "error": 0.0}, "loss: off by 0.0005"),
        ({"loss": 2.0, "error": 0.5}, "gradients: off by 0.5"),
        ({"loss": math.nan, "error": 0.0}, "loss: off by nan"),
        ({"failed": "ValueError: so"}, "ValueError: so"),
    ],
)
def test_a_layout_with_other_numbers_has_no_time(found, why):
    row = parallel._row(parallel.cases_for("paper", 2)[1], {"cut": "", "sent": 5, **found}, 2.0, WORK)
    if why is None:
        assert row["sent"] == 5
    assert row.get("failed", "").startswith(why or "")
    assert ("failed" in row) == (why is not None)
    json.dumps(row, allow_nan=False)


class Group:
    """Processes of which one layout is too much."""

    started = 0

    def __init__(self, size, kind):
        self.size, self.kind, self.kept = size, kind, []
        Group.started += 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def call(self, function, name, *args):
        if name == "towers":
            raise ProcessesFailed("ValueError: no towers", ["ValueError: no towers", None])
        if function.__name__ == "prepare":
            self.kept.append(name)
        answers = {"prepare": "", "first_step": (2.0, 0.0), "bytes_sent": 7, "seconds_of": 0.5 * self.size}
        assert name in self.kept
        return [answers[function.__name__]] * self.size


def test_a_layout_that_fails_takes_nothing_from_the_others(monkeypatch):
    monkeypatch.setattr(parallel, "Processes", Group)
    rows = {row["layout"]: row for row in parallel.rows_of(WORK, parallel.cases_for("paper", 2), PLAN)}
    assert Group.started == 3
    assert rows.pop("towers")["failed"] == "ValueError: no towers"
    assert {row["speedup"] for row in rows.values()} == {1.0, 0.5}
    assert all(row["sent"] == 7 for row in rows.values())
    text = parallel.format_result(
        {"machine": {"device": "CPU: x", "threads": 2, "date": "d"}, "rows": [*rows.values()]}
    )
    assert "2: hybrid" in text


# --- simulation -------------------------------------------------------------------------------------------------------


def costs(forward, backward, update, sent=1000):
    """Of a stage; the first microbatch's backward pass takes a tenth of a second less."""
    work = {("F", later): forward for later in (False, True)}
    work |= {("B", later): backward - (0.0 if later else 0.1) for later in (False, True)}
    return Costs(work, update, sent)


def test_a_stage_costs_what_its_own_process_has_measured():
    stages = [costs(1.0, 2.0, 0.25), costs(3.0, 5.0, 0.5)]
    found = parallel_simulation.simulated(Run("gpipe", 2, ""), stages, Link("", 1e4, 0.4))
    # A map travels for half a second, the second one when it is asked for; then a gradient, and the first stage ends.
    assert found.timeline.makespan == pytest.approx(1 + (0.5 + 3) * 2 + (2 * 5 - 0.1) + 0.5 + 2)
    assert found.timeline.busy(0) == pytest.approx(2 * 1 + 2 * 2 - 0.1)
    assert found.step == pytest.approx(found.timeline.makespan + 0.25)
    slow_update = [stages[0], stages[1]._replace(update=9.0)]
    late = parallel_simulation.simulated(Run("gpipe", 2, ""), slow_update, Link("", 1e4, 0.4))
    assert late.step == pytest.approx(found.timeline.end(1) + 9.0)


def test_one_cut_balances_the_layers_times_and_the_other_does_not():
    names = ["conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5", "avgpool", "fc6", "fc7", "fc8"]
    directions = ("forward", "input gradient", "weight gradient")
    times = {(name, direction, 2): 1e-3 * (1 + 9 * (name == "conv4")) for name in names for direction in directions}
    best, uneven = parallel_simulation.cuts(WORK, 4, times)
    # 12 ms are before conv4, 30 in it, 16 behind it, of which pool5 begins after 3: 45 of 58 are the nearest to 70 %.
    assert (best, uneven) == ("features.10", "features.12")


def test_a_links_pace_and_latency_come_from_two_messages():
    small, large = parallel_stages.SMALL, parallel_stages.LARGE
    link = parallel_simulation.link_of([[1e-4 + small / 1e9, 1e-4 + large / 1e9], [5.0, 5.0]])
    assert link.bytes_per_second == pytest.approx(1e9)
    assert link.seconds(large) == pytest.approx(1e-4 + large / 1e9, rel=1e-3)


# --- the benchmark ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What the command writes for a small network, and prints."""
    out = tmp_path_factory.mktemp("parallel")
    pipeline = parallel.Case("pipeline, gpipe", 2, Layout(pipeline=2, microbatches=4, schedule="gpipe", cut=("conv3",)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "BENCHMARK", parallel.BENCHMARK._replace(plan=lambda device: PLAN))
        patch.setattr(parallel, "devices_of", lambda device: 2)
        patch.setattr(
            parallel,
            "cases_for",
            lambda variant, devices: [c for c in CASES(variant, devices) if not c.layout.pipeline > 1] + [pipeline],
        )
        patch.setattr(benchmark.roofs, "measure", lambda *args: {})
        patch.setattr(parallel_simulation.rows_of, "__defaults__", ((4,),))
        assert cli.main(["bench", "parallel", "--device", "cpu", "--out", str(out)]) == 0
    return results.read(out / "parallel.json", "parallel")


CASES = parallel.cases_for


def steps(result):
    return {row["layout"]: row for row in result["rows"] if row["task"] == parallel.TASK}


def test_every_layout_is_timed_after_its_numbers_agree(result):
    rows = steps(result)
    assert list(rows) == ["one process", "data parallel", "towers", "hybrid", "pipeline, gpipe"]
    for name, row in rows.items():
        assert row["check"]["error"] < 1e-4, name
        assert row["times"][results.OURS]["samples"] == 1
        assert row["speedup"] > 0
    assert rows["one process"]["speedup"] == 1.0
    assert rows["pipeline, gpipe"]["cut"] == "features.6"


def test_bytes_are_those_of_the_shapes(result):
    model = checks.network("paper", SMALL, CPU, torch.float32)
    parameters = {name: 4 * p.numel() for name, p in model.named_parameters()}
    before_conv3, *linear = narrow.gathered(model, 3)
    classes = model.classifier[6].out_features
    logits = 8 * -(-classes // 2) * 4
    convolutions = sum(size for name, size in parameters.items() if name.startswith("features"))
    sent = {name: row["sent"] for name, row in steps(result).items()}
    assert sent == {
        "one process": 0,
        "data parallel": sum(parameters.values()),
        "towers": 8 * 4 * (before_conv3 + sum(linear)) + logits,
        "hybrid": 8 * 4 * sum(linear) + logits + convolutions + 4 * 8,  # and the labels
        "pipeline, gpipe": 8 * 4 * before_conv3,
    }


def test_simulated_and_real_pipelines_do_the_same_work(result):
    rows = [row for row in result["rows"] if row["task"] == parallel_simulation.TASK]
    assert [(row["schedule"], row["microbatches"]) for row in rows] == [
        (schedule, 4) for schedule in ("gpipe", "1f1b", "zero-bubble")
    ] * 2  # at the one cut, and at the other
    assert len({row["cut"] for row in rows}) == 2
    for row in rows:
        assert 0 < row["bubble"]["median"] < 1
        assert 0 < row["simulated"]["bubble"] < 1
        assert row["ratio"]["step"] == pytest.approx(row["times"][results.OURS]["median"] / row["simulated"]["step"])
        for found, simulated in zip(row["work"]["real"], row["work"]["simulated"], strict=True):
            assert found.keys() == simulated.keys()
            assert min(found.values()) > 0
    for row in rows[:3]:
        work = sorted((a.stage, a.kind, a.microbatch) for actions in order(row["schedule"], 2, 4) for a in actions)
        for blocks in row["blocks"].values():
            assert sorted(tuple(block[1:4]) for block in blocks) == work
            assert min(block[4] for block in blocks) == 0.0
    assert not any("blocks" in row for row in rows[3:])


def test_the_table_says_all(result, capsys):
    text = readme.TABLES["parallel"].text(result)
    assert text == parallel.format_result(result)
    lines = text.splitlines()
    assert len(lines) == 3 + len(result["rows"])
    assert "training step, paper, float32, batch 8" in text
    assert "simulation, paper, float32, batch 8" in text
    assert "2: 1f1b, 4 microbatches, cut at" in text
    assert max(map(len, lines)) <= 120


def drawn(content, out):
    """The texts of what `plot schedules` draws of a file's content."""
    results.write(out / "parallel.json", content)
    written = plots.run("schedules", [out / "parallel.json"], out)
    assert [path.suffix for path in written] == [".png", ".svg"]
    return re.findall(r"<(?:text|tspan)[^>]*>([^<]+)<", written[1].read_text())


def test_the_picture_shows_each_schedule_simulated_and_real(result, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "DPI", 36)
    found = drawn(result, tmp_path)
    for which in ("simulated", "real"):
        for stage in (0, 1):
            assert found.count(f"{which}, stage {stage}") == 3
    for row in [row for row in result["rows"] if "blocks" in row]:
        assert any(
            text.startswith(f"{row['layout']}: bubble {row['bubble']['median']:.1%}, simulated") for text in found
        )
    assert {"forward", "backward", "input gradient", "weight gradient", "idle"} <= set(found)


@pytest.mark.parametrize(
    ("blocks", "sentence"),
    [
        (None, "has no traced pipeline; `bench parallel` traces them on a CPU"),
        ({"simulated": [[0, 0, "F", 0, 0.0, 1.0]]}, 'must have "simulated" and "real"'),
        ({"simulated": [[0, 0, "X", 0, 0.0, 1.0]], "real": []}, "each a list of process, stage, kind"),
        ({"simulated": [[0, 0, "F", 0, 0.0, "1"]], "real": []}, "each a list of process, stage, kind"),
        ({"simulated": [[0, 0, "F", 0, 1.0, 1.0]], "real": []}, "each a list of process, stage, kind"),
        ({"simulated": [0, 1], "real": []}, "run bench parallel again"),
    ],
)
def test_a_file_without_blocks_is_no_picture(blocks, sentence, result, tmp_path):
    row = next(row for row in result["rows"] if "blocks" in row)
    row = {name: value for name, value in row.items() if name != "blocks"} | ({"blocks": blocks} if blocks else {})
    with pytest.raises(ValueError, match=sentence):
        drawn({**result, "rows": [row]}, tmp_path)


# --- make gpu ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain_ops(monkeypatch):
    """The kernels are not what is checked, and take a minute in the interpreter."""
    monkeypatch.setattr(parallel_checks, "use_backend", lambda name: use_backend("reference"))


def a_run(out, seconds=60.0):
    return PartRun(CPU, SMALL, seconds, out)


def test_one_device_checks_both_stages_and_names_what_it_skips(tmp_path, monkeypatch, plain_ops):
    monkeypatch.setattr(parallel, "devices_of", lambda device: 1)
    report = Report(tmp_path / "gpu.jsonl")
    assert run_cases(report, "several GPUs", gpu.PARTS["several GPUs"].cases(a_run(tmp_path)), a_run(tmp_path)) == 0
    rows = report.rows()
    assert [row["status"] for row in rows] == ["passed", "skipped", "skipped", "skipped"]
    assert [row["why"] for row in rows[1:]] == ["absent: a second GPU", *["absent: a second core"] * 2]


def test_a_pipeline_that_scales_its_gradients_is_found(monkeypatch, plain_ops):
    right = LocalPipeline.step

    def twice(self, images, labels):
        right(self, images, labels)
        return right(self, images, labels)

    monkeypatch.setattr(LocalPipeline, "step", twice)
    broken = [
        m.name for m in parallel_checks.check_stages("paper", "1f1b", torch.float32, SMALL, [CPU, CPU]) if not m.holds
    ]
    assert "gradients" in broken


def test_a_part_without_time_for_a_kill_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "devices_of", lambda device: 2)
    *_, (_, kill) = gpu.PARTS["several GPUs"].cases(a_run(tmp_path, seconds=20.0))
    with pytest.raises(Absent, match="30 s of the part's time"):
        kill()


def test_the_layouts_rows_go_into_the_benchmarks_file(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "devices_of", lambda device: 2)
    monkeypatch.setattr(parallel, "Processes", Group)
    *_, (_, layouts), _ = gpu.PARTS["several GPUs"].cases(a_run(tmp_path))
    measures = {measure.name: measure for measure in layouts()}
    assert measures["towers, 2"].value == math.inf
    assert [name for name, measure in measures.items() if not measure.holds] == ["towers, 2"]
    kept = results.read(tmp_path / "parallel.json", "parallel")["rows"]
    assert [row["layout"] for row in kept] == [case.name for case in parallel.cases_for("paper", 2)]


def test_what_a_part_leaves_of_its_time_is_the_next_ones(tmp_path, monkeypatch):
    ends = {}
    monkeypatch.setattr(gpu, "_run_part", lambda report, name, end, device: ends.setdefault(name, end))
    start = time.monotonic()
    gpu.run(tmp_path, budget=2 * gpu.BUDGET, parts=["machine", "layers", "sanitizer"], device="cpu")
    seconds = 0.0
    for name, end in ends.items():
        seconds += 2 * gpu.PARTS[name].seconds
        assert end - start == pytest.approx(seconds, abs=1.0)
    gpu.run(tmp_path, budget=1e-3, device="cpu")
    assert max(ends.values()) < start + seconds + 1.0


def test_a_kill_ends_all_and_is_named(pair):
    measures = parallel_checks.check_kill(pair, Layout(pipeline=2, microbatches=2), WORK._replace(batch=2))
    assert all(measure.holds for measure in measures), measures
    assert measures[0].value < 20
    assert not any(map(alive, pair.ids))
