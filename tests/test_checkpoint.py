"""Checkpoints: which are kept, how they are written and read, and what is said of those that cannot be."""

import os
from pathlib import Path

import pytest
import torch
from small_run import steps_of, training

from alexnet_triton.recipe.train import checkpoint
from alexnet_triton.recipe.train.checkpoint import CheckpointError, Checkpoints


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    run = training(tmp_path, epochs=5, keep=2)
    history = run.run()
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert names == ["best.pt", "checkpoint-000000012.pt", "checkpoint-000000015.pt", "last.pt"]
    assert steps_of(tmp_path / "last.pt") == 15
    losses = history.column("held_out_loss")
    assert steps_of(tmp_path / "best.pt") == 3 * (1 + losses.index(min(losses)))


def test_names_are_copies_where_there_are_no_links(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refused)
    training(tmp_path, epochs=1).run()
    for name in ("last.pt", "best.pt"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "checkpoint-000000003.pt").read_bytes()


def test_a_checkpoint_may_be_read_by_whom_the_system_lets(tmp_path):
    (tmp_path / "file").touch()
    checkpoint.write(tmp_path / "c.pt", {})
    assert (tmp_path / "c.pt").stat().st_mode == (tmp_path / "file").stat().st_mode


def test_checkpoints_load_without_running_code(tmp_path):
    training(tmp_path, epochs=1).run()
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    assert content["classes"] == list("abcd")
    assert (content["variant"], content["size"], content["crop"]) == ("torchvision", 75, 67)


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
