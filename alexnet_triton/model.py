"""AlexNet: ordinary layers under the names that people know, executed in fused runs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from alexnet_triton import pretrained
from alexnet_triton.fusion import FusedSequential
from alexnet_triton.graphs import Graphed
from alexnet_triton.layers import GroupedLocalResponseNorm, LocalResponseNorm
from alexnet_triton.variants import PAPER_FORMULA, VARIANTS, Norm, Variant
from alexnet_triton.weights import (
    check_keys,
    check_values,
    is_caffemodel,
    is_published,
    published,
    read_state_dict,
)

__all__ = ["AlexNet", "alexnet"]

FEATURES = 4096
"""Width of fc6 and fc7."""

ALWAYS_LARGE_ENOUGH = 67
"""Pixels a side that every variant takes; no need to look closer. (Layers that a user put in check themselves.)"""

INITS = ("merged", "paper", "torchvision", "caffe", "kaiming")


Model = TypeVar("Model", bound="AlexNet")


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
            al. 2015, normal), from which small datasets train at once. The one of 2012 can stay at a loss of
            ln(num_classes) for many epochs.
        device: where the parameters are made.
        dtype: of the parameters.

    Raises:
        ValueError: an unknown variant or initialisation, `num_classes` below 1, `dropout` outside [0, 1].

    Examples:
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
        x = self.classifier(x)
        return x

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
            vectors: Tensor = self.classifier[: ends[layer]](x)
            return vectors
        finally:
            for module in training:
                module.training = True

    def graphed(self, example: Tensor, *more: Tensor) -> Graphed:
        """Inference as a CUDA graph: one launch in the place of some twenty, for images like the examples.

        Parameters that change in place (training, `load_state_dict`) are seen. What a graph cannot see is refused at
        the call, in words: other layers, parameters that lie elsewhere (`.to()`), hooks, another mode.

        Args:
            example: (N, 3, H, W), as `forward` will be given them; the values do not matter. Backend and autocast are
                those that are active here.
            *more: examples of other shapes or dtypes, such as a dataset's last, smaller batch.

        Returns:
            A callable that takes images like an example, and gives logits (N, num_classes) without gradients
            in a tensor of the caller's own.

        Raises:
            RuntimeError: the model is in training or has hooks, or a capture is under way.
            ValueError: model and examples are not on one GPU, or images that `forward` would refuse.
            TypeError: an integer tensor, or none.

        Examples:
            >>> graph = model.eval().graphed(torch.rand(1, 3, 227, 227, device="cuda"))
            >>> logits = graph(images)
        """
        return Graphed(self, example, *more)

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

    # --- folders --------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> Any:
        """Keep the network in a folder: weights in `model.safetensors`, the constructor's arguments in `config.json`.

        The files are those of Hugging Face's `PyTorchModelHubMixin`; `huggingface_hub` is not needed. The arguments
        are those that fit the layers as they are now: with another `classifier[6]`, another `num_classes`. What the
        constructor does not say is not kept: the mode, frozen parameters, hooks, layouts.

        Args:
            folder: is made where it is not there. The two files take the places of older ones when both are whole.
            **options: of the mixin, where the class has it as well: then it is the mixin that saves.

        Returns:
            None, or what the mixin returns.

        Raises:
            ValueError: the layers are not those of `AlexNet(...)`, or a parameter has no values of its own.
            OSError: the folder or its files cannot be written.

        Examples:
            >>> model.save_pretrained("flowers")
            >>> model = AlexNet.from_pretrained("flowers")
        """
        mixin = getattr(super(), "save_pretrained", None)
        if mixin is not None:
            return mixin(folder, **options)
        return pretrained.save(self, folder, AlexNet, **options)

    @classmethod
    def from_pretrained(cls: type[Model], folder: str | os.PathLike[str], **options: Any) -> Model:
        """Build the network that `save_pretrained`, or Hugging Face's `PyTorchModelHubMixin`, has left in a folder.

        No code that the folder may hold is run, and nothing is downloaded.

        Args:
            folder: with `model.safetensors` and `config.json`.
            **options: `device` (None is the CPU; `map_location` is the mixin's name of it), `dtype` (None is the
                file's), `strict` (True: exactly the network's keys; False leaves missing ones as they are made), and
                arguments of the constructor in the place of the folder's, such as `dropout`. Those of the mixin, where
                the class has it as well: then it is the mixin that reads.

        Returns:
            The network, in evaluation mode.

        Raises:
            ValueError: there is no such folder, or it is broken, or is not of such a network.
            RuntimeError: the weights are of another variant, or are not those of the network.
        """
        mixin = getattr(super(), "from_pretrained", None)
        if mixin is not None:
            return cast(Model, mixin(folder, **options))
        return pretrained.load(cls, folder, **options)

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
            check_keys(state_dict, own)
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        # The first module that load_state_dict visits is this one, so an error here comes before any change.
        theirs = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        check_values(self, self.variant, theirs, local_metadata.get("variant"))
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
            `read_state_dict`), whose number of classes is taken over unless `num_classes` is given; or a folder (see
            `AlexNet.from_pretrained`), which brings all arguments.
        progress: show the progress of a download.
        **kwargs: of `AlexNet`; `variant` is `"torchvision"` unless given, and `"caffe"` for a `.caffemodel`.

    Returns:
        The model, in training mode as torchvision's.

    Raises:
        ValueError: `weights` is neither a known name nor an existing file, or `num_classes` contradicts it.
        RuntimeError: the weights are of another variant, or of another network.
    """
    if "pretrained" in kwargs:
        warnings.warn("pretrained= is deprecated: pass weights='DEFAULT' or weights=None", stacklevel=2)
        weights = "DEFAULT" if kwargs.pop("pretrained") else weights
    if isinstance(weights, (str, os.PathLike)) and not is_published(weights) and os.path.isdir(weights):
        return AlexNet.from_pretrained(weights, **kwargs).train()
    kwargs.setdefault("variant", "caffe" if is_caffemodel(weights) else "torchvision")
    if weights is None:
        return AlexNet(**kwargs)
    if isinstance(weights, (str, os.PathLike)) and not is_published(weights):
        state_dict = read_state_dict(weights)
        last = state_dict.get("classifier.6.weight")
        if last is not None:
            kwargs.setdefault("num_classes", last.shape[0])
    else:
        member = published(weights)
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
        return nn.Sequential(nn.ReLU(inplace=True), LocalResponseNorm(5, norm.alpha, 0.75, norm.k))
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
