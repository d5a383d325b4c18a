"""The trunk of LPIPS (Zhang et al. 2018): AlexNet's five ReLU outputs, and their gradient to the image.

As users of LPIPS build it: the published network's `features`, cut behind each ReLU into five `nn.Sequential`s whose
parameters are frozen. `fuse` makes it ours; a slice's runs are fused, and its output is an ordinary map.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_triton import fuse, unfuse
from alexnet_triton.backend import use_backend
from alexnet_triton.bench import checks
from alexnet_triton.bench.benchmark import Benchmark
from alexnet_triton.bench.checks import LIMITS, NETWORK_FLOORS, Measure
from alexnet_triton.bench.layers import SETS, backend_of_ours
from alexnet_triton.bench.model import EAGER, LAST, SECONDS, times_table
from alexnet_triton.bench.plans import Plan, name_of
from alexnet_triton.bench.results import OURS, Rows, checked
from alexnet_triton.bench.timing import heading, in_turn, over_sets, summary
from alexnet_triton.tuning.accuracy import rms_error

TASKS = ("forward", "forward and backward")
CUTS = (0, 2, 5, 8, 10, 12)
"""Where torchvision's `features` are cut: behind each ReLU."""

METHOD = (
    "All in turn, with the same random weights in the dtype of the images, on three sets of random images, after a "
    "check of ours against float64: the five maps, and the image's gradient, given random ones of the maps. Times are "
    "those of a caller, the host's work included; on a GPU the second-level cache is overwritten before each sample."
)


class Trunk(nn.Module):
    """Five slices of a network's `features`; gives the output of each.

    Args:
        features: of torchvision's AlexNet, or of this package's variant of it.
    """

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        layers = list(features)
        self.slices = nn.ModuleList(nn.Sequential(*layers[start:end]) for start, end in itertools.pairwise(CUTS))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps of `x`, (N, 3, H, W), behind the five ReLUs."""
        maps = []
        for part in self.slices:
            x = part(x)
            maps.append(x)
        return maps


def plan(device: torch.device) -> Plan:
    """What a device is given unless somebody says otherwise: on a CPU little."""
    if device.type == "cuda":
        return Plan(device, ("torchvision",), (1, 16, 64), (torch.bfloat16, torch.float32), 30, (64, 256))
    return Plan(device, ("torchvision",), (1, 8), (torch.float32,), 7, (64,))


def trunks(plan: Plan, dtype: torch.dtype) -> dict[str, Trunk]:
    """The trunk as each peer has it, all with the same weights."""
    features = checks.network("torchvision", plan.scale, plan.device, dtype).features
    plain = Trunk(unfuse(features)).eval()
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    return {OURS: fuse(copy.deepcopy(last)), EAGER: plain, LAST: last}


def answers(trunk: Trunk, name: str, images: Tensor, grads: Sequence[Tensor] = ()) -> list[Tensor]:
    """The five maps, and where their gradients are given the image's gradient.

    Args:
        trunk: of `trunks`.
        name: of the peer.
        images: (N, 3, H, W).
        grads: of the maps; none for a forward pass alone.
    """
    with backend_of_ours(images.device) if name == OURS else use_backend("reference"):
        if not grads:
            with torch.no_grad():
                maps: list[Tensor] = trunk(images)
                return maps
        x = images.detach().requires_grad_()
        maps = trunk(x)
        return [*(y.detach() for y in maps), *torch.autograd.grad(maps, x, grads)]


def check(peers: Mapping[str, Trunk], images: Tensor, grads: Sequence[Tensor]) -> Measure:
    """Our answer that is furthest from float64, against its limit, as `model.check` sets it."""
    doubles = [grad.double() for grad in grads]
    exact = answers(copy.deepcopy(peers[EAGER]).double(), "exact", images.double(), doubles)
    found = {name: answers(peers[name], name, images, grads) for name in (OURS, EAGER)}
    measures = []
    for number, right in enumerate(exact):
        of_image = number == len(CUTS) - 1
        least = NETWORK_FLOORS[images.dtype] if of_image else 20 * LIMITS[images.dtype]
        most = min(0.5, max(least, 2 * rms_error(found[EAGER][number], right)))
        what = "the image's gradient" if of_image else f"relu{number + 1}"
        measures.append(Measure(what, rms_error(found[OURS][number], right), most))
    return max(measures, key=lambda m: m.value / m.limit)


def row_of(task: str, dtype: torch.dtype, batch: int, size: int, plan: Plan) -> dict[str, Any]:
    """One row: every peer's time, or why there is none.

    Args:
        task: of `TASKS`.
        dtype: of weights and images.
        batch: number of images.
        size: their side, in pixels.
        plan: device and rounds.
    """
    torch.manual_seed(23)
    peers = trunks(plan, dtype)
    sets = [torch.randn(batch, 3, size, size, device=plan.device, dtype=dtype) for _ in range(min(SETS, plan.rounds))]
    backward = task == TASKS[1]
    grads = [torch.randn_like(y) for y in answers(peers[EAGER], EAGER, sets[0])] if backward else []
    row = {"task": task, "dtype": name_of(dtype), "batch": batch, "size": size}
    measure = check(peers, sets[0], grads)
    return {**row, **checked(measure, partial(_times, peers, sets, grads, plan))}


def _times(peers: Mapping[str, Trunk], sets: Sequence[Tensor], grads: Sequence[Tensor], plan: Plan) -> dict[str, Any]:
    functions = {}
    for name, trunk in peers.items():
        layout = torch.contiguous_format if name == EAGER else torch.channels_last
        own = [images.to(memory_format=layout) for images in sets]
        own_grads = [grad.to(memory_format=layout) for grad in grads]
        functions[name] = over_sets(partial(_again, trunk, name, own_grads), own)
    samples = in_turn(functions, plan.rounds, plan.device, seconds=SECONDS)
    return {"times": {name: summary(values) for name, values in samples.items()}}


def _again(trunk: Trunk, name: str, grads: Sequence[Tensor], images: Tensor) -> list[Tensor]:
    return answers(trunk, name, images, grads)


def cases(plan: Plan) -> Iterator[tuple[str, Rows]]:
    """The rows by name, each with a function that measures it."""
    for dtype in plan.dtypes:
        for size in plan.sizes:
            for batch in plan.batches:
                for task in TASKS:
                    name = f"{task}, {name_of(dtype)}, batch {batch}, {size} pixels"
                    of = (task, dtype, batch, size, plan)
                    yield name, lambda of=of: [row_of(*of)]  # type: ignore[misc]


def format_result(result: Mapping[str, Any]) -> str:
    """The result as a table of text; a ratio is a peer's time over ours."""
    lines = [f"LPIPS's trunk: {heading(result['machine'])}"]
    for row in result["rows"]:
        size = f"{row['size']}x{row['size']}"
        lines.append(f"{row['task']}, {row['dtype']}, batch {row['batch']:,}, {size}")
        lines += [f"  no time: {row['failed']}"] if "failed" in row else times_table(row)
    return "\n".join(lines)


BENCHMARK = Benchmark("lpips", METHOD, plan, cases, format_result)
