"""Whole networks, inference and training, beside what else runs them in PyTorch, after a check that they agree."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_triton import unfuse
from alexnet_triton.backend import use_backend
from alexnet_triton.bench import checks, graph_checks
from alexnet_triton.bench.benchmark import Benchmark
from alexnet_triton.bench.checks import LIMITS, NETWORK_FLOORS, Measure
from alexnet_triton.bench.layers import SETS, backend_of_ours
from alexnet_triton.bench.plans import Plan, name_of
from alexnet_triton.bench.results import OURS, Rows, checked
from alexnet_triton.bench.timing import duration, heading, in_turn, over_sets, summary
from alexnet_triton.tuning.accuracy import rms_error

TASKS = ("inference", "training step")
EAGER, LAST, COMPILED, TORCHVISION = "eager", "eager, channels-last", "torch.compile", "torchvision"
GRAPH = ", CUDA graph"

METHOD = (
    "All in turn, from the same weights, on three sets of random images, after a check of ours against float64: the "
    "logits, for a training step (forward, backward, SGD with momentum) the gradients too. Half precision is the "
    "network's own dtype in inference and autocast in training. Times are those of a caller, the host's work included; "
    "on a GPU the second-level cache is overwritten before each sample. A graph of inference is `model.graphed`, which "
    "copies images in and logits out; one of training is replayed alone. Memory is the most that a call holds beyond "
    "what was there before it."
)

SECONDS = 20.0
"""Of a row's rounds, after which no further one begins."""


class Peer(NamedTuple):
    """A way to run a network."""

    channels_last: bool = True
    """Of weights and images."""
    graph: bool = False
    """Captured into a CUDA graph, and replayed."""
    compiled: bool = False


PEERS: dict[str, Peer] = {
    OURS: Peer(),
    OURS + GRAPH: Peer(graph=True),
    EAGER: Peer(channels_last=False),
    LAST: Peer(),
    LAST + GRAPH: Peer(graph=True),
    COMPILED: Peer(compiled=True),
    TORCHVISION: Peer(channels_last=False),
}


def plan(device: torch.device) -> Plan:
    """What a device is given unless somebody says otherwise: on a CPU little, so that it takes a minute or two."""
    if device.type == "cuda":
        return Plan(device, ("paper", "torchvision"), (128, 1, 1024, 16), (torch.bfloat16,), 30, compiled=True)
    return Plan(device, ("torchvision",), (1, 8), (torch.float32,), 7)


def peers(variant: str, device: torch.device, compiled: bool) -> list[str]:
    """Names of `PEERS` that a row may hold: graphs on a GPU, torchvision's network for its own variant.

    Args:
        variant: of `alexnet_triton.AlexNet`.
        device: where they run.
        compiled: whether torch.compile was asked for.
    """
    return [
        name
        for name, peer in PEERS.items()
        if (device.type == "cuda" or not peer.graph)
        and (compiled or not peer.compiled)
        and (name != TORCHVISION or variant == TORCHVISION)
    ]


# --- the networks -----------------------------------------------------------------------------------------------------


def network(name: str, ours: nn.Module) -> nn.Module:
    """A peer's network, with the weights of `ours`.

    Raises:
        ImportError: torchvision is not installed.
    """
    if name == TORCHVISION:
        import torchvision

        model: nn.Module = torchvision.models.alexnet()
        if sum(p.numel() for p in model.parameters()) != sum(p.numel() for p in ours.parameters()):
            raise checks.Absent("torchvision has this network at full width alone")
        model.load_state_dict(ours.state_dict())
        model = model.to(next(ours.parameters()))
    else:
        model = copy.deepcopy(ours)
        if not name.startswith(OURS):
            unfuse(model)
    layout = torch.channels_last if PEERS[name].channels_last else torch.contiguous_format
    model.to(memory_format=layout)
    if PEERS[name].compiled:
        torch._dynamo.reset()
        on_gpu = next(ours.parameters()).device.type == "cuda"
        model.compile(mode="max-autotune" if on_gpu else None, dynamic=False)
    return model


