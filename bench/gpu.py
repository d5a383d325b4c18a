"""Everything that a GPU is needed for, in one command: checks of the kernels, and their times.

The parts run one after the other, each in a process of its own, so that a fault or a hang in one takes nothing from the
others. Every result is a line of `gpu.jsonl`, written in one piece as soon as it is there. What a part's seconds do
not suffice for, and what the machine lacks, is written down as skipped, by name.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alexnet_triton import configs
from alexnet_triton.backend import TRITON_INSTALLED, interpreting, use_backend
from alexnet_triton.bench import (
    augment_checks,
    checks,
    graph_checks,
    launches,
    layers,
    lpips,
    model,
    parallel,
    parallel_checks,
    results,
    roofs,
    tuning,
    update_checks,
    waiting,
)
from alexnet_triton.bench.checks import Absent, Measure
from alexnet_triton.bench.plans import Plan
from alexnet_triton.bench.report import LOST, RESULTS, Check, Report, Run, run_cases
from alexnet_triton.bench.timing import machine, nvidia_smi
from alexnet_triton.recipe.data.loader import readers
from alexnet_triton.variants import VARIANTS

BUDGET = 500.0
"""Seconds of all parts together, at which each part has its own."""


# --- parts ------------------------------------------------------------------------------------------------------


def _machine(run: Run) -> Iterator[tuple[str, Check]]:
    yield "machine", lambda: {**machine(run.device.type), **_versions(), **_card(run.device)}
    yield "clocks", _clocks


def _versions() -> dict[str, Any]:
    from importlib import metadata

    found: dict[str, Any] = {"cuda": torch.version.cuda, "hip": torch.version.hip}
    if torch.backends.cudnn.is_available():
        found["cudnn"] = torch.backends.cudnn.version()
    for name in ("alexnet-triton", "triton", "torchvision", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _card(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    card = torch.cuda.get_device_properties(device)
    return {
        "cards": torch.cuda.device_count(),
        "arch": f"gfx {card.gcnArchName}" if torch.version.hip else f"sm_{card.major}{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory": card.total_memory,
    }


def _clocks() -> dict[str, Any]:
    found = nvidia_smi()
    if not found:
        raise Absent("nvidia-smi")
    return found


def _compile(run: Run) -> Iterator[tuple[str, Check]]:
    yield "kernels of every layer and network, into Triton's cache", partial(_compile_in_parallel, run)


def _compile_in_parallel(run: Run) -> dict[str, Any]:
    """Let several processes meet every kernel first: compiled one after another they would take minutes."""
    if run.device.type != "cuda":
        raise Absent("a compiler for the interpreter")
    processes = max(1, min(8, (os.cpu_count() or 2) // 2))
    command = [sys.executable, "-m", "alexnet_triton.bench.gpu", "--shard"]
    rest = [f"--until={time.time() + run.seconds}", f"--out={run.out}", f"--device={run.device}"]
    with tempfile.TemporaryFile("w+") as log:
        started = [
            subprocess.Popen([*command, f"{number}/{processes}", *rest], stdout=log, stderr=log)
            for number in range(processes)
        ]
        end = time.monotonic() + run.seconds
        try:
            for process in started:
                process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in started:
                process.kill()
        codes = [process.wait() for process in started]
        log.seek(0)
        return {"processes": processes, "codes": codes, "log": log.read()[-1500:]}


def compile_shard(run: Run, number: int, processes: int) -> None:
    """Run every `processes`th layer and network once, from the `number`th on; what goes wrong shows in the checks."""
    end = time.monotonic() + run.seconds
    jobs: list[Callable[[], Any]] = [partial(_meet_recipe, run)]
    jobs += [partial(_meet_network, variant, dtype, run) for dtype in run.scale.dtypes[:2] for variant in VARIANTS]
    jobs += [partial(_meet_layer, case, run) for case in checks.cases(run.scale)]
    for job in jobs[number::processes]:
        if time.monotonic() > end:
            return
        try:
            job()
        except Exception as error:
            print(f"{type(error).__name__}: {str(error)[:300]}")


def _meet_layer(case: checks.Case, run: Run) -> None:
    case.layer.ours(*case.layer.draw(run.device, case.dtype))


def _meet_network(variant: str, dtype: torch.dtype, run: Run) -> None:
    model = checks.network(variant, run.scale, run.device, dtype, dropout=0.5)
    checks.gradients(model, checks.images_for(variant, run.scale, run.device, dtype), "triton")


def _meet_recipe(run: Run) -> None:
    """What the training step of docs/graphs.md launches: half precision by autocast, gradients in single."""
    with use_backend("triton"):
        batches = graph_checks.batches_of(run.scale.batches[0], run.scale.image_size or 227)
        graph_checks.train_eagerly(run.device, batches, graph_checks.RATES[:1])


def _networks(run: Run) -> Iterator[tuple[str, Check]]:
    for dtype in run.scale.dtypes:
        if dtype == torch.bfloat16 and run.device.type == "cpu":
            continue  # the interpreter cuts bfloat16 off, which grows from layer to layer
        for variant in VARIANTS:
            name = f"{variant}, {_name(dtype)}, batch {run.scale.batches[0]}"
            yield name, partial(checks.check_network, variant, run.scale, run.device, dtype)


def _layers(run: Run) -> Iterator[tuple[str, Check]]:
    wide = 9216 // run.scale.thin
    for columns, p in ((wide, 0.5), (wide - 1, 0.3)):
        rows = run.scale.batches[0]
        yield f"mask of {rows} x {columns}, p={p}", partial(checks.check_mask, run.device, rows, columns, p)
    for dtype in run.scale.dtypes:
        yield f"update rule, {_name(dtype)}", partial(update_checks.check_update, dtype, run.scale, run.device)
    for variant in ("paper", "torchvision"):
        name = f"augmentation for {variant}, {_name(run.scale.dtypes[0])}"
        yield name, partial(augment_checks.check_augment, variant, run.scale.dtypes[0], run.scale, run.device)
    for case in checks.cases(run.scale):
        yield case.name, partial(checks.check_layer, case, run.device)


def _repeats(run: Run) -> Iterator[tuple[str, Check]]:
    for dtype in (torch.bfloat16, torch.float32):
        for variant in VARIANTS:
            name = f"two passes of {variant}, {_name(dtype)}"
            yield name, partial(checks.check_repeats, variant, run.scale, run.device, dtype)


def _large(run: Run) -> Iterator[tuple[str, Check]]:
    for variant in ("paper", "torchvision"):
        name = f"{variant}, bfloat16, conv1 past {run.scale.most_elements:,} elements"
        yield name, partial(checks.check_large, variant, run.scale, run.device)


def _second_gpu(run: Run) -> Iterator[tuple[str, Check]]:
    yield "paper on cuda:1 while cuda:0 is current", partial(_check_second_gpu, run)


def _check_second_gpu(run: Run) -> list[Measure]:
    if run.device.type != "cuda" or torch.cuda.device_count() < 2:
        raise Absent("a second GPU")
    with torch.cuda.device(0):
        return checks.check_other_device("paper", run.scale, torch.device("cuda:0"), torch.device("cuda:1"))


def _graphs(run: Run) -> Iterator[tuple[str, Check]]:
    for variant in ("paper", "torchvision", "merged", "caffe"):
        yield f"inference of {variant}", partial(graph_checks.check_inference_graph, variant, run.scale, run.device)
        yield f"training step of {variant}", partial(graph_checks.check_training_graph, variant, run.scale, run.device)
    yield "update rule", partial(update_checks.check_update_graph, run.scale, run.device)
    yield "the training step of docs/graphs.md", partial(graph_checks.check_recipe, run.scale, run.device)


def _loading(run: Run) -> Iterator[tuple[str, Check]]:
    """With as many threads that read as `train` has unless it is told, and with two."""
    threads = readers()
    name = f"training of paper waits for packed images, threads that read: {threads}"
    yield name, partial(waiting.check_waiting, "paper", threads, run.scale, run.device)
    yield "the same, of 2 threads", partial(waiting.training, "paper", 2, run.scale, run.device)


def _sanitizer(run: Run) -> Iterator[tuple[str, Check]]:
    yield "memcheck of a small op of each kind", partial(_memcheck, run)


def _memcheck(run: Run) -> list[Measure]:
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if found is None:
        raise Absent("compute-sanitizer, on PATH and under /usr/local/cuda/bin")
    command = [found, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "alexnet_triton.bench.gpu"]
    # Without torch's own cache of memory a buffer ends where the tool sees it end.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command += ["--small-run", f"--device={run.device}", f"--out={run.out}"]
    with tempfile.TemporaryFile("w+") as log:
        try:
            code = subprocess.run(
                command, stdout=log, stderr=log, timeout=max(1.0, run.seconds), env=environment
            ).returncode
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"it was not ready after {run.seconds:.0f} s") from None
        log.seek(0)
        text = log.read()
    if code:
        raise RuntimeError(f"exit code {code}: {text[-1500:]}")
    return [Measure("exit code", float(code), 0.0)]


def _tuning(run: Run) -> Iterator[tuple[str, Check]]:
    """The configs that the parts after this one run with."""
    report, end = Report(run.out / RESULTS), time.monotonic() + run.seconds
    return tuning.cases(
        run.device, run.out, lambda case: report.status("tuning", case) == "passed", lambda: end - time.monotonic()
    )


def _configs_in_force(run: Run) -> dict[str, Any]:
    if run.device.type != "cuda":
        raise Absent("a GPU that configs are for")
    return configs.in_force(torch.cuda.get_device_name(run.device))


BENCHMARKS = {each.name: each for each in (model.BENCHMARK, layers.BENCHMARK, lpips.BENCHMARK, parallel.BENCHMARK)}


def _times(run: Run) -> Iterator[tuple[str, Check]]:
    """Each benchmark's rows, into its own result file; torch.compile, which takes minutes, is `bench model`'s alone."""
    torch.backends.cudnn.benchmark = True  # torch's side takes the fastest that cuDNN has
    yield "clocks before", _clocks
    yield "configs in force", partial(_configs_in_force, run)
    yield "roofs", partial(_roofs, run)
    steps = _plan("model", run)
    last = steps._replace(batches=steps.batches[2:])
    yield from _timings("model", steps._replace(batches=steps.batches[:2]), run)
    yield from _timings("layers", _plan("layers", run), run)
    yield from _timings("lpips", _plan("lpips", run), run)
    for variant in ("paper", "torchvision"):
        name = f"launches of a step, {variant}, batch {run.scale.batches[0]}"
        yield name, partial(launches.launches, variant, run.scale, run.device)
    yield from _timings("model", last, run)
    yield "clocks after", _clocks


def _plan(benchmark: str, run: Run) -> Plan:
    """A benchmark's own plan, without torch.compile; in a dry run a small one, of what the interpreter can do."""
    plan = BENCHMARKS[benchmark].plan(run.device)._replace(roofs=partial(_measured_roofs, run), compiled=False)
    if run.device.type == "cuda":
        return plan._replace(rounds=min(plan.rounds, run.scale.rounds))
    scale = run.scale._replace(thin=2 * run.scale.thin)
    small = plan._replace(variants=plan.variants[:1], batches=(1,), dtypes=(torch.float32,), rounds=1, scale=scale)
    return small._replace(sizes=(scale.image_size or 67,)) if plan.sizes else small


