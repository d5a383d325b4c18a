"""Other people's training loops do with a network of this package, or a fused one, what they do with the plain one."""

import functools
import inspect
import os
import warnings

import narrow
import pytest
import torch
import torchmetrics
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from plain import error
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from alexnet_triton import FusedSequential, alexnet, fuse
from alexnet_triton.recipe.optim import KrizhevskySGD

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own dependencies
    import lightning.pytorch as lightning

pytestmark = pytest.mark.filterwarnings(
    "error:::alexnet_triton",  # nothing that the package does is warned of
    "ignore:.*does not have many workers",
    "ignore:.*The number of training batches",
    "ignore:You defined a `validation_step`",
    "ignore:.*LeafSpec",
)


@pytest.fixture(autouse=True)
def _one_thread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a loop leaves by itself, it leaves here
    with narrow.one_thread():
        yield


def ours():
    return narrow.twins(dropout=0.0)[0]


def plain():
    return narrow.twins(dropout=0.0)[1]


def fused():
    return fuse(plain())


steps = pytest.mark.parametrize(("make", "norm"), [(ours, None), (fused, 20.0)])
"""What gradients are clipped to is below their norm."""

both = pytest.mark.parametrize("make", [ours, fused])
SEED = 4


def batch(count=1):
    """Images that bring no unit so near to zero that a rounding to bfloat16 would turn its ReLU."""
    return narrow.batch(count, seed=SEED)


def loader(count=1):
    return DataLoader(TensorDataset(*batch(count)), batch_size=count)


def rule_of(model):
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)


@functools.cache
def expected_changes(norm=None, autocast=False):
    """What a step by hand adds to the weights of the plain network."""
    model = plain()
    before, rule = weights(model), rule_of(model)
    images, labels = batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(images)
    narrow.loss_of(logits, labels).backward()
    if norm is not None:
        assert nn.utils.clip_grad_norm_(model.parameters(), norm) > norm
    rule.step()
    return changes(weights(model), before)


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changes(after, before):
    """What a step has added to weights."""
    assert after.keys() == before.keys()
    return {name: after[name] - before[name] for name in before}


def check_step(model, before, limit=2e-5, **options):
    """That a network has taken the step that the plain one takes by hand; the step's size is the measure."""
    assert type(model.features) is FusedSequential
    assert narrow.worst(changes(weights(model), before), expected_changes(**options)) < limit


# --- Lightning ----------------------------------------------------------------------------------------------


