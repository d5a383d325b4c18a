"""A model of launches on a card that is not there: its arithmetic on made figures, and what it reads from real ones.

Run as a program, this file compiles a few launches in a process that can.
"""

import json
import sys
from contextlib import redirect_stdout
from io import StringIO
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
import test_compiler
import torch

from alexnet_triton.bench import predict
from alexnet_triton.bench.cards import CARDS
from alexnet_triton.bench.checks import FULL, layers
from alexnet_triton.bench.predict import LATENCY, LAUNCH, Work, estimate, schedule
from alexnet_triton.kernels import launch
from alexnet_triton.kernels.config import ConvConfig
from alexnet_triton.tuning import loops
from alexnet_triton.tuning.launches import LAYERS, launches
from alexnet_triton.tuning.works import works
from alexnet_triton.variants import VARIANTS

H100 = CARDS["h100"]
CLOCK = H100.clock("bfloat16")


EASY = SimpleNamespace(loop=None, resident=32, warps=4)
"""A compiler's figures of which no multiprocessor could complain."""

NETWORKS = [(variant, "bfloat16", 1) for variant in VARIANTS] + [("paper", "float32", 128), ("paper", "bfloat16", 128)]


def network(variant, dtype, batch):
    """Of every layer and direction: what it cannot but do, what its launches do, and a row of the model's."""
    numbers = getattr(torch, dtype)
    shapes = dict(layers(variant, batch, FULL))
    found = []
    for (name, direction), group in predict.by_place(launches(variant, numbers, batch, H100.target)).items():
        works = [(one, predict.work_of(one.launch, EASY)) for one in group]
        least = predict.least(shapes[name], direction, numbers.itemsize)
        done = sum(2 * work.programs * work.turns * work.multiply_adds for _, work in works)
        row = predict.row_of(H100, dtype, *least, works, predict.main_launch(group).launch)
        found.append([name, direction, least, [done, sum(work.moved for _, work in works)], row])
    return found


def loops_of_launches():
    """Of every loop of a network: its kernel, turns, columns of a turn, and the length of its sum by hand."""
    lengths = {
        "conv_kernel": lambda a: min(a["share"], a["reduction"]),
        "shifted_conv_kernel": lambda a: a["reduction"],
        "weight_gradient_kernel": lambda a: a["steps_a_split"] * a["BLOCK_NPQ"],
        "gemm_kernel": lambda a: min(a["share"], a["reduction"]),
        "add_splits_kernel": lambda a: a["splits"],
        "finish_kernel": lambda a: a["splits"],
        "gate_kernel": lambda a: a["rows_padded"],
        "lrn_max_pool_kernel": lambda a: a["strip_rows"],
    }
    found = []
    made = [one.launch for batch in (1, 128) for one in launches("paper", torch.bfloat16, batch, H100.target)]
    for one in [*made, shifted()]:
        name, arguments = one.kernel.__name__, one.arguments
        if name in loops.PRODUCTS:
            loop = loops.PRODUCTS[name](arguments)
            found.append([name, loop.turns, loop.step, lengths[name](arguments)])
        elif name in loops.LOOPS:
            step = arguments["BLOCK_M"] if name == "gate_kernel" else arguments.get("UNROLL", 1)
            found.append([name, loops.LOOPS[name](arguments), step, lengths[name](arguments)])
    return found


def shifted():
    """The launch of a convolution's other loop."""
    [work] = [work for work in works("paper", torch.bfloat16, 128, H100.target) if work.place == "conv3 forward"]
    with launch.recording(H100.target) as made:
        work.again(ConvConfig(128, 128, 0, 64, 8, 4, loop="shifted"))
    return made[0]


