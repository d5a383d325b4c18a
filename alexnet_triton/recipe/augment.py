"""From bytes to the network's input: crops, mirrors, PCA colour (Krizhevsky et al. 2012, section 4.1), normalisation.

What is random is drawn apart from what is done with it. `draw` draws for any number of images at once, `centre` and
`ten` are the fixed crops of evaluation, and `Augment` turns a batch of bytes and its draws into the network's input.
`training_transform` and `evaluation_transform` are the same for one image, from torchvision's own transforms.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import PIL.Image
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from alexnet_triton.backend import takes_triton
from alexnet_triton.folded import Folded
from alexnet_triton.library import on_device
from alexnet_triton.recipe.data.sets import Statistics

if TYPE_CHECKING:
    from alexnet_triton.kernels.conv_shape import Convolution


class Draws(NamedTuple):
    """What is drawn for N images; on the CPU until it is moved."""

    top: Tensor
    """(N,), int64: the crop's first row of pixels."""
    left: Tensor
    """(N,), int64: its first column."""
    mirror: Tensor
    """(N,), bool: whether left and right change places, after the crop."""
    colour: Tensor
    """(N, 3), float32: how far to go along each principal component of the colours, in units of its eigenvalue."""

    def at(self, indices: Tensor) -> Draws:
        """Of the images at `indices`."""
        return Draws(*(field[indices] for field in self))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Draws:
        """On another device."""
        return Draws(*(field.to(device, non_blocking=non_blocking) for field in self))


def draw(
    count: int,
    size: int,
    crop: int,
    generator: torch.Generator | None = None,
    *,
    mirror: bool = True,
    colour: float = 0.1,
) -> Draws:
    """Draw for images to train on: each of the (size - crop + 1)^2 crops is as likely, and so is each side.

    A seed gives the same crops whether or not mirrors and colours are wanted.

    Args:
        count: number of images; for a whole epoch 37 bytes each.
        size: side of the images in pixels.
        crop: side of the crops in pixels.
        generator: None draws from torch's own.
        mirror: mirror half of the images.
        colour: standard deviation of the colours' draws; 0 for none.

    Raises:
        ValueError: the crop is larger than the image.
    """
    positions = _room(size, crop) + 1
    return Draws(
        torch.randint(positions, (count,), generator=generator),
        torch.randint(positions, (count,), generator=generator),
        (torch.rand(count, generator=generator) < 0.5) & mirror,
        torch.empty(count, 3).normal_(0, colour, generator=generator),
    )


def centre(count: int, size: int, crop: int) -> Draws:
    """The crops in the middle, as torchvision's `CenterCrop` has them, without mirrors and colours.

    Raises:
        ValueError: the crop is larger than the image.
    """
    middle = round(_room(size, crop) / 2)
    return _fixed(count, middle, middle, False)


def ten(count: int, size: int, crop: int) -> list[Draws]:
    """The ten crops that the network of 2012 is judged by: four corners and the centre, then the mirrors of the five.

    Raises:
        ValueError: the crop is larger than the image.
    """
    return [_fixed(count, top, left, mirror) for mirror in (False, True) for top, left in _five(size, size, crop)]


def ten_crop(images: Tensor, size: int) -> Tensor:
    """Cut the ten crops of `ten` out of images.

    Args:
        images: (N, C, H, W), of any dtype.
        size: side of the crops in pixels.

    Returns:
        (N, 10, C, size, size).

    Raises:
        ValueError: another rank, or crops that are larger than the images.
    """
    if images.dim() != 4:
        raise ValueError(f"ten_crop takes a batch of images (N, C, H, W), got {tuple(images.shape)}")
    places = _five(images.shape[2], images.shape[3], size)
    five = torch.stack([images[..., top : top + size, left : left + size] for top, left in places], 1)
    return torch.cat([five, five.flip(-1)], 1)