class Classifier(lightning.LightningModule):
    """A network in the way of Lightning's tutorials."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(4, average="micro")

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, index):
        images, labels = batch
        loss = narrow.loss_of(self(images), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        images, labels = batch
        logits = self(images)
        self.accuracy(logits, labels)
        self.log_dict({"val_loss": narrow.loss_of(logits, labels), "accuracy": self.accuracy}, on_epoch=True)

    def predict_step(self, batch, index):
        return self(batch[0])

    def configure_optimizers(self):
        rule = rule_of(self)
        return {"optimizer": rule, "lr_scheduler": lr_scheduler.StepLR(rule, 1)}


def trainer(**options):
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@steps
def test_lightning_takes_the_step_of_a_plain_loop(norm, make, backend, tmp_path, capfd):
    net = make()
    before = weights(net)
    trainer(gradient_clip_val=norm).fit(Classifier(net), loader())
    check_step(net, before, norm=norm)
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr().out == ""


@both
def test_lightning_trains_in_bfloat16_as_the_plain_network(make):
    net = make()
    before = weights(net)
    trainer(precision="bf16-mixed").fit(Classifier(net), loader())
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    check_step(net, before, limit=0.03, autocast=True)


@both
def test_lightning_validates_and_predicts_with_the_plain_networks_figures(make):
    results = []
    for net in (make(), plain()):
        [figures] = trainer().validate(Classifier(net), loader(3), verbose=False)
        [logits] = trainer().predict(Classifier(net), loader(3))
        results.append({name: torch.tensor(value) for name, value in figures.items()})
        results[-1]["logits"] = logits
    assert set(results[0]) == {"val_loss", "accuracy", "logits"}
    assert narrow.worst(*results) < 3e-6


@both
def test_lightnings_checkpoint_brings_the_network_back(make, tmp_path):
    net = make()
    run = trainer()
    run.fit(Classifier(net), loader())
    run.save_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    back = Classifier.load_from_checkpoint(tmp_path / "run.ckpt", net=make(), weights_only=True)
    assert narrow.worst(weights(back.net), weights(net)) == 0
    content = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert set(content["state_dict"]) == {f"net.{name}" for name in net.state_dict()}


@both
def test_lightnings_average_of_weights_is_that_of_the_plain_network(make):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    averages = []
    for net in (make(), plain()):
        average = EMAWeightAveraging(decay=0.5)
        trainer(callbacks=[average]).fit(Classifier(net), loader())
        averages.append(weights(net))
    assert narrow.worst(*averages) < 3e-6


@both
def test_lightnings_backbone_finetuning_freezes_and_thaws(make):
    from lightning.pytorch.callbacks import BackboneFinetuning

    class Finetuned(Classifier):
        @property
        def backbone(self):
            return self.net.features

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.01)

    net = make()
    before = weights(net)
    trainer(callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=5)]).fit(Finetuned(net), loader())
    moved = {name for name, change in changes(weights(net), before).items() if change.count_nonzero()}
    assert moved == {name for name in before if name.startswith("classifier.")}


# --- Accelerate ---------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator():
    """Factory of accelerators, which share what they keep of the process: it is dropped before and after."""
    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    yield lambda **options: Accelerator(cpu=True, **options)
    for state in states:
        state._reset_state()


def accelerated(accelerator, model, norm=None):
    """A step as Accelerate's guides write it; the network as it is handed on."""
    net, rule, batches = accelerator.prepare(model, rule_of(model), loader())
    for images, labels in batches:
        with accelerator.accumulate(net):
            loss = narrow.loss_of(net(images), labels)
            accelerator.backward(loss)
            if norm is not None and accelerator.sync_gradients:
                assert accelerator.clip_grad_norm_(net.parameters(), norm) > norm
            rule.step()
            rule.zero_grad()
    return net


@steps
def test_accelerate_takes_the_step_of_a_plain_loop(norm, make, backend, accelerator):
    model = make()
    before = weights(model)
    run = accelerator()
    net = accelerated(run, model, norm)
    check_step(run.unwrap_model(net), before, norm=norm)


@both
def test_accelerate_trains_in_bfloat16_as_the_plain_network(make, accelerator):
    model = make()
    before = weights(model)
    run = accelerator(mixed_precision="bf16")
    net = accelerated(run, model)
    assert net(narrow.batch(1)[0]).dtype == torch.float32  # as it hands results on
    check_step(run.unwrap_model(net, keep_fp32_wrapper=False), before, limit=0.03, autocast=True)


@both
def test_accelerate_accumulates_over_batches(make, accelerator):
    """Two batches, one step: the step of the mean of their gradients."""
    results = []
    for model in (make(), plain()):
        run = accelerator(gradient_accumulation_steps=2)
        before = weights(model)
        net, rule = run.prepare(model, rule_of(model))
        for seed in (1, 2):
            images, labels = narrow.batch(1, seed=seed)
            with run.accumulate(net):
                run.backward(narrow.loss_of(net(images), labels))
                rule.step()
                rule.zero_grad()
        results.append(changes(weights(model), before))
    assert narrow.worst(*results) < 2e-5


@both
def test_what_accelerate_saves_comes_back(make, accelerator, tmp_path):
    from accelerate import load_checkpoint_in_model

    run = accelerator()
    model = make()
    net = accelerated(run, model)
    run.save_model(net, tmp_path / "model")
    assert os.listdir(tmp_path / "model") == ["model.safetensors"]
    back = make()
    load_checkpoint_in_model(back, tmp_path / "model")
    assert narrow.worst(weights(back), weights(model)) == 0
    run.save_state(tmp_path / "state")
    expected = weights(model)
    with torch.no_grad():
        model.classifier[6].bias.add_(1)
    run.load_state(tmp_path / "state")
    assert narrow.worst(weights(model), expected) == 0


