"""`alexnet-triton autotune`: the fastest config of every launch of a training step, found and kept.

For each problem of each batch the candidates that neither their tiles nor the compiler rule out (`trials`) have their
answers, in buffers full of NaN, held against that of the default, which itself was held against the reference; what is
left is timed, in turn. Each result is on disk as soon as it is known: its config, and in a log every trial.

With no GPU, `--dry-run` does all but the checks and the times, and ranks by a model: the cycles of the tiles'
arithmetic, stretched where the loop's instructions take more than half of the issue slots.
"""

from __future__ import annotations

import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alexnet_triton import configs
from alexnet_triton.backend import interpreting, use_backend
from alexnet_triton.configs import cache
from alexnet_triton.kernels import config as kernels_config
from alexnet_triton.kernels.config import Config, NormPoolProblem, Problem
from alexnet_triton.kernels.target import TARGETS, Target
from alexnet_triton.tuning import table
from alexnet_triton.tuning.accuracy import rms_error
from alexnet_triton.tuning.candidates import Objection
from alexnet_triton.tuning.inspect import run_compiled
from alexnet_triton.tuning.launches import LAYERS
from alexnet_triton.tuning.trials import (
    Figures,
    Trial,
    Tuned,
    choose_best,
    compile_candidates,
    pruned,
    rows,
    with_figures,
)
from alexnet_triton.tuning.works import Work, works
from alexnet_triton.workers import Task, WorkerDied, Workers

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of the RMS error of a candidate's answer, against the default's."""

REFERENCE_LIMITS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of the RMS error of a network's features and their gradients, against the reference's in the same dtype: both round
after every layer, and choose maxima among rounded numbers."""

ROUNDS = 15

METHODS = {
    "measured": f"Candidates of a problem in turn, {ROUNDS} rounds, each after its answer was held against the "
    "default's; the host's time does not count, and the second-level cache is overwritten before each sample.",
    "modelled": "A model's estimate from the compiler's figures, for a card that was not there: nothing was measured. "
    "Cycles are those of the busiest multiprocessor.",
}
"""What a log says of how it was made."""


# --- on the card --------------------------------------------------------------------------------------------


@contextmanager
def _by_the_rule() -> Iterator[None]:
    """Within the block no launch takes a tuned config."""
    before = kernels_config.look_up_with(None)
    try:
        yield
    finally:
        kernels_config.look_up_with(before)


def reference_errors(variant: str, dtype: torch.dtype, batch: int) -> dict[str, float]:
    """RMS errors of the kernels' answers, with the default configs, against plain PyTorch on this GPU, by name."""
    from alexnet_triton.model import AlexNet
    from alexnet_triton.variants import VARIANTS

    torch.manual_seed(0)
    model = AlexNet(16, variant=variant, device="cuda", dtype=dtype, init="kaiming").eval()
    size = VARIANTS[variant].image_size
    images = torch.randn(batch, 3, size, size, device="cuda", dtype=dtype, requires_grad=True)
    answers = []
    for backend in ("triton", "reference"):
        with use_backend(backend), _by_the_rule():
            y = model(images)
            leaves = [images, *model.parameters()]
            answers.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    names = ["logits", "images", *(name for name, _ in model.named_parameters())]
    return {name: rms_error(got, expected) for name, got, expected in zip(names, *answers, strict=True)}


def check_against_reference(variant: str, dtype: torch.dtype, batch: int) -> None:
    """Hold the kernels, with the default configs, against plain PyTorch on this GPU.

    Raises:
        RuntimeError: they differ; then nothing may be tuned.
    """
    for name, error in reference_errors(variant, dtype, batch).items():
        if not error <= REFERENCE_LIMITS[dtype]:
            raise RuntimeError(
                f"the kernels' {name} of {variant} in {dtype}, batch {batch}, are off by {error:.1e} (RMS): nothing is "
                "tuned on kernels that are wrong; `make gpu` says more"
            )


