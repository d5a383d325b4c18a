"""The update rule of 2012 as an optimizer of torch."""

import copy
import io
import re

import pytest
import torch
from kernel_cases import rms_error
from sgd_cases import DTYPES, InFloat64, give_gradients, parameters, trained
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import lr_scheduler

from alexnet_triton import use_backend
from alexnet_triton.recipe.optim import KrizhevskySGD, biases_apart

# --- the rule -----------------------------------------------------------------------------------------------


def positions(optimizer, w):
    found = []
    for lr in (0.01, 0.01, 0.001):
        optimizer.param_groups[0]["lr"] = lr
        w.grad = torch.ones_like(w)
        optimizer.step()
        found.append(w.item())
    return found


def test_the_rate_is_inside_the_velocity(backend):
    w = nn.Parameter(torch.zeros(1))
    assert positions(KrizhevskySGD([w], 0.01, 0.9, 0), w) == pytest.approx([-0.01, -0.029, -0.0471], rel=1e-6)
    w = nn.Parameter(torch.zeros(1))
    theirs = positions(torch.optim.SGD([w], 0.01, 0.9), w)
    assert theirs == pytest.approx([-0.01, -0.029, -0.03171], rel=1e-6)


def test_the_decay_is_inside_the_velocity_too(backend):
    w = nn.Parameter(torch.ones(1))
    optimizer = KrizhevskySGD([w], 0.1, 0.5, 0.01)
    w.grad = torch.zeros(1)
    optimizer.step()
    assert w.item() == pytest.approx(1 - 0.001, abs=1e-7)
    assert optimizer.state[w]["velocity"].item() == pytest.approx(-0.001, rel=1e-5)
    optimizer.step()
    assert w.item() == pytest.approx(0.999 - 0.0005 - 0.000999, abs=1e-7)


RULES = [(dtype, backend) for dtype in DTYPES for backend in ("triton", "reference")] + [(torch.float64, "reference")]
"""The kernels take no float64."""


@pytest.mark.parametrize(("dtype", "on"), RULES)
def test_five_steps_with_groups_and_a_drop_of_the_rate_are_those_of_float64(dtype, on):
    weights = parameters(dtype=dtype)
    groups = [
        {"params": weights[:2]},
        {"params": weights[2:4], "lr": 0.3, "momentum": 0.5, "weight_decay": 0.1},
        {"params": weights[4:], "momentum": 0.0, "lr_mult": 2.0, "weight_decay": 0},
    ]
    optimizer, exact = KrizhevskySGD(groups, 0.05), InFloat64(weights)
    for step in range(5):
        give_gradients(weights)
        if step == 1:
            weights[1].grad = None
        if step == 3:
            for group in optimizer.param_groups:
                group["lr"] /= 10
        with use_backend(on):
            optimizer.step()
        drop = 0.1 if step >= 3 else 1
        lr = [drop * rate for rate in (0.05, 0.05, 0.3, 0.3, 0.1, 0.1)]
        momentum, decay = (0.9, 0.9, 0.5, 0.5, 0, 0), (5e-4, 5e-4, 0.1, 0.1, 0, 0)
        exact.step([w.grad for w in weights], lr, momentum, decay)
    limit = 1e-13 if dtype == torch.float64 else 1e-6
    for w, wanted, velocity in zip(weights, exact.w, exact.v, strict=True):
        assert rms_error(optimizer.master_of(w), wanted) < limit
        assert rms_error(optimizer.state[w]["velocity"], velocity) < limit
        assert torch.equal(w, optimizer.master_of(w).to(dtype))


def test_it_is_torchs_sgd_while_the_rate_is_constant(backend):
    ours = parameters()
    theirs = copy.deepcopy(ours)
    trained(KrizhevskySGD(ours, 0.05, 0.9, 0.01), ours, [0.05] * 5)
    trained(torch.optim.SGD(theirs, 0.05, 0.9, weight_decay=0.01), theirs, [0.05] * 5)
    assert all(rms_error(a, b) < 1e-6 for a, b in zip(ours, theirs, strict=True))


