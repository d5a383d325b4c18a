"""The training loop: what it learns, that it can stop anywhere and go on to the last bit, and when it refuses."""

import csv
import json
import math
import os
import re
import signal
import time
import warnings
from pathlib import Path

import pytest
import small_run
import torch
import torch.nn.functional as F
from small_run import equal, network, patterns, program, resumed, state, steps_of, training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from tqdm import tqdm

from alexnet_triton import AlexNet
from alexnet_triton.recipe.data.sets import LabelledImages
from alexnet_triton.recipe.optim import KrizhevskySGD
from alexnet_triton.recipe.train import checkpoint
from alexnet_triton.recipe.train.checkpoint import CheckpointError, Checkpoints
from alexnet_triton.recipe.train.loop import TrainingError
from alexnet_triton.recipe.train.record import Record
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


def test_an_epochs_loss_is_the_mean_of_its_images_and_not_of_its_batches(tmp_path):
    history = training(tmp_path, epochs=1).run()
    sums = [loss * count for loss, count in zip(history.step_loss, (8, 8, 6), strict=True)]
    assert history.column("loss") == pytest.approx([sum(sums) / 22])


class Slow(LabelledImages):
    """Images that are long in coming."""

    def read(self, indices):
        time.sleep(0.05)
        return super().read(indices)


