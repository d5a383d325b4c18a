"""`python -m alexnet_triton.bench readme`: the pages' tables and pictures, from the results in `bench/results`.

A page holds pairs of markers, each on a line of its own and unseen where the page is shown:

    <!-- results: layers -->                       the table of bench/results/layers.json
    <!-- results, if any: predict-h100 -->         the same; nothing while there is no such file
    <!-- picture: roofline of layers -->           what `alexnet-triton plot roofline` draws of it, in docs/
    <!-- end -->

What stands between a marker and its end is written by this module and by nobody else.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from alexnet_triton.bench import cpu, data, dispatch, layers, lpips, model, parallel, plots, predict
from alexnet_triton.bench.plots import canvas, files, fusion
from alexnet_triton.bench.timing import heading

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "bench/README.md")
RESULTS, PICTURES = "bench/results", "docs"

BLOCK = re.compile(r"^(?P<marker><!-- (?!end ).*)\n(?P<inside>(?:(?!<!--).*\n)*)<!-- end -->$", re.MULTILINE)
STRAY = re.compile(r"^<!--.*$", re.MULTILINE)
RESULT = re.compile(r"<!-- results(?P<optional>, if any)?: (?P<name>[\w.-]+) -->")
PICTURE = re.compile(r"<!-- picture(?P<optional>, if any)?: (?P<kind>\w+) of (?P<name>[\w.-]+) -->")

BATCH = 128
"""Whose rows and picture are shown where a file holds several batches; else the first batch's."""

COLOURS = 256
"""Of a picture's file, which a palette makes small. Far fewer would give two peers one colour."""


# --- tables -----------------------------------------------------------------------------------------------------------


def _demo(result: Mapping[str, Any]) -> str:
    held_out, learned_from = result["data"]["held_out"], result["data"]["learned_from"]
    return textwrap.fill(
        f"It got {result['accuracy']:.1%} of {held_out:,} held-out digits right after "
        f"{result['history']['seconds']:.0f} s of training on {learned_from:,} ({heading(result['machine'])}).",
        120,
    )


def _predict(result: Mapping[str, Any]) -> str:
    batches = list(dict.fromkeys(row["batch"] for row in result["rows"]))
    shown = BATCH if BATCH in batches else batches[0]
    rows = [row for row in result["rows"] if row["batch"] == shown]
    lines = [
        f"A model's estimate for {result['machine']['device']}, not a measurement: torch {result['machine']['torch']}, "
        f"triton {result['machine']['triton']}, {result['machine']['date']}",
        f"{rows[0]['variant']}, {rows[0]['dtype']}, batch {shown:,}",
        predict.format_table(rows),
        predict.LEGEND,
    ]
    others = [f"{batch:,}" for batch in batches if batch != shown]
    return "\n".join(lines + [f"the file has batches {', '.join(others)} too"] * bool(others))


class Table(NamedTuple):
    """How a benchmark's result is shown."""

    text: Callable[[Mapping[str, Any]], str]
    """The result in words or as a table, with its machine, versions and date."""
    command: str
    """That writes the file."""
    fenced: bool = True
    """Whether the text is a table of plain text, not a sentence."""


TABLES: Mapping[str, Table] = {
    "cpu": Table(lambda result: cpu.format_result(dict(result)), "bench cpu"),
    "data": Table(data.format_result, "bench data"),
    "demo": Table(_demo, "demo", fenced=False),
    "dispatch": Table(lambda result: dispatch.format_table(dict(result)), "bench dispatch"),
    "layers": Table(layers.format_result, "bench layers"),
    "lpips": Table(lpips.format_result, "bench lpips"),
    "model": Table(model.format_result, "bench model"),
    "parallel": Table(parallel.format_result, "bench parallel"),
    "predict": Table(_predict, "bench predict"),
}
"""By the benchmark that a file names, or that it is called after."""


def _table(path: Path, link: str) -> str:
    result = _read(path)
    benchmark = result.get("benchmark", path.stem)
    if benchmark not in TABLES:
        raise ValueError(f"{path} is a result of {benchmark!r}, of which there is no table")
    table = TABLES[benchmark]
    facts = result.get("machine", result)
    try:
        text = table.text(result)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of alexnet-triton {table.command}: it lacks {error}") from error
    source = f"`alexnet-triton {table.command}` at commit {facts.get('commit', 'unknown')}: [{path.name}]({link})."
    return f"```\n{text}\n```\n\n{source}" if table.fenced else f"{text}\n{source}"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no result: it holds no object")
    return content


