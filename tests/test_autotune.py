"""Work that is found, tried, checked, timed and kept; on the interpreter with a made-up clock, and as a dry run."""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from alexnet_triton import chain, configs
from alexnet_triton.bench import results
from alexnet_triton.bench.plots.files import read
from alexnet_triton.cli import main
from alexnet_triton.configs import cache
from alexnet_triton.kernels import config, launch, linear
from alexnet_triton.kernels.config import ConvConfig, ConvProblem, LinearConfig, LinearProblem
from alexnet_triton.kernels.target import TARGETS
from alexnet_triton.stages import ConvStage, PoolStage
from alexnet_triton.tuning import autotune, candidates, table, trials
from alexnet_triton.tuning.autotune import Options
from alexnet_triton.tuning.candidates import Objection
from alexnet_triton.tuning.launches import DIRECTIONS, LAYERS
from alexnet_triton.tuning.trials import Figures, Trial, Tuned
from alexnet_triton.tuning.works import Work, works
from alexnet_triton.variants import VARIANTS

H100 = TARGETS["sm_90"]
PROBLEM = LinearProblem(4, 8, 16, "forward", False, torch.float32, True)
A, B, C = (LinearConfig(16, 16, 16, splits, 4, 1) for splits in (1, 2, 3))


# --- work ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_and_direction_has_its_work(variant):
    found = works(variant, torch.bfloat16, 2, H100)
    places = [(work.layer, work.direction) for work in found]
    pools = [(name, "weight gradient") for name in LAYERS if name.startswith("pool")]
    assert sorted(places) == sorted({(name, d) for name in LAYERS for d in DIRECTIONS} - set(pools))
    for work in found:
        assert work.problem.images == 2
        made = trials.main_launch(work, work.problem.default(H100), H100)
        assert made.programs > 0, work.place
        module = made.kernel.fn.__module__.rpartition(".")[2]
        assert module in cache._KERNELS[cache.OPS[type(work.problem)]]  # else a changed kernel keeps its configs


