"""The command `train`: its images, its network, its folder, and what it refuses in one sentence."""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import small_run
import torch
from PIL import Image
from torch import nn

from alexnet_triton import AlexNet
from alexnet_triton.cli import main
from alexnet_triton.parallel.processes.world import World
from alexnet_triton.recipe.data.prepare import prepare
from alexnet_triton.recipe.data.sets import DataError
from alexnet_triton.recipe.train import checkpoint
from alexnet_triton.recipe.train import run as training
from alexnet_triton.recipe.train.checkpoint import CheckpointError, Checkpoints
from alexnet_triton.recipe.train.run import Options, crop_of, freeze, images, network
from alexnet_triton.recipe.train.settings import COLUMNS, History, Settings
from alexnet_triton.recipe.trained import Trained


def write(folder, classes, count, seed=0):
    """Class folders of noise, each class in a colour of its own."""
    noise = np.random.default_rng(seed)
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = noise.integers(0, 120, (70, 80, 3), dtype=np.uint8)
            pixels[..., place % 3] += 100
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "photographs", ("blue", "green", "red"), 10)


# --- images -----------------------------------------------------------------------------------------------------------


def test_a_tenth_is_held_out_by_the_seed(photographs):
    learn, held_out = images(Options(photographs, size=32))
    assert (len(learn), len(held_out)) == (27, 3)
    assert held_out.labels.tolist() == [0, 1, 2]
    assert images(Options(photographs, size=32, held_out=0.5))[1].labels.bincount().tolist() == [5, 5, 5]
    names = [
        {held_out.file_name(index) for index in range(3)}
        for _, held_out in (images(Options(photographs, size=32, settings=Settings(seed=seed))) for seed in (0, 0, 1))
    ]
    assert names[0] == names[1] != names[2]


def test_train_and_val_inside_are_taken_with_the_classes_of_train(tmp_path):
    write(tmp_path / "train", ("b", "c", "a"), 2)
    write(tmp_path / "val", ("c", "a"), 3)
    learn, held_out = images(Options(tmp_path, size=16))
    assert learn.classes == held_out.classes == ("a", "b", "c")
    assert held_out.labels.tolist() == [0, 0, 0, 2, 2, 2]
    other = write(tmp_path / "other", ("b",), 4)
    assert images(Options(tmp_path, val=other, size=16))[1].labels.tolist() == [1] * 4
    assert len(images(Options(tmp_path / "train", val=other, size=16))[0]) == 6


def test_a_class_that_is_held_out_and_not_learned_is_named(tmp_path, photographs):
    write(tmp_path / "val", ("red", "violet"), 2)
    with pytest.raises(DataError, match="class 'violet' of 'val' is none of the 3 classes"):
        images(Options(photographs, val=tmp_path / "val", size=16))


def test_images_of_two_sizes_are_refused(tmp_path, photographs):
    packed = tmp_path / "packed"
    prepare(write(tmp_path / "files", ("blue", "green", "red"), 2), packed, 72, workers=0)
    assert images(Options(packed, val=photographs, size=72))[1].size == 72
    with pytest.raises(DataError, match="'photographs' has images of 256x256 pixels and 'packed' of 72x72"):
        images(Options(packed, val=photographs))


# --- network ----------------------------------------------------------------------------------------------------------


def small_network(monkeypatch):
    """Let runs have networks with few filters."""

    def build(options, learn):
        torch.manual_seed(0)
        model = small_run.network()
        model.classifier[6] = nn.Linear(16, len(learn.classes))
        return Trained(model, learn.classes, learn.statistics(), learn.size, options.crop or 67)

    monkeypatch.setattr(training, "network", build)


def test_the_input_is_cropped_to_the_variants_own_size_or_the_same_share_of_it(photographs):
    assert [crop_of(size, 227) for size in (256, 230, 128, 76)] == [227, 227, 113, 67]
    learn = images(Options(photographs, size=72))[0]
    assert network(Options(photographs, variant="torchvision", size=72), learn).crop == 63
    with pytest.raises(ValueError, match="at least 67x67 pixels, got 66x66"):
        network(Options(photographs, crop=66), learn)
    with pytest.raises(ValueError, match="a crop of 1000000 pixels a side cannot be cut from images of 72"):
        network(Options(photographs, crop=1_000_000), learn)