def test_what_accelerate_saves_is_read_by_alexnet(accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr("alexnet_triton.model.FEATURES", 16)
    model = alexnet(num_classes=4)
    accelerator().save_model(model, tmp_path)
    assert narrow.worst(weights(alexnet(weights=tmp_path / "model.safetensors")), weights(model)) == 0


# --- torch's own --------------------------------------------------------------------------------------------


@both
def test_a_loop_with_autocast_and_a_scaler_is_that_of_the_plain_network(make, backend):
    results = []
    for model in (make(), plain()):
        before = weights(model)
        rule, scaler = rule_of(model), torch.amp.GradScaler("cpu", init_scale=256.0)
        images, labels = batch()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
            loss = narrow.loss_of(logits, labels)
        assert logits.dtype == torch.bfloat16
        scaler.scale(loss).backward()
        scaler.unscale_(rule)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 20.0)
        scaler.step(rule)
        scaler.update()
        results.append({**changes(weights(model), before), "norm": norm})
    assert narrow.worst(*results) < 0.03


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning:triton")
def test_a_scaler_passes_over_a_step_whose_gradients_overflow(backend):
    model = fused()
    before = weights(model)
    rule, scaler = rule_of(model), torch.amp.GradScaler("cpu", init_scale=256.0)
    images, labels = narrow.batch(1)
    scaler.scale(narrow.loss_of(model(images * float("inf")), labels)).backward()
    scaler.step(rule)
    scaler.update()
    assert scaler.get_scale() == 128
    assert narrow.worst(weights(model), before) == 0


def halved(epoch):
    return 0.5**epoch


SCHEDULES = {
    "LambdaLR": {"lr_lambda": halved},
    "MultiplicativeLR": {"lr_lambda": halved},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 4},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "PolynomialLR": {},
    "CyclicLR": {"base_lr": 0.001, "max_lr": 0.1, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 8},
    "ReduceLROnPlateau": {"patience": 0},
    "SequentialLR": None,
    "ChainedScheduler": None,
}


def schedule(name, rule):
    if name == "SequentialLR":
        return lr_scheduler.SequentialLR(rule, [lr_scheduler.LinearLR(rule), lr_scheduler.StepLR(rule, 1)], [2])
    if name == "ChainedScheduler":
        return lr_scheduler.ChainedScheduler([lr_scheduler.LinearLR(rule), lr_scheduler.ExponentialLR(rule, 0.9)])
    return getattr(lr_scheduler, name)(rule, **SCHEDULES[name])


def test_every_schedule_of_torch_is_tried():
    there = {name for name in lr_scheduler.__all__ if inspect.isclass(getattr(lr_scheduler, name))}
    assert there - {"LRScheduler"} == set(SCHEDULES)


def groups_of(model):
    return [{"params": model.features.parameters(), "lr": 0.001}, {"params": model.classifier.parameters()}]


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_set_the_rates_of_both_rules_alike(name):
    """torch's SGD and 2012's rule, of a network whose features learn more slowly."""
    model, rates = ours(), []
    for rule_class in (torch.optim.SGD, KrizhevskySGD):
        rule = rule_class(groups_of(model), lr=0.01, momentum=0.9)
        rates_of = schedule(name, rule)
        found = []
        for epoch in range(6):
            rule.step()  # without gradients: nothing moves
            rates_of.step(*([1.0 + epoch] if name == "ReduceLROnPlateau" else []))
            found.append([(group["lr"], group["momentum"]) for group in rule.param_groups])
        again = schedule(name, rule_class(groups_of(model), lr=0.01, momentum=0.9))
        again.load_state_dict(rates_of.state_dict())
        rates.append(found)
    assert rates[0] == rates[1]
    assert len(set(map(tuple, rates[0]))) > 1


@both
def test_metrics_of_torchmetrics_count_what_the_network_says(make):
    metrics = torchmetrics.MetricCollection(
        {
            "accuracy": torchmetrics.classification.MulticlassAccuracy(4, average="micro"),
            "top-2": torchmetrics.classification.MulticlassAccuracy(4, average="micro", top_k=2),
            "loss": torchmetrics.MeanMetric(),
        }
    )
    results = []
    for model in (make(), plain()):
        metrics.reset()
        for seed in (1, 2):
            images, labels = narrow.batch(3, seed=seed)
            with torch.no_grad():
                logits = model(images)
            metrics["accuracy"].update(logits, labels)
            metrics["top-2"].update(logits, labels)
            metrics["loss"].update(narrow.loss_of(logits, labels))
        results.append(dict(metrics.compute()))
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert results[0]["top-2"] == results[1]["top-2"]
    assert error(results[0]["loss"], results[1]["loss"]) < 3e-6
