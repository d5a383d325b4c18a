"""Processes that share a run: equal to one process of the whole batch, each image counted once."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import small_run
import torch
from small_run import LOOPBACK, program, state, training

from alexnet_triton.parallel.processes.world import World, _backend, world

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes that train together")


def test_shares_hold_each_image_once():
    worlds = [World(torch.device("cpu"), rank, 3) for rank in range(3)]
    for count in (0, 1, 2, 3, 7, 9):
        shares = [here.share(torch.arange(count)) for here in worlds]
        assert torch.cat(shares).tolist() == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_alone_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with world("cpu") as here:
        assert (here.rank, here.size, here.leads) == (0, 1, True)
        assert here.sum(torch.ones(2)).tolist() == [1, 1]
        assert here.gather("a") == ["a"]


@pytest.mark.parametrize(
    "device",
    [
        "gpu",
        "meta",
        pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ],
)
def test_a_device_that_cannot_be_used_is_named_in_one_sentence(device, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RuntimeError, match=f"device '{device}' cannot be used here .*: take another") as caught:
        world(device).__enter__()
    assert "\n" not in str(caught.value)


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' and must be a whole number: start with torchrun, or unset"),
        ({"RANK": None}, "WORLD_SIZE is 2 and RANK is not set: start with torchrun, or unset WORLD_SIZE"),
        ({"MASTER_ADDR": None}, "WORLD_SIZE is 2 and MASTER_ADDR is not set: start with torchrun"),
        ({"MASTER_PORT": None}, "WORLD_SIZE is 2 and MASTER_PORT is not set: start with torchrun"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT is '-1' and must be a whole number"),
        ({"RANK": "2"}, "RANK is 2, and WORLD_SIZE 2: ranks are 0 to 1, one a process"),
    ],
)
def test_an_environment_that_is_not_torchrun_s_is_refused(changed, said, monkeypatch):
    for name, value in {**TORCHRUN, **changed}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=said):
        world("cpu", minutes=0.005).__enter__()


def test_a_number_of_processes_that_makes_no_whole_copies_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RuntimeError, match="2 processes hold one copy of the network, and 3 are here: start a mult"):
        world("cpu", per_replica=2).__enter__()
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(RuntimeError, match="2 processes hold one copy of the network, and 1 is here: .*torchrun"):
        world("cpu", per_replica=2).__enter__()


@pytest.mark.parametrize(("kind", "backend"), [("cuda", "nccl"), ("cpu", "gloo")])
def test_a_pytorch_without_what_processes_talk_by_is_named(kind, backend, monkeypatch):
    monkeypatch.setattr(f"torch.distributed.is_{backend}_available", lambda: False)
    with pytest.raises(RuntimeError, match=f"several processes on {kind} talk by {backend}, which this PyTorch was"):
        _backend(torch.device(kind))


def test_a_pytorch_that_was_built_for_one_process_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.is_available", lambda: False)
    with pytest.raises(RuntimeError, match="this PyTorch was built for one process, and 2 are here"):
        world("cpu").__enter__()


def test_rank_0_that_nobody_serves_for_is_given_up(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for name, value in {**TORCHRUN, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=rf"rank 1 cannot reach rank 0 at 127.0.0.1:{port} in 0.005 minutes \(.*ref"):
        world("cpu", minutes=0.005).__enter__()


@dataclass(frozen=True)
class Part(World):
    """A process of several that are not there."""

    def sum(self, values):
        return values

    def gather(self, value):
        return [(rank, value[1]) for rank in range(self.size)]  # a stream of dropout, and its state


def test_each_image_is_read_by_one_process_alone(tmp_path, monkeypatch):
    """Shares of accuracies would be right as well if each process judged all images."""
    monkeypatch.setattr("alexnet_triton.parallel.replicas.DistributedDataParallel", lambda model, _: model)
    learned, judged = [], []
    for rank in range(3):
        run = training(tmp_path / str(rank), here=Part(torch.device("cpu"), rank, 3), batch_size=3, epochs=1)
        for loader, read in ((run.loader, learned), (run.held_out_loader, judged)):
            batches = loader.batches
            spied = lambda parts, read=read, batches=batches: batches([read.append(p) or p for p in parts])  # noqa: E731
            monkeypatch.setattr(loader, "batches", spied)
        run.run()
    assert sorted(torch.cat(learned).tolist()) == list(range(22))
    assert sorted(torch.cat(judged).tolist()) == list(range(10))


def assert_equal(one, two):
    """Two runs but for rounding, as where other processes add up the gradients."""
    one, two = state(one), state(two)
    for (name, a), b in zip(one["model"].items(), two["model"].values(), strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm() + 1e-7, name
    for name in ("loss", "top1", "held_out_loss", "held_out_top1", "held_out_top5"):
        a, b = ([row[name] for row in run["training"]["history"]["epochs"]] for run in (one, two))
        assert a == pytest.approx(b, rel=1e-4), name


@needs_fork
def test_two_processes_are_one_with_the_double_batch_and_stop_and_go_on_together(tmp_path):
    """22 images in batches of 2 x 4, the last of 6; without dropout, whose masks differ on purpose."""
    told = {"dropout": 0.0, "epochs": 12, "batch_size": 4, "bias_lr": 2.0, "lr": 0.005, "clip_grad_norm": 5.0}
    program([small_run.__file__, "run_and_stop", tmp_path / "two", json.dumps(told), "2"])
    stopped = json.loads((tmp_path / "two" / "stopped.json").read_text())
    assert stopped["codes"] == [130, 130]  # though one alone was asked
    assert "checkpoint-000000003.pt" <= stopped["newest"] < "checkpoint-000000036.pt"
    del told["dropout"]
    training(tmp_path / "one", small_run.network(dropout=0.0), **{**told, "batch_size": 8}).run()
    assert_equal(tmp_path / "one", tmp_path / "two")
    masks = [generator["cpu"] for generator in state(tmp_path / "two")["training"]["random"]]
    assert len(masks) == 2
    assert not torch.equal(*masks)  # each process drops units of its own


@needs_fork
def test_processes_that_have_no_image_of_a_batch_wait_for_those_that_have(tmp_path):
    """Of 4 images three processes have one each, and one is left; 33 are 5 batches of one process, and 4 of another."""
    runs = {
        "three": ({"dropout": 0.0, "epochs": 2, "batch_size": 1, "images": 4}, 3),
        "two": ({"dropout": 0.0, "epochs": 1, "batch_size": 4, "images": 33}, 2),
    }
    program([small_run.__file__, "run_each_together", tmp_path, json.dumps(runs)])
    for name, (told, processes) in runs.items():
        told |= {"batch_size": told["batch_size"] * processes}
        training(tmp_path / "one" / name, small_run.network(told.pop("dropout")), **told).run()
        assert_equal(tmp_path / "one" / name, tmp_path / name)


@pytest.mark.skipif(os.name != "posix", reason="process groups of POSIX")
def test_torchrun_passes_a_signal_on_and_the_run_is_kept(tmp_path):
    words = ["--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", small_run.__file__, "run", tmp_path]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *map(str, words), '{"epochs": 1000, "batch_size": 4}'],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 90
        while not (tmp_path / "best.pt").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    stopped = state(tmp_path)["training"]
    assert stopped["history"]["epochs"]
    assert stopped["step"] > 0  # in the middle of an epoch, and not what was written at the end of one
    assert len(stopped["random"]) == 2
