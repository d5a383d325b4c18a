"""`alexnet-triton autotune`: the fastest config of every launch of a training step, found and kept.

For each problem of each batch: candidates (`candidates`); those that the arithmetic of their tiles rules out go; the
rest are compiled in parallel processes, and those that the compiler speaks against go (spills, shared memory, a loop
that keeps the tensor cores waiting); each survivor's answer, in buffers full of NaN, is held against that of the
default, which itself was held against the reference; what is left is timed, in turn. A candidate replaces the default
only if it gains more than the noise, and of candidates that tie, the one wins that other batches chose.

With no GPU, `--dry-run` does all but the last two steps and ranks by a model: the cycles of the tiles' arithmetic,
stretched where the loop's instructions take more than half of the issue slots.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from alexnet_triton import configs
from alexnet_triton.backend import interpreting, use_backend
from alexnet_triton.configs import cache
from alexnet_triton.kernels.config import Config, NormPoolProblem, Problem
from alexnet_triton.kernels.target import TARGETS, Target
from alexnet_triton.tuning import candidates
from alexnet_triton.tuning.accuracy import rms_error
from alexnet_triton.tuning.candidates import Objection
from alexnet_triton.tuning.inspect import LAYERS, run_compiled
from alexnet_triton.tuning.works import Work, works

NOISE = 0.02
"""Share of a time within which two configs tie."""

LEAST_GAIN = {"measured": NOISE, "modelled": 0.05}
"""Share of the default's time that a config must save to replace it."""

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of the RMS error of a candidate's answer, against the default's."""

REFERENCE_LIMITS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of the RMS error of a network's features and their gradients, against the reference's in the same dtype: both round
after every layer, and choose maxima among rounded numbers."""

ROUNDS = 15
TUNED = ("conv_kernel", "weight_gradient_kernel", "gemm_kernel", "lrn_max_pool_kernel", "lrn_max_pool_backward_kernel")


@dataclass(frozen=True)
class Trial:
    """A candidate and what became of it."""

    config: Config
    objection: Objection | None = None
    """Why it was not timed; None for a survivor."""
    issue_share: float | None = None
    cycles: float = 0.0
    """By the model, for the busiest multiprocessor."""
    seconds: float | None = None
    """Measured."""

    @property
    def cost(self) -> float:
        """What candidates are ranked by: seconds where measured, else the model's cycles."""
        return self.cycles if self.seconds is None else self.seconds


@dataclass(frozen=True)
class Tuned:
    """A problem and all its trials, the default's first."""

    layer: str
    direction: str
    problem: Problem
    trials: tuple[Trial, ...]
    best: Trial

    @property
    def gain(self) -> float:
        """The default's time over the best's."""
        return self.trials[0].cost / self.best.cost if self.best.cost else 1.0

    @property
    def survivors(self) -> list[Trial]:
        """What was timed, or would be."""
        return [trial for trial in self.trials if trial.objection is None]


# --- the compiler's word ------------------------------------------------------------------------------------


class Figures(NamedTuple):
    """What the compiler says of a candidate."""

    objection: Objection | None
    issue_share: float | None


@functools.lru_cache(4)
def _works_of(variant: str, dtype: torch.dtype, batch: int, target: Target) -> list[Work]:
    return works(variant, dtype, batch, target)


def compile_candidates(
    variant: str, dtype: torch.dtype, batch: int, target: Target, number: int, tried: Sequence[Config]
) -> list[Figures]:
    """Compile configs for one piece of `works`; runs in a process of a pool."""
    from alexnet_triton.kernels import launch
    from alexnet_triton.tuning.compiler import CompilationFailed, compile_launches

    work = _works_of(variant, dtype, batch, target)[number]
    made = []
    for config in tried:
        with launch.recording(target) as launches:
            work.again(config)
        [main] = [one for one in launches if one.kernel.__name__ in TUNED]
        made.append(main)
    found = []
    for figure in compile_launches(made, target):
        if isinstance(figure, CompilationFailed):
            found.append(Figures(Objection("the compiler refuses it", str(figure)), None))
        elif figure.spilled_bytes:
            found.append(Figures(Objection("registers spill", f"{figure.spilled_bytes} bytes a thread"), None))
        elif figure.shared_memory > target.shared_memory:
            found.append(Figures(Objection("it takes too much shared memory", f"{figure.shared_memory:,} bytes"), None))
        elif not figure.resident:
            found.append(Figures(Objection("it does not fit a multiprocessor", f"for its {figure.limited_by}"), None))
        else:
            found.append(Figures(None, figure.issue_share))
    return found


