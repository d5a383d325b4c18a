import ctypes
import json
import pickle
import re
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from alexnet_triton.recipe.data import packed, sources
from alexnet_triton.recipe.data.images import FolderImages
from alexnet_triton.recipe.data.packed import open_packed, seal
from alexnet_triton.recipe.data.sets import ColourSums, DataError, LabelledImages

FILES = ("images.bin", "labels.npy", "checksums.npy", "names.txt", "offsets.npy", "dataset.json")


def pack(folder, images, bad=(), names=None):
    """Write images (N, 3, S, S) of the classes a, b, c in turn, of which those at `bad` count for bad."""
    folder.mkdir(parents=True)
    slots = images.permute(0, 2, 3, 1).contiguous().numpy()
    slots.tofile(folder / "images.bin")
    labels = np.arange(len(images)) % 3
    labels[list(bad)] = packed.PASSED_OVER
    checksums = np.array([zlib.crc32(slot.tobytes()) for slot in slots], np.uint32)
    names = names or [f"{'abc'[index % 3]}/{index}.png" for index in range(len(images))]
    about = packed.Slots(labels, checksums, names, dict.fromkeys(bad, "cut short"))
    good = torch.tensor([index for index in range(len(images)) if index not in bad])
    colours = ColourSums.of(images[good]).statistics()
    seal(folder, images.shape[-1], ("a", "b", "c"), about, colours, "a fingerprint")
    return folder


def drawn(count, size=8):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


@pytest.fixture
def images():
    return drawn(12)


@pytest.fixture
def folder(tmp_path, images):
    return pack(tmp_path / "packed", images)


def test_what_is_packed_is_read_again(folder, images):
    data = open_packed(folder)
    assert (data.name, data.classes, data.size, len(data), data.skipped) == ("packed", ("a", "b", "c"), 8, 12, [])
    assert data.labels.tolist() == [0, 1, 2] * 4
    assert [data.file_name(index) for index in (0, 11)] == ["a/0.png", "c/11.png"]
    for indices in ([3], [11, 0, 5, 5], [], list(range(12))):
        read = data.read(torch.tensor(indices, dtype=torch.int64))
        assert read.shape == (len(indices), 3, 8, 8)
        assert torch.equal(read, images[torch.tensor(indices, dtype=torch.int64)])
    in_memory = LabelledImages("", images, data.labels, data.classes)
    for found, expected in zip(data.statistics(), in_memory.statistics(), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


def test_bad_images_keep_their_slots_and_have_no_index(tmp_path, images):
    data = open_packed(pack(tmp_path / "packed", images, bad=(0, 5)))
    good = torch.tensor([1, 2, 3, 4, 6, 7, 8, 9, 10, 11])
    assert len(data) == 10
    assert data.labels.tolist() == (good % 3).tolist()
    assert torch.equal(data.read(torch.arange(10)), images[good])
    assert [data.file_name(index) for index in (0, 4)] == ["b/1.png", "a/6.png"]
    assert data.skipped == [("a/0.png", "cut short"), ("c/5.png", "cut short")]
    with pytest.raises(IndexError, match="images 0 to 9, got"):
        data.read(torch.tensor([10]))
    with pytest.raises(IndexError, match="images 0 to 9, got"):
        data.read(torch.tensor([3, -1]))


def test_file_names_may_be_anything_that_a_system_allows(tmp_path, images):
    names = [f"a/{index}" for index in range(12)]
    names[1:4] = ["a/two\nlines.png", "a/Käse 猫.png", b"a/\xff.png".decode("utf-8", "surrogateescape")]
    data = open_packed(pack(tmp_path / "packed", images, bad=(3,), names=names))
    assert [data.file_name(index) for index in range(11)] == names[:3] + names[4:]
    assert data.skipped == [(names[3], "cut short")]


def test_no_warning_and_no_change_of_the_file_by_who_writes_into_what_was_read(folder):
    before = (folder / "images.bin").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = open_packed(folder)
        data.read(torch.arange(12)).zero_()
    assert (folder / "images.bin").read_bytes() == before


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(path, place, bit=1):
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_flipped_bit_in_any_file_is_found_when_it_is_opened(name, folder):
    whole = (folder / name).read_bytes()
    for place in range(0, len(whole), 11):
        flip(folder / name, place)
        with pytest.raises(DataError, match=f"packed' is damaged: {name} .*; copy it again, or make it again"):
            open_packed(folder)
        (folder / name).write_bytes(whole)
    open_packed(folder)


def test_a_flipped_bit_of_an_image_is_found_when_it_is_read_and_its_file_is_named(folder, images):
    flip(folder / "images.bin", 7 * 192 + 100, 128)
    data = open_packed(folder)
    rest = torch.tensor([index for index in range(12) if index != 7])
    assert torch.equal(data.read(rest), images[rest])
    for _ in range(2):
        with pytest.raises(DataError, match=r"is damaged: in images.bin 'b/7.png' does not have its checksum; copy"):
            data.read(torch.tensor([3, 7]))
    data.verify = False
    assert (data.read(torch.tensor([7]))[0] != images[7]).sum() == 1


def test_an_image_is_checked_once(folder, monkeypatch):
    data = open_packed(folder)
    checked, crc32 = [], zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda pixels: checked.append(1) or crc32(pixels))
    for indices in ([0, 1], [1, 2], [0, 1, 2]):
        data.read(torch.tensor(indices))
    assert len(checked) == 3


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name, folder):
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing|no {name}"):
        open_packed(folder)


