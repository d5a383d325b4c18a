"""Files of tuned configs: read, checked, merged, and written so that nothing is ever lost or half there.

    {"version": 1, "cards": {CARD: {PROBLEM: {IMAGES: {"config": {...}, "source": "measured", "triton": ..., ...}}}}}

CARD is the device's name; PROBLEM names all that a config may depend on but the batch (`problem_key`), and IMAGES is
the batch. `"source"` is `"measured"`, on that card, or `"modelled"`, from the compiler's figures.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import json
import os
import sys
import tempfile
import tokenize
import warnings
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alexnet_triton.kernels.config import (
    CONFIGS,
    Config,
    ConvProblem,
    LinearProblem,
    NormPoolProblem,
    Problem,
    WeightGradientProblem,
)

VERSION = 1
SOURCES = ("measured", "modelled")

OPS: dict[type[Problem], str] = {
    ConvProblem: "conv",
    WeightGradientProblem: "weight_gradient",
    LinearProblem: "linear",
    NormPoolProblem: "norm_pool",
}
"""What a kind of problem is called in a file."""

_KERNELS = {
    "conv": ("conv",),
    "weight_gradient": ("conv",),
    "linear": ("linear", "random"),
    "norm_pool": ("norm_pool",),
}
"""The modules of `alexnet_triton.kernels` whose kernels solve it."""


class Entry(NamedTuple):
    """A config, and where it comes from."""

    config: dict[str, int]
    source: str
    """Of `SOURCES`."""
    triton: str
    """The version that it was chosen with."""
    kernel: str
    """`kernel_hash` then."""
    seconds: float | None = None
    """Of the work with this config, measured or estimated."""
    default_seconds: float | None = None
    """With the default's."""
    date: str = ""


Cards = dict[str, dict[str, dict[int, Entry]]]
"""Entries by card, problem and images."""


def cache_path() -> Path:
    """The user's file: in the folder `ALEXNET_TRITON_CACHE`, else in the user's cache folder."""
    folder = os.environ.get("ALEXNET_TRITON_CACHE")
    if folder:
        return Path(folder) / "configs.json"
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "alexnet_triton" / "configs.json"


def problem_key(problem: Problem) -> str:
    """All of a problem but its batch, as a file names it: `"conv out_h=13 out_w=13 filters=384 ..."`."""
    words = [OPS[type(problem)]]
    for name, value in zip(problem._fields, problem, strict=True):
        if name == "images":
            continue
        if isinstance(value, torch.dtype):
            value = str(value).removeprefix("torch.")
        elif isinstance(value, tuple):
            value = "x".join(map(str, value))
        words.append(f"{name}={str(value).replace(' ', '_')}")
    return " ".join(words)


@functools.cache
def kernel_hash(op: str) -> str:
    """Of the kernels that solve `op`: it changes with their code, and not with comments or layout."""
    digest = hashlib.sha256()
    for name in _KERNELS[op]:
        found = importlib.util.find_spec(f"alexnet_triton.kernels.{name}")
        assert found is not None
        assert found.origin is not None
        source = Path(found.origin).read_text(encoding="utf-8")
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER):
                digest.update(token.string.encode() + b" ")
    return digest.hexdigest()[:12]


def config_of(entry: Entry, op: type[Problem]) -> Config:
    """The config of an entry.

    Raises:
        ValueError: it is none for problems of the kind `op`.
    """
    kind = CONFIGS[op]
    names = [field.name for field in fields(kind)]
    given = entry.config
    if sorted(given) != sorted(names) or not all(type(value) is int and 0 <= value < 2**16 for value in given.values()):
        raise ValueError(f"a config of {OPS[op]} has the whole numbers {', '.join(names)}, got {given}")
    for name in ("block_npq", "block_k", "block_crs", "block_m", "block_n", "block", "lanes", "warps", "extra_k"):
        value = given.get(name, 1)
        if value & (value - 1) or (value == 0 and name != "extra_k"):
            raise ValueError(f"{name} of a config is a power of two, got {value}")
    if min(given.get("splits", 1), given.get("stages", 1), given.get("strip", 1)) < 1:
        raise ValueError(f"splits, stages and strip of a config are at least 1, got {given}")
    return kind(**given)


