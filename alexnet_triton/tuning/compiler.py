"""Compiles a recorded launch for a GPU that need not be there, and reads what came out.

Triton's wheel carries the assemblers and disassemblers of NVIDIA's GPUs and LLVM for AMD's, so a launch that
`alexnet_triton.kernels.launch.recording` has kept can be compiled on any Linux machine, specialised by Triton's own
code exactly as it would be on a device. `compile_launch` gives its figures:

- The *main loop* is the innermost loop that holds matrix instructions; of several, the one with the most
  multiply-adds. Its instructions are those from its first to its backward branch.
- *Issue share*: instructions of the loop x warps / 4, over the cycles that the tensor cores need for its products. A
  multiprocessor issues four instructions a cycle, so over 0.5 the arithmetic begins to wait for instructions.
- *L2 bytes*: bytes that the loop asks of global memory, over the same cycles. A multiprocessor draws about 64.
- *Spilled bytes*: the local memory of a thread, where the kernel reads or writes any.
- *Resident*: programs that one multiprocessor holds at a time, by registers, shared memory, warps and its own limit.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from alexnet_triton.kernels.launch import Launch
from alexnet_triton.kernels.target import Target

# --- what a multiprocessor has ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Multiprocessor:
    """What the programs that are resident at one time share. Four schedulers each own a quarter of the registers."""

    warps: int
    programs: int
    shared_memory: int
    """Bytes."""
    reserved: int
    """Bytes of shared memory that the system takes from every program."""


REGISTERS = 512
"""Of a scheduler, for each lane: what the registers of a thread of each of its warps may add up to. AMD's SIMDs too."""

MULTIPROCESSORS: Mapping[int | str, Multiprocessor] = {
    80: Multiprocessor(64, 32, 167_936, 1024),
    86: Multiprocessor(48, 16, 102_400, 1024),
    89: Multiprocessor(48, 24, 102_400, 1024),
    90: Multiprocessor(64, 32, 233_472, 1024),
    100: Multiprocessor(64, 32, 233_472, 1024),
    120: Multiprocessor(48, 24, 102_400, 1024),
    "gfx90a": Multiprocessor(32, 16, 65_536, 0),
    "gfx942": Multiprocessor(32, 16, 65_536, 0),
    "gfx950": Multiprocessor(32, 16, 163_840, 0),
}
"""By compute capability: CUDA C++ programming guide, "Technical specifications per compute capability". By AMD's name:
LLVM's user guide for AMDGPU and the CDNA 2, 3 and 4 ISA documents (eight waves a SIMD, 16 workgroups with barriers).
"""

TENSOR_MEMORY_COLUMNS = 512
"""Of a multiprocessor of compute capability 10.0."""

PRODUCTS_PER_CYCLE: Mapping[int | str, int] = {80: 1024, 90: 2048}
"""Multiply-adds of 16-bit numbers, summed in float32, that a multiprocessor's tensor cores do in a cycle; of TF32 half.

1,024: NVIDIA A100 Tensor Core GPU Architecture whitepaper. Twice that: NVIDIA H100 Tensor Core GPU Architecture
whitepaper, and 989.4 TFLOP/s = 2 x 2,048 x 132 multiprocessors x 1.83 GHz. Consumer cards of one capability differ in
it, and the newer tensor cores' instructions do not show their shapes: no figure there.
"""


# --- instructions -------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    """One machine instruction, as far as loops and counts need it."""

    opcode: str
    operands: str = ""
    target: int | None = None
    """Number of the instruction that it may jump to."""
    falls: bool = True
    """Whether the next instruction may follow."""


_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?\w+\s+)?([\w.]+)\s*([^;]*?)\s*;", re.MULTILINE)
_BYTES = 16
"""Of an instruction, since Volta."""


def parse_sass(text: str) -> list[Instruction]:
    """Instructions of NVIDIA machine code, from address 0 on, as nvdisasm and cuobjdump print it."""
    instructions = []
    for predicate, opcode, operands in _SASS.findall(text):
        name = opcode.partition(".")[0]
        target, falls = None, bool(predicate) or name not in ("EXIT", "RET", "BRX", "JMX", "KILL")
        if name in ("BRA", "JMP"):
            *conditions, where = operands.split(",")
            target = int(where.strip(), 16) // _BYTES
            falls = bool(predicate or conditions)
        instructions.append(Instruction(opcode, operands, target, falls))
    return instructions


