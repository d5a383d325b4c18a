import copy
import itertools
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from matplotlib.text import Text

from alexnet_triton.bench import benchmark, plots
from alexnet_triton.bench.plots import canvas
from alexnet_triton.bench.plots.roofline import _intensity, _speed, _with_intensity
from alexnet_triton.tuning.launches import DIRECTIONS, LAYERS

MACHINE = {
    "device": "Made-up Card 80GB", "driver": "570.1", "clocks": "1980 MHz", "torch": "2.14.1",
    "triton": "3.8.0", "date": "2026-11-25", "commit": "abc123",
}  # fmt: skip
CPU = {"device": "CPU: Made-up Processor", "threads": 2, "torch": "2.14.1", "date": "2026-11-25"}
ROOFS = {"copy_gbs": 3000.0, "tflops": {"bfloat16": 790.0, "float32": 55.0}}


def seconds(median):
    return {"median": median, "p20": 0.97 * median, "p80": 1.05 * median, "samples": 30}


def layer(name="conv2", direction="forward", flop=57e9, size=66e6, **other):
    floor = max(flop / 790e12, size / 3e12)
    return {
        "variant": "paper", "layer": name, "direction": direction, "dtype": "bfloat16", "batch": 128, "flop": flop,
        "bytes": size, "floor": floor, "check": {"error": 0.1, "limit": 1.0},
        "times": {"torch": seconds(3 * floor), "alexnet_triton": seconds(1.5 * floor)}, **other,
    }  # fmt: skip


def model(batch=128, task="inference", **other):
    times = {"alexnet_triton": seconds(batch * 1e-5), "torch.compile": seconds(batch * 2e-5)}
    return {"task": task, "variant": "paper", "dtype": "bfloat16", "batch": batch, "times": times, **other}


CONFIGS = itertools.count()


def trial(time=1e-4, pruned=None, default=False, **other):
    place = {"variant": "paper", "layer": "conv2", "direction": "forward", "batch": 128, "dtype": "bfloat16"}
    config = {"block": next(CONFIGS)}
    why = {"reason": pruned, "figure": "31%"} if isinstance(pruned, str) else pruned
    time = seconds(time) if isinstance(time, float) else time
    return {**place, "config": config, "time": time, "cycles": 1e4, "pruned": why, "default": default, "chosen": False,
            **other}  # fmt: skip


def result(benchmark, rows, **other):
    return {"benchmark": benchmark, "machine": MACHINE, "method": "Median of 30 rounds", "measured": True,
            "roofs": ROOFS, "rows": rows, **other}  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(plots, "DPI", 36)


@pytest.fixture
def draw(tmp_path):
    """Draw one file's content; gives the texts of its pictures, each joined to one line."""

    def drawn(kind, content):
        path = tmp_path / "result.json"
        path.write_text(json.dumps(content))
        written = plots.run(kind, [path], tmp_path / "out")
        return [texts(each) for each in written if each.suffix == ".svg"]

    return drawn


def texts(path):
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert path.with_suffix(".png").stat().st_size > 3_000
    return " ".join(re.findall(r"<(?:text|tspan)[^>]*>([^<]+)<", path.read_text()))


def of_every_layer(**other):
    rows = []
    for number, name in enumerate(LAYERS):
        for direction in DIRECTIONS:
            if not (name.startswith("pool") and direction == "weight gradient"):
                flop = 0 if name.startswith("pool") else 0.4e9 * 1.6**number
                rows.append(layer(name, direction, flop, 66e6, **other))
    return rows


# --- what a picture shows -------------------------------------------------------------------------------------


def test_roofline_labels_every_layer_in_every_direction_and_both_roofs(draw):
    (found,) = draw("roofline", result("layers", of_every_layer()))
    for name in LAYERS:
        assert len(re.findall(rf"\b{name}\b", found)) == 3, name  # a pooling's: two, and in the caption
    for text in (*DIRECTIONS, "copy: 3,000 GB/s", "bfloat16: 790 TFLOP/s", "float32: 55.0 TFLOP/s", "FLOP per byte",
                 "alexnet_triton (fused)", "torch (unfused)", "Roofs: measured on this machine"):  # fmt: skip
        assert text in found


