"""This network on a CPU beside torchvision's, and LPIPS fused and not: same weights, pair by pair in one run."""

from __future__ import annotations

import copy
import importlib.util
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from alexnet_triton import alexnet, fuse, unfuse
from alexnet_triton.bench.memory import peak_bytes
from alexnet_triton.bench.timing import in_turn, machine, speedup, summary
from alexnet_triton.tuning.accuracy import rms_error

OURS, THEIRS = "alexnet_triton", "torchvision"
"""Of the fused LPIPS and the plain one, too: torchvision's layers are what LPIPS runs."""

BATCHES = ((1, 8), (8, 3), (32, 1))
"""Batch sizes of inference, and how many times the rounds each gets."""

AIMS = {
    "inference, batch 1": 1.0,
    "inference, batch 32": 1.3,
    "training step, batch 32": 1.1,
    "LPIPS and its gradient, batch 4": 1.15,
    "peak memory, inference, batch 32": 1.0,
    "peak memory, training, batch 32": 1.0,
}
"""Least ratio of torchvision's figure to ours."""


def training_step(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """Forward, backward and SGD with momentum on one batch, as a function to be timed."""
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def run(out: Path, rounds: int = 15, *, progress: bool = True) -> dict[str, Any]:
    """Measure, print a table, and write `out/cpu.json`.

    Args:
        out: folder of the JSON file; made where it is missing.
        rounds: samples of each time at batch 32 (more at smaller batches).
        progress: show a progress bar.

    Raises:
        RuntimeError: the two networks' numbers differ; then nothing is reported.
    """
    import torchvision

    from alexnet_triton.bench import results  # not where `memory` imports this module: its modules would count

    torch.manual_seed(0)
    theirs = torchvision.models.alexnet()
    ours = alexnet(device="meta")
    ours.load_state_dict({key: value.clone() for key, value in theirs.state_dict().items()}, assign=True)
    rows: list[dict[str, Any]] = []
    with tqdm(total=10, desc="bench cpu", disable=not progress) as bar:
        for batch, times in BATCHES:
            rows.append(_inference(ours, theirs, batch, rounds * times))
            bar.update()
        rows.append(_training(ours, theirs, 32, rounds))
        bar.update()
        rows.append(_image_gradient(ours, theirs, 8, rounds))
        bar.update()
        rows += _lpips(4, rounds)
        bar.update(2)
        for task in ("inference", "training"):
            rows.append(_memory(task, 32))
            bar.update()
        rows.append(_dispatch(ours, theirs, rounds * 20))
        bar.update()
    result = {
        "machine": machine(),
        "method": "median over rounds, models in turn, same weights, 224x224 (LPIPS 256x256)",
        "rows": rows,
    }
    results.write(out / "cpu.json", result)
    print(format_result(result))
    print(f"written to {out / 'cpu.json'}")
    return result


def _check(ours: nn.Module, theirs: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        y, expected = ours.eval()(images), theirs.eval()(images)
    if not torch.allclose(y, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()):
        raise RuntimeError("the two networks give different numbers for the same weights; no time is reported")


def _row(what: str, unit: str, samples: dict[str, list[float]]) -> dict[str, Any]:
    row = {"what": what, "unit": unit, "ratio": speedup(samples, OURS, THEIRS), "aim": AIMS.get(what)}
    return {**row, **{name: summary(values) for name, values in samples.items()}}


def _inference(ours: nn.Module, theirs: nn.Module, batch: int, rounds: int) -> dict[str, Any]:
    images = torch.randn(batch, 3, 224, 224)
    _check(ours, theirs, images)
    with torch.inference_mode():
        samples = in_turn({OURS: lambda: ours(images), THEIRS: lambda: theirs(images)}, rounds)
    return _row(f"inference, batch {batch}", "s", samples)


def _training(ours: nn.Module, theirs: nn.Module, batch: int, rounds: int) -> dict[str, Any]:
    images = torch.randn(batch, 3, 224, 224)
    steps = {OURS: training_step(ours.train(), images), THEIRS: training_step(theirs.train(), images)}
    return _row(f"training step, batch {batch}", "s", in_turn(steps, rounds))


def _image_gradient(ours: nn.Module, theirs: nn.Module, batch: int, rounds: int) -> dict[str, Any]:
    images = torch.randn(batch, 3, 224, 224, requires_grad=True)

    def gradient(model: nn.Module) -> Callable[[], Any]:
        model = copy.deepcopy(model).eval().requires_grad_(False)
        return lambda: torch.autograd.grad(model(images).sum(), images)

    samples = in_turn({OURS: gradient(ours), THEIRS: gradient(theirs)}, rounds)
    return _row(f"the images' gradient, batch {batch}", "s", samples)


def _lpips(batch: int, rounds: int) -> list[dict[str, Any]]:
    """LPIPS of two batches and its gradient for the first, and what `fuse` takes; nothing where it is not installed."""
    if importlib.util.find_spec("lpips") is None:
        print("LPIPS is not timed: the package lpips is not installed (it comes with 'alexnet-triton[bench]')")
        return []
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision in the manner of 2022
        plain = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    fused = fuse(copy.deepcopy(plain))
    images, others = (torch.rand(batch, 3, 256, 256) * 2 - 1 for _ in range(2))
    images.requires_grad_()

    def loss(model: nn.Module) -> tuple[Tensor, Tensor]:
        distance = model(images, others)
        return distance.detach(), torch.autograd.grad(distance.mean(), images)[0]

    for found, right in zip(loss(fused), loss(plain), strict=True):
        if not rms_error(found, right) < 1e-2:  # a ReLU at zero may fall on either side, and a gradient with it
            raise RuntimeError("LPIPS gives different numbers when fused; no time is reported")
    samples = in_turn({OURS: lambda: loss(fused), THEIRS: lambda: loss(plain)}, rounds)
    swaps = in_turn({OURS: lambda: fuse(unfuse(fused))}, rounds)
    return [
        _row(f"LPIPS and its gradient, batch {batch}", "s", samples),
        {"what": "unfuse(LPIPS), then fuse", "unit": "s", "ratio": None, "aim": None, OURS: summary(swaps[OURS])},
    ]


def _memory(task: str, batch: int) -> dict[str, Any]:
    samples: dict[str, list[float]] = {OURS: [], THEIRS: []}
    for _ in range(3):
        for name, values in samples.items():
            values.append(float(peak_bytes(name, task, batch)))
    return _row(f"peak memory, {task}, batch {batch}", "B", samples)


def _dispatch(ours: nn.Module, theirs: nn.Module, rounds: int) -> dict[str, Any]:
    """An empty batch computes nothing: what is left is checking, planning and dispatch."""
    images = torch.empty(0, 3, 224, 224)
    ours.eval(), theirs.eval()
    with torch.inference_mode():
        samples = in_turn({OURS: lambda: ours(images), THEIRS: lambda: theirs(images)}, rounds)
    row = _row("a forward of an empty batch", "s", samples)
    return {**row, "extra": statistics.median(samples[OURS]) - statistics.median(samples[THEIRS])}


def format_result(result: dict[str, Any]) -> str:
    """The result as a table of text."""
    facts = result["machine"]
    lines = [
        f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}",
        f"{'':36}{'alexnet_triton':>16}{'torchvision':>16}{'ratio':>8}{'aim':>8}",
    ]
    for row in result["rows"]:
        aim = f">={row['aim']:.2f}" if row["aim"] else ""
        values = (_quantity(row[name]["median"], row["unit"]) if name in row else "" for name in (OURS, THEIRS))
        cells = "".join(f"{value:>16}" for value in values)
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(f"{row['what']:36}{cells}{ratio:>8}{aim:>8}".rstrip())
    return "\n".join(lines)


def _quantity(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value / 2**20:,.0f} MiB"
    return f"{value * 1e3:,.1f} ms" if value >= 1e-3 else f"{value * 1e6:,.0f} us"