def entry_of(config: Config, source: str, op: type[Problem], triton: str, **facts: Any) -> Entry:
    """An entry for a config that was chosen now."""
    return Entry(asdict(config), source, triton, kernel_hash(OPS[op]), **facts)


# --- reading ------------------------------------------------------------------------------------------------


def parse(text: str) -> Cards:
    """The entries of a file's text.

    Raises:
        ValueError: it is not such a file; the sentence says where.
    """
    try:
        whole = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(whole, dict) or whole.get("version") != VERSION or not isinstance(whole.get("cards"), dict):
        raise ValueError(f'it is no file of configs of version {VERSION} ({{"version": {VERSION}, "cards": ...}})')
    cards: Cards = {}
    for card, problems in whole["cards"].items():
        for problem, batches in _mapping(problems, card).items():
            for images, entry in _mapping(batches, problem).items():
                cards.setdefault(card, {}).setdefault(problem, {})[_images(images, problem)] = _entry(entry, problem)
    return cards


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"what stands under {where!r} is {type(value).__name__}, not a mapping")
    return value


def _images(text: str, where: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{text!r} under {where!r} is no number of images")
    return int(text)


def _entry(value: Any, where: str) -> Entry:
    value = _mapping(value, where)
    number = (int, float, type(None))
    kinds = {"config": dict, "source": str, "triton": str, "kernel": str, "date": str}
    kinds_or_none = {"seconds": number, "default_seconds": number}
    unknown = set(value) - set(Entry._fields)
    if unknown or not {"config", "source", "triton", "kernel"} <= set(value) or value["source"] not in SOURCES:
        raise ValueError(f"an entry under {where!r} lacks or has too much: {sorted(value)}")
    for name, item in value.items():
        if not isinstance(item, (kinds | kinds_or_none)[name]) or isinstance(item, bool):
            raise ValueError(f"{name!r} under {where!r} is {type(item).__name__}")
    return Entry(**value)


_reported: set[Path] = set()


def read(path: Path) -> Cards:
    """The entries of a file; none where it is absent. A broken one is reported once, as a warning, and ignored."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        if path not in _reported:
            _reported.add(path)
            warnings.warn(f"tuned configs in {path} are ignored: {error}", stacklevel=2)
        return {}


# --- writing ------------------------------------------------------------------------------------------------


def text_of(cards: Cards) -> str:
    """A file's text: one entry a line, in an order that does not change from run to run."""
    lines = []
    for card, problems in sorted(cards.items()):
        of_card = []
        for problem, batches in sorted(problems.items()):
            entries = [
                f"    {json.dumps(str(images))}: {json.dumps(_brief(entry))}"
                for images, entry in sorted(batches.items())
            ]
            of_card.append(f"   {json.dumps(problem)}: {{\n" + ",\n".join(entries) + "\n   }")
        lines.append(f"  {json.dumps(card)}: {{\n" + ",\n".join(of_card) + "\n  }")
    return f'{{\n "version": {VERSION},\n "cards": {{\n' + ",\n".join(lines) + "\n }\n}\n"


def _brief(entry: Entry) -> dict[str, Any]:
    return {name: value for name, value in entry._asdict().items() if value not in (None, "")}


def merge(path: Path, cards: Cards) -> None:
    """Add entries to a file, in the place of older ones of the same card, problem and batch.

    Whoever else merges at the same time waits, so nothing is lost; whoever reads sees the old file or the new one, and
    so does the next reader after a kill. A broken file is replaced.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=60):
        merged = read(path)
        for card, problems in cards.items():
            for problem, batches in problems.items():
                merged.setdefault(card, {}).setdefault(problem, {}).update(batches)
        write(path, text_of(merged))


def write(path: Path, text: str) -> None:
    """Replace a file as a whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
