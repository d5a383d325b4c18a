"""A step of a real run, drawn as a plan is."""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor

from alexnet_triton.parallel.pipeline.engine import PipelineEngine
from alexnet_triton.parallel.pipeline.names import described
from alexnet_triton.parallel.pipeline.picture import draw
from alexnet_triton.parallel.pipeline.simulation import Timeline


def draw_step(engine: PipelineEngine, images: Tensor | None, labels: Tensor, total: int, path: Path) -> Tensor:
    """Take a step, and draw when each stage of the first replica worked on what; all processes must call it together.

    Args:
        engine: the pipeline. Whatever it traces otherwise is left as it is.
        images: as of `Engine.step`.
        labels: likewise.
        total: likewise.
        path: of the picture, which the process that leads writes; see `picture.draw`.

    Returns:
        What `Engine.step` gives.
    """
    before, engine.trace.on = engine.trace.on, True
    start = time.perf_counter()
    try:
        counted = engine.step(images, labels, total)
    finally:
        engine.trace.on = before
    seconds = time.perf_counter() - start
    blocks = engine.trace_blocks()
    if engine.world.leads:
        timeline = Timeline(tuple(blocks))
        draw(
            timeline,
            path,
            f"AlexNet ({engine.model.variant}), {len(labels)} images in microbatches of {engine.size}, "
            f"{len(engine.stages)} stages, {engine.schedule}",
            images_per_second=total / seconds,
            rows=[f"stage {number}\n{described(stage.names)}" for number, stage in enumerate(engine.stages)],
            note=f"One step of a real run on {engine.world.device}. The update at its end is not shown and not counted "
            "in images/s.",
        )
    return counted
