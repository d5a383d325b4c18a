"""The training loop: what it learns, that it can stop anywhere and go on to the last bit, and when it refuses."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import small_run
import torch
import torch.nn.functional as F
from small_run import equal, network, patterns, resumed, state, training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from alexnet_triton import AlexNet
from alexnet_triton.recipe.optim import KrizhevskySGD
from alexnet_triton.recipe.train import checkpoint
from alexnet_triton.recipe.train.checkpoint import CheckpointError, Checkpoints
from alexnet_triton.recipe.train.loop import TrainingError
from alexnet_triton.recipe.train.settings import COLUMNS, Settings
from alexnet_triton.recipe.train.signals import Interrupted

DROPS = {"lr_scheduler": "step", "lr_step_size": 1, "lr_gamma": 0.5}
"""A schedule that lowers the rate after every epoch."""


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


# --- stopping and going on --------------------------------------------------------------------------------------------


def stop_at(run, step, monkeypatch, number=signal.SIGINT):
    """Send a signal while step `step` of the run is under way."""
    taken, take = [], run._step

    def counted(*batch):
        taken.append(1)
        if len(taken) == step:
            os.kill(os.getpid(), number)
        return take(*batch)

    monkeypatch.setattr(run, "_step", counted)
    return run


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "mixed"])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_stopped_run_goes_on_to_the_same_bits(step, amp, tmp_path, monkeypatch):
    told = {"amp": amp, "bias_lr": 2.0, "bias_decay": 0.0, **DROPS}
    torch.manual_seed(5)
    whole = training(tmp_path / "whole", **told)
    whole.run()
    torch.manual_seed(5)
    run = stop_at(training(tmp_path / "parts", **told), step, monkeypatch)
    with pytest.raises(Interrupted, match=r"last\.pt, and --resume goes on"):
        run.run()
    assert len(run.history.step_loss) == step
    torch.manual_seed(99)  # dropout's stream comes from the checkpoint
    resumed(tmp_path / "parts", **told).run()
    assert equal(state(tmp_path / "parts"), state(tmp_path / "whole"))


def test_a_plateau_is_remembered_across_a_stop(tmp_path, monkeypatch):
    told = {"epochs": 6, "lr": 1e-10, "lr_patience": 0, "weight_decay": 0.0}
    whole = training(tmp_path / "whole", **told)
    rates = whole.run().column("lr")
    assert rates[-1] < rates[0]
    run = stop_at(training(tmp_path / "parts", **told), 10, monkeypatch)
    with pytest.raises(Interrupted):
        run.run()
    assert resumed(tmp_path / "parts", **told).run().column("lr") == rates


def test_a_stop_while_images_are_judged_judges_them_when_it_goes_on(tmp_path, monkeypatch):
    torch.manual_seed(5)
    training(tmp_path / "whole").run()
    torch.manual_seed(5)
    run = training(tmp_path / "parts")
    judge = run.judge

    def interrupted():
        os.kill(os.getpid(), signal.SIGTERM)
        return judge()

    monkeypatch.setattr(run, "judge", interrupted)
    with pytest.raises(Interrupted) as caught:
        run.run()
    assert caught.value.signal == signal.SIGTERM
    assert len(run.history.epochs) == 0
    resumed(tmp_path / "parts").run()
    assert equal(state(tmp_path / "parts"), state(tmp_path / "whole"))


def test_signals_are_put_back_and_a_second_ctrl_c_does_not_wait(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = training(tmp_path)

    def twice(*batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(run, "_step", twice)
    with pytest.raises(KeyboardInterrupt) as caught:
        run.run()
    assert not isinstance(caught.value, Interrupted)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert checkpoint.read(tmp_path / "last.pt")["training"]["step"] == 0


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_a_run_that_is_killed_goes_on_to_the_same_bits(tmp_path):
    told = '{"epochs": 20, "lr_scheduler": "step", "lr_step_size": 7, "keep": 2}'

    def start(folder):
        return subprocess.Popen(
            [sys.executable, small_run.__file__, str(folder), told], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    whole = start(tmp_path / "whole")
    moments = torch.Generator().manual_seed(3)
    for _ in range(2):
        process = start(tmp_path / "parts")
        begun = len(list((tmp_path / "parts").glob("checkpoint*"))) if (tmp_path / "parts").exists() else 0
        last = tmp_path / "parts" / "last.pt"
        seen, deadline = last.stat().st_mtime_ns if begun else 0, time.monotonic() + 60
        while (not last.exists() or last.stat().st_mtime_ns == seen) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(torch.rand(1, generator=moments).item())
        assert process.poll() is None, process.stderr.read()
        process.kill()
        process.wait()
    assert start(tmp_path / "parts").wait(120) == 0
    assert whole.wait(120) == 0
    assert len(state(tmp_path / "whole")["training"]["history"]["epochs"]) == 20
    assert equal(state(tmp_path / "parts"), state(tmp_path / "whole"))
    assert sorted(path.name for path in (tmp_path / "parts").glob(".*")) == []


# --- what stops a run, and what is warned about -----------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_network(tmp_path):
    with pytest.raises(TrainingError, match=r"at step \d+: use a learning rate below 1e\+30.*last\.pt"):
        training(tmp_path, lr=1e30).run()
    content = checkpoint.read(tmp_path / "last.pt")
    assert all(value.isfinite().all() for value in content["model"].values())


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


def test_the_recommended_initialisation_learns_a_few_images_within_a_hundred_steps():
    """BVLC/caffe#59, #2085 and others: 32 images of noise, and a loss that stayed at ln(4)."""
    for seed in range(3):
        torch.manual_seed(seed)
        images, labels = torch.randn(32, 3, 67, 67), torch.arange(32) % 4
        model = AlexNet(4, variant="paper", init="kaiming").train()
        optimizer = KrizhevskySGD(model.parameters(), Settings().lr)
        losses = []
        while (len(losses) < 100 and sum(losses[-5:]) / 5 > 0.9 * math.log(4)) or len(losses) < 5:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        assert len(losses) < 100, losses


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
    with pytest.raises(ValueError, match="76"):
        training(tmp_path, crop=76)
    assert os.listdir(tmp_path) == []


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    run = training(tmp_path, epochs=5, keep=2)
    history = run.run()
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert names == ["best.pt", "checkpoint-000000012.pt", "checkpoint-000000015.pt", "last.pt"]
    assert checkpoint.steps(checkpoint.read(tmp_path / "last.pt")) == 15
    losses = history.column("held_out_loss")
    assert checkpoint.steps(checkpoint.read(tmp_path / "best.pt")) == 3 * (1 + losses.index(min(losses)))


