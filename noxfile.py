"""`make compat`: the wheel in fresh environments, one for each Python that is here and each end of what torch may be.

Each environment gets what a user's gets (uv downloads it, some 3 GB that the Pythons share, and 0.8 GB each), runs
`tests/smoke.py` and is deleted, with its torch, before the next is made: no more than 12 GB are needed at a time. What
came of it is written to `docs/compat.md`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from datetime import date
from pathlib import Path

import nox

WORK = Path("build/compat").resolve()
PROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PROJECT)
LEAST = next(one.removeprefix("torch>=") for one in PROJECT["project"]["dependencies"] if one.startswith("torch>="))
ENDS = {"oldest": f"torch=={LEAST}.*", "newest": "torch"}
"""torch by the end of what is supported. Each release of it asks for one of Triton, torchvision's for one of torch."""

UV = (sys.executable, "-m", "uv")
PACKAGES = ("torch", "triton", "torchvision", "numpy")
LOOK = f"""
import importlib.metadata as metadata, json, platform
print(json.dumps({{"python": platform.python_version(), **{{name: metadata.version(name) for name in {PACKAGES}}}}}))
"""

# pyenv keeps the Pythons that are not its active one off the PATH.
pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv", "versions")
os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], *map(str, sorted(pyenv.glob("*/bin")))])
os.environ["UV_CACHE_DIR"] = str(WORK / "cache")  # beside the environments, which take their files from it as links

nox.needs_version = ">=2025.5.1"
nox.options.envdir = WORK / "environments"
nox.options.default_venv_backend = "uv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False


@nox.session(python=False)
def dist(session: nox.Session) -> None:
    """A source distribution, and a wheel from it."""
    shutil.rmtree(WORK, ignore_errors=True)
    session.run(*UV, "build", "--quiet", "--out-dir", str(WORK / "dist"))


@nox.session(python=PYTHONS, requires=["dist"])
@nox.parametrize("end", list(ENDS))
def compat(session: nox.Session, end: str) -> None:
    """The smoke test, with the wheel and what it asks for."""
    (wheel,) = (WORK / "dist").glob("*.whl")
    row = {"python": str(session.python), "result": "failed"}
    try:
        session.install(str(wheel), ENDS[end])
        row |= json.loads(session.run("python", "-c", LOOK, silent=True))
        session.run("python", "tests/smoke.py")
        row["result"] = "passed"
    finally:
        (WORK / f"{session.python}-{end}.json").write_text(json.dumps(row))
        shutil.rmtree(session.virtualenv.location)
        session.run(*UV, "cache", "clean", "--quiet", "torch", "triton", external=True)


@nox.session(python=False)
def table(session: nox.Session) -> None:
    """What came of it, as a page."""
    columns = ("python", *PACKAGES, "result")
    lines = [["Python", *columns[1:]]]
    for python in PYTHONS:
        files = [path for path in (WORK / f"{python}-{end}.json" for end in ENDS) if path.exists()]
        rows = [json.loads(path.read_text()) for path in files] or [{"python": python, "result": "not found here"}]
        lines += [[row.get(name, "") for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    text = "".join(f"| {' | '.join(map(str.ljust, line, widths))} |\n" for line in lines)
    (wheel,) = (WORK / "dist").glob("*.whl")
    where = f"{platform.system()}, {platform.machine()}, without a GPU"
    page = PAGE.format(table=text, version=wheel.name.split("-")[1], date=date.today(), where=where)
    Path("docs/compat.md").write_text(page, encoding="utf-8")
    shutil.rmtree(WORK / "cache", ignore_errors=True)
    session.log(f"docs/compat.md:\n{text}")


PAGE = """\
# Versions

`make compat` wrote this page on {date}, for version {version}, on {where}.

It builds a source distribution, and the wheel from that. Then, for each Python that it finds and for the oldest and the
newest torch that the package takes, it makes a fresh environment, installs the wheel and runs `tests/smoke.py`: the
network beside torchvision's, forward and backward; every op's kernels in Triton's interpreter against float64; a kernel
compiled for an H100; the command line.

{table}
Each release of torch asks for one of Triton. Not every release is published for every Python: a Python's newest is what
a package index has for it.

A Python that is not found is passed over; a failure makes the command fail. It looks on the `PATH` and in pyenv, and
needs a connection to a package index: torch and Triton are some 0.8 GB to download for each row, and CUDA's libraries
3 GB for each torch. It deletes what it has installed as it goes, and never holds more than 12 GB.
"""
