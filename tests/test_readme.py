"""The pages: what stands between their markers is what the committed results give."""

import json
import re
import shutil
import warnings

import pytest
from PIL import Image

from alexnet_triton import fuse
from alexnet_triton.bench import plots, readme
from alexnet_triton.bench.plots import fusion
from alexnet_triton.bench.plots.canvas import STYLES
from alexnet_triton.cli import main

SECONDS = {"median": 2.0, "p20": 1.9, "p80": 2.2, "samples": 3}
MACHINE = {"device": "CPU: made up", "threads": 2, "torch": "2.14.1", "date": "2026-11-25", "commit": "abc123"}
ROW = {"task": "inference", "variant": "paper", "dtype": "float32", "batch": 8, "times": {"alexnet_triton": SECONDS}}
MODEL = {"benchmark": "model", "machine": MACHINE, "method": "so", "measured": True, "rows": [ROW]}
PLACE = {"variant": "paper", "layer": "conv1", "direction": "forward", "dtype": "bfloat16"}
FIGURES = {
    "flop": 1e9,
    "bytes": 1e6,
    "floor": 1e-6,
    "estimate": 3e-6,
    "bound": "waves",
    "programs": 9,
    "waves": 0.1,
    "idle": 0.9,
}
CARD = {"device": "NVIDIA H100", "torch": "2.14.1", "triton": "3.8.0", "date": "2026-11-25"}
PREDICT = {
    "benchmark": "predict", "machine": CARD, "method": "", "measured": False,
    "roofs": {"copy_gbs": 3e3, "tflops": {"bfloat16": 790.0}},
    "rows": [{**PLACE, **FIGURES, "batch": batch} for batch in (1, 128, 1024)],
}  # fmt: skip

PAGE = """Before.

<!-- results: model -->
<!-- end -->

Between.

<!-- picture: throughput of model -->
<!-- end -->

<!-- results, if any: predict-h100 -->
<!-- end -->
After.
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository of two pages and one result."""
    monkeypatch.setattr(plots, "DPI", 36)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text("Nothing to fill in.\n")
    (tmp_path / "bench" / "README.md").write_text(PAGE)
    (tmp_path / "bench" / "results" / "model.json").write_text(json.dumps(MODEL))
    return tmp_path


def page(root):
    return (root / "bench" / "README.md").read_text()


# --- this repository's ------------------------------------------------------------------------------------------------


def test_the_pages_show_the_committed_results(capsys):
    assert readme.run(check=True) == 0, capsys.readouterr().out


def test_every_committed_result_is_shown_with_its_machine_versions_date_and_commit():
    shown = "".join((readme.ROOT / name).read_text() for name in readme.PAGES)
    paths = sorted((readme.ROOT / readme.RESULTS).glob("*.json"))
    assert len(paths) >= 6
    for path in paths:
        assert f"[{path.name}](" in shown
        content = json.loads(path.read_text())
        facts = content.get("machine", content)
        text = readme._table(path, "link")
        for name in ("device", "torch", "date", "commit"):
            assert facts[name] in text, (path, name)


def test_every_picture_is_small_and_every_link_leads_somewhere():
    for name in readme.PAGES:
        path = readme.ROOT / name
        for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            target = path.parent / link
            assert target.exists(), (name, link)
            assert target.suffix != ".png" or target.stat().st_size < 120_000, link


def test_no_figure_of_a_result_stands_outside_the_markers():
    """A time, a rate, a size or a share with digits that count is a result's, and is made by `readme`."""
    for name in readme.PAGES:
        prose = readme.BLOCK.sub("", (readme.ROOT / name).read_text())
        prose = re.sub(r"```.*?```", "", prose, flags=re.DOTALL)
        found = re.findall(r"\d[\d.,]*(?:%| (?:ms|us|s|images/s|MiB|GB/s|[GT]FLOP/s)\b)", prose)
        assert not found, f"{name} has {found} outside its markers: results belong into {readme.RESULTS}"