@pytest.mark.parametrize("dropout", [-0.1, 1.1, float("nan")])
def test_a_dropout_that_is_no_probability_is_refused(dropout, photographs):
    learn = images(Options(photographs, size=72))[0]
    for init_from in (None, "nowhere.pt"):
        with pytest.raises(ValueError, match=f"dropout must be a probability, from 0 to 1, got {dropout}"):
            network(Options(photographs, dropout=dropout, init_from=init_from), learn)


def test_a_network_that_goes_on_from_a_checkpoint_has_a_new_last_layer_and_its_own_colours(photographs, tmp_path):
    learn = images(Options(photographs, size=80))[0]
    torch.manual_seed(0)
    start = Trained(AlexNet(5, variant="paper"), tuple("vwxyz"), learn.statistics(), 90, 75)
    start.statistics = start.statistics._replace(mean=torch.tensor([0.1, 0.2, 0.3]))
    checkpoint.write(tmp_path / "c.pt", start.content())
    trained = network(Options(photographs, init_from=str(tmp_path / "c.pt"), size=80, dropout=0.25), learn)
    assert trained.classes == ("blue", "green", "red")
    assert (trained.model.variant, trained.crop) == ("paper", 75)
    assert trained.statistics.mean.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert torch.equal(trained.statistics.eigenvalues, learn.statistics().eigenvalues)
    assert torch.equal(trained.model.classifier[4].weight, start.model.classifier[4].weight)
    assert trained.model.classifier[6].out_features == 3
    assert {layer.p for layer in trained.model.modules() if isinstance(layer, nn.Dropout)} == {0.25}
    freeze(trained.model, ("features", "classifier.1"))
    left = [name for name, parameter in trained.model.named_parameters() if parameter.requires_grad]
    assert left == ["classifier.4.weight", "classifier.4.bias", "classifier.6.weight", "classifier.6.bias"]
    with pytest.raises(ValueError, match="--freeze feature: the network has no parameters of that name"):
        freeze(trained.model, ("feature",))
    with pytest.raises(ValueError, match="is of variant 'paper', and 'merged' was asked for"):
        network(Options(photographs, init_from=str(tmp_path / "c.pt"), variant="merged"), learn)
    with pytest.raises(ValueError, match="nowhere"):
        network(Options(photographs, init_from="nowhere.pt"), learn)
    with pytest.raises(ValueError, match="give one of them"):
        network(Options(photographs, init_from=str(tmp_path / "c.pt"), init="kaiming"), learn)


# --- folder and command -----------------------------------------------------------------------------------------------


def words(photographs, out, *more):
    told = ["--size", "72", "--epochs", "1", "--batch-size", "8", "--lr", "0.005", "--output-dir", str(out)]
    return ["train", str(photographs), *told, *more]


