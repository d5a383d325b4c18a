"""The whole recipe on real images, by its commands: prepare, train, go on, evaluate, predict, features, filters."""

import csv
import json

import numpy as np
import pytest
import small_run
import torch
from fashion import write_folder
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn

from alexnet_triton.cli import main
from alexnet_triton.demo.digits import write_digits
from alexnet_triton.parallel.processes.world import World
from alexnet_triton.recipe.data.packed import open_packed
from alexnet_triton.recipe.data.prepare import prepare
from alexnet_triton.recipe.train.checkpoint import Checkpoints
from alexnet_triton.recipe.train.loop import Training
from alexnet_triton.recipe.train.settings import Settings
from alexnet_triton.recipe.trained import Trained


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """scikit-learn's two photographs, cut into pieces: `train` from their left, `val` from their right."""
    root = tmp_path_factory.mktemp("recipe") / "photographs"
    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        for part, columns in (("train", range(0, 330, 55)), ("val", (480,))):
            (root / part / name).mkdir(parents=True)
            for x in columns:
                for y in (0, 90, 180, 260):
                    piece = Image.fromarray(pixels).crop((x, y, x + 150, y + 150))
                    piece.save(root / part / name / f"{x}-{y}.jpg")
    return root


def test_from_photographs_to_features_by_commands(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", str(photographs), "packed", "--size", "72", "--workers", "1"]) == 0
    train = ["train", "packed", "--variant", "torchvision", "--init", "kaiming", "--crop", "63", "--batch-size", "8"]
    train += ["--lr", "0.005", "--clip-grad-norm", "1", "--output-dir", "run", "--keep", "1"]
    assert main([*train, "--epochs", "1"]) == 0
    assert main([*train, "--epochs", "4", "--resume"]) == 0
    out = capsys.readouterr().out
    assert "48 images to learn from, 8 held out, 2 classes; 72x72 pixels, cropped to 63x63" in out
    assert "going on after 1 epochs" in out

    assert main(["evaluate", "packed", "--checkpoint", "run/best.pt", "--ten-crop", "--out", "judged"]) == 0
    judged = json.loads((tmp_path / "judged" / "evaluation.json").read_text())
    assert (judged["images"], judged["classes"]) == (8, 2)
    with open("judged/predictions.csv", newline="") as file:
        right = [row["guess"] == row["true"] for row in csv.DictReader(file)]
    assert sum(right) / 8 == judged["top1"] >= 0.75

    one = str(photographs / "val" / "flower" / "480-90.jpg")
    capsys.readouterr()
    assert main(["predict", one, "--checkpoint", "run/best.pt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main(["features", "packed/val", "--checkpoint", "run/best.pt", "--layer", "fc7", "--out", "fc7.npy"]) == 0
    features = np.load("fc7.npy")
    assert features.shape == (8, 4096)
    assert len(np.unique(features, axis=0)) == 8
    assert main(["filters", "--checkpoint", "run/best.pt", "--out", "filters.png"]) == 0
    with Image.open("filters.png") as picture:
        assert min(picture.size) > 200


def accuracy_after_training(folder, packed, epochs):
    """Held-out accuracy of a small network, trained with the recipe's own augmentation."""
    learn = open_packed(packed / "train")
    held_out = open_packed(packed / "val").with_classes(learn.classes)
    torch.manual_seed(0)
    model = small_run.network(dropout=0.0)
    model.classifier[6] = nn.Linear(16, len(learn.classes))
    settings = Settings(
        epochs, 32, lr=0.02, lr_scheduler="cosine", clip_grad_norm=1.0, mirror=False, crop=67, pca_std=0.1
    )
    folder.mkdir()
    trained = Trained(model, learn.classes, learn.statistics(), learn.size, 67)
    here = World(torch.device("cpu"))
    run = Training(trained, learn, held_out, settings, Checkpoints(folder, 1), here, progress=False)
    return run.run().column("held_out_top1")[-1]


def test_digits_are_learned(tmp_path):
    write_digits(tmp_path / "all")
    for digit in range(10):
        for number, path in enumerate(sorted((tmp_path / "all" / str(digit)).iterdir())):
            if number < 40:
                part = tmp_path / "digits" / ("val" if number < 10 else "train") / str(digit)
                part.mkdir(parents=True, exist_ok=True)
                path.rename(part / path.name)
    prepare(tmp_path / "digits", tmp_path / "packed", 75, workers=0)
    assert accuracy_after_training(tmp_path / "run", tmp_path / "packed", 8) > 0.5


def test_clothes_of_fashion_mnist_are_learned(fashion, tmp_path):
    write_folder(fashion(True), tmp_path / "clothes" / "train", 500, 28)
    write_folder(fashion(False), tmp_path / "clothes" / "val", 200, 28)
    prepare(tmp_path / "clothes", tmp_path / "packed", 75, workers=0)
    assert accuracy_after_training(tmp_path / "run", tmp_path / "packed", 8) > 0.35
