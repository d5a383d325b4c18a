import csv
import json
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_triton.files import check_new, new_file
from alexnet_triton.recipe.data.sets import LabelledImages
from alexnet_triton.recipe.evaluate import pictures, report
from alexnet_triton.recipe.evaluate.evaluation import Evaluation, Score

NAMES = ("cat", "dog, small", "none", "owl")
PROBABILITIES = torch.tensor(
    [
        [0.7, 0.1, 0.1, 0.1],
        [0.2, 0.6, 0.1, 0.1],
        [0.1, 0.8, 0.05, 0.05],
        [0.2, 0.5, 0.0, 0.3],
        [0.1, 0.2, 0.3, 0.4],
    ]
)
TRUTH = torch.tensor([0, 0, 0, 1, 3])


def evaluation():
    score = Score.of(PROBABILITIES.log(), TRUTH)
    best = PROBABILITIES.max(1)
    of_true = PROBABILITIES.gather(1, TRUTH[:, None])[:, 0]
    return Evaluation(score, [score, score], best.indices, torch.stack([best.values, of_true], 1), 2.0)


def images():
    return LabelledImages("val", torch.zeros(5, 3, 4, 4).byte(), TRUTH, NAMES)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def is_blank(path):
    with Image.open(path) as picture:
        low, high = picture.convert("L").getextrema()
    return high - low < 100


def test_report_tells_what_was_guessed(tmp_path):
    report.write(tmp_path, evaluation(), images(), {"data": "val"})
    assert sorted(os.listdir(tmp_path)) == sorted(report.FILES)
    assert rows(tmp_path / "classes.csv") == [
        ["class", "images", "top1", "top4", "most_confused_with", "times"],
        ["cat", "3", "0.333333", "1", "dog, small", "2"],
        ["dog, small", "1", "1", "1", "", "0"],
        ["none", "0", "", "", "", "0"],
        ["owl", "1", "1", "1", "", "0"],
    ]
    assert rows(tmp_path / "confusion.csv") == [
        ["true \\ guess", *NAMES],
        ["cat", "1", "2", "0", "0"],
        ["dog, small", "0", "1", "0", "0"],
        ["none", "0", "0", "0", "0"],
        ["owl", "0", "0", "0", "1"],
    ]
    predictions = rows(tmp_path / "predictions.csv")
    assert predictions[0] == ["file", "true", "guess", "probability_of_guess", "probability_of_true"]
    assert predictions[2] == ["image 1", "cat", "dog, small", "0.6", "0.2"]
    assert len(predictions) == 6
    told = json.loads((tmp_path / "evaluation.json").read_text())
    assert (told["data"], told["images"], told["classes"], told["images_per_second"]) == ("val", 5, 4, 2.5)
    assert (told["top1"], told["top4"]) == (0.6, 1.0)
    assert (
        told["each"][1]["cross_entropy"]
        == told["cross_entropy"]
        == pytest.approx(-math.log(0.7 * 0.2 * 0.1 * 0.5 * 0.4) / 5)
    )
    assert not is_blank(tmp_path / "confusion.png")


def test_of_many_classes_the_five_best_count():
    probabilities = torch.linspace(0.1, 1, 7).expand(2, 7)
    score = Score.of(probabilities.log(), torch.tensor([2, 1]))
    names = tuple("abcdefg")
    shares = {row[0]: row[2:4] for row in report.per_class(score, names) if row[1]}
    assert shares == {"b": ("0", "0"), "c": ("0", "1")}
    assert "top5" in report.figures(Evaluation(score, [], TRUTH, PROBABILITIES, 1.0), 7)


def test_a_report_overwrites_nothing(tmp_path):
    (tmp_path / "classes.csv").write_text("mine")
    with pytest.raises(FileExistsError, match="classes.csv' is there already, and nothing is overwritten"):
        report.check_folder(tmp_path)
    with pytest.raises(FileExistsError, match="classes.csv"):
        report.write(tmp_path, evaluation(), images(), {})
    assert (tmp_path / "classes.csv").read_text() == "mine"
    with pytest.raises(FileExistsError, match="is a file, and --out needs a folder"):
        report.check_folder(tmp_path / "classes.csv")
    report.check_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_table_stands_in_columns():
    text = report.table(("name", "n"), [("a", 1), ("longer", 20)])
    assert text == "name     n\na        1\nlonger  20"


# --- files ------------------------------------------------------------------------------------------------------------


def write(path, meanwhile):
    with new_file(path) as temporary:
        temporary.write_text("late")
        meanwhile()


def stop():
    raise RuntimeError("stopped")