def test_arrows_of_the_roofline_go_from_torch_to_ours():
    row = layer(flop=8e9, size=4e6, torch_bytes=16e6)
    assert _intensity(row, "alexnet_triton") == 2000
    assert _intensity(row, "torch") == 500
    assert _intensity(layer(flop=8e9, size=4e6), "torch") == 2000
    assert _speed(layer(), "alexnet_triton", 1e12) == pytest.approx(2 * _speed(layer(), "torch", 1e12))
    (_, figure), *_ = plots.roofline(read_result(result("layers", [row])))
    (arrow,) = (text for text in figure.axes[0].texts if not text.get_text())
    assert arrow.xy == pytest.approx((2000, _speed(row, "alexnet_triton", 1e12)))
    assert arrow.xyann == pytest.approx((500, _speed(row, "torch", 1e12)))


def read_result(content):
    return plots.Result(
        None, content["benchmark"], content["machine"], content["method"], content["measured"], content["roofs"],
        content["rows"], [],
    )  # fmt: skip


CROWD = [layer(f"a long name, number {number}", flop=9e12, size=1e6) for number in range(4)]


@pytest.mark.parametrize(("rows", "counts"), [(of_every_layer(), (11, 11, 8)), (CROWD, (4,))], ids=["all", "crowd"])
def test_names_on_the_roofline_neither_overlap_nor_leave_the_axes(rows, counts):
    (_, figure), *_ = plots.roofline(read_result(result("layers", rows)))
    figure.draw_without_rendering()
    for axes, count in zip(figure.axes, counts, strict=True):
        frame = axes.get_window_extent()
        names = [text for text in axes.texts if text.get_text() in {row["layer"] for row in rows}]
        boxes = [Text.get_window_extent(text) for text in names]  # without an annotation's line to its point
        assert len(boxes) == count
        for number, box in enumerate(boxes):
            assert frame.x0 < box.x0 < box.x1 < frame.x1
            assert frame.y0 < box.y0 < box.y1 < frame.y1
            assert not any(box.overlaps(other) for other in boxes[:number])


def test_bars_show_time_and_times_the_floor_of_every_layer(draw):
    (found,) = draw("layers", result("layers", [layer(), layer("pool1"), layer("conv2", "data gradient")]))
    assert found.index("pool1") < found.index("conv2")
    for text in (
        "forward",
        "data gradient",
        "time (us)",
        "floor",
        "alexnet_triton",
        "torch",
        "108 us (1.50x)",
        "(3.00x)",
    ):
        assert text in found


def test_bars_spread_and_floors_all_fit_the_axes():
    wide = layer("conv3")
    wide["times"]["torch"]["p80"] = 10 * wide["times"]["torch"]["median"]
    for rows in ([layer(), wide], [layer(floor=1.0)]):
        (_, figure), *_ = plots.layers(read_result(result("layers", rows)))
        (axes,) = figure.axes
        assert len(axes.texts) == 2 * len(rows)
        assert all(0 < text.xy[0] < axes.get_xlim()[1] for text in axes.texts)


def test_throughput_has_a_line_a_peer_and_a_panel_a_task_variant_and_dtype(draw):
    rows = [model(), model(1), model(1, "training step", absent={"dali": "is not installed"})]
    (found,) = draw("throughput", result("model", [*rows, {**rows[0], "dtype": "float32"}]))
    for text in ("inference, paper, bfloat16", "training step, paper, bfloat16", "inference, paper, float32",
                 "alexnet_triton", "torch.compile", "batch size (images)", "throughput (images/s)", "128",
                 "dali: is not installed"):  # fmt: skip
        assert text in found


def test_throughput_is_images_over_the_median():
    (_, figure), *_ = plots.throughput(read_result(result("model", [model(64), model(1)])))
    ours, theirs = (container.lines[0] for container in figure.axes[0].containers)
    assert list(ours.get_xdata()) == [1, 64]
    assert list(ours.get_ydata()) == pytest.approx([1e5, 1e5])
    assert list(theirs.get_ydata()) == pytest.approx([5e4, 5e4])


