"""A network in a folder: its weights as safetensors and its constructor's arguments as JSON.

The files and their names are those of Hugging Face's `PyTorchModelHubMixin`
(https://huggingface.co/docs/huggingface_hub/package_reference/mixins), which reads what this writes, and the other way
round. Nothing here needs `huggingface_hub`, and nothing is a pickle.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from alexnet_triton.files import replaced
from alexnet_triton.fusion import FusedSequential
from alexnet_triton.weights import CONFIG, WEIGHTS, plain_name, read_folder, strip_prefixes

Model = TypeVar("Model", bound=nn.Module)

ARGUMENTS: Mapping[str, tuple[type, ...]] = {
    "num_classes": (int,),
    "dropout": (int, float),
    "variant": (str,),
    "lrn": (bool, type(None)),
    "init": (str, type(None)),
}
"""What `config.json` holds, and the types of its values."""

PLACES = ("device", "dtype")
"""Arguments that say where a network was made; where it is to be is said when it is read."""


def save(model: nn.Module, folder: str | os.PathLike[str], build: Callable[..., nn.Module]) -> None:
    """Write a network's weights and arguments into a folder: `AlexNet.save_pretrained`.

    Args:
        model: an AlexNet.
        folder: is made where it is not there. Its two files take the places of older ones when both are written.
        build: from arguments to a network, to compare with.

    Raises:
        ValueError: the layers are not those of `build`, or a parameter has no values of its own to write.
        OSError: the folder or its files cannot be written.
    """
    config = arguments_of(model, build)
    tensors = _values(model)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{str(folder)!r} is a file, and a network is kept in a folder: name another")
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with replaced(folder / WEIGHTS, folder / CONFIG) as (weights, text):
            save_file(tensors, weights, metadata={"format": "pt"})
            text.write_text(json.dumps(config, indent=2, sort_keys=True, default=float) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the network could not be written into {str(folder)!r} ({error}): make room, or name another folder; what "
            "was there before is whole"
        ) from error


def load(
    cls: type[Model],
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | int | None = None,
    map_location: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    strict: bool = True,
    **overrides: Any,
) -> Model:
    """Build the network that a folder describes, with its weights: `AlexNet.from_pretrained`.

    Args:
        cls: AlexNet, or a class of the user's own that derives from it.
        folder: what `save` or Hugging Face's mixin wrote.
        device: where the parameters are to be; None is the CPU.
        map_location: the same, as the mixin calls it.
        dtype: of the parameters; None keeps the file's.
        strict: demand exactly the network's keys; where not, what is missing is as the constructor makes it.
        **overrides: arguments in the place of the folder's.

    Returns:
        The network, in evaluation mode.

    Raises:
        ValueError: there is no such folder, or it is broken, or is not of such a network.
        RuntimeError: the weights are of another variant, or are not those of the network.
    """
    config, state_dict = read_folder(folder)
    arguments = {**_arguments(cls, config, Path(folder) / CONFIG), **overrides}
    _check_classes(state_dict, overrides)
    for name, value in state_dict.items():
        if not value.is_floating_point():
            raise ValueError(f"{name!r} in {str(folder)!r} is of {value.dtype}, and weights are floating-point numbers")
    with torch.device("meta"):  # nothing is computed or drawn for weights that are to be read
        model = cls(**arguments)
    model.load_state_dict(state_dict, strict, assign=True)
    if any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):  # what the folder has not
        model = cls(**arguments)
        model.load_state_dict(state_dict, strict, assign=True)
    return model.to(device if map_location is None else map_location, dtype).eval()


# --- arguments ------------------------------------------------------------------------------------------------


def arguments_of(model: nn.Module, build: Callable[..., nn.Module]) -> dict[str, Any]:
    """The arguments from which `build` makes a network of the same layers, as these are now.

    Wrappers (`DataParallel`, `torch.compile`) are looked through, and `inplace` and what `fuse` and `unfuse` do count
    for nothing, as no number depends on them.

    Raises:
        ValueError: no arguments do.
    """
    layers = _layers(model)
    head, norms, drops = layers.get("classifier.6"), nn.LocalResponseNorm, nn.Dropout
    config: dict[str, Any] = {
        "num_classes": int(head.out_features) if isinstance(head, nn.Linear) else 1000,
        "dropout": next((layer.p for layer in layers.values() if isinstance(layer, drops)), 0.5),
        "variant": model.variant,
        "lrn": any(isinstance(layer, norms) for layer in layers.values()),
        "init": model.init,
    }
    twin = build(**config, device="meta")
    difference = _difference(layers, _layers(twin)) or _other_names(model, twin)
    if difference:
        raise ValueError(
            f"save_pretrained keeps the networks that AlexNet(...) builds, and here {difference}: save "
            "model.state_dict() instead, and load it into a network that you have changed alike"
        )
    return config


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules in `model` by name; a wrapper comes before what it wraps, which takes its name."""
    named = model.named_modules(remove_duplicate=False)
    return {plain_name(name): module for name, module in named if name}


