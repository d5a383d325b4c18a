"""A run of training that takes a second: AlexNet's layers with few filters, and patterns to tell apart.

As a program it trains in a process of its own, to be killed or started by torchrun.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from alexnet_triton import AlexNet
from alexnet_triton.recipe.data.sets import LabelledImages
from alexnet_triton.recipe.train import checkpoint
from alexnet_triton.recipe.train.checkpoint import Checkpoints
from alexnet_triton.recipe.train.loop import Training
from alexnet_triton.recipe.train.settings import Settings
from alexnet_triton.recipe.train.world import World, world
from alexnet_triton.recipe.trained import Trained

CLASSES = tuple("abcd")
SIZE, CROP = 75, 67


def patterns(count=22, seed=0):
    """Images whose class is the quarter that is bright."""
    labels = torch.arange(count) % 4
    noise = torch.randint(0, 90, (count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))
    half = SIZE // 2
    for image, label in zip(noise, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[:, row * half : (row + 1) * half, column * half : (column + 1) * half] += 160
    return LabelledImages("patterns", noise.to(torch.uint8), labels, CLASSES)


def network(dropout=0.5, seed=0):
    """AlexNet with 8 filters a layer and 16 units."""
    torch.manual_seed(seed)
    model = AlexNet(4, dropout, variant="torchvision", device="meta")
    for index, depth in ((0, 3), (3, 8), (6, 8), (8, 8), (10, 8)):
        old = model.features[index]
        model.features[index] = nn.Conv2d(depth, 8, old.kernel_size, old.stride, old.padding)
    for index, width in ((1, 8 * 36), (4, 16)):
        model.classifier[index] = nn.Linear(width, 16)
    model.classifier[6] = nn.Linear(16, 4)
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def training(folder, model=None, here=None, learn=None, workers=2, keep=3, **settings):
    """A run, not begun."""
    told = Settings(**{"epochs": 3, "batch_size": 8, "lr": 0.02, "crop": CROP, **settings})
    learn = learn or patterns()
    folder.mkdir(parents=True, exist_ok=True)
    trained = Trained(model or network(), CLASSES, learn.statistics(), SIZE, CROP)
    here = here or World(torch.device("cpu"))
    held_out = patterns(10, seed=1)
    return Training(trained, learn, held_out, told, Checkpoints(folder, keep), here, workers=workers, progress=False)


def resumed(folder, **more):
    """The run in `folder`, taken up at its newest checkpoint."""
    run = training(folder, network(seed=7), **more)
    path = run.checkpoints.newest()
    run.resume(checkpoint.read(path), repr(path.name))
    return run


def state(folder):
    """All that a run has come to, in tensors and plain types."""
    content = checkpoint.read(Checkpoints(folder).newest())
    del content["training"]["history"]["seconds"]
    for row in content["training"]["history"]["epochs"]:
        for name in ("seconds", "images_per_second", "waiting"):
            del row[name]
    return content


def equal(a, b):
    """Whether two such states are the same, to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def main():
    """Train as the words say: FOLDER, JSON of settings."""
    folder, told = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    dropout = told.pop("dropout", 0.5)
    with world("cpu") as here:
        model = network(dropout)
        torch.manual_seed(100 + here.rank)
        run = training(folder, model, here, **told)
        newest = run.checkpoints.newest()
        if newest is not None:
            run.resume(checkpoint.read(newest), newest.name)
        run.run()


if __name__ == "__main__":
    main()