def parse_amdgcn(text: str, name: str) -> list[Instruction]:
    """Instructions of the kernel `name` in AMD assembly."""
    body = text.partition(f"\n{name}:")[2].partition("\n.Lfunc_end")[0]
    return _with_labels(
        (label.group(1), "") if (label := re.match(r"([.\w$]+):", line)) else ("", line.partition(";")[0].strip())
        for line in body.splitlines()
        if not line.lstrip().startswith((".", ";")) or re.match(r"\.\w+:", line)
    )


def parse_ptx(text: str) -> list[Instruction]:
    """Instructions of PTX, those of inline assembly among them."""
    statements: list[tuple[str, str]] = []
    for statement in re.sub(r"//.*|^\s*\.loc\b.*", "", text, flags=re.MULTILINE).split(";"):
        while label := re.match(r"\s*(?:([\w$]+):|[{}])", statement):
            if label.group(1):
                statements.append((label.group(1), ""))
            statement = statement[label.end() :]
        statements.append(("", re.sub(r"\s+", " ", statement).strip()))
    return _with_labels((label, line) for label, line in statements if not line.startswith("."))


def _with_labels(lines: Iterable[tuple[str, str]]) -> list[Instruction]:
    """Instructions from (label, "") and ("", instruction) pairs, jumps resolved."""
    words: list[tuple[bool, str, str]] = []
    labels: dict[str, list[int]] = {}
    for label, line in lines:
        if label:
            labels.setdefault(label, []).append(len(words))
        elif line:
            predicated = line.startswith("@")
            opcode, _, operands = (line.partition(" ")[2] if predicated else line).replace("\t", " ").partition(" ")
            words.append((predicated, opcode, operands.strip()))
    instructions = []
    for number, (predicated, opcode, operands) in enumerate(words):
        target, falls = None, True
        if re.match(r"bra\b|s_branch$|s_cbranch", opcode):
            # Inline assembly repeats its labels, each in a scope of its own: the nearest is meant.
            places = labels.get(operands.split(",")[-1].strip(), [])
            target = min(places, key=lambda place, here=number: abs(place - here), default=None)  # type: ignore[misc]
            falls = predicated or opcode.startswith("s_cbranch")
        elif opcode in ("ret", "exit", "s_endpgm") or opcode.startswith("s_setpc"):
            falls = predicated
        instructions.append(Instruction(opcode, operands, target, falls))
    return instructions


def loops(instructions: Sequence[Instruction]) -> list[list[int]]:
    """The natural loops of a kernel, each as the numbers of its instructions, up to its last backward branch.

    A branch closes a loop only where its goal dominates it: a wait whose repetition stands behind the kernel's end
    jumps back too. Such blocks, which a loop keeps outside its range, are not counted.
    """
    starts = {0} if instructions else set()
    for number, instruction in enumerate(instructions):
        if instruction.target is not None:
            starts.add(instruction.target)
        if instruction.target is not None or not instruction.falls:
            starts.add(number + 1)
    first = sorted(start for start in starts if 0 <= start < len(instructions))
    ends = [*first[1:], len(instructions)][: len(first)]
    block_at = {start: block for block, start in enumerate(first)}
    successors: list[list[int]] = []
    predecessors: list[list[int]] = [[] for _ in first]
    for block, end in enumerate(ends):
        ending = instructions[end - 1]
        next_ones = ([] if ending.target is None else [ending.target]) + [end] * ending.falls
        successors.append([block_at[start] for start in next_ones if start in block_at])
        for goal in successors[-1]:
            predecessors[goal].append(block)

    dominators = _dominators(predecessors)
    closing: dict[int, list[int]] = {}
    for block, goals in enumerate(successors):
        for header in goals:
            if dominators[block] >> header & 1:
                closing.setdefault(header, []).append(block)
    found = []
    for header, ends_of_turns in closing.items():
        body, todo = {header}, list(ends_of_turns)
        while todo:
            inner = todo.pop()
            if inner not in body:
                body.add(inner)
                todo += predecessors[inner]
        # A header that stands behind its loop's end is entered in the middle: then all blocks count.
        last = max(ends_of_turns) if max(ends_of_turns) >= header else len(first)
        found.append([n for inner in sorted(body) if inner <= last for n in range(first[inner], ends[inner])])
    return found


