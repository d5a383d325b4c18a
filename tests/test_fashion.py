"""The reader of Fashion-MNIST that other tests stand on."""

import fashion as reader
import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_triton.recipe.data.images import FolderImages, class_folders
from alexnet_triton.recipe.data.sets import LabelledImages

CLASSES = (
    "T-shirt-top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@pytest.mark.parametrize(("train", "count", "mean"), [(True, 60_000, 0.2860), (False, 10_000, 0.2868)])
def test_fashion_mnist_is_whole_and_alike_in_every_class(train, count, mean, fashion):
    data = fashion(train)
    assert (len(data), data.size, data.classes) == (count, 28, CLASSES)
    assert (data.images.shape, data.images.dtype) == ((count, 3, 28, 28), torch.uint8)
    assert data.labels.bincount().tolist() == [count // 10] * 10
    assert torch.equal(data.images[:, 0], data.images[:, 2])
    assert data.images[:, 0].sum().item() / (255 * count * 28**2) == pytest.approx(mean, abs=1e-4)


def test_fashion_mnists_images_are_those_of_their_labels(fashion):
    """Facts of the clothes: trousers are dark between the legs, bags wide at the foot, and so on for the mean image."""
    data = fashion(False)
    grey = data.images[:, 0].float()
    mean = {name: grey[data.labels == label].mean(0) for label, name in enumerate(data.classes)}
    assert mean["Trouser"][24, 13:15].mean() < mean["Trouser"][24, 9:11].mean()
    assert mean["Ankle boot"][4, :8].mean() < 10 < mean["Ankle boot"][20, 4:24].mean()
    assert mean["Sandal"].mean() < mean["Pullover"].mean() / 2


def test_a_test_of_fashion_mnist_is_skipped_by_name_where_it_is_not_installed(monkeypatch, tmp_path, request):
    assert reader.fashion_mnist(True, tmp_path) is None
    monkeypatch.setattr(reader, "FOLDER", tmp_path)
    with pytest.raises(pytest.skip.Exception, match="not installed: apt-get install dataset-fashion-mnist"):
        request.getfixturevalue("fashion")


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def data():
    images = torch.randint(256, (20, 3, 6, 6), dtype=torch.uint8)
    labels = torch.tensor([2, 0, 1, 1] * 5)
    return LabelledImages("made up", images, labels, ("ant", "bee", "cat"))


def test_a_folder_holds_the_first_images_of_every_class(data, tmp_path):
    folder = reader.write_folder(data, tmp_path / "new" / "folder", count=8, size=6)
    found = class_folders(folder)
    assert found.classes == data.classes
    assert found.files == (
        "ant/00001.png", "ant/00005.png", "ant/00009.png",
        "bee/00002.png", "bee/00003.png", "bee/00006.png",
        "cat/00000.png", "cat/00004.png",
    )  # fmt: skip
    indices = torch.tensor([int(name[-9:-4]) for name in found.files])
    assert torch.equal(FolderImages(found, 6).read(torch.arange(8)), data.images[indices])
    assert torch.equal(found.labels, data.labels[indices])


def test_a_folder_of_all_images_has_each_once_in_the_size_that_is_asked_for(data, tmp_path):
    folder = reader.write_folder(data, tmp_path, count=20, size=9)
    names = sorted(path.name for path in folder.rglob("*.png"))
    assert names == [f"{index:05d}.png" for index in range(20)]
    with Image.open(folder / "cat" / "00000.png") as image:
        assert (image.size, image.mode, image.format) == ((9, 9), "RGB", "PNG")
        middle = torch.from_numpy(np.array(image))[4, 4].float()
    around = data.images[0, :, 2:4, 2:4].flatten(1).float()  # pixel 4 of 9 lies amid pixels 2 and 3 of 6
    assert (middle - around.mean(1)).abs().max() <= 1
