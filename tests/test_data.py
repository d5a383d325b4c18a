import io
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from sklearn.datasets import load_digits
from torchvision.transforms.v2 import functional as transform

from alexnet_triton.demo.digits import write_digits
from alexnet_triton.recipe.data.images import BadImage, FolderImages, class_folders, decode, fit, read_image
from alexnet_triton.recipe.data.sets import DataError, LabelledImages, stratified_split


def save(path, colour=(10, 20, 30), size=(40, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        for index in range(3):
            save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def image_folder(folder, size=16):
    """All images of a folder of class folders, in memory."""
    data = FolderImages(class_folders(folder, least=2), size)
    return LabelledImages(data.name, data.read(torch.arange(len(data))), data.labels, data.classes)


def digits():
    """The labels of scikit-learn's digits, each with an image of its number."""
    labels = torch.from_numpy(load_digits().target).long()
    numbers = torch.arange(len(labels))
    images = torch.stack([numbers // 256, numbers % 256, numbers * 0], 1).to(torch.uint8)
    return LabelledImages("digits", images[:, :, None, None], labels, tuple("0123456789"))


def test_digits_are_scikit_learns(tmp_path):
    write_digits(tmp_path)
    data = image_folder(tmp_path, 8)
    assert data.classes == tuple("0123456789")
    assert torch.equal(data.labels.bincount(), digits().labels.bincount())
    first = torch.from_numpy(load_digits().images[0]) * (255 / 16)
    assert torch.equal(data.images[0, 1], first.round().to(torch.uint8))
    assert torch.equal(data.images[:, 0], data.images[:, 2])


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'alexnet-triton\[demo\]'"):
        write_digits(tmp_path)


def test_split_holds_out_360_digits_of_all_classes_alike():
    learn, held_out = stratified_split(digits(), 0.2)
    assert (len(learn), len(held_out)) == (1437, 360)
    shares = torch.bincount(held_out.labels) / torch.bincount(digits().labels)
    assert (shares - 0.2).abs().max() < 0.006
    rows = {image.numpy().tobytes() for image in learn.read(torch.arange(len(learn)))}
    assert sum(image.numpy().tobytes() in rows for image in held_out.read(torch.arange(len(held_out)))) == 0


def test_split_follows_its_seed_and_leaves_torchs_alone():
    data = digits()
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


def encoded(image, form, **options):
    """An image as a file of a format; `image` may be the pixels of an RGB one."""
    file = io.BytesIO()
    if isinstance(image, tuple):
        image = Image.new("RGB", (16, 16), image)
    image.save(file, form, **options)
    return file.getvalue()


def png(width, depth, kind, row, *chunks):
    """A PNG file of one row, of those that Pillow does not write; chunks are (name, bytes)."""
    header = struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0)
    every = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in every
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def words(*values):
    return struct.pack(f">{len(values)}H", *values)


def frames(*colours):
    return [Image.new("RGB", (16, 16), colour) for colour in colours]


GREY16 = Image.fromarray(np.full((16, 16), 128 * 257, dtype=np.uint16))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 100, 3), dtype=np.uint8))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)
MODES = {
    "grey": (encoded(Image.new("L", (16, 16), 77), "PNG"), (77, 77, 77)),
    "1 bit": (encoded(Image.new("1", (16, 16), 1), "PNG"), WHITE),
    "palette": (encoded(Image.new("RGB", (16, 16), (200, 0, 0)).quantize(4), "PNG"), (200, 0, 0)),
    "palette, clear": (png(1, 8, 3, b"\1", (b"PLTE", bytes(6)), (b"tRNS", b"\xff\0")), WHITE),
    "palette, opaque": (png(1, 8, 3, b"\1", (b"PLTE", bytes([0, 0, 0, *GREEN])), (b"tRNS", b"\0\xff")), GREEN),
    "clear": (encoded(Image.new("RGBA", (16, 16), (0, 0, 0, 0)), "PNG"), WHITE),
    "half clear grey": (encoded(Image.new("LA", (16, 16), (100, 128)), "PNG"), (177, 177, 177)),
    "half clear grey, 16 bits": (png(1, 16, 4, words(65535, 32768)), WHITE),
    "a clear colour": (png(1, 8, 2, bytes(RED), (b"tRNS", words(*RED))), WHITE),
    "a clear grey": (png(1, 8, 0, b"\7", (b"tRNS", words(7))), WHITE),
    "grey, 16 bits": (encoded(GREY16, "PNG"), (128, 128, 128)),
    "grey, 16 bits, rounded": (png(1, 16, 0, words(200 * 257 - 128)), (200, 200, 200)),
    "white, 16 bits": (png(1, 16, 0, words(65535)), WHITE),
    "a clear grey, 16 bits": (png(1, 16, 0, words(7), (b"tRNS", words(7))), WHITE),
    "beside a clear grey, 16 bits": (png(1, 16, 0, words(7), (b"tRNS", words(8))), (0, 0, 0)),
    "grey, 16 bits, TIFF": (encoded(GREY16, "TIFF"), (128, 128, 128)),
    "grey, 32 bits, past 16": (encoded(Image.fromarray(np.full((16, 16), 2**31 - 1, np.int32)), "TIFF"), WHITE),
    "RGB, 16 bits": (png(1, 16, 2, words(0, 65535, 128 * 257)), (0, 255, 128)),
    "CMYK, as Adobe inverts it": (encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), RED),
    "CMYK, white": (encoded(Image.new("CMYK", (16, 16)), "JPEG"), WHITE),
    "CMYK, TIFF": (encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF"), RED),
    "CMYK with a profile": (encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", icc_profile=SRGB), RED),
    "first frame of a GIF": (encoded(RED, "GIF", save_all=True, append_images=frames(GREEN, WHITE)), RED),
    "first frame of a PNG": (encoded(RED, "PNG", save_all=True, append_images=frames(GREEN)), RED),
}


@pytest.mark.parametrize("name", MODES)
def test_an_image_of_any_mode_comes_out_as_rgb(name):
    file, expected = MODES[name]
    image = decode(io.BytesIO(file))
    assert image.mode == "RGB"
    assert fit(image, 8)[:, 4, 4].tolist() == list(expected)


@pytest.mark.parametrize(
    ("orientation", "corner"),
    [
        (1, (0, 0)),
        (2, (2, 0)),
        (3, (2, 1)),
        (4, (0, 1)),
        (5, (0, 0)),
        (6, (1, 0)),
        (7, (1, 2)),
        (8, (0, 2)),
        (99, (0, 0)),
    ],
)
def test_an_image_is_turned_upright(orientation, corner):
    pixels = Image.new("RGB", (3, 2))
    pixels.putpixel((0, 0), WHITE)  # TIFF's and EXIF's tag 274 says where the stored corner belongs
    exif = Image.Exif()
    exif[274] = orientation
    image = decode(io.BytesIO(encoded(pixels, "PNG", exif=exif)))
    assert image.size == ((2, 3) if 5 <= orientation <= 8 else (3, 2))
    white = [(x, y) for x in range(image.width) for y in range(image.height) if image.getpixel((x, y)) == WHITE]
    assert white == [corner]


@pytest.mark.parametrize("size", [(500, 375), (33, 200), (256, 256), (1, 500), (2, 3), (101, 67)])
def test_an_image_is_scaled_and_cropped_as_torchvision_does(size):
    drawn = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(drawn)
    for side in (8, 67, 256):
        expected = transform.center_crop(transform.resize(image, [side], antialias=True), [side, side])
        assert torch.equal(fit(image, side), transform.pil_to_tensor(expected))


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (png(4 * 10**8, 1, 0, b""), "decompression bomb"),
        (encoded(Image.new("L", (20000, 1)), "PNG"), "which a shorter side of 256 would make 5120000x256"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "floating-point numbers"),
        (encoded(NOISE, "PNG")[:5000], "truncated"),
        (b"", "of no format that Pillow reads"),
    ],
    ids=("bomb", "line", "floating point", "cut short", "empty"),
)
def test_an_image_that_cannot_be_right_is_refused(file, reason, tmp_path):
    (tmp_path / "a").write_bytes(file)
    with pytest.raises(BadImage, match=f"a' is no image, or is damaged: remove it .*({reason})"):
        read_image(tmp_path / "a", 256)


