"""`bench data`: every stage gives the data set's pixels or has no time, and the table says what limits."""

import contextlib
import io
import json
import sys

import pytest
import torch
from PIL import Image

from alexnet_triton.bench import checks, data, results, waiting
from alexnet_triton.bench import data_memory as memory
from alexnet_triton.bench import data_stages as stages
from alexnet_triton.bench.data_paths import paths
from alexnet_triton.cli import main
from alexnet_triton.recipe.augment import Draws
from alexnet_triton.recipe.data import packed
from alexnet_triton.recipe.data.images import read_image

CPU = torch.device("cpu")
PIXELS = (64, 48)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Five images, so that a last batch is short."""
    return stages.generate(tmp_path_factory.mktemp("files"), 5, 32, 27, 2, CPU, PIXELS)


def stage(name):
    return next(each for each in stages.STAGES if each.name == name)


def row_of(each, material):
    [row] = data.rows_of([each], material, 1)
    return row


def spoilt(each, spoil):
    return each._replace(begin=lambda material: lambda: spoil(list(each.begin(material)())))


def test_images_are_files_of_the_size_asked_for_with_content_at_all_scales(material):
    for form, files in material.paths.items():
        with Image.open(files[0]) as image:
            assert (image.size, image.format) == (PIXELS, form)
    pixels = stages.photograph(500, 375, torch.Generator().manual_seed(0))
    held = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(held, "JPEG", quality=stages.QUALITY)
    assert 90e3 < held.tell() < 130e3
    assert pixels.float().std() > 40
    assert not torch.equal(material.pixels[0], material.pixels[1])


def test_files_and_the_packed_dataset_have_the_images_in_one_order(material):
    for held in (material.folder, material.packed):
        assert torch.equal(held.read(torch.arange(5)), material.data.images)
        assert torch.equal(held.labels, material.data.labels)
    assert torch.equal(material.data.images[3], read_image(material.paths["JPEG"][3], 32))


@pytest.mark.parametrize("each", stages.STAGES, ids=lambda each: each.name)
def test_every_stage_is_timed_and_one_whose_output_is_wrong_is_not(each, material):
    row = row_of(each, material)
    if each.name == "copy to the device":
        assert "times" not in row
        assert row["absent"].startswith("no GPU")
        return
    assert row["times"]["alexnet_triton"]["median"] > 0
    assert row["images"] == 5
    turned = [] if each.name == "prepare, one process" else [lambda outputs: outputs[::-1]]  # whose output is one
    for spoil in (*turned, lambda outputs: outputs[:-1], lambda outputs: [*outputs, outputs[0]]):
        wrong = row_of(spoilt(each, spoil), material)
        assert "times" not in wrong
        assert wrong["failed"]


IMAGES_AND_INPUTS = [
    "resize, crop, to tensor",
    "file to tensor (read_image)",
    "prepare, one process",
    "read packed, first epoch",
    "read packed, later epochs",
    "read from memory",
    "augment",
    "augment, torchvision",
]


@pytest.mark.parametrize("name", IMAGES_AND_INPUTS)
def test_pixels_that_differ_have_no_time(name, material):
    assert "times" not in row_of(spoilt(stage(name), lambda outputs: [x.flip(-1) for x in outputs]), material)


def test_augmentation_is_held_to_its_definition(material):
    """A corner, a mirror and a shift along one component, by hand."""
    draws = Draws(torch.tensor([0, 5]), torch.tensor([5, 0]), torch.tensor([False, True]), torch.eye(3)[:2])
    found = stages.augmented(material, material.data.images[:2], draws)
    mean, std, values, vectors = material.statistics
    first = material.data.images[0, :, 0:27, 5:32] / 255
    second = material.data.images[1, :, 5:32, 0:27].flip(2) / 255
    for one, pixels, component in zip(found, (first, second), (0, 1), strict=True):
        shift = vectors[:, component] * values[component]
        expected = (pixels + shift.view(3, 1, 1) - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        torch.testing.assert_close(one, expected, atol=1e-5, rtol=0)


def test_in_the_first_epoch_checksums_are_taken_and_later_they_are_not(material, monkeypatch):
    taken = []
    own = packed.zlib.crc32
    monkeypatch.setattr(packed.zlib, "crc32", lambda *given: taken.append(1) or own(*given))
    for name, most in (("read packed, first epoch", 5), ("read packed, later epochs", 0)):
        again = stage(name).begin(material)
        for _ in range(2):
            list(again())
            taken.clear()
        list(again())
        assert len(taken) == most


def test_copies_are_timed_where_there_is_a_device(material, monkeypatch):
    meta = stages.Material(**{**vars(material), "device": torch.device("meta")})
    batches = list(stage("copy to the device").begin(meta)())
    assert [batch.device.type for batch in batches] == ["meta"] * 3
    monkeypatch.setattr(
        data, "in_turn", lambda works, rounds, device, **_: {name: [float(str(device) == "cpu")] for name in works}
    )
    assert row_of(stage("augment"), material)["times"]["alexnet_triton"]["median"] == 1


def test_what_a_worker_does_is_timed_on_one_thread(material):
    seen = []
    threads = torch.get_num_threads()

    def begin(material):
        return lambda: [seen.append(torch.get_num_threads())]

    for where in (stages.WORKER, stages.HOST):
        right = stages.Measure("", 0.0, 0.0)
        row_of(stages.Stage("", begin, lambda *_, right=right: right, where=where), material)
    assert seen[:3] == [threads, 1, 1]
    assert seen[3:] == [threads] * 3
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("workers", [0, 2])
def test_whole_paths_give_every_image_in_its_turn_with_the_draws_of_their_own(workers, material):
    theirs, folders, ours = paths(workers)
    assert [path.whole for path in (theirs, folders, ours)] == ["ImageFolder", "FolderImages", "PackedImages"]
    assert folders.images(material) == theirs.images(material) == max(5, 8 * workers)
    for path in (theirs, folders, ours):
        batches = list(path.begin(material)())
        assert sum(map(len, batches)) == path.images(material)
        assert batches[0].shape == (2, 3, 27, 27)
        assert path.check(material, batches).holds
        for wrong in (
            [batches[1], batches[0], *batches[2:]],
            batches[:-1],
            [*batches[:-1], batches[-1].flip(3)],
            [*batches[:-1], batches[-1] + 1e-3],
        ):
            assert not path.check(material, wrong).holds


def test_whole_paths_are_timed_in_turn_and_again_with_other_draws(material):
    theirs, _, ours = paths(0)
    again = theirs.begin(material)
    assert theirs.check(material, again()).holds
    broken = ours._replace(name="broken", check=lambda *_: stages.Measure("it", 1.0, 0.0))
    rows = data.rows_of([theirs, broken, ours], material, 2)
    assert [("times" in row, "failed" in row) for row in rows] == [(True, False), (False, True), (True, False)]
    assert rows[2]["times"]["alexnet_triton"]["samples"] == 2


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [b"", bytes(range(48))], ids=["zeros", "a pattern"])
def test_a_dataset_whose_content_does_not_matter_is_whole(block, tmp_path):
    held = memory.packed_set(tmp_path / "a", 5, 4, block)
    images = held.read(torch.arange(5))  # which holds them to their checksums
    expected = torch.tensor(list(block or bytes(48)), dtype=torch.uint8).view(4, 4, 3).permute(2, 0, 1)
    assert all(torch.equal(image, expected) for image in images)
    assert held.labels.tolist() == [0, 1, 0, 1, 0]


@pytest.mark.skipif(not memory.STATUS.exists(), reason="no /proc")
def test_the_memory_is_that_of_a_process_that_reads_a_dataset(tmp_path):
    folder = memory.packed_set(tmp_path / "a", 20, 64).folder
    assert 50e6 < memory.after_an_epoch(folder, 56) < 2e9


def test_memory_that_grows_as_the_images_has_no_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 0)

    def process(kept):
        return lambda folder, crop: 100_000 + kept * (folder / packed.IMAGES).stat().st_size

    monkeypatch.setattr(memory, "after_an_epoch", process(0))
    row = memory.row(16, 8, (4, 8))
    assert row["bytes"] == [100_000, 100_000]
    assert row["images"] == [4, 8]
    monkeypatch.setattr(memory, "after_an_epoch", process(1))
    row = memory.row(16, 8, (4, 8))
    assert "bytes" not in row
    assert row["check"]["error"] == pytest.approx(1)
    assert row["failed"]


def test_without_proc_the_memory_is_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    assert memory.row(16, 8)["absent"] == f"RssAnon in {tmp_path / 'status'}"
    (tmp_path / "status").write_text("Name: x\nRssAnon:\t  12 kB\n")
    assert memory.anonymous_bytes() == 12 * 1024


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_training_that_waits_for_images_fails(monkeypatch):
    for share, holds in ((0.04, True), (0.06, False)):
        monkeypatch.setattr(waiting, "training", lambda *_, share=share: {"waiting": share, "images_per_second": 1.0})
        [measure] = waiting.check_waiting("paper", 2, checks.TINY, CPU)
        assert measure.holds == holds


def test_training_tells_its_second_epochs_share(monkeypatch):
    """On torch's layers: the interpreter takes long."""
    monkeypatch.setattr(waiting, "use_backend", lambda name: contextlib.nullcontext())
    found = waiting.training("torchvision", 1, checks.TINY._replace(thin=16), CPU)
    assert found["images_per_second"] > 0
    assert 0 <= found["waiting"] < 1


