"""AlexNet and its variants: ordinary layers under the names that people know, executed in fused runs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from alexnet_triton.fusion import FusedSequential
from alexnet_triton.layers import GroupedLocalResponseNorm

__all__ = ["VARIANTS", "AlexNet", "Variant", "alexnet", "read_state_dict", "strip_prefixes"]

FEATURES = 4096
"""Width of fc6 and fc7."""

ALWAYS_LARGE_ENOUGH = 67
"""Pixels a side that every variant takes; no need to look closer. (Layers that a user put in check themselves.)"""

INITS = ("merged", "paper", "torchvision", "caffe", "kaiming")


@dataclass(frozen=True)
class Norm:
    """Local response normalisation in torch's terms (`alpha` is divided by the 5 channels), beta 0.75."""

    alpha: float
    k: float
    groups: int = 1


PAPER_FORMULA = Norm(alpha=5e-4, k=2.0)
"""Krizhevsky et al. 2012, section 3.3: alpha is 1e-4 a channel there, so five times that here."""


@dataclass(frozen=True)
class Variant:
    """One of the networks that are called AlexNet."""

    name: str
    description: str
    filters: tuple[int, int, int, int, int]
    """Of conv1 to conv5."""
    groups: int
    """Of conv2, conv4 and conv5."""
    padding: int
    """Of conv1, in pixels."""
    norm: Norm | None
    """After the ReLUs of conv1 and conv2; None: no normalisation unless it is asked for."""
    dropout_first: bool
    """Dropout stands before fc6 and fc7 rather than after them."""
    ceil_mode: bool
    """The pools round their output sizes up."""
    image_size: int
    """Side of the images that it was made for, in pixels."""


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        variant.name: variant
        for variant in (
            Variant(
                name="merged",
                description="2012 filters on one device: no groups, no LRN",
                filters=(96, 256, 384, 384, 256),
                groups=1,
                padding=0,
                norm=None,
                dropout_first=True,
                ceil_mode=False,
                image_size=227,
            ),
            Variant(
                name="paper",
                description="2012 as published: two towers (groups), LRN inside each",
                filters=(96, 256, 384, 384, 256),
                groups=2,
                padding=0,
                norm=Norm(alpha=5e-4, k=2.0, groups=2),
                dropout_first=False,
                ceil_mode=False,
                image_size=227,
            ),
            Variant(
                name="torchvision",
                description="2014 filters (One weird trick), as torchvision has them",
                filters=(64, 192, 384, 256, 256),
                groups=1,
                padding=2,
                norm=None,
                dropout_first=True,
                ceil_mode=False,
                image_size=224,
            ),
            Variant(
                name="caffe",
                description="bvlc_alexnet: groups, LRN across all channels, pools round up",
                filters=(96, 256, 384, 384, 256),
                groups=2,
                padding=0,
                norm=Norm(alpha=1e-4, k=1.0),
                dropout_first=False,
                ceil_mode=True,
                image_size=227,
            ),
        )
    }
)
"""The variants by name. Their state dicts have the same keys; their weights are not interchangeable."""


