"""The site's pages: their code runs and prints what they show, links lead somewhere, and nothing is fetched."""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import re

import doc_blocks
import narrow
import plain
import pytest
import test_caffe
import yaml

import alexnet_triton
from alexnet_triton import ops
from alexnet_triton.bench.plots import fusion
from alexnet_triton.parallel import pipeline, scaling

DOCS = doc_blocks.ROOT / "docs"
RUNNING = {
    "index.md": 1,
    "tutorial.md": 10,
    "fusion.md": 4,
    "faq.md": 12,
    "keeping.md": 10,
    "migrate/torchvision.md": 5,
    "migrate/listing.md": 4,
    "migrate/caffe.md": 5,
}
"""Pages whose code runs, and how many Python blocks they have at least."""

spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)

SITE = yaml.safe_load((doc_blocks.ROOT / "mkdocs.yml").read_text())
PAGES = sorted(path.relative_to(doc_blocks.ROOT).as_posix() for path in DOCS.rglob("*.md"))
OUTSIDE = [page for page in hooks.PAGES if (doc_blocks.ROOT / page).exists()]


def text(page):
    return (doc_blocks.ROOT / page).read_text()


# --- code -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The files of weights that pages read, in a folder where they run."""
    monkeypatch.chdir(tmp_path)
    state = plain.alexnet("caffe").state_dict()
    parameters = {
        name: tuple(state[f"{key}.{kind}"].numpy() for kind in ("weight", "bias"))
        for name, key in test_caffe.KEYS.items()
    }
    (tmp_path / "bvlc_alexnet.caffemodel").write_bytes(test_caffe.network(parameters))