def test_work_done_again_with_another_config_gives_the_same_answer():
    stages = (
        ConvStage((2, 2), (1, 1), 1, True, True),
        PoolStage(5, 1e-4, 0.75, 2.0, (3, 3), (2, 2), (0, 0), False, 1),
        ConvStage((1, 1), (1, 1), 1, True, False),
    )
    x = torch.randn(2, 3, 17, 17)
    parameters = [torch.randn(16, 3, 3, 3), torch.randn(16), torch.randn(16, 16, 3, 3)]
    with launch.offered() as offers:
        out, saved = chain.forward(x, parameters, stages, True, False)
        chain.backward(torch.randn_like(out), x, out, saved, parameters, stages, [True] * 4, False)
    assert len(offers) == 3 + 5
    small = {
        config.ConvProblem: ConvConfig(16, 16, 0, 16, 4, 1),
        config.WeightGradientProblem: config.WeightGradientConfig(16, 16, 0, 16, 3, 4, 1),
        config.NormPoolProblem: config.NormPoolConfig(32, 4, 1, 1),
    }
    for problem, again in offers:
        first, other = (
            autotune._answers(again(c)) for c in (problem.default(launch.INTERPRETER), small[type(problem)])
        )
        for a, b in zip(first, other, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_configs_that_are_tried_add_nothing_to_the_answer_or_to_what_it_is_made_of():
    """triton-lang/triton#6547, #781: a kernel that is run many times, and adds to what it finds."""
    x, weight, bias = torch.randn(2, 16, 7, 7), torch.randn(16, 16, 3, 3), torch.randn(16)
    stages = (ConvStage((1, 1), (1, 1), 1, True, True),)
    with launch.offered() as offers:
        out, saved = chain.forward(x, [weight, bias], stages, True, False)
        chain.backward(torch.randn_like(out), x, out, saved, [weight, bias], stages, [True] * 3, False)
    [(problem, again)] = [offer for offer in offers if isinstance(offer.problem, config.WeightGradientProblem)]
    kept = [tensor.clone() for tensor in (x, weight, bias, out, *saved)]
    first = [answer.clone() for answer in autotune._answers(again(problem.default(launch.INTERPRETER)))]

    def in_turn(functions, rounds):
        for function in functions.values():
            answers = [autotune._answers(function()) for _ in range(2)]
            for one, two in zip(*answers, strict=True):
                assert torch.equal(one, two)
                assert one.data_ptr() != two.data_ptr()
        return dict.fromkeys(functions, lasting(1.0))

    chosen = [
        problem.default(launch.INTERPRETER),
        *(config.WeightGradientConfig(16, 16, 0, 16, n, 4, 1) for n in (1, 3)),
    ]
    work = Work("conv3", "weight gradient", problem, again)
    done = autotune.time_candidates(work, [Trial(c) for c in chosen], in_turn)
    assert [trial.objection for trial in done] == [None] * 3
    for before, after in zip(first, autotune._answers(again(chosen[0])), strict=True):
        assert torch.equal(before, after)
    for before, after in zip(kept, (x, weight, bias, out, *saved), strict=True):
        assert torch.equal(before, after)


def test_nothing_is_offered_where_nobody_listens_or_the_config_is_given():
    x, weight = torch.randn(2, 16), torch.randn(8, 16)
    linear.dropout_linear(x, weight, None, None, 0.0, False)
    with launch.offered() as offers:
        linear.dropout_linear(x, weight, None, None, 0.0, False, A)
    assert offers == []


# --- checking and timing ------------------------------------------------------------------------------------


def linear_work(again=None):
    x, weight = torch.randn(4, 16), torch.randn(8, 16)
    right = lambda chosen: linear.dropout_linear(x, weight, None, None, 0.0, False, chosen)  # noqa: E731
    return Work("fc8", "forward", PROBLEM, (lambda chosen: again(chosen, right)) if again else right)


def lasting(seconds):
    return {"median": seconds, "p20": seconds, "p80": seconds, "samples": 1}


def clock(seconds):
    def time(functions, rounds):
        for function in functions.values():
            function()
        return {chosen: lasting(seconds[chosen]) for chosen in functions}

    return time


def test_right_answers_are_timed():
    done = autotune.time_candidates(linear_work(), [Trial(A), Trial(B)], clock({A: 2.0, B: 1.0}))
    assert [trial.seconds for trial in done] == [2.0, 1.0]
    assert not any(trial.objection for trial in done)


def test_times_are_medians_of_samples_without_the_hosts_time(monkeypatch):
    from alexnet_triton.bench import timing

    def in_turn(functions, rounds, device, *, host):
        assert (rounds, device, host) == (3, "cuda", False)
        return {name: [function(), 1.0, 9.0] for name, function in functions.items()}

    monkeypatch.setattr(timing, "in_turn", in_turn)
    found = autotune._on_this_gpu({A: lambda: 2.0, B: lambda: 0.5}, 3)
    assert {chosen: time["median"] for chosen, time in found.items()} == {A: 2.0, B: 1.0}
    assert found[A]["p20"] < 2.0 < found[A]["p80"]


def test_wrong_answers_and_refusals_are_not():
    def again(chosen, right):
        if chosen == C:
            raise RuntimeError("out of resources\nand more")
        return right(chosen) * (1.001 if chosen == B else 1)

    done = autotune.time_candidates(linear_work(again), [Trial(A), Trial(B), Trial(C)], clock({A: 2.0}))
    assert [trial.seconds for trial in done] == [2.0, None, None]
    assert done[1].objection.reason == "its answer is wrong"
    assert str(done[2].objection) == "it cannot be launched: out of resources"


def test_what_a_candidate_leaves_unwritten_is_wrong():
    def again(chosen, right):
        return launch.empty((4, 8), torch.ones(1)) if chosen == B else right(chosen)

    done = autotune.time_candidates(linear_work(again), [Trial(A), Trial(B)], clock({A: 2.0}))
    assert done[1].objection.reason == "its answer is wrong"


def test_what_was_pruned_is_neither_run_nor_timed():
    def again(chosen, right):
        assert chosen == A
        return right(chosen)

    done = autotune.time_candidates(linear_work(again), [Trial(A), Trial(B, Objection("spills"))], clock({A: 1.0}))
    assert done[1].seconds is None


# --- the choice ---------------------------------------------------------------------------------------------


def measured(**seconds):
    return [Trial(c, time=lasting(seconds[name])) for name, c in zip("abc", (A, B, C), strict=True) if name in seconds]


def test_the_default_stays_unless_another_gains_more_than_the_noise():
    assert trials.choose_best(measured(a=1.0, b=0.99), "measured", Counter()).config == A
    assert trials.choose_best(measured(a=1.0, b=0.9), "measured", Counter()).config == B
    modelled = [Trial(A, cycles=100), Trial(B, cycles=96)]
    assert trials.choose_best(modelled, "modelled", Counter()).config == A


def test_of_ties_the_one_wins_that_other_batches_chose():
    tried = measured(a=1.0, b=0.500, c=0.505)
    assert trials.choose_best(tried, "measured", Counter()).config == B
    assert trials.choose_best(tried, "measured", Counter({C: 1})).config == C
    assert trials.choose_best(measured(a=1.0, b=0.5, c=0.6), "measured", Counter({C: 9})).config == B


def test_the_compilers_figures_prune_and_stretch():
    problem = ConvProblem(128, 13, 13, 384, 256, 3, 3, 1, True, torch.bfloat16, False)
    default = problem.default(H100)
    spills, waits, fits = (replace(default, stages=stages) for stages in (2, 3, 5))
    figures = {
        default: Figures(None, 0.4),
        spills: Figures(Objection("registers spill"), None),
        waits: Figures(None, 0.9),
        fits: Figures(None, 0.5),
    }
    done = trials.with_figures(problem, [Trial(config) for config in figures], figures, H100)
    reasons = [trial.objection and trial.objection.reason for trial in done]
    assert reasons == [None, "registers spill", "its tiles and its loop's instructions need more cycles", None]
    assert [trial.issue_share for trial in done] == [0.4, None, 0.9, 0.5]
    assert done[2].cycles == candidates.cycles(problem, waits, H100, 0.9)


def test_what_is_kept_is_what_a_launch_then_gets(tmp_path, monkeypatch):
    monkeypatch.setenv("ALEXNET_TRITON_CACHE", str(tmp_path))

    problem = ConvProblem(128, 13, 13, 384, 256, 3, 3, 1, True, torch.bfloat16, False)
    chosen, card = ConvConfig(64, 32, 0, 64, 4, 2), "NVIDIA Test"
    tried = (Trial(problem.default(H100), time=lasting(2e-4)), Trial(chosen, time=lasting(1e-4)))
    keeper = autotune.Keeper(H100._replace(card=card), "measured", cache.cache_path(), None)
    keeper.keep(Tuned("paper", "conv3", "forward", problem, tried, tried[1]))
    configs.forget()
    before = config.look_up_with(configs.lookup)
    try:
        assert config.choose(H100._replace(card=card), problem) == chosen
    finally:
        config.look_up_with(before)
        configs.forget()
    [kept] = cache.read(cache.cache_path())[card][cache.problem_key(problem)].values()
    assert (kept.source, kept.seconds, kept.default_seconds) == ("measured", 1e-4, 2e-4)


def test_a_row_and_the_summary_say_what_was_tried_and_why_not():
    tried = (
        Trial(A, time=lasting(2e-4)),
        Trial(B, time=lasting(1e-4)),
        Trial(C, Objection("registers spill", "8 bytes a thread")),
    )
    result = Tuned("paper", "fc8", "forward", PROBLEM, tried, tried[1])
    row = table.format_row(result)
    assert row.split()[:7] == ["fc8", "forward", "4", "3", "2", "100.0", "us"]
    assert "2.00" in row
    assert "splits=2" in row
    long = replace(result.best, time=None, cycles=123_456_789.0)
    assert "   2 123,457 kcyc " in table.format_row(replace(result, best=long))
    for width, lines in ((60, 3), (40, 3), (100, 2), (120, 1), (None, 1)):
        assert len(table.format_row(result, width).splitlines()) == lines
    assert all(len(line) < 60 for line in (table.HEADER, *table.format_row(result, 60).splitlines()))
    assert table.format_row(replace(result, best=tried[0]), 60) == table.format_row(replace(result, best=tried[0]), 40)
    text = table.summary([result], "measured")
    assert "3 candidates, 1 pruned (33%), 2 timed" in text
    assert "1  registers spill" in text
    assert "1 of 1 problems gain" in text


# --- the command --------------------------------------------------------------------------------------------


def test_a_dry_run_needs_no_gpu_compiles_prunes_and_exports(tmp_path, capfd):
    path, log = tmp_path / "h100.json", tmp_path / "logs" / "tuning.json"
    options = Options("paper", (1, 2), layer="fc8", direction="forward", dry_run=True, export=path, log=log, jobs=1)
    assert autotune.run(options) == 0
    out = capfd.readouterr().out
    assert "a model's estimate for H100 (sm_90), nothing is measured" in out
    assert "would be timed" in out
    [batches] = cache.parse(path.read_text())["h100"].values()
    assert sorted(batches) == [1, 2]
    assert {one.source for one in batches.values()} == {"modelled"}
    result = read(log, ["tuning"])  # as `plot tuning` takes it
    assert (result.measured, result.machine["device"]) == (False, "NVIDIA H100")
    for batch in (1, 2):
        tried = [row for row in result.rows if row["batch"] == batch]
        assert [row["default"] for row in tried] == [True] + [False] * (len(tried) - 1)
        [chosen] = [row["config"] for row in tried if row["chosen"]]
        assert chosen == batches[batch].config
        assert all(
            (row["pruned"] is None) == (row["issue_share"] is not None) for row in tried if row["pruned"] is None
        )
        assert sum(row["pruned"] is not None for row in tried) >= 0.4 * len(tried)
    assert all(math.isfinite(cache.config_of(one, LinearProblem).splits) for one in batches.values())


class Asked:
    """Stands for the workers: keeps what they are asked to compile, and says that it waits for so many instructions."""

    def __init__(self, *what):
        self.asked = []

    def submit(self, function, variant, dtype, target, number, tried):
        self.asked.append((number, tried))
        return [Figures(None, batch / 1000) for batch, _ in tried]

    def result(self, task, timeout):
        return task


@pytest.mark.parametrize("source", ["measured", "modelled"])
def test_every_survivor_is_compiled_for_its_batch_or_where_none_is_timed_for_the_largest(source, monkeypatch):
    monkeypatch.setattr(autotune, "Workers", Asked)
    tuner = autotune.Tuner(H100, torch.bfloat16, source)
    jobs = [job for layer in ("pool1", "fc8") for job in tuner.jobs("paper", (1, 128), layer, "forward")]
    assert [(job.work.layer, job.batch) for job in jobs] == [("pool1", 1), ("pool1", 128), ("fc8", 1), ("fc8", 128)]
    for pair in (jobs[:2], jobs[2:]):
        wanted = {(job.batch, trial.config) for job in pair for trial in job.trials if trial.objection is None}
        if source == "modelled":
            wanted = {(max(b for b, c in wanted if c == config), config) for _, config in wanted}
        asked = [one for number, tried in tuner._workers.asked if number == pair[0].number for one in tried]
        assert sorted(asked, key=str) == sorted(wanted, key=str)
        for job in pair:
            figures = tuner._figures(job, float("inf"))
            assert set(figures) == {trial.config for trial in job.trials if trial.objection is None}
            shares = {(round(1000 * one.issue_share), config) for config, one in figures.items()}
            assert shares <= wanted
            assert source == "modelled" or {batch for batch, _ in shares} == {job.batch}
    assert tuner.jobs("paper", (1, 128), "fc8", "forward") == []  # met before


class OneTuner:
    """Stands for the real one: it has three problems, and is interrupted at the second."""

    def __init__(self, *what):
        self.tuned = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def jobs(self, *what):
        return [SimpleNamespace(name=f"job {number}") for number in range(3)]

    def tune(self, job, seconds):
        self.tuned += 1
        if self.tuned == 2:
            raise KeyboardInterrupt
        tried = (Trial(A, cycles=2.0), Trial(B, cycles=1.0), Trial(C, Objection("registers spill", "8 bytes")))
        return Tuned("paper", "fc8", "forward", PROBLEM, tried, tried[1])


@pytest.fixture
def compiled(monkeypatch):
    """As in a process that can compile, with a tuner that need not."""
    monkeypatch.setattr(autotune, "interpreting", lambda: False)
    monkeypatch.setattr(autotune, "Tuner", OneTuner)


def test_what_was_found_before_ctrl_c_is_kept_and_said(tmp_path, compiled, capfd):
    path, log = tmp_path / "h100.json", tmp_path / "tuning.json"
    options = Options("paper", dry_run=True, export=path, log=log)
    for _ in range(2):  # the second run's log replaces the first's
        with pytest.raises(
            KeyboardInterrupt, match=f"stopped after 1 of 3 problems; configs are in {path}; every trial"
        ):
            autotune.run(options)
    [batches] = cache.parse(path.read_text())["h100"].values()
    assert cache.config_of(batches[4], LinearProblem) == B
    rows = results.read(log, "tuning")["rows"]
    assert [(row["cycles"], row["default"], row["chosen"]) for row in rows] == [(2, 1, 0), (1, 0, 1), (0, 0, 0)]
    assert rows[2]["pruned"] == {"reason": "registers spill", "figure": "8 bytes"}
    words = ["autotune", "--dry-run", "--export", str(path)]
    assert main(words) == 130
    assert (
        capfd.readouterr().err.strip().endswith(f"alexnet-triton: stopped after 1 of 3 problems; configs are in {path}")
    )


def test_what_cannot_be_kept_is_said_before_anything_is_tuned(tmp_path, compiled, monkeypatch):
    monkeypatch.setattr(OneTuner, "jobs", lambda *what: pytest.fail("it has begun"))
    (tmp_path / "file").write_text("")
    (tmp_path / "mine.json").write_text('{"benchmark": "layers"}')
    for given, why in (
        ({"export": tmp_path / "file" / "h100.json"}, "could not be kept: .*file"),
        ({"export": tmp_path}, "could not be kept: .* is no file"),
        ({"log": tmp_path / "file" / "log.json"}, "could not be kept: .*file"),
        ({"log": tmp_path / "mine.json"}, 'benchmark "layers", expected "tuning"'),
    ):
        with pytest.raises((RuntimeError, ValueError), match=why):
            autotune.run(Options("paper", dry_run=True, **given))
    assert (tmp_path / "mine.json").read_text() == '{"benchmark": "layers"}'


def test_a_spent_budget_is_said_and_ends_the_work(capfd):
    options = Options("paper", (1,), layer="fc8", dry_run=True, budget=1e-3, jobs=1)
    assert autotune.run(options) == 0
    assert "3 problems are left: the budget of 0.001 s is spent" in capfd.readouterr().out


def test_without_a_gpu_only_a_dry_run_is_possible(capfd, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # another Python does it, and sees none
    assert autotune.run(Options()) == 2
    assert "this machine has no GPU: with --dry-run" in capfd.readouterr().err
