import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from alexnet_triton import AlexNet
from alexnet_triton.cli import main
from alexnet_triton.cli.use import LAYER_NAMES
from alexnet_triton.recipe.data.images import BadImage, read_image
from alexnet_triton.recipe.data.loader import Loader
from alexnet_triton.recipe.data.sets import DataError, LabelledImages, Statistics
from alexnet_triton.recipe.evaluate import features as features_room
from alexnet_triton.recipe.evaluate import use
from alexnet_triton.recipe.evaluate.features import features, write_features
from alexnet_triton.recipe.evaluate.use import ImageFiles, gather, labelled, predict
from alexnet_triton.recipe.trained import Trained

CPU = torch.device("cpu")
SIZE, CROP = 70, 64
STATISTICS = Statistics(torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25]), torch.ones(3), torch.eye(3))


def write_image(path, colour, side=80):
    noise = np.random.default_rng(len(str(path.name)) + sum(colour)).integers(0, 90, (side, side + 9, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((noise + np.array(colour)).astype(np.uint8)).save(path)


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """Fully connected layers of 64 instead of 4,096, which take no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alexnet_triton.model.FEATURES", 64)
        yield


@pytest.fixture(scope="module")
def place(narrow, tmp_path_factory):
    """A folder with `train` (a, b, c), `val` (b, c) and a checkpoint `net.pt`."""
    root = tmp_path_factory.mktemp("use")
    for number, name in enumerate("abc"):
        write_image(root / "train" / name / "0.png", (90, 40 * number, 9))
    for name, colour in (("b/0.png", (160, 0, 0)), ("b/1.jpg", (0, 160, 0)), ("c/x.png", (0, 0, 160))):
        write_image(root / "val" / name, colour)
    torch.manual_seed(1)
    network = Trained(AlexNet(3, variant="torchvision", init="kaiming"), ("a", "b", "c"), STATISTICS, SIZE, CROP)
    torch.save(network.content(), root / "net.pt")
    network.model.eval()
    return root, network


FILES = ("b/0.png", "b/1.jpg", "c/x.png")


def inputs(place):
    """The network's input, made of the files by hand."""
    root, _ = place
    images = torch.stack([read_image(root / "val" / name, SIZE)[:, 3:67, 3:67] for name in FILES])
    return (images.float() / 255 - STATISTICS.mean.view(3, 1, 1)) / STATISTICS.std.view(3, 1, 1)


def loader(place, paths=("val",), workers=0, **options):
    root, _ = place
    return Loader(gather([root / path for path in paths], SIZE, **options), workers, CPU)


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A folder of the test's own, with the shared images and checkpoint in it."""
    for name in ("train", "val", "net.pt"):
        (tmp_path / name).symlink_to(place[0] / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- images -----------------------------------------------------------------------------------------------------------


def test_images_are_files_and_what_folders_hold(tmp_path):
    for name in ("z.png", "a/1.JPG", "a/0.png", ".hidden.png", ".git/x.png", "notes.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "odd.name").touch()
    images = gather([tmp_path / "odd.name", tmp_path / "in", tmp_path / "in" / "z.png"], 64)
    names = [os.path.relpath(images.file_name(index), tmp_path) for index in range(len(images))]
    assert names == ["odd.name", "in/a/0.png", "in/a/1.JPG", "in/z.png", "in/z.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty' holds no images"):
        gather([tmp_path / "empty"], 64)
    with pytest.raises(DataError, match="no image, and no folder of images, at '.*nowhere'"):
        gather([tmp_path / "in", tmp_path / "nowhere"], 64)


def test_a_packed_dataset_is_taken_alone_and_in_the_networks_size(tmp_path, monkeypatch):
    packed = LabelledImages("packed", torch.zeros(2, 3, 64, 64).byte(), torch.zeros(2).long(), ("a",))
    monkeypatch.setattr(use, "is_packed", lambda path: path.name == "packed")
    monkeypatch.setattr(use, "open_packed", lambda path: packed)
    (tmp_path / "packed").mkdir()
    (tmp_path / "x.png").touch()
    assert gather([tmp_path / "packed"], 64) is packed
    with pytest.raises(DataError, match="packed' is a packed dataset, which is taken alone"):
        gather([tmp_path / "packed", tmp_path / "x.png"], 64)
    with pytest.raises(DataError, match="packed in 64x64 pixels, and the network was trained on .* 65x65"):
        gather([tmp_path / "packed"], 65)


def tiny(classes, named=True, size=SIZE):
    return Trained(nn.Linear(1, 1), classes, STATISTICS, size, CROP, named)


def test_networks_without_names_take_those_of_the_images_and_can_be_averaged(place):
    networks = [tiny(("0", "1", "2"), named=False), tiny(("x", "y", "y"), named=False), tiny(("a", "b", "c"))]
    data = labelled(place[0] / "train", networks)
    assert [network.classes for network in networks] == [("a", "b", "c")] * 3
    assert data.labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="networks take images of 70 and 71 pixels"):
        labelled(place[0] / "train", [tiny(("a",)), tiny(("a",), size=71)])


def test_validation_inside_is_taken_with_the_networks_classes(place):
    data = labelled(place[0], [tiny(("c", "a", "b"))])
    assert data.labels.tolist() == [2, 2, 0]
    assert data.classes == ("c", "a", "b")
    with pytest.raises(DataError, match="class 'c' of 'val' is none of the 2 classes"):
        labelled(place[0], [tiny(("a", "b"))])


# --- guesses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "workers"), [(1, 2), (128, 0)])
def test_guesses_are_the_networks_best_first(batch, workers, place):
    _, network = place
    with torch.no_grad():
        chances = network.model(inputs(place)).softmax(1)
    found = predict(network, loader(place, workers=workers), top=2, batch_size=batch)
    assert [os.path.basename(prediction.file) for prediction in found] == ["0.png", "1.jpg", "x.png"]
    for prediction, row in zip(found, chances, strict=True):
        best = row.argsort(descending=True)[:2].tolist()
        assert [name for name, _ in prediction.guesses] == ["abc"[label] for label in best]
        assert [chance for _, chance in prediction.guesses] == pytest.approx(row[best].tolist(), rel=1e-4)


def test_no_more_guesses_than_classes_and_their_chances_sum_to_one(place):
    for prediction in predict(place[1], loader(place), top=5):
        assert len(prediction.guesses) == 3
        assert sum(chance for _, chance in prediction.guesses) == pytest.approx(1)


def test_bad_images_are_named_or_passed_over(place, tmp_path):
    root, network = place
    (tmp_path / "cut.jpg").write_bytes((root / "val" / "b" / "1.jpg").read_bytes()[:900])
    files = [root / "val" / "b" / "0.png", tmp_path / "cut.jpg", root / "val" / "c" / "x.png"]
    with pytest.raises(BadImage, match="cut.jpg' is no image, or is damaged"):
        predict(network, Loader(ImageFiles(files, SIZE), 2, CPU), batch_size=1)
    images = ImageFiles(files, SIZE, skip_bad=True)
    found = predict(network, Loader(images, 2, CPU), batch_size=2)
    assert [prediction.file for prediction in found] == [str(files[0]), str(files[2])]
    assert list(images.bad) == [1]
    good = predict(network, Loader(ImageFiles(files[::2], SIZE), 0, CPU))
    assert [p.guesses[0][0] for p in found] == [p.guesses[0][0] for p in good]


# --- features ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def expected_features(place, layer):
    model, x = place[1].model, inputs(place)
    if layer in ("fc6", "fc7"):
        return model.get_feature_vector(x, layer)
    for module in list(model.features)[: {"conv5": 12, "pool5": 13}[layer]]:
        x = module(x)
    return x.flatten(1)


@pytest.mark.parametrize("layer", LAYER_NAMES)
def test_features_are_the_activations_of_the_layer(layer, place):
    parts = torch.arange(3).split(2)
    place[1].model.train()
    found = torch.cat(list(features(place[1], loader(place), parts, layer)))
    assert place[1].model.training
    place[1].model.eval()
    expected = expected_features(place, layer)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
    assert found.min() >= 0
    assert found.std() > 0
    assert not found.requires_grad


def test_layers_on_the_command_line_are_the_packages():
    assert LAYER_NAMES == features_room.LAYERS


def test_features_are_written_in_the_order_of_their_names(place, tmp_path):
    expected = expected_features(place, "fc6")
    near = {"rtol": 1e-4, "atol": 1e-5 * expected.abs().max().item()}
    assert write_features(tmp_path / "f.npy", place[1], loader(place), "fc6", batch_size=2) == (3, 64)
    assert write_features(tmp_path / "f.safetensors", place[1], loader(place, workers=2), "fc6") == (3, 64)
    assert sorted(os.listdir(tmp_path)) == ["f.npy", "f.safetensors", "f.txt"]
    array = np.load(tmp_path / "f.npy")
    assert array.dtype == np.float32
    assert np.allclose(array, expected, **near)
    names = [str(place[0] / "val" / name) for name in FILES]
    assert (tmp_path / "f.txt").read_text().splitlines() == names
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert torch.allclose(file.get_tensor("features"), expected, **near)
        assert json.loads(file.metadata()["files"]) == names
        assert file.metadata()["layer"] == "fc6"


def test_a_bad_image_has_no_row_among_the_features(place, tmp_path):
    root, network = place
    (tmp_path / "bad.png").write_text("no image")
    files = [tmp_path / "bad.png", root / "val" / "b" / "1.jpg", tmp_path / "bad.png"]
    images = ImageFiles(files, SIZE, skip_bad=True)
    assert write_features(tmp_path / "f.npy", network, Loader(images, 0, CPU), "fc7") == (1, 64)
    assert np.allclose(np.load(tmp_path / "f.npy")[0], expected_features(place, "fc7")[1], rtol=1e-3, atol=1e-3)
    assert (tmp_path / "f.txt").read_text() == f"{files[1]}\n"
    for options, message in (({"skip_bad": True}, "none of the 1 images can be read"), ({}, "bad.png' is no image")):
        with pytest.raises(DataError, match=message):
            write_features(tmp_path / "g.npy", network, Loader(ImageFiles(files[:1], SIZE, **options), 0, CPU))
    assert sorted(os.listdir(tmp_path)) == ["bad.png", "f.npy", "f.txt"]


def test_features_that_cannot_be_written_are_refused_before_any_work(place, tmp_path):
    def refused(name, error, message, **options):
        with pytest.raises(error, match=message):
            write_features(tmp_path / name, place[1], loader(place), **options)

    refused("f.csv", ValueError, "ends in .npy or .safetensors, got 'f.csv'")
    refused("f.npy", ValueError, "conv5, pool5, fc6, fc7, got 'fc8'", layer="fc8")
    refused("no/f.npy", FileNotFoundError, "there is no folder")
    (tmp_path / "f.txt").write_text("mine")
    refused("f.npy", FileExistsError, "f.txt' is there already")
    assert (tmp_path / "f.txt").read_text() == "mine"
    broken = ImageFiles([place[0] / "val" / "b" / "0.png"], SIZE)
    broken.file_name = lambda index: "a\nb"
    with pytest.raises(ValueError, match="line break in its name"):
        write_features(tmp_path / "g.npy", place[1], Loader(broken, 0, CPU))
    assert os.listdir(tmp_path) == ["f.txt"]


# --- the command line -------------------------------------------------------------------------------------------------


def test_evaluate_judges_and_reports(here, capsys):
    words = ["evaluate", ".", "--checkpoint", "net.pt", "--device", "cpu"]
    assert main([*words, "--ensemble", "net.pt", "--ten-crop", "--out", "out"]) == 0
    out = capsys.readouterr().out
    assert "net.pt" in out
    assert "averaged" not in out
    assert "3 images of 3 classes, ten crops" in out
    told = json.loads((here / "out" / "evaluation.json").read_text())
    assert (told["checkpoints"], told["crops"], told["images"]) == (["net.pt"], 10, 3)
    assert f"{told['top1']:.2%}" in out
    assert (here / "out" / "predictions.csv").read_text().count("\nb/") == 2
    before = (here / "out" / "classes.csv").read_text()
    assert main([*words, "--out", "out"]) == 2
    assert "out/evaluation.json' is there already" in capsys.readouterr().err
    assert (here / "out" / "classes.csv").read_text() == before


def test_evaluate_averages_several_networks(here, capsys):
    os.link(os.path.realpath("net.pt"), "same.pt")
    assert main(["evaluate", "val", "--checkpoint", "net.pt", "--ensemble", "same.pt", "--device", "cpu"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[:4]] == ["network", "net.pt", "same.pt", "all"]
    assert lines[0][1:] == ["top-1", "top-3", "cross-entropy"]
    assert lines[1][1:] == lines[2][1:] == lines[3][3:]


def test_predict_prints_a_table_or_json(here, place, capsys):
    (here / "bad.png").touch()
    words = ["predict", "val/b", "bad.png", "--checkpoint", "net.pt", "--top", "2", "--device", "cpu"]
    assert main(words) == 2
    assert "'bad.png' is no image" in capsys.readouterr().err
    assert main([*words, "--skip-bad"]) == 0
    table = capsys.readouterr()
    assert "passed over: 'bad.png'" in table.err
    lines = [line.split() for line in table.out.splitlines()]
    assert lines[0] == ["file", "rank", "probability", "class"]
    assert main([*words, "--skip-bad", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [entry["file"] for entry in told] == ["val/b/0.png", "val/b/1.jpg"]
    assert [len(entry["guesses"]) for entry in told] == [2, 2]
    best = told[1]["guesses"][0]
    assert lines[3] == ["val/b/1.jpg", "1", f"{best['probability']:.2%}", best["class"]]
    with torch.no_grad():
        chances = place[1].model(inputs(place)[1:2]).softmax(1)[0]
    assert best["probability"] == pytest.approx(chances.max().item(), rel=1e-3)


def test_features_and_filters_write_files_and_overwrite_none(here, capsys):
    words = ["features", "val", "--checkpoint", "net.pt", "--device", "cpu", "--out", "f.npy"]
    assert main(words) == 0
    assert "fc7 of 3 images, 64 numbers each: f.npy" in capsys.readouterr().out
    assert np.load("f.npy").shape == (3, 64)
    assert main(["filters", "--checkpoint", "net.pt"]) == 0
    assert "64 filters of 11x11 pixels: filters.png" in capsys.readouterr().out
    with Image.open("filters.png") as picture:
        assert picture.size == (740, 740)
        assert np.asarray(picture).std() > 20
    for again in (words, ["filters", "--checkpoint", "net.pt"]):
        assert main(again) == 2
        assert "is there already, and nothing is overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("variant", ["paper", "merged"])
def test_filters_of_two_towers_stand_apart(variant, tmp_path, monkeypatch):
    model = AlexNet(2, variant=variant, device="meta").to_empty(device="cpu")
    nn.init.normal_(model.features[0].weight)
    monkeypatch.setattr("alexnet_triton.cli.use._network", lambda *_: Trained(model, ("a", "b"), STATISTICS, 256, 227))
    assert main(["filters", "--checkpoint", "x", "--out", str(tmp_path / "f.png")]) == 0
    with Image.open(tmp_path / "f.png") as picture:
        assert picture.size == (1108, 756 if variant == "paper" else 740)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "val"], "nothing to evaluate: name a network with --checkpoint"),
        (["evaluate", "nowhere", "--checkpoint", "net.pt"], "no folder of class folders at 'nowhere'"),
        (
            ["evaluate", "val", "--checkpoint", "net.pt", "--variant", "paper"],
            "is of variant 'torchvision', and 'paper'",
        ),
        (
            ["evaluate", "val", "--checkpoint", "val"],
            "there is no 'config.json' in 'val', which says what network it is",
        ),
        (["evaluate", "more", "--checkpoint", "net.pt"], "class 'z' of 'more' is none of the 3 classes"),
        (["evaluate", "val", "--checkpoint", "net.pt", "--out", "net.pt"], "'net.pt' is a file, and --out needs"),
        (["evaluate", "val", "--checkpoint", "net.pt", "--classes", "names"], "3 classes, and 2 names were given"),
        (["predict", "nowhere.jpg", "--checkpoint", "net.pt"], "no folder of images, at 'nowhere.jpg'"),
        (["predict", "val", "--checkpoint", "cut.pt"], "'cut.pt' cannot be read as tensors and plain types"),
        (["features", "val", "--checkpoint", "net.pt", "--out", "f.csv"], "got 'f.csv'"),
        (["filters", "--checkpoint", "net.pt", "--out", "no/f.png"], "there is no folder 'no' for 'f.png'"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence_and_exit_code_2(words, message, here, place, monkeypatch, capsys):
    write_image(here / "more" / "z" / "0.png", (9, 9, 9))
    (here / "names").write_text("x\ny\n")
    (here / "cut.pt").write_bytes((here / "net.pt").open("rb").read(5000))
    before = sorted(os.listdir(here))
    assert main([*words, *([] if words[0] == "filters" else ["--device", "cpu"])]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("alexnet-triton: ")
    assert err.count("\n") == 1
    assert sorted(os.listdir(here)) == before
