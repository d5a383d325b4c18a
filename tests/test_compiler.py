"""The compiler's figures, on kernels whose figures are known.

Kernels are compiled in one process without TRITON_INTERPRET: this file, run as a program, prints what tests look at.
"""

import fcntl
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from io import StringIO

import pytest

triton = pytest.importorskip("triton")
import torch  # noqa: E402
import triton.language as tl  # noqa: E402

from alexnet_triton import cli  # noqa: E402
from alexnet_triton.kernels.launch import Launch  # noqa: E402
from alexnet_triton.kernels.target import TARGETS  # noqa: E402
from alexnet_triton.tuning import compiler, inspect  # noqa: E402

# --- kernels ------------------------------------------------------------------------------------------------


@triton.jit
def gemm_kernel(
    a, b, c, pitch, reduction, bias,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    at_a, at_b = a + m[:, None] * pitch + k[None, :], b + n[:, None] * pitch + k[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, reduction, BLOCK_K):
        sums = tl.dot(tl.load(at_a), tl.load(at_b).T, sums, input_precision=PRECISION)
        at_a += BLOCK_K
        at_b += BLOCK_K
    if bias is not None:
        sums += tl.load(bias + n)[None, :]
    tl.store(c + m[:, None] * BLOCK_N + n[None, :], sums.to(c.dtype.element_ty))


@triton.jit
def described_gemm_kernel(
    a, b, c, reduction, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, reduction, BLOCK_K):
        sums = tl.dot(a.load([0, k]), b.load([0, k]).T, sums)
    tl.store(c + m[:, None] * BLOCK_N + n[None, :], sums.to(c.dtype.element_ty))


@triton.jit
def fma_kernel(a, b, c, pitch, reduction, BLOCK: tl.constexpr):
    m = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(reduction):
        sums += tl.load(a + m * pitch + k).to(tl.float32)[:, None] * tl.load(b + m * pitch + k).to(tl.float32)[None, :]
    tl.store(c + m[:, None] * BLOCK + m[None, :], sums.to(c.dtype.element_ty))


@triton.jit
def copy_kernel(x, y, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < size), mask=i < size)


@triton.jit
def wrong_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), no_such_name)  # noqa: F821


def matrix(dtype=None, *shape):
    return torch.empty(shape or (4096, 4096), device="meta", dtype=dtype or torch.bfloat16)


def gemm(dtype=None, **changes):
    x = matrix(dtype)
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "PRECISION": "tf32"}
    arguments = {"a": x, "b": x, "c": x, "pitch": 4096, "reduction": 4096, "bias": None, **blocks}
    return Launch(gemm_kernel, 32, {**arguments, "num_warps": 4, "num_stages": 3, **changes})


