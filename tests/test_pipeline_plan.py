"""The plan of a pipeline, its picture, and the command."""

import json
import re
from pathlib import Path

import pytest
import torch
from plan_cases import ROOFS, Given, costs, on_meta

from alexnet_triton.bench.checks import FULL
from alexnet_triton.bench.checks import layers as bench_layers
from alexnet_triton.cli import main
from alexnet_triton.cli import pipeline as cli
from alexnet_triton.parallel.links import LINKS
from alexnet_triton.parallel.pipeline.costs import candidates
from alexnet_triton.parallel.pipeline.picture import draw
from alexnet_triton.parallel.pipeline.plan import draw_plan, format_plan, make_plan
from alexnet_triton.parallel.pipeline.schedules import SCHEDULES
from alexnet_triton.parallel.pipeline.simulation import simulate
from alexnet_triton.parallel.pipeline.work import Table
from alexnet_triton.variants import VARIANTS

# --- the plan ---------------------------------------------------------------------------------------------------------


def plan_of(variant="paper", batch=128, stages=2, microbatches=8, schedule="1f1b", times=ROOFS, **more):
    side = VARIANTS[variant].image_size
    told = {"link": LINKS["nvlink4"], "roofs": ROOFS, "source": "roofs", "dtype": torch.bfloat16, **more}
    shape = (batch, 3, side, side)
    return make_plan(
        on_meta(variant), shape, stages=stages, microbatches=microbatches, schedule=schedule, times=times, **told
    )


def test_a_plan_has_every_cut_and_one_device_beside_it():
    plan = plan_of("merged", 100, microbatches=8)
    assert [one.at[0] for one in plan.single_cuts] == list(candidates(costs("merged")))
    assert plan.chosen.images == 100
    assert plan.chosen.parts[0].layers[0].works["forward"].images == 13  # the last microbatch is filled up
    assert plan.chosen.images_per_second == pytest.approx(100 / plan.chosen.step)
    assert plan.whole.layers[0].works["forward"].images == 100
    work = sum(sum(layer.seconds.values()) + layer.update for layer in plan.whole.layers)
    assert plan.alone == pytest.approx(work)
    chosen = next(one for one in plan.single_cuts if one.at == plan.chosen.at)
    assert chosen.step == plan.chosen.step
    assert plan.memory_alone == sum(layer.state + layer.kept for layer in plan.whole.layers)


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"variant": "torchvision", "batch": 1024, "stages": 3, "schedule": "zero-bubble", "microbatches": 9},
        {"variant": "merged", "at": ["features.6", "avgpool", "classifier.3"], "stages": 4, "schedule": "gpipe"},
        {"batch": 1, "stages": 1, "microbatches": 1, "schedule": "gpipe"},
        {"batch": 3, "stages": 2, "microbatches": 1, "schedule": "gpipe", "times": Given(), "apart": False},
        {"variant": "caffe", "batch": 65536, "stages": 4, "microbatches": 128, "memory_limit": 300e9},
    ],
)
def test_the_text_fits_80_columns_and_names_every_figure(case):
    plan = plan_of(**case)
    text = format_plan(plan)
    assert max(map(len, text.splitlines())) <= 80
    assert not any(line != line.rstrip() for line in text.splitlines())
    flat = " ".join(text.split())
    assert f"Bubble {plan.chosen.timeline.bubble:.1%}" in flat
    assert f"{plan.chosen.images_per_second:,.0f} images/s" in flat or plan.chosen.images_per_second < 100
    assert ("all measured" in flat) == isinstance(case.get("times"), Given)
    assert ("all estimated" in flat) == ("times" not in case)
    assert ("as asked" in flat) == ("at" in case)
    assert ("no weight gradient is left" in flat) == (plan.chosen.schedule == "zero-bubble" and not plan.whole.apart)
    for number, part in enumerate(plan.chosen.parts):
        assert re.search(rf"^{number} {part.layers[0].name}.* {part.parameters:,} ", text, re.M)
    for one in plan.single_cuts:
        mark = r"\*" if one.at[0] in plan.chosen.at else " "
        assert re.search(rf"^{mark} {one.at[0]} ", text, re.M)


def test_a_plan_says_what_was_measured():
    table = Table({("conv1", "forward", 16): 1.0, ("conv2", "forward", 8): 1.0}, ROOFS)
    plan = plan_of(times=table)
    assert plan.provenance == "Times of layers: 1 measured, 1 carried over, 29 estimated; roofs"


def test_a_plan_that_cannot_be_is_refused_in_words():
    with pytest.raises(ValueError, match="a batch of 4 images cannot be cut into 8 microbatches: take 4 at most"):
        plan_of(batch=4)
    with pytest.raises(ValueError, match="1 cuts make 2 stages, got 3"):
        plan_of(stages=3, at=["features.6"])


# --- the picture ------------------------------------------------------------------------------------------------------