def _roofs(run: Run) -> dict[str, Any]:
    dtypes = (torch.bfloat16, torch.float32)
    if run.device.type == "cuda":
        return roofs.measure(run.device, dtypes)
    return roofs.measure(run.device, dtypes, side=64, copied_bytes=2**16, rounds=run.scale.rounds)


def _measured_roofs(run: Run) -> dict[str, Any]:
    """Those that this run has found, in an earlier process of it too."""
    for row in Report(run.out / RESULTS).rows():
        if row["case"] == "roofs" and row["status"] == "noted":
            return {name: row[name] for name in ("copy_gbs", "tflops", "side", "copied_bytes")}
    return _roofs(run)


def _timings(benchmark: str, plan: Plan, run: Run) -> Iterator[tuple[str, Check]]:
    for name, rows in BENCHMARKS[benchmark].cases(plan):
        yield f"{benchmark}: {name}", partial(_keep_rows, benchmark, rows, run)


def _keep_rows(benchmark: str, rows: results.Rows, run: Run) -> Sequence[Measure]:
    """Measure rows into the benchmark's file; their checks are this case's."""
    head = results.envelope(benchmark, run.device, BENCHMARKS[benchmark].method, _measured_roofs(run))
    measures = []
    for row in rows():
        results.add_row(run.out / f"{benchmark}.json", head, row)
        error, limit = row["check"]["error"], row["check"]["limit"]
        measures.append(Measure(row.get("direction", "error"), math.inf if error is None else error, limit))
    return measures


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Part(NamedTuple):
    """A part of a run: seconds at the full budget, and its checks."""

    seconds: float
    cases: Callable[[Run], Iterator[tuple[str, Check]]]


