"""Networks that are copied, written, read, shared and averaged by torch's own means are what plain ones are."""

import copy
import functools
import io
import pickle

import groups
import narrow
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from plain import error
from torch import nn
from torch.optim import swa_utils

from alexnet_triton import AlexNet, FusedSequential, fuse, use_backend
from alexnet_triton.fusion.sequential import plan
from alexnet_triton.layers import GroupedLocalResponseNorm
from alexnet_triton.recipe.optim import KrizhevskySGD


@pytest.fixture(autouse=True)
def _one_thread():
    with narrow.one_thread():
        yield


def ours(seed=0):
    return narrow.network("torchvision", dropout=0.0, seed=seed)


def plain(seed=0):
    """torchvision's network with the same weights: what those of this package are held to."""
    model = narrow.twins(dropout=0.0)[1]
    model.load_state_dict(ours(seed).state_dict())
    return model


def fused(seed=0):
    return fuse(plain(seed))


both = pytest.mark.parametrize("make", [ours, fused])


def step(model, count=1):
    """Logits and every gradient of a batch."""
    images, labels = narrow.batch(count)
    logits = model(images)
    narrow.loss_of(logits, labels).backward()
    return {"logits": logits.detach(), **narrow.gradients(model)}


@functools.cache
def expected_step():
    with torch.enable_grad():
        return step(plain())


def check(model, backend):
    """That a network computes what the plain one does, in fused runs, and may be trained."""
    assert type(model.features) is type(model.classifier) is FusedSequential
    assert len(plan(model.features)) < len(model.features)
    if backend == "reference":
        assert narrow.worst(step(model), expected_step()) < 3e-6
    else:  # whose gradients are tested where they are made
        with torch.no_grad():
            assert error(model(narrow.batch(1)[0]), expected_step()["logits"]) < 3e-6


def equal(found, expected):
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


# --- files --------------------------------------------------------------------------------------------------

WAYS = {
    "as it is": {},
    "mapped": {"mmap": True},
    "to a device's name": {"map_location": "cpu"},
    "to a device": {"map_location": torch.device("cpu")},
    "to devices by name": {"map_location": {"cuda:0": "cpu"}},
    "by a function": {"map_location": lambda storage, _: storage},
}


@both
@pytest.mark.parametrize("way", WAYS)
def test_a_state_dict_is_read_in_any_way_and_runs_no_code(way, make, tmp_path):
    model, other = make(), make(seed=9)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    other.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True, **WAYS[way]))
    assert equal(other.state_dict(), model.state_dict())
    check(other, "reference")


@both
@pytest.mark.parametrize("way", WAYS)
def test_a_whole_network_is_read_in_any_way(way, make, tmp_path):
    torch.save(make(), tmp_path / "m.pt")
    check(torch.load(tmp_path / "m.pt", weights_only=False, **WAYS[way]), "reference")


def of_a_state_dict(model, make, folder):
    torch.save(model.state_dict(), folder / "w.pt")
    other = make(seed=9)
    other.load_state_dict(torch.load(folder / "w.pt", weights_only=True))
    return other


def of_a_mapped_state_dict_that_is_taken_over(model, make, folder):
    torch.save(model.state_dict(), folder / "w.pt")
    other = make().to("meta")
    other.load_state_dict(torch.load(folder / "w.pt", weights_only=True, mmap=True), assign=True)
    return other


def of_a_whole_network_without_values(model, make, folder):
    torch.save(model, folder / "m.pt")
    other = torch.load(folder / "m.pt", weights_only=False, map_location="meta")
    assert all(parameter.is_meta for parameter in other.parameters())
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def of_a_whole_network_of_classes_that_are_named(model, make, folder):
    torch.save(model, folder / "m.pt")
    with pytest.raises(pickle.UnpicklingError, match=r"(?i)weights.only"):
        torch.load(folder / "m.pt", weights_only=True)
    layers = [type(layer) for layer in model.modules()]
    with torch.serialization.safe_globals([*layers, GroupedLocalResponseNorm, set]):
        return torch.load(folder / "m.pt", weights_only=True)