def test_a_rate_of_zero_lets_the_velocity_run_out(backend):
    [w] = weights = parameters([(5,)])
    optimizer = KrizhevskySGD(weights, 0.1, 0.5, 0)
    give_gradients(weights)
    optimizer.step()
    before, velocity = w.detach().clone(), optimizer.state[w]["velocity"].clone()
    optimizer.param_groups[0]["lr"] = 0
    optimizer.step()
    assert torch.equal(w, before + 0.5 * velocity)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_in_a_gradient_reaches_its_element_alone(dtype, backend):
    weights = parameters(dtype=dtype)
    optimizer = KrizhevskySGD(weights, 0.1)
    give_gradients(weights)
    for weight in weights:
        weight.grad.view(-1)[-1] = float("nan")
    optimizer.step()
    for weight in weights:
        expected = torch.zeros(weight.numel(), dtype=torch.bool)
        expected[-1] = True
        for tensor in (weight, optimizer.master_of(weight), optimizer.state[weight]["velocity"]):
            assert torch.equal(tensor.isnan().view(-1), expected)


def negated(*size):
    """A view whose memory holds its negative."""
    return torch._neg_view(torch.randn(size))


@pytest.mark.parametrize("make", [negated, torch._efficientzerotensor], ids=["negated", "zeros"])
def test_tensors_that_torch_negates_lazily_and_zeros_without_memory_count_as_what_they_stand_for(make, backend):
    for weight, gradient in ((torch.randn(3, 5), make(3, 5)), (negated(3, 5), torch.randn(3, 5))):
        lazy, usual = nn.Parameter(weight), nn.Parameter(weight.clone())
        lazy.grad, usual.grad = gradient, gradient.clone()
        KrizhevskySGD([lazy, usual], 0.1).step()
        assert rms_error(lazy, usual) < 1e-6


# --- the optimizer ------------------------------------------------------------------------------------------


def test_a_rate_in_a_tensor_is_that_rate_and_may_change_in_place(backend):
    ours = parameters()
    ours[3] = nn.Parameter(ours[3].detach().t().contiguous().t())  # and its gradient is not: no kernel, no fused step
    theirs = copy.deepcopy(ours)
    lr = torch.tensor([0.1], dtype=torch.float64)
    with_tensor, with_number = KrizhevskySGD(ours, lr), KrizhevskySGD(theirs, 0.1)
    for step in range(3):
        give_gradients(ours)
        ours[3].grad = ours[3].grad.contiguous()
        for a, b in zip(ours, theirs, strict=True):
            b.grad = a.grad.clone()
        if step == 2:
            lr.fill_(0.01)
            with_number.param_groups[0]["lr"] = 0.01
        with_tensor.step()
        with_number.step()
    assert all(rms_error(a, b) < 1e-7 for a, b in zip(ours, theirs, strict=True))


def test_a_rate_in_a_tensor_is_no_other_optimizers(backend):
    for lr, moves in ((torch.tensor(0.1), True), (0.0, False)):
        [w] = weights = parameters([(5,)])
        before = w.detach().clone()
        give_gradients(weights)
        KrizhevskySGD(weights, lr).step()
        assert torch.equal(w, before) != moves


