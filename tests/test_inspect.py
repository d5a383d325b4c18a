"""The command that compiles a network's launches and holds them to budgets.

Run as a program, this file inspects one target in a process that can compile.
"""

import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
import test_compiler
import torch

from alexnet_triton import cli
from alexnet_triton.cli import words
from alexnet_triton.kernels.target import TARGETS
from alexnet_triton.tuning import inspect, launches
from alexnet_triton.tuning.compiler import Compiled, Loop
from alexnet_triton.variants import VARIANTS

HALF, FULL = torch.bfloat16, torch.float32
report = test_compiler.compiled  # a fixture: one process compiles what both files look at


def every_variant(target):
    reports = {}
    for variant in VARIANTS:
        rows = inspect.inspect(variant, target=target)
        reports[variant] = json.loads(inspect.as_json(rows, variant, "bfloat16", 128, target))
    return reports


if __name__ == "__main__":
    json.dump(every_variant(sys.argv[1]), sys.stdout)


# --- the network --------------------------------------------------------------------------------------------


BUDGETED = ("sm_80", "sm_90", "gfx942")


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """The reports of every target, two made at a time: pytest-xdist hands neighbouring tests to one worker."""

    def make():
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(lambda target: test_compiler.run_compiled(__file__, target), BUDGETED))
        assert not any(result.returncode for result in results), "".join(result.stderr for result in results)
        return f"[{','.join(result.stdout for result in results)}]"

    return dict(zip(BUDGETED, test_compiler.made_once(tmp_path_factory, "networks", make), strict=True))


@pytest.mark.parametrize("target", BUDGETED)
def test_every_budget_holds(target, networks):
    reports = networks[target]
    broken = {
        f"{variant} {row['layer']} {row['direction']}: {row['kernel']} {sentence}"
        for variant, report in reports.items()
        for row in report["rows"]
        for sentence in row["broken"]
    }
    assert not broken, "\n".join(sorted(broken))
    for place, allowed in inspect.EXCEPTIONS.items():
        shares = [
            row["issue_share"]
            for report in reports.values()
            for row in report["rows"]
            if place == (target, row["layer"], row["direction"]) and row["kind"] == "product"
        ]
        assert not shares or max(shares) >= inspect.MOST_ISSUE_SHARE, f"{place} needs its exception no more: {allowed}"
    for report in reports.values():
        products = [(row["layer"], row["direction"]) for row in report["rows"] if row["kind"] == "product"]
        layers = [layer for layer in launches.LAYERS if not layer.startswith("pool")]
        assert sorted(products) == sorted((layer, direction) for layer in layers for direction in launches.DIRECTIONS)
        maps = {(row["layer"], row["direction"]) for row in report["rows"] if row["kind"] == "map"}
        pools = {(f"pool{n}", direction) for n in (1, 2, 5) for direction in launches.DIRECTIONS[:2]}
        assert maps == {*pools, launches.UPDATE}
        [images] = [row for row in report["rows"] if row["kind"] == "bytes"]
        assert (images["layer"], images["direction"], images["kernel"]) == (*launches.IMAGES, "augment_kernel")
        for row in report["rows"]:  # no kernel that multiplies matrices passes for something else
            assert row["kind"] == "product" or not row["compiled"]["has_product"], row


def test_exceptions_name_what_there_is():
    for (target, layer, direction), allowed in inspect.EXCEPTIONS.items():
        assert target in TARGETS
        assert layer in launches.LAYERS
        assert direction in launches.DIRECTIONS
        assert allowed.issue_share >= inspect.MOST_ISSUE_SHARE
        assert allowed.reason


# --- budgets ------------------------------------------------------------------------------------------------

LOOP = Loop(
    instructions=128, matrix_instructions=8, multiply_adds=1 << 20, loads={128: 16}, bytes=32_768, tensor_cycles=512.0
)
GOOD = Compiled(
    kernel="gemm_kernel", warps=4, stages=3, registers=128, spilled_bytes=0, shared_memory=98_304, tensor_memory=0,
    has_product=True, instructions=1_000, matrix_instructions=8, loads={128: 48}, copy_engine_loads=0, loop=LOOP,
    resident=2, limited_by="shared memory",
)  # fmt: skip


def broken(compiled, kind="product", target="sm_90", dtype=HALF, allowed=None, slack=1.0):
    return inspect.broken_budgets(compiled, kind, TARGETS[target], dtype, allowed, slack)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["product", "map", "copy"])
def test_a_good_kernel_breaks_none(target, kind):
    assert broken(replace(GOOD, shared_memory=49_152), kind, target) == []


def test_spills():
    assert broken(replace(GOOD, spilled_bytes=8), "copy") == ["spills 8 bytes a thread, expected none"]