@pytest.mark.parametrize("change", [-1, -192, 1, 192, -12 * 192])
def test_an_images_file_of_another_length_is_refused(change, folder):
    content = (folder / "images.bin").read_bytes()
    (folder / "images.bin").write_bytes(content[: 2304 + change] + bytes(max(0, change)))
    with pytest.raises(DataError, match=f"images.bin has {2304 + change:,} bytes in place of 2,304"):
        open_packed(folder)


def rewrite(folder, **changes):
    path = folder / "dataset.json"
    content = {**json.loads(path.read_text()), **changes}
    content.pop("checksum")
    path.write_text(json.dumps({**content, "checksum": packed._checksum(content)}))


def test_a_newer_version_says_so_and_another_format_is_not_read(folder):
    rewrite(folder, version=2)
    with pytest.raises(DataError, match="of version 2, and this alexnet-triton reads those up to 1: upgrade"):
        open_packed(folder)
    rewrite(folder, version=1, format="other")
    with pytest.raises(DataError, match="is damaged: dataset.json"):
        open_packed(folder)
    for text in ("", "[]", "null", "{}", "\x00"):
        (folder / "dataset.json").write_text(text)
        with pytest.raises(DataError, match="is damaged: dataset.json is not what was written"):
            open_packed(folder)


def test_an_unfinished_dataset_and_none_are_told_apart(folder, tmp_path):
    (folder / "dataset.json").unlink()
    with pytest.raises(
        DataError, match="has images.bin and no dataset.json: its `alexnet-triton prepare` has not come"
    ):
        open_packed(folder)
    with pytest.raises(DataError, match="there is no packed dataset at .*nowhere"):
        open_packed(tmp_path / "nowhere")


# --- processes and memory ---------------------------------------------------------------------------------------------


class Rows(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitems__(self, indices):
        return self.data.read(torch.tensor(indices))

    def collate(self, batch):
        return batch


def test_a_dataloaders_processes_read_it(folder, images):
    rows = Rows(open_packed(folder))
    loader = DataLoader(rows, 5, num_workers=2, collate_fn=rows.collate, timeout=60)
    assert torch.equal(torch.cat(list(loader)), images)


def test_it_travels_to_another_process_as_its_path(tmp_path):
    data = open_packed(pack(tmp_path / "packed", drawn(500)))
    data.verify = False
    letter = pickle.dumps(data)
    assert len(letter) < 500
    again = pickle.loads(letter)
    assert not again.verify
    assert torch.equal(again.read(torch.arange(500)), data.read(torch.arange(500)))
    rewrite(tmp_path / "packed", source="another")
    with pytest.raises(DataError, match="has become another dataset since it was opened"):
        pickle.loads(letter)


def test_it_is_found_again_from_another_working_directory(folder, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = open_packed("packed")
    monkeypatch.chdir("/")
    assert torch.equal(pickle.loads(pickle.dumps(data)).read(torch.arange(12)), images)
    assert data.file_name(2) == "c/2.png"


def test_threads_read_at_once(tmp_path):
    images = drawn(300)
    data = open_packed(pack(tmp_path / "packed", images))
    parts = torch.randperm(300).repeat(4).split(7)
    with ThreadPoolExecutor(4) as pool:
        for part, read in zip(parts, pool.map(data.read, parts), strict=True):
            assert torch.equal(read, images[part])


def anonymous():
    """Bytes of this process's memory that no file backs, without what malloc keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="GNU/Linux says which memory is no file's",
)
def test_reading_all_images_keeps_none_of_them_in_memory(tmp_path):
    small, large = (pack(tmp_path / str(count), drawn(count, 64)) for count in (32, 2000))
    grown = []
    for folder in (small, small, large):
        before = anonymous()
        data = open_packed(folder)
        for part in torch.arange(len(data)).split(16):
            data.read(part)
        grown.append(anonymous() - before)
    assert grown[2] - grown[1] < (large / "images.bin").stat().st_size / 8


# --- sources ----------------------------------------------------------------------------------------------------------


def class_folders(folder):
    for name in "ab":
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(folder / name / "0.png")
    return folder


def test_images_are_opened_by_what_lies_there(folder, tmp_path):
    assert isinstance(sources.open_images(folder, 100), packed.PackedImages)
    found = sources.open_images(class_folders(tmp_path / "folder"), 16)
    assert isinstance(found, FolderImages)
    assert (found.size, found.classes) == (16, ("a", "b"))
    with pytest.raises(DataError, match="there is no packed dataset and no folder of class folders at .*nowhere"):
        sources.open_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty' holds 0 class folders"):
        sources.open_images(tmp_path / "empty")
    (folder / "labels.npy").unlink()
    with pytest.raises(DataError, match="is damaged"):
        sources.open_images(folder)


def test_train_and_val_are_found_where_both_are_there(tmp_path, images):
    pack(tmp_path / "train", images)
    assert sources.train_and_val(tmp_path) is None
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / ".hidden").mkdir()
    assert sources.train_and_val(tmp_path) is None
    class_folders(tmp_path / "val" / "deep")
    assert sources.train_and_val(tmp_path) == (tmp_path / "train", tmp_path / "val")
    with pytest.raises(DataError, match="holds two sets of images: name '.*train' or '.*val'"):
        sources.open_images(tmp_path)