def test_a_step_on_a_gpu_reads_nothing_back_without_kernels_either(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode(), use_backend("reference"):  # which refuses to read a number
        numbers = [torch.empty(5, device="cuda", dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
        weights = [nn.Parameter(tensor) for tensor in numbers]
        optimizer = KrizhevskySGD([{"params": weights[:1]}, {"params": weights[1:]}], torch.empty(1, device="cuda"))
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        optimizer.step()
        assert optimizer.master_of(weights[1]).dtype == torch.float32


def test_a_parameters_first_step_cannot_be_captured(monkeypatch):
    with FakeTensorMode():
        weight = nn.Parameter(torch.empty(5, device="cuda"))
        weight.grad = torch.empty_like(weight)
        optimizer = KrizhevskySGD([weight], 0.1)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="take one step before the capture"):
            optimizer.step()


def test_a_compiled_step_is_the_same():
    ours = parameters([(7, 9)], torch.bfloat16)
    theirs = copy.deepcopy(ours)
    compiled, plain = KrizhevskySGD(ours, 0.1), KrizhevskySGD(theirs, 0.1)
    trained(compiled, ours, [0.1])
    trained(plain, theirs, [0.1])
    compiled.param_groups[0]["lr"] = torch.tensor(0.1)
    torch.compile(compiled.step, backend="aot_eager")()
    plain.step()
    assert rms_error(compiled.master_of(ours[0]), plain.master_of(theirs[0])) < 1e-7


def test_parameters_without_a_gradient_stay_and_get_no_state(backend):
    weights = parameters([(5,), (6,)])
    before = copy.deepcopy(weights)
    optimizer = KrizhevskySGD(weights, 0.1)
    optimizer.step()
    weights[0].grad = torch.ones(5)
    optimizer.step()
    assert torch.equal(weights[1], before[1])
    assert list(optimizer.state) == [weights[0]]
    optimizer.zero_grad()
    assert weights[0].grad is None
    weights[0].grad = torch.ones(5)
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(weights[0].grad, torch.zeros(5))


def test_a_closure_is_evaluated_with_gradients_and_its_loss_handed_on(backend):
    w = nn.Parameter(torch.ones(3))
    optimizer = KrizhevskySGD([w], 0.1, 0, 0)

    def closure():
        optimizer.zero_grad()
        loss = (w * w).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert torch.allclose(w, torch.full((3,), 0.8))


def test_a_step_between_forward_and_backward_is_noticed(backend):
    w = nn.Parameter(torch.ones(3))
    loss = (w * w).sum()
    w.grad = torch.ones(3)
    KrizhevskySGD([w], 0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr must be at least 0 and finite, got -0.1"),
        ({"lr": float("nan")}, "lr must be at least 0 and finite, got nan"),
        ({"lr": torch.tensor(-1.0)}, "lr must be at least 0 and finite"),
        ({"lr": torch.ones(2)}, "lr must be one real number, got a tensor (2,) of torch.float32"),
        ({"lr": 0.1, "momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"lr": 0.1, "momentum": -0.5}, "momentum must be at least 0 and below 1, got -0.5"),
        ({"lr": 0.1, "weight_decay": -1}, "weight_decay must be at least 0 and finite, got -1"),
    ],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        KrizhevskySGD(parameters(), **options)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e5m2])
def test_parameters_of_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=f"got {dtype}"):
        KrizhevskySGD([nn.Parameter(torch.zeros(3, dtype=dtype))], 0.1)


def test_a_group_may_be_added_and_a_bad_one_changes_nothing(backend):
    weights = parameters([(5,), (6,)])
    optimizer = KrizhevskySGD(weights[:1], 0.1)
    with pytest.raises(ValueError, match="lr_mult must be at least 0"):
        optimizer.add_param_group({"params": weights[1:], "lr_mult": -1})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": weights[1:], "lr": 0.5, "weight_decay": 0})
    before = weights[1].detach().clone()
    give_gradients(weights)
    optimizer.step()
    assert torch.allclose(weights[1], before - 0.5 * weights[1].grad)


def sparse(weight):
    return torch.eye(4).to_sparse()


def complex_numbers(weight):
    weight.grad_dtype = None
    return torch.ones(4, 4, dtype=torch.complex64)


@pytest.mark.parametrize(("make", "message"), [(sparse, "must be dense"), (complex_numbers, "must be real")])
def test_other_gradients_are_refused_before_anything_changes(make, message, backend):
    weights = parameters([(5,), (4, 4)])
    before = copy.deepcopy(weights)
    optimizer = KrizhevskySGD(weights, 0.1)
    weights[0].grad = torch.ones(5)
    if make is complex_numbers and not hasattr(weights[1], "grad_dtype"):
        pytest.skip("this torch has no gradients of another dtype")
    weights[1].grad = make(weights[1])
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    assert not optimizer.state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, state: setattr(w, "data", torch.zeros(7)), "a velocity is (5,) of torch.float32 on cpu"),
        (lambda w, state: setattr(w, "data", w.data.double()), "values are (5,) of torch.float64 on cpu"),
        (lambda w, state: state.update(velocity=torch.empty(5, device="meta")), "(5,) of torch.float32 on meta"),
    ],
    ids=["shape", "dtype", "device"],
)
def test_a_parameter_that_is_no_longer_what_it_was_is_refused(change, message, backend):
    weights = parameters([(6,), (5,)])
    optimizer = KrizhevskySGD(weights, 0.1)
    trained(optimizer, weights, [0.1])
    weights[1].grad = None
    change(weights[1], optimizer.state[weights[1]])
    weights[1].grad = torch.ones_like(weights[1])
    before = weights[0].detach().clone()
    with pytest.raises(RuntimeError, match=re.escape(message)):
        optimizer.step()
    assert torch.equal(weights[0], before)


