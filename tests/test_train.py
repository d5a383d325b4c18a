"""The training loop: what it learns and draws, when it stops with an error, and what it warns of."""

import csv
import math
import os
import re
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from small_run import equal, network, patterns, state, steps_of, training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from tqdm import tqdm

from alexnet_triton import AlexNet
from alexnet_triton.recipe.data.loader import Loader
from alexnet_triton.recipe.data.sets import LabelledImages
from alexnet_triton.recipe.optim import KrizhevskySGD
from alexnet_triton.recipe.train import checkpoint
from alexnet_triton.recipe.train.loop import TrainingError
from alexnet_triton.recipe.train.settings import COLUMNS, Settings


def test_a_run_learns_and_writes_down_every_step_and_epoch(tmp_path):
    history = training(tmp_path, network(dropout=0.0), epochs=12, clip_grad_norm=1.0, mirror=False).run()
    assert len(history.step_loss) == 12 * 3
    assert history.epochs[-1]["loss"] < 0.5 * history.epochs[0]["loss"]
    assert history.epochs[-1]["held_out_top1"] == 1
    assert history.column("step") == [3 * epoch for epoch in range(1, 13)]
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    assert [float(row["loss"]) for row in rows] == pytest.approx(history.column("loss"), rel=1e-5)
    assert rows[-1]["epoch"] == "12"


def test_events_are_written_for_tensorboard(tmp_path):
    history = training(tmp_path, epochs=1).run()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss/step")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("loss/step")] == pytest.approx(history.step_loss)
    assert events.Scalars("epoch/held_out_top1")[0].value == pytest.approx(history.epochs[0]["held_out_top1"])


def test_an_epochs_figures_are_means_of_its_images_and_not_of_its_batches(tmp_path):
    history = training(tmp_path, epochs=1).run()
    sums = [loss * count for loss, count in zip(history.step_loss, (8, 8, 6), strict=True)]
    assert history.column("loss") == pytest.approx([sum(sums) / 22])
    right = 22 * history.epochs[0]["top1"]
    assert right == pytest.approx(round(right))