def test_throughput_takes_lpips_files_too(draw):
    row = {"task": "forward", "dtype": "float32", "batch": 8, "size": 64, "times": {"alexnet_triton": seconds(1e-3)}}
    (found,) = draw("throughput", result("lpips", [row]))
    assert "forward, 64 pixels, float32" in found


def test_tuning_shows_the_chosen_over_the_default_and_counts_reasons(draw):
    rows = [
        trial(1.5e-4, chosen=True), trial(2e-4, default=True), trial(3e-4),
        trial(None, "too many products fall outside the answer"),
        trial(None, "too many products fall outside the answer"),
        trial(None, "registers spill"),
        trial(None, "registers spill", layer="fc6"),
    ]  # fmt: skip
    (found,) = draw("tuning", result("tuning", rows))
    for text in ("Tuning of AlexNet (paper), bfloat16, batch 128", "conv2 forward", "fc6 forward", "0.75", "timed (3)",
                 "too many products fall outside the answer (2)", "registers spill (2)", "nothing was timed",
                 "time over the default&#x27;s (ratio)", "(count)"):  # fmt: skip
        assert text.replace("&#x27;", "'") in found
    assert "estimate" not in found


def test_a_dry_run_of_tuning_is_called_an_estimate_and_compares_cycles(draw):
    rows = [trial(None, default=True), trial(None, "registers spill", cycles=1e3), trial(None, cycles=8e3, chosen=True)]
    (found,) = draw("tuning", result("tuning", [*rows, trial(None, layer="pool1", cycles=None)], measured=False))
    for text in ("Dry run of tuning of AlexNet (paper)", "a model's estimate for Made-up Card 80GB", "0.80",
                 "modelled cycles over the default's (ratio)", "would be timed (3)",
                 "the model has no cycles of it"):  # fmt: skip
        assert text in found
    (_, figure), *_ = plots.tuning(read_result(result("tuning", rows, measured=False)))
    assert list(figure.axes[0].lines[0].get_xdata()) == [1.0, 0.8]  # what was pruned is compared with nothing


@pytest.mark.parametrize(
    ("kind", "benchmark", "row"),
    [("roofline", "layers", layer()), ("layers", "layers", layer()), ("throughput", "model", model()),
     ("tuning", "tuning", trial(default=True))],
)  # fmt: skip
def test_the_caption_names_device_versions_and_method_and_the_title_a_cpu(draw, kind, benchmark, row):
    (found,) = draw(kind, result(benchmark, [row]))
    for text in ("Made-up Card 80GB", "driver 570.1", "clocks 1980 MHz", "torch 2.14.1", "triton 3.8.0",
                 "2026-11-25", "commit abc123", "Median of 30 rounds."):  # fmt: skip
        assert text in found
    assert "CPU" not in found
    (found,) = draw(kind, result(benchmark, [row], machine=CPU))
    assert "on a CPU" in found
    assert "2 threads" in found
    assert "(fused)" not in found


@pytest.mark.parametrize("kind", ["roofline", "layers"])
def test_an_estimate_is_called_one(draw, kind):
    row = {**layer(), "estimate": 2e-4, "bound": "waves"}
    del row["times"]
    content = result("predict", [row], roofs={**ROOFS, "source": "the data sheet"}, measured=False)
    (found,) = draw(kind, content)
    assert "a model's estimate for Made-up Card 80GB" in found
    assert "alexnet_triton" in found
    assert "measured on" not in found
    assert ("Roofs: from the data sheet" if kind == "roofline" else "200 us (2.77x, waves)") in found


def test_failed_rows_are_listed_where_they_belong_and_others_have_no_picture(draw):
    failed = {**layer("fc6"), "failed": "its error 0.3 is over 0.1"}
    del failed["times"]
    other = {**failed, "batch": 1}
    of_none = {**failed, "variant": "caffe"}
    first, second = draw("layers", result("layers", [layer(), {**layer(), "batch": 1}, failed, other, of_none]))
    assert "fc6 forward paper bfloat16 batch 128: its error 0.3 is over 0.1" in first
    assert "batch 1:" not in first
    assert "fc6 forward paper bfloat16 batch 1: its error 0.3 is over 0.1" in second
    assert all("fc6 forward caffe bfloat16 batch 128" in found for found in (first, second))