Clock = Callable[[Mapping[Config, Callable[[], Any]], int], dict[Config, Mapping[str, float]]]
"""Gives the times of functions by their configs, over so many rounds: median, p20 and p80, in seconds."""


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
    times = clock(functions, ROUNDS)
    return tuple(replace(trial, time=times.get(trial.config)) for trial in checked)


def _answers(answer: Any) -> list[torch.Tensor]:
    if isinstance(answer, torch.Tensor):
        return [answer]
    return [part for part in answer if part is not None and part.is_floating_point()]


def _on_this_gpu(functions: Mapping[Config, Callable[[], Any]], rounds: int) -> dict[Config, Mapping[str, float]]:
    """Times of each, in turn, without the host's."""
    from alexnet_triton.bench.timing import in_turn, summary

    named = {str(number): function for number, function in enumerate(functions.values())}
    samples = in_turn(named, rounds, "cuda", host=False)
    return {config: summary(samples[str(number)]) for number, config in enumerate(functions)}


# --- the tuner ----------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A problem to be tuned."""

    variant: str
    batch: int
    number: int
    """Of the piece of `works`."""
    work: Work
    """Without tensors."""
    trials: list[Trial]
    """Before compiling."""
    tasks: list[tuple[Task, dict[Config, int]]]
    """What workers compile for it, and where in each answer a config's figures are."""

    @property
    def name(self) -> str:
        """Which it is, in words."""
        return f"{self.work.place} of {self.variant}, batch {self.batch}"


class Tuner:
    """Tunes problems, one after the other, while workers compile what comes next; to be closed by `with`.

    Args:
        target: what is tuned for.
        dtype: of images and parameters.
        source: `"measured"`, on this machine's GPU, or `"modelled"`.
        jobs: processes that compile; None for one a core.
    """

    def __init__(self, target: Target, dtype: torch.dtype, source: str, jobs: int | None = None) -> None:
        self._target, self._dtype, self._source = target, dtype, source
        self._workers = Workers(jobs or os.cpu_count() or 1, [compile_candidates.__module__, "triton.compiler"])
        self._seen: set[Problem] = set()
        self._chosen: dict[str, Counter[Config]] = {}
        self._on_card: tuple[str, int, list[Work]] | None = None

    def __enter__(self) -> Tuner:
        return self

    def __exit__(self, *error: object) -> None:
        self._workers.__exit__()

    def jobs(
        self, variant: str, batches: Sequence[int], layer: str | None = None, direction: str | None = None
    ) -> list[Job]:
        """The problems of a network that this tuner has not met yet, one batch after the other; compiling begins.

        Args:
            variant: of `alexnet_triton.AlexNet`.
            batches: numbers of images.
            layer: one of `launches.LAYERS`; None for all.
            direction: one of `launches.DIRECTIONS`; None for all.
        """
        found = []
        for batch in dict.fromkeys(batches):
            for number, work in enumerate(works(variant, self._dtype, batch, self._target)):
                wanted = layer in (None, work.layer) and direction in (None, work.direction)
                if wanted and work.problem not in self._seen:
                    self._seen.add(work.problem)
                    found.append(Job(variant, batch, number, work, pruned(work.problem, self._target), []))
        for number in dict.fromkeys(job.number for job in found):
            self._compile(variant, [job for job in found if job.number == number])
        return found

    def _compile(self, variant: str, jobs: Sequence[Job]) -> None:
        """Have the candidates of one place in all batches compiled.

        Where they are timed, in all, so that no launch waits for a compiler. Where they are not, a config's code for
        the largest batch speaks for the others: they differ in numbers, which the compiler may know where they are 1.
        """
        batches: dict[Config, list[int]] = {}
        for job in jobs:
            for trial in job.trials:
                if trial.objection is None:
                    batches.setdefault(trial.config, []).append(job.batch)
        # A compiler takes seconds for one of the unrolled kernels, but less than a disassembler starts for others.
        alone = isinstance(jobs[0].work.problem, NormPoolProblem)
        for together in [[config] for config in batches] if alone else [list(batches)]:
            made = {
                (config, batch): (batch if self._source == "measured" else max(batches[config]), config)
                for config in together
                for batch in batches[config]
            }
            tried = list(dict.fromkeys(made.values()))
            task = self._workers.submit(compile_candidates, variant, self._dtype, self._target, jobs[0].number, tried)
            for job in jobs:
                places = {config: tried.index(one) for (config, batch), one in made.items() if batch == job.batch}
                if places:
                    job.tasks.append((task, places))

    def tune(self, job: Job, seconds: float = float("inf")) -> Tuned | None:
        """Choose a problem's config; None where the compiler is not ready within `seconds`."""
        problem = job.work.problem
        if seconds <= 0:
            return None
        try:
            figures = self._figures(job, seconds)
        except TimeoutError:
            return None
        trials = with_figures(problem, job.trials, figures, self._target)
        if self._source == "measured":
            trials = time_candidates(self._work(job), trials, _on_this_gpu)
        others = self._chosen.setdefault(cache.problem_key(problem), Counter())
        best = choose_best(trials, self._source, others)
        others[best.config] += 1
        return Tuned(job.variant, job.work.layer, job.work.direction, problem, trials, best)

    def _figures(self, job: Job, seconds: float) -> dict[Config, Figures]:
        end = time.monotonic() + seconds
        found: dict[Config, Figures] = {}
        for task, places in job.tasks:
            left = end - time.monotonic()
            try:
                made = self._workers.result(task, None if left == float("inf") else max(0.0, left))
            except WorkerDied as error:
                died = Figures(Objection("the compiler dies of it", str(error)), None)
                made = dict.fromkeys(places.values(), died)
            found |= {config: made[place] for config, place in places.items()}
        return found

    def _work(self, job: Job) -> Work:
        """With its tensors on this GPU, which holds those of one batch at a time."""
        if self._on_card is None or self._on_card[:2] != (job.variant, job.batch):
            self._on_card = None
            self._on_card = (job.variant, job.batch, works(job.variant, self._dtype, job.batch))
        return self._on_card[2][job.number]


