"""Training in every layout of processes: a run's numbers do not depend on how the processes hold the network."""

import json
import os
from dataclasses import replace

import groups
import narrow
import pytest
import small_run
import torch
from small_run import program, state, training

from alexnet_triton.parallel.layout import Layout
from alexnet_triton.parallel.processes.world import World
from alexnet_triton.parallel.shared import HybridEngine, TowersEngine

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes that train together")
PIPELINE = {"pipeline": 2, "microbatches": 3}
TOLD = {"epochs": 2, "lr": 0.01, "clip_grad_norm": 2.0, "bias_lr": 2.0}


def of_one_process(folder, told, streams=1):
    """A run of one process, which draws as the first of those that share it."""
    told = dict(told)
    model = small_run.network(told.pop("dropout", 0.5), variant=told.pop("variant", "torchvision"))
    run = training(folder, model, **told)
    torch.manual_seed(100)
    run.run()
    return state(folder)


def assert_equal_but_for_rounding(one, two):
    for part in ("model", "velocities"):
        ours, theirs = (run[part] if part == "model" else run["training"][part] for run in (one, two))
        assert list(ours) == list(theirs)
        for name, a in ours.items():
            assert (a - theirs[name]).norm() <= 1e-5 * a.norm() + 1e-8, (part, name)
    ours, theirs = one["training"], two["training"]
    assert ours["history"]["step_loss"] == pytest.approx(theirs["history"]["step_loss"], rel=1e-5)
    for a, b in zip(ours["history"]["epochs"], theirs["history"]["epochs"], strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    for a, b in zip(ours["random"], theirs["random"], strict=True):
        assert torch.equal(a["cpu"], b["cpu"])


@needs_fork
def test_a_run_is_that_of_one_process_however_the_network_is_shared(tmp_path):
    """22 images in batches of 8, the last of 6, dropout included."""
    runs = {
        "pipeline": ({**TOLD, "layout": PIPELINE}, 2),
        "gpipe": ({**TOLD, "layout": {**PIPELINE, "schedule": "gpipe", "cut": ["conv3"]}}, 2),
        "zero bubble": ({**TOLD, "layout": {**PIPELINE, "schedule": "zero-bubble"}}, 2),
        "towers": ({**TOLD, "variant": "paper", "layout": {"towers": True}}, 2),
        "hybrid": ({**TOLD, "batch_size": 4, "layout": {"hybrid": True}}, 2),
    }
    program([small_run.__file__, "run_each_together", tmp_path, json.dumps(runs)])
    alone = of_one_process(tmp_path / "one", TOLD)
    for name, (told, _) in runs.items():
        expected = of_one_process(tmp_path / "paper", {**TOLD, "variant": "paper"}) if "variant" in told else alone
        assert_equal_but_for_rounding(expected, state(tmp_path / name))


@needs_fork
def test_two_copies_are_two_copies_however_each_is_shared(tmp_path):
    """Each drops units of its own, and has its own 4 of a batch's 8 images."""
    told = {**TOLD, "epochs": 1, "batch_size": 4}
    paper = {**told, "variant": "paper"}
    runs = {
        "whole": (told, 2),
        "pipelines": ({**told, "layout": PIPELINE}, 4),
        "paper": (paper, 2),
        "towers": ({**paper, "layout": {"towers": True}}, 4),
    }
    program([small_run.__file__, "run_each_together", tmp_path, json.dumps(runs)])
    whole, pipelines, paper, towers = (state(tmp_path / name) for name in runs)
    assert len(whole["training"]["random"]) == 2
    assert not torch.equal(*(stream["cpu"] for stream in whole["training"]["random"]))
    assert_equal_but_for_rounding(whole, pipelines)
    assert_equal_but_for_rounding(paper, towers)


@needs_fork
def test_a_run_goes_on_in_another_layout(tmp_path):
    """One epoch in one process, the second in a pipeline, the third in one process again."""
    told = {**TOLD, "epochs": 3}
    expected = of_one_process(tmp_path / "one", told)
    of_one_process(tmp_path / "changing", {**told, "epochs": 1})
    for epochs, layout, processes in [(2, PIPELINE, 2), (3, {}, 1)]:
        words = [small_run.__file__, "run_together", tmp_path / "changing"]
        program([*words, json.dumps({**told, "epochs": epochs, "layout": layout}), str(processes)])
    assert_equal_but_for_rounding(expected, state(tmp_path / "changing"))


@needs_fork
def test_mixed_precision_is_that_of_one_process_to_bfloat16s_rounding(tmp_path):
    told = {**TOLD, "epochs": 1, "amp": True}
    paper = {**told, "variant": "paper"}
    runs = {
        "pipeline": ({**told, "layout": PIPELINE}, 2),
        "towers": ({**paper, "layout": {"towers": True}}, 2),
        "hybrid": ({**told, "batch_size": 4, "layout": {"hybrid": True}}, 2),
    }
    program([small_run.__file__, "run_each_together", tmp_path, json.dumps(runs)])
    alone, in_towers = (of_one_process(tmp_path / name, one) for name, one in (("one", told), ("paper", paper)))
    for name in runs:
        expected, found = in_towers if name == "towers" else alone, state(tmp_path / name)
        ours, theirs = (run["training"]["history"]["step_loss"] for run in (found, expected))
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
        assert ours == pytest.approx(theirs, rel=0.02)
        for key, value in expected["model"].items():
            assert value.dtype == found["model"][key].dtype == torch.float32
            assert (value - found["model"][key]).norm() < 0.1 * value.norm(), (name, key)


@needs_fork
def test_a_step_of_a_real_run_is_drawn(tmp_path):
    told = {**TOLD, "epochs": 1, "layout": PIPELINE, "trace": str(tmp_path / "step.svg")}
    program([small_run.__file__, "run_together", tmp_path / "run", json.dumps(told), "2"])
    drawn = (tmp_path / "step.svg").read_text()
    for words in (
        "AlexNet (torchvision), 8 images in microbatches of 3, 2 stages, 1f1b",
        "stage 1",
        "One step of a real run",
    ):
        assert words in drawn


def test_layouts_that_contradict_themselves_are_refused():
    for told, message in [
        ({"towers": True, "hybrid": True}, "--towers and --hybrid are different ways"),
        ({"pipeline": 0}, "at least 1 stage and 1 microbatch, got 0 and 8"),
        ({"cut": ("conv3",)}, "add --pipeline STAGES"),
    ]:
        with pytest.raises(ValueError, match=message):
            Layout(**told)


def steps_added_up(rank, size):
    """By engine: the error of the gradients after two steps against twice those of one."""
    found = {}
    world = World(torch.device("cpu"), rank, size, 2)
    for name, engine, share in [
        ("towers", TowersEngine(narrow.network("paper", dropout=0.0), world), slice(None)),
        (
            "hybrid",
            HybridEngine(narrow.network(dropout=0.0), replace(world, per_replica=1)),
            slice(2 * rank, 2 * rank + 2),
        ),
    ]:
        images, labels = (part[share] for part in narrow.batch(4))
        engine.step(images, labels, 4)
        once = {key: 2 * gradient for key, gradient in narrow.gradients(engine.module).items()}
        engine.step(images, labels, 4)
        found[name] = narrow.worst(narrow.gradients(engine.module), once)
    return found


def test_a_steps_gradients_are_added_to_those_before():
    for errors in groups.run(steps_added_up, 2):
        assert max(errors.values()) < 1e-6, errors