# --- pictures ---------------------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A picture that a page shows."""

    kind: str
    """Of `plots.PLOTS`."""
    source: Path
    """The result that it is of."""
    path: Path

    def stamp(self) -> str:
        """What a picture of the result as it is now has in its file."""
        return hashlib.sha256(self.source.read_bytes()).hexdigest()

    def fresh(self) -> bool:
        """Whether the file is there, a picture, and of the result as it is now."""
        from PIL import Image

        try:
            with Image.open(self.path) as image:
                return bool(image.info.get("Source") == self.stamp())
        except OSError:
            return False

    def draw(self) -> None:
        """Draw it, in a palette, since it is kept in the repository."""
        from PIL import Image, PngImagePlugin

        plot = plots.PLOTS[self.kind]
        drawn = list(plot.draw(files.read(self.source, plot.benchmarks)))
        figure = next((figure for names, figure in drawn if f"batch{BATCH}" in names), drawn[0][1])
        held = io.BytesIO()
        figure.savefig(held, dpi=canvas.DPI)
        image = Image.open(held).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        facts = PngImagePlugin.PngInfo()
        facts.add_text("Source", self.stamp())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")  # half a picture would have the stamp already
        image.save(part, "PNG", optimize=True, pnginfo=facts)
        part.replace(self.path)


# --- pages ------------------------------------------------------------------------------------------------------------


class Page(NamedTuple):
    """A page as the results make it."""

    text: str
    changed: list[str]
    """The markers whose text differs from the page's as it was, each after the page's name."""
    pictures: list[Picture]
    """That it shows."""


def render(page: Path, root: Path = ROOT) -> Page:
    """A page with everything between its markers made anew.

    Raises:
        ValueError: a marker is unknown, without an end, or names a result that is not there or cannot be shown.
    """
    name = page.relative_to(root)
    text = page.read_text(encoding="utf-8")
    stray = STRAY.search(BLOCK.sub("", text))
    if stray:
        raise ValueError(f"{name}: {stray[0]} stands alone: a marker needs an end after it, and an end a marker before")
    changed: list[str] = []
    pictures: list[Picture] = []

    def made_anew(block: re.Match[str]) -> str:
        try:
            inside, picture = _made(block["marker"], page, root)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        inside += "\n" if inside else ""
        if block["inside"] != inside:
            changed.append(f"{name}: {block['marker']}")
        pictures.extend([picture] if picture else [])
        return f"{block['marker']}\n{inside}<!-- end -->"

    return Page(BLOCK.sub(made_anew, text), changed, pictures)


def _made(marker: str, page: Path, root: Path) -> tuple[str, Picture | None]:
    """What a marker asks for: text, and the picture that it shows.

    Args:
        marker: the line.
        page: where it stands.
        root: of the repository.
    """
    asked = RESULT.fullmatch(marker) or PICTURE.fullmatch(marker)
    if asked is None:
        raise ValueError(f"unknown marker {marker}")
    path = root / RESULTS / f"{asked['name']}.json"
    if not path.exists():
        if asked["optional"]:
            return "", None
        raise ValueError(f"{marker} asks for {path.relative_to(root)}, which is not there")
    kind = asked.groupdict().get("kind")
    if kind is None:
        return _table(path, _link(page, path)), None
    if kind not in plots.PLOTS:
        raise ValueError(f"{marker} asks for a picture {kind!r}: choose one of {', '.join(plots.PLOTS)}")
    picture = Picture(kind, path, root / PICTURES / f"{kind if kind == path.stem else f'{kind}-{path.stem}'}.png")
    title = f"{kind}, {files.read(path, plots.PLOTS[kind].benchmarks).title}"
    return f"![{title}]({_link(page, picture.path)})", picture


def _link(page: Path, to: Path) -> str:
    return Path(os.path.relpath(to, page.parent)).as_posix()


def run(check: bool = False, root: Path = ROOT) -> int:
    """Write the pages anew, and the pictures whose results have changed; give the exit code.

    Args:
        check: write nothing, and give 1 where something would be written.
        root: of the repository.

    Raises:
        ValueError: there is no repository, or a marker or a result cannot be used.
    """
    for name in (*PAGES, RESULTS):
        if not (root / name).exists():
            raise ValueError(f"there is no {name} in {root}: bench readme writes the pages of a repository's clone")
    pages = {root / name: render(root / name, root) for name in PAGES}
    pictures = dict.fromkeys(picture for page in pages.values() for picture in page.pictures)
    stale = [picture for picture in pictures if not picture.fresh()]
    drawing = root / "docs" / "fusion.png"  # of the plan, not of a result
    redraw = drawing.with_suffix(".md").exists() and not fusion.fresh(drawing)
    if not check:
        if redraw:
            fusion.write(drawing)
        for picture in stale:
            picture.draw()
        for path, page in pages.items():
            if page.changed:
                path.write_text(page.text, encoding="utf-8")
    found = [change for page in pages.values() for change in page.changed]
    found += [f"{picture.path.relative_to(root)}" for picture in stale]
    found += [f"{drawing.relative_to(root)}"] if redraw else []
    for each in found:
        print(f"{'not what the results give' if check else 'written'}: {each}")
    if not found:
        print("the pages show what the results give")
    return int(check and bool(found))