# --- what is kept -------------------------------------------------------------------------------------------


def entries(tuned: Tuned, card: str, source: str, triton: str) -> cache.Cards:
    """What a file of configs keeps of a result: the best config, be it the default's."""
    best, default = tuned.best, tuned.trials[0]
    facts: dict[str, Any] = {"date": time.strftime("%Y-%m-%d")}
    if best.seconds is not None and default.seconds is not None:
        facts |= {"seconds": float(f"{best.seconds:.3g}"), "default_seconds": float(f"{default.seconds:.3g}")}
    entry = cache.entry_of(best.config, source, type(tuned.problem), triton, **facts)
    return {card: {cache.problem_key(tuned.problem): {tuned.problem.images: entry}}}


class Keeper:
    """Puts results on disk, each as it comes.

    Args:
        target: what is tuned for.
        source: `"measured"` or `"modelled"`.
        path: the file of configs, to which they are added; None for none.
        log: the log, to whose trials those of the results are added; None for none.
        card: what the file of configs calls the target; None: as it is called.

    Raises:
        OSError: a file cannot be written: said before anything is tuned.
        ValueError: there is a file in the log's place, and it is no log.
    """

    def __init__(
        self, target: Target, source: str, path: Path | None, log: Path | None, card: str | None = None
    ) -> None:
        import triton

        self._path, self._card, self._source, self._triton = path, card or target.card, source, triton.__version__
        self._log = None
        if path is not None:
            cache.check_writable(path)
        if log is not None:
            from alexnet_triton.bench import results

            if source == "measured":
                head = results.envelope("tuning", "cuda", METHODS[source])
            else:
                maker = "AMD" if target.backend == "hip" else "NVIDIA"
                head = results.estimate("tuning", f"{maker} {target.card}", METHODS[source])
            cache.check_writable(log)
            self._log = results.ResultFile(log, head)

    def keep(self, tuned: Tuned) -> None:
        """Add a result to the files.

        Raises:
            OSError: one cannot be written any more.
        """
        if self._path is not None:
            cache.merge(self._path, entries(tuned, self._card, self._source, self._triton))
        if self._log is not None:
            self._log.add(rows(tuned))


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
    log: Path | None = None