class AlexNet(nn.Module):
    """AlexNet (Krizhevsky, Sutskever, Hinton 2012).

    `features`, `avgpool` and `classifier` hold ordinary torch layers in the order and under the indices that
    people know, in all variants: `features.{0,3,6,8,10}` are conv1 to conv5, `classifier.{1,4,6}` fc6 to fc8.
    Runs of them execute as fused ops (see `alexnet_triton.fusion`).

    Args:
        num_classes: width of the last layer, at least 1.
        dropout: probability of dropping an element, in [0, 1].
        variant: `"merged"`, `"paper"`, `"torchvision"` or `"caffe"`; `VARIANTS` describes them.
        lrn: local response normalisation after the ReLUs of conv1 and conv2; None is the variant's own
            choice, True adds the paper's where the variant has none, False leaves it out.
        init: initialisation; None is the variant's own, else the name of a variant, or `"kaiming"` (He et
            al. 2015, normal), from which small data sets train at once. The one of 2012 can stay at a loss of
            ln(num_classes) for many epochs.
        device: where the parameters are made.
        dtype: of the parameters.

    Raises:
        ValueError: an unknown variant or initialisation, `num_classes` below 1, `dropout` outside [0, 1].

    Example:
        >>> model = AlexNet(num_classes=10)
        >>> logits = model(torch.rand(8, 3, 227, 227))
    """

    def __init__(
        self,
        num_classes: int = 1000,
        dropout: float = 0.5,
        *,
        variant: str = "merged",
        lrn: bool | None = None,
        init: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        spec = _spec(variant)
        if num_classes < 1:
            raise ValueError(f"AlexNet needs num_classes of at least 1, got {num_classes}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"AlexNet needs a dropout probability in [0, 1], got {dropout}: 0 turns it off")
        if init is not None and init not in INITS:
            raise ValueError(f"unknown init {init!r}: choose one of {', '.join(map(repr, INITS))}")
        norm = spec.norm if lrn is None else (spec.norm or PAPER_FORMULA) if lrn else None
        self.variant = variant
        self.init = init or variant
        self.features = _features(spec, norm, device, dtype)
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = _classifier(spec, num_classes, dropout, device, dtype)
        _initialise(self, self.init)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images.

        Args:
            x: (N, 3, H, W), floating-point, normalised; N may be 0. H and W are at least 67 (63 for
                `"torchvision"`, 39 for `"caffe"`); maps are averaged to 6x6 before the classifier.

        Returns:
            (N, num_classes).

        Raises:
            ValueError: another rank or number of channels, or an image that is too small.
            TypeError: an integer tensor.
        """
        if not torch.jit.is_scripting():
            self._check_images(x)
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)

    def get_feature_vector(self, x: Tensor, layer: str = "fc7") -> Tensor:
        """Activations of a fully connected layer after its ReLU, for transfer learning.

        Computed as in evaluation, without dropout, whatever the mode of the model, which is left as it was.
        Differentiable.

        Args:
            x: images, as for `forward`.
            layer: `"fc6"` or `"fc7"`.

        Returns:
            (N, 4096).

        Raises:
            ValueError: another layer, or images that `forward` would refuse.
        """
        ends = {"fc6": 3, "fc7": 6}
        if layer not in ends:
            raise ValueError(f"get_feature_vector takes layer 'fc6' or 'fc7', got {layer!r}")
        if not isinstance(self.classifier, nn.Sequential) or len(self.classifier) < ends[layer]:
            raise ValueError(f"get_feature_vector finds no {layer} in a classifier that has been replaced")
        self._check_images(x)
        training = [module for module in self.modules() if module.training]
        try:
            for module in training:
                module.training = False
            x = torch.flatten(self.avgpool(self.features(x)), 1)
            return self.classifier[: ends[layer]](x)
        finally:
            for module in training:
                module.training = True

    def extra_repr(self) -> str:
        """Show the variant."""
        return f"variant={self.variant!r}"

    @torch.jit.unused
    def _check_images(self, x: Tensor) -> None:
        """Refuse in words what would fail deep inside, or worse, not fail."""
        if not isinstance(x, Tensor) or torch.jit.is_tracing():
            return  # a symbolic trace
        if x.dim() != 4:
            hint = ": add the batch dimension with x.unsqueeze(0)" if x.dim() == 3 else ""
            raise ValueError(
                f"AlexNet needs a 4-D batch of images (N, 3, H, W), got {x.dim()}-D {tuple(x.shape)}{hint}"
            )
        if not x.is_floating_point():
            raise TypeError(
                f"AlexNet needs floating-point images, got {x.dtype}: convert them with x.float() / 255 and normalise"
            )
        first = next(iter(self.features._modules.values()), None)
        if type(first) is nn.Conv2d and x.shape[1] != first.in_channels:
            hint = ": repeat a grey image with x.expand(-1, 3, -1, -1)" if x.shape[1] == 1 else ""
            raise ValueError(
                f"AlexNet needs images of {first.in_channels} channels, got {x.shape[1]} in {tuple(x.shape)}{hint}"
            )
        if min(x.shape[2], x.shape[3]) >= ALWAYS_LARGE_ENOUGH:
            return
        layers = _leaves(self.features)
        if not all(_survives(size, axis, layers) for axis, size in enumerate(x.shape[2:])):
            least = [next(n for n in range(1, 10_000) if _survives(n, axis, layers)) for axis in (0, 1)]
            raise ValueError(
                f"AlexNet(variant={self.variant!r}) needs images of at least {least[0]}x{least[1]} pixels, got "
                f"{x.shape[2]}x{x.shape[3]}: resize them, to {VARIANTS[self.variant].image_size} for its own size"
            )

    # --- state dicts ----------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load parameters; on an error nothing has been changed.

        Args:
            state_dict: as of `torch.nn.Module.load_state_dict`; `read_state_dict` reads one from a file.
            strict: demand exactly this model's keys.
            assign: take the tensors themselves instead of copying their values.

        Returns:
            The named tuple of missing and unexpected keys.

        Raises:
            RuntimeError: keys that are missing or unknown (where `strict`), or values of other shapes; the
                message names the variant or the number of classes that the state dict is of.
        """
        own = self.state_dict()
        if strict:
            _check_keys(state_dict, own)
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        # The first module that load_state_dict visits is this one, so an error here comes before any change.
        theirs = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        _check_values(self, theirs, local_metadata.get("variant"))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:  # the variants' shapes alone do not tell "paper" from "caffe"
            metadata[prefix[:-1]]["variant"] = self.variant


def alexnet(*, weights: Any | None = None, progress: bool = True, **kwargs: Any) -> AlexNet:
    """Build the AlexNet that torchvision has, with torchvision's signature.

    Args:
        weights: None for fresh parameters; a member of `torchvision.models.AlexNet_Weights` or its name
            (`"DEFAULT"`, `"IMAGENET1K_V1"`), which torchvision downloads; or a path to a file (see
            `read_state_dict`), whose number of classes is taken over unless `num_classes` is given.
        progress: show the progress of a download.
        **kwargs: of `AlexNet`; `variant` is `"torchvision"` unless given.

    Returns:
        The model, in training mode as torchvision's.

    Raises:
        ValueError: `weights` is neither a known name nor an existing file, or `num_classes` contradicts it.
        RuntimeError: the weights are of another variant.
    """
    kwargs.setdefault("variant", "torchvision")
    if "pretrained" in kwargs:
        warnings.warn("pretrained= is deprecated: pass weights='DEFAULT' or weights=None", stacklevel=2)
        weights = "DEFAULT" if kwargs.pop("pretrained") else weights
    if weights is None:
        return AlexNet(**kwargs)
    if isinstance(weights, (str, os.PathLike)) and not _is_published(weights):
        state_dict = read_state_dict(weights)
        last = state_dict.get("classifier.6.weight")
        if last is not None:
            kwargs.setdefault("num_classes", last.shape[0])
    else:
        member = _published(weights)
        classes = len(member.meta["categories"])
        if kwargs.setdefault("num_classes", classes) != classes:
            raise ValueError(
                f"the weights {member.name} have {classes} classes, got num_classes={kwargs['num_classes']}: load "
                "them without it, then replace model.classifier[6]"
            )
        state_dict = member.get_state_dict(progress=progress, check_hash=True)
    model = AlexNet(**kwargs)
    model.load_state_dict(state_dict)
    return model


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a file, running no code that the file may hold.

    Takes what `torch.save` wrote of a state dict or of a checkpoint that holds one under `"model"` or
    `"state_dict"`, and safetensors (by the ending `.safetensors`). The prefixes of wrappers are taken off
    (see `strip_prefixes`).

    Args:
        path: the file.

    Returns:
        Parameters by name, on the CPU.

    Raises:
        ValueError: there is no such file, or it holds anything but tensors and plain types, or no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file of weights at {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{str(path)!r} cannot be read as tensors and plain types: {cause}") from error
    for name in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not (isinstance(content, Mapping) and all(isinstance(value, Tensor) for value in content.values())):
        raise ValueError(f"{str(path)!r} holds no state dict (tensors by parameter name)")
    return strip_prefixes(content)


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


# --- building -----------------------------------------------------------------------------------------------


def _spec(variant: str) -> Variant:
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(map(repr, VARIANTS))}")
    return VARIANTS[variant]


def _features(spec: Variant, norm: Norm | None, device: Any, dtype: Any) -> FusedSequential:
    k1, k2, k3, k4, k5 = spec.filters
    groups, at = spec.groups, {"device": device, "dtype": dtype}

    def pool() -> nn.MaxPool2d:
        return nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=spec.ceil_mode)

    return FusedSequential(
        nn.Conv2d(3, k1, kernel_size=11, stride=4, padding=spec.padding, **at),
        _relu_and(norm),
        pool(),
        nn.Conv2d(k1, k2, kernel_size=5, padding=2, groups=groups, **at),
        _relu_and(norm),
        pool(),
        nn.Conv2d(k2, k3, kernel_size=3, padding=1, **at),
        nn.ReLU(inplace=True),
        nn.Conv2d(k3, k4, kernel_size=3, padding=1, groups=groups, **at),
        nn.ReLU(inplace=True),
        nn.Conv2d(k4, k5, kernel_size=3, padding=1, groups=groups, **at),
        nn.ReLU(inplace=True),
        pool(),
    )


def _relu_and(norm: Norm | None) -> nn.Module:
    """ReLU and the normalisation share a slot, so that the normalisation shifts no index."""
    if norm is None:
        return nn.ReLU(inplace=True)
    if norm.groups == 1:
        return nn.Sequential(nn.ReLU(inplace=True), nn.LocalResponseNorm(5, norm.alpha, 0.75, norm.k))
    layer = GroupedLocalResponseNorm(5, norm.groups, norm.alpha, 0.75, norm.k)
    return nn.Sequential(nn.ReLU(inplace=True), layer)


def _classifier(spec: Variant, num_classes: int, dropout: float, device: Any, dtype: Any) -> FusedSequential:
    at = {"device": device, "dtype": dtype}
    first = spec.dropout_first
    return FusedSequential(
        nn.Dropout(p=dropout) if first else nn.Identity(),
        nn.Linear(spec.filters[4] * 6 * 6, FEATURES, **at),
        nn.ReLU(inplace=True),
        nn.Dropout(p=dropout),
        nn.Linear(FEATURES, FEATURES, **at),
        nn.ReLU(inplace=True) if first else nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(p=dropout)),
        nn.Linear(FEATURES, num_classes, **at),
    )