def _five(height: int, width: int, crop: int) -> list[tuple[int, int]]:
    """Top and left of the four corners and the centre."""
    bottom, right = _room(height, crop), _room(width, crop)
    return [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]


def _fixed(count: int, top: int, left: int, mirror: bool) -> Draws:
    return Draws(
        torch.full((count,), top), torch.full((count,), left), torch.full((count,), mirror), torch.zeros(count, 3)
    )


def _room(size: int, crop: int) -> int:
    """By how many pixels a crop can move."""
    if not 0 < crop <= size:
        raise ValueError(
            f"a crop of {crop} pixels a side cannot be cut from images of {size}: take crops of 1 to {size} pixels, or "
            "prepare larger images"
        )
    return size - crop


# --- a batch ----------------------------------------------------------------------------------------------------------


class Augment(nn.Module):
    """From a batch of bytes and its draws to the network's input: crop, mirror, PCA colour, normalisation.

    Channel c of a pixel x becomes ((x[c]/255 + sum_k eigenvectors[c, k] eigenvalues[k] colour[k]) - mean[c]) / std[c],
    computed in float32 and rounded once. Where the Triton kernels run, one kernel does all of it.

    Args:
        statistics: of the images that the network learns from.
        crop: side of the crops in pixels.
        dtype: of the answer, floating-point.
        conv: the network's first layer. Where it is a strided convolution that runs on the Triton kernels, the answer
            is written as it reads its input, which saves a copy: see `alexnet_triton.folded.Folded`.

    Raises:
        ValueError: another dtype.
    """

    def __init__(
        self, statistics: Statistics, crop: int, dtype: torch.dtype = torch.float32, conv: nn.Module | None = None
    ) -> None:
        super().__init__()
        if not dtype.is_floating_point:
            raise ValueError(f"Augment gives floating-point images, got {dtype}: choose one of torch's, as float32")
        self.crop, self.dtype = crop, dtype
        self._conv = (conv,)  # whose parameters are not this module's
        # No buffers, so that `half()` does not round them: they follow the draws, not the module.
        self.scale = 1 / (255 * statistics.std)
        self.offset = -statistics.mean / statistics.std
        self.colours = statistics.eigenvectors * statistics.eigenvalues / statistics.std[:, None]

    def forward(self, images: Tensor, draws: Draws) -> Tensor:
        """Augment a batch.

        Args:
            images: (N, 3, H, W), uint8, of any strides; fastest with a pixel's channels side by side.
            draws: of these images; best left on the CPU, from where one small copy brings them to a GPU.

        Returns:
            (N, 3, crop, crop), channels-last.

        Raises:
            ValueError: other images, draws of another number of images, or crops that leave the images.
            RuntimeError: the Triton backend is demanded and cannot run this.
        """
        self._check(images, draws)
        # No matrix product, which autocast would round.
        shift = (draws.colour.unsqueeze(1) * self.colours.to(draws.colour.device)).sum(2)
        offset = self.offset.to(shift.device) + shift
        by_kernel = len(images) > 0 and self.dtype != torch.float64 and not torch.compiler.is_compiling()
        if by_kernel and takes_triton("Augment", images):
            return self._on_triton(images, draws, offset)
        return _by_image(images, draws, self.scale, offset, self.crop, self.dtype)

    def _on_triton(self, images: Tensor, draws: Draws, offset: Tensor) -> Tensor:
        from alexnet_triton.kernels import augment, halo

        size = (len(images), 3, self.crop, self.crop)
        [conv] = self._conv
        shape = None if conv is None else _folded(conv, size)
        layout = halo.dense(size[0], 3, self.crop, self.crop) if shape is None else shape.x_layout
        fold = halo.no_fold(1, 3, 3) if shape is None else shape.fold
        packed = augment.pack_draws(draws.top, draws.left, draws.mirror, offset, self.crop)
        packed = packed.to(images.device, non_blocking=True)
        red, green, blue = self.scale.tolist()
        with on_device(images):
            matrix = augment.augment(images, packed, (red, green, blue), self.crop, layout, fold, self.dtype)
        return halo.view(matrix, layout) if shape is None else Folded(matrix, layout, fold, size)

    def _check(self, images: Tensor, draws: Draws) -> None:
        if images.dim() != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise ValueError(
                f"Augment takes bytes (N, 3, H, W) of dtype uint8, got {tuple(images.shape)} of {images.dtype}"
            )
        count = images.shape[0]
        if draws.top.shape[0] != count:
            raise ValueError(f"Augment needs draws for its {count} images, got draws for {draws.top.shape[0]}")
        for start, size in ((draws.top, images.shape[2]), (draws.left, images.shape[3])):
            room = _room(size, self.crop)
            if count and not 0 <= int(start.min()) <= int(start.max()) <= room:
                raise ValueError(
                    f"draws of crops that begin at pixels {int(start.min())} to {int(start.max())} do not fit images "
                    f"of {size} pixels and crops of {self.crop}: draw for these sizes"
                )

    def extra_repr(self) -> str:
        """Show the crop and the dtype."""
        return f"crop={self.crop}, dtype={self.dtype}"