PARTS: dict[str, Part] = {
    "machine": Part(10, _machine),
    "compile": Part(80, _compile),
    "networks": Part(40, _networks),
    "layers": Part(65, _layers),
    "repeats": Part(15, _repeats),
    "several GPUs": Part(50, parallel_checks.cases),
    "tuning": Part(60, _tuning),
    "times": Part(90, _times),
    "loading": Part(20, _loading),
    "graphs": Part(25, _graphs),
    "large": Part(15, _large),
    "second GPU": Part(10, _second_gpu),
    "sanitizer": Part(20, _sanitizer),
}
"""In the order in which they run; their seconds are the budget's."""


# --- the run ----------------------------------------------------------------------------------------------------


def run(out: Path, budget: float = BUDGET, parts: Sequence[str] = (), device: str = "cuda") -> int:
    """Make all checks, write each result to `out/gpu.jsonl` as it comes, and print a summary.

    The times are in the benchmarks' own files in `out` too, as `model.json`, whole after every row. No config of the
    user's counts: those of `out/configs.json` do, which the part `tuning` makes anew.

    Args:
        out: folder of the results; made where it is missing. Results of an earlier run are replaced.
        budget: seconds of all parts together; each part's share follows.
        parts: names of those of `PARTS` to run; empty for all.
        device: `"cuda"`; `"cpu"` is a dry run of small sizes in Triton's interpreter.

    Returns:
        0, or 1 if a check failed or a part did not come to its end.

    Raises:
        RuntimeError: there is no GPU, or Triton is missing, or the environment asks for its interpreter.
        ValueError: an unknown part.
    """
    unknown = [name for name in parts if name not in PARTS]
    if unknown:
        raise ValueError(f"there is no part {unknown[0]!r}: the parts are {', '.join(PARTS)}")
    _check_device(device)
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out / RESULTS)
    tuned = (tuning.CONFIGS, tuning.LOG) if not parts or "tuning" in parts else ()
    for name in (RESULTS, *(f"{name}.json" for name in BENCHMARKS), *tuned):
        (out / name).unlink(missing_ok=True)
    end = time.monotonic()
    last = end + budget
    for name in PARTS:
        if not parts or name in parts:
            # What a part leaves is the next one's; what it takes beyond its own is not.
            end = max(end, time.monotonic()) + PARTS[name].seconds * budget / BUDGET
            _run_part(report, name, min(end, last), device)
        else:
            report.write(name, "the whole part", "skipped", why="it was not asked for")
    print(summary(report.rows()))
    for name, benchmark in BENCHMARKS.items():
        path = out / f"{name}.json"
        if path.exists():
            print(benchmark.table(results.read(path, name)))
            print(f"written to {path}")
    for path in (out / tuning.CONFIGS, out / tuning.LOG, report.path):
        if path.exists():
            print(f"written to {path}")
    return int(any(row["status"] == "failed" for row in report.rows()))