# Bias of conv1 to conv5 and fc6 to fc8 where it is not zero everywhere.
# paper: section 5 (ones where the positive input of a ReLU helps an early start);
# caffe: the filler values of bvlc_alexnet's train_val.prototxt.
_BIASES = {
    "merged": (0, 0, 0, 0, 0, 1, 1, 1),
    "paper": (0, 1, 0, 1, 1, 1, 1, 0),
    "caffe": (0, 0.1, 0, 0.1, 0.1, 0.1, 0.1, 0),
    "kaiming": (0, 0, 0, 0, 0, 0, 0, 0),
}


@torch.no_grad()
def _initialise(model: AlexNet, init: str) -> None:
    """Draw fresh parameters, in the order of the layers, so that a seed gives the original's weights."""
    if init == "torchvision":
        return  # the layers' own, already drawn
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for index, (layer, bias) in enumerate(zip(layers, _BIASES[init], strict=True)):
        if init == "kaiming" and index < len(layers) - 1:  # the last layer has no ReLU behind it
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        else:
            nn.init.normal_(layer.weight, std=0.005 if init == "caffe" and index in (5, 6) else 0.01)
        if layer.bias is not None:
            nn.init.constant_(layer.bias, bias)


# --- checking -----------------------------------------------------------------------------------------------