def _dominators(predecessors: Sequence[Sequence[int]]) -> list[int]:
    """For every block the set of those that every path to it visits, as bits; none where no path leads to it."""
    unreached = 1 << len(predecessors)
    sets = [(unreached << 1) - 1] * len(predecessors)
    before = None
    while before != sets:
        before = list(sets)
        for block, sources in enumerate(predecessors):
            common = 0 if block == 0 else (unreached << 1) - 1
            for source in sources:
                common &= sets[source]
            sets[block] = common | 1 << block
    return [0 if bits & unreached else bits for bits in sets]


def main_loop(instructions: Sequence[Instruction]) -> list[Instruction] | None:
    """The innermost loop with matrix instructions; of several, the one with the most products. None: there is none."""
    holding = [set(loop) for loop in loops(instructions) if any(is_matrix(instructions[n].opcode) for n in loop)]
    innermost = [loop for loop in holding if not any(other < loop for other in holding)]
    bodies = [[instructions[n] for n in sorted(loop)] for loop in innermost]
    return max(bodies, key=lambda body: sum(products(i.opcode) or is_matrix(i.opcode) for i in body), default=None)


_MATRIX = re.compile(r"[A-Z]?(?:GMMA|MMA)\b|UTC\w*MMA\b|v_mfma|v_smfmac|v_wmma|wgmma\.mma_async|mma\.sync|tcgen05\.mma")


def is_matrix(opcode: str) -> bool:
    """Whether a machine or PTX instruction is the tensor cores'."""
    return bool(_MATRIX.match(opcode))