def step_of(name: str, task: str, model: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """One call of the task, as a function of the images: gives the logits, or the loss of a training step.

    Args:
        name: of `PEERS`.
        task: of `TASKS`.
        model: the peer's network; training changes it.
        dtype: of inference; training is under autocast where it is not float32.
    """
    device = next(model.parameters()).device
    ours = name.startswith(OURS)
    if task == "inference":
        model.eval()

        def infer(images: Tensor) -> Tensor:
            with torch.no_grad(), backend_of_ours(device) if ours else use_backend("reference"):
                logits: Tensor = model(images)
                return logits

        return infer
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9)
    labels: dict[int, Tensor] = {}

    def step(images: Tensor) -> Tensor:
        if len(images) not in labels:
            labels[len(images)] = torch.arange(len(images), device=device) % 10
        optimizer.zero_grad(set_to_none=True)
        with backend_of_ours(device) if ours else use_backend("reference"):
            loss = F.cross_entropy(_autocast(model, images, dtype), labels[len(images)])
            loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _autocast(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    # A graph must not keep the casts of the step that was captured.
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
        logits: Tensor = model(images)
        return logits.float()


# --- the check --------------------------------------------------------------------------------------------------------


def check(task: str, ours: nn.Module, images: Tensor, dtype: torch.dtype) -> Measure:
    """How far our logits are from float64's, and in training the gradient that is furthest, against its limit.

    Dropout is off. The limit is twice the error of torch's own layers in the same dtype, and in any case what
    `checks.check_network` allows: a ReLU or a maximum decided otherwise in an early layer is no error of a later one.
    """
    answers = {}
    for name, numbers in ((OURS, dtype), (LAST, dtype), ("exact", torch.float64)):
        model = copy.deepcopy(ours) if numbers != torch.float64 else copy.deepcopy(ours).double()
        if name != OURS:
            unfuse(model)
        with backend_of_ours(images.device) if name == OURS else use_backend("reference"):
            answers[name] = _answers(task, model.eval(), images.to(next(model.parameters()).dtype), numbers)
    measures = []
    for name, exact in answers["exact"].items():
        least = 20 * LIMITS[dtype] if name == "logits" else NETWORK_FLOORS[dtype]
        most = min(0.5, max(least, 2 * rms_error(answers[LAST][name], exact)))
        measures.append(Measure(name, rms_error(answers[OURS][name], exact), most))
    return max(measures, key=lambda m: m.value / m.limit)


def _answers(task: str, model: nn.Module, images: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    if task == "inference":
        with torch.no_grad():
            return {"logits": model(images)}
    labels = torch.arange(len(images), device=images.device) % 10
    names, parameters = zip(*model.named_parameters(), strict=True)
    logits = model(images) if dtype == torch.float64 else _autocast(model, images, dtype)
    found = torch.autograd.grad(F.cross_entropy(logits, labels), parameters)
    return dict(zip(("logits", *names), (logits.detach(), *found), strict=True))


# --- the rows ---------------------------------------------------------------------------------------------------------


def row_of(task: str, variant: str, dtype: torch.dtype, batch: int, names: Sequence[str], plan: Plan) -> dict[str, Any]:
    """One row: every peer's time and memory, or why there is none.

    Args:
        task: of `TASKS`.
        variant: of `alexnet_triton.AlexNet`.
        dtype: of inference, or of autocast in training.
        batch: number of images.
        names: of `PEERS`.
        plan: device, rounds, sizes.
    """
    torch.manual_seed(20)
    own = dtype if task == "inference" else torch.float32
    ours = checks.network(variant, plan.scale, plan.device, own, dropout=0.5)
    sets = [checks.images_for(variant, plan.scale, plan.device, own, batch) for _ in range(min(SETS, plan.rounds))]
    measure = check(task, ours.to(memory_format=torch.channels_last), sets[0], dtype)
    row = {"task": task, "variant": variant, "dtype": name_of(dtype), "batch": batch}
    return {**row, **checked(measure, partial(_figures, task, ours, sets, dtype, names, plan))}


def _figures(
    task: str, ours: nn.Module, sets: Sequence[Tensor], dtype: torch.dtype, names: Sequence[str], plan: Plan
) -> dict[str, Any]:
    functions: dict[str, Callable[[], Any]] = {}
    memory: dict[str, int] = {}
    absent: dict[str, str] = {}
    for name in names:
        try:
            functions[name], held = _ready(name, task, ours, sets, dtype)
        except Exception as error:  # whatever keeps a peer from running here is said; the others are measured
            absent[name] = f"{type(error).__name__}: {error}"[:300]
            if name == OURS:
                raise
            continue
        if held is not None:
            memory[name] = held
    samples = in_turn(functions, plan.rounds, plan.device, seconds=SECONDS)
    del functions
    gc.collect()
    found = {"times": {name: summary(values) for name, values in samples.items()}, "memory": memory}
    return {**found, "absent": absent} if absent else found


def _ready(
    name: str, task: str, ours: nn.Module, sets: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Callable[[], Any], int | None]:
    """A peer that has run once on every set, and the most that a call of it held, on a GPU."""
    peer, device = PEERS[name], sets[0].device
    model = network(name, ours)
    step = step_of(name, task, model, dtype)
    if peer.channels_last:
        sets = [images.to(memory_format=torch.channels_last) for images in sets]
    if peer.graph and task == "inference":
        with backend_of_ours(device) if name.startswith(OURS) else use_backend("reference"):
            return over_sets(graph_checks.graphed(model, sets[0]), sets), None
    if peer.graph:
        replays = [graph_checks.captured(partial(step, images), device) for images in sets]
        return over_sets(lambda replay: replay(), replays), None
    for images in sets:
        step(images)
    return over_sets(step, sets), _held(partial(step, sets[0]), device)


def _held(function: Callable[[], Any], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def cases(plan: Plan) -> Iterator[tuple[str, Rows]]:
    """The rows by name, each with a function that measures it."""
    for dtype in plan.dtypes:
        for batch in plan.batches:
            for variant in plan.variants:
                for task in reversed(TASKS):
                    names = peers(variant, plan.device, plan.compiled)
                    of = (task, variant, dtype, batch, names, plan)
                    name = f"{task}, {variant}, {name_of(dtype)}, batch {batch}"
                    yield name, lambda of=of: [row_of(*of)]  # type: ignore[misc]


def format_result(result: Mapping[str, Any]) -> str:
    """The result as a table of text; a ratio is a peer's time over ours."""
    lines = [f"AlexNet: {heading(result['machine'])}"]
    for row in result["rows"]:
        lines.append(f"{row['task']}, {row['variant']}, {row['dtype']}, batch {row['batch']:,}")
        if "failed" in row:
            lines.append(f"  no time: {row['failed']}")
            continue
        lines += times_table(row)
    return "\n".join(lines)


def times_table(row: Mapping[str, Any]) -> list[str]:
    """A line for each peer of a row: its time, images a second, its time over ours, memory."""
    lines = []
    own = row["times"][OURS]["median"]
    for peer, figures in row["times"].items():
        median = figures["median"]
        held = row.get("memory", {}).get(peer)
        memory = f"{held / 2**20:>10,.0f} MiB" if held is not None else ""
        lines.append(
            f"  {peer:28}{duration(median):>14}{row['batch'] / median:>12,.0f} images/s{median / own:>7.2f}{memory}"
        )
    return lines + [f"  {peer}: absent: {why}" for peer, why in row.get("absent", {}).items()]


BENCHMARK = Benchmark("model", METHOD, plan, cases, format_result)