def described_gemm(**changes):
    from triton.tools.tensor_descriptor import TensorDescriptor

    x = matrix()
    tiles = TensorDescriptor.from_tensor(x, [128, 64])
    arguments = {"a": tiles, "b": tiles, "c": x, "reduction": 4096, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
    return Launch(described_gemm_kernel, 32, {**arguments, "num_warps": 4, "num_stages": 3, **changes})


def fma():
    x = matrix()
    arguments = {"a": x, "b": x, "c": x, "pitch": 4096, "reduction": 4096, "BLOCK": 64, "num_warps": 4, "num_stages": 1}
    return Launch(fma_kernel, 32, arguments)


def copy(x=None, y=None, **changes):
    x, y = matrix() if x is None else x, matrix() if y is None else y
    return Launch(copy_kernel, 32, {"x": x, "y": y, "size": 4096, "BLOCK": 2048, "num_warps": 4, **changes})


def spilling(target):
    """A product with too few registers."""
    return gemm(BLOCK_M=256, BLOCK_N=256) if target.startswith("gfx") else gemm(maxnreg=96)


CASES = {
    "4 warps": lambda target: gemm(),
    "8 warps": lambda target: gemm(num_warps=8),
    "wide": lambda target: gemm(BLOCK_N=256, num_warps=8),
    "odd rows": lambda target: gemm(pitch=4095),
    "described": lambda target: described_gemm(),
    "tf32": lambda target: gemm(torch.float32, BLOCK_K=32),
    "ieee": lambda target: gemm(torch.float32, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, PRECISION="ieee"),
    "fma": lambda target: fma(),
    "copy": lambda target: copy(),
    "spilling": spilling,
}

TARGETS_CASES = {
    "sm_80": ["4 warps", "described", "fma", "copy", "spilling"],
    "sm_90": list(CASES),
    "sm_100": ["4 warps", "described"],
    "gfx942": ["4 warps", "8 warps", "odd rows", "copy", "spilling"],
}


def as_dict(compiled):
    derived = ("issue_share", "l2_bytes", "widest_load")
    return {**asdict(compiled), **{name: getattr(compiled, name) for name in derived}}


def specialised(launch, target="sm_90"):
    source, options = compiler.specialise(launch, TARGETS[target])
    constants = {source.fn.arg_names[at[0]]: value for at, value in source.constants.items()}
    multiples = [source.fn.arg_names[at[0]] for at, value in source.attrs.items() if ["tt.divisibility", 16] in value]
    return {"signature": source.signature, "constants": constants, "multiples": multiples, "warps": options.num_warps}


def hash_of_launchers_own_path(launch):
    """What Triton's launcher itself compiles, with a driver that only claims to have a GPU."""

    class Driver:
        def get_current_target(self):
            return compiler.gpu_target(TARGETS["sm_90"])

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    triton.runtime.driver.set_active(Driver())
    return launch.kernel.warmup(grid=(1,), **launch.arguments).hash


def hash_of_ours(launch):
    source, options = compiler.specialise(launch, TARGETS["sm_90"])
    return triton.compile(source, target=compiler.gpu_target(TARGETS["sm_90"]), options=options.__dict__).hash


def plain_listing(launch):
    """Opcodes as `cuobjdump -sass` prints them, without the padding behind the program."""
    source, options = compiler.specialise(launch, TARGETS["sm_90"])
    compiled = triton.compile(source, target=compiler.gpu_target(TARGETS["sm_90"]), options=options.__dict__)
    path = os.path.join(os.environ["FOLDER"], "a.cubin")
    with open(path, "wb") as file:
        file.write(compiled.asm["cubin"])
    return [i.opcode for i in compiler.main_loop(compiler.parse_sass(compiler._tool("cuobjdump", "-sass", path)))]


def commands():
    """Exit code and output of `alexnet-triton inspect`, were these kernels a network's."""
    launches = {
        "good": gemm(),
        "spilling": spilling("sm_90"),
        "narrow": gemm(pitch=4095),
        "without tensor cores": fma(),
        "refused": gemm(maxnreg=64),
    }
    fma_kernel.__name__ = "gemm_kernel"  # a product by its name
    inspect.loops.PRODUCTS = {"gemm_kernel": lambda arguments: inspect.loops.MainLoop(128, 128, 64, 64)}
    results = {}
    for name, launch in launches.items():
        made = [inspect.LayerLaunch("fc6", "forward", launch)]
        inspect.launches = lambda variant, dtype, batch, target, made=made: made
        inspect.update_launches = lambda variant, dtype, target: []
        inspect.image_launches = lambda variant, dtype, batch, target: []
        with redirect_stdout(StringIO()) as out:
            code = cli.main(["inspect"])
        results[name] = [code, out.getvalue()]
    return results


def report():
    out = {}
    for target, names in TARGETS_CASES.items():
        figures = compiler.compile_launches([CASES[name](target) for name in names], TARGETS[target])
        out[target] = {name: as_dict(figure) for name, figure in zip(names, figures, strict=True)}
    large, small = matrix(None, 1 << 31), matrix()
    out["specialised"] = {
        "plain": specialised(copy(size=4096)),
        "odd": specialised(copy(size=4095)),
        "one": specialised(copy(size=1)),
        "long": specialised(copy(size=1 << 31)),
        "real": specialised(gemm(pitch=0.5)),
        "shifted": specialised(copy(x=matrix()[:, 1:])),
        "shifted by 16 bytes": specialised(copy(x=matrix()[:, 8:])),
        "no bias": specialised(gemm(num_warps=8)),
        "ranges": [str(compiler.specialise(copy(x=x), TARGETS["gfx942"])[0].attrs) for x in (small, large)],
    }
    launches = [gemm(), gemm(bias=matrix()), gemm(pitch=4095), copy(size=1), copy(x=matrix()[:, 1:]), described_gemm()]
    out["launcher"] = [hash_of_launchers_own_path(launch) for launch in launches]
    out["ours"] = [hash_of_ours(launch) for launch in launches]
    wrong = Launch(wrong_kernel, 1, {"x": matrix(), "BLOCK": 16})
    launches = [wrong, gemm(maxnreg=64), gemm(), gemm(a=matrix(None, 64, 4096))]
    [wrong, refused, once, twice] = compiler.compile_launches(launches, TARGETS["sm_90"])
    out["failures"] = [f"{type(error).__name__}: {error}" for error in (wrong, refused)]
    out["one object"] = once is twice
    out["listing"] = plain_listing(gemm())
    out["command"] = commands()
    return out


if __name__ == "__main__":
    json.dump(report(), sys.stdout)


def run_compiled(*words, **environment):
    """Python in a process that can compile kernels."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *words]
    return subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, timeout=900)


def made_once(tmp_path_factory, name, make):
    """The JSON that `make` gives, made by one of pytest-xdist's workers for all."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / f"{name}.json"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            path.write_text(make())
        return json.loads(path.read_text())  # so nothing else was printed, by Triton neither


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    def make():
        result = run_compiled(__file__, FOLDER=str(tmp_path_factory.mktemp("cubins")))
        assert result.returncode == 0, result.stderr
        return result.stdout

    return made_once(tmp_path_factory, "compiled", make)


# --- figures of compiled kernels ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "case", "columns"),
    [
        ("sm_80", "4 warps", 128),
        ("sm_90", "4 warps", 128),
        ("sm_90", "8 warps", 128),
        ("sm_90", "wide", 256),
        ("gfx942", "4 warps", 128),
        ("gfx942", "8 warps", 128),
    ],
)
def test_matrix_instructions_of_a_turn_add_up_to_its_tiles(compiled, target, case, columns):
    figures = compiled[target][case]
    assert figures["loop"]["multiply_adds"] == 128 * columns * 64
    assert figures["loop"]["bytes"] == (128 + columns) * 64 * 2
    assert figures["has_product"]