def of_pickles_of_every_protocol(model, make, folder):
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):  # as of plain modules: older ones do not know tensors
        model = pickle.loads(pickle.dumps(model, protocol))
    return model


def of_an_old_file(model, make, folder):
    torch.save(model.state_dict(), folder / "w.pth", _use_new_zipfile_serialization=False)
    other = make(seed=9)
    other.load_state_dict(torch.load(folder / "w.pth", weights_only=True))
    return other


def of_safetensors_model(model, make, folder):
    safetensors.torch.save_model(model, folder / "m.safetensors")
    other = make(seed=9)
    assert safetensors.torch.load_model(other, folder / "m.safetensors") == (set(), [])
    return other


def of_safetensors_file(model, make, folder):
    safetensors.torch.save_file(model.state_dict(), folder / "w.safetensors")
    other = make().to("meta")
    other.load_state_dict(safetensors.torch.load_file(folder / "w.safetensors"), assign=True)
    return other


def of_a_distributed_checkpoint(model, make, folder):
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "dcp", no_dist=True)
    other = make(seed=9)
    state_dict = {"model": other.state_dict()}
    dcp.load(state_dict, checkpoint_id=folder / "dcp", no_dist=True)
    other.load_state_dict(state_dict["model"])
    return other


def of_a_copy_in_channels_last(model, make, folder):
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return of_a_state_dict(other, lambda seed: make(seed).to(memory_format=torch.channels_last), folder)


def of_a_copy_of_the_outer_module(model, make, folder):
    return copy.copy(model)


def of_emptied_memory(model, make, folder):
    other = make().to("meta").to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    return other


KEPT = [value for name, value in list(globals().items()) if name.startswith("of_")]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("make", "backend"), [(ours, "triton"), (ours, "reference"), (fused, "reference")], indirect=["backend"]
)
@pytest.mark.parametrize("kept", KEPT, ids=lambda kept: kept.__name__.removeprefix("of_"))
def test_a_kept_network_computes_what_the_plain_one_does(kept, make, backend, tmp_path):
    model = make()
    other = kept(model, make, tmp_path)
    assert equal(other.state_dict(), model.state_dict())
    assert type(other) is type(model)
    check(other, backend)


@both
def test_a_copy_of_a_network_is_planned_for_itself(make):
    model = make()
    step(model)
    other = copy.deepcopy(model)
    other.zero_grad()
    assert narrow.worst(step(other), expected_step()) < 3e-6
    other.zero_grad()
    other.features[1] = nn.Tanh()
    model.zero_grad()
    assert narrow.worst(step(model), expected_step()) < 3e-6
    twin = plain()
    twin.features[1] = nn.Tanh()
    assert narrow.worst(step(other), step(twin)) < 3e-6


# --- state dicts --------------------------------------------------------------------------------------------


def test_state_dicts_go_to_torchvisions_network_and_back():
    model, theirs = ours(), plain(seed=9)
    theirs.load_state_dict(model.state_dict(), strict=True)
    assert equal(theirs.state_dict(), model.state_dict())
    back = ours(seed=8)
    back.load_state_dict(theirs.state_dict(), strict=True)
    check(back, "reference")


@both
def test_parts_of_a_state_dict_load_where_that_is_allowed(make):
    model, twin = make(seed=9), plain(seed=9)
    part = {name: value for name, value in plain().state_dict().items() if name.startswith("features.")}
    results = [net.load_state_dict({**part, "more": torch.ones(1)}, strict=False) for net in (model, twin)]
    assert results[0] == results[1]
    assert equal(model.state_dict(), twin.state_dict())