def test_a_peer_without_a_time_in_one_direction_leaves_the_others_in_place(draw):
    alone = layer("conv3", "data gradient")
    del alone["times"]["torch"]
    for kind in ("roofline", "layers"):
        (found,) = draw(kind, result("layers", [layer(), alone]))
        assert "torch" in found
        assert "conv3" in found


def test_layers_without_products_stand_apart_at_their_share_of_the_copy_roof(draw):
    rows = [layer(), layer("pool1", flop=0), layer("pool5", flop=0, torch_bytes=1e9)]
    (found,) = draw("roofline", result("layers", rows))
    assert "No matrix products: pool1, pool5." in found
    assert "no matrix products" in found
    drawn, edge = _with_intensity(rows, 263.0)
    conv, *pools = drawn
    assert conv["flop"] == layer()["flop"]
    assert len({row["flop"] for row in pools}) == 2
    for row in pools:
        at = _intensity(row, "alexnet_triton")
        assert at == _intensity(row, "torch") < edge < _intensity(conv, "alexnet_triton")
        assert _speed(row, "alexnet_triton", 1) == pytest.approx(3e12 * at / 1.5)
    (found,) = draw("roofline", result("layers", rows[1:]))
    assert "pool5" in found


def test_texts_are_drawn_as_they_are_written(draw):
    rows = [layer("$conv$ & <a name that is long>"), layer()]
    (found,) = draw("layers", result("layers", rows, method="costs $5 and $6"))
    assert "$conv$ &amp; &lt;a name that is long&gt;" in found
    assert "costs $5 and $6." in found


def test_styles_differ_in_more_than_colour():
    for part in ("colour", "marker", "line", "hatch"):
        assert len({str(getattr(style, part)) for style in canvas.STYLES}) == len(canvas.STYLES)
    ours, *_ = canvas.styles_of([{"times": {"torch": 1}}, {"times": {"alexnet_triton": 1}}]).items()
    assert ours == ("alexnet_triton", canvas.STYLES[0])
    assert canvas.styles_of([{"times": {"torch": 1}}])["torch"] == canvas.STYLES[1]


# --- files ----------------------------------------------------------------------------------------------------


def test_pictures_are_named_by_what_they_show_and_are_the_same_each_time(tmp_path, capsys):
    path = tmp_path / "layers.json"
    path.write_text(json.dumps(result("layers", [layer(), {**layer(), "batch": 1, "variant": "a/b c"}])))
    first = plots.run("layers", [path], tmp_path / "new" / "out")
    assert [each.name for each in first] == [
        "layers-paper-bfloat16-batch128.png", "layers-paper-bfloat16-batch128.svg",
        "layers-a_b_c-bfloat16-batch1.png", "layers-a_b_c-bfloat16-batch1.svg",
    ]  # fmt: skip
    assert capsys.readouterr().out == "".join(f"written to {each}\n" for each in first)
    again = plots.run("layers", [path], tmp_path / "again")
    assert [each.read_bytes() for each in first] == [each.read_bytes() for each in again]


def test_files_of_several_machines_get_pictures_of_their_own(tmp_path):
    for name, machine in (("card", MACHINE), ("cpu", CPU)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result("layers", [layer()], machine=machine)))
    paths = [tmp_path / "card.json", tmp_path / "cpu.json"]
    written = plots.run("layers", paths, tmp_path)
    assert [each.name for each in written[::2]] == [
        "layers-card-paper-bfloat16-batch128.png",
        "layers-cpu-paper-bfloat16-batch128.png",
    ]
    with pytest.raises(ValueError, match="two results are called card"):
        plots.run("layers", [paths[0], paths[0]], tmp_path)