def test_figures_of_a_product_on_hopper(compiled):
    figures = compiled["sm_90"]["4 warps"]
    assert figures["loop"]["matrix_instructions"] == 8  # of 64 x 128 x 16
    assert figures["loop"]["loads"] == {"128": 16}  # each a warp's 512 bytes: 4 warps, 32 KiB
    assert figures["l2_bytes"] == 64  # 32,768 bytes over 512 cycles
    assert figures["issue_share"] == figures["loop"]["instructions"] * 4 / 4 / 512
    assert figures["issue_share"] < 0.5
    assert figures["shared_memory"] == 3 * 32_768
    assert figures["spilled_bytes"] == 0
    assert (figures["resident"], figures["warps"], figures["stages"]) == (2, 4, 3)
    assert compiled["sm_90"]["wide"]["l2_bytes"] == 48


def test_figures_of_a_product_on_ampere(compiled):
    figures = compiled["sm_80"]["4 warps"]
    assert figures["loop"]["matrix_instructions"] == 128 * 128 * 64 // (16 * 8 * 16) // 4
    assert figures["loop"]["tensor_cycles"] == 1024
    assert figures["l2_bytes"] == 32


def test_tf32_takes_twice_the_cycles(compiled):
    figures = compiled["sm_90"]["tf32"]
    assert figures["loop"]["multiply_adds"] == 128 * 128 * 32
    assert figures["loop"]["tensor_cycles"] == 128 * 128 * 32 / 1024