_SIZE_KEEPING = (nn.ReLU, nn.LocalResponseNorm, nn.BatchNorm2d, nn.Dropout, nn.Dropout2d, nn.Identity)


def _leaves(module: nn.Module) -> list[nn.Module]:
    """The layers without children, in order."""
    return [layer for layer in module.modules() if not layer._modules]


def _survives(size: int, axis: int, layers: Iterable[Any]) -> bool:
    """Whether an image side of `size` pixels leaves a map of at least one pixel after every layer.

    A layer that a user put in and that may change sizes in its own way ends the question.
    """
    for layer in layers:
        if type(layer) not in (nn.Conv2d, nn.MaxPool2d):
            if isinstance(layer, _SIZE_KEEPING):
                continue
            return True
        window, stride, padding, dilation = (
            option[axis] if isinstance(option, tuple) else option
            for option in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        )
        if isinstance(padding, str):
            padding = (window - 1) * dilation // 2 if padding == "same" else 0
        slack = stride - 1 if getattr(layer, "ceil_mode", False) else 0
        room = size + 2 * padding - dilation * (window - 1) - 1
        if room + slack < 0:
            return False
        last = (room + slack) // stride
        if slack and last * stride >= size + padding:
            last -= 1  # the last window starts inside
        size = last + 1
    return True


def _check_keys(theirs: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    missing = [key for key in own if key not in theirs]
    unknown = [key for key in theirs if key not in own]
    if not missing and not unknown:
        return
    if not any(key in own for key in theirs) and set(strip_prefixes(theirs)) >= set(own):
        raise RuntimeError(
            f"the state dict has a wrapper's prefix, as in {unknown[0]!r}: pass it through "
            "alexnet_triton.model.strip_prefixes"
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


def _check_values(model: AlexNet, theirs: Mapping[str, Any], saved_as: str | None) -> None:
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    differing = [
        key
        for key, value in theirs.items()
        if key in own and isinstance(value, Tensor) and value.shape != own[key].shape
    ]
    is_of = saved_as or _variant_of(theirs)
    head = [key for key in differing if key.startswith("classifier.6.")]
    if (saved_as is not None and saved_as != model.variant) or len(differing) > len(head):
        if is_of is not None and is_of != model.variant:
            raise RuntimeError(
                f"the state dict is of variant {is_of!r} and this model of variant {model.variant!r}, whose "
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


def _variant_of(state_dict: Mapping[str, Any]) -> str | None:
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


# --- published weights --------------------------------------------------------------------------------------


def _is_published(weights: str | os.PathLike[str]) -> bool:
    return isinstance(weights, str) and weights.removeprefix("AlexNet_Weights.") in (
        "DEFAULT",
        "IMAGENET1K_V1",
    )


def _published(weights: Any) -> Any:
    from torchvision.models import AlexNet_Weights

    if isinstance(weights, str):
        return AlexNet_Weights[weights.removeprefix("AlexNet_Weights.")]
    return AlexNet_Weights.verify(weights)