def test_the_share_of_time_that_is_waited_is_that_of_the_epoch(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(tqdm, "set_postfix", lambda _, **figures: shown.append(figures["waiting"]))
    data = patterns()
    learn = Slow("slow", data.images, data.labels, data.classes)
    history = training(tmp_path, learn=learn, workers=0).run()
    shares = [float(share.rstrip("%")) / 100 for share in shown]
    assert len(shares) == 9
    assert all(0 < share <= 1 for share in (*shares, *history.column("waiting")))


def test_the_bar_of_an_epoch_that_goes_on_begins_where_it_stopped(tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        stop_at(training(tmp_path, epochs=1), 2, monkeypatch).run()
    run, begun = resumed(tmp_path, epochs=1), []
    bar = run._bar
    monkeypatch.setattr(run, "_bar", lambda *about: begun.append(about[2:]) or bar(*about))
    run.run()
    assert begun == [(16,), ()]


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes to kill them")
def test_a_run_that_is_killed_goes_on_to_the_same_bits(tmp_path):
    told = {"epochs": 30, "lr_scheduler": "step", "lr_step_size": 7, "keep": 2}
    program([small_run.__file__, "run_and_kill", tmp_path / "parts", json.dumps(told)])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as in the other process
        run = training(tmp_path / "whole", **told)
        torch.manual_seed(100)
        run.run()
    finally:
        torch.set_num_threads(threads)
    assert len(run.history.epochs) == 30
    assert equal(state(tmp_path / "parts"), state(tmp_path / "whole"))
    for name in ("last.pt", "best.pt", "log.csv"):
        assert (tmp_path / "parts" / name).is_file()
    assert steps_of(tmp_path / "parts" / "best.pt") == steps_of(tmp_path / "whole" / "best.pt")
    assert list((tmp_path / "parts").glob(".*")) == []


@pytest.mark.parametrize("lost", ["last.pt", "best.pt", "log.csv"])
def test_what_a_killed_process_had_not_come_to_is_written_when_the_run_goes_on(lost, tmp_path):
    training(tmp_path, epochs=1).run()
    table = (tmp_path / "log.csv").read_text()
    (tmp_path / lost).unlink()
    resumed(tmp_path, epochs=1).run()
    assert (tmp_path / "log.csv").read_text() == table
    assert steps_of(tmp_path / "last.pt") == steps_of(tmp_path / "best.pt") == 3


def test_the_best_is_left_alone_by_a_run_that_goes_on_after_a_worse_epoch(tmp_path, monkeypatch):
    run = training(tmp_path, epochs=2)
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(run, "judge", lambda: (next(losses), 0.5, 1.0))
    run.run()
    resumed(tmp_path, epochs=2).run()
    assert steps_of(tmp_path / "best.pt") == 3
    assert steps_of(tmp_path / "last.pt") == 6


def test_a_run_that_was_stopped_goes_on_in_the_same_process(tmp_path, monkeypatch):
    run = stop_at(training(tmp_path), 2, monkeypatch)
    with pytest.raises(Interrupted):
        run.run()
    assert len(run.run().step_loss) == 9


def test_tensorboard_shows_each_step_and_epoch_of_a_run_that_went_on_once(tmp_path):
    training(tmp_path, epochs=1).run()
    ahead = Record(tmp_path, 3)
    ahead.step(4, 99.0, 0.1)  # by a process that was killed before it wrote a checkpoint
    ahead.close()
    history = resumed(tmp_path, epochs=2).run()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss/step")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("loss/step")] == pytest.approx(history.step_loss)
    assert [event.step for event in events.Scalars("epoch/loss")] == [3, 6]


# --- what stops a run, and what is warned about -----------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_network(tmp_path):
    with pytest.raises(TrainingError, match=r"at step \d+: use a learning rate below 1e\+30.*last\.pt"):
        training(tmp_path, lr=1e30).run()
    content = checkpoint.read(tmp_path / "last.pt")
    assert all(value.isfinite().all() for value in content["model"].values())


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_held_out_loss_that_is_not_finite_stops_the_run(loss, tmp_path, monkeypatch):
    run = training(tmp_path)
    monkeypatch.setattr(run, "judge", lambda: (loss, 0.0, 0.0))
    with pytest.raises(TrainingError, match=rf"the held-out loss is {loss} at step 3: use a learning rate below 0\.02"):
        run.run()
    assert steps_of(tmp_path / "last.pt") == 0


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
    with pytest.raises(ValueError, match="76"):
        training(tmp_path, crop=76)
    assert os.listdir(tmp_path) == []


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    run = training(tmp_path, epochs=5, keep=2)
    history = run.run()
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert names == ["best.pt", "checkpoint-000000012.pt", "checkpoint-000000015.pt", "last.pt"]
    assert steps_of(tmp_path / "last.pt") == 15
    losses = history.column("held_out_loss")
    assert steps_of(tmp_path / "best.pt") == 3 * (1 + losses.index(min(losses)))


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
        ({"learn": patterns(seed=5)}, "the colours that the input is normalised by were others"),
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


def of_half_a_state(path):
    torch.save({"model": {}, "training": {"step": 1}}, path)


def of_numbers(path):
    torch.save([1, 2], path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "no checkpoint, or is damaged"),
        (emptied, "no checkpoint, or is damaged"),
        (evil, r"no checkpoint, or is damaged \(it holds something else than tensors and plain types\): remove it"),
        (of_a_network_alone, "no state of its training: --init-from"),
        (of_half_a_state, "no state of its training: --init-from"),
        (of_numbers, "no state of its training: --init-from"),
        (Path.unlink, "there is no checkpoint"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named_in_one_sentence(damage, message, tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.write(path, {"training": dict.fromkeys(checkpoint.STATE, 0), "model": torch.zeros(4000)})
    checkpoint.read(path)
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.read(path)
    assert "c.pt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path):
    content = {"training": dict.fromkeys(checkpoint.STATE, 1)}
    checkpoint.write(tmp_path / "c.pt", content)
    with pytest.raises(Exception, match="pickle"):
        checkpoint.write(tmp_path / "c.pt", {"training": (x for x in ())})
    assert checkpoint.read(tmp_path / "c.pt") == content
    assert os.listdir(tmp_path) == ["c.pt"]


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_a_disk_that_is_full_is_named_and_leaves_the_old_checkpoint(tmp_path):
    import resource

    content = {"training": dict.fromkeys(checkpoint.STATE, 1)}
    checkpoint.write(tmp_path / "c.pt", content)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"c\.pt' could not be written \(File too large\): make room") as caught:
            checkpoint.write(tmp_path / "c.pt", {"weight": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert checkpoint.read(tmp_path / "c.pt") == content
    assert os.listdir(tmp_path) == ["c.pt"]


def test_what_a_killed_writer_left_is_cleared(tmp_path):
    (tmp_path / ".checkpoint-1.pt.abc.writing").touch()
    (tmp_path / "mine.txt").touch()
    Checkpoints(tmp_path).clear_temporary()
    assert os.listdir(tmp_path) == ["mine.txt"]
