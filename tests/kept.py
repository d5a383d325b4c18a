"""Networks in folders, as the tests of them look at them."""

import json

import torch

UNITS = 16
"""Width of fc6 and fc7 in these tests: what is kept does not depend on it."""


def config_in(folder):
    return json.loads((folder / "config.json").read_text())


def change(folder, **values):
    (folder / "config.json").write_text(json.dumps({**config_in(folder), **values}))


def equal(model, other):
    found, expected = model.state_dict(), other.state_dict()
    return list(found) == list(expected) and all(torch.equal(found[key], expected[key]) for key in expected)


def images(count=1):
    return torch.randn(count, 3, 67, 67, generator=torch.Generator().manual_seed(1))