def test_checkpoints_load_without_running_code(tmp_path):
    training(tmp_path, epochs=1).run()
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    assert content["classes"] == list("abcd")
    assert (content["variant"], content["size"], content["crop"]) == ("torchvision", 75, 67)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 0.01}, "lr was 0.02 and is 0.01"),
        ({"batch_size": 4}, "batch_size was 8 and is 4"),
        ({"amp": True}, "amp was False and is True"),
        ({"seed": 3}, "seed was 0 and is 3"),
        ({"lr_scheduler": "cosine"}, "lr_scheduler was plateau and is cosine"),
        ({"learn": patterns(14)}, "images to learn from was 22 and is 14"),
    ],
)
def test_a_run_that_was_told_otherwise_is_not_resumed(changed, message, tmp_path):
    training(tmp_path, epochs=1).run()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=f"told otherwise \\({message}\\)"):
        resumed(tmp_path, **{"epochs": 1, **changed})
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_more_epochs_may_be_asked_of_a_run_that_goes_on(tmp_path):
    torch.manual_seed(5)
    training(tmp_path / "long", epochs=4).run()
    torch.manual_seed(5)
    training(tmp_path / "short", epochs=2).run()
    resumed(tmp_path / "short", epochs=4).run()
    assert equal(state(tmp_path / "short")["model"], state(tmp_path / "long")["model"])
    assert Settings(lr_scheduler="cosine").changed({**vars(Settings(lr_scheduler="cosine")), "epochs": 5})


def truncated(path):
    path.write_bytes(path.read_bytes()[:-3000])


def emptied(path):
    path.write_bytes(b"")


def evil(path):
    torch.save({"training": {}, "model": Path("/")}, path)  # a class that no checkpoint needs


def of_a_network_alone(path):
    torch.save({"model": {}}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "no checkpoint, or is damaged"),
        (emptied, "no checkpoint, or is damaged"),
        (evil, "no checkpoint, or is damaged"),
        (of_a_network_alone, "no state of its training: --init-from"),
        (Path.unlink, "there is no checkpoint"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named_in_one_sentence(damage, message, tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.write(path, {"training": {}, "model": {"weight": torch.zeros(4000)}})
    checkpoint.read(path)
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.read(path)
    assert "c.pt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path):
    checkpoint.write(tmp_path / "c.pt", {"training": 1})
    with pytest.raises(Exception, match="pickle"):
        checkpoint.write(tmp_path / "c.pt", {"training": (x for x in ())})
    assert checkpoint.read(tmp_path / "c.pt") == {"training": 1}
    assert os.listdir(tmp_path) == ["c.pt"]


def test_what_a_killed_writer_left_is_cleared(tmp_path):
    (tmp_path / ".checkpoint-1.pt.abc.writing").touch()
    (tmp_path / "mine.txt").touch()
    Checkpoints(tmp_path).clear_temporary()
    assert os.listdir(tmp_path) == ["mine.txt"]
