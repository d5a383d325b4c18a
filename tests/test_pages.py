"""The guides: their Python runs, and their command lines are ones that the programs take."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from alexnet_triton.cli import _parser

ROOT = Path(__file__).parents[1]
PARALLEL = ROOT / "docs" / "parallel.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PARALLEL.read_text(), re.MULTILINE | re.DOTALL)


def test_the_guides_python_runs(capsys):
    torch.manual_seed(0)
    names = {}
    for block in BLOCKS:
        exec(block, names)
    assert names["loss"].isfinite()
    assert names["logits"].shape == (16, 10)
    assert re.search(r"^\('(features|classifier)\.\d+',\)$", capsys.readouterr().out, re.MULTILINE)


def test_the_guides_commands_are_the_programs():
    from torch.distributed.run import get_args_parser

    page = PARALLEL.read_text().replace("\\\n", "")
    started = re.findall(r"^\$ torchrun (.*)$", page, re.MULTILINE)
    assert len(started) >= 3
    for command in started:
        options = get_args_parser().parse_args(shlex.split(command))
        assert (options.module, options.training_script) == (True, "alexnet_triton")
        assert _parser().parse_args(options.training_script_args).data.name == "packed"
    for command in re.findall(r"^\$ alexnet-triton (.*)$", page, re.MULTILINE):
        assert _parser().parse_args(shlex.split(command))


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_the_pages_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), link
