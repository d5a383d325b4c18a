"""Processes that share a run: equal to one process of the whole batch, each image counted once."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import small_run
import torch
from small_run import state, training

from alexnet_triton.recipe.train.world import World, world

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def start(folder, processes, **told):
    """Start a run under torchrun."""
    words = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}"]
    words += [small_run.__file__, str(folder), json.dumps(told)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(process, seconds=120):
    """Wait for a run, and end its whole group where it hangs."""
    try:
        _, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return err


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


@pytest.mark.skipif(os.name != "posix", reason="process groups of POSIX")
def test_two_processes_are_one_with_the_double_batch_and_go_on_after_a_signal(tmp_path):
    """22 images in batches of 2 x 4, the last of 6; without dropout, whose masks differ on purpose."""
    told = {"dropout": 0.0, "epochs": 12, "batch_size": 4, "bias_lr": 2.0, "lr": 0.005}
    process = start(tmp_path / "two", 2, **told)
    try:
        last, deadline = tmp_path / "two" / "best.pt", time.monotonic() + 90
        while not last.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGTERM)
        finish(process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    stopped = state(tmp_path / "two")["training"]
    assert 0 < len(stopped["history"]["epochs"]) < 12
    process = start(tmp_path / "two", 2, **told)
    err = finish(process)
    assert process.returncode == 0, err
    two = state(tmp_path / "two")

    del told["dropout"]
    one = training(tmp_path / "one", small_run.network(dropout=0.0), **{**told, "batch_size": 8})
    one.run()
    one = state(tmp_path / "one")
    for (name, a), b in zip(one["model"].items(), two["model"].values(), strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm() + 1e-7, name
    for name in ("loss", "top1", "held_out_loss", "held_out_top1", "held_out_top5"):
        a, b = ([row[name] for row in run["training"]["history"]["epochs"]] for run in (one, two))
        assert a == pytest.approx(b, rel=1e-4), name
    masks = [generator["cpu"] for generator in two["training"]["random"]]
    assert len(masks) == 2
    assert not torch.equal(*masks)  # each process drops units of its own