def test_a_network_may_change_to_half_precision_and_back_between_steps(backend):
    layer = nn.Linear(5, 3)
    weights = list(layer.parameters())
    optimizer, exact = KrizhevskySGD(weights, 0.1), InFloat64(weights)
    for change in (layer.bfloat16, layer.float, layer.float, layer.bfloat16):
        optimizer.zero_grad()
        change()
        give_gradients(weights)
        optimizer.step()
        exact.step([w.grad for w in weights], [0.1] * 2, [0.9] * 2, [5e-4] * 2)
    assert all(rms_error(optimizer.master_of(w), wanted) < 4e-3 for w, wanted in zip(weights, exact.w, strict=True))
    assert torch.equal(weights[0], optimizer.master_of(weights[0]).bfloat16())


# --- masters ------------------------------------------------------------------------------------------------


def test_half_precision_gathers_steps_that_are_below_its_rounding(backend):
    w = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = KrizhevskySGD([w], 1e-3, 0, 0)
    for _ in range(20):  # a step of 0.001 where bfloat16 has steps of 0.004
        w.grad = torch.ones_like(w)
        optimizer.step()
    assert torch.allclose(optimizer.master_of(w), torch.full((3,), 0.98), atol=1e-5)
    assert torch.equal(w, torch.full((3,), 0.98, dtype=torch.bfloat16))


def test_masters_may_start_from_given_values(backend):
    values = torch.randn(3, 5)
    w = nn.Parameter(torch.zeros(3, 5, dtype=torch.bfloat16))
    optimizer = KrizhevskySGD([w], 0.1)
    optimizer.set_master(w, values)
    assert torch.equal(optimizer.master_of(w), values)
    assert torch.equal(w, values.bfloat16())
    w.grad = torch.zeros_like(w)
    optimizer.step()
    assert rms_error(optimizer.master_of(w), values * (1 - 0.1 * 5e-4)) < 1e-7


def test_a_parameter_in_float32_is_its_own_master():
    w = nn.Parameter(torch.zeros(3))
    optimizer = KrizhevskySGD([w], 0.1)
    optimizer.set_master(w, torch.ones(3, dtype=torch.float64))
    assert torch.equal(w, torch.ones(3))
    assert optimizer.master_of(w).data_ptr() == w.data_ptr()
    assert not optimizer.master_of(w).requires_grad
    assert not optimizer.state


def test_masters_of_others_and_of_other_shapes_are_refused():
    optimizer = KrizhevskySGD([w := nn.Parameter(torch.zeros(3))], 0.1)
    other = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="not among this optimizer's"):
        optimizer.master_of(other)
    with pytest.raises(ValueError, match="not among this optimizer's"):
        optimizer.set_master(other, other)
    with pytest.raises(ValueError, match=r"shape \(3,\) cannot take values of shape \(1,\)"):
        optimizer.set_master(w, torch.ones(1))


# --- state --------------------------------------------------------------------------------------------------


def through_a_file(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(dtype, backend):
    weights = parameters(dtype=dtype)
    optimizer = KrizhevskySGD(weights, 0.1)
    trained(optimizer, weights, [0.1, 0.1, 0.01], seed=1)
    file = through_a_file({"masters": [optimizer.master_of(w) for w in weights], "state": optimizer.state_dict()})

    again = parameters(dtype=dtype)
    resumed = KrizhevskySGD(again, 0.5)
    resumed.load_state_dict(file["state"])
    for weight, master in zip(again, file["masters"], strict=True):
        resumed.set_master(weight, master)
    trained(optimizer, weights, [0.01, 0.001], seed=2)
    trained(resumed, again, [0.01, 0.001], seed=2)
    for a, b in zip(weights, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.master_of(a), resumed.master_of(b))
        assert torch.equal(optimizer.state[a]["velocity"], resumed.state[b]["velocity"])
        assert resumed.state[b]["velocity"].dtype == torch.float32
    assert optimizer.state_dict()["param_groups"] == resumed.state_dict()["param_groups"]


def test_loaded_state_is_a_copy_in_the_parameters_layout():
    [w] = weights = parameters([(4, 3, 5, 5)])
    optimizer = KrizhevskySGD(weights, 0.1)
    trained(optimizer, weights, [0.1])
    last = nn.Parameter(w.detach().contiguous(memory_format=torch.channels_last))
    other = KrizhevskySGD([last], 0.1)
    saved = optimizer.state_dict()
    other.load_state_dict(saved)
    velocity, loaded = saved["state"][0]["velocity"], other.state[last]["velocity"]
    assert torch.equal(velocity, loaded)
    assert loaded.stride() == last.stride()
    assert loaded.data_ptr() != velocity.data_ptr()


def test_hooks_on_loading_are_heard():
    [w] = weights = parameters([(3,)], torch.bfloat16)
    optimizer = KrizhevskySGD(weights, 0.1)
    trained(optimizer, weights, [0.1])
    saved = optimizer.state_dict()

    def zeroed(optimizer, state):
        return {**state, "state": {0: {"velocity": torch.zeros(3), "master": state["state"][0]["master"]}}}

    optimizer.register_load_state_dict_pre_hook(zeroed)
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[w]["velocity"], torch.zeros(3))


