"""`bench data`: every stage gives the data set's pixels or has no time, and the table says what limits."""

import io
import json

import pytest
import torch
from PIL import Image

from alexnet_triton.bench import data, results
from alexnet_triton.cli import main
from alexnet_triton.recipe.images import read_image

CPU = torch.device("cpu")
PIXELS = (64, 48)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Five images, so that a last batch is short."""
    return data.generate(tmp_path_factory.mktemp("files"), 5, 32, 2, CPU, PIXELS)


def stage(name):
    return next(each for each in data.STAGES if each.name == name)


def test_images_are_files_of_the_size_asked_for_with_content_at_all_scales(material):
    for form, paths in material.paths.items():
        with Image.open(paths[0]) as image:
            assert (image.size, image.format) == (PIXELS, form)
    pixels = data.photograph(500, 375, torch.Generator().manual_seed(0))
    held = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(held, "JPEG", quality=data.QUALITY)
    assert 90e3 < held.tell() < 130e3
    assert pixels.float().std() > 40
    assert not torch.equal(material.pixels[0], material.pixels[1])


@pytest.mark.parametrize("each", [*data.STAGES, data.whole_path(0)], ids=lambda each: each.name)
def test_every_stage_is_timed_and_one_whose_output_is_wrong_is_not(each, material):
    row = data.row_of(each, material, 1)
    if each.name == "copy to the device":
        assert "times" not in row
        assert row["absent"].startswith("no GPU")
        return
    assert row["times"]["alexnet_triton"]["median"] > 0
    assert row["images"] == 5
    turned = [] if each.name == "batch from memory" else [lambda outputs: outputs[::-1]]  # whose order is any
    for spoil in (*turned, lambda outputs: outputs[:-1], lambda outputs: [*outputs, outputs[0]]):
        spoilt = each._replace(begin=lambda m, spoil=spoil: lambda: spoil(list(each.begin(m)())))
        wrong = data.row_of(spoilt, material, 1)
        assert "times" not in wrong
        assert wrong["failed"]


@pytest.mark.parametrize("name", ["resize, crop, to tensor", "file to tensor (read_image)", "batch from memory"])
def test_pixels_that_differ_have_no_time(name, material):
    each = stage(name)

    def changed(outputs):
        for output in outputs:
            indices, image = output if isinstance(output, tuple) else (None, output)
            image = image.flip(-1)
            yield image if indices is None else (indices, image)

    row = data.row_of(each._replace(begin=lambda m: lambda: changed(each.begin(m)())), material, 1)
    assert "times" not in row


def test_copies_are_timed_where_there_is_a_device(material, monkeypatch):
    meta = data.Material(**{**vars(material), "device": torch.device("meta")})
    batches = list(stage("copy to the device").begin(meta)())
    assert [batch.device.type for batch in batches] == ["meta"] * 3
    monkeypatch.setattr(
        data, "in_turn", lambda functions, rounds, device: {"alexnet_triton": [float(str(device) == "cpu")]}
    )
    assert data.row_of(stage("normalise"), material, 1)["times"]["alexnet_triton"]["median"] == 1


def test_what_a_worker_does_is_timed_on_one_thread(material):
    seen = []
    threads = torch.get_num_threads()

    def begin(material):
        return lambda: [seen.append(torch.get_num_threads())]

    for where in (data.WORKER, data.HOST):
        right = data.Measure("", 0.0, 0.0)
        data.row_of(data.Stage("", begin, lambda *_, right=right: right, where=where), material, 1)
    assert seen[:3] == [threads, 1, 1]
    assert seen[3:] == [threads] * 3
    assert torch.get_num_threads() == threads


def test_workers_read_what_one_process_reads(material):
    whole = data.whole_path(1)
    assert whole.images(material) == 8
    batches = list(whole.begin(material)())
    expected = torch.stack([material.data.images[index % 5] for index in range(8)])
    torch.testing.assert_close(torch.cat(batches), material.normalise(expected))
    wrong = [batches[1], batches[0], *batches[2:]]
    assert whole.check(material, batches).holds
    assert not whole.check(material, wrong).holds
    assert not whole.check(material, batches[:1]).holds


def test_files_are_read_by_the_data_sets_own_path(material):
    files = data.ImageFiles(material.paths["PNG"], [3, 1, 4, 1, 5], 32, 7)
    assert len(files) == 7
    image, label = files[6]
    assert torch.equal(image, read_image(material.paths["PNG"][1], 32))
    assert label == 1
    assert len(list(files)) == 7


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


def test_every_row_is_written_and_the_table_says_what_limits(tmp_path, capsys):
    device = data.results.envelope("data", CPU, "")["machine"]["device"]
    model_file(tmp_path, device, 1e9)
    result = data.run(tmp_path, 2, 2, [0], 1, 32, "cpu", pixels=PIXELS, progress=False)
    assert results.read(tmp_path / "data.json", "data") == result
    assert [row["stage"] for row in result["rows"]] == [*(each.name for each in data.STAGES), "whole path, 0 workers"]
    table = capsys.readouterr().out
    assert table.startswith("The input path: CPU: ")
    assert "64x48 (JPEG " in table
    assert "A training step takes 1,000,000,000 images/s (paper, float32, batch 8, CPU: " in table
    assert "reading is what limits, though both want the same cores." in table
    result["needed"]["images_per_second"] = 1e-3
    assert "the network is what limits" in data.format_result(result)
    result["needed"]["device"] = "a card"
    assert "another machine's" in data.format_result(result)
    assert "alexnet-triton bench model" in data.format_result({**result, "needed": None})
    path = [row for row in result["rows"] if row["on_path"] and "times" in row]
    slowest = max(path, key=lambda row: row["times"]["alexnet_triton"]["median"])
    assert f"Most of an image's way: {slowest['stage']}." in table
    failed = {**result, "rows": [{**result["rows"][0], "failed": "so"}]}
    del failed["rows"][0]["times"]
    assert "no time: so" in data.format_result(failed)


def test_wrong_numbers_are_one_sentence(tmp_path, capsys):
    for wrong in ({"images": 0}, {"batch": 0}, {"rounds": 0}, {"size": 0}, {"workers": [1, -1]}):
        with pytest.raises(ValueError, match=r"must be at least [01], got (0|-1)"):
            data.run(tmp_path, **wrong)
    with pytest.raises(SystemExit):
        main(["bench", "data", "--workers=1,-1"])
    assert "must be at least 0, got -1" in capsys.readouterr().err
    assert data.default_workers()[0] == 0
    assert list(data.default_workers()) == sorted(set(data.default_workers()))