def test_shared_memory():
    large = replace(GOOD, shared_memory=232_449, resident=0)
    assert broken(large) == ["takes 232,449 bytes of shared memory, the target has 232,448"]
    assert broken(replace(GOOD, shared_memory=232_448)) == []
    crowded = replace(GOOD, resident=0, limited_by="registers")
    assert broken(crowded) == ["does not fit a multiprocessor, for its registers"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensor_cores_in_products_of_half_precision(dtype):
    plain = replace(GOOD, matrix_instructions=0, loop=None, shared_memory=49_152)
    sentence = "has no tensor-core instruction, expected them in every product of 16-bit numbers"
    assert broken(plain, "product", "sm_80", dtype) == [sentence]
    assert broken(plain, "product", "gfx942", dtype) == [sentence]
    assert broken(plain, "product", "sm_80", FULL) == []
    assert broken(plain, "map", "sm_80", dtype) == []


def test_widths_of_loads():
    narrow = replace(GOOD, loop=replace(LOOP, loads={16: 2, 128: 16}))
    assert broken(narrow) == ["loads fewer than 16 bytes at once in its main loop (2 of 2 bytes), expected 16"]
    straight = replace(GOOD, loop=None, matrix_instructions=0, loads={32: 1, 64: 8})
    assert broken(straight, "map") == ["loads at most 8 bytes at once, expected 16"]
    assert broken(straight, "copy") == []  # copies take tensors as users have them
    assert broken(replace(GOOD, loop=replace(LOOP, loads={}), loads={32: 1}, copy_engine_loads=4)) == []


def test_images_are_augmented_as_fast_as_memory_moves_them():
    single = replace(GOOD, loop=None, loads={8: 24}, shared_memory=0)  # bytes, which no load can join
    images, out = torch.empty(13_000, dtype=torch.uint8), torch.empty(13_000, dtype=torch.bfloat16)
    made = SimpleNamespace(programs=3, tensors={"images": images, "out": out})
    assert inspect.loops.issuing(made, single) == 1.0  # 3,000 cycles for three programs of four warps, and for 39 kB

    def of(issuing, target="sm_90"):
        return inspect.broken_budgets(single, "bytes", TARGETS[target], HALF, issuing=issuing)

    assert of(1.0) == []
    assert of(1.25) == ["takes 1.25 of its bytes' time to issue its instructions, expected at most 1"]
    assert of(1.25, "gfx942") == []


def test_issue_share_on_hopper():
    def of(instructions):
        return replace(GOOD, loop=replace(LOOP, instructions=instructions))

    assert of(255).issue_share == 255 / 512
    assert broken(of(255)) == []
    assert broken(of(256)) == ["has an issue share of 0.50, expected under 0.5"]
    assert broken(of(256), "map") == []
    assert broken(of(256), dtype=FULL) == []
    assert broken(of(2560), target="sm_80") == []
    straight = replace(GOOD, loop=None)
    assert broken(straight) == ["has no main loop whose issue share could be told"]


def test_an_exception_may_fall_and_not_rise():
    def of(instructions):
        return replace(GOOD, loop=replace(LOOP, instructions=instructions))

    allowed = inspect.Allowed(0.75, "a reason")
    assert broken(of(384), allowed=allowed) == []
    assert broken(of(300), allowed=allowed) == []
    assert broken(of(385), allowed=allowed) == ["has an issue share of 0.75, its exception allows 0.75"]


def test_where_data_take_longer_than_products_the_share_is_of_that_time():
    over = replace(GOOD, loop=replace(LOOP, instructions=384))
    assert broken(over) == ["has an issue share of 0.75, expected under 0.5"]
    assert broken(over, slack=1.4) == ["has an issue share of 0.75, expected under 0.7"]
    assert broken(over, slack=1.6) == []


def conv_launch(images, filters=128):
    """A product of 128 x 128 tiles over `images` images of 128 pixels, nine turns each."""
    x = torch.empty(images * 128, 64, dtype=HALF, device="meta")
    y = torch.empty(images * 128, filters, dtype=HALF, device="meta")
    blocks = {"BLOCK_NPQ": 128, "BLOCK_K": 128, "EXTRA_K": 0, "BLOCK_CRS": 64}
    arguments = {"x": x, "y": y, "share": 576, "reduction": 576, "products": images * filters // 128, **blocks}
    return SimpleNamespace(
        kernel=SimpleNamespace(__name__="conv_kernel"), programs=images, arguments=arguments, tensors={"x": x, "y": y}
    )


def test_slack_is_what_the_cache_or_memory_takes_beyond_the_products():
    h100 = TARGETS["sm_90"]
    assert inspect.loops.slack(conv_launch(132), GOOD, h100) == 1.0  # 32,768 bytes in 512 cycles: 64 a cycle
    asks_more = replace(GOOD, loop=replace(LOOP, bytes=49_152))
    assert inspect.loops.slack(conv_launch(132), asks_more, h100) == 1.5
    one_turn = conv_launch(132)
    one_turn.arguments |= {"share": 64, "reduction": 64}
    moved = 132 * 128 * (64 + 128) * 2
    assert inspect.loops.slack(one_turn, GOOD, h100) == pytest.approx(moved / (132 * 13) / 512)


# --- the table ----------------------------------------------------------------------------------------------


def row(**changes):
    good = inspect.Row("conv3", "weight gradient", "weight_gradient_kernel", "product", 12_288, GOOD, ())
    return replace(good, **changes)


def test_the_table_is_aligned_and_fits():
    wide = replace(GOOD, shared_memory=232_448, spilled_bytes=1_234, limited_by="tensor memory")
    rows = [
        row(),
        row(compiled=wide, broken=("spills 1,234 bytes",)),
        row(compiled=None, broken=("does not compile: why",)),
    ]
    allowed = inspect.Allowed(0.61, "for a reason")
    rows.append(row(layer="conv1", direction="forward", kernel="lrn_max_pool_backward_kernel", allowed=allowed))
    text = inspect.format_table(rows)
    lines = text.splitlines()
    assert max(map(len, lines)) < 120
    assert [line[0] for line in lines[2:6]] == [" ", "!", "!", "*"]
    starts = {line.index("4x3") for line in (lines[2], lines[3], lines[5])}
    assert len(starts) == 1
    assert "! conv3 weight gradient: weight_gradient_kernel spills 1,234 bytes" in lines
    assert "* conv1 forward: lrn_max_pool_backward_kernel may have an issue share of 0.61, for a reason" in lines


def test_figures_of_a_row():
    cells = dict(zip(inspect.HEADER, inspect._cells(row()), strict=True))
    assert cells == {
        "layer": "conv3", "direction": "weight grad", "kernel": "weight_gradient", "grid": "12,288", "warps": "4x3",
        "regs": "128", "spill": "0", "shared": "98,304", "mma": "8", "loop": "128", "issue": "0.25", "L2": "64",
        "load": "128", "fit": "2 shared memory",
    }  # fmt: skip
    mixed = replace(GOOD, loop=replace(LOOP, loads={16: 1, 128: 8}))
    assert inspect._cells(row(compiled=mixed))[12] == "16-128"
    assert inspect._cells(row(compiled=replace(GOOD, copy_engine_loads=4)))[12] == "tile"


# --- the command --------------------------------------------------------------------------------------------


def test_names_of_dtypes_on_the_command_line(monkeypatch):
    asked = []
    monkeypatch.setattr(inspect, "run", lambda target, variant, dtype, *rest: asked.append(dtype))
    short = ("bf16", "fp16", "fp32")
    for name in (*short, *inspect.DTYPES):
        assert cli.main(["inspect", "--dtype", name]) == 0
    assert asked == [*inspect.DTYPES, *inspect.DTYPES]
    assert dict(zip(short, inspect.DTYPES, strict=True)) == words.SHORT_DTYPES


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "sm_10"], f"unknown target 'sm_10': choose one of {', '.join(TARGETS)}"),
        (["--layer", "conv6"], "unknown layer 'conv6': choose one of images, conv1, pool1"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(words, message, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["inspect", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_an_interpreted_process_has_another_do_it(capfd, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["inspect", "--layer", "fc8", "--dtype", "float16", "--batch", "256", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["target"], report["dtype"], report["batch"]) == ("sm_90", "float16", 256)
    assert set(report["versions"]) == {"alexnet_triton", "triton", "torch"}
    assert [(r["layer"], r["direction"]) for r in report["rows"]] == [("fc8", way) for way in launches.DIRECTIONS]
    assert report["rows"][0]["issue_share"] < 0.5
    assert cli.main(["inspect", "--target", "sm_10"]) == 2


def test_exit_code_is_1_where_a_budget_is_broken(report):
    results = report["command"]
    code, out = results.pop("good")
    assert code == 0
    assert out.endswith("\n1 launches of merged, bfloat16, batch 128, for sm_90: every budget holds\n")
    expected = {
        "spilling": "gemm_kernel spills",
        "narrow": "loads fewer than 16 bytes at once in its main loop (128 of 2 bytes)",
        "without tensor cores": "has no tensor-core instruction",
        "refused": "does not compile: ptxas fatal   : (C7602) Insufficient registers",
    }
    assert set(results) == set(expected)
    for name, (code, out) in results.items():
        assert code == 1
        assert expected[name] in out
        assert "! fc6 forward" in out
        assert "broken budget" in out.splitlines()[-1]


def test_without_triton_it_is_one_sentence():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from alexnet_triton.cli import main\n"
        "sys.exit(main(['inspect']))"
    )  # fmt: skip
    result = test_compiler.run_compiled("-c", program)
    assert result.returncode == 2
    assert result.stderr == (
        "alexnet-triton: inspect compiles kernels with Triton, which is not installed: pip install triton, on Linux\n"
    )


def test_a_reader_that_leaves_early_is_no_traceback():
    command = f"{shlex.quote(sys.executable)} -m alexnet_triton inspect --layer pool5 --dtype fp16 | head -1"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=300)
    assert result.stderr == ""
    assert result.stdout.startswith(" layer")