def test_precision_may_change_between_saving_and_loading():
    full = parameters([(3, 5)])
    trained(in_full := KrizhevskySGD(full, 0.1), full, [0.1])
    half = [nn.Parameter(full[0].detach().bfloat16())]
    in_half = KrizhevskySGD(half, 0.1)
    in_half.load_state_dict(in_full.state_dict())
    assert torch.equal(in_half.state[half[0]]["velocity"], in_full.state[full[0]]["velocity"])
    trained(in_half, half, [0.1])
    in_full.load_state_dict(in_half.state_dict())
    assert set(in_full.state[full[0]]) == {"velocity"}


@pytest.mark.parametrize("sizes", [[(5,), (6,)], [(5,), (6,), (7,)]])
def test_the_state_of_another_network_is_refused_and_changes_nothing(sizes):
    weights, others = parameters([(5,), (9,)]), parameters(sizes)
    optimizer, other = KrizhevskySGD(weights, 0.1), KrizhevskySGD(others, 0.2)
    trained(optimizer, weights, [0.1])
    trained(other, others, [0.2])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"another network's|doesn't match the size"):
        optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][i]["velocity"], before["state"][i]["velocity"]) for i in (0, 1))


def test_a_copy_goes_on_like_its_original(backend):
    weights = parameters(dtype=torch.bfloat16)
    optimizer = KrizhevskySGD(weights, 0.1)
    trained(optimizer, weights, [0.1])
    others, other = copy.deepcopy((weights, optimizer))
    trained(optimizer, weights, [0.1], seed=3)
    trained(other, others, [0.1], seed=3)
    for a, b in zip(weights, others, strict=True):
        assert torch.equal(optimizer.master_of(a), other.master_of(b))
        assert optimizer.master_of(a) is not other.master_of(b)


# --- biases -------------------------------------------------------------------------------------------------


def test_biases_have_twice_the_rate_and_no_decay(backend):
    layer = nn.Linear(3, 2)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    optimizer = KrizhevskySGD(biases_apart(layer, 0.1, 0.5), 0.1)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.allclose(layer.weight, before["weight"] * (1 - 0.1 * 0.5) - 0.1)
    assert torch.allclose(layer.bias, before["bias"] - 0.2)


def test_biases_follow_their_own_multiples():
    groups = biases_apart(nn.Sequential(nn.Linear(3, 2), nn.Conv2d(1, 1, 1, bias=False)), 0.1, 0.5, 3.0, 0.25)
    assert [len(group["params"]) for group in groups] == [2, 1]
    assert (groups[1]["lr_mult"], groups[1]["weight_decay"]) == (3.0, 0.125)
    assert len(biases_apart(nn.Linear(3, 2, bias=False), 0.1, 0.5)) == 1


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", ["step", "plateau"])
def test_biases_keep_twice_the_rate_under_a_scheduler_down_to_its_least(name, lr):
    layer = nn.Linear(3, 2)
    optimizer = KrizhevskySGD(biases_apart(layer, copy.deepcopy(lr), 0.0), 0.1, momentum=0)
    if name == "step":
        scheduler = lr_scheduler.StepLR(optimizer, 1, 0.1)
    else:
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, min_lr=2e-4)
    for rate in (0.1, 0.01, 0.001, 1e-4 if name == "step" else 2e-4):
        before = {key: value.clone() for key, value in layer.state_dict().items()}
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert (before["weight"] - layer.weight).mean().item() == pytest.approx(rate, rel=1e-2)
        assert (before["bias"] - layer.bias).mean().item() == pytest.approx(2 * rate, rel=1e-2)
        scheduler.step(*([1.0] if name == "plateau" else []))
        if name == "plateau" and rate == 0.1:
            scheduler.step(1.0)  # the first value was the best