def test_a_package_that_training_lacks_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "alexnet_triton.recipe.train.loop", None)
    with pytest.raises(checks.Absent, match=r"^alexnet_triton.recipe.train.loop, which training needs"):
        waiting.training("paper", 1, checks.TINY, CPU)


# --- the file and the table -------------------------------------------------------------------------------------------


def model_file(folder, device, rate):
    seconds = {"median": 8 / rate, "p20": 8 / rate, "p80": 8 / rate, "samples": 3}
    row = {"variant": "paper", "dtype": "float32", "batch": 8, "times": {"alexnet_triton": seconds}}
    slow = {**row, "batch": 1}
    rows = [{"task": "training step", **slow}, {"task": "training step", **row}, {"task": "inference", **row}]
    machine = {"device": device, "date": "2026-11-25"}
    content = {"benchmark": "model", "machine": machine, "method": "", "measured": True, "rows": rows}
    folder.mkdir(exist_ok=True)
    (folder / "model.json").write_text(json.dumps(content))
    return folder / "model.json"


def test_what_a_step_takes_is_the_fastest_of_the_first_file(tmp_path):
    first = model_file(tmp_path / "a", "CPU: a", 100)
    second = model_file(tmp_path / "b", "CPU: b", 200)
    found = data.needed([tmp_path / "none.json", first, second])
    assert found["images_per_second"] == pytest.approx(100)
    assert (found["batch"], found["device"]) == (8, "CPU: a")
    assert data.needed([tmp_path / "none.json"]) is None
    second.write_text("{")
    with pytest.raises(ValueError, match="is no JSON file"):
        data.needed([second])


