"""A run of training that takes a second: AlexNet's layers with few filters, and patterns to tell apart.

As a program it trains in processes of its own: started by torchrun; or killed; or several that train together. Those
are forked once all is imported, which takes longer than the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from groups import LOOPBACK
from torch import nn

from alexnet_triton import AlexNet
from alexnet_triton.parallel.layout import Layout
from alexnet_triton.parallel.processes.world import World, world
from alexnet_triton.recipe.data.sets import LabelledImages
from alexnet_triton.recipe.train import checkpoint
from alexnet_triton.recipe.train.checkpoint import Checkpoints
from alexnet_triton.recipe.train.loop import Training
from alexnet_triton.recipe.train.settings import Settings
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


def network(dropout=0.5, seed=0, variant="torchvision"):
    """AlexNet with 8 filters a layer and 16 units."""
    torch.manual_seed(seed)
    model = AlexNet(4, dropout, variant=variant, device="meta")
    for index, depth in ((0, 3), (3, 8), (6, 8), (8, 8), (10, 8)):
        old = model.features[index]
        model.features[index] = nn.Conv2d(depth, 8, old.kernel_size, old.stride, old.padding, groups=old.groups)
    for index, width in ((1, 8 * 36), (4, 16)):
        model.classifier[index] = nn.Linear(width, 16)
    model.classifier[6] = nn.Linear(16, 4)
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def training(
    folder,
    model=None,
    here=None,
    learn=None,
    held_out=None,
    workers=2,
    keep=3,
    images=22,
    layout=None,
    trace=None,
    **settings,
):
    """A run, not begun."""
    told = Settings(**{"epochs": 3, "batch_size": 8, "lr": 0.02, "crop": CROP, **settings})
    learn = learn or patterns(images)
    folder.mkdir(parents=True, exist_ok=True)
    trained = Trained(model or network(), CLASSES, learn.statistics(), SIZE, CROP)
    here = here or World(torch.device("cpu"))
    held_out = held_out or patterns(10, seed=1)
    checkpoints, layout = Checkpoints(folder, keep), Layout(**(layout or {}))
    trace = trace and Path(trace)
    return Training(
        trained, learn, held_out, told, checkpoints, here, workers=workers, layout=layout, trace=trace, progress=False
    )


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


def steps_of(path):
    """Steps before a checkpoint."""
    return checkpoint.steps(checkpoint.read(path))


def program(words, seconds=120, **environment):
    """Run Python on these words, and end the process and all that it has started where it hangs; what it said."""
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK, **environment},
        start_new_session=True,
    )
    try:
        err = process.communicate(timeout=seconds)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    return err


def equal(a, b):
    """Whether two such states are the same, to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def run(folder, told):
    """Train as the settings say, from the newest checkpoint where there is one."""
    told = dict(told)
    torch.set_num_threads(1)
    dropout, variant = told.pop("dropout", 0.5), told.pop("variant", "torchvision")
    with world("cpu", per_replica=Layout(**told.get("layout", {})).per_replica) as here:
        run = training(folder, network(dropout, variant=variant), here, **told)
        torch.manual_seed(100 + run.engine.stream)
        if here.leads:
            run.checkpoints.clear_temporary()
        newest = run.checkpoints.newest()
        if newest is not None:
            run.resume(checkpoint.read(newest), newest.name)
        run.run()


def run_and_kill(folder, told, kills=6):
    """The same run, killed at moments that are drawn, and then let come to its end."""
    moments = torch.Generator().manual_seed(3)
    for number in range(kills):
        begun, start = names(folder), time.monotonic()
        child = fork(folder, told)
        while number % 3 and names(folder) == begun and time.monotonic() < start + 30:  # else as it begins
            time.sleep(0.001)
        took = time.monotonic() - start if number % 3 else 0.2
        time.sleep(took * torch.rand(1, generator=moments).item())
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            raise SystemExit(f"the run came to its end before kill {number + 1}")
    wait([fork(folder, told)])


def run_and_stop(folder, told, processes):
    """The same run by several processes, one of which is asked to stop; and then let come to its end."""
    children = together(folder, told, processes)
    deadline = time.monotonic() + 30
    while not (folder / "best.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(children[-1], signal.SIGTERM)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (folder / "stopped.json").write_text(json.dumps({"codes": codes, "newest": max(names(folder))}))
    wait(together(folder, told, processes))


def run_together(folder, told, processes):
    """The same run by several processes."""
    wait(together(folder, told, processes))


def run_each_together(folder, runs):
    """Runs by several processes, one after the other: by name, what they are told and how many process them."""
    for name, (told, processes) in runs.items():
        wait(together(folder / name, told, processes))


def together(folder, told, processes):
    """Start processes as torchrun does; their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    children = []
    for rank in range(processes):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(fork(folder, told))
    return children


def fork(folder, told):
    """Start the run in another process; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        run(folder, told)
        code = 0
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)


def wait(children):
    """Wait for processes, which must end well."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise SystemExit(f"exit codes {codes}")


def names(folder):
    """Of the checkpoints in a folder, which a process may be writing."""
    with contextlib.suppress(FileNotFoundError):
        return {path.name for path in folder.glob("checkpoint-*.pt")}
    return set()


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), *map(json.loads, sys.argv[3:]))