def _pruned(problem: Problem, tried: Sequence[Config], target: Target) -> list[Trial]:
    """Trials before compiling."""
    objections = candidates.objections(problem, list(tried), target)
    return [Trial(c, objections.get(c), None, candidates.cycles(problem, c, target)) for c in tried]


def _with_figures(
    problem: Problem, trials: Sequence[Trial], figures: Mapping[Config, Figures], target: Target
) -> tuple[Trial, ...]:
    """Trials after compiling: the cycles count what the loop's instructions cost, and whoever needs too many goes."""
    found = []
    for trial in trials:
        if trial.config in figures:
            objection, share = figures[trial.config]
            cycles = candidates.cycles(problem, trial.config, target, share or 0.0)
            trial = replace(trial, objection=objection, issue_share=share, cycles=cycles)
        found.append(trial)
    least = min(trial.cycles for trial in found if trial.objection is None)
    for number, trial in enumerate(found[1:], 1):
        times = trial.cycles / least
        if trial.objection is None and times > candidates.MOST_CYCLES:
            why = Objection("its tiles and its loop's instructions need more cycles", f"{times:.1f} times the least")
            found[number] = replace(trial, objection=why)
    return tuple(found)


# --- on the card --------------------------------------------------------------------------------------------


def check_against_reference(variant: str, dtype: torch.dtype, batch: int) -> None:
    """Hold the kernels, with the configs that they have, against plain PyTorch on this GPU.

    Raises:
        RuntimeError: they differ; then nothing may be tuned.
    """
    from alexnet_triton.model import AlexNet
    from alexnet_triton.variants import VARIANTS

    torch.manual_seed(0)
    model = AlexNet(16, variant=variant, device="cuda", dtype=dtype, init="kaiming").eval()
    size = VARIANTS[variant].image_size
    images = torch.randn(batch, 3, size, size, device="cuda", dtype=dtype, requires_grad=True)
    answers = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            y = model(images)
            leaves = [images, *model.parameters()]
            answers.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    names = ["logits", "images", *(name for name, _ in model.named_parameters())]
    for name, got, expected in zip(names, *answers, strict=True):
        error = rms_error(got, expected)
        if not error <= REFERENCE_LIMITS[dtype]:
            raise RuntimeError(
                f"the kernels' {name} of {variant} in {dtype} are off by {error:.1e} (RMS): nothing is tuned on "
                "kernels that are wrong; `make gpu` says more"
            )


Clock = Callable[[Mapping[Config, Callable[[], Any]], int], dict[Config, float]]
"""Gives the seconds of functions by their configs, over so many rounds."""


def time_candidates(work: Work, trials: Sequence[Trial], clock: Clock) -> tuple[Trial, ...]:
    """Check each survivor's answer against the default's, then time those that are right.

    Args:
        work: with its tensors.
        trials: the default's first.
        clock: `_on_this_gpu`, or a test's own.
    """
    from alexnet_triton.kernels import launch

    expected = _answers(work.again(trials[0].config))
    checked = [trials[0]]
    for trial in trials[1:]:
        if trial.objection is None:
            try:
                with launch.poisoned():
                    got = _answers(work.again(trial.config))
                error = max(rms_error(a, b) for a, b in zip(got, expected, strict=True))
                if not error <= LIMITS[work.problem.dtype]:
                    trial = replace(trial, objection=Objection("its answer is wrong", f"RMS error {error:.1e}"))
            except Exception as failure:  # what cannot be launched is no candidate
                trial = replace(trial, objection=Objection("it cannot be launched", str(failure).partition("\n")[0]))
        checked.append(trial)
    functions = {t.config: functools.partial(work.again, t.config) for t in checked if t.objection is None}
    seconds = clock(functions, ROUNDS)
    return tuple(replace(trial, seconds=seconds.get(trial.config)) for trial in checked)


def _answers(answer: Any) -> list[torch.Tensor]:
    if isinstance(answer, torch.Tensor):
        return [answer]
    return [part for part in answer if part is not None and part.is_floating_point()]


# --- the choice ---------------------------------------------------------------------------------------------


def choose_best(trials: Sequence[Trial], source: str, chosen: Counter[Config]) -> Trial:
    """The survivor that costs least; the default unless another saves enough; of ties, what other batches chose."""
    survivors = [trial for trial in trials if trial.objection is None]
    least = min(trial.cost for trial in survivors)
    if least > trials[0].cost * (1 - LEAST_GAIN[source]):
        return trials[0]
    ties = [trial for trial in survivors if trial.cost <= least * (1 + NOISE)]
    return max(ties, key=lambda trial: (chosen[trial.config], -trial.cost))