def test_every_row_is_written_and_the_table_says_what_limits(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "row", lambda *_: {"stage": memory.NAME, "images": [1, 2], "bytes": [3e6, 4e6]})
    device = results.envelope("data", CPU, "")["machine"]["device"]
    model_file(tmp_path, device, 1e9)
    result = data.run(tmp_path, 2, 2, [0], 1, 32, 27, "cpu", pixels=PIXELS, progress=False)
    assert results.read(tmp_path / "data.json", "data") == result
    whole = [f"{name}, 0 workers" for name in ("ImageFolder", "FolderImages", "PackedImages")]
    names = [*(each.name for each in stages.STAGES), *whole, memory.NAME]
    assert [row["stage"] for row in result["rows"]] == names
    table = capsys.readouterr().out
    assert table.startswith("The input path: CPU: ")
    assert "64x48 (JPEG " in table
    assert "to 32x32, cut to 27x27, batches of 2" in table
    assert "3 MB (1 images), 4 MB (2 images)" in table
    assert "A training step takes 1,000,000,000 images/s (paper, float32, batch 8, CPU: " in table
    assert "reading is what limits, though both want the same cores." in table
    result["needed"]["images_per_second"] = 1e-3
    assert "the network is what limits" in data.format_result(result)
    result["needed"]["device"] = "a card"
    assert "another machine's" in data.format_result(result)
    assert "alexnet-triton bench model" in data.format_result({**result, "needed": None})
    for way, words in (("folders", "from folders"), ("packed", "when packed")):
        path = [row for row in result["rows"] if way in row.get("ways", ()) and "times" in row]
        slowest = max(path, key=lambda row: row["times"]["alexnet_triton"]["median"])
        assert f"Most of an image's way {words}: {slowest['stage']}." in table
    failed = {**result, "rows": [{**result["rows"][0], "failed": "so"}]}
    del failed["rows"][0]["times"]
    assert "no figure: so" in data.format_result(failed)


def test_the_ratio_is_of_the_fastest_of_each(tmp_path, monkeypatch):
    def row(whole, workers, seconds, images=10):
        times = {"alexnet_triton": {"median": seconds}}
        return {"stage": f"{whole}, {workers}", "whole": whole, "ways": [], "images": images, "times": times}

    rows = [row("ImageFolder", 0, 4), row("ImageFolder", 2, 2), row("FolderImages", 2, 0.01)]
    rows += [row("PackedImages", 0, 1), row("PackedImages", 1, 0.5, 20), row("PackedImages", 2, 3)]
    head = {**results.envelope("data", CPU, ""), "needed": None}
    head["machine"]["pillow"] = "13"
    head["files"] = {"width": 1, "height": 1, "size": 1, "crop": 1, "batch": 1, "bytes": {}}
    table = data.format_result({**head, "rows": rows})
    assert "PackedImages, 1, over ImageFolder, 2, with the same augmentation: 8.0 times (aim: 5)." in table
    assert "times (aim" not in data.format_result({**head, "rows": rows[:3]})


def test_wrong_numbers_are_one_sentence(tmp_path, capsys):
    for wrong in ({"images": 0}, {"batch": 0}, {"rounds": 0}, {"size": 0}, {"workers": [1, -1]}):
        with pytest.raises(ValueError, match=r"must be at least [01], got (0|-1)"):
            data.run(tmp_path, **wrong)
    with pytest.raises(ValueError, match="a crop of 9 pixels a side cannot be cut from images of 8"):
        data.run(tmp_path, size=8, crop=9)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main(["bench", "data", "--workers=1,-1"])
    assert "must be at least 0, got -1" in capsys.readouterr().err
    assert data.default_workers()[0] == 0
    assert list(data.default_workers()) == sorted(set(data.default_workers()))