def test_tiles_of_the_copy_engine_are_counted_in_bytes(compiled):
    tiles, pointers = compiled["sm_90"]["described"], compiled["sm_90"]["4 warps"]
    assert tiles["copy_engine_loads"] > 0
    assert tiles["loop"]["loads"] == {}
    assert tiles["loop"]["bytes"] == pointers["loop"]["bytes"]
    assert tiles["loop"]["multiply_adds"] == pointers["loop"]["multiply_adds"]
    assert tiles["issue_share"] < pointers["issue_share"]
    assert tiles["widest_load"] == 128
    assert compiled["sm_80"]["described"]["copy_engine_loads"] == 0  # has none: Triton turns tiles into pointers


def test_blackwell_has_products_and_tensor_memory(compiled):
    for case in ("4 warps", "described"):
        figures = compiled["sm_100"][case]
        assert figures["loop"]["matrix_instructions"] == 4
        assert figures["loop"]["bytes"] == 32_768
        assert figures["tensor_memory"] == 128
        assert figures["issue_share"] is None  # the instructions do not show their shapes


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_rows_of_odd_length_are_loaded_two_bytes_at_a_time(compiled, target):
    assert set(compiled[target]["odd rows"]["loop"]["loads"]) == {"16"}
    assert compiled[target]["odd rows"]["widest_load"] == 16


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_spills_are_seen(compiled, target):
    assert compiled[target]["spilling"]["spilled_bytes"] > 0


def test_a_tile_too_large_for_shared_memory_is_not_resident(compiled):
    figures = compiled["gfx942"]["spilling"]
    assert figures["shared_memory"] > TARGETS["gfx942"].shared_memory
    assert (figures["resident"], figures["limited_by"]) == (0, "shared memory")


@pytest.mark.parametrize(("target", "case"), [("sm_80", "fma"), ("sm_90", "fma"), ("sm_90", "ieee")])
def test_products_without_tensor_cores_are_seen(compiled, target, case):
    figures = compiled[target][case]
    assert figures["matrix_instructions"] == 0
    assert figures["loop"] is None
    assert figures["issue_share"] is None
    assert figures["has_product"] == (case == "ieee")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_a_copy_loads_sixteen_bytes_at_once(compiled, target):
    figures = compiled[target]["copy"]
    assert list(figures["loads"]) == ["128"]
    assert figures["loop"] is None
    assert not figures["has_product"]


def test_the_listing_of_all_kernels_is_each_ones_own(compiled):
    assert len(compiled["listing"]) == compiled["sm_90"]["4 warps"]["loop"]["instructions"]
    assert sum(opcode.startswith("HGMMA") for opcode in compiled["listing"]) == 8


def test_equal_launches_are_compiled_once(compiled):
    assert compiled["one object"]


def test_what_does_not_compile_says_why_in_one_line(compiled):
    wrong, refused = compiled["failures"]
    assert wrong.startswith("CompilationFailed: at ")
    assert "no_such_name" in wrong
    assert "Insufficient registers" in refused
    assert "\n" not in wrong + refused


# --- specialisation -----------------------------------------------------------------------------------------


def test_launches_are_specialised_as_tritons_launcher_does(compiled):
    assert compiled["ours"] == compiled["launcher"]
    assert len(set(compiled["ours"])) == len(compiled["ours"])


