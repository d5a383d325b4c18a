"""Pages that run: their Python blocks in order, in one namespace; what they print is what the page shows.

A page's fences say what they are:

    ```python                              code, run in the page's namespace
    ```python title="NAME.py"              a file, written and left for a command
    ```console                             `$ COMMAND`, run by the shell as a user has it, and its output
    ```text                                what the block before prints, `...` standing for anything
    ```text title="Roughly"                the same, but every number may be a fifth off

Any other fence is shown and not run. Code whose output is not shown must print nothing.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

FENCE = re.compile(r'^```(?P<language>\w*)(?: title="(?P<title>[^"]*)")?\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
ROOT = Path(__file__).parents[1]
OUTPUT, ROUGHLY = "text", "Roughly"
TESTS_OWN = ("TRITON_INTERPRET", "ALEXNET_TRITON_BACKEND")


class Block(NamedTuple):
    """A fence of a page."""

    language: str
    title: str
    text: str
    line: int
    """Of the page, where the text begins."""


def blocks(markdown: str) -> list[Block]:
    return [
        Block(found["language"], found["title"] or "", found["text"], markdown.count("\n", 0, found.start()) + 2)
        for found in FENCE.finditer(markdown)
    ]


def prose(markdown: str) -> str:
    """A page without its fences."""
    return FENCE.sub("", markdown)


def run(page: Path) -> dict[str, object]:
    """Run a page's blocks in the working folder, and give the names that they leave.

    Raises:
        AssertionError: something prints what the page does not show.
    """
    names: dict[str, object] = {"__name__": "page"}
    printed, at = "", ""
    for block in blocks(page.read_text(encoding="utf-8")):
        where = f"{page.name}:{block.line}"
        if block.language == OUTPUT:
            check(block, printed, where)
            printed = ""
            continue
        assert not printed, f"{at} prints what the page does not show:\n{printed}"
        at = where
        if block.language == "python" and block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)
            printed = out.getvalue()
        elif block.language == "console":
            check_commands(block, where)
    assert not printed, f"{at} prints what the page does not show:\n{printed}"
    return names


def check(block: Block, printed: str, where: str) -> None:
    """Compare what was printed with an output's fence."""
    message = f"{where} shows\n{block.text}\nand what is printed is\n{printed}"
    expected = block.text
    if block.title == ROUGHLY:
        for pair in zip(NUMBER.findall(expected), NUMBER.findall(printed), strict=False):
            assert math.isclose(*(float(number.replace(",", "")) for number in pair), rel_tol=0.2), message
        expected, printed = NUMBER.sub("#", expected), NUMBER.sub("#", printed)
    assert doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS), message


def check_commands(block: Block, where: str) -> None:
    """Run a console's commands, and compare what each prints with what stands below it."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {name: value for name, value in os.environ.items() if name not in TESTS_OWN} | {"PATH": path}
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, env=environment)
        assert result.returncode == 0, f"{where}: {command}\n{result.stderr}"
        check(block._replace(text=expected), result.stdout, f"{where}: {command}")
