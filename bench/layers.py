"""Each layer of a network in each direction beside torch's op for the same, and how near both come to the roofs.

A layer is timed as the op that a user calls, which on a GPU brings its maps into the kernels' layout and out of it;
inside a network most of that does not happen (`launches` shows what does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_triton import ops, reference
from alexnet_triton.backend import interpreting, use_backend
from alexnet_triton.bench import checks
from alexnet_triton.bench.benchmark import Benchmark
from alexnet_triton.bench.checks import Case, Conv, Layer, Linear, Measure, Pool
from alexnet_triton.bench.floors import floor, least
from alexnet_triton.bench.plans import Plan, name_of
from alexnet_triton.bench.results import OURS, Rows, checked
from alexnet_triton.bench.timing import duration, heading, in_turn, over_sets, summary
from alexnet_triton.tuning.accuracy import rms_error
from alexnet_triton.tuning.launches import DIRECTIONS

THEIRS = "torch"
SETS = 3
"""Sets of random inputs, taken in turn."""

METHOD = (
    "Ours and torch's op in turn, channels-last, on three sets of random inputs, after a check of the output and the "
    "gradients against float64; torch's forward is not in training's graph, its gradients include ReLU's. On a GPU the "
    "host's time does not count, the second-level cache is overwritten before each sample, and cuDNN takes the fastest "
    "it has. Roofs are the fastest of their rounds."
)

Op = Callable[[Layer, Tensor, Sequence[Tensor]], Tensor]


def plan(device: torch.device) -> Plan:
    """What a device is given unless somebody says otherwise: on a CPU little, so that it takes under a minute."""
    if device.type == "cuda":
        return Plan(device, ("paper", "torchvision"), (128,), (torch.bfloat16,), 50)
    return Plan(device, ("paper",), (4,), (torch.float32,), 7)


def directions(layer: Layer) -> tuple[str, ...]:
    """Those of `launches.DIRECTIONS` that a layer has."""
    return DIRECTIONS[:2] if isinstance(layer, Pool) else DIRECTIONS


# --- both sides -----------------------------------------------------------------------------------------------------


def on_kernels(device: torch.device) -> bool:
    """Whether this package's ops are to run as Triton kernels there; if so, nothing else may stand in for them."""
    return device.type == "cuda" or interpreting()


def backend_of_ours(device: torch.device) -> use_backend:
    """The backend that this package's side runs on there, as a `with` block."""
    return use_backend("triton" if on_kernels(device) else "reference")


