"""Views: whole cells, exact masks, words that say what was done."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attribution.augmentation import BLANK, AugmentationSettings, View, draw_view

SETTINGS = AugmentationSettings(
    shrink_share=0.5,
    shrink_min=0.3,
    zoom_share=0.25,
    zoom_min=1.2,
    zoom_max=1.4,
    flip_share=0.5,
    far_below=0.6,
    far_words=("far away", "very small"),
    near_words=("close up",),
)
# Red on the left, green on the right, no pixel of the blank canvas's grey.
PICTURE = Image.fromarray(np.repeat([[[200, 0, 0]] * 20 + [[0, 200, 0]] * 20], 40, axis=0).astype(np.uint8))


def view(seed: int, **changes: Any) -> View:
    settings = replace(SETTINGS, **changes)
    return draw_view(PICTURE, np.random.default_rng(seed), settings, cells=(8, 8), factor=4)


def test_the_mask_is_exactly_where_the_exemplar_is() -> None:
    for seed in range(30):
        drawn = view(seed, shrink_share=1.0, zoom_share=0.0)
        blank = (drawn.pixels == BLANK).all(axis=-1)
        assert np.array_equal(~blank, drawn.valid.repeat(4, axis=0).repeat(4, axis=1))
        side = drawn.valid.any(axis=0).sum()
        assert drawn.valid.sum() == side * side
        if drawn.words:
            assert drawn.words in SETTINGS.far_words
            assert side <= 5
        else:
            assert side >= 5


@pytest.mark.parametrize(
    ("shares", "words"),
    [((0.0, 1.0), {"close up"}), ((0.0, 0.0), {""}), ((1.0, 0.0), {"", *SETTINGS.far_words})],
)
def test_words_say_what_was_done(shares: tuple[float, float], words: set[str]) -> None:
    drawn = [view(seed, shrink_share=shares[0], zoom_share=shares[1]) for seed in range(40)]
    assert {one.words for one in drawn} == words
    assert all(one.valid.all() for one in drawn) == (shares[0] == 0)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_flips(share: float) -> None:
    drawn = view(0, shrink_share=0.0, zoom_share=0.0, flip_share=share)
    assert drawn.pixels.shape == (32, 32, 3)
    assert (drawn.pixels[5, 2, 0] > 150) == (share == 0.0)


def test_zoomed_views_show_a_part() -> None:
    column = [
        view(seed, shrink_share=0.0, zoom_share=1.0, flip_share=0.0).pixels[5, :, 0] for seed in range(20)
    ]
    edges = {int((values > 100).sum()) for values in column}
    assert len(edges) > 3


def test_a_seed_is_a_view() -> None:
    assert np.array_equal(view(3).pixels, view(3).pixels)
    assert len({view(seed).pixels.tobytes() for seed in range(10)}) > 5


@pytest.mark.parametrize(
    "changes", [{"shrink_share": 0.9}, {"shrink_min": 0.0}, {"zoom_min": 0.9}, {"zoom_max": 1.1}]
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        replace(SETTINGS, **changes)


@pytest.mark.parametrize("shares", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_canvases_need_not_be_square(shares: tuple[float, float]) -> None:
    settings = replace(SETTINGS, shrink_share=shares[0], zoom_share=shares[1])
    for seed in range(10):
        drawn = draw_view(PICTURE, np.random.default_rng(seed), settings, cells=(6, 9), factor=4)
        assert drawn.pixels.shape == (24, 36, 3)
        shown = ~(drawn.pixels == BLANK).all(axis=-1)
        assert np.array_equal(shown, drawn.valid.repeat(4, axis=0).repeat(4, axis=1))


def test_shrunk_views_reach_every_cell() -> None:
    """The mean over many views is the same from the left as from the right, from the top as from below."""
    shown = np.mean([view(seed, shrink_share=1.0, zoom_share=0.0).valid for seed in range(400)], axis=0)
    assert shown == pytest.approx(shown[::-1], abs=0.12)
    assert shown == pytest.approx(shown[:, ::-1], abs=0.12)
    assert shown.min() > 0.1


def test_shares_are_those_of_the_views() -> None:
    """Words tell zoomed views, masks and far words shrunk ones."""
    drawn = [view(seed, shrink_share=0.4, zoom_share=0.4) for seed in range(400)]
    assert np.mean([one.words == "close up" for one in drawn]) == pytest.approx(0.4, abs=0.08)
    whole = [one.valid.all() and not one.words for one in drawn]
    assert np.mean(whole) == pytest.approx(0.2 + 0.4 * 0.05, abs=0.08)


def test_zoomed_views_show_any_part_in_any_size() -> None:
    """A ramp from left to right and one from top to bottom: their ends tell place and scale."""
    ramp = np.linspace(0, 255, 160)
    picture = np.stack([*np.meshgrid(ramp, ramp), np.zeros((160, 160))], axis=-1).astype(np.uint8)
    settings = replace(SETTINGS, shrink_share=0.0, zoom_share=1.0, flip_share=0.0, zoom_max=2.0)
    lows, scales = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        pixels = draw_view(Image.fromarray(picture), rng, settings, cells=(40, 40), factor=4).pixels
        lows += [pixels[80, 2, 0] / 255, pixels[2, 80, 1] / 255]
        scales.append(255 / (float(pixels[80, -1, 0]) - float(pixels[80, 0, 0])))
    assert 1.15 < min(scales) < 1.35
    assert 1.8 < max(scales) < 2.1
    assert min(lows) < 0.05
    assert max(lows) > 0.3
    assert np.corrcoef(lows[::2], lows[1::2])[0, 1] < 0.7  # left and top are drawn apart
