"""What happens to the pixels of an image before a backbone sees them, in the arithmetic of torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from attribution.images import MAX_PIXELS, ImageError

_INTERPOLATION = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
}


@dataclass(frozen=True)
class Preprocessing:
    """All that happens to the pixels of an RGB image before a backbone, in the arithmetic of torchvision.

    "shortest": the shorter side becomes `resize` pixels, then the centre `crop` pixels square are kept;
    "squash": both sides become `resize`. Then x / 255 - mean, over std.
    """

    mode: Literal["shortest", "squash"]
    resize: int
    crop: int
    interpolation: Literal["bilinear", "bicubic", "box"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.resize:
            raise ValueError(f"crop {self.crop} of {self.resize} pixels: wanted 1 to {self.resize}")
        if not min(self.std) > 0:
            raise ValueError(f"std {self.std}: wanted > 0")

    def __str__(self) -> str:
        mean, std = ("/".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"{self.mode} {self.resize} {self.interpolation}, crop {self.crop}, mean {mean}, std {std}"

    def pixels(self, images: Sequence[Image.Image]) -> UInt8[np.ndarray, "images height width 3"]:
        """The images resized and cropped, bytes. No image is resampled that already has the size."""
        pixels = np.empty((len(images), self.crop, self.crop, 3), np.uint8)
        for row, image in enumerate(images):
            pixels[row] = np.asarray(self._fit(image))
        return pixels

    def _fit(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if self.mode == "squash":
            resized = (self.resize, self.resize)
        elif width <= height:
            resized = (self.resize, self.resize * height // width)
        else:
            resized = (self.resize * width // height, self.resize)
        if resized[0] * resized[1] > MAX_PIXELS:
            raise ImageError(
                f"{width} x {height} pixels: sides too unequal to bring the shorter to {self.resize}"
            )
        if resized != image.size:
            image = image.resize(resized, _INTERPOLATION[self.interpolation])
        if image.size != (self.crop, self.crop):
            left, top = round((image.width - self.crop) / 2), round((image.height - self.crop) / 2)
            image = image.crop((left, top, left + self.crop, top + self.crop))
        return image


def library_preprocessing(
    name: str, mode: str, resize: int, crop: int, config: dict[str, Any]
) -> Preprocessing:
    """That of a library's config of backbone `name`. Raises ValueError for what is not done here."""
    interpolation = config["interpolation"]
    if mode not in ("shortest", "squash"):
        raise ValueError(f"{name}: resizing by {mode}, wanted shortest or squash")
    if interpolation not in _INTERPOLATION:
        raise ValueError(f"{name}: interpolation {interpolation}, wanted {' or '.join(_INTERPOLATION)}")
    mean, std = (tuple(float(value) for value in config[key]) for key in ("mean", "std"))
    return Preprocessing(mode, resize, crop, interpolation, mean, std)  # type: ignore[arg-type]  # just checked
