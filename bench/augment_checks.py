"""Checks of augmentation: the kernel against plain PyTorch, and what the first layer makes of the layout it writes."""

from __future__ import annotations

import torch

from alexnet_triton.backend import use_backend
from alexnet_triton.bench.checks import Absent, Measure, Scale, differing, network
from alexnet_triton.tuning.accuracy import rms_error
from alexnet_triton.variants import VARIANTS

LIMITS = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}
"""Of the error of a rounded number: half a unit in its last place, on the root mean square under that."""


def check_augment(variant: str, dtype: torch.dtype, scale: Scale, device: torch.device) -> list[Measure]:
    """Bytes become what the CPU makes of them, and the first layer sees the same in either layout, bit for bit.

    Args:
        variant: of the network whose first layer it is.
        dtype: of the network's input.
        scale: how large: its first batch, and how thin the network is.
        device: where the kernel runs.

    Raises:
        Absent: a package that augmentation needs and the kernels do not.
    """
    try:
        from alexnet_triton.folded import Folded
        from alexnet_triton.recipe.augment import Augment, draw
        from alexnet_triton.recipe.data.sets import ColourSums
    except ModuleNotFoundError as error:
        raise Absent(f"{error.name}, which augmentation needs") from None
    torch.manual_seed(18)
    batch, crop = scale.batches[0], scale.image_size or VARIANTS[variant].image_size
    size = crop * 256 // 227
    pixels = torch.randint(256, (batch, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    colours, draws = ColourSums.of(pixels[:2]).statistics(), draw(batch, size, crop)
    first = network(variant, scale, device, dtype).features[:3]
    expected = Augment(colours, crop)(pixels, draws)
    seen, gradients = [], []
    with use_backend("triton"):
        images = pixels.to(device)
        inputs = [Augment(colours, crop, dtype, conv)(images, draws) for conv in (None, first[0])]
        for x in inputs:
            y = first(x)
            y.square().sum().backward()
            seen.append(y.detach())
            gradients.append([parameter.grad for parameter in first.parameters()])
            first.zero_grad(set_to_none=True)
    plain, folded = inputs
    unlike = sum(differing(a, b) for a, b in zip(*gradients, strict=True))
    return [
        Measure("pixels", rms_error(plain.cpu(), expected), LIMITS[dtype]),
        Measure("not in the layout of the first layer", float(not isinstance(folded, Folded)), 0.0),
        Measure("pixels that differ between the layouts", differing(plain, folded.clone()), 0.0),
        Measure("outputs of the first layer that differ", differing(*seen), 0.0),
        Measure("gradients of its parameters that differ", unlike, 0.0),
    ]