def compiled_works():
    """Of a small convolution and a linear layer: what the model is told, and what the compiled loop does in a turn."""
    from alexnet_triton.tuning.compiler import compile_launches

    made = launches("paper", torch.bfloat16, 1, H100.target)
    made = [one for one in made if (one.layer, one.direction) in (("conv5", "forward"), ("fc8", "weight gradient"))]
    figures = compile_launches([one.launch for one in made], H100.target)
    found = []
    for one, figure in zip(made, figures, strict=True):
        loop = figure.loop and [figure.loop.multiply_adds, figure.loop.bytes]
        found.append([one.kernel, predict.work_of(one.launch, figure), loop])
    return found


if __name__ == "__main__":
    report = {
        "networks": [network(*which) for which in NETWORKS],
        "loops": loops_of_launches(),
        "compiled": compiled_works(),
    }
    with redirect_stdout(StringIO()) as out:
        predict.run("h100", "paper", [1], schedules_only=True)
    json.dump({**report, "command": out.getvalue()}, sys.stdout)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """Launches are told apart, and compiled, in a process without Triton's interpreter."""

    def make():
        result = test_compiler.run_compiled(__file__)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return test_compiler.made_once(tmp_path_factory, "predict", make)


def product(**changes):
    """A launch of two full waves of 128 x 128 x 64 tiles, a program to a multiprocessor."""
    figures = {"programs": 264, "turns": 100, "multiply_adds": 128 * 128 * 64, "issue_cycles": 100.0, "asked": 32_768}
    return Work(**{**figures, "moved": 1000, "stages": 4, "resident": 1, **changes})


# --- the arithmetic -----------------------------------------------------------------------------------------


def test_a_product_takes_its_tensor_cycles_and_a_wait_for_every_wave():
    answer = estimate(product(), H100, "bfloat16")
    assert answer.bound == "arithmetic"
    assert answer.seconds == pytest.approx(2 * (100 * 512 + LATENCY) / CLOCK + LAUNCH)


def test_programs_that_share_a_multiprocessor_hide_their_waits():
    answer = estimate(product(resident=2), H100, "bfloat16")
    assert answer.seconds == pytest.approx(2 * 100 * 512 / CLOCK + LAUNCH)


def test_a_loop_that_needs_more_than_half_of_the_issue_slots_is_bound_by_them():
    assert estimate(product(issue_cycles=256.0), H100, "bfloat16").bound == "arithmetic"
    answer = estimate(product(issue_cycles=300.0, resident=2), H100, "bfloat16")
    assert answer.bound == "issue"
    assert answer.seconds == pytest.approx(2 * 100 * 600 / CLOCK + LAUNCH)


def test_a_loop_that_asks_l2_for_more_than_it_gives_is_bound_by_it():
    answer = estimate(product(asked=64 * 700, resident=2), H100, "bfloat16")
    assert answer.bound == "L2"
    assert answer.seconds == pytest.approx(2 * 100 * 700 / CLOCK + LAUNCH)


def test_bytes_that_take_longer_than_cycles_bind():
    answer = estimate(product(moved=3 * 10**9), H100, "bfloat16")
    assert answer.bound == "memory"
    assert answer.seconds == pytest.approx(1e-3 + LAUNCH)


def test_a_program_more_than_the_card_holds_costs_a_wave():
    one, two = (estimate(product(programs=programs), H100, "bfloat16") for programs in (132, 133))
    assert two.seconds - LAUNCH == pytest.approx(2 * (one.seconds - LAUNCH))
    assert (one.bound, two.bound) == ("arithmetic", "waves")
    shared = estimate(product(programs=133, resident=2), H100, "bfloat16")
    assert shared.seconds == pytest.approx(2 * 100 * 512 / CLOCK + LAUNCH)


def test_few_stages_leave_a_short_turn_waiting():
    short = {"multiply_adds": 64 * 64 * 32, "asked": 8192, "issue_cycles": 30.0}
    answer = estimate(product(programs=132, stages=2, **short), H100, "bfloat16")
    assert answer.bound == "waves"
    assert answer.seconds == pytest.approx(101 * LATENCY / CLOCK + LAUNCH)