def test_arguments_decide_the_specialisation(compiled):
    made = compiled["specialised"]
    assert made["plain"]["signature"] == {"x": "*bf16", "y": "*bf16", "size": "i32", "BLOCK": "constexpr"}
    assert made["plain"]["multiples"] == ["x", "y", "size"]
    assert made["plain"]["constants"] == {"BLOCK": 2048}
    assert made["odd"]["multiples"] == ["x", "y"]
    assert made["one"]["constants"] == {"size": 1, "BLOCK": 2048}
    assert made["long"]["signature"]["size"] == "i64"
    assert made["real"]["signature"]["pitch"] == "fp32"
    assert made["shifted"]["multiples"] == ["y", "size"]  # by two bytes
    assert made["shifted by 16 bytes"]["multiples"] == ["x", "y", "size"]
    assert made["no bias"]["constants"]["bias"] is None
    assert made["no bias"]["warps"] == 8
    small, large = made["ranges"]  # a storage of at most 2 GiB is addressed in 32 bits
    assert small.count("tt.pointer_range") == 2
    assert large.count("tt.pointer_range") == 1


def test_an_interpreted_kernel_is_refused():
    with pytest.raises(TypeError, match="interpreter, which cannot be compiled: start Python without TRITON_INTERPRET"):
        compiler.compile_launch(Launch(lambda: None, 1, {}), TARGETS["sm_90"])


# --- parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opcode", "count"),
    [
        ("HGMMA.64x128x16.F32.BF16", 64 * 128 * 16),
        ("HGMMA.64x32x8.F32.TF32", 64 * 32 * 8),
        ("HMMA.16816.F32.BF16", 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 16 * 8 * 8),
        ("v_mfma_f32_32x32x8_bf16_1k", 32 * 32 * 8),
        ("v_mfma_f32_32x32x8bf16_1k", 32 * 32 * 8),
        ("v_mfma_f32_16x16x32_f16", 16 * 16 * 32),
        ("v_mfma_f32_4x4x4_16b_f16", 4 * 4 * 4 * 16),
        ("UTCHMMA", None),
    ],
)
def test_shapes_of_matrix_instructions(opcode, count):
    assert compiler.is_matrix(opcode)
    assert compiler.products(opcode) == count


@pytest.mark.parametrize(
    "opcode", ["FFMA", "IMAD.MOV.U32", "WARPGROUP.ARRIVE", "UTCBAR", "v_fma_f32", "HMUL2.BF16_V2", "UTCATOMSWS.AND"]
)
def test_other_instructions_are_none(opcode):
    assert not compiler.is_matrix(opcode)
    assert compiler.load_bits(opcode) is None


@pytest.mark.parametrize(
    ("opcode", "bits"),
    [
        ("LDG.E.128", 128),
        ("LDG.E.64.CONSTANT", 64),
        ("LDG.E", 32),
        ("LDG.E.U16", 16),
        ("LDG.E.S8", 8),
        ("LDG.E.ENL2.256", 256),
        ("LDG.E.LTC128B.128", 128),
        ("LDG.E.LTC128B", 32),
        ("LDGSTS.E.BYPASS.128", 128),
        ("LDGSTS.E.64", 64),
        ("LDGSTS.E", 32),
        ("LDGDEPBAR", None),
        ("LDS.128", None),
        ("LDSM.16.MT88.4", None),
        ("LDC.64", None),
        ("STG.E.128", None),
        ("global_load_dwordx4", 128),
        ("buffer_load_dwordx2", 64),
        ("buffer_load_dword", 32),
        ("global_load_ushort", 16),
        ("buffer_load_short_d16_hi", 16),
        ("global_load_ubyte", 8),
        ("global_load_lds_dwordx4", 128),
        ("global_load_b128", 128),
        ("global_store_dwordx4", None),
        ("ds_read_b128", None),
        ("s_load_dwordx4", None),
        ("scratch_load_dwordx4", None),
    ],
)
def test_widths_of_loads(opcode, bits):
    assert compiler.load_bits(opcode) == bits


def sass(*lines):
    text = "".join(f"        /*{16 * number:04x}*/   {line} ;  /* 0x0 */\n" for number, line in enumerate(lines))
    return compiler.parse_sass(text)


