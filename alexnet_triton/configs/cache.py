"""Files of tuned configs: read, checked, merged, and written so that nothing is ever lost or half there.

    {"version": 1, "cards": {CARD: {PROBLEM: {IMAGES: {"config": {...}, "source": "measured", "triton": ..., ...}}}}}

CARD is the device's name; PROBLEM names all that a config may depend on but the batch (`problem_key`), and IMAGES is
the batch. `"source"` is `"measured"`, on that card, or `"modelled"`, from the compiler's figures.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import importlib.util
import io
import json
import math
import os
import stat
import sys
import tempfile
import tokenize
import warnings
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alexnet_triton.files import replaced
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
    "weight_gradient": ("weight_gradient",),
    "linear": ("linear", "random"),
    "norm_pool": ("norm_pool",),
}
"""The modules of `alexnet_triton.kernels` whose kernels solve it."""


class Entry(NamedTuple):
    """A config, and where it comes from."""

    config: dict[str, Any]
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
    """The user's file: in the folder `ALEXNET_TRITON_CACHE`, else in the user's cache folder.

    Raises:
        RuntimeError: there is no such variable, and the user has no home.
    """
    folder = os.environ.get("ALEXNET_TRITON_CACHE")
    if folder:
        return Path(folder).expanduser() / "configs.json"
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
    given = entry.config
    defaults = {field.name: field.default for field in fields(kind)}
    unknown, missing = set(given) - set(defaults), {name for name, default in defaults.items() if default is MISSING}
    if unknown or missing - set(given):
        raise ValueError(f"a config of {OPS[op]} has the fields {', '.join(defaults)}, got {given}")
    for name, value in given.items():
        if name in WORDS:
            if value not in WORDS[name]:
                raise ValueError(f"{name} of a config is one of {', '.join(WORDS[name])}, got {value!r}")
        elif type(value) is not int or not least(name) <= value <= MOST.get(name, 2**16):
            raise ValueError(f"{name} of a config is a whole number that kernels can take, got {value!r}")
        elif name.startswith(("block", "extra", "lanes", "warps")) and value & (value - 1):
            raise ValueError(f"{name} of a config is a power of two, got {value}")
    return kind(**given)


WORDS: dict[str, tuple[str, ...]] = {"loop": ("gathered", "shifted")}
"""Fields of configs that are no numbers, and what they may be."""

MOST = {"warps": 32, "stages": 32, "strip": 64}
"""What fields may be at most: a program has 1,024 threads."""


def least(name: str) -> int:
    """What a field of a config must at least be."""
    return 0 if name.startswith("extra") else 1


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
        whole = json.loads(text, object_pairs_hook=_once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error
    version = whole.get("version") if isinstance(whole, dict) else None
    if type(version) is int and version > VERSION:
        raise ValueError(f"it is of version {version}, which a later alexnet_triton has written")
    if type(version) is not int or version != VERSION or not isinstance(whole.get("cards"), dict):
        raise ValueError(f'it is no file of configs of version {VERSION} ({{"version": {VERSION}, "cards": ...}})')
    cards: Cards = {}
    for card, problems in whole["cards"].items():
        for problem, batches in _mapping(problems, card).items():
            for images, entry in _mapping(batches, problem).items():
                cards.setdefault(card, {}).setdefault(problem, {})[_images(images, problem)] = _entry(entry, problem)
    return cards


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands twice in one place")
        found[name] = value
    return found


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"what stands under {where!r} is {type(value).__name__}, not a mapping")
    return value


def _images(text: str, where: str) -> int:
    if not text.isascii() or not text.isdigit() or text != str(int(text)):
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
        if name in kinds_or_none and item is not None and not 0 < item < math.inf:
            raise ValueError(f"{name!r} under {where!r} is {item}, expected seconds")
    return Entry(**value)


_reported: set[Path] = set()


MOST_BYTES = 2**25
"""Of a file that is read: a hundred times what all networks and batches fill."""


def _text(path: Path) -> str:
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):  # a pipe would be waited for
        raise OSError("it is no file")
    if facts.st_size > MOST_BYTES:
        raise OSError(f"it has {facts.st_size:,} bytes, and none has over {MOST_BYTES:,}")
    return path.read_text(encoding="utf-8")


def read(path: Path) -> Cards:
    """The entries of a file; none where it is absent. A broken one is reported once, as a warning, and ignored."""
    try:
        return parse(_text(path))
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


def check_writable(path: Path) -> None:
    """Make the folder of a file that is to be written.

    Raises:
        OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def merge(path: Path, cards: Cards) -> None:
    """Add entries to a file, in the place of older ones of the same card, problem and batch.

    Whoever else merges at the same time waits, so nothing is lost; whoever reads sees the old file or the new one, and
    so does the next reader after a kill. A broken file is replaced, and kept beside it as `configs.json.broken`.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    from filelock import FileLock

    check_writable(path)
    path = Path(os.path.realpath(path))  # a link stays one
    with FileLock(f"{path}.lock", timeout=60):
        for left in path.parent.glob(
            f".{glob.escape(path.name)}.*"
        ):  # by who was killed in the middle: nobody else writes now
            left.unlink(missing_ok=True)
        try:
            merged = parse(_text(path)) if path.exists() else {}
        except (OSError, ValueError):
            merged = read(path)  # which reports it
            os.replace(path, f"{path}.broken")  # a copy would have to be allowed to read it
        for card, problems in cards.items():
            for problem, batches in problems.items():
                merged.setdefault(card, {}).setdefault(problem, {}).update(batches)
        write(path, text_of(merged))


def write(path: Path, text: str) -> None:
    """Replace a file as a whole."""
    with replaced(path) as (new,):
        new.write_text(text, encoding="utf-8")