def entries(results: Sequence[Tuned], card: str, source: str, triton: str) -> cache.Cards:
    """What a file keeps of the results: every problem's best config, the default's too."""
    problems: dict[str, dict[int, cache.Entry]] = {}
    for result in results:
        best, default = result.best, result.trials[0]
        facts: dict[str, Any] = {"date": time.strftime("%Y-%m-%d")}
        if best.seconds is not None:
            facts |= {"seconds": float(f"{best.seconds:.3g}"), "default_seconds": float(f"{default.seconds:.3g}")}
        entry = cache.entry_of(best.config, source, type(result.problem), triton, **facts)
        problems.setdefault(cache.problem_key(result.problem), {})[result.problem.images] = entry
    return {card: problems}


# --- the command --------------------------------------------------------------------------------------------


class Options(NamedTuple):
    """What `autotune` is told; the fields are the command line's options."""

    variant: str = "merged"
    batches: tuple[int, ...] = (1, 128, 1024)
    dtype: str = "bfloat16"
    layer: str | None = None
    direction: str | None = None
    budget: float = float("inf")
    jobs: int | None = None
    dry_run: bool = False
    target: str = "sm_90"
    export: Path | None = None


def run(options: Options) -> int:
    """Tune, print a table, and keep the results; gives the exit code.

    Args:
        options: see `Options`. `budget` is in seconds: where it ends, what is found is kept and the rest is said.

    Raises:
        RuntimeError: no GPU is there and it is no dry run, or the kernels are wrong.
        ValueError: a name that is none.
    """
    for what, name, known in (("target", options.target, TARGETS), ("layer", options.layer or LAYERS[0], LAYERS)):
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}: choose one of {', '.join(known)}")
    if interpreting():
        return run_compiled(["autotune", *_words(options)])
    import triton

    if not options.dry_run and not torch.cuda.is_available():
        raise RuntimeError(
            "autotune times kernels, and this machine has no GPU: with --dry-run it compiles, prunes and says what it "
            "would time"
        )
    target = TARGETS[options.target] if options.dry_run else _this_target()
    source = "modelled" if options.dry_run else "measured"
    dtype: torch.dtype = getattr(torch, options.dtype)
    if not options.dry_run:
        check_against_reference(options.variant, dtype, min(options.batches))
    end = time.monotonic() + options.budget
    results: list[Tuned] = []
    print(_title(options, target))
    print(_HEADER)
    unfinished = 0
    for tuned in _tuned(options, target, dtype, source, end):
        if tuned is None:
            unfinished += 1
            continue
        results.append(tuned)
        tqdm.write(format_row(tuned))
    print(summary(results, source))
    if unfinished:
        print(f"{unfinished} problems are left: the budget of {options.budget:g} s is spent (--budget)")
    if options.export is not None:
        name = options.export.stem
        options.export.parent.mkdir(parents=True, exist_ok=True)
        cache.merge(options.export, entries(results, name, source, triton.__version__))
        print(f"written to {options.export}")
    elif not options.dry_run:
        _keep(results, target.card, source, triton.__version__)
    return 0


def _words(options: Options) -> list[str]:
    """The options as the command line takes them."""
    o = options
    words = ["--variant", o.variant, "--batch", ",".join(map(str, o.batches)), "--dtype", o.dtype, "--target", o.target]
    given = {"--layer": o.layer, "--direction": o.direction, "--jobs": o.jobs, "--export": o.export}
    words += [word for name, value in given.items() if value is not None for word in (name, str(value))]
    words += [] if o.budget == float("inf") else ["--budget", f"{o.budget}s"]
    return words + ["--dry-run"] * o.dry_run


def _keep(results: Sequence[Tuned], card: str, source: str, triton: str) -> None:
    path = cache.cache_path()
    try:
        cache.merge(path, entries(results, card, source, triton))
    except OSError as error:
        raise RuntimeError(f"the configs could not be kept in {path}: {error}; --export FILE takes them") from error
    configs.forget()
    print(f"kept in {path}")


def _this_target() -> Target:
    from alexnet_triton.kernels import launch

    return launch.target_of(torch.device("cuda"))


def _selected(options: Options, found: Sequence[Work]) -> list[int]:
    """Numbers of the works that are wanted, one for each problem."""
    seen: set[Problem] = set()
    numbers = []
    for number, work in enumerate(found):
        wanted = options.layer in (None, work.layer) and options.direction in (None, work.direction)
        if wanted and work.problem not in seen:
            seen.add(work.problem)
            numbers.append(number)
    return numbers


