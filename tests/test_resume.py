"""A run can stop anywhere, by a signal or killed, and goes on to the last bit; or is refused."""

import json
import os
import signal
import time

import pytest
import small_run
import torch
from small_run import equal, network, patterns, program, resumed, state, steps_of, training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alexnet_triton.recipe.train import checkpoint
from alexnet_triton.recipe.train.checkpoint import CheckpointError
from alexnet_triton.recipe.train.record import Record
from alexnet_triton.recipe.train.settings import Settings
from alexnet_triton.recipe.train.signals import Interrupted, StopSignals

DROPS = {"lr_scheduler": "step", "lr_step_size": 1, "lr_gamma": 0.5}
"""A schedule that lowers the rate after every epoch."""


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


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "mixed"])
def test_frozen_parameters_are_those_of_the_checkpoint_when_the_run_goes_on(amp, tmp_path, monkeypatch):
    def frozen(seed):
        model = network(seed=seed)
        model.features.requires_grad_(False)
        return model

    run = training(tmp_path / "whole", frozen(0), amp=amp)
    torch.manual_seed(5)
    run.run()
    run = stop_at(training(tmp_path / "parts", frozen(0), amp=amp), 4, monkeypatch)
    torch.manual_seed(5)
    with pytest.raises(Interrupted):
        run.run()
    run = training(tmp_path / "parts", frozen(7), amp=amp)
    run.resume(checkpoint.read(tmp_path / "parts" / "last.pt"), "last.pt")
    run.run()
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
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be, in a background process
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = training(tmp_path)

    def twice(*batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(run, "_step", twice)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            run.run()
        after = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert not isinstance(caught.value, Interrupted)
    assert after == before
    assert checkpoint.read(tmp_path / "last.pt")["training"]["step"] == 0


def test_processes_of_torchrun_note_a_second_ctrl_c_too():
    with StopSignals(insist=False) as signals:  # the terminal sends one, and torchrun another
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked == signal.SIGINT


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


def test_the_best_is_of_the_end_of_an_epoch_though_the_run_goes_on_after_it(tmp_path, monkeypatch):
    for run, step in ((training(tmp_path), 5), (None, 1)):
        with pytest.raises(Interrupted):
            stop_at(run or resumed(tmp_path), step, monkeypatch).run()
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


def test_the_bar_of_an_epoch_that_goes_on_begins_where_it_stopped(tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        stop_at(training(tmp_path, epochs=1), 2, monkeypatch).run()
    run, begun = resumed(tmp_path, epochs=1), []
    bar = run._bar
    monkeypatch.setattr(run, "_bar", lambda *about: begun.append(about[2:]) or bar(*about))
    run.run()
    assert begun == [(16,), ()]


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
