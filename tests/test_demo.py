import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_triton import alexnet
from alexnet_triton.demo import figures, run
from alexnet_triton.recipe.data.sets import LabelledImages
from alexnet_triton.recipe.evaluate import pictures
from alexnet_triton.recipe.train.settings import History

PICTURES = ["curves.png", "guesses.png", "confusion.png", "filters.png", "learned.png"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of class folders: red and <blue> noise."""
    root, noise = tmp_path_factory.mktemp("data") / "my photographs", np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "<blue>")):
        (root / name).mkdir(parents=True)
        for index in range(6):
            pixels = noise.integers(0, 100, (80, 90, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(root / name / f"{index}.jpg")
    return root


@pytest.fixture(scope="module")
def shown(photographs, tmp_path_factory):
    """The demo's output folder and its metrics, of a short run."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "BENCH_BATCH", 2)
        patch.setattr(run, "BENCH_ROUNDS", 1)
        options = run.DemoOptions(out, photographs, "torchvision", epochs=2, batch_size=4, image_size=63)
        metrics = run.run(options, progress=False)
    return out, metrics


def test_demo_writes_its_page_pictures_numbers_and_network(shown):
    out, metrics = shown
    assert sorted(os.listdir(out)) == sorted(["index.html", "metrics.json", "packed", "run", *PICTURES])
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert metrics["data"]["learned_from"] + metrics["data"]["held_out"] == 12
    assert len(metrics["history"]["epochs"]) == 2
    assert 0 <= metrics["ten_crop_accuracy"] <= 1
    assert sum(map(sum, metrics["confusion"])) == metrics["data"]["held_out"]
    networks = [row["network"] for row in metrics["throughput"]["images_per_second"]]
    assert networks == ["alexnet_triton (torchvision)", "the same in plain layers", "torchvision"]
    assert all(row["inference"] > 0 and row["training"] > 0 for row in metrics["throughput"]["images_per_second"])


def test_the_checkpoint_is_the_network_that_was_judged(shown):
    out, metrics = shown
    model = alexnet(weights=out / "run" / "last.pt")
    assert model.classifier[6].out_features == 2
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())


class Sources(HTMLParser):
    def __init__(self):
        super().__init__()
        self.pictures, self.others = [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            assert attributes["alt"]
            self.pictures.append(attributes["src"])
        self.others += [value for name, value in attributes.items() if name in ("href", "src") and tag != "img"]


def test_page_stands_alone_and_its_pictures_are_pictures(shown):
    out, metrics = shown
    text = (out / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r"\$\{?[a-z]", text)
    sources = Sources()
    sources.feed(text)
    assert sorted(sources.pictures) == sorted(PICTURES)
    assert sources.others == ["metrics.json"]
    for name in PICTURES:
        with Image.open(out / name) as picture:
            picture.load()
            assert min(picture.size) > 50
            low, high = picture.convert("L").getextrema()
            assert high - low > 100, f"{name} is blank"
    assert f"{metrics['parameters']:,}" in text
    assert "my photographs" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_loads_every_picture(shown, tmp_path):
    out = tmp_path / "a page"
    shutil.copytree(shown[0], out)
    page = out / "index.html"
    script = (
        "<script>addEventListener('load', () => { document.body.dataset.pictures = JSON.stringify("
        "[...document.images].map(i => [i.getAttribute('src'), i.complete ? i.naturalWidth : 0])) })</script>"
    )
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", script + "</body>"), encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=5000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'data-pictures="([^"]*)"', result.stdout)
    assert found, result.stderr[-2000:]
    pictures = dict(json.loads(found[1].replace("&quot;", '"')))
    assert sorted(pictures) == sorted(PICTURES)
    assert min(pictures.values()) > 50


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_on_the_command_line_leaves_a_checkpoint_and_says_where(photographs, tmp_path):
    command = [
        sys.executable, "-m", "alexnet_triton", "demo", "--data", str(photographs), "--out", str(tmp_path / "out"),
        "--variant", "torchvision", "--image-size", "63", "--batch-size", "4", "--epochs", "500",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 90
        while not (tmp_path / "out" / "run" / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert f"so far is in {tmp_path / 'out' / 'run' / 'last.pt'}" in err
    assert "Traceback" not in err
    assert alexnet(weights=tmp_path / "out" / "run" / "last.pt").classifier[6].out_features == 2


def draw_all(path: Path, classes: int, count: int):
    names = tuple(f"a class with a long name {index}" for index in range(classes))
    data = LabelledImages("x", torch.zeros(count, 3, 8, 8).to(torch.uint8), torch.arange(count) % classes, names)
    history = History([1.0], [{"loss": 1.0, "held_out_loss": 1.0, "held_out_top1": 0.5}])
    figures.curves(history, path / "curves.png")
    pictures.confusion(torch.eye(classes).long(), names, path / "confusion.png")
    chosen = data.subset(torch.tensor(figures.choose(count)))
    figures.guesses(chosen, torch.randn(len(chosen), classes).softmax(1), path / "guesses.png")
    pictures.filters(torch.randn(5, 3, 11, 11), path / "filters.png")
    pictures.filters(torch.zeros(5, 3, 11, 11), path / "learned.png")


@pytest.mark.parametrize(("classes", "count"), [(2, 1), (3, 5), (120, 300)])
def test_pictures_take_few_and_many_classes(classes, count, tmp_path):
    draw_all(tmp_path, classes, count)
    assert sorted(os.listdir(tmp_path)) == sorted(PICTURES)
