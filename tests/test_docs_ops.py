"""The ops' pages and the kernel author's guide: their code prints what they show, and they say what is so."""

import inspect
import re
from pathlib import Path

import doc_blocks
import kernel_cases
import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from alexnet_triton import configs, ops, use_backend
from alexnet_triton.kernels import linear
from alexnet_triton.kernels.conv_shape import convolution
from alexnet_triton.recipe.augment import Augment
from alexnet_triton.recipe.optim import KrizhevskySGD

ROOT = Path(__file__).parents[1]
OPS = {path.stem: path for path in sorted((ROOT / "docs" / "ops").glob("*.md"))}
GUIDE = ROOT / "docs" / "kernels.md"
PAGES = [*OPS.values(), GUIDE]


def blocks(page):
    return doc_blocks.blocks(page.read_text())


def prose(page):
    return doc_blocks.prose(page.read_text())


def rows(page, heading):
    """The cells of the rows of the table whose first column has this heading."""
    table = re.search(rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[1].splitlines()]


# --- what they show ---------------------------------------------------------------------------------------------------


@pytest.fixture
def reader(monkeypatch, tmp_path):
    """An empty folder to work in, the backend that a reader has, and no configs of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ALEXNET_TRITON_BACKEND")
    monkeypatch.setenv("ALEXNET_TRITON_CACHE", str(tmp_path / "cache"))
    configs.forget()
    yield
    configs.forget()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_pages_python_prints_what_the_page_shows(page, reader):
    without_commands = Path(page.name)
    without_commands.write_text(page.read_text().replace("```console\n", "```\n"))
    doc_blocks.run(without_commands)


COMMANDS = [block for block in blocks(GUIDE) if block.language == "console"]


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: block.text.split("\n")[0])
def test_the_guides_commands_print_what_the_page_shows(block, reader):
    version = re.search(r"With triton (\d+\.\d+)", GUIDE.read_text())[1]
    if "pytest" not in block.text and not triton.__version__.startswith(f"{version}."):
        pytest.skip(f"the compiler's figures are those of triton {version}")
    for file in blocks(GUIDE):
        if file.title:
            Path(file.title).write_text(file.text)
    doc_blocks.check_commands(block, f"{GUIDE.name}:{block.line}")


def test_what_the_guide_quotes_is_the_kernel():
    [quote] = [block.text for block in blocks(GUIDE) if block.language == "py"]
    assert quote == inspect.getsource(linear.gate_kernel.fn)


# --- what they say ----------------------------------------------------------------------------------------------------


def written(name, function, suffix=""):
    """A call of a function with all its parameters, defaults among them."""
    parameters = inspect.signature(function).parameters.values()
    return f"{name}({', '.join(str(p.replace(annotation=p.empty)) for p in parameters)}){suffix}"


SIGNATURES = {
    **{name: (written(f"ops.{name}", getattr(ops, name)), [getattr(ops, name)]) for name in ops.__all__},
    "augment": (
        written("recipe.augment.Augment", Augment, "(images, draws)"),
        [Augment, lambda images, draws: None],
    ),
    "krizhevsky_sgd": (written("recipe.optim.KrizhevskySGD", KrizhevskySGD), [KrizhevskySGD]),
}


def test_every_op_has_a_page():
    assert set(OPS) == {"index", *SIGNATURES}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_page_opens_with_the_signature_and_explains_every_argument(name):
    signature, functions = SIGNATURES[name]
    assert " ".join(blocks(OPS[name])[0].text.split()) == signature
    arguments = [argument for function in functions for argument in inspect.signature(function).parameters]
    assert [cells[0] for cells in rows(OPS[name], "argument")] == [f"`{argument}`" for argument in arguments]


N, C, H, W, K, R, S, G, I, O = 2, 6, 11, 9, 8, 5, 3, 2, 7, 5  # noqa: E741
CONV = convolution((N, C, H, W), (K, C // G, R, S), (2, 2), (1, 1), G)
SAVED = {
    # (sizes of the tensors, options), and what the table's letters are
    "conv2d_relu": (
        ([(N, C, H, W), (K, C // G, R, S), (K,)], {"stride": 2, "padding": 1, "groups": G}),
        {"P": CONV.out_size[0], "Q": CONV.out_size[1], "rows": CONV.x_layout.rows, "D": CONV.fold.depth_padded},
    ),
    "lrn_max_pool": (([(N, C, H, W)], {}), {"P": (H - 3) // 2 + 1, "Q": (W - 3) // 2 + 1}),
    "dropout_linear": (([(N, I), (O, I), (O,)], {"p": 0.5, "relu": True}), {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SAVED)
def test_what_autograd_saves_is_what_the_page_lists(name, dtype):
    (sizes, options), letters = SAVED[name]
    saved = []
    with FakeTensorMode(), use_backend("triton"), saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        getattr(ops, name)(*(torch.empty(size, dtype=dtype, requires_grad=True) for size in sizes), **options)
    listed = rows(OPS[name], "tensor")
    assert len(saved) == len(listed)
    for tensor, (what, shape, kind, _) in zip(saved, listed, strict=True):
        assert tuple(tensor.shape) == eval(shape.strip("`"), {**globals(), **letters}), what
        named = re.fullmatch(r"`torch\.(\w+)`", kind)
        assert tensor.dtype == (getattr(torch, named[1]) if named else dtype), what


def test_every_operator_of_torch_library_is_shown_with_its_schema():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("alexnet_triton::")}
    shown = set(re.findall(r"^(alexnet_triton::\w+)\(", OPS["index"].read_text(), re.MULTILINE))
    assert shown == registered


def test_every_kernel_stands_on_a_page_and_no_other():
    kernels = {
        name
        for path in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"^def ([a-z]\w*_kernel)\(", path.read_text(), re.MULTILINE)
    }
    said = {name for page in OPS.values() for name in re.findall(r"`(\w+_kernel)`", page.read_text())}
    assert said == kernels


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_tests_that_a_page_names_are_there(page):
    tests, named = "", 0
    for file, name in re.findall(r"\]\((?:\.\./)+tests/(\w+\.py)\)|`(test_\w+)`", prose(page)):
        if file:
            tests = (ROOT / "tests" / file).read_text()
        else:
            named += 1
            assert f"def {name}(" in tests, f"{page.name}: {name}"
    assert named >= 5 or page.stem in ("index", "kernels")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_links_lead_somewhere(page):
    for link, place in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", prose(page)):
        target = page.parent / link if link else page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        assert not place or place in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, place


@pytest.mark.parametrize("page", [OPS["index"], GUIDE], ids=lambda page: page.stem)
def test_the_limits_are_those_that_kernels_are_held_to(page):
    said = re.search(r"(\S+) in float32, (\S+) in float16, (\S+) in bfloat16", prose(page)).groups()
    assert [float(limit) for limit in said] == [kernel_cases.LIMITS[dtype] for dtype in kernel_cases.DTYPES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_measured_figure_stands_in_a_pages_prose(page):
    assert not re.findall(r"\d[\d.,]*(?:%| (?:ms|us|s|images/s|[KM]iB|GB/s|[GT]FLOP/s)\b)", prose(page))


# --- the interpreter's traps ------------------------------------------------------------------------------------------


@triton.jit
def traps_kernel(a, product, converted, largest, masked, BLOCK: tl.constexpr):
    # Each answer is what the guide's table warns of.
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(a + at)
    tl.store(product + at, tl.dot(value.to(tl.bfloat16), value.to(tl.bfloat16)))
    tl.store(converted + at, value)
    tl.store(largest + at, tl.maximum(tl.where(at == 0, float("nan"), value), 0.0))
    tl.store(masked + at, tl.load(a + at, mask=at < BLOCK))


def test_the_interpreter_has_the_traps_that_the_guide_warns_of():
    a = torch.full((16, 16), 1 + 3 / 512)
    product, largest, masked = (torch.empty(16, 16) for _ in range(3))
    converted = torch.empty(16, 16, dtype=torch.bfloat16)
    traps_kernel[(1,)](a, product, converted, largest, masked, BLOCK=16)
    assert (product - a @ a).abs().min() > 1e6, "bfloat16 is multiplied as numbers by now"
    assert converted.max() == 1
    assert a.bfloat16().min() == 1 + 2 / 256
    assert largest[0, 0] == 0, "tl.maximum keeps NaN by now"
    assert masked[1:].abs().max() == 0