class Slow(LabelledImages):
    """Images that are long in coming."""

    def read(self, indices):
        time.sleep(0.05)
        return super().read(indices)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_share_of_time_that_is_waited_is_that_of_the_epoch(workers, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(tqdm, "set_postfix", lambda _, **figures: shown.append(figures["waiting"]))
    data = patterns()
    learn = Slow("slow", data.images, data.labels, data.classes)
    history = training(tmp_path, learn=learn, workers=workers).run()
    shares = [float(share.rstrip("%")) / 100 for share in shown]
    assert len(shares) == 9
    assert all(0 < share <= 1 for share in (*shares, *history.column("waiting")))


def test_every_worker_and_epoch_has_crops_of_its_own(tmp_path, monkeypatch):
    """pytorch#5059: workers, and epochs, that drew alike."""
    run = training(tmp_path, workers=4, batch_size=4, epochs=2)
    seen, augment = [], run.augment.forward

    def noted(images, draws):
        if run.model.training:
            pairs = zip(images.flatten(1).sum(1).tolist(), draws.colour.tolist(), strict=True)
            seen.extend((image, tuple(colour)) for image, colour in pairs)
        return augment(images, draws)

    monkeypatch.setattr(run.augment, "forward", noted)
    run.run()
    images = run.learn.images.flatten(1).sum(1).tolist()
    for epoch in (seen[:22], seen[22:]):
        assert sorted(image for image, _ in epoch) == sorted(images)
    assert [image for image, _ in seen[:22]] != [image for image, _ in seen[22:]]
    assert len({colour for _, colour in seen}) == 44


def test_mirrors_and_colours_are_drawn_where_they_are_wanted(tmp_path):
    for wanted in (True, False):
        _, draws = training(tmp_path, mirror=wanted, pca_std=0.3 * wanted)._drawn(0)
        assert bool(draws.mirror.any()) == wanted
        assert draws.colour.std().item() == pytest.approx(0.3 * wanted, rel=0.3)


def test_gradients_are_clipped_to_the_norm(tmp_path):
    model = network()
    before = [parameter.clone() for parameter in model.parameters()]
    told = {"momentum": 0.0, "weight_decay": 0.0, "lr": 0.1, "epochs": 1}
    training(tmp_path, model, clip_grad_norm=1e-3, **told).run()
    moved = sum((a - b).square().sum() for a, b in zip(before, model.parameters(), strict=True)).sqrt()
    assert 0 < moved <= 1.01 * 3 * 0.1 * 1e-3  # three steps


def test_how_often_the_loss_is_looked_at_changes_nothing(tmp_path):
    for freq in (1, 2, 5):
        torch.manual_seed(5)
        run = training(tmp_path / str(freq))
        run.print_freq = freq  # as on a GPU
        run.run()
    often, seldom, never = (state(tmp_path / str(freq)) for freq in (1, 2, 5))
    assert equal(often, seldom)
    assert equal(often, never)


def test_no_more_is_read_ahead_than_readers_and_one_batch_need():
    read = []

    class Counted(LabelledImages):
        def read(self, indices):
            read.append(indices)
            return super().read(indices)

    data = patterns()
    loader = Loader(Counted("counted", data.images, data.labels, data.classes), 2, torch.device("cpu"))
    batches = loader.batches(torch.arange(22).split(2))
    assert torch.equal(next(batches), data.images[:2])
    time.sleep(0.2)
    assert len(read) <= 4
    assert torch.equal(torch.cat(list(batches)), data.images[2:])
    assert len(read) == 11


def test_the_seed_decides_and_the_number_of_readers_does_not(tmp_path):
    told = [{"workers": 0}, {"workers": 3}, {"seed": 1}]
    for number, settings in enumerate(told):
        torch.manual_seed(5)
        training(tmp_path / str(number), **settings).run()
    one, same, other = (state(tmp_path / str(number)) for number in range(3))
    assert equal(one, same)
    assert not equal(one["model"], other["model"])


def test_an_epoch_has_each_image_once_in_an_order_and_with_crops_of_its_own(tmp_path):
    run = training(tmp_path)
    (order, draws), (next_order, next_draws) = run._drawn(0), run._drawn(1)
    assert sorted(order.tolist()) == list(range(22)) == sorted(next_order.tolist())
    assert not torch.equal(order, next_order)
    assert not torch.equal(draws.top, next_draws.top)
    assert len(set(zip(draws.top.tolist(), draws.left.tolist(), strict=True))) > 10
    assert equal(tuple(run._drawn(1)), (next_order, next_draws))


# --- what stops a run, and what is warned about -----------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_network(tmp_path):
    with pytest.raises(
        TrainingError, match=r"the loss is (nan|inf) at step 2: use a learning rate below 1e\+30.*last\.pt"
    ):
        training(tmp_path, lr=1e30).run()
    content = checkpoint.read(tmp_path / "last.pt")
    assert all(value.isfinite().all() for value in content["model"].values())


def test_a_parameter_that_is_not_finite_is_not_written(tmp_path):
    run = training(tmp_path)
    with torch.no_grad():
        run.model.classifier[6].bias[0] = math.inf
    with pytest.raises(TrainingError, match="a parameter is not finite at step 0"):
        run.save()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_held_out_loss_that_is_not_finite_stops_the_run(loss, tmp_path, monkeypatch):
    run = training(tmp_path)
    monkeypatch.setattr(run, "judge", lambda: (loss, 0.0, 0.0))
    with pytest.raises(TrainingError, match=rf"the held-out loss is {loss} at step 3: use a learning rate below 0\.02"):
        run.run()
    assert steps_of(tmp_path / "last.pt") == 0
    assert not (tmp_path / "best.pt").exists()


def test_a_loss_that_stays_that_of_guessing_is_warned_about_once(tmp_path, monkeypatch):
    model = network()
    nn.init.zeros_(model.classifier[6].weight)
    nn.init.zeros_(model.classifier[6].bias)
    monkeypatch.setattr("alexnet_triton.recipe.train.loop.FEW_STEPS", 6)
    with pytest.warns(UserWarning, match=r"still ln\(4\) = 1.386, that of guessing.*--init kaiming") as caught:
        training(tmp_path, model, epochs=5, lr=1e-12).run()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training(tmp_path / "learns", network(dropout=0.0), epochs=5, mirror=False, clip_grad_norm=1.0).run()


def test_the_recommended_initialisation_learns_a_few_images_within_thirty_steps():
    """BVLC/caffe#59, #2085 and others: 32 images of noise, and a loss that stayed at ln(4).

    Without dropout, whose noise hides how far the network is; the initialisation of 2012 has not begun by then.
    """
    for seed in range(3):
        torch.manual_seed(seed)
        images, labels = torch.randn(32, 3, 67, 67), torch.arange(32) % 4
        model = AlexNet(4, 0.0, variant="paper", init="kaiming").train()
        optimizer = KrizhevskySGD(model.parameters(), Settings().lr)
        losses = []
        while len(losses) < 5 or (len(losses) < 30 and sum(losses[-5:]) / 5 > 0.9 * math.log(4)):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        assert len(losses) < 30, losses


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ({"lr_scheduler": "plateau"}, [0.02, 0.02, 0.02, 0.02]),
        ({"lr_scheduler": "step", "lr_step_size": 2, "lr_gamma": 0.5}, [0.02, 0.02, 0.01, 0.01]),
        ({"lr_scheduler": "cosine"}, [0.01 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]),
    ],
    ids=["plateau", "step", "cosine"],
)
def test_every_schedule_is_constructed_and_has_its_rates(schedule, rates, tmp_path):
    """`ReduceLROnPlateau(verbose=...)` and its like, which newer versions of torch refuse."""
    run = training(tmp_path, epochs=4, **schedule)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            found.append(run.rule.lr)
            run.rule.end_epoch(1.0)
    assert found == pytest.approx(rates)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr_scheduler": "none"}, "unknown schedule 'none': choose one of plateau, step, cosine"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"lr_step_size": 0}, "lr_step_size must be at least 1, got 0"),
        ({"crop": 0}, "crop must be at least 1, got 0"),
        ({"lr": math.nan}, "lr must be a positive number, got nan"),
        ({"bias_lr": 0.0}, "bias_lr must be a positive number, got 0.0"),
        ({"lr_gamma": -1.0}, "lr_gamma must be a positive number, got -1.0"),
        ({"lr_gamma": 1.0}, "lr_gamma must be below 1, so that the rate falls on a plateau, got 1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
        ({"bias_decay": math.nan}, "bias_decay must be at least 0, got nan"),
        ({"lr_patience": -1}, "lr_patience must be at least 0, got -1"),
        ({"pca_std": math.inf}, "pca_std must be at least 0, got inf"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm must be positive, got 0.0"),
        ({"seed": 2**63}, "seed must be a number of 64 bits, got 9223372036854775808"),
    ],
)
def test_a_setting_out_of_its_range_is_named(setting, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(**setting)


def test_the_rate_falls_three_times_on_a_plateau_and_stays(tmp_path):
    run = training(tmp_path, epochs=90, lr_patience=1, bias_lr=2.0)
    rates = []
    for _ in range(20):
        rates.append(run.rule.lr)
        run.rule.end_epoch(1.0)
    assert sorted({round(math.log10(rate / 0.02), 6) for rate in rates}) == [-3, -2, -1, 0]
    assert rates[-1] == pytest.approx(2e-5)
    assert rates[:3] == [0.02] * 3  # the first epoch, and one more than its patience


def test_mixed_precision_keeps_float32_parameters_beside_those_that_compute(tmp_path):
    model = network()
    model.features.requires_grad_(False)
    first = model.features[0].weight.detach().clone()
    run = training(tmp_path, model, amp=True)
    run.run()
    content = checkpoint.read(tmp_path / "last.pt")
    assert {value.dtype for value in content["model"].values()} == {torch.float32}
    for name, parameter in run.model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(content["model"][name].bfloat16(), parameter)
    assert torch.equal(content["model"]["features.0.weight"], first)  # frozen, and not rounded
    assert not torch.equal(content["model"]["classifier.1.weight"], run.model.classifier[1].weight.float())


def test_a_crop_larger_than_the_images_is_refused(tmp_path):
    small = LabelledImages("small", torch.zeros(4, 3, 70, 70, dtype=torch.uint8), torch.arange(4), tuple("abcd"))
    for told, size in (({}, 75), ({"held_out": small}, 70)):
        with pytest.raises(ValueError, match=f"a crop of {size + 1} pixels a side cannot be cut from images of {size}"):
            training(tmp_path, crop=size + 1, **told)
    assert os.listdir(tmp_path) == []
