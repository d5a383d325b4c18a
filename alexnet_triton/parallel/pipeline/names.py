"""The names of a network's layers, where it can be cut."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from alexnet_triton.fusion import FusedSequential, leaves
from alexnet_triton.info import NAMES
from alexnet_triton.model import AlexNet

PARTS = ("features", "avgpool", "classifier")
"""Of an `AlexNet`, in order of execution."""

MODULES = {name: module for module, name in NAMES.items()}
"""The modules of the layers by the paper's names."""


def layer_names(model: AlexNet) -> tuple[str, ...]:
    """The names of a network's layers in order of execution, each of which but the first may begin a stage.

    Raises:
        ValueError: the model is no `AlexNet`.
    """
    if not isinstance(model, AlexNet) or type(model).forward is not AlexNet.forward:
        raise ValueError(
            f"only an AlexNet can be cut into stages, got {type(model).__name__}: take the network itself, without "
            "wrappers"
        )
    names: list[str] = []
    for part in PARTS:
        module = getattr(model, part)
        # One with hooks is called whole, as a leaf is.
        divisible = type(module) in (nn.Sequential, FusedSequential) and [*leaves(nn.Sequential(module))] != [module]
        names += [f"{part}.{child}" for child in module._modules] if divisible and len(module) else [part]
    return tuple(names)


def place(name: str, names: Sequence[str]) -> int:
    """Where the layer of a name, the model's or the paper's, stands among `names`.

    Raises:
        ValueError: it is none of them, or the first.
    """
    module = MODULES.get(name, name)
    if module not in names[1:]:
        raise ValueError(f"no stage can begin at {name!r}: choose of {', '.join(names[1:])}, or of conv2 to fc8")
    return names.index(module)


def described(names: Sequence[str]) -> str:
    """What layers of these names, consecutive ones, are: the paper's names of the first and the last that it names."""
    known = [NAMES[name] for name in names if name in NAMES] or list(names)
    return known[0] if len(known) == 1 else f"{known[0]} to {known[-1]}"