def products(opcode: str) -> int | None:
    """Multiply-adds of a matrix instruction for the warps that issue it together; None where it does not say."""
    if match := re.search(r"GMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)", opcode):  # of a warp group
        m, n, k = map(int, match.groups())
        return m * n * k
    if match := re.match(r"[A-Z]MMA\.(8|16)8(4|8|16|32)\b", opcode):  # HMMA.16816: 16 x 8 x 16, of a warp
        return int(match.group(1)) * 8 * int(match.group(2))
    if match := re.match(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?", opcode):  # of a wave; blocks
        m, n, k = map(int, match.groups()[:3])
        return m * n * k * int(match.group(4) or 1)
    return None


def load_bits(opcode: str) -> int | None:
    """Width of a load from global memory into a thread or, for it, into shared memory, in bits; None: it is none."""
    if match := re.match(r"(LDG|LDGSTS|LD)\.", opcode + "."):
        if match.group(1) == "LD" and ".E" not in opcode:
            return None
        if narrow := re.search(r"\.[US](8|16)\b", opcode):
            return int(narrow.group(1))
        wide = re.search(r"\.(64|128|256)\b(?!B)", opcode)
        return int(wide.group(1)) if wide else 32
    if match := re.match(r"(?:global|buffer|flat)_load_(?:lds_)?(?:d16_)?(\w+)", opcode):
        kind = match.group(1)
        if words := re.match(r"(?:dword|b)(?:x?)(\d*)", kind):
            number = int(words.group(1) or 1)
            return number if kind.startswith("b") else 32 * number
        return 8 if "byte" in kind or kind.endswith("8") else 16
    return None


def is_copy_engine(opcode: str) -> bool:
    """Whether an instruction has the copy engine load from global memory."""
    return opcode.startswith(("UTMALDG", "UBLKCP", "TENSOR_LOAD", "tensor_load"))


# --- figures ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """One turn of a kernel's main loop."""

    instructions: int
    """Of one warp."""
    matrix_instructions: int
    """Of one warp."""
    multiply_adds: int | None
    """Of the whole program; None where the instructions do not show their shapes."""
    loads: Mapping[int, int]
    """Load instructions of one warp, by width in bits."""
    bytes: int
    """That the program asks of global memory."""
    tensor_cycles: float | None
    """That a multiprocessor's tensor cores need for the products; None where the target's rate is not known."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch."""

    kernel: str
    warps: int
    stages: int
    registers: int
    """Of a thread."""
    spilled_bytes: int
    """Of a thread."""
    shared_memory: int
    """Bytes of a program."""
    tensor_memory: int
    """Columns of a program (compute capability 10.0)."""
    has_product: bool
    """Whether the kernel's Triton code holds a `tl.dot`."""
    instructions: int
    """Of the whole kernel, of one warp."""
    matrix_instructions: int
    """In the whole kernel, of one warp."""
    loads: Mapping[int, int]
    """Load instructions of the whole kernel, by width in bits."""
    copy_engine_loads: int
    """Tiles that the whole kernel has the copy engine load."""
    loop: Loop | None
    """None: no loop of the kernel holds matrix instructions."""
    resident: int
    """Programs that a multiprocessor holds at a time; 0: it cannot hold one."""
    limited_by: str
    """`"registers"`, `"shared memory"`, `"tensor memory"`, `"warps"` or `"programs"`."""

    @property
    def issue_share(self) -> float | None:
        """See the top of this module; None where the tensor cores' cycles are not known."""
        if self.loop is None or not self.loop.tensor_cycles:
            return None
        return self.loop.instructions * self.warps / 4 / self.loop.tensor_cycles

    @property
    def l2_bytes(self) -> float | None:
        """See the top of this module; None where the tensor cores' cycles are not known."""
        if self.loop is None or not self.loop.tensor_cycles:
            return None
        return self.loop.bytes / self.loop.tensor_cycles

    @property
    def widest_load(self) -> int:
        """Bits of the widest load of a thread; a tile of the copy engine counts as 128. 0: the kernel loads nothing."""
        return max([*self.loads, *([128] if self.copy_engine_loads else [])], default=0)


class CompilationFailed(RuntimeError):
    """A launch that the compiler refuses; the text is its reason, in one line."""


# --- compiling ----------------------------------------------------------------------------------------------

_figures: dict[tuple[str, ...], Compiled | CompilationFailed] = {}
"""Of this process, by what was compiled."""


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile a recorded launch for a target, and read what came out.

    Args:
        launch: of `alexnet_triton.kernels.launch.recording`, in a process that was started without TRITON_INTERPRET.
        target: of `alexnet_triton.kernels.target.TARGETS`.

    Raises:
        CompilationFailed: the compiler or the assembler refuses it.
        TypeError: the kernel belongs to Triton's interpreter.
    """
    [result] = compile_launches([launch], target)
    if isinstance(result, CompilationFailed):
        raise result
    return result


def compile_launches(
    launches: Sequence[Launch], target: Target, progress: Callable[[int], object] = lambda done: None
) -> list[Compiled | CompilationFailed]:
    """Compile many launches; those that come to the same code are compiled once a process.

    The disassembler takes its third of a second once for all of them.

    Args:
        launches: as for `compile_launch`.
        target: as for `compile_launch`.
        progress: is told how many are done, after each.

    Returns:
        In the order of `launches`, figures or the reason why there are none.

    Raises:
        TypeError: a kernel belongs to Triton's interpreter.
    """
    keys: list[tuple[str, ...]] = []
    fresh: dict[tuple[str, ...], Any] = {}
    for number, launch in enumerate(launches):
        source, options = specialise(launch, target)
        keys.append((target.backend, str(target.arch), source.hash(), options.hash()))
        if keys[-1] not in _figures and keys[-1] not in fresh:
            try:
                with redirect_stdout(StringIO()):  # Triton prints the whole program that an assembler refuses
                    fresh[keys[-1]] = triton.compile(source, target=gpu_target(target), options=options.__dict__)
            except Exception as error:  # whatever a compiler throws, the other rows are still of use
                _figures[keys[-1]] = CompilationFailed(_in_one_line(error))
        progress(number + 1)
    _figures.update(zip(fresh, _read(list(fresh.values()), target), strict=True))
    return [_figures[key] for key in keys]


def gpu_target(target: Target) -> GPUTarget:
    """A target in Triton's terms."""
    return GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)


