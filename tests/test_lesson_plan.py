"""What a concept is learned from: its views with their masks and words, its prior, its initializer."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from attribution.augmentation import AugmentationSettings
from attribution.base_model import BaseSettings, encode_images, load_base
from attribution.concepts import Concept, Exemplar
from attribution.lessons import Lesson
from stages.lesson_plan import Params, Words, prepare
from tests.test_customize import PARAMS
from tests.tiny import save_tiny_pipeline

PLAIN = AugmentationSettings(0.0, 0.5, 0.0, 1.0, 1.0, 0.0, 0.6, ("far away",), ("close up",))
TOLD = replace(
    PARAMS,
    views=6,
    prior_images=3,
    augmentation=PLAIN,
    object=Words("a {token} {noun}", "a {noun}", "red"),
    style=Words("{thing} in the style of {token} art", "a picture", "art"),
)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    folder = save_tiny_pipeline(tmp_path_factory.mktemp("base"))
    return load_base(BaseSettings(str(folder), None, "cpu", "float32"))


def concept(kind: str, pictures: list[np.ndarray], noun: str = "car") -> Concept:
    exemplars = []
    for number, picture in enumerate(pictures):
        encoded = io.BytesIO()
        Image.fromarray(picture).save(encoded, "PNG")
        thing = ("tree", "cat", "sun")[number]
        exemplars.append(Exemplar(f"{kind}{number}", encoded.getvalue(), {"noun": noun, "thing": thing}))
    return Concept(kind, kind, noun, "train", True, tuple(exemplars))  # type: ignore[arg-type]


def pictures(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 255, (count, 16, 16, 3), dtype=np.uint8))


def lesson(pipe: StableDiffusionPipeline, folder: Path, one: Concept, params: Params = TOLD) -> Lesson:
    return prepare(pipe, params, one, folder)


def test_every_exemplar_of_a_style_is_seen_under_its_own_words(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    shown = pictures(3)
    found = lesson(pipe, tmp_path, concept("style", shown))
    wanted = encode_images(pipe, np.stack(shown * 2))
    torch.testing.assert_close(found.latents, wanted, rtol=1e-4, atol=1e-4)
    assert found.valid.all()
    assert found.prompts == tuple(
        f"{thing} in the style of <new1> art" for thing in ("tree", "cat", "sun") * 2
    )
    assert (found.initializer, found.prior_prompt) == ("art", "a picture")


def test_an_object_has_the_words_of_objects(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    found = lesson(pipe, tmp_path, concept("object", pictures(1), noun="tree"))
    assert (found.initializer, found.prior_prompt) == ("red", "a tree")
    assert set(found.prompts) == {"a <new1> tree"}


def test_views_differ_and_carry_their_mask_and_words(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    shrunk = replace(PLAIN, shrink_share=1.0)
    params = replace(TOLD, views=12, augmentation=shrunk)
    found = lesson(pipe, tmp_path, concept("object", pictures(1)), params)
    assert (torch.pdist(found.latents.flatten(1)) > 0.01).sum() > 50  # of 66 pairs
    covered = found.valid.flatten(1).float().mean(dim=1)
    assert covered.min() < 0.7
    for prompt, share in zip(found.prompts, covered.tolist(), strict=True):
        assert prompt in ("far away a <new1> car", "a <new1> car")
        if prompt.startswith("far away"):
            assert share < 0.6
    assert len(set(found.prompts)) == 2


def test_each_image_of_the_prior_is_another(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    found = lesson(pipe, tmp_path, concept("object", pictures(1)))
    assert len(found.prior_latents) == 3
    assert (torch.pdist(found.prior_latents.flatten(1)) > 0.1).all()


@pytest.mark.parametrize(
    ("prompt", "prior_prompt", "message"),
    [
        ("a {noun}", "a {noun}", r"wanted \{token\} in prompt and not in prior_prompt"),
        ("a {{token}}", "a {noun}", r"wanted \{token\} in prompt and not in prior_prompt"),
        ("a {token}", "a {token}", r"wanted \{token\} in prompt and not in prior_prompt"),
        ("a {token} {noun", "a {noun}", r"prompt 'a \{token\} \{noun': "),
        ("a {token} {noun:d}", "a {noun}", r"wanted \{noun\} alone"),
        ("a {token} {place}", "a {noun", r"prompt 'a \{noun': "),
        ("a {token} {place}", "a {place}", r"nothing to put for \{place\}; known: kind, noun"),
    ],
)
def test_words_that_cannot_be_filled_in_are_refused(prompt: str, prior_prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Words(prompt, prior_prompt, "art")