def _tuned(options: Options, target: Target, dtype: torch.dtype, source: str, end: float) -> Iterator[Tuned | None]:
    """The results as they come; None for a problem that the budget leaves out."""
    chosen: dict[str, Counter[Config]] = {}
    pool = ProcessPoolExecutor(options.jobs or os.cpu_count() or 1, multiprocessing.get_context("spawn"))
    jobs: list[tuple[int, int, Work, list[Trial], Future[list[Figures]]]] = []
    on_card: dict[int, list[Work]] = {}
    try:
        for batch in options.batches:
            found = works(options.variant, dtype, batch, target)
            for number in _selected(options, found):
                work = found[number]
                trials = _pruned(work.problem, candidates.candidates(work.problem, target), target)
                tried = [trial.config for trial in trials if trial.objection is None]
                job = pool.submit(compile_candidates, options.variant, dtype, batch, target, number, tried)
                jobs.append((batch, number, work, trials, job))
        for batch, number, work, trials, job in tqdm(jobs, desc="autotune", unit="problem", leave=False):
            left = end - time.monotonic()
            if left <= 0:
                job.cancel()
                yield None
                continue
            try:
                figures = job.result(None if left == float("inf") else left)
            except TimeoutError:
                yield None
                continue
            tried = [trial.config for trial in trials if trial.objection is None]
            done = _with_figures(work.problem, trials, dict(zip(tried, figures, strict=True)), target)
            if source == "measured":
                if batch not in on_card:
                    on_card = {batch: works(options.variant, dtype, batch)}
                done = time_candidates(on_card[batch][number], done, _on_this_gpu)
            others = chosen.setdefault(cache.problem_key(work.problem), Counter())
            best = choose_best(done, source, others)
            others[best.config] += 1
            yield Tuned(work.layer, work.direction, work.problem, done, best)
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()


def _on_this_gpu(functions: Mapping[Config, Callable[[], Any]], rounds: int) -> dict[Config, float]:
    """Median seconds of each, in turn, without the host's time."""
    from alexnet_triton.bench.timing import in_turn

    named = {str(number): function for number, function in enumerate(functions.values())}
    samples = in_turn(named, rounds, "cuda", host=False)
    return {config: statistics.median(samples[str(number)]) for number, config in enumerate(functions)}


# --- the table ----------------------------------------------------------------------------------------------

_HEADER = f" {'layer':<6}{'direction':<16}{'batch':>6}{'tried':>7}{'timed':>7}{'best':>14}{'gain':>7}  config"


def _title(options: Options, target: Target) -> str:
    what = f"{options.variant}, {options.dtype}, batch {', '.join(map(str, options.batches))}"
    if options.dry_run:
        return f"{what}: a model's estimate for {target.card} ({options.target}), nothing is measured"
    return f"{what}, on {target.card}"


def format_row(tuned: Tuned) -> str:
    """One problem's line: candidates, survivors, the best one's time or modelled cycles, its gain, what it is."""
    best = tuned.best
    if isinstance(tuned.problem, NormPoolProblem) and best.seconds is None:
        cost, gain = "-", "-"
    else:
        cost = f"{best.cycles:,.0f} cyc" if best.seconds is None else f"{best.seconds * 1e6:,.1f} us"
        gain = f"{tuned.gain:.2f}"
    name = "the default" if best is tuned.trials[0] else _brief(best.config)
    counts = f"{tuned.problem.images:>6,}{len(tuned.trials):>7}{len(tuned.survivors):>7}"
    return f" {tuned.layer:<6}{tuned.direction:<16}{counts}{cost:>14}{gain:>7}  {name}"


def _brief(config: Config) -> str:
    return " ".join(f"{name}={value}" for name, value in vars(config).items() if value)


def summary(results: Sequence[Tuned], source: str) -> str:
    """How many candidates there were, what became of them and why."""
    trials = [trial for result in results for trial in result.trials]
    if not trials:
        return "nothing was tuned"
    reasons = Counter(trial.objection.reason for trial in trials if trial.objection is not None)
    pruned = sum(reasons.values())
    verb = "timed" if source == "measured" else "would be timed"
    lines = [
        f"{len(trials):,} candidates, {pruned:,} pruned ({pruned / len(trials):.0%}), {len(trials) - pruned:,} {verb}"
    ]
    lines += [f"  {count:>5,}  {reason}" for reason, count in reasons.most_common()]
    better = [result for result in results if result.best is not result.trials[0]]
    unit = "time" if source == "measured" else "modelled cycles"
    lines.append(f"{len(better)} of {len(results)} problems gain over the default, in {unit}")
    return "\n".join(lines)
