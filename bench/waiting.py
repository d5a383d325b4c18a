"""How long training on a GPU waits for images, of a packed dataset that the system has in its memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from alexnet_triton.backend import use_backend
from alexnet_triton.bench.checks import Absent, Measure, Scale, network
from alexnet_triton.variants import VARIANTS

STEPS = 24
"""Of an epoch; the second of two is measured, when kernels are compiled and checksums were looked at."""

LIMIT = 0.05
"""Of the time of training, as its history has it: that the host waits while the GPU has work left counts too."""


def training(variant: str, workers: int, scale: Scale, device: torch.device) -> dict[str, Any]:
    """What the second epoch of training in bfloat16 on random images measures: `images_per_second` and `waiting`.

    Args:
        variant: of the network.
        workers: threads that read.
        scale: how large: its first batch, and how thin the network is.
        device: where it trains.

    Raises:
        Absent: a package that training needs and the kernels do not.
    """
    try:
        from alexnet_triton.bench.data_memory import packed_set
        from alexnet_triton.parallel.processes.world import World
        from alexnet_triton.recipe.train.checkpoint import Checkpoints
        from alexnet_triton.recipe.train.loop import Training
        from alexnet_triton.recipe.train.settings import Settings
        from alexnet_triton.recipe.trained import Trained
    except ModuleNotFoundError as error:
        raise Absent(f"{error.name}, which training needs") from None
    small = device.type == "cpu"
    batch, crop = scale.batches[0], scale.image_size or VARIANTS[variant].image_size
    size = crop + crop // 8
    model = network(variant, scale, device, torch.float32, dropout=0.5)
    settings = Settings(epochs=2, batch_size=batch, lr=1e-4, crop=crop, amp=not small)
    with tempfile.TemporaryDirectory(prefix="alexnet-triton-") as folder:
        block = torch.randint(256, (3 * size**2,), dtype=torch.uint8).numpy().tobytes()
        data = packed_set(Path(folder) / "packed", batch * (2 if small else STEPS), size, block)
        names = tuple(f"{number:04}" for number in range(len(model.state_dict()["classifier.6.bias"])))
        trained = Trained(model, names, data.statistics(), size, crop)
        held_out = data.subset(torch.arange(1))
        run = Training(
            trained, data, held_out, settings, Checkpoints(Path(folder), 1), World(device), workers=workers,
            progress=False,
        )  # fmt: skip
        with use_backend("triton"):
            history = run.run()
        del run, held_out, data  # whose file is mapped
    return {name: history.column(name)[-1] for name in ("images_per_second", "waiting")}


def check_waiting(variant: str, workers: int, scale: Scale, device: torch.device) -> list[Measure]:
    """Training waits for images at most `LIMIT` of its time."""
    found = training(variant, workers, scale, device)
    return [Measure("share of the time", found["waiting"], LIMIT)]