def _folded(conv: nn.Module, size: tuple[int, int, int, int]) -> Convolution | None:
    """The shapes of a first layer whose layout holds all pixels of such images; None where there is none."""
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or conv.dilation != (1, 1):
        return None
    if isinstance(conv.padding, str):
        return None
    return _convolution(size, tuple(conv.weight.shape), conv.stride, conv.padding, conv.groups)


@functools.lru_cache(64)
def _convolution(size: tuple[int, ...], weight: tuple[int, ...], *rest: Any) -> Convolution | None:
    from alexnet_triton.kernels.conv_shape import convolution

    shape = convolution(size, weight, *rest)
    fits = shape.folds and weight[1] * shape.groups == size[1] and min(shape.out_size) > 0
    axes = zip(shape.source, shape.size, shape.stride, shape.block, shape.origin, strict=True)
    whole = all(
        step == block and count * step - origin >= source for source, count, step, block, origin in axes
    )  # or the convolution leaves pixels out
    return shape if fits and whole else None


def _by_image(images: Tensor, draws: Draws, scale: Tensor, offset: Tensor, crop: int, dtype: torch.dtype) -> Tensor:
    """`Augment` in plain torch, an image at a time, whose bytes and numbers a processor's cache holds."""
    n, width = images.shape[0], 3 * crop
    scale = scale.to(images.device).repeat(crop)  # for a row of pixels
    offset = offset.to(images.device).repeat(1, crop)
    out = images.new_empty((n, crop, crop, 3), dtype=dtype)
    once = None if dtype == torch.float32 else images.new_empty((crop, crop, 3), dtype=torch.float32)
    places = zip(draws.top.tolist(), draws.left.tolist(), draws.mirror.tolist(), strict=True)
    for i, (top, left, mirror) in enumerate(places):
        pixels = images[i, :, top : top + crop, left : left + crop].permute(1, 2, 0)
        result = out[i] if once is None else once
        result.copy_(pixels.flip(1) if mirror else pixels)
        rows = result.view(crop, width)
        torch.addcmul(offset[i], rows, scale, out=rows)
        if once is not None:
            out[i] = once
    return out.permute(0, 3, 1, 2)


# --- one image, with torchvision --------------------------------------------------------------------------------------