def specialise(launch: Launch, target: Target) -> tuple[ASTSource, Any]:
    """What Triton's launcher would hand to its compiler: the specialised source, and the options of the target.

    The launcher's own functions decide (which integers are 1, which are multiples of 16, how pointers are aligned, what
    is a constant), so nothing is restated here; they need no driver, and take meta tensors, whose addresses count from
    the start of an aligned allocation.

    Raises:
        TypeError: the kernel belongs to Triton's interpreter.
    """
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise TypeError(
            f"{_name(kernel)} is a kernel of Triton's interpreter, which cannot be compiled: start Python without "
            "TRITON_INTERPRET in the environment"
        )
    backend = make_backend(gpu_target(target))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments = {
        "debug": launch.arguments.get("debug", kernel.debug) or triton.knobs.runtime.debug,
        "instrumentation_mode": triton.knobs.compilation.instrumentation_mode,
        **launch.arguments,
    }
    bound, specialization, rest = bind(**arguments)
    options, signature, constants, attributes = kernel._pack_args(backend, arguments, bound, specialization, rest)
    return ASTSource(kernel, signature, constants, attributes), options


def _name(kernel: Any) -> str:
    return str(getattr(kernel, "__name__", None) or getattr(getattr(kernel, "fn", None), "__name__", repr(kernel)))


def _in_one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if re.match(r"ptxas (error|fatal)|error:", line)]
    where = lines[0].removesuffix(":") + ": " if lines and re.match(r"at \d+:\d+:$", lines[0]) else ""
    return where + (telling or lines[-1:] or [type(error).__name__])[0]


def _read(compiled: Sequence[Any], target: Target) -> list[Compiled]:
    if not compiled:
        return []
    return [_read_amd(one, target) for one in compiled] if target.backend == "hip" else _read_nvidia(compiled, target)


def _read_amd(compiled: Any, target: Target) -> Compiled:
    text = compiled.asm["amdgcn"]
    name = compiled.metadata.name
    # The registers of both files are allocated from one, and `.vgpr_count` counts both.
    registers = _number(text, r"\.vgpr_count:\s+(\d+)")
    spilled = _number(text, r"\.private_segment_fixed_size:\s+(\d+)")
    shared = max(compiled.metadata.shared, _number(text, r"\.group_segment_fixed_size:\s+(\d+)"))
    return _figures_of(compiled, target, parse_amdgcn(text, name), registers, spilled, shared)


def _read_nvidia(compiled: Sequence[Any], target: Target) -> list[Compiled]:
    codes = [_section(one.asm["cubin"], f".text.{one.metadata.name}") for one in compiled]
    with tempfile.TemporaryDirectory() as folder:
        # One listing for all kernels: the disassembler needs most of its time to start.
        raw = Path(folder, "all.bin")
        raw.write_bytes(b"".join(codes))
        arch = f"SM{target.arch}{'a' if int(target.arch) >= 90 else ''}"
        listing = parse_sass(_tool("nvdisasm", "--no-dataflow", "--binary", arch, str(raw)))
        usages = []
        for number, one in enumerate(compiled):
            cubin = Path(folder, f"{number}.cubin")
            cubin.write_bytes(one.asm["cubin"])
            usages.append(_tool("cuobjdump", "-res-usage", str(cubin)))
    figures, start = [], 0
    for one, code, usage in zip(compiled, codes, usages, strict=True):
        end = start + len(code) // _BYTES
        instructions = [i if i.target is None else i._replace(target=i.target - start) for i in listing[start:end]]
        start = end
        registers, frame, local = resource_usage(usage, one.metadata.name)
        # A frame that nothing is written to or read from is no spill.
        touched = any(re.match(r"(STL|LDL)\b", i.opcode) for i in instructions)
        spilled = frame + local if touched else 0
        figures.append(_figures_of(one, target, instructions, registers, spilled, one.metadata.shared))
    return figures


def resource_usage(text: str, name: str) -> tuple[int, int, int]:
    """Registers, stack frame and local memory (bytes) of a kernel, from the output of `cuobjdump -res-usage`."""
    text = text.partition(f"Function {name}:")[2]
    return _number(text, r"REG:(\d+)"), _number(text, r"STACK:(\d+)"), _number(text, r"LOCAL:(\d+)")