def _difference(layers: Mapping[str, nn.Module], expected: Mapping[str, nn.Module]) -> str | None:
    """Where a network's layers are others than expected, in words."""
    for name, layer in expected.items():
        if name not in layers:
            return f"there is no {name!r}"
        found, usual = _described(layers[name]), _described(layer)
        if found != usual:
            return f"{name!r} is {found}, not {usual}"
    return next((f"there is a {name!r} too" for name in layers if name not in expected), None)


def _described(layer: nn.Module) -> str:
    """A layer's type and what its numbers depend on."""
    kind = nn.Sequential if type(layer) is FusedSequential else type(layer)
    said = [part for part in layer.extra_repr().split(", ") if not part.startswith("inplace=")]
    return f"{kind.__name__}({', '.join(said)})"


def _other_names(model: nn.Module, expected: nn.Module) -> str | None:
    """Where layers as expected have other parameters, as pruning and old parametrizations leave them, in words."""
    found = strip_prefixes(model.state_dict())
    usual = expected.state_dict()
    for name in (*usual, *found):
        if name not in found or name not in usual:
            return f"there is {'no' if name in usual else 'a'} parameter {name!r}"
    return None


def _arguments(cls: type[nn.Module], config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a class's constructor takes of a config, checked."""
    parameters = inspect.signature(cls).parameters
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    arguments = {name: value for name, value in config.items() if name not in PLACES}
    for name, value in arguments.items():
        kinds = ARGUMENTS.get(name)
        if name not in parameters and not (takes_all and kinds):
            raise ValueError(
                f"{str(path)!r} has {name!r}, which {cls.__name__}(...) does not take: read it with from_pretrained of "
                "the class that wrote it, or the weights beside it with alexnet(weights=...)"
            )
        if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            words = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"{str(path)!r} has {name} {value!r}, and {words} is needed")
    return arguments


def _check_classes(state_dict: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> None:
    last, asked = state_dict.get("classifier.6.weight"), overrides.get("num_classes")
    if last is not None and asked is not None and asked != last.shape[0]:
        raise ValueError(
            f"the folder's weights have {last.shape[0]} classes, got num_classes={asked}: load them without it, then "
            "replace model.classifier[6]"
        )


# --- values ---------------------------------------------------------------------------------------------------


def _values(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as safetensors takes it: each tensor in order, in memory that no other shares."""
    values: dict[str, Tensor] = {}
    taken = set()
    for name, value in strip_prefixes(model.state_dict()).items():
        if type(value) is not Tensor or value.layout != torch.strided:
            raise ValueError(f"{name!r} is no plain tensor but {type(value).__name__}, {value.layout}: gather it first")
        if value.is_meta:
            raise ValueError(f"{name!r} is on the meta device and has no values: load or initialise them first")
        storage = (value.device, value.untyped_storage().data_ptr())
        values[name] = value.clone(memory_format=torch.contiguous_format) if storage in taken else value.contiguous()
        taken.add(storage)
    return values
