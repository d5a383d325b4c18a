"""What is distributed: the packages, the files beside them, the version, the types, the wheel."""

import ast
import importlib
import inspect
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import alexnet_triton
from alexnet_triton.parallel import pipeline

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
ASIDE = {"build", "dist", "demo-out", "bench-out", "gpu-out"}
"""Folders that git ignores, and a distribution does without."""

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def installed_as(folder):
    """The name under which a folder of the tree is imported."""
    parts = folder.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "alexnet_triton" else ("alexnet_triton", *parts))


def folder_of(package, root=ROOT):
    """The folder of a package, as setuptools finds it."""
    places = SETUPTOOLS["package-dir"]
    known = package
    while known not in places:
        known = known.rpartition(".")[0]
    return root.joinpath(places[known], *package.removeprefix(known).split(".")[1:])


def sources(tree):
    """The packages' files of a tree, by the paths that they are installed under."""
    found = {}
    for package in SETUPTOOLS["packages"]:
        wanted = ["*.py", *SETUPTOOLS["package-data"].get(package, [])]
        for path in (path for pattern in wanted for path in folder_of(package, tree).glob(pattern)):
            found["/".join([*package.split("."), path.name])] = path.read_bytes()
    return found


def test_every_package_of_the_tree_is_distributed_from_where_it_lies():
    tops = (ROOT / name for name in ("alexnet_triton", "kernels", "bench"))
    on_disk = {path.parent for top in tops for path in top.rglob("__init__.py")}
    assert {package: folder_of(package) for package in SETUPTOOLS["packages"]} == {
        installed_as(folder): folder for folder in on_disk
    }


def test_every_file_beside_the_code_is_named_and_there():
    for package, patterns in SETUPTOOLS["package-data"].items():
        for pattern in patterns:
            assert list(folder_of(package).glob(pattern)), f"{package} has no {pattern}"
    assert SETUPTOOLS["package-data"]["alexnet_triton"] == ["py.typed"]
    assert not SETUPTOOLS["include-package-data"]


def test_version_is_that_of_the_newest_release_in_the_changelog():
    headings = re.findall(r"^## (\S+)(?: - (\d{4}-\d\d-\d\d))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert headings[1][0] == alexnet_triton.__version__
    assert all(date for _, date in headings[1:])
    numbers = [tuple(map(int, version.split("."))) for version, _ in headings[1:]]
    assert numbers == sorted(set(numbers), reverse=True)


def test_version_is_text_that_a_build_reads_without_an_import():
    tree = ast.parse((ROOT / "alexnet_triton" / "__init__.py").read_text())
    (value,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"
    )
    assert ast.literal_eval(value) == alexnet_triton.__version__
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "alexnet_triton.__version__"}


def test_supported_pythons_start_with_the_required_one():
    classified = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["project"]["classifiers"]))
    minors = [int(version.partition(".")[2]) for version in classified]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert PROJECT["project"]["requires-python"] == f">={classified[0]}"
    assert PROJECT["tool"]["mypy"]["python_version"] == classified[0]
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{classified[0].replace('.', '')}"


PUBLIC = [
    "alexnet_triton",
    "alexnet_triton.ops",
    "alexnet_triton.fusion",
    "alexnet_triton.parallel.pipeline",
]


def functions(module):
    """The public functions of a module, and the public methods of its public classes."""
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value):
            own = {key: each for key, each in vars(value).items() if not key.startswith("_") or key == "__init__"}
            for key, method in own.items():
                method = getattr(method, "__func__", method)
                if inspect.isfunction(method):
                    yield f"{name}.{key}", method
        elif inspect.isfunction(value):
            yield name, value


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_function_has_types(name):
    for function, value in functions(importlib.import_module(name)):
        signature = inspect.signature(value)
        assert signature.return_annotation is not signature.empty, f"{name}.{function} gives something of no type"
        for parameter in list(signature.parameters.values())[("." in function) :]:
            assert parameter.annotation is not parameter.empty, f"{name}.{function} takes {parameter} of no type"


def test_some_functions_are_looked_at_for_their_types():
    assert {name for name, _ in functions(pipeline)} > {"split", "auto_cut", "LocalPipeline.__init__"}


# --- what is built ----------------------------------------------------------------------------------------------------


def build(source, kind, out):
    """Build a distribution from a copy of a source tree with the setuptools that is here, and give its path."""
    call = f"from setuptools.build_meta import build_{kind}; build_{kind}({str(out)!r})"
    result = subprocess.run([sys.executable, "-c", call], cwd=source, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    (path,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return path


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """A copy of this tree, its source distribution, unpacked, and the wheel from that."""
    pytest.importorskip("setuptools", "77", reason="building takes setuptools 77")
    folder = tmp_path_factory.mktemp("distributions")
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", *ASIDE)
    shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    (folder / "out").mkdir()
    with tarfile.open(build(folder / "tree", "sdist", folder / "out")) as archive:
        (top,) = {name.partition("/")[0] for name in archive.getnames()}
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder / "tree", folder / top, build(folder / top, "wheel", folder / "out")


def test_wheel_holds_the_packages_and_their_files_and_nothing_else(distributions):
    tree, _, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        found = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert found.keys() == sources(tree).keys()
    assert found == sources(tree)


def test_source_distribution_holds_all_that_builds_and_tests(distributions):
    tree, source, _ = distributions
    for top in ("tests", "docs", "kernels", "bench", "alexnet_triton"):
        for path in (tree / top).rglob("*"):
            assert (source / path.relative_to(tree)).exists(), path
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "noxfile.py", "mkdocs.yml"):
        assert (source / name).is_file(), name


def test_metadata_says_what_the_package_is(distributions):
    _, source, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(name).decode()
        scripts = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    for line in (
        f"Version: {alexnet_triton.__version__}",
        "License-Expression: BSD-3-Clause",
        "License-File: LICENSE",
        "Requires-Python: >=3.10",
        "Classifier: Typing :: Typed",
        "Description-Content-Type: text/markdown",
        "Provides-Extra: compat",
    ):
        assert f"\n{line}\n" in metadata, line
    assert "alexnet-triton = alexnet_triton.cli:main" in scripts
    assert (source / "PKG-INFO").read_text(encoding="utf-8") == metadata
