"""State dicts: reading them from files and from torchvision, and saying what does not fit before anything is loaded."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from alexnet_triton.caffe import read_caffemodel
from alexnet_triton.variants import VARIANTS


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a file, running no code that the file may hold.

    Takes what `torch.save` wrote of a state dict or of a checkpoint that holds one under `"model"` or
    `"state_dict"`, and by their endings safetensors (`.safetensors`) and Caffe's weights (`.caffemodel`, see
    `alexnet_triton.caffe.read_caffemodel`). The prefixes of wrappers are taken off (see `strip_prefixes`).

    Args:
        path: the file.

    Returns:
        Parameters by name, on the CPU.

    Raises:
        ValueError: there is no such file, or it holds anything but tensors and plain types, or no state dict.
        RuntimeError: a caffemodel is of another network.
    """
    content = read_file(path)
    state_dict = state_dict_of(content)
    if state_dict is None:
        raise ValueError(f"{str(path)!r} holds no state dict (tensors by parameter name)")
    return state_dict


def read_file(path: str | os.PathLike[str]) -> Any:
    """Read what `torch.save` or, by the ending, safetensors or Caffe wrote, running no code that the file may hold.

    Returns:
        What the file holds, on the CPU; of a `.caffemodel` the state dict.

    Raises:
        ValueError: there is no such file, or it holds anything but tensors and plain types.
        RuntimeError: a caffemodel is of another network.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file of weights at {str(path)!r}")
    if is_caffemodel(path):
        return read_caffemodel(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # which tells how to run what is in the file
            cause = "it is another kind of file, or holds something else"
        raise ValueError(f"{str(path)!r} cannot be read as tensors and plain types: {cause}") from error


def state_dict_of(content: Any) -> dict[str, Tensor] | None:
    """The state dict that a file's content is, or holds under `"model"` or `"state_dict"`; None where it holds none."""
    for name in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not (isinstance(content, Mapping) and all(isinstance(value, Tensor) for value in content.values())):
        return None
    return strip_prefixes(content)


def is_caffemodel(weights: Any) -> bool:
    """Whether `weights` is the path of weights that Caffe wrote, by its ending."""
    return isinstance(weights, (str, os.PathLike)) and Path(weights).suffix == ".caffemodel"


def strip_prefixes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Take off what wrappers put into the names of parameters, and drop nothing.

    `DataParallel` and DDP put `module.` in front (of the whole model, or of `features` alone as in PyTorch's
    ImageNet example), `torch.compile` `_orig_mod.`.

    Args:
        state_dict: parameters by name.

    Returns:
        The same values under plain names, with the original's metadata (the variant).

    Raises:
        ValueError: two names become one.
    """
    plain = type(state_dict)() if isinstance(state_dict, dict) else {}
    wrappers = ("module", "_orig_mod")
    for key, value in state_dict.items():
        name = ".".join(part for part in key.split(".") if part not in wrappers)
        if name in plain:
            raise ValueError(f"two keys of the state dict become {name!r} without their wrappers' prefixes")
        plain[name] = value
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        for key in list(metadata):
            name = ".".join(part for part in key.split(".") if part not in wrappers)
            metadata = {**metadata, name: {**metadata.get(name, {}), **metadata[key]}}
        plain._metadata = metadata  # type: ignore[attr-defined]
    return cast("dict[str, Any]", plain)


def is_published(weights: str | os.PathLike[str]) -> bool:
    """Whether `weights` is the name of weights that torchvision publishes."""
    return isinstance(weights, str) and weights.removeprefix("AlexNet_Weights.") in (
        "DEFAULT",
        "IMAGENET1K_V1",
    )


def published(weights: Any) -> Any:
    """The member of torchvision's `AlexNet_Weights` that `weights` is or names."""
    from torchvision.models import AlexNet_Weights

    if isinstance(weights, str):
        return AlexNet_Weights[weights.removeprefix("AlexNet_Weights.")]
    return AlexNet_Weights.verify(weights)


def check_keys(theirs: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise RuntimeError, in words, where a state dict's keys are not exactly a model's own."""
    missing = [key for key in own if key not in theirs]
    unknown = [key for key in theirs if key not in own]
    if not missing and not unknown:
        return
    if not any(key in own for key in theirs) and set(strip_prefixes(theirs)) >= set(own):
        raise RuntimeError(
            f"the state dict has a wrapper's prefix, as in {unknown[0]!r}: pass it through "
            "alexnet_triton.weights.strip_prefixes"
        )
    parts = []
    if missing:
        parts.append(f"lacks {_some(missing)}")
    if unknown:
        parts.append(f"has the unknown {_some(unknown)}")
    raise RuntimeError(
        f"the state dict {' and '.join(parts)}: it must have this model's keys, or be loaded with strict=False"
    )


def _some(keys: list[str]) -> str:
    shown = ", ".join(map(repr, keys[:4]))
    return shown if len(keys) <= 4 else f"{shown} and {len(keys) - 4} more"


def check_values(model: nn.Module, variant: str, theirs: Mapping[str, Any], saved_as: str | None) -> None:
    """Raise RuntimeError, in words, where a state dict is of another variant, number of classes, or shape."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    differing = [
        key
        for key, value in theirs.items()
        if key in own and isinstance(value, Tensor) and value.shape != own[key].shape
    ]
    is_of = saved_as or variant_of(theirs)
    head = [key for key in differing if key.startswith("classifier.6.")]
    if (saved_as is not None and saved_as != variant) or len(differing) > len(head):
        if is_of is not None and is_of != variant:
            raise RuntimeError(
                f"the state dict is of variant {is_of!r} and this model of variant {variant!r}, whose "
                f"weights are not interchangeable: load it into AlexNet(variant={is_of!r})"
            )
        if differing:
            key = differing[0]
            raise RuntimeError(
                f"the state dict's {key!r} has shape {tuple(theirs[key].shape)} and this model's "
                f"{tuple(own[key].shape)}: it is of no variant of this network"
            )
    if head:
        classes = [
            tensor["classifier.6.weight"].shape[0] for tensor in (theirs, own) if "classifier.6.weight" in tensor
        ]
        raise RuntimeError(
            f"the state dict's {head[0]!r} is of {classes[0]} classes and this model's of {classes[-1]}: build "
            f"AlexNet(num_classes={classes[0]}), or drop 'classifier.6.weight' and 'classifier.6.bias' and load "
            "with strict=False"
        )


def variant_of(state_dict: Mapping[str, Any]) -> str | None:
    """The variant whose shapes these are; "paper" and "caffe" share theirs, and the first is named."""
    shapes = [
        tuple(state_dict[f"features.{index}.weight"].shape[:2])
        for index in (0, 3, 6, 8, 10)
        if isinstance(state_dict.get(f"features.{index}.weight"), Tensor)
    ]
    for spec in VARIANTS.values():
        depths = (3, *spec.filters)
        groups = (1, spec.groups, 1, spec.groups, spec.groups)
        if shapes == [(k, c // g) for k, c, g in zip(spec.filters, depths[:5], groups, strict=True)]:
            return spec.name
    return None