@both
def test_tensors_that_are_taken_over_are_the_parameters(make):
    model, state_dict = make(seed=9), plain().state_dict()
    model.requires_grad_(False)
    model.load_state_dict(state_dict, assign=True)
    assert all(parameter.data_ptr() == state_dict[name].data_ptr() for name, parameter in model.named_parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(True)
    check(model, "reference")


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_state_dict_in_half_precision_is_that_of_plain_layers(dtype, make):
    kept, expected = make().to(dtype).state_dict(), plain().to(dtype).state_dict()
    assert {value.dtype for value in kept.values()} == {dtype}
    assert equal(kept, expected)
    model, twin = make(seed=9), plain(seed=9)
    model.load_state_dict(kept)
    twin.load_state_dict(expected)
    assert narrow.worst(step(model), step(twin)) < 3e-6


@both
def test_a_state_dict_is_the_parameters_and_is_not_a_copy(make):
    model = make()
    state_dict = model.state_dict(prefix="net.", keep_vars=True)
    assert all(state_dict[f"net.{name}"] is parameter for name, parameter in model.named_parameters())
    with torch.no_grad():
        model.state_dict()["features.0.bias"].zero_()
    assert model.features[0].bias.count_nonzero() == 0


@both
def test_hooks_of_state_dicts_are_called(make):
    model = make()
    model.register_state_dict_post_hook(lambda module, kept, prefix, metadata: kept.update(extra=torch.ones(1)))
    assert "extra" in model.state_dict()
    model.register_load_state_dict_pre_hook(lambda module, given, *_: given.pop("extra"))
    result = model.load_state_dict({**plain().state_dict(), "extra": torch.ones(1)}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])


RULES = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9, nesterov=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 0.001),
    "KrizhevskySGD": lambda parameters: KrizhevskySGD(parameters, 0.01),
}


@both
@pytest.mark.parametrize("rule", RULES)
def test_a_run_goes_on_from_its_files_to_the_same_bits(rule, make, tmp_path):
    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            step(model)
            optimizer.step()

    model = make()
    optimizer = RULES[rule](model.parameters())
    train(model, optimizer, 1)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    train(model, optimizer, 2)
    other = make(seed=9)
    going_on = RULES[rule](other.parameters())
    kept = torch.load(tmp_path / "run.pt", weights_only=True)
    other.load_state_dict(kept["model"])
    going_on.load_state_dict(kept["optimizer"])
    train(other, going_on, 2)
    assert equal(other.state_dict(), model.state_dict())


# --- processes that share a network -------------------------------------------------------------------------


def train_shared(model, backends, answers):
    """In a process of its own: what the network gives, on each backend, and then a step of its shared parameters."""
    torch.set_num_threads(1)
    for backend in backends:
        with use_backend(backend), torch.no_grad():
            answers.put(model(narrow.batch(1)[0]).numpy())
    step(model)
    torch.optim.SGD(model.parameters(), 0.1).step()


def shared_training(rank, size, method, backends):
    """The logits that another process gives of a shared network, and the parameters that its step leaves here."""
    model = fused() if method == "fork" else ours()
    model.share_memory()
    assert all(parameter.is_shared() for parameter in model.parameters())
    context = mp.get_context(method)
    answers = context.Queue()
    process = context.Process(target=train_shared, args=(model, backends, answers))
    process.start()
    try:
        logits = [torch.from_numpy(answers.get(timeout=100)) for _ in backends]
        process.join(100)
        return process.exitcode, logits, {name: value.clone() for name, value in model.state_dict().items()}
    finally:
        process.kill()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_share_a_network_and_train_it(method):
    [(code, logits, left)] = groups.run(shared_training, 1, method, ["reference", "triton"], seconds=120)
    twin = plain()
    step(twin)
    torch.optim.SGD(twin.parameters(), 0.1).step()
    assert code == 0
    assert len(logits) == 2
    assert all(error(found, expected_step()["logits"]) < 3e-6 for found in logits)
    assert narrow.worst(left, dict(twin.state_dict())) < 3e-6


# --- averages -----------------------------------------------------------------------------------------------