def test_a_loop_without_stages_waits_every_turn():
    copy = product(programs=132, multiply_adds=0, issue_cycles=0.0, asked=640.0, turns=10)
    assert estimate(copy, H100, "bfloat16").seconds == pytest.approx(10 * (LATENCY + 10) / CLOCK + LAUNCH)


@pytest.mark.parametrize("field", ["programs", "turns", "multiply_adds", "issue_cycles", "asked", "moved"])
@pytest.mark.parametrize("programs", [1, 60, 131, 132, 133, 1000])
@pytest.mark.parametrize("resident", [1, 2, 5])
def test_more_of_anything_is_never_faster(field, programs, resident):
    work = product(programs=programs, resident=resident, moved=10**8)
    more = work._replace(**{field: 2 * getattr(work, field)})
    assert estimate(more, H100, "bfloat16").seconds >= estimate(work, H100, "bfloat16").seconds


def test_what_a_multiprocessor_cannot_hold_has_no_estimate():
    with pytest.raises(ValueError, match="cannot hold one program"):
        estimate(product(resident=0), H100, "bfloat16")


@pytest.mark.parametrize(
    ("programs", "expected"),
    [(132, (1.0, 0.0, 0.0)), (264, (2.0, 0.0, 0.0)), (66, (0.5, 0.5, 0.5)), (198, (1.5, 0.5, 0.25))],
)
def test_a_schedule_tells_waves_and_what_idles_in_the_last_and_in_all(programs, expected):
    assert schedule(programs, 132) == (programs, *expected)


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_roof_is_that_of_a_clock_which_cards_have(card, dtype):
    assert 1.0e9 < card.clock(dtype) < 2.0e9
    assert card.source


# --- the networks -------------------------------------------------------------------------------------------


FLOORS = {"conv1": (27.0, 114.0), "conv2": (57.3, 66.3), "conv3": (38.3, 29.5), "fc6": (9.7, 78.9), "fc8": (1.0, 9.5)}
"""GFLOP and MB of the paper's layers forward, batch 128, bfloat16, counted by hand from their shapes."""


def test_a_floor_counts_what_the_layers_shapes_say():
    shapes = dict(layers("paper", 128, FULL))
    for name, expected in FLOORS.items():
        flop, moved = predict.least(shapes[name], "forward", 2)
        assert (round(flop / 1e9, 1), round(moved / 1e6, 1)) == expected


@pytest.mark.parametrize("which", NETWORKS, ids=str)
def test_no_estimate_is_below_its_floor_and_no_tile_is_forgotten(which, reported):
    found = reported["networks"][NETWORKS.index(which)]
    assert len(found) == 30  # every layer forward and to its input, the eight with parameters to them too
    for name, direction, least, done, row in found:
        assert done[0] >= least[0], (name, direction)
        assert done[1] >= least[1], (name, direction)
        assert row["estimate"] >= row["floor"] > 0, (name, direction)


def test_the_turns_of_every_loop_cover_its_sum_and_no_more(reported):
    assert {name for name, *_ in reported["loops"]} == {*loops.PRODUCTS, *loops.LOOPS}
    for name, turns, step, length in reported["loops"]:
        assert 0 <= turns * step - length < step, name


def test_compiled_launches_give_the_model_its_figures(reported):
    works = [(kernel, Work(*figures), loop) for kernel, figures, loop in reported["compiled"]]
    assert {"conv_kernel", "pack_kernel", "gemm_kernel"} <= {kernel for kernel, *_ in works}
    for kernel, work, loop in works:
        assert work.resident >= 1
        assert (work.multiply_adds > 0) == (kernel in loops.PRODUCTS)
        assert estimate(work, H100, "bfloat16").seconds > LAUNCH
        if kernel == "conv_kernel":
            assert work.issue_cycles > 0
            assert loop == [work.multiply_adds, work.asked]  # what the machine code says of a turn, and the arguments


# --- the command --------------------------------------------------------------------------------------------