@pytest.mark.parametrize(("kind", "name"), [("roofline", "layers"), ("layers", "layers"), ("throughput", "model")])
def test_without_results_the_machine_is_measured_first(tmp_path, monkeypatch, kind, name):
    def run(measured, out):
        out.mkdir()
        rows = [layer()] if measured.name == "layers" else [model()]
        (out / f"{measured.name}.json").write_text(json.dumps(result(name, rows)))

    monkeypatch.setattr(benchmark, "run", run)
    assert all(path.exists() for path in plots.run(kind, out=tmp_path / "out"))


def test_tuning_is_never_run_for_a_picture(tmp_path):
    with pytest.raises(ValueError, match="give the log by --results"):
        plots.run("tuning", out=tmp_path)


def changed(path, value):
    """A layers file's content with one thing changed, or with `KeyError` taken out."""
    content = copy.deepcopy(result("layers", [layer()]))
    *way, last = path
    place = content
    for step in way:
        place = place[step]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return json.dumps(content)


WRONG = {
    "no JSON": ("{", "no JSON file"),
    "a list": ("[]", "no benchmark's name"),
    "binary": (b"\xff\xfe\x00", "no JSON file"),
    "another benchmark": (changed(["benchmark"], "model"), 'holds benchmark "model", expected "layers"'),
    "no machine": (changed(["machine"], KeyError), "does not name its machine"),
    "no rows": (changed(["rows"], []), "has no rows"),
    "rows of texts": (changed(["rows"], ["a"]), "row 0 is no object"),
    "no layer": (changed(["rows", 0, "layer"], KeyError), 'row 0: "layer" must be a text, got null'),
    "half a batch": (changed(["rows", 0, "batch"], 0.5), '"batch" must be a count from 1 on, got 0.5'),
    "a floor of zero": (changed(["rows", 0, "floor"], 0), '"floor" must be a positive number, got 0'),
    "operations that are no number": (changed(["rows", 0, "flop"], float("nan")), '"flop" must be .* got NaN'),
    "no times": (changed(["rows", 0, "times"], {}), 'neither "times" nor "failed"'),
    "a negative time": (changed(["rows", 0, "times", "torch", "p20"], -1), '"p20" of torch must be positive seconds'),
    "a summary that is none": (changed(["rows", 0, "times", "torch"], 3), '"median" of torch must be positive seconds'),
    "the same twice": (json.dumps(result("layers", [layer(), layer()])), "row 1 is for the same as row 0"),
    "all failed": (changed(["rows", 0, "failed"], "too far off"), "all 1 failed. conv2 .*: too far off"),
    "no roofs": (changed(["roofs"], KeyError), '"roofs" must hold'),
    "a list of roofs": (changed(["roofs", "tflops"], [790]), '"roofs" must hold'),
    "another dtype's roof": (changed(["roofs", "tflops"], {"float16": 790}), "tflops.* of bfloat16"),
}


@pytest.mark.parametrize(("content", "sentence"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_refused_in_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "wrong.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=sentence) as refused:
        plots.run("roofline", [path], tmp_path / "out")
    assert "wrong.json" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_file_an_unknown_plot_and_a_wrong_log_are_refused_too(tmp_path, draw):
    with pytest.raises(ValueError, match=r"none.json cannot be read: No such file"):
        plots.run("layers", [tmp_path / "none.json"], tmp_path)
    with pytest.raises(ValueError, match="one of roofline, throughput, layers, tuning, schedules, got 'pie'"):
        plots.run("pie", [], tmp_path)
    for wrong, sentence in (
        (trial("fast"), '"median" of its time must be positive seconds'),
        (trial(None, 3), '"pruned" must have a "reason" or be null, got 3'),
        (trial(cycles=-1), '"cycles" must be a positive number or null, got -1'),
        (trial(config="128x64"), '"config" must be an object, got "128x64"'),
    ):
        with pytest.raises(ValueError, match=sentence):
            draw("tuning", result("tuning", [wrong]))
    with pytest.raises(ValueError, match="row 1 is for the same as row 0"):
        draw("tuning", result("tuning", [trial(config={"block": 1}), trial(config={"block": 1})]))


def test_matplotlib_is_loaded_when_a_picture_is_drawn(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for path in Path(plots.__file__).parent.glob("*.py"):
        runpy.run_path(str(path))
