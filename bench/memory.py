"""Peak memory of a whole process that runs one model: `python -m alexnet_triton.bench.memory NAME TASK BATCH`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def peak_bytes(name: str, task: str, batch: int) -> int:
    """Peak resident memory, in bytes, of a fresh process that runs `task` with model `name` three times.

    Args:
        name: `"alexnet_triton"` or `"torchvision"`.
        task: `"inference"` or `"training"`.
        batch: images of 224x224.
    """
    command = [sys.executable, "-m", "alexnet_triton.bench.memory", name, task, str(batch)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return int(result.stdout)


def _peak_of_this_process() -> int:
    try:  # getrusage's figure begins, on Linux, with that of the process that started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _main(name: str, task: str, batch: int) -> None:
    import torch
    import torchvision

    import alexnet_triton
    from alexnet_triton.bench.cpu import training_step

    torch.manual_seed(0)
    model = {"alexnet_triton": alexnet_triton.alexnet, "torchvision": torchvision.models.alexnet}[name]()
    images = torch.randn(batch, 3, 224, 224)
    step = training_step(model, images) if task == "training" else None
    model.train(task == "training")
    for _ in range(3):
        if step:
            step()
        else:
            with torch.inference_mode():
                model(images)
    print(_peak_of_this_process())


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