def ours(layer: Layer, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The layer as this package's op."""
    with backend_of_ours(x.device):
        if isinstance(layer, Pool):
            p = layer.stage
            norm = (p.size, p.alpha, p.beta, p.k)
            return ops.lrn_max_pool(x, *norm, p.window, p.stride, p.padding, p.ceil_mode, p.lrn_groups)
        weight, bias = parameters
        if isinstance(layer, Conv):
            s = layer.stage
            return ops.conv2d_relu(x, weight, bias, s.stride, s.padding, s.groups, s.relu)
        return ops.dropout_linear(x, weight, bias, layer.p, layer.relu)


def theirs(layer: Layer, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The layer as torch's ops."""
    if isinstance(layer, Pool):
        p = layer.stage
        b = _normalised(layer, x)
        return F.max_pool2d(b, p.window, p.stride, p.padding, 1, p.ceil_mode)
    weight, bias = parameters
    if isinstance(layer, Conv):
        s = layer.stage
        y = F.conv2d(x, weight, bias, s.stride, s.padding, 1, s.groups)
        return F.relu(y) if s.relu else y
    y = F.linear(F.dropout(x, layer.p) if layer.p else x, weight, bias)
    return F.relu(y) if layer.relu else y


def _normalised(pool: Pool, x: Tensor) -> Tensor:
    p = pool.stage
    return reference.local_response_norm(x, p.size, p.alpha, p.beta, p.k, p.lrn_groups) if p.size else x


def _prepared(op: Op, layer: Layer, direction: str, tensors: Sequence[Tensor]) -> Callable[[], Any]:
    """One direction of an op on one set of tensors; what it needs of the forward pass has been done."""
    x, *parameters, grad = tensors
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return op(layer, x, parameters)

        return forward
    of_data = direction == "data gradient"
    x = x.detach().requires_grad_(of_data)
    parameters = [t.detach().requires_grad_(not of_data) for t in parameters]
    y = op(layer, x, parameters)
    return partial(torch.autograd.grad, y, [x] if of_data else parameters, grad, retain_graph=True)


# --- the check ------------------------------------------------------------------------------------------------------

CHECKED = {
    "forward": ("forward", "place"),
    "data gradient": ("data gradient", "gradient"),
    "weight gradient": ("weight gradient", "bias gradient"),
}
"""By direction, the measures that its time depends on."""


def check(layer: Layer, dtype: torch.dtype, device: torch.device, name: str = "layer") -> dict[str, Measure]:
    """By direction, the error of this package's op against float64 that comes nearest to its limit."""
    if on_kernels(device):
        measures = checks.check_layer(Case(name, layer, dtype), device)
    else:
        measures = _check_reference(layer, dtype, device)
    return {
        direction: max((m for m in measures if m.name in CHECKED[direction]), key=lambda m: m.value / m.limit)
        for direction in directions(layer)
    }


def _check_reference(layer: Layer, dtype: torch.dtype, device: torch.device) -> list[Measure]:
    """As `checks.check_layer`, whose layers run on the kernels alone."""
    torch.manual_seed(24)
    tensors = layer.draw(device, dtype)
    x, *parameters, grad = tensors
    wanted = [t.detach().requires_grad_() for t in (x, *parameters)]
    torch.manual_seed(25)
    y = ours(layer, wanted[0], wanted[1:])
    found = torch.autograd.grad(y, wanted, grad)
    of: Layer = layer
    factor = None
    if isinstance(layer, Pool):
        found_ = {"forward": y.detach(), "place": _places(layer, x), "gradient": found[0]}
    else:
        names = ("forward", "data gradient", "weight gradient", "bias gradient")
        found_ = dict(zip(names, (y.detach(), *found), strict=True))
    if isinstance(layer, Linear):  # without the mask, on an input that had it
        torch.manual_seed(25)
        factor = F.dropout(torch.ones_like(x), layer.p) if layer.p else torch.ones_like(x)
        of, tensors = layer._replace(p=0.0), [x.double() * factor, *tensors[1:]]
        found_["seed"] = torch.zeros(1)
    expected = of.expected(found_, *tensors)
    if factor is not None:
        expected["data gradient"] = expected["data gradient"] * factor
    terms = layer.terms()
    return [
        Measure(name, rms_error(found_[name], expected[name]), checks.limit(dtype, terms[name])) for name in expected
    ]


def _places(pool: Pool, x: Tensor) -> Tensor:
    """Where in its window each maximum is, counted row by row: (N, C, P, Q)."""
    p = pool.stage
    _, index = F.max_pool2d(_normalised(pool, x), p.window, p.stride, p.padding, 1, p.ceil_mode, return_indices=True)
    rows, columns = (torch.arange(length, device=x.device) for length in index.shape[2:])
    row = index // x.shape[3] - (rows[:, None] * p.stride[0] - p.padding[0])
    column = index % x.shape[3] - (columns * p.stride[1] - p.padding[1])
    return row * p.window[1] + column


# --- the rows -------------------------------------------------------------------------------------------------------


def rows_of(
    variant: str, name: str, layer: Layer, dtype: torch.dtype, batch: int, plan: Plan
) -> Iterator[dict[str, Any]]:
    """The rows of one layer, each direction's as it comes; one that fails its check has a sentence in place of times.

    Args:
        variant: whose layer it is.
        name: of `launches.LAYERS`.
        layer: its sizes.
        dtype: of its tensors.
        batch: number of images.
        plan: device, rounds, roofs.
    """
    assert plan.roofs is not None
    measured = plan.roofs()
    found = check(layer, dtype, plan.device, f"{name} of {variant}, {name_of(dtype)}, batch {batch}")
    for direction, measure in found.items():
        flop, bytes_ = least(layer, direction, dtype.itemsize)
        row = {
            "variant": variant, "layer": name, "direction": direction, "dtype": name_of(dtype), "batch": batch,
            "flop": flop, "bytes": bytes_, "floor": floor(flop, bytes_, dtype, measured),
        }  # fmt: skip
        yield {**row, **checked(measure, lambda d=direction: {"times": _times(layer, d, dtype, plan)})}  # type: ignore[misc]


def _times(layer: Layer, direction: str, dtype: torch.dtype, plan: Plan) -> dict[str, Any]:
    torch.manual_seed(22)
    drawn = [layer.draw(plan.device, dtype) for _ in range(min(SETS, plan.rounds))]
    functions = {
        name: over_sets(lambda prepared: prepared(), [_prepared(op, layer, direction, tensors) for tensors in drawn])
        for name, op in ((OURS, ours), (THEIRS, theirs))
    }
    samples = in_turn(functions, plan.rounds, plan.device, host=False)
    return {name: summary(values) for name, values in samples.items()}


def cases(plan: Plan) -> Iterator[tuple[str, Rows]]:
    """The layers by name, each with a function that measures its rows; a layer of two variants is the first one's."""
    for dtype in plan.dtypes:
        for batch in plan.batches:
            seen: set[Layer] = set()
            for variant in plan.variants:
                for name, layer in checks.layers(variant, batch, plan.scale):
                    if layer in seen:
                        continue
                    seen.add(layer)
                    what = f"{name} of {variant}, {name_of(dtype)}, batch {batch}"
                    yield what, partial(rows_of, variant, name, layer, dtype, batch, plan)


def format_result(result: Mapping[str, Any]) -> str:
    """The result as a table of text: times, their ratio, and for ours the speeds and the share of the floor."""
    top = result["roofs"]
    products = ", ".join(f"{1e3 * value:,.0f} GFLOP/s in {name}" for name, value in top["tflops"].items())
    lines = [
        f"Layers of AlexNet: {heading(result['machine'])}",
        f"roofs measured there: {products}; {top['copy_gbs']:,.1f} GB/s copied",
        f"{'':38}{OURS:>16}{THEIRS:>14}{'ratio':>7}{'GFLOP/s':>10}{'GB/s':>9}{'floor':>14}{'of it':>7}",
    ]
    before = None
    for row in result["rows"]:
        network = f"{row['variant']}, {row['dtype']}, batch {row['batch']:,}"
        if network != before:
            lines.append(network)
        before = network
        place = f"  {row['layer']} {row['direction']}"
        if "failed" in row:
            lines.append(f"{place:38}no time: {row['failed']}")
            continue
        ours_, theirs_ = (row["times"][peer]["median"] for peer in (OURS, THEIRS))
        speed = f"{row['flop'] / ours_ / 1e9:,.0f}" if row["flop"] else "-"
        cells = f"{duration(ours_):>16}{duration(theirs_):>14}{theirs_ / ours_:>7.2f}{speed:>10}"
        cells += f"{row['bytes'] / ours_ / 1e9:>9,.1f}{duration(row['floor']):>14}{row['floor'] / ours_:>7.0%}"
        lines.append(f"{place:38}{cells}")
    return "\n".join(lines)


BENCHMARK = Benchmark("layers", METHOD, plan, cases, format_result)