@pytest.mark.parametrize("name", RUNNING)
def test_a_pages_code_runs_and_prints_what_the_page_shows(name, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable in doc_blocks.TESTS_OWN:
        monkeypatch.delenv(variable, raising=False)
    if "bvlc_alexnet.caffemodel" in text(f"docs/{name}"):
        request.getfixturevalue("published")
    python = [block for block in doc_blocks.blocks(text(f"docs/{name}")) if block.language == "python"]
    assert len(python) >= RUNNING[name]
    with narrow.one_thread():
        doc_blocks.run(DOCS / name)


PAGE = """
```python
print("as it is")
```

```text
{output}
```
"""


@pytest.mark.parametrize("output", ["as it was", "as it is\nand more", ""])
def test_a_page_that_shows_what_is_not_printed_is_found_out(output, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.format(output="as ... is"))
    doc_blocks.run(page)
    page.write_text(PAGE.format(output=output))
    with pytest.raises(AssertionError, match=r"page.md:7 shows"):
        doc_blocks.run(page)
    page.write_text(PAGE.split("```text")[0])
    with pytest.raises(AssertionError, match=r"page.md:3 prints what the page does not show:\nas it is"):
        doc_blocks.run(page)


def test_figures_that_are_rough_may_be_a_fifth_off_and_words_may_not():
    block = doc_blocks.Block("text", doc_blocks.ROUGHLY, "90% of 1,000\n", 1)
    doc_blocks.check(block, "81% of 1,100\n", "here")
    for printed in ("60% of 1,000\n", "90% of 1,000 digits\n", "90% of 2,000\n"):
        with pytest.raises(AssertionError, match="here shows"):
            doc_blocks.check(block, printed, "here")


@pytest.mark.parametrize("name", RUNNING)
def test_code_fits_the_page(name):
    for block in doc_blocks.blocks(text(f"docs/{name}")):
        if block.language == "python":
            assert max(map(len, block.text.splitlines())) <= 115, f"{name}:{block.line}"


def test_no_figure_that_was_measured_stands_in_prose():
    for page in PAGES:
        if page.removeprefix("docs/") in RUNNING:
            prose = re.sub(r"`[^`]*`", "", doc_blocks.prose(text(page)))
            found = re.findall(r"\d[\d.,]*(?:%| (?:ms|us|s|images/s|MiB|GB/s|[GT]FLOP/s)\b)|\d[\d.]*x faster", prose)
            assert not found, f"{page} has {found}: results belong into bench/results, and a page says where they are"


# --- the site ---------------------------------------------------------------------------------------------------------


def navigation(entries=None):
    """The pages of the navigation, in order."""
    for entry in SITE["nav"] if entries is None else entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from navigation(value) if isinstance(value, list) else [value]


def test_the_navigation_has_every_page_once_and_no_other():
    found = list(navigation())
    assert len(set(found)) == len(found)
    made = {hooks.PAGES[page] for page in OUTSIDE} | {hooks.COMMANDS}
    assert set(found) == {hooks.site_path(page) for page in PAGES} | made


def test_the_page_of_commands_has_them_all_with_their_options(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    page = hooks.commands()
    found = re.findall(r"^(#+) (alexnet-triton .*)$", page, re.MULTILINE)
    assert len(found) >= 25
    assert ("##", "alexnet-triton train") in found
    assert found.index(("###", "alexnet-triton bench cpu")) == found.index(("##", "alexnet-triton bench")) + 1
    assert "usage: alexnet-triton pipeline plan" in page
    assert "--held-out" in page


def anchors(markdown):
    """What GitHub and the site call a page's headings in an address."""
    headings = re.findall(r"^#+ (.*)$", doc_blocks.prose(markdown), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *OUTSIDE])
def test_links_lead_somewhere_in_the_repository_and_on_the_site(page):
    for link in hooks.links(text(page)):
        target = hooks.target(page, link["path"])
        assert (doc_blocks.ROOT / target).exists(), f"{page} links to {link['path']}"
        assert not (doc_blocks.ROOT / target).is_dir(), f"{page} links to a folder, which the site has not: {target}"
        if link["anchor"] and target.endswith(".md"):
            assert link["anchor"][1:] in anchors(text(target)), f"{page} links to {target}{link['anchor']}"
    for anchor in re.findall(r"\]\(#([^)]*)\)", doc_blocks.prose(text(page))):
        assert anchor in anchors(text(page)), f"{page} links to its own {anchor}"


def test_a_link_out_of_the_docs_leads_to_the_sites_copy():
    class File:
        src_uri = "ops/conv2d_relu.md"

    class Page:
        file = File

    markdown = "[a](../../kernels/conv.py) [b](index.md#more) [c](../../README.md) `[d](../../kernels/conv.py)`"
    expected = "[a](../source/kernels/conv.py.md) [b](index.md#more) [c](../overview.md) `[d](../../kernels/conv.py)`"
    assert hooks.on_page_markdown(markdown, Page, None, None) == expected
    File.src_uri = "measurements.md"  # bench/README.md, which is read from where it lies
    assert hooks.on_page_markdown("![p](../docs/layers.png)", Page, None, None) == "![p](layers.png)"


@pytest.mark.parametrize(
    ("html", "fetches"),
    [
        ('<link rel="stylesheet" href="https://fonts.googleapis.com/css?family=Roboto">', True),
        ('<script async src="//unpkg.com/mermaid"></script>', True),
        ("<img alt='a' src='http://elsewhere/a.png'>", True),
        ("<style>@import url(https://elsewhere/a.css)</style>", True),
        ("<style>body { background: url('//elsewhere/a.png') }</style>", True),
        ('<a href="https://arxiv.org/abs/1404.5997">a link to follow</a>', False),
        ('<link rel="stylesheet" href="assets/site.css"><img src="../layers.png"><script src="a.js"></script>', False),
    ],
)
def test_a_build_sees_what_a_page_would_fetch(html, fetches, caplog):
    class Page:
        class file:
            src_uri = "page.md"

    assert hooks.on_post_page(html, Page, None) == html
    assert ("page.md makes a browser fetch" in caplog.text) is fetches


def test_nothing_is_fetched_by_scripts_or_styles():
    assert SITE["theme"]["font"] is False  # Google's
    assert not {"repo_url", "extra_javascript"} & set(SITE)  # with a repository the theme asks GitHub for its stars
    assert "analytics" not in SITE["extra"]
    assert [hooks.FETCHED.search((DOCS / sheet).read_text()) for sheet in SITE["extra_css"]] == [None]
    for page in [*PAGES, *OUTSIDE]:
        assert not re.search(r"^```mermaid", text(page), re.MULTILINE), f"{page}: the theme fetches what draws it"


# --- the reference ----------------------------------------------------------------------------------------------------


def described():
    """The objects that the pages of the reference are made of, by their dotted names."""
    found = {}
    for page in sorted((DOCS / "api").glob("*.md")):
        pattern = r"^::: ([\w.]+)$(?:\n    options: .*members: \[([^]]*)\])?"
        for name, members in re.findall(pattern, page.read_text(), re.MULTILINE):
            for member in members.split(", ") if members else [""]:
                path = f"{name}.{member}".rstrip(".")
                assert path not in found, f"{path} is described twice"
                found[path] = pkgutil.resolve_name(path)
    return found


def test_every_public_name_is_in_the_reference():
    objects = list(described().values())
    for module in (alexnet_triton, ops, pipeline, scaling):
        for name in module.__all__:
            public = getattr(module, name)
            if inspect.isclass(public) or inspect.isfunction(public):
                assert any(public is each for each in objects), f"{module.__name__}.{name}"


def test_what_the_reference_describes_says_what_it_takes_gives_and_refuses():
    """In the sections that the site makes lists of."""
    for name, each in described().items():
        if not (inspect.isclass(each) or inspect.isfunction(each)):
            continue
        text = inspect.getdoc(each)
        assert text, name
        raw = re.search(r"^\.\. |:[a-z]+:`|^Example:$", text, re.MULTILINE)
        assert not raw, f"{name}: the site shows {raw[0]!r} as it is"
        methods = {key: value for key, value in vars(each).items() if inspect.isfunction(value) and key[0] != "_"}
        for key, function in {**methods, name: each}.items():
            result = re.search(r"^Returns:\n *(.*)", inspect.getdoc(function) or "", re.MULTILINE)
            assert not result or ": " not in result[1], f"{key}: the site takes what is before the colon for a type"
        if inspect.isfunction(each):
            parameters = [p for p in inspect.signature(each).parameters if p != "self"]
            missing = [p for p in parameters if not re.search(rf"^    \*{{0,2}}{p}\b.*:", text, re.MULTILINE)]
            assert not missing, f"{name} does not say what {missing} are"


# --- the picture ------------------------------------------------------------------------------------------------------


def test_the_picture_of_the_fusion_is_of_the_plan_as_it_is():
    assert fusion.fresh(DOCS / "fusion.png"), "draw it anew: make readme"
    assert (DOCS / "fusion.png").stat().st_size < 120_000


def test_the_picture_shows_all_ops_and_a_chain_that_a_hook_has_broken():
    model = fusion.network()
    rows, plain_plan = fusion.layers(model), fusion.plan(model)
    assert {run.text for run in plain_plan.runs} == {"conv2d_relu", "lrn_max_pool", "dropout_linear", fusion.ALONE}
    assert [rows[row].title or rows[row].text for row in plain_plan.chains[0]] == ["conv1", "MaxPool2d 3x3, stride 2"]
    assert len(plain_plan.chains) == 1
    assert [number for run in plain_plan.runs for number in range(run.first, run.last + 1)] == list(range(len(rows)))
    hooked, broken = fusion.broken_plan(model)
    assert rows[hooked].title == "conv4"
    assert fusion.Run(fusion.ALONE, hooked, hooked) in broken.runs
    assert len(broken.chains) == 2
    assert fusion.plan(model) == plain_plan


def test_a_picture_of_another_plan_is_not_fresh(tmp_path, monkeypatch):
    path = tmp_path / "fusion.png"
    assert not fusion.fresh(path)
    monkeypatch.setattr(fusion, "DPI", 30)
    fusion.write(path)
    assert fusion.fresh(path)
    monkeypatch.setattr(fusion, "VARIANT", "torchvision")
    assert not fusion.fresh(path)