def test_a_new_file_is_whole_or_not_there(tmp_path):
    with pytest.raises(RuntimeError, match="stopped"):
        write(tmp_path / "a.txt", stop)
    assert os.listdir(tmp_path) == []
    with new_file(tmp_path / "a.txt") as path:
        path.write_text("whole")
        path.chmod(0o600)
        assert os.listdir(tmp_path) == [path.name]
        assert path.suffix == ".txt"
    assert os.listdir(tmp_path) == ["a.txt"]
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_comes_in_between_is_not_overwritten(links, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", no_link)
    with pytest.raises(FileExistsError, match="a.txt' is there already"):
        write(tmp_path / "a.txt", lambda: (tmp_path / "a.txt").write_text("first"))
    assert os.listdir(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "first"
    with new_file(tmp_path / "b.txt") as path:
        path.write_text("whole")
    assert (tmp_path / "b.txt").read_text() == "whole"


def no_link(*_):
    raise OSError("no links here")


def test_a_missing_folder_is_said_before_any_work(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder '.*nowhere' for 'a.txt': make it first"):
        check_new([tmp_path / "nowhere" / "a.txt"])


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 30])
def test_confusions_of_any_number_of_classes_are_drawn(count, tmp_path):
    matrix = torch.eye(count).long() * 9
    matrix[0, -1] = 1
    pictures.confusion(matrix, tuple(f"class number {i}" for i in range(count)), tmp_path / "c.png")
    assert not is_blank(tmp_path / "c.png")


@pytest.mark.parametrize("count", [1, 61])
def test_the_accuracy_of_each_class_is_a_bar(count, tmp_path):
    """As long as the share of the images; with one class, whose bar fills half of the width."""
    images = torch.full((count,), 10)
    right = torch.full((count,), 5)
    pictures.per_class(right, right, images, tuple(map(str, range(count))), 1, tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as picture:
        blue = (np.asarray(picture.convert("RGB")).astype(int) - [0, 0x72, 0xB2]).__abs__().max(2) < 3
    widths = blue[: int(0.8 * len(blue))].sum(1)
    assert abs(widths.max() / (2 * 0.5 * 840) - 0.5) < 0.1


def test_classes_without_images_have_no_bar(tmp_path):
    images = torch.tensor([10, 0])
    pictures.per_class(images, images, images, ("a", "b"), 1, tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as one:
        height = one.height
    pictures.per_class(images, images, torch.tensor([10, 10]), ("a", "b"), 1, tmp_path / "d.png")
    assert not is_blank(tmp_path / "c.png")
    with Image.open(tmp_path / "d.png") as two:
        assert two.height >= height


def test_a_single_confusion_among_a_thousand_classes_is_seen(tmp_path):
    matrix = torch.eye(1000).long() * 50
    matrix[100, 100], matrix[100, 900] = 40, 10
    pictures.confusion(matrix, tuple(map(str, range(1000))), tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    height, width = pixels.shape[:2]
    blue = pixels[..., 2] - pixels[..., 0] > 60
    found = blue[height // 20 : height // 4, width // 2 : width * 9 // 10].nonzero()
    assert 9 <= len(found[0]) <= 200
    assert max(np.ptp(found[0]), np.ptp(found[1])) < 15


def cells(path, count, towers=1, filter_pixels=88, gap=4):
    """The filters of a picture, cut out of its grid."""
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
    columns = (pixels.shape[2] - gap) // (filter_pixels + gap)
    found = []
    for index in range(count):
        row, column = divmod(index, columns)
        below = 3 * gap + gap if index >= count // towers and towers > 1 else 0
        top, left = (gap + row * (filter_pixels + gap) + below, gap + column * (filter_pixels + gap))
        found.append(pixels[:, top : top + filter_pixels, left : left + filter_pixels])
    return pixels, columns, torch.stack(found)


@pytest.mark.parametrize(("count", "towers", "columns", "rows_"), [(96, 1, 12, 8), (96, 2, 12, 8), (64, 1, 8, 8)])
def test_filters_stand_in_a_grid_crisp_and_each_in_its_own_range(count, towers, columns, rows_, tmp_path):
    weight = torch.randn(count, 3, 11, 11) * torch.logspace(-4, 2, count).view(-1, 1, 1, 1)
    pictures.filters(weight, tmp_path / "f.png", towers)
    pixels, found_columns, found = cells(tmp_path / "f.png", count, towers)
    assert found_columns == columns
    assert pixels.shape[1] == rows_ * 92 + 4 + (16 if towers == 2 else 0)
    low, high = weight.amin((1, 2, 3), keepdim=True), weight.amax((1, 2, 3), keepdim=True)
    expected = ((weight - low) / (high - low) * 255).round().to(torch.uint8)
    squares = found.unfold(2, 8, 8).unfold(3, 8, 8).flatten(-2)
    assert torch.equal(squares.amin(-1), squares.amax(-1))
    assert (squares[..., 0].int() - expected.int()).abs().max() <= 1
    assert (pixels[:, :4] == 255).all()


@pytest.mark.parametrize("count", [1, 2, 5, 7, 97])
def test_filters_of_any_number_are_drawn(count, tmp_path):
    pictures.filters(torch.randn(count, 3, 5, 5), tmp_path / "f.png")
    with Image.open(tmp_path / "f.png") as picture:
        assert 0.5 < picture.size[0] / picture.size[1] < 3.1


def test_a_filter_that_is_the_same_everywhere_is_drawn(tmp_path):
    pictures.filters(torch.full((4, 3, 11, 11), 0.5), tmp_path / "f.png")
    assert (tmp_path / "f.png").exists()
