"""A trained network with what is needed to use it: its classes, and how its input is made of images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_triton.caffe import read_mean
from alexnet_triton.model import AlexNet
from alexnet_triton.recipe.augment import Augment
from alexnet_triton.recipe.data.sets import DataError, ImageSet, Statistics
from alexnet_triton.variants import VARIANTS
from alexnet_triton.weights import (
    is_published,
    published,
    read_file,
    state_dict_of,
    strip_prefixes,
    variant_of,
)

SIZE = 256
"""Side of the images that the published networks were trained on, in pixels."""

CAFFE_MEAN = (122.67891434, 116.66876762, 104.00698793)
"""R, G and B of the mean ImageNet image, of pixels from 0 to 255: what Caffe's examples subtract where they do not
subtract the whole image (examples/00-classification.ipynb, which has them as B, G, R)."""


def _statistics(mean: Tensor, std: Tensor) -> Statistics:
    """Of a network whose principal components of colour are not known: eigenvalues 0, so that none is varied."""
    return Statistics(mean, std, torch.zeros(3), torch.eye(3))


def imagenet_statistics() -> Statistics:
    """What torchvision's weights were trained with: ImageNet's mean and standard deviation, in RGB."""
    return _statistics(torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))


def caffe_statistics(mean: Tensor | None = None) -> Statistics:
    """What Caffe's weights were trained with: a mean is taken from bytes, and nothing divides.

    Args:
        mean: (3,), of bytes from 0 to 255, in RGB; None takes `CAFFE_MEAN`.
    """
    mean = torch.tensor(CAFFE_MEAN) if mean is None else mean
    return _statistics(mean.float() / 255, torch.full((3,), 1 / 255))


@dataclass
class Trained:
    """A trained network with what is needed to use it."""

    model: AlexNet
    classes: tuple[str, ...]
    """Names of the classes, one for each output."""
    statistics: Statistics
    """Colours that the input is normalised by: (x / 255 - mean) / std. Eigenvalues are 0 where they are not known."""
    size: int
    """Side of the images as they are read, in pixels."""
    crop: int
    """Side of the network's input, in pixels; at most `size`."""
    named: bool = True
    """Whether `classes` are what the data's class folders are called. Where not, as with published weights, a set of
    as many classes is taken to be in the network's order when its names are sorted, as ImageNet's WordNet ids are."""

    def content(self, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """What to write down, in tensors and plain types; `from_content` is its inverse.

        Keys: `model` (state dict, floating-point values in float32), `variant`, `lrn` (bool), `classes` (list of str),
        `named` (bool), `mean`, `std`, `eigenvalues` (3,), `eigenvectors` (3, 3), `size`, `crop` (int).

        Args:
            state_dict: the parameters, where they are not the model's own at this moment; the prefixes of wrappers
                are taken off. Values that are in float32 are not copied.
        """
        parameters = strip_prefixes(self.model.state_dict() if state_dict is None else state_dict)
        for name, value in parameters.items():
            parameters[name] = value.detach().float() if value.is_floating_point() else value.detach()
        return {
            "model": parameters,
            "variant": self.model.variant,
            "lrn": isinstance(self.model.features[1], nn.Sequential),
            "classes": list(self.classes),
            "named": self.named,
            **{name: value.detach().float().cpu() for name, value in self.statistics._asdict().items()},
            "size": self.size,
            "crop": self.crop,
        }

    @staticmethod
    def from_content(content: Mapping[str, Any], name: str = "the checkpoint", variant: str | None = None) -> Trained:
        """Build the network that `content` describes, in evaluation mode, on the CPU.

        Args:
            content: as of `Trained.content`, with any other keys; or a state dict alone, of which only the
                parameters are known: the input is then that of the variant's published weights, and classes are
                numbers. Its float32 tensors become the model's parameters.
            name: what errors call it.
            variant: what it must be; needed where a state dict alone could be of more than one.

        Raises:
            ValueError: it is no such content, is damaged, or is of another variant.
        """
        state_dict = state_dict_of(content)
        if state_dict is None:
            raise ValueError(f"{name} holds no network (a state dict, alone or under 'model')")
        alone = "model" not in content or "classes" not in content
        found = _variant(state_dict, content.get("variant"), variant, name)
        classes = _classes(content, state_dict, alone, name)
        model = _model(state_dict, found, content.get("lrn"), len(classes), name)
        if alone:
            statistics = caffe_statistics() if found == "caffe" else imagenet_statistics()
            return Trained(model, classes, statistics, SIZE, VARIANTS[found].image_size, named=False)
        crop = _pixels(content, "crop", content.get("image_size"), name)
        size = _pixels(content, "size", crop, name)
        if crop > size:
            raise ValueError(f"{name} is damaged: its crop of {crop} pixels is larger than its images of {size}")
        return Trained(model, classes, _colours(content, name), size, crop, content.get("named") is not False)

    def augment(self, dtype: torch.dtype | None = None) -> Augment:
        """From images' bytes to this network's input, in `dtype`; None takes that of its parameters."""
        dtype = dtype or next(self.model.parameters()).dtype
        first = self.model.features[0]
        return Augment(self.statistics, self.crop, dtype, first if isinstance(first, nn.Conv2d) else None)

    def labels(self, data: ImageSet) -> ImageSet:
        """The same images, with the indices that their classes have in this network.

        Raises:
            DataError: the network lacks a class of the images, or neither names its classes nor has as many.
        """
        if self.named:
            return data.with_classes(self.classes)
        if len(data.classes) != len(self.classes):
            raise DataError(
                f"{data.name!r} has {len(data.classes)} classes and the network {len(self.classes)}, of which it knows "
                "only the order, that of ImageNet's sorted WordNet ids: give data with a folder for each of them, or "
                "the names of the network's classes in its order (--classes FILE)"
            )
        order = tuple(sorted(data.classes))
        return data.with_classes(order)


def load_trained(
    source: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    variant: str | None = None,
    mean: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
) -> Trained:
    """Load a trained network, running no code that a file may hold.

    Args:
        source: a checkpoint of training; any file that `read_state_dict` takes, torchvision's and Caffe's among them;
            or the name of weights that torchvision publishes (`"IMAGENET1K_V1"`), which torchvision downloads.
        classes: names of the classes in the network's order, in the place of its own.
        variant: what the network must be; needed where a file holds parameters alone and `"paper"` and `"caffe"`
            fit them both.
        mean: a mean file of Caffe (`.binaryproto`), of a network of variant `"caffe"`; the mean of its pixels is taken
            from each pixel.
        device: where the network is to be; None is the CPU.

    Returns:
        The network in evaluation mode. Where a file holds parameters alone, the input is that of the variant's
        published weights: of 256 pixels, cropped to the variant's own size, in ImageNet's (or Caffe's) colours.

    Raises:
        ValueError: there is no such file, or it is damaged, holds no AlexNet, or one of another variant; or `classes`
            are not as many as the network's, or two are alike; or `mean` is given for another variant.
        RuntimeError: a caffemodel is of another network.
    """
    if is_published(source):
        trained = _published(str(source), variant)
    else:
        trained = Trained.from_content(read_file(source), repr(os.fspath(source)), variant)
    if classes is not None:
        if len(classes) != len(trained.classes) or len(set(classes)) != len(classes):
            raise ValueError(
                f"the network has {len(trained.classes)} classes, and {len(classes)} names were given, "
                f"{len(set(classes))} of them different: give each class one name of its own"
            )
        trained.classes, trained.named = tuple(classes), True
    if mean is not None:
        if trained.model.variant != "caffe":
            raise ValueError(f"a mean file belongs to variant 'caffe', and the network is {trained.model.variant!r}")
        trained.statistics = caffe_statistics(read_mean(mean))
    if device is not None:
        trained.model.to(device)
        if torch.device(device).type == "cuda":
            trained.model.to(memory_format=torch.channels_last)  # as the kernels read filters: no copies of them
    return trained


def read_names(path: str | os.PathLike[str]) -> list[str]:
    """Names of classes from a text file, a line each; lines without any are passed over.

    Raises:
        ValueError: the file is missing, or is no text in UTF-8.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as names of classes, a line each: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _published(source: str, variant: str | None) -> Trained:
    """Weights that torchvision publishes. Their categories name two classes alike, so they are no folders' names."""
    member = published(source)
    trained = Trained.from_content(member.get_state_dict(progress=True, check_hash=True), repr(source), variant)
    trained.classes = tuple(member.meta["categories"])
    return trained


# --- reading what was written ---------------------------------------------------------------------------------


def _variant(state_dict: Mapping[str, Any], written: Any, asked: str | None, name: str) -> str:
    metadata = getattr(state_dict, "_metadata", None) or {}
    known = written or metadata.get("", {}).get("variant")
    shaped = variant_of(state_dict)
    shaped_alike = {"paper": ("paper", "caffe")}.get(shaped or "", (shaped,))
    if shaped is None or (known is not None and known not in shaped_alike):
        raise ValueError(f"{name} holds no AlexNet: its shapes are those of no variant ({', '.join(VARIANTS)})")
    if asked is not None and asked not in ((known,) if known else shaped_alike):
        raise ValueError(
            f"{name} is of variant {known or shaped!r}, and {asked!r} was asked for: weights of the variants are not "
            "interchangeable"
        )
    if known is None and asked is None and len(shaped_alike) > 1:
        raise ValueError(
            f"{name} does not say whether it is of variant 'paper' or 'caffe', which have the same shapes: say which "
            "(--variant)"
        )
    return str(known or asked or shaped)


def _model(state_dict: dict[str, Tensor], variant: str, lrn: Any, classes: int, name: str) -> AlexNet:
    model = AlexNet(classes, variant=variant, lrn=lrn if isinstance(lrn, bool) else None, device="meta")
    floats = type(state_dict)((key, value.float()) for key, value in state_dict.items())
    for key, value in floats.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} is damaged, or its training has diverged: {key!r} has values that are not finite")
    try:
        model.load_state_dict(floats, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{name} holds no AlexNet of variant {variant!r}: {error}") from error
    return model.requires_grad_(True).eval()


def _classes(content: Mapping[str, Any], state_dict: Mapping[str, Tensor], alone: bool, name: str) -> tuple[str, ...]:
    last = state_dict.get("classifier.6.weight")
    count = 0 if last is None or last.dim() != 2 else last.shape[0]
    if count < 1:
        raise ValueError(f"{name} holds no AlexNet: it has no last layer 'classifier.6'")
    if alone:
        return tuple(map(str, range(count)))
    names = content["classes"]
    if not isinstance(names, list | tuple) or len(names) != count or not all(isinstance(word, str) for word in names):
        raise ValueError(f"{name} is damaged: it does not name the {count} classes of its last layer")
    return tuple(names)


def _colours(content: Mapping[str, Any], name: str) -> Statistics:
    unknown = _statistics(torch.zeros(3), torch.ones(3))
    shapes = {"mean": (3,), "std": (3,), "eigenvalues": (3,), "eigenvectors": (3, 3)}
    values = []
    for key, shape in shapes.items():
        value = content.get(key, getattr(unknown, key) if key.startswith("eigen") else None)
        if not isinstance(value, Tensor) or tuple(value.shape) != shape or not value.isfinite().all():
            raise ValueError(f"{name} is damaged: its {key!r} is not {' x '.join(map(str, shape))} finite numbers")
        values.append(value.float())
    return Statistics(*values)


def _pixels(content: Mapping[str, Any], key: str, otherwise: Any, name: str) -> int:
    value = content.get(key, otherwise)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is damaged: its {key!r} is {value!r}, and a number of pixels is needed")
    return value
