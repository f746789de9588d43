"""Views of an exemplar for customization: flipped, shrunk onto a blank canvas or zoomed in on, and told."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageOps

BLANK = (127, 127, 127)


@dataclass(frozen=True)
class AugmentationSettings:
    """Shares of shrunk and of zoomed views (the rest is the whole image), their scales, words for them."""

    shrink_share: float
    shrink_min: float
    zoom_share: float
    zoom_min: float
    zoom_max: float
    flip_share: float
    far_below: float
    far_words: tuple[str, ...]
    near_words: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.shrink_share <= 1 - self.zoom_share <= 1:
            raise ValueError(
                f"wanted shrink_share + zoom_share <= 1, got {self.shrink_share} and {self.zoom_share}"
            )
        if not 0 < self.shrink_min <= 1 <= self.zoom_min <= self.zoom_max:
            raise ValueError(
                "wanted 0 < shrink_min <= 1 <= zoom_min <= zoom_max, "
                f"got {self.shrink_min}, {self.zoom_min}, {self.zoom_max}"
            )


@dataclass(frozen=True)
class View:
    """One view: its pixels, which latent cells show the exemplar, and words to put before the prompt."""

    pixels: UInt8[np.ndarray, "height width 3"]
    valid: Bool[np.ndarray, "rows columns"]
    words: str


def draw_view(
    image: Image.Image,
    rng: np.random.Generator,
    settings: AugmentationSettings,
    *,
    cells: tuple[int, int],
    factor: int,
) -> View:
    """A random view of `image` on a canvas of `cells` (rows, columns) latent cells of `factor` pixels each.

    Shrunk views take whole cells, so that the mask is exact. Source: Custom Diffusion (arXiv:2212.04488).
    """
    rows, columns = cells
    image = ImageOps.fit(image, (columns * factor, rows * factor), Image.Resampling.LANCZOS)
    if rng.uniform() < settings.flip_share:
        image = ImageOps.mirror(image)
    kind = rng.uniform()
    valid = np.ones(cells, dtype=bool)
    words = ""
    if kind < settings.shrink_share:
        image, valid, words = _shrink(image, rng, settings, cells, factor)
    elif kind < settings.shrink_share + settings.zoom_share:
        image = _zoom(image, rng, settings)
        words = _choose(settings.near_words, rng)
    return View(np.asarray(image), valid, words)


def _shrink(
    image: Image.Image,
    rng: np.random.Generator,
    settings: AugmentationSettings,
    cells: tuple[int, int],
    factor: int,
) -> tuple[Image.Image, np.ndarray, str]:
    scale = rng.uniform(settings.shrink_min, 1)
    rows, columns = (max(1, round(side * scale)) for side in cells)
    top, left = (
        int(rng.integers(side - taken + 1)) for side, taken in zip(cells, (rows, columns), strict=True)
    )
    canvas = Image.new("RGB", image.size, BLANK)
    small = image.resize((columns * factor, rows * factor), Image.Resampling.LANCZOS)
    canvas.paste(small, (left * factor, top * factor))
    valid = np.zeros(cells, dtype=bool)
    valid[top : top + rows, left : left + columns] = True
    return canvas, valid, _choose(settings.far_words, rng) if scale < settings.far_below else ""


def _zoom(image: Image.Image, rng: np.random.Generator, settings: AugmentationSettings) -> Image.Image:
    scale = rng.uniform(settings.zoom_min, settings.zoom_max)
    width, height = (side / scale for side in image.size)
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    return image.resize(image.size, Image.Resampling.LANCZOS, box=box)


def _choose(words: tuple[str, ...], rng: np.random.Generator) -> str:
    return words[rng.integers(len(words))] if words else ""