def rows():
    """Three layers' rows, whose estimates are 2, 8 and 4 times their floors."""
    place = {"variant": "paper", "direction": "forward", "dtype": "bfloat16", "batch": 128}
    figures = {"flop": 1, "bytes": 1, "programs": 100, "waves": 0.75, "idle": 0.25, "bound": "waves"}
    return [
        {**place, **figures, "layer": name, "floor": floor * 1e-6, "estimate": times * floor * 1e-6}
        for name, floor, times in (("conv1", 100.0, 2), ("conv2", 10.0, 8), ("fc6", 20.0, 4))
    ]


def test_a_table_names_what_is_furthest_from_its_floor_and_where_the_time_goes():
    text = predict.format_table(rows())
    assert "furthest from their floor: conv2 forward 8.0 times, fc6 forward 4.0 times, conv1 forward 2.0" in text
    assert "most time above it: conv1 forward 100.0 us, conv2 forward 70.0 us, fc6 forward 60.0 us" in text
    assert "in all, 3 rows" in text
    assert "measured" not in text


def test_a_title_says_that_nothing_was_measured():
    text = predict.title(H100, "paper", "bfloat16", [128])
    assert "a model's estimate for an H100 that was not there; nothing was measured" in text


def result_file(path, device):
    times = {name: {"median": 1e-4, "p20": 1e-4, "p80": 1e-4, "samples": 9} for name in ("alexnet_triton", "torch")}
    kept = ("variant", "layer", "direction", "dtype", "batch", "flop", "bytes", "floor")
    row = {**{key: rows()[0][key] for key in kept}, "check": {"error": 0.0, "limit": 1.0}, "times": times}
    content = {"benchmark": "layers", "machine": {"device": device}, "method": "", "measured": True}
    path.write_text(
        json.dumps({**content, "roofs": {"copy_gbs": 3000.0, "tflops": {"bfloat16": 790.0}}, "rows": [row]})
    )
    return path


def test_a_measurement_stands_beside_the_estimate_with_their_ratio(tmp_path):
    times = predict.read_times(result_file(tmp_path / "layers.json", "NVIDIA H100 80GB HBM3"), H100)
    lines = predict.format_table(rows(), times).splitlines()
    assert lines[2].split()[-3:] == ["100.0", "2.00", "waves"]
    assert lines[3].split()[-3:] == ["-", "-", "waves"]


@pytest.mark.parametrize("device", ["CPU: some processor", "NVIDIA A100-SXM4-80GB"])
def test_a_measurement_of_another_machine_is_refused(tmp_path, device):
    with pytest.raises(ValueError, match=r"was measured on .*, and the estimate is for an H100"):
        predict.read_times(result_file(tmp_path / "layers.json", device), H100)


def test_schedules_that_leave_more_than_a_fifth_idle_are_marked():
    found = {
        ("conv1", "forward"): [schedule(264, 132), schedule(66, 132)],
        ("fc6", "forward"): [schedule(1000, 132)] * 2,
    }
    lines = predict.format_schedules(found, [1, 16]).splitlines()
    assert lines[2].endswith("50%!")
    assert lines[2].count("!") == 1
    assert "!" not in lines[3]
    assert lines[-1].endswith(": 1 of 4 schedules")


def test_the_command_prints_every_layers_schedule(reported):
    lines = reported["command"].splitlines()
    assert "nothing was measured" in lines[0]
    assert [line.split()[0] for line in lines if " forward " in line] == list(LAYERS)


def test_an_interpreted_process_hands_the_command_to_one_that_can_compile(tmp_path, capfd):
    assert predict.run(batches=[1], results=tmp_path / "none.json", out=tmp_path) == 2
    assert "none.json cannot be read" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"card": "h1000"}, "unknown card 'h1000': choose one of h100, h200, a100"),
        ({"variant": "alexnet"}, "unknown variant 'alexnet'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"batches": [0]}, "at least 1 image"),
        ({"batches": []}, "at least 1 image"),
    ],
)
def test_wrong_words_are_refused_in_a_sentence(told, sentence):
    with pytest.raises(ValueError, match=sentence):
        predict.run(**told)