AVERAGES = {
    "equal": {},
    "exponential": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
    "exponential one by one": {"avg_fn": swa_utils.get_ema_avg_fn(0.9)},
    "stochastic": {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    "of buffers": {"use_buffers": True},
    "on a device": {"device": "cpu"},
}


@functools.cache
def average_of_plain(name):
    return averaged(plain(), **AVERAGES[name])


def averaged(model, steps=2, **options):
    """A network's average over some steps."""
    average = swa_utils.AveragedModel(model, **options)
    rule = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(steps):
        rule.zero_grad()
        step(model)
        rule.step()
        average.update_parameters(model)
    return average


@both
@pytest.mark.parametrize("average", AVERAGES)
def test_an_average_is_that_of_plain_networks(average, make):
    found, expected = averaged(make(), **AVERAGES[average]), average_of_plain(average)
    assert type(found.module.features) is FusedSequential
    assert narrow.worst(dict(found.named_parameters()), dict(expected.named_parameters())) < 3e-6
    with torch.no_grad():
        assert error(found(narrow.batch(1)[0]), expected(narrow.batch(1)[0])) < 3e-6


def test_an_average_is_kept_and_runs_on_the_kernels(backend, tmp_path):
    average = swa_utils.AveragedModel(ours())
    average.update_parameters(ours())
    torch.save(average.state_dict(), tmp_path / "average.pt")
    other = swa_utils.AveragedModel(ours(seed=9))
    other.load_state_dict(torch.load(tmp_path / "average.pt", weights_only=True))
    assert other.n_averaged == 1
    check(other.module, backend)
    model = ours(seed=8)
    model.load_state_dict(other.module.state_dict())
    assert equal(model.state_dict(), ours().state_dict())


@both
@pytest.mark.parametrize("buffers", [True, False])
def test_statistics_of_batch_norms_are_those_of_plain_networks(buffers, make):
    """Batch norms in the place of two ReLUs, as many put them in."""

    def with_norms(model):
        for index in (1, 4):
            filters = model.features[index - 1].out_channels
            model.features[index] = nn.Sequential(nn.BatchNorm2d(filters), nn.ReLU(inplace=True))
        return model

    batches = [narrow.batch(2, seed=seed) for seed in (3, 4)]
    results = []
    for model in (with_norms(make()), with_norms(plain())):
        average = averaged(model, 1, use_buffers=buffers)
        before = {name: value.clone() for name, value in average.named_buffers()}
        swa_utils.update_bn(batches, average)
        after = dict(average.named_buffers())
        assert not all(torch.equal(before[name], after[name]) for name in before)
        with torch.no_grad():
            results.append({**before, **{f"after {name}": value for name, value in after.items()}})
            results[-1]["logits"] = average.eval()(batches[0][0])
    assert narrow.worst(*results) < 3e-6


@both
def test_swa_rates_and_averages_go_together(make):
    weights = []
    for model in (make(), plain()):
        rule = torch.optim.SGD(model.parameters(), 0.01)
        rates, average = swa_utils.SWALR(rule, swa_lr=0.002, anneal_epochs=2), swa_utils.AveragedModel(model)
        for _ in range(3):
            rule.zero_grad()
            step(model)
            rule.step()
            average.update_parameters(model)
            rates.step()
        assert rule.param_groups[0]["lr"] == 0.002
        weights.append(dict(average.module.state_dict()))
    assert narrow.worst(*weights) < 1e-5


# --- one's own kinds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["merged", "paper", "caffe"])
def test_networks_with_norms_and_towers_are_kept_whole(variant, tmp_path):
    model = narrow.network(variant, dropout=0.0)
    for name, content in (("whole", model), ("weights", model.state_dict())):
        torch.save(content, tmp_path / name)
    whole = torch.load(tmp_path / "whole", weights_only=False)
    assert repr(whole) == repr(model)
    assert narrow.worst(step(whole), step(model)) == 0
    model.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    file = io.BytesIO(pickle.dumps(whole))
    assert type(pickle.load(file)) is AlexNet