def a_timeline(schedule="1f1b", stages=2, microbatches=8):
    return simulate(schedule, stages, microbatches, lambda a: {"F": 1e-3, "B": 2e-3}.get(a.kind, 1e-3))


def test_the_picture_has_a_row_a_stage_its_blocks_and_its_bubble(tmp_path):
    path = tmp_path / "new" / "p.svg"
    assert draw(a_timeline(), path, "A $title$", images_per_second=1234.5, rows=["one", "two"], note="A note.") == path
    text = path.read_text()
    for word in (
        "A $title$",
        "bubble 11.1%, 1,234 images/s; 27.0 ms from",
        "one",
        "two",
        "11% idle",
        "time (ms)",
        "A note.",
    ):
        assert word in text, word
    assert {"forward", "backward", "idle"} <= set(re.findall(r">(\w+)</text>", text))
    assert "input gradient" not in text
    assert all(len(re.findall(rf">{number}</text>", text)) >= 4 for number in range(8))  # F and B on both stages
    again = tmp_path / "again.svg"
    draw(a_timeline(), again, "A $title$", images_per_second=1234.5, rows=["one", "two"], note="A note.")
    assert again.read_bytes() == path.read_bytes()
    assert not list(tmp_path.glob("**/.*"))


def test_a_backward_pass_in_one_piece_is_drawn_as_one(tmp_path):
    for apart, words in ((True, {"backward", "input gradient", "weight gradient"}), (False, {"backward"})):
        path = draw_plan(plan_of(schedule="zero-bubble", apart=apart), tmp_path / "p.svg")
        kinds = {"backward", "input gradient", "weight gradient"}
        assert kinds & set(re.findall(r">([\w ]+)</text>", path.read_text())) == words


def test_blocks_too_thin_for_their_number_have_none(tmp_path):
    draw(a_timeline("zero-bubble", 4, 64), tmp_path / "p.svg", "many")
    text = (tmp_path / "p.svg").read_text()
    assert ">33</text>" not in text
    assert {"input gradient", "weight gradient"} <= set(re.findall(r">([\w ]+)</text>", text))


def test_a_picture_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "p.png"
    draw(a_timeline(), path, "old")
    old = path.read_bytes()

    def fail(self, name, **more):
        Path(name).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw(a_timeline(), path, "new")
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a picture's name must end in .png, .svg, .pdf, got '.*p.jpg'"):
        draw(a_timeline(), tmp_path / "p.jpg", "")
    with pytest.raises(ValueError, match="no block that takes time"):
        draw(simulate("gpipe", 2, 2, lambda action: 0.0), tmp_path / "p.png", "")


# --- the command ------------------------------------------------------------------------------------------------------


def run(tmp_path, *words):
    return main(["pipeline", "plan", "--out", str(tmp_path / "p.svg"), *words])


def test_the_command_prints_the_plan_and_draws_it(tmp_path, capsys):
    assert run(tmp_path, "--variant", "torchvision", "--batch", "1024") == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "AlexNet (torchvision), bfloat16, 1,024 images of 224x224 in 8 microbatches, 2\nstages, 1f1b;"
    )
    assert "all estimated; roofs of an H100, 790 TFLOP/s, 3000 GB/s." in out
    assert out.endswith(f"written to {tmp_path / 'p.svg'}\n")
    assert "stage 1" in (tmp_path / "p.svg").read_text()
    expected = plan_of("torchvision", 1024, source="roofs of an H100, 790 TFLOP/s, 3000 GB/s", apart=False, card="H100")
    assert out.startswith(format_plan(expected))


def test_the_command_takes_cuts_by_either_name(tmp_path, capsys):
    assert run(tmp_path, "--at", "conv3", "classifier.3", "--num-classes", "10", "--image-size", "99") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Cut before features.6 (conv3), classifier.3 (fc7), as asked." in out
    assert "images of 99x99" in out
    assert "3 stages" in out
    assert " 16,822,282 " in out  # fc7 and fc8 of ten classes