def snapshot(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"}


def test_train_writes_a_run_and_resume_goes_on_with_it(photographs, tmp_path, monkeypatch, capsys):
    small_network(monkeypatch)
    out = tmp_path / "a run"
    assert main(words(photographs, out)) == 0
    said = capsys.readouterr().out
    assert "27 images to learn from, 3 held out, 3 classes; 72x72 pixels, cropped to 67x67" in said
    assert "after 1 epochs and" in said
    assert {"last.pt", "best.pt", "log.csv", "checkpoint-000000004.pt"} <= set(os.listdir(out))
    before = snapshot(out)
    assert main(words(photographs, out)) == 2
    assert "holds a run already: --resume without FILE goes on with it" in capsys.readouterr().err
    assert snapshot(out) == before
    assert main(words(photographs, out, "--resume", "--lr", "0.1")) == 2
    err = capsys.readouterr().err
    assert "checkpoint-000000004.pt' is of a run that was told otherwise (lr was 0.005 and is 0.1)" in err
    assert snapshot(out) == before
    (out / ".checkpoint-000000009.pt.x.writing").touch()  # as a process that was killed leaves it
    assert main([*words(photographs, out, "--resume"), "--epochs", "2"]) == 0
    assert "going on after 1 epochs" in capsys.readouterr().out
    assert not list(out.glob(".*.writing"))
    steps = [checkpoint.steps(checkpoint.read(path)) for path in Checkpoints(out).numbered()]
    assert steps == [0, 4, 8]
    assert main(words(photographs, out, "--resume", str(out / "checkpoint-000000004.pt"))) == 2
    assert "holds later checkpoints than" in capsys.readouterr().err


def test_a_run_goes_on_in_another_folder_and_in_none_that_holds_one(photographs, tmp_path, monkeypatch, capsys):
    small_network(monkeypatch)
    assert main(words(photographs, tmp_path / "first")) == 0
    last = str(tmp_path / "first" / "last.pt")
    assert main([*words(photographs, tmp_path / "second", "--resume", last), "--lr", "0.005"]) == 0
    assert {"last.pt", "checkpoint-000000004.pt", "log.csv"} <= set(os.listdir(tmp_path / "second"))
    assert main(words(photographs, tmp_path / "third")) == 0
    before = snapshot(tmp_path / "third")
    assert main([*words(photographs, tmp_path / "third", "--resume", last), "--epochs", "2"]) == 2
    assert "third' holds a run already: --resume without FILE goes on with it" in capsys.readouterr().err
    assert snapshot(tmp_path / "third") == before


def test_a_best_network_that_is_in_another_folder_is_not_pointed_at(tmp_path, capsys):
    history = History(epochs=[dict.fromkeys(COLUMNS, 1.0)])
    training._conclude(history, tmp_path)
    assert "best.pt" not in capsys.readouterr().out
    (tmp_path / "best.pt").touch()
    training._conclude(history, tmp_path)
    assert "best.pt" in capsys.readouterr().out


@pytest.mark.parametrize("inside", ["", "train", "val"])
def test_a_run_is_not_written_among_the_images(inside, tmp_path, monkeypatch, capsys):
    small_network(monkeypatch)
    for part in ("train", "val"):
        write(tmp_path / part, ("a", "b"), 2)
    data = tmp_path / (inside or "train")
    more = ["--val", str(tmp_path / "val")] if inside == "train" else []
    assert main(words(data, data / "run", *more)) == 2
    assert f"lies among the images of '{data}', where it would pass for a class" in capsys.readouterr().err
    assert not (data / "run").exists()
    assert main(words(tmp_path, tmp_path / "val" / "run")) == 2
    assert main(words(tmp_path, tmp_path / "run")) == 0


def test_processes_that_see_different_checkpoints_do_not_go_on(tmp_path):
    @dataclass(frozen=True)
    class Two(World):
        def gather(self, value):
            return [value, 7]

    with (
        pytest.raises(CheckpointError, match="see different checkpoints to go on from"),
        training._folder(Options(tmp_path, output_dir=tmp_path), Two(torch.device("cpu"))),
    ):
        pass


@dataclass(frozen=True)
class Second(World):
    """The second process of two, of which the first is not there."""

    def sum(self, values):
        return values

    def gather(self, value):
        return [value, value]


def test_each_process_drops_units_of_its_own_and_judges_images_of_its_own(photographs, tmp_path, monkeypatch):
    class Begun(Exception):
        pass

    def begun(*_, **more):
        raise Begun(torch.initial_seed())

    small_network(monkeypatch)
    monkeypatch.setattr(training.Training, "run", begun)
    second = Second(torch.device("cpu"), 1, 2)
    with pytest.raises(Begun, match="^8$"):
        training._run(Options(photographs, size=72, output_dir=tmp_path, settings=Settings(seed=7)), second, False)
    learn = images(Options(photographs, size=72))[0]
    trained = Trained(AlexNet(3, variant="torchvision"), learn.classes, learn.statistics(), 72, 67)
    checkpoint.write(tmp_path / "c.pt", trained.content())
    monkeypatch.setattr(training, "world", lambda *_, **more: nullcontext(second))
    assert training.judge(Options(photographs, resume=str(tmp_path / "c.pt")), progress=False).images == 1  # of 3


def test_resume_without_a_checkpoint_starts(photographs, tmp_path, monkeypatch):
    small_network(monkeypatch)
    assert main(words(photographs, tmp_path / "new", "--resume")) == 0


def test_two_runs_do_not_write_into_one_folder(photographs, tmp_path, monkeypatch):
    small_network(monkeypatch)
    here = World(torch.device("cpu"))
    options = Options(photographs, output_dir=tmp_path)
    with (
        training._folder(options, here),
        pytest.raises(CheckpointError, match="another run writes into"),
        training._folder(options, here),
    ):
        pass


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--crop", "73"], "73"),
        (["--lr-scheduler", "plateau", "--lr-gamma", "0.5", "--held-out", "0"], "share to hold out must lie in (0, 1)"),
        (["--momentum", "1.5"], "momentum must be at least 0 and below 1, got 1.5"),
        (["--weight-decay", "-1"], "weight_decay must be at least 0"),
        (["--pca-std", "-1"], "pca_std must be at least 0, got -1"),
        (["--resume", "nowhere.pt"], "there is no checkpoint at 'nowhere.pt'"),
        (["--val", "nowhere"], "there is no packed dataset and no folder of class folders at 'nowhere'"),
        (["--freeze", "features", "classifier"], "no parameter is left to train"),
        (["--freeze", "head"], "--freeze head: the network has no parameters of that name"),
        (["--device", "gpu"], "device 'gpu' cannot be used here"),
        (["--seed", str(2**64)], "seed must be a number of 64 bits"),
        (["--pipeline", "2"], "2 processes hold one copy of the network, and 1 is here: start a multiple of 2, as in"),
        (["--pipeline", "4", "--microbatches", "3"], "1f1b needs at least as many microbatches as stages, got 3 for 4"),
        (["--cut", "conv3"], "--cut says where a pipeline's stages begin: add --pipeline STAGES"),
        (["--trace", "step.png"], "--trace step.png draws a step of a pipeline: add --pipeline STAGES"),
        (["--trace", "step.jpg"], "a picture's name must end in .png, .svg, .pdf, got 'step.jpg'"),
        (["--towers"], "2 processes hold one copy of the network, and 1 is here"),
        (["--hybrid"], "--hybrid shares the network out among processes, and this one is alone"),
        (["--hybrid", "--towers"], "--towers and --hybrid are different ways to share a network: choose one"),
        (["--test-only"], "--test-only judges the network of a checkpoint"),
        (["--lr", "1e30"], "at step 2: use a learning rate below 1e+30"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence_and_exit_code_2(
    more, message, photographs, tmp_path, monkeypatch, capsys
):
    small_network(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert main(words(photographs, tmp_path / "run", *more)) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("alexnet-triton: ")
    assert message in err


def test_an_output_that_is_a_file_is_refused(photographs, tmp_path, monkeypatch, capsys):
    small_network(monkeypatch)
    (tmp_path / "file").touch()
    assert main(words(photographs, tmp_path / "file")) == 2
    assert "is a file, and --output-dir needs a folder" in capsys.readouterr().err


def test_a_folder_with_one_class_or_none_is_refused(tmp_path, monkeypatch, capsys):
    small_network(monkeypatch)
    write(tmp_path / "one", ("a",), 3)
    assert main(words(tmp_path / "one", tmp_path / "run")) == 2
    assert "has 1 classes, and at least 2 are needed" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert main(words(tmp_path / "none", tmp_path / "run")) == 2
    assert "class folders" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_image_that_is_cut_short_is_named_and_the_run_can_go_on(photographs, tmp_path, monkeypatch, capsys):
    small_network(monkeypatch)
    folder = write(tmp_path / "images", ("a", "b"), 6)
    cut = folder / "b" / "3.png"
    whole = cut.read_bytes()
    assert main(words(folder, tmp_path / "run")) == 0
    cut.write_bytes(whole[:2000])
    assert main([*words(folder, tmp_path / "run", "--resume"), "--epochs", "2"]) == 2
    assert "3.png" in capsys.readouterr().err
    cut.write_bytes(whole)
    assert main([*words(folder, tmp_path / "run", "--resume"), "--epochs", "2"]) == 0


def test_test_only_judges_a_checkpoint(photographs, tmp_path, capsys):
    learn = images(Options(photographs, size=72))[0]
    torch.manual_seed(0)
    trained = Trained(AlexNet(3, variant="torchvision"), learn.classes, learn.statistics(), 72, 67)
    checkpoint.write(tmp_path / "c.pt", trained.content())
    told = ["train", str(photographs), "--test-only", "--resume", str(tmp_path / "c.pt")]
    assert main(told) == 0
    said = capsys.readouterr().out
    assert "of 3 held-out images right, top-5 100.00%" in said
    assert main([*told, "--size", "72"]) == 0  # as it was trained
    assert capsys.readouterr().out == said
    assert main([*told, "--size", "80"]) == 2
    assert "the network was trained on images of 72x72" in capsys.readouterr().err


def test_settings_are_the_documents_table(photographs):
    s = Settings()
    assert (s.batch_size, s.lr, s.momentum, s.weight_decay, s.epochs) == (128, 0.01, 0.9, 5e-4, 90)
    assert (s.lr_scheduler, s.lr_gamma, s.lr_patience, s.crop) == ("plateau", 0.1, 5, 227)
    assert Options(Path()).output_dir == Path("runs")
