import sys

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_triton.recipe.data import DataError, digits, stratified_split
from alexnet_triton.recipe.images import image_folder, read_image


def save(path, colour=(10, 20, 30), size=(40, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        for index in range(3):
            save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def test_digits_are_scikit_learns():
    data = digits(67)
    assert data.images.shape == (1797, 3, 67, 67)
    assert data.images.dtype == torch.uint8
    assert data.classes == tuple("0123456789")
    assert data.images.max() == 255
    assert torch.equal(data.images[:, 0], data.images[:, 2])


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'alexnet-triton\[demo\]'"):
        digits()


def test_split_holds_out_360_digits_of_all_classes_alike():
    learn, held_out = stratified_split(digits(8), 0.2)
    assert (len(learn), len(held_out)) == (1437, 360)
    shares = torch.bincount(held_out.labels) / torch.bincount(digits(8).labels)
    assert (shares - 0.2).abs().max() < 0.006
    rows = {image.numpy().tobytes() for image in learn.read(torch.arange(len(learn)))}
    assert sum(image.numpy().tobytes() in rows for image in held_out.read(torch.arange(len(held_out)))) == 0


def test_split_follows_its_seed_and_leaves_torchs_alone():
    data = digits(8)
    torch.manual_seed(1)
    splits = [stratified_split(data, 0.2, seed)[1].labels for seed in (0, 0, 1)]
    first = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(first, torch.rand(1))
    assert torch.equal(splits[0], splits[1])
    first, other = (stratified_split(data, 0.2, seed)[1].rows for seed in (0, 1))
    assert not torch.equal(first, other)
    for share in (0, 1, -0.1):
        with pytest.raises(ValueError, match=r"\(0, 1\), got"):
            stratified_split(data, share)


def test_split_of_the_smallest_folder_leaves_one_of_each_class_on_both_sides(folder):
    learn, held_out = stratified_split(image_folder(folder, 8), 0.2)
    assert torch.bincount(held_out.labels).tolist() == [1, 1]
    assert torch.bincount(learn.labels).tolist() == [2, 2]


def test_folder_gives_classes_by_name_and_ignores_hidden_files(folder):
    (folder / "cat" / ".DS_Store").write_text("not an image")
    (folder / ".cache").mkdir()
    data = image_folder(folder, 16)
    assert data.classes == ("cat", "dog")
    assert data.images.shape == (6, 3, 16, 16)
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.images[0, :, 8, 8].tolist() == [10, 20, 30]


def test_images_of_every_mode_come_out_as_upright_rgb(tmp_path):
    grey16 = Image.fromarray(np.full((30, 40), 128 * 257, dtype=np.uint16))
    cases = {
        "grey.png": Image.new("L", (40, 30), 77),
        "palette.png": Image.new("RGB", (40, 30), (200, 0, 0)).quantize(4),
        "cmyk.jpg": Image.new("CMYK", (40, 30), (0, 0, 0, 0)),
        "clear.png": Image.new("RGBA", (40, 30), (0, 0, 0, 0)),
        "one.png": Image.new("1", (40, 30), 1),
        "grey16.png": grey16,
    }
    expected = {
        "grey.png": [77, 77, 77],
        "palette.png": [200, 0, 0],
        "cmyk.jpg": [255, 255, 255],
        "clear.png": [255, 255, 255],
        "one.png": [255, 255, 255],
        "grey16.png": [128, 128, 128],
    }
    for name, image in cases.items():
        image.save(tmp_path / name)
        assert read_image(tmp_path / name, 8)[:, 4, 4].tolist() == expected[name], name
    pixels = Image.new("RGB", (40, 20))
    pixels.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: its left side is the top
    pixels.save(tmp_path / "turned.png", exif=exif)
    image = read_image(tmp_path / "turned.png", 20)
    assert image[0, 2, 10] > 200
    assert image[0, 17, 10] < 50


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2000])


def break_by_text(folder):
    (folder / "dog" / "notes.jpg").write_text("no image")
    return "notes.jpg"


def break_by_other_file(folder):
    (folder / "dog" / "labels.csv").write_text("a,b")
    return "labels.csv"


def break_by_emptiness(folder):
    (folder / "dog" / "empty.png").touch()
    return "empty.png"


def break_by_truncation(folder):
    noise = np.random.default_rng(0).integers(0, 255, (100, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "dog" / "cut.jpg")
    truncate(folder / "dog" / "cut.jpg")
    return "cut.jpg"


BREAKS = (break_by_text, break_by_other_file, break_by_emptiness, break_by_truncation)


@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
def test_a_file_that_is_no_image_is_named(damage, folder):
    name = damage(folder)
    with pytest.raises(DataError, match=f"{name}' is no image, or is damaged") as caught:
        image_folder(folder, 16)
    assert "\n" not in str(caught.value)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="there is no folder of images at .*nowhere"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds 0 class folders"):
        image_folder(tmp_path)
    save(tmp_path / "cat" / "a.png")
    with pytest.raises(DataError, match="holds 1 class folders, and at least 2"):
        image_folder(tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match="cat' holds 1 images, and at least 2"):
        image_folder(tmp_path)
    save(tmp_path / "cat" / "b.png")
    with pytest.raises(DataError, match="dog' holds 0 images"):
        image_folder(tmp_path)
