"""The package as a whole: what an import does and does not do, and which way its arrows run."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up: a module imports from lines above its own, or from its own line's package.
STOREYS = [
    {"kernels"},
    {"reference", "variants", "stages", "configs", "workers", "files"},
    {"backend", "layers", "folded", "chain", "caffe", "recompute"},
    {"library"},
    {"ops"},
    {"fusion", "weights", "pretrained", "graphs"},
    {"model"},
    {"info"},
    {"parallel"},
    {"recipe", "bench", "tuning"},
    {"demo"},
    {"cli", "__main__", "bench.__main__"},
]


TESTS_OWN = ("TRITON_INTERPRET", "ALEXNET_TRITON_BACKEND")
"""Variables that the tests set for themselves, and a user has not."""


def run(code, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in TESTS_OWN}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**kept, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_without_triton_runs_the_network():
    out = run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, alexnet_triton\n"
        "model = alexnet_triton.AlexNet(10).eval()\n"
        "print(tuple(model(torch.rand(1, 3, 67, 67)).shape))"
    )
    assert out.strip() == "(1, 10)"


def test_import_initialises_no_cuda_and_loads_nothing_heavy():
    out = run(
        "import sys, torch; before = set(sys.modules)\n"
        "import alexnet_triton\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = {'triton', 'torchvision', 'matplotlib', 'sklearn', 'tqdm', 'PIL'}\n"
        "print(torch.cuda.is_initialized(), sorted(new & heavy))"
    )
    assert out.strip() == "False []"


def test_public_names_exist():
    import alexnet_triton

    for name in alexnet_triton.__all__:
        assert hasattr(alexnet_triton, name)


def imports(path):
    """Names that a file imports, of whole modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path):
    relative = path.relative_to(ROOT)
    parts = relative.with_suffix("").parts
    parts = parts[1:] if parts[0] == "alexnet_triton" else parts
    return ".".join(parts)


SOURCES = [
    path
    for folder in ("alexnet_triton", "kernels", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != ROOT / "alexnet_triton" / "__init__.py"
]


def storey(name):
    parts = name.split(".")
    for number, rooms in enumerate(STOREYS):
        if name in rooms or (".".join(parts[:2]) in rooms and parts[-1] == "__main__"):
            return number
    return next(number for number, rooms in enumerate(STOREYS) if parts[0] in rooms)


@pytest.mark.parametrize("path", SOURCES, ids=room)
def test_arrows_run_one_way(path):
    own = room(path)
    for name in imports(path):
        if not name.startswith("alexnet_triton."):
            continue
        target = name.removeprefix("alexnet_triton.")
        if target in ("ops", "__version__") or target.split(".")[0] == own.split(".")[0]:
            target = target if target == "ops" else own
        try:
            above = storey(target)
        except StopIteration:  # a public name of the package itself, which stands on the model
            above = storey("model")
        assert above <= storey(own), f"{own} imports {name}"


def test_kernels_and_reference_stand_on_torch_alone():
    for path in [*(ROOT / "kernels").glob("*.py"), ROOT / "alexnet_triton" / "reference.py"]:
        allowed = {"torch", "triton", "alexnet_triton.kernels"} if path.parent.name == "kernels" else {"torch"}
        for name in imports(path):
            own = name.split(".")[0]
            assert own in sys.stdlib_module_names or any(f"{name}.".startswith(f"{a}.") for a in allowed), (path, name)


def test_no_kernel_counts_on_the_order_of_its_programs():
    for path in (ROOT / "kernels").glob("*.py"):
        assert "tl.atomic" not in path.read_text()
