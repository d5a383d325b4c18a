"""Checks of CUDA graphs: inference, a training step, and the one that docs/graphs.md shows.

Each holds what a graph replays against eager calls, bit for bit. On a CPU, which has no graphs, eager calls stand in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_triton import graphs
from alexnet_triton.backend import use_backend
from alexnet_triton.bench import checks
from alexnet_triton.bench.checks import Absent, Measure, Scale
from alexnet_triton.model import AlexNet


def captured(function: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """`function` as a CUDA graph: each call replays it, and gives the tensor that it fills. On a CPU, itself."""
    if device.type != "cuda":
        return function
    graph, result = graphs.capture(function, device)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def graphed(model: nn.Module, *examples: Tensor) -> Callable[[Tensor], Tensor]:
    """A model's inference as a CUDA graph, as `model.graphed` gives it. On a CPU, the model, without gradients."""
    if examples[0].device.type != "cuda":
        return torch.no_grad()(model.__call__)
    return graphs.Graphed(model, *examples)


def check_inference_graph(variant: str, scale: Scale, device: torch.device) -> list[Measure]:
    """A captured network gives what eager calls give, bit for bit, and leaves alone what it gave before."""
    torch.manual_seed(12)
    model = checks.network(variant, scale, device, torch.bfloat16).eval()
    eager = torch.no_grad()(model.__call__)
    images, later = (checks.images_for(variant, scale, device, torch.bfloat16) for _ in range(2))
    few = images[:1]
    with use_backend("triton"):
        graph = graphed(model, torch.zeros_like(images), few)
        kept = graph(images)
        measures = [
            Measure("images that came later", checks.differing(graph(later), eager(later)), 0.0),
            Measure("an answer that is kept", checks.differing(kept, eager(images)), 0.0),
            Measure("another batch", checks.differing(graph(few), eager(few)), 0.0),
            Measure("another stream", checks.differing(_on_another_stream(graph, later), eager(later)), 0.0),
        ]
        before = _allocated(device)
        for _ in range(10):
            graph(images)
        measures.append(Measure("bytes that ten calls leave", float(_allocated(device) - before), 0.0))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        changed = graph(images)
        measures.append(Measure("values that changed in place", checks.differing(changed, eager(images)), 0.0))
        measures.append(Measure("values that did not count", float(not checks.differing(changed, kept)), 0.0))
    return measures


def _on_another_stream(graph: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    if images.device.type != "cuda":
        return graph(images)
    current, side = torch.cuda.current_stream(images.device), torch.cuda.Stream(images.device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        answer = graph(images)
    current.wait_stream(side)
    return answer


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Within the block, whatever lets the host wait for the GPU raises."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def check_training_graph(variant: str, scale: Scale, device: torch.device) -> list[Measure]:
    """A replayed training step leaves the parameters that an eager one leaves, of the same dropout masks.

    They follow the generator, which every replay advances. The eager step runs where waiting for the GPU is an error.
    """
    torch.manual_seed(13)
    measures = []
    for dropout in (0.0, 0.5):
        model = checks.network(variant, scale, device, torch.bfloat16, dropout).train()
        images = checks.images_for(variant, scale, device, torch.bfloat16)
        labels = torch.arange(len(images), device=device) % 10
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

        def step(
            model: nn.Module = model, images: Tensor = images, labels: Tensor = labels, optimizer: Any = optimizer
        ) -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            with no_waiting(labels.device):
                loss = F.cross_entropy(model(images).float(), labels)
                loss.backward()
                optimizer.step()
            return loss.detach()

        with use_backend("triton"):
            replay = captured(step, device)
            ends = []
            for run, seed in ((replay, None), (replay, None), (replay, 14), (step, 14)):
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        parameter.copy_(start[name])
                if seed is not None:
                    torch.manual_seed(seed)
                run()
                ends.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        moved = sum(checks.differing(ends[0][name], start[name]) for name in start)
        measures.append(Measure(f"p={dropout}: parameters left as they were", float(not moved), 0.0))
        for name in start:
            measures.append(
                Measure(f"p={dropout}: replay, {name}", checks.differing(ends[2][name], ends[3][name]), 0.0)
            )
        if dropout:
            repeated = not any(checks.differing(ends[0][name], ends[1][name]) for name in start)
            measures.append(Measure("masks that came again", float(repeated), 0.0))
    return measures


# --- the page's training step -------------------------------------------------------------------------------

RATES = (0.01, 0.01, 0.01, 0.02, 0.005, 0.01)
"""Learning rates of the steps that it is tried for: some before the capture, some after."""

Batches = Callable[[], "tuple[Tensor, Tensor]"]


def recipe(device: torch.device, batch: int, side: int) -> str:
    """The code of a captured training step in docs/graphs.md, for images of this number and size.

    Raises:
        Absent: there is no such page beside the source.
    """
    path = Path(__file__).parents[1] / "docs" / "graphs.md"
    if not path.exists():
        raise Absent("docs/graphs.md, which lies beside the source")
    blocks = path.read_text(encoding="utf-8").split("```python\n")
    code = next(block for block in blocks[1:] if "torch.cuda.graph(" in block).split("```")[0]
    sizes = {"128, 3, 227, 227": f"{batch}, 3, {side}, {side}", "torch.empty(128,": f"torch.empty({batch},"}
    for old, new in {**sizes, '"cuda"': repr(str(device))}.items():
        if old not in code:
            raise ValueError(f"the page's training step no longer has {old}")
        code = code.replace(old, new)
    return code


def batches_of(batch: int, side: int) -> Batches:
    """The same random batches, one a call, whoever asks."""
    draw = torch.Generator().manual_seed(15)
    return lambda: (torch.randn(batch, 3, side, side, generator=draw), torch.arange(batch) % 10)


def train_by(code: str, draw: Batches) -> dict[str, Any]:
    """Run the page's training step, while its rate takes the values of `RATES`; gives its names."""

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for rate in RATES:
            if isinstance(names["rate"], Tensor):
                names["rate"].fill_(rate)
            yield draw()

    torch.manual_seed(16)
    names: dict[str, Any] = {"batches": batches()}
    exec(code, names)
    return names


def train_eagerly(device: torch.device, draw: Batches, rates: tuple[float, ...] = RATES) -> dict[str, Tensor]:
    """The same training without a graph: the parameters that it leaves, and under "loss" the last loss."""
    torch.manual_seed(16)
    model = AlexNet(num_classes=10, init="kaiming", device=device).train()
    rate = torch.tensor(0.01, device=device)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4, fused=True)
    for number in rates:
        rate.fill_(number)
        images, labels = (tensor.to(device) for tensor in draw())
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    return {**model.state_dict(), "loss": loss.detach()}


def check_recipe(scale: Scale, device: torch.device) -> list[Measure]:
    """The training step of docs/graphs.md, as it stands there, leaves what eager steps leave, bit for bit."""
    if device.type != "cuda":
        raise Absent("a GPU, which alone has graphs")
    sizes = scale.batches[0], scale.image_size or 227
    with use_backend("triton"):
        names = train_by(recipe(device, *sizes), batches_of(*sizes))
        expected = train_eagerly(device, batches_of(*sizes))
    got = {**names["model"].state_dict(), "loss": names["loss"]}
    return [Measure(name, checks.differing(got[name], expected[name]), 0.0) for name in expected]