def _check_device(device: str) -> None:
    if not TRITON_INSTALLED:
        raise RuntimeError("bench gpu needs Triton, which is not installed")
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise RuntimeError("bench gpu needs a GPU, and torch finds none on this machine")
    if interpreting():
        raise RuntimeError("bench gpu needs compiled kernels: unset TRITON_INTERPRET, which asks for the interpreter")


GRACE = 10.0
"""Seconds that a part has, beyond its own, for the check that is running."""

STARTING = 20.0
"""Seconds that a process may take to start and to end."""


def _run_part(report: Report, name: str, end: float, device: str) -> None:
    """Run a part in a process of its own, and again for what is left of it where a check ended the process.

    `end` is a time of `time.monotonic`, until which the process's start counts too.
    """
    environment = {**os.environ, "ALEXNET_TRITON_CACHE": str(report.path.parent.resolve())}
    environment |= {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    while True:
        left = end - time.monotonic()  # with none left the rest is written down as skipped
        command = [sys.executable, "-m", "alexnet_triton.bench.gpu", "--part", name]
        command += [f"--until={time.time() + left}", f"--out={report.path.parent}", f"--device={device}"]
        process = subprocess.Popen(command, env=environment)
        try:
            code = process.wait(max(0.0, left) + GRACE + STARTING)
        except subprocess.TimeoutExpired:
            code = -9
        finally:
            process.kill()
            process.wait()
        guilty = report.in_flight(name)
        if guilty is not None:
            late = ", out of time" if time.monotonic() > end else ""
            report.write(name, guilty, "failed", why=f"its process ended with code {code}{late}")
        elif code != LOST:
            if code not in (0, 1) or not report.done(name):
                report.write(name, "the whole part", "failed", why=f"its process ended with code {code}")
            return


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """What came of each part, and what failed, as text."""
    lines = []
    for name in PARTS:
        counts = collections.Counter(row["status"] for row in rows if row["part"] == name)
        lines.append(f"{name:14}" + ", ".join(f"{number} {status}" for status, number in sorted(counts.items())))
    lines += [f"failed: {row['part']}: {row['case']}: {row['why']}" for row in rows if row["status"] == "failed"]
    return "\n".join(lines)


def _main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One part of `alexnet-triton bench gpu`.")
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--shard", help="compile a share: NUMBER/PROCESSES")
    parser.add_argument("--small-run", action="store_true")
    parser.add_argument("--until", type=float, default=math.inf, help="seconds since 1970")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    seconds = options.until - time.time()
    run_ = Run(device, checks.FULL if device.type == "cuda" else checks.TINY, seconds, options.out)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if options.small_run:
        checks.small_run(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 0
    # A kernel that never ends would keep the process for ever.
    if math.isfinite(seconds):
        faulthandler.dump_traceback_later(max(0.0, seconds) + GRACE, exit=True)
    if options.shard:
        number, processes = map(int, options.shard.split("/"))
        compile_shard(run_, number, processes)
        return 0
    report = Report(options.out / RESULTS)
    return run_cases(report, options.part, PARTS[options.part].cases(run_), run_)


if __name__ == "__main__":
    sys.exit(_main())
