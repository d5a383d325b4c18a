"""The kernel of the update rule: one launch for all parameters, and nothing beside them."""

import copy

import pytest
import torch
from kernel_cases import rms_error
from sgd_cases import BLOCK, CPU, DTYPES, SIZES, SMALL, InFloat64, give_gradients, parameters
from torch import nn

from alexnet_triton import use_backend
from alexnet_triton.bench import update_checks
from alexnet_triton.kernels import launch, sgd
from alexnet_triton.kernels.target import TARGETS
from alexnet_triton.recipe import optim
from alexnet_triton.recipe.optim import KrizhevskySGD

# --- the kernel ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_parameters_are_updated_in_one_launch(dtype, launches):
    weights = parameters(dtype=dtype)
    optimizer = KrizhevskySGD([{"params": weights[::2]}, {"params": weights[1::2], "lr": 0.1}], 0.01)
    with use_backend("triton"):
        for _ in range(3):
            give_gradients(weights)
            optimizer.step()
    assert [name for name, _, _ in launches] == ["sgd_kernel"] * 3


def test_many_parameters_are_updated_in_one_launch(launches, monkeypatch):
    monkeypatch.setattr(sgd, "_block", lambda target: 64)
    weights = parameters([(1 + i % 70,) for i in range(70)])
    optimizer, exact = KrizhevskySGD(weights, 0.1), InFloat64(weights)
    give_gradients(weights)
    with use_backend("triton"):
        optimizer.step()
    n = len(weights)
    exact.step([w.grad for w in weights], [0.1] * n, [0.9] * n, [5e-4] * n)
    assert all(rms_error(a, b) < 1e-6 for a, b in zip(weights, exact.w, strict=True))
    [(_, programs, _)] = launches
    assert programs == sum(-(-w.numel() // 64) for w in weights)


def between(tensors, gap):
    """Copies of tensors in one buffer, with `gap` elements of 77 between them; the buffer, and where the gaps are."""
    size = gap + sum(tensor.numel() + gap for tensor in tensors)
    buffer, is_gap = torch.full((size,), 77, dtype=tensors[0].dtype), torch.ones(size, dtype=torch.bool)
    inside, at = [], gap
    for tensor in tensors:
        inside.append(buffer[at : at + tensor.numel()].view(tensor.shape).copy_(tensor))
        is_gap[at : at + tensor.numel()] = False
        at += tensor.numel() + gap
    return inside, buffer, is_gap


@pytest.mark.parametrize("gap", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_beside_a_parameter_is_not_written(dtype, gap, backend):
    sizes = (*SIZES, (2 * BLOCK,))
    with torch.no_grad():
        values, buffer, is_gap = between([torch.randn(size).to(dtype) for size in sizes], gap)
        speeds, speed_buffer, speed_is_gap = between([torch.zeros(size) for size in sizes], gap)
        masters, master_buffer, master_is_gap = between([value.float() for value in values], gap)
        slopes, _, _ = between([torch.randn(size).to(dtype) for size in sizes], gap)
    weights = [nn.Parameter(value) for value in values]
    optimizer, exact = KrizhevskySGD(weights, 0.1), InFloat64(weights)
    for weight, speed, master, slope in zip(weights, speeds, masters, slopes, strict=True):
        weight.grad = slope
        optimizer.state[weight] = {"velocity": speed} | ({} if dtype == torch.float32 else {"master": master})
    optimizer.step()
    n = len(weights)
    exact.step(slopes, [0.1] * n, [0.9] * n, [5e-4] * n)
    for weight, wanted in zip(weights, exact.w, strict=True):
        assert rms_error(optimizer.master_of(weight), wanted) < 1e-6
        assert torch.equal(weight, optimizer.master_of(weight).to(dtype))
    buffers = [(buffer, is_gap), (speed_buffer, speed_is_gap), (master_buffer, master_is_gap)]
    assert all((kept[gaps] == 77).all() for kept, gaps in buffers)


def layouts(dtype):
    """Parameters and gradients by what their memory is like, and whether it is the same for both, and dense."""

    def drawn(*size):
        return torch.randn(size).to(dtype)

    def channels_last(x):
        return x.contiguous(memory_format=torch.channels_last)

    filters, gradient = drawn(8, 6, 3, 3), drawn(8, 6, 3, 3)
    narrow = channels_last(drawn(8, 6, 3, 1))
    return {
        "both channels last": (channels_last(filters), channels_last(gradient), True),
        "filters channels last": (channels_last(filters), gradient, False),
        "gradient channels last": (filters, channels_last(gradient), False),
        "filters of one pixel": (channels_last(drawn(8, 6, 1, 1)), drawn(8, 6, 1, 1), True),
        "filters one pixel wide": (narrow, drawn(8 * 6 * 3).as_strided(narrow.shape, (18, 1, 6, 1)), True),
        "both transposed": (drawn(6, 8).t(), drawn(6, 8).t(), True),
        "gradient transposed": (drawn(8, 6), drawn(6, 8).t(), False),
        "gradient of one number": (drawn(8, 6), drawn().expand(8, 6), False),
        "every other column": (drawn(8, 12)[:, ::2], drawn(8, 12)[:, ::2], False),
        "every other column, dense gradient": (drawn(8, 12)[:, ::2], drawn(8, 6), False),
        "overlapping windows": (drawn(8, 6), drawn(13).as_strided((8, 6), (1, 1)), False),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", layouts(torch.float32))
def test_parameters_and_gradients_of_any_layout(name, dtype, backend, launches):
    value, gradient, alike = layouts(dtype)[name]
    weight = nn.Parameter(value)
    weight.grad = gradient
    optimizer, exact = KrizhevskySGD([weight], 0.1), InFloat64([weight])
    for _ in range(2):
        optimizer.step()
        exact.step([weight.grad], [0.1], [0.9], [5e-4])
    assert rms_error(optimizer.master_of(weight), exact.w[0]) < 1e-6
    assert torch.equal(weight, optimizer.master_of(weight).to(dtype))
    assert len(launches) == (2 if alike and backend == "triton" else 0)


def test_a_change_of_the_rates_changes_no_argument_that_is_compiled_in(launches):
    weights = parameters([(5,), (7,)])
    optimizer = KrizhevskySGD([{"params": weights[:1]}, {"params": weights[1:]}], 0.01)
    give_gradients(weights)
    with use_backend("triton"):
        for lr in (0.01, 1.0, 0.0):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
    told = [{k: v for k, v in one.items() if not isinstance(v, torch.Tensor)} for _, _, one in launches]
    assert told[0] == told[1] == told[2]
    assert [one["rates"][0, 0].item() for _, _, one in launches] == pytest.approx([0.01, 1.0, 0.0])


def test_addresses_are_written_to_the_device_when_they_change_and_only_then(monkeypatch):
    written, real = [], sgd._written

    def noted(numbers, dtype, device):
        written.append(dtype)
        return real(numbers, dtype, device)

    monkeypatch.setattr(sgd, "_written", noted)
    weights = parameters()
    optimizer, exact = KrizhevskySGD(weights, 0.1), InFloat64(weights)
    n = len(weights)
    with use_backend("triton"):
        give_gradients(weights)
        sgd._kept.cache_clear()
        for step in range(4):
            if step == 3:
                old = [weight.grad for weight in weights]  # alive, so that the new ones lie elsewhere
                give_gradients(weights)
            optimizer.step()
            exact.step([w.grad for w in weights], [0.1] * n, [0.9] * n, [5e-4] * n)
            assert written.count(torch.int64) == (1 if step < 3 else 2)
    assert written.count(torch.float32) == 1
    assert all(rms_error(a, b) < 1e-6 for a, b in zip(weights, exact.w, strict=True))
    assert len(old) == n


def test_a_capture_shares_no_table_with_what_runs_outside(monkeypatch):
    device = torch.device("cpu")
    outside = sgd.by_value((1, 2**62 + 1), torch.int64, device)
    assert outside.tolist() == [1, 2**62 + 1]
    assert sgd.by_value((1, 2**62 + 1), torch.int64, device) is outside
    monkeypatch.setattr(sgd, "_stream", lambda device: None)
    captured = sgd.by_value((1, 2**62 + 1), torch.int64, device)
    assert captured is not outside
    assert sgd.by_value((1, 2**62 + 1), torch.int64, device) is not captured


def test_two_dtypes_are_two_launches(launches):
    weights = [*parameters([(5,), (6,)]), *parameters([(7,), (8,)], torch.bfloat16)]
    optimizer, exact = KrizhevskySGD(weights, 0.1), InFloat64(weights)
    give_gradients(weights)
    with use_backend("triton"):
        optimizer.step()
    exact.step([w.grad for w in weights], [0.1] * 4, [0.9] * 4, [5e-4] * 4)
    assert len(launches) == 2
    assert all(rms_error(optimizer.master_of(w), wanted) < 1e-6 for w, wanted in zip(weights, exact.w, strict=True))


def test_a_network_on_a_gpu_takes_one_launch_and_reads_nothing_back(monkeypatch):
    """Meta tensors hold no numbers, so what would read one fails."""
    monkeypatch.setattr(optim, "takes_triton", lambda op, x: True)
    weights = [nn.Parameter(torch.empty(n, device="meta", dtype=torch.bfloat16)) for n in (37_748_736, 4096, 10)]
    lr = torch.empty((), device="meta")
    optimizer = KrizhevskySGD([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.1}], lr)
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    with launch.recording(TARGETS["sm_90"]) as made:
        optimizer.step()
    [one] = made
    block = one.arguments["BLOCK"]
    assert one.programs == sum(-(-n // block) for n in (37_748_736, 4096, 10))


def test_no_kernel_for_float64_is_said_before_anything_changes():
    weights = [*parameters([(5,)]), *parameters([(5,)], torch.float64)]
    before = copy.deepcopy(weights)
    give_gradients(weights)
    with use_backend("triton"), pytest.raises(RuntimeError, match="not float64"):
        KrizhevskySGD(weights, 0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


# --- what `make gpu` checks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_checks_for_a_gpu_hold_here(dtype):
    measures = update_checks.check_update(dtype, SMALL, CPU)
    assert len(measures) == 3
    assert all(measure.holds for measure in measures)


def test_the_check_of_graphs_holds_without_one_and_notices_a_rate_that_was_captured(monkeypatch):
    assert all(measure.holds for measure in update_checks.check_update_graph(SMALL, CPU))

    def captured(step, device):
        def replay():
            with monkeypatch.context() as patch:
                patch.setattr(optim, "_rate", lambda group, device: update_checks.RATES[0])
                return step()

        return replay

    monkeypatch.setattr(update_checks, "captured", captured)
    assert not all(measure.holds for measure in update_checks.check_update_graph(SMALL, CPU))