def test_the_innermost_loop_around_the_products_is_the_main_loop():
    program = sass(
        "MOV R1, R2",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24",  # 0x10: the outer loop
        "LDG.E R5, desc[UR4][R2.64]",  # 0x20: a loop without products
        "@!P0 BRA 0x20",
        "IADD3 R1, R1, 0x1, RZ",  # 0x40
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24",
        "@P1 BRA 0x40",
        "@P2 BRA 0x10",
        "EXIT",
        "BRA 0x90",
    )
    assert [i.opcode for i in compiler.main_loop(program)] == ["IADD3", "HGMMA.64x64x16.F32.BF16", "BRA"]
    assert sorted(map(len, compiler.loops(program))) == [2, 3, 7]


def test_of_two_loops_the_one_with_more_products_is_the_main_loop():
    program = sass(
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24",
        "@P1 BRA 0x0",
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24",
        "@P1 BRA 0x20",
        "EXIT",
    )
    assert compiler.main_loop(program)[0].opcode == "HGMMA.64x256x16.F32.BF16"


def test_a_wait_behind_the_program_closes_no_loop():
    program = sass(
        "MOV R1, R2",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R6",  # 0x10: the main loop
        "@!P0 BRA 0x80",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24",  # 0x30
        "IADD3 R1, R1, 0x1, RZ",
        "IADD3 R1, R1, 0x1, RZ",
        "@P1 BRA 0x10",
        "EXIT",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R6",  # 0x80: wait again, and go on
        "@!P0 BRA 0x80",
        "BRA 0x30",
    )
    assert len(compiler.main_loop(program)) == 6


def test_a_program_without_products_has_no_main_loop():
    assert compiler.main_loop(sass("FFMA R1, R2, R3, R4", "@P0 BRA 0x0", "EXIT")) is None
    assert compiler.main_loop([]) is None


def test_loops_of_inline_assembly_are_each_their_own():
    text = """
    mov.u32 %r1, %tid.x;
    $L__BB0_1:                              // the main loop
    // begin inline asm
    { .reg .pred complete;
    waitLoop:
    .loc 1 8 5
    mbarrier.try_wait.parity.shared.b64 complete, [%r1], %r2;
    @!complete bra.uni waitLoop; }
    // end inline asm
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r6], 32768;
    wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1,
        %f2}, %rd1, %rd2, 1, 1, 1, 0, 0;
    @%p2 bra $L__BB0_1;
    { waitLoop:
    @!complete bra.uni waitLoop; }
    ret;
    """
    opcodes = [i.opcode for i in compiler.main_loop(compiler.parse_ptx(text))]
    assert len(opcodes) == 5
    assert sum("expect_tx" in opcode for opcode in opcodes) == 1


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "resident"),
    [
        (90, 4, 186, 98_304, (2, "registers")),
        (90, 4, 128, 0, (4, "registers")),
        (90, 4, 101, 0, (4, "registers")),  # 104 are allocated
        (90, 8, 32, 0, (8, "warps")),
        (90, 1, 16, 0, (32, "programs")),
        (90, 8, 64, 232_448, (1, "shared memory")),
        (90, 8, 64, 232_449, (0, "shared memory")),
        (80, 4, 64, 81_920, (2, "shared memory")),
        (86, 4, 32, 0, (12, "warps")),
        ("gfx942", 4, 128, 0, (4, "registers")),
        ("gfx942", 4, 512, 65_536, (1, "registers")),
        ("gfx942", 4, 32, 65_537, (0, "shared memory")),
        ("gfx942", 8, 32, 0, (4, "warps")),
    ],
)
def test_occupancy(arch, warps, registers, shared, resident):
    assert compiler.occupancy(arch, warps, registers, shared) == resident


def test_every_target_has_its_multiprocessor():
    assert {target.arch for target in TARGETS.values()} == set(compiler.MULTIPROCESSORS)


def test_figures_in_the_compilers_output():
    text = (
        " Function other:\n  REG:1 STACK:2 SHARED:0 LOCAL:3\n Function kernel:\n  REG:96 STACK:584 SHARED:1 LOCAL:8\n"
    )
    assert compiler.resource_usage(text, "kernel") == (96, 584, 8)
    with pytest.raises(RuntimeError, match="holds no"):
        compiler.resource_usage(text, "third")