def results_file(
    tmp_path, benchmark="layers", device="NVIDIA H100 80GB HBM3", variant="paper", dtype="bfloat16", **row
):
    """Every layer of a variant at batch 16, a millisecond each, but for what is told."""
    rows = [
        {
            "variant": variant, "layer": name, "direction": direction, "dtype": dtype, "batch": 16, "flop": 1,
            "bytes": 1, "floor": 1e-9, "estimate": 1e-3,
            "times": {"alexnet_triton": {"median": 1e-3, "p20": 1e-3, "p80": 1e-3}}, **row,
        }
        for name, _ in bench_layers(variant, 16, FULL)
        for direction in ("forward", "data gradient", "weight gradient")
        if not (name.startswith("pool") and direction == "weight gradient")
    ]  # fmt: skip
    content = {
        "benchmark": benchmark, "machine": {"device": device}, "measured": benchmark == "layers",
        "roofs": {"tflops": {"bfloat16": 700, "float32": 60}, "copy_gbs": 3000}, "rows": rows,
    }  # fmt: skip
    path = tmp_path / f"{benchmark}.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_measured_times_of_a_variant_are_used(tmp_path, capsys):
    path = results_file(tmp_path)
    assert run(tmp_path, "--variant", "paper", "--results", path, "--card", "h100") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "29 measured, 2 estimated; layers.json, on NVIDIA H100 80GB HBM3, batch 16." in out
    )  # avgpool is in no benchmark
    assert "One NVIDIA H100 80GB HBM3 alone" in out
    assert "29 carried over, 2 estimated" in out  # the whole batch of 128
    stage = re.search(r"0 conv1 to \w+ [\d,]+ +([\d.]+) ", out)
    assert float(stage[1]) == pytest.approx(round(float(stage[1])), abs=0.01)  # a millisecond a layer


def test_a_layer_that_two_variants_share_counts_for_both(tmp_path, capsys):
    path = results_file(tmp_path, variant="torchvision")
    assert run(tmp_path, "--variant", "merged", "--results", path) == 0
    own, other = (dict(bench_layers(variant, 16, FULL)) for variant in ("merged", "torchvision"))
    shared = [2 if name.startswith("pool") else 3 for name, layer in other.items() if own[name] == layer]
    assert 0 < len(shared) < 11
    assert f": {sum(shared)} measured" in " ".join(capsys.readouterr().out.split())


def test_measured_times_are_not_those_of_other_sizes(tmp_path, capsys):
    path = results_file(tmp_path)
    assert run(tmp_path, "--variant", "paper", "--results", path, "--num-classes", "5", "--image-size", "195") == 0
    assert ": 6 measured, 25 estimated;" in " ".join(capsys.readouterr().out.split())  # fc6 and fc7


def test_a_models_estimate_is_called_one(tmp_path, capsys):
    path = results_file(tmp_path, "predict", "NVIDIA H100")
    assert run(tmp_path, "--variant", "paper", "--results", path) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "all estimated; predict.json, a model's estimate for NVIDIA H100, batch 16." in out


def test_the_results_of_this_repository_can_be_planned_with(tmp_path, capsys):
    path = Path(cli.__file__).parents[2] / "bench" / "results" / "layers.json"
    content = json.loads(path.read_text())
    row = content["rows"][0]
    words = ["--variant", row["variant"], "--dtype", row["dtype"], "--batch", str(2 * row["batch"])]
    assert run(tmp_path, *words, "--microbatches", "2", "--results", str(path), "--link", "loopback") == 0
    assert " measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--card", "b200"], "unknown card 'b200': choose one of h100, h200, a100"),
        (
            ["--at", "features.7"],
            "no stage can begin at 'features.7' without tearing an op apart: choose of features.2",
        ),
        (["--at", "conv9"], "no stage can begin at 'conv9'"),
        (["--at", "conv3", "--stages", "3"], "1 cuts make 2 stages, got 3"),
        (["--microbatches", "200"], "a batch of 128 images cannot be cut into 200 microbatches"),
        (["--microbatches", "1"], "1f1b needs at least as many microbatches as stages, got 1 for 2 stages"),
        (["--microbatches", "7", "--schedule", "zero-bubble"], "zero-bubble runs 7 microbatches on 2 stages"),
        (["--stages", "40", "--microbatches", "64"], "can be planned in 1 to 12 stages, got 40"),
        (["--memory", "0.1"], "no cut into 2 stages keeps within 100,000,000 bytes a device"),
        (["--image-size", "20"], "needs images of at least"),
        (["--out", "plan.jpg"], "a picture's name must end in .png, .svg, .pdf, got 'plan.jpg'"),
        (["--results", "missing.json"], "missing.json cannot be read"),
    ],
)
def test_wrong_words_are_one_sentence(words, why, tmp_path, capsys):
    assert run(tmp_path, *words) == 2
    err = capsys.readouterr().err
    assert err.startswith("alexnet-triton: ")
    assert why in err
    assert err.count("\n") == 1
    assert not (tmp_path / "p.svg").exists()


def test_results_of_something_else_are_refused(tmp_path, capsys):
    path = results_file(tmp_path)
    assert run(tmp_path, "--results", path, "--card", "a100") == 2
    assert "is of 'NVIDIA H100 80GB HBM3', and the plan is for an A100" in capsys.readouterr().err
    assert run(tmp_path, "--results", path, "--dtype", "fp32") == 2
    assert "has no times or no roofs of merged in float32: measure them" in capsys.readouterr().err


def test_the_command_knows_the_names_of_schedules_and_links():
    assert cli.SCHEDULE_NAMES == SCHEDULES
    assert {*cli.LINK_NAMES, "loopback"} == {*LINKS}