class PCAColor(v2.Transform):  # type: ignore[misc]  # torchvision has no types
    """Shift an image's colours along the principal components of a dataset's (Krizhevsky et al. 2012, section 4.1).

    To each pixel is added sum_k eigenvectors[:, k] eigenvalues[k] alpha[k], each alpha drawn from normal(0, std) with
    torch's own generator, once an image, also in a batch. Images are PIL's, `tv_tensors.Image` or tensors
    (..., 3, H, W): uint8, which is rounded and does not wrap around, or floating-point in [0, 1], which may leave it.

    Args:
        eigenvalues: (3,), of the covariance of R, G and B scaled to [0, 1].
        eigenvectors: (3, 3), a column each.
        std: standard deviation of the draws.

    Raises:
        ValueError: other shapes, a negative `std`, or at a call an image that is not RGB of such a dtype.
    """

    def __init__(
        self,
        eigenvalues: Tensor | Sequence[float],
        eigenvectors: Tensor | Sequence[Sequence[float]],
        std: float = 0.1,
    ) -> None:
        super().__init__()
        values, vectors = (torch.as_tensor(given, dtype=torch.float32) for given in (eigenvalues, eigenvectors))
        if values.shape != (3,) or vectors.shape != (3, 3):
            raise ValueError(
                "PCAColor takes eigenvalues (3,) and eigenvectors (3, 3) of the colours' covariance, got "
                f"{tuple(values.shape)} and {tuple(vectors.shape)}"
            )
        if not std >= 0:
            raise ValueError(f"PCAColor takes a standard deviation of at least 0, got {std}")
        self.eigenvalues, self.eigenvectors, self.std = values, vectors, std

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw for the images of one call."""
        images = [image for image in flat_inputs if _is_image(image)]
        batch = images[0].shape[:-3] if images and isinstance(images[0], Tensor) else ()
        return {"alpha": torch.randn(*batch, 3) * self.std}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Shift one input; boxes, masks and other companions of an image are left alone."""
        if not _is_image(inpt):
            return inpt
        if isinstance(inpt, PIL.Image.Image):
            shifted = self.transform(v2.functional.pil_to_tensor(inpt), params)
            return v2.functional.to_pil_image(shifted)
        if inpt.dim() < 3 or inpt.shape[-3] != 3 or not (inpt.dtype == torch.uint8 or inpt.is_floating_point()):
            raise ValueError(
                f"PCAColor takes RGB images (..., 3, H, W), uint8 or floating-point, got {tuple(inpt.shape)} of "
                f"{inpt.dtype}: convert them with v2.RGB() and v2.ToDtype()"
            )
        shift = (params["alpha"] * self.eigenvalues) @ self.eigenvectors.t()
        shift = shift[..., None, None].to(inpt.device)
        if inpt.dtype == torch.uint8:
            shifted = inpt.float().add_(255 * shift).round_().clamp_(0, 255).to(torch.uint8)
        else:
            shifted = (inpt + shift).to(inpt.dtype)
        return tv_tensors.wrap(shifted, like=inpt) if isinstance(inpt, tv_tensors.TVTensor) else shifted


def _is_image(given: object) -> bool:
    return isinstance(given, tv_tensors.Image | PIL.Image.Image) or (
        isinstance(given, Tensor) and not isinstance(given, tv_tensors.TVTensor)
    )


def training_transform(statistics: Statistics, crop: int) -> v2.Compose:
    """What `draw` and `Augment` do, for one image, PIL's or (3, H, W) uint8; from torch's own generator."""
    return v2.Compose(
        [
            v2.ToImage(),
            v2.RandomCrop(crop),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            PCAColor(statistics.eigenvalues, statistics.eigenvectors),
            *_normalise(statistics),
        ]
    )


def evaluation_transform(statistics: Statistics, crop: int) -> v2.Compose:
    """What `centre` and `Augment` do, for one image, PIL's or (3, H, W) uint8."""
    return v2.Compose(
        [v2.ToImage(), v2.CenterCrop(crop), v2.ToDtype(torch.float32, scale=True), *_normalise(statistics)]
    )


def _normalise(statistics: Statistics) -> list[v2.Transform]:
    return [v2.Normalize(statistics.mean.tolist(), statistics.std.tolist()), v2.ToPureTensor()]