def test_a_file_that_the_disk_does_not_give_is_not_taken_for_a_bad_image(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_image(tmp_path / "nowhere", 8)


def test_files_lie_in_any_depth_and_hidden_ones_nowhere(folder):
    for path in ("cat/b/c.png", "cat/a.png", "cat/.thumbs/d.png", "cat/b/.e.png"):
        save(folder / path)
    assert class_folders(folder).files[:5] == ("cat/0.png", "cat/1.png", "cat/2.png", "cat/a.png", "cat/b/c.png")
    assert class_folders(folder).labels.tolist() == [0] * 5 + [1] * 3


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
    NOISE.save(folder / "dog" / "cut.jpg")
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


def test_the_colours_of_many_images_are_those_of_some_spread_among_them(folder, monkeypatch):
    """Of 6 images the last 3 are white; of the 2 that are looked at, one is."""
    for index, path in enumerate(sorted((folder / "cat").iterdir()) + sorted((folder / "dog").iterdir())):
        Image.new("RGB", (20, 20), "white" if index >= 3 else "black").save(path)
    data = FolderImages(class_folders(folder), 8)
    assert data.statistics().mean.tolist() == pytest.approx([0.5] * 3)
    monkeypatch.setattr(FolderImages, "SAMPLE", 2)
    assert data.statistics().mean.tolist() == pytest.approx([0.5] * 3)
    assert data.statistics(torch.tensor([0, 1, 5])).mean.tolist() == pytest.approx([0.5] * 3)
    assert data.subset(torch.tensor([3, 4, 5])).statistics().mean.tolist() == pytest.approx([1.0] * 3)