def _figures_of(
    compiled: Any, target: Target, instructions: Sequence[Instruction], registers: int, spilled: int, shared: int
) -> Compiled:
    warps = compiled.metadata.num_warps
    threads = warps * gpu_target(target).warp_size
    body = main_loop(instructions)
    loop = None
    if body is not None:
        loads = _loads(body)
        asked = sum(bits // 8 * count for bits, count in loads.items()) * threads
        if any(is_copy_engine(i.opcode) for i in body):
            asked += _copy_engine_bytes(compiled.asm.get("ptx", ""))
        matrix = [i.opcode for i in body if is_matrix(i.opcode)]
        # A warp group of four issues one HGMMA together.
        each = [(products(opcode), warps // 4 if "GMMA" in opcode else warps) for opcode in matrix]
        total = None if any(count is None for count, _ in each) else sum((n or 0) * issuers for n, issuers in each)
        rate = PRODUCTS_PER_CYCLE.get(target.arch)
        cycles = None
        if total and rate:
            cycles = total / (rate / 2 if any("TF32" in opcode for opcode in matrix) else rate)
        loop = Loop(len(body), len(matrix), total, loads, asked, cycles)
    tensor_memory = getattr(compiled.metadata, "tmem_size", 0) or 0
    resident, limited_by = occupancy(target.arch, warps, registers, shared, tensor_memory)
    return Compiled(
        kernel=compiled.metadata.name,
        warps=warps,
        stages=compiled.metadata.num_stages,
        registers=registers,
        spilled_bytes=spilled,
        shared_memory=shared,
        tensor_memory=tensor_memory,
        has_product="tt.dot" in str(compiled.asm["ttir"]),
        instructions=len(instructions),
        matrix_instructions=sum(is_matrix(i.opcode) for i in instructions),
        loads=_loads(instructions),
        copy_engine_loads=sum(is_copy_engine(i.opcode) for i in instructions),
        loop=loop,
        resident=resident,
        limited_by=limited_by,
    )


def occupancy(
    arch: int | str, warps: int, registers: int, shared_memory: int, tensor_memory: int = 0
) -> tuple[int, str]:
    """Programs that one multiprocessor holds at a time, and what limits them.

    Args:
        arch: of a `Target`.
        warps: of a program.
        registers: of a thread; allocated in units of 8.
        shared_memory: bytes of a program.
        tensor_memory: columns of a program.
    """
    has = MULTIPROCESSORS[arch]
    per_scheduler = REGISTERS // (-(-max(registers, 1) // 8) * 8)
    limits = {
        "programs": has.programs,
        "warps": has.warps // warps,
        "registers": per_scheduler * 4 // warps,
        "shared memory": has.shared_memory // max(1, shared_memory + has.reserved),
        "tensor memory": TENSOR_MEMORY_COLUMNS // tensor_memory if tensor_memory else has.programs,
    }
    limited_by = min(limits, key=lambda name: limits[name])
    return limits[limited_by], limited_by


def _loads(instructions: Iterable[Instruction]) -> dict[int, int]:
    return dict(sorted(Counter(bits for i in instructions if (bits := load_bits(i.opcode)) is not None).items()))


def _copy_engine_bytes(ptx: str) -> int:
    """What the copy engine brings in a turn of the main loop: the bytes that its barriers are told to await."""
    return sum(
        int(i.operands.rpartition(",")[2].strip(), 0)
        for i in main_loop(parse_ptx(ptx)) or ()
        if "expect_tx" in i.opcode and i.operands.rpartition(",")[2].strip().isdigit()
    )


def _number(text: str, pattern: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's output holds no {pattern!r}")
    return int(match.group(1))


def _tool(name: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    result = subprocess.run([path, *arguments], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{name} failed: {(result.stderr or result.stdout).strip()}")
    return result.stdout


def _section(elf: bytes, name: str) -> bytes:
    """A section of a 64-bit ELF file (System V ABI, chapter 4)."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<3H", elf, 0x3A)
    headers = [struct.unpack_from("<2I4Q", elf, table + number * size) for number in range(count)]
    strings = headers[names][4]
    for entry, _, _, _, offset, length in headers:
        start = strings + entry
        if elf[start : elf.index(b"\0", start)].decode() == name:
            return elf[offset : offset + length]
    raise RuntimeError(f"the compiled kernel holds no section {name}")