def test_the_front_pages_script_prints_one_number_twice_and_the_report_is_its_own(capsys, monkeypatch):
    """What stands in front is run as it stands, but for the patience of its timer."""
    for variable in ("TRITON_INTERPRET", "ALEXNET_TRITON_BACKEND"):  # the tests' own
        monkeypatch.delenv(variable)
    text = (readme.ROOT / "README.md").read_text()
    section = text[text.index("## One line") :]
    (script, shown, table) = re.findall(r"^```(?:python)?\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[:3]
    assert len([line for line in script.splitlines() if line]) == 15
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision in the manner of 2022
        exec(script.replace("min_run_time=5", "min_run_time=0.01"), names)
    line = re.compile(r"^(plain|fused): (\d\.\d{6}) in \d+ ms$", re.MULTILINE)
    printed, expected = line.findall(capsys.readouterr().out), line.findall(shown)
    assert [name for name, _ in printed] == [name for name, _ in expected] == ["plain", "fused"]
    assert len({number for _, number in expected}) == 1
    for (_, number), (_, other) in zip(printed, expected, strict=True):
        assert abs(float(number) - float(other)) < 2e-6  # another processor rounds otherwise
    assert str(fuse.report(names["loss"])) == table.rstrip("\n")


# --- any other --------------------------------------------------------------------------------------------------------


def test_a_page_is_filled_in_and_then_left_alone(root, capsys):
    assert readme.run(check=True, root=root) == 1
    assert "not what the results give: bench/README.md: <!-- results: model -->" in capsys.readouterr().out
    assert page(root) == PAGE
    assert not (root / "docs").exists()
    assert readme.run(root=root) == 0
    text = page(root)
    assert "```\nAlexNet: CPU: made up, 2 threads, torch 2.14.1, 2026-11-25\ninference, paper, float32, batch 8" in text
    assert "`alexnet-triton bench model` at commit abc123: [model.json](results/model.json)." in text
    assert "![throughput, on a CPU](../docs/throughput-model.png)" in text
    assert "<!-- results, if any: predict-h100 -->\n<!-- end -->\nAfter.\n" in text
    assert readme.BLOCK.sub("", text) == readme.BLOCK.sub("", PAGE)
    assert (root / "README.md").read_text() == "Nothing to fill in.\n"
    picture = root / "docs" / "throughput-model.png"
    before = picture.stat().st_mtime_ns
    assert readme.run(root=root) == 0
    assert readme.run(check=True, root=root) == 0
    assert page(root) == text
    assert picture.stat().st_mtime_ns == before


def test_a_palette_leaves_every_peer_its_colour(root, monkeypatch):
    times = dict.fromkeys(["alexnet_triton", "a", "b", "c", "d"], SECONDS)
    times = {name: {**SECONDS, "median": 1.0 + number} for number, name in enumerate(times)}
    (root / "bench" / "results" / "model.json").write_text(json.dumps({**MODEL, "rows": [{**ROW, "times": times}]}))
    monkeypatch.setattr(plots, "DPI", 120)
    readme.run(root=root)
    with Image.open(root / "docs" / "throughput-model.png") as image:
        colours = {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in image.convert("RGB").getcolors(2**24)}
    assert {style.colour for style in STYLES[: len(times)]} <= colours


@pytest.mark.parametrize("change", ["table", "result", "picture", "half a picture", "no picture"])
def test_whatever_differs_is_found_and_mended(change, root, capsys):
    readme.run(root=root)
    result, picture = root / "bench" / "results" / "model.json", root / "docs" / "throughput-model.png"
    named = "docs/throughput-model.png"
    if change == "table":
        (root / "bench" / "README.md").write_text(page(root).replace("2,000.00 ms", "1,000.00 ms"))
        named = "bench/README.md: <!-- results: model -->"
    elif change == "result":
        result.write_text(json.dumps({**MODEL, "method": "otherwise"}))
    elif change == "picture":
        Image.new("RGB", (9, 9)).save(picture)
    elif change == "half a picture":
        picture.write_bytes(b"\x89PNG")
    else:
        picture.unlink()
    capsys.readouterr()
    assert readme.run(check=True, root=root) == 1
    assert capsys.readouterr().out == f"not what the results give: {named}\n"
    readme.run(root=root)
    assert readme.run(check=True, root=root) == 0


def test_the_drawing_of_the_fusion_is_made_anew_beside_its_page(root, monkeypatch, capsys):
    monkeypatch.setattr(fusion, "DPI", 36)
    readme.run(root=root)
    (root / "docs" / "fusion.md").write_text("A page.\n")
    assert readme.run(check=True, root=root) == 1
    assert "not what the results give: docs/fusion.png" in capsys.readouterr().out
    assert not (root / "docs" / "fusion.png").exists()
    readme.run(root=root)
    assert readme.run(check=True, root=root) == 0


def test_a_result_that_comes_later_appears(root):
    readme.run(root=root)
    (root / "bench" / "results" / "predict-h100.json").write_text(json.dumps(PREDICT))
    assert readme.run(check=True, root=root) == 1
    readme.run(root=root)
    text = page(root)
    assert "A model's estimate for NVIDIA H100, not a measurement: torch 2.14.1, triton 3.8.0, 2026-11-25" in text
    assert "paper, bfloat16, batch 128\n" in text
    assert "the file has batches 1, 1,024 too" in text
    assert text.count(" conv1 forward   ") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("<!-- results: layers -->", "asks for bench/results/layers.json, which is not there"),
        ("<!-- result: model -->", "unknown marker <!-- result: model -->"),
        ("<!-- results: -->", "unknown marker"),
        ("<!-- a remark -->", "unknown marker"),
        ("<!-- picture: model -->", "unknown marker"),
        ("<!-- picture: pie of model -->", "asks for a picture 'pie': choose one of roofline"),
        ("<!-- picture: roofline of model -->", 'holds benchmark "model", expected "layers"'),
        ("<!-- results: else -->", "is a result of 'else', of which there is no table"),
        ("<!-- results: list -->", "is no result: it holds no object"),
        ("<!-- results: broken -->", "is no JSON file"),
        ("<!-- results: cpu -->", "is no result of alexnet-triton bench cpu: it lacks 'machine'"),
    ],
)
def test_a_marker_that_cannot_be_served_is_one_sentence(line, message, root):
    for name, text in {"else": "{}", "list": "[]", "broken": "{", "cpu": "{}"}.items():
        (root / "bench" / "results" / f"{name}.json").write_text(text)
    (root / "bench" / "README.md").write_text(f"{line}\n<!-- end -->\n")
    for check in (True, False):
        with pytest.raises(ValueError, match=re.escape(message)):
            readme.run(check, root)


@pytest.mark.parametrize(
    "text", ["<!-- results: model -->\n", "<!-- end -->\n", "<!-- results: model -->\n" * 2 + "<!-- end -->\n"]
)
def test_a_marker_without_its_partner_is_refused(text, root):
    (root / "bench" / "README.md").write_text(text)
    with pytest.raises(ValueError, match="stands alone"):
        readme.run(root=root)
    assert page(root) == text


def test_where_there_are_no_pages_a_sentence_says_so(root, capsys, monkeypatch):
    monkeypatch.setattr(readme.run, "__defaults__", (False, root))
    assert main(["bench", "readme"]) == 0
    shutil.rmtree(root / "bench")
    assert main(["bench", "readme", "--check"]) == 2
    assert capsys.readouterr().err == f"alexnet-triton: there is no bench/README.md in {root}: {WHY}\n"


WHY = "bench readme writes the pages of a repository's clone"