def run(options: Options) -> int:
    """Tune, print a table, and keep the results; gives the exit code.

    Args:
        options: see `Options`. `budget` is in seconds: where it ends, what is found is kept and the rest is said.

    Raises:
        RuntimeError: no GPU is there and it is no dry run, or the kernels are wrong.
        ValueError: a name that is none, or nothing of that name.
        OSError: what is found could not be kept.
        KeyboardInterrupt: by Ctrl-C; the sentence says what was kept.
    """
    end = time.monotonic() + options.budget
    for what, name, known in (("target", options.target, TARGETS), ("layer", options.layer or LAYERS[0], LAYERS)):
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}: choose one of {', '.join(known)}")
    if interpreting():
        return run_compiled(["autotune", *_words(options)])
    if not options.dry_run and not torch.cuda.is_available():
        raise RuntimeError(
            "autotune times kernels, and this machine has no GPU: with --dry-run it compiles, prunes and says what it "
            "would time"
        )
    target = TARGETS[options.target] if options.dry_run else _this_target()
    keeper, where = _keeper(options, target)
    dtype: torch.dtype = getattr(torch, options.dtype)
    if not options.dry_run:
        for batch in dict.fromkeys(options.batches):
            check_against_reference(options.variant, dtype, batch)
    print(_title(options, target), flush=True)
    with Tuner(target, dtype, _source(options), options.jobs) as tuner:
        jobs = tuner.jobs(options.variant, options.batches, options.layer, options.direction)
        if not jobs:
            raise ValueError(f"{options.layer} has no {options.direction}")
        found: list[Tuned] = []
        try:
            for tuned in table.running(jobs, lambda job: tuner.tune(job, end - time.monotonic())):
                keeper.keep(tuned)
                found.append(tuned)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped after {len(found)} of {len(jobs)} problems{where}") from None
    configs.forget()
    print(table.summary(found, _source(options)))
    if len(found) < len(jobs):
        print(f"{len(jobs) - len(found)} problems are left: the budget of {options.budget:g} s is spent (--budget)")
    print(where.removeprefix("; "), end="\n" if where else "")
    return 0


def _source(options: Options) -> str:
    return "modelled" if options.dry_run else "measured"


def _keeper(options: Options, target: Target) -> tuple[Keeper, str]:
    """Who keeps the results, and where they are, in words."""
    path, card, words = options.export, None, []
    if options.export is not None:
        card = options.export.name.removesuffix(".json")
    elif not options.dry_run:
        path = cache.cache_path()
    if path is not None:
        words.append(f"configs are in {path}")
    if options.log is not None:
        words.append(f"every trial is in {options.log}")
        if options.log.exists():
            from alexnet_triton.bench import results

            results.read(options.log, "tuning")
            options.log.unlink()
    try:
        keeper = Keeper(target, _source(options), path, options.log, card)
    except OSError as error:
        hint = "" if options.export or options.dry_run else "; --export FILE takes the configs"
        raise RuntimeError(f"what is found could not be kept: {error}{hint}") from error
    return keeper, "".join(f"; {each}" for each in words)


def _words(options: Options) -> list[str]:
    """The options as the command line takes them."""
    o = options
    words = ["--variant", o.variant, "--batch", ",".join(map(str, o.batches)), "--dtype", o.dtype, "--target", o.target]
    given = {"--layer": o.layer, "--direction": o.direction, "--jobs": o.jobs, "--export": o.export, "--log": o.log}
    words += [word for name, value in given.items() if value is not None for word in (name, str(value))]
    words += [] if o.budget == float("inf") else ["--budget", f"{o.budget}s"]
    return words + ["--dry-run"] * o.dry_run


def _this_target() -> Target:
    from alexnet_triton.kernels import launch

    return launch.target_of(torch.device("cuda"))


def _title(options: Options, target: Target) -> str:
    what = f"{options.variant}, {options.dtype}, batch {', '.join(map(str, options.batches))}"
    if options.dry_run:
        return f"{what}: a model's estimate for {target.card} ({options.target}), nothing is measured"
    return f"{what}, on {target.card}"
