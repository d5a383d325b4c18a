"""Images that are at hand everywhere: the scanned digits of scikit-learn, written as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from alexnet_triton.recipe.data.sets import DataError


def write_digits(folder: Path) -> None:
    """Write the 1,797 scanned digits of scikit-learn (8x8 pixels, 16 levels) as `folder/DIGIT/NUMBER.png`, in grey.

    They are the test set of the UCI handwritten digits (Alpaydin and Kaynak, 1998).

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: pip install 'alexnet-triton[demo]', or "
            "give a folder of images"
        ) from error
    bunch = load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    for number, (image, digit) in enumerate(zip(grey, bunch.target, strict=True)):
        path = folder / str(digit) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
