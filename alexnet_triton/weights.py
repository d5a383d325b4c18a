"""State dicts: reading them from files and from torchvision, and saying what does not fit before anything is loaded."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from alexnet_triton.caffe import read_caffemodel
from alexnet_triton.variants import VARIANTS

CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""The files of a folder of `AlexNet.save_pretrained`, named as Hugging Face's mixin names them."""


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a file or a folder, running no code that a file may hold.

    Takes what `torch.save` wrote of a state dict or of a checkpoint that holds one under `"model"` or
    `"state_dict"`, and by their endings safetensors (`.safetensors`) and Caffe's weights (`.caffemodel`, see
    `alexnet_triton.caffe.read_caffemodel`); and a folder of `AlexNet.save_pretrained`. The prefixes of wrappers are
    taken off (see `strip_prefixes`).

    Args:
        path: the file or the folder.

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
        What the file holds, on the CPU, in memory of its own; of a `.caffemodel` the state dict. Of a folder of
        `AlexNet.save_pretrained` the state dict as `model`, with `variant` and `lrn` where the folder has them.

    Raises:
        ValueError: there is no such file, or it holds anything but tensors and plain types.
        RuntimeError: a caffemodel is of another network.
    """
    path = Path(path)
    if path.is_dir():
        config, state_dict = read_folder(path)
        return {"model": state_dict, **{name: config[name] for name in ("variant", "lrn") if name in config}}
    if not path.is_file():
        raise ValueError(f"there is no file of weights at {str(path)!r}")
    if is_caffemodel(path):
        return read_caffemodel(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            # Its tensors are the file itself, mapped: whoever writes it anew in place would change them, or end us.
            return {name: value.clone() for name, value in load_file(path).items()}
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # which tells how to run what is in the file
            cause = "it is another kind of file, or holds something else"
        raise ValueError(f"{str(path)!r} cannot be read as tensors and plain types: {cause}") from error


def read_folder(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], OrderedDict[str, Tensor]]:
    """Read what `AlexNet.save_pretrained` or Hugging Face's `PyTorchModelHubMixin` wrote into a folder.

    Returns:
        The config, a constructor's arguments as far as JSON has them, and the state dict, on the CPU, without
        wrappers' prefixes, with the config's variant as metadata.

    Raises:
        ValueError: there is no such folder, or one of its two files is missing or broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(_no_folder(str(folder), folder.is_file()))
    config, file = _read_config(folder), folder / WEIGHTS
    if not file.is_file():
        pickled = folder / "pytorch_model.bin"
        hint = f": alexnet(weights={str(pickled)!r}) reads the pickle there" if pickled.is_file() else ""
        raise ValueError(f"there is no {WEIGHTS!r} in {str(folder)!r}, the file of a network's weights{hint}")
    state_dict = OrderedDict(strip_prefixes(read_file(file)))
    if isinstance(config.get("variant"), str):
        state_dict._metadata = {"": {"variant": config["variant"]}}  # type: ignore[attr-defined]
    return config, state_dict


def _no_folder(name: str, is_file: bool) -> str:
    if is_file:
        return f"{name!r} is a file, and a folder is needed: alexnet(weights=...) reads a file of weights"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return (
            f"there is no folder {name!r}, and nothing is downloaded: if it is a model on Hugging Face's hub, give the "
            f"folder that huggingface_hub.snapshot_download({name!r}) returns"
        )
    return f"there is no folder {name!r}: give one that save_pretrained has written"


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"there is no {CONFIG!r} in {str(folder)!r}, which says what network it is: alexnet(weights=...) reads a "
            "file of weights alone"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise ValueError(f"{str(path)!r} cannot be read as a network's arguments: {cause}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{str(path)!r} holds a {type(config).__name__}, and an object of arguments is needed")
    return config


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
    for key, value in state_dict.items():
        name = plain_name(key)
        if name in plain:
            raise ValueError(f"two keys of the state dict become {name!r} without their wrappers' prefixes")
        plain[name] = value
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        for key in list(metadata):
            name = plain_name(key)
            metadata = {**metadata, name: {**metadata.get(name, {}), **metadata[key]}}
        plain._metadata = metadata  # type: ignore[attr-defined]
    return cast("dict[str, Any]", plain)


WRAPPERS = ("module", "_orig_mod")
"""What wrappers call the module that they wrap: `DataParallel` and DDP, and `torch.compile`."""


def plain_name(name: str) -> str:
    """The name of a parameter or a module without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


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
    is_of = saved_as if saved_as not in (None, variant) else variant_of(theirs)
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
