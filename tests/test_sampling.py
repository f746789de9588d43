"""Drawing with several customized models at once, against diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)

from attribution.base_model import BaseSettings, decode_latents, encode_images, latent_shape, load_base
from attribution.conditioning import token_ids
from attribution.cross_attention import cross_attention
from attribution.customization import METHODS
from attribution.sampling import Drawing, Sampler, base_stack, draw_latents
from attribution.seeds import seed_from
from tests.tiny import save_tiny_pipeline
from tests.tiny_models import noisy_stack

DDIM = Sampler("ddim", steps=4, guidance=3.0, eta=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pipe(folder: Path) -> StableDiffusionPipeline:
    return load_base(settings(folder))


def settings(model: Path | str) -> BaseSettings:
    return BaseSettings(str(model), None, "cpu", "float32")


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("method", METHODS)
def test_batches_change_nothing(pipe: StableDiffusionPipeline, method: str, batch_size: int) -> None:
    stack = noisy_stack(pipe, 3, method)
    drawings = [
        Drawing(i % 3, f"a <new1> {noun}", seed=i) for i, noun in enumerate(["car", "tree", "cat"] * 2)
    ]
    sampler = Sampler("ddim", steps=3, guidance=3.0, eta=0.5)
    together = draw_latents(pipe, stack, drawings, sampler, batch_size=6)
    batched = draw_latents(pipe, stack, drawings, sampler, batch_size=batch_size)
    torch.testing.assert_close(batched, together, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_models_prompts_and_seeds_all_matter(pipe: StableDiffusionPipeline, method: str) -> None:
    drawings = [
        Drawing(0, "a <new1> car", 1),
        Drawing(1, "a <new1> car", 1),
        Drawing(0, "a <new1> tree", 1),
        Drawing(0, "a <new1> car", 2),
    ]
    latents = draw_latents(pipe, noisy_stack(pipe, 2, method), drawings, DDIM, batch_size=4)
    distances = torch.cdist(latents.flatten(1), latents.flatten(1))
    assert (distances + torch.eye(4) > 0.01).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_pipeline_is_as_before_after_drawing(pipe: StableDiffusionPipeline, method: str) -> None:
    table = pipe.text_encoder.get_input_embeddings()
    processors = {name: layer.processor for name, layer in cross_attention(pipe.unet).items()}
    weights = {name: weight.clone() for name, weight in pipe.unet.named_parameters()}
    draw_latents(pipe, noisy_stack(pipe, 1, method), [Drawing(0, "a <new1> car", 0)], DDIM, batch_size=1)
    assert pipe.text_encoder.get_input_embeddings() is table
    assert {name: layer.processor for name, layer in cross_attention(pipe.unet).items()} == processors
    assert not any(layer._forward_hooks for layer in pipe.unet.modules())
    assert all(torch.equal(weights[name], weight) for name, weight in pipe.unet.named_parameters())


def test_nothing_to_draw_is_no_latents(pipe: StableDiffusionPipeline) -> None:
    latents = draw_latents(pipe, noisy_stack(pipe, 1), [], DDIM, batch_size=4)
    assert latents.shape == (0, *latent_shape(pipe))


def test_other_sizes_of_latents(tmp_path: Path) -> None:
    folder = save_tiny_pipeline(tmp_path / "base", latents=(6, 8), factor=2, prediction_type="epsilon")
    pipe = load_base(settings(folder))
    assert latent_shape(pipe) == (6, 8, 8)
    stack = base_stack(pipe, ["art"])
    latents = draw_latents(pipe, stack, [Drawing(0, "a <new1> car", 0)] * 3, DDIM, batch_size=2)
    images = decode_latents(pipe, latents, batch_size=2)
    assert images.shape == (3, 16, 16, 3)
    assert np.array_equal(images[0], images[1])
    assert encode_images(pipe, images, batch_size=2).shape == (3, 6, 8, 8)


def test_where_the_token_stands_is_the_number_of_the_model(pipe: StableDiffusionPipeline) -> None:
    ids = token_ids(pipe, ["a <new1> car", "<new1>"], [0, 4])
    first = len(pipe.tokenizer) - 1
    assert ids.shape == (2, pipe.tokenizer.model_max_length)
    assert (ids[0] >= first).nonzero().tolist() == [[2]]
    assert ids[1, 1] == first + 4


def test_a_prompt_that_would_be_cut_is_refused(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match=r"prompt 'a very .*': 18 tokens, wanted at most 16"):
        token_ids(pipe, ["a " + "very " * 14 + "<new1>"], [0])


@pytest.mark.parametrize("word", ["xylophone", "red car", ""])
def test_an_initializer_is_one_known_word(pipe: StableDiffusionPipeline, word: str) -> None:
    with pytest.raises(
        ValueError, match=f"token initializer '{word}': wanted one word of the base's vocabulary"
    ):
        base_stack(pipe, ["art", word])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("ddim", 0, 1.0, 0.0), "steps: wanted at least 1"),
        (("dpmsolver++", 5, 1.0, 0.5), "eta: only ddim has it"),
        (("ddim", 5, 1.0, 1.5), "eta: wanted 0 to 1"),
    ],
)
def test_a_sampler_that_cannot_be_is_refused(values: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(*values)


@pytest.mark.parametrize(
    "theirs", [EulerDiscreteScheduler, PNDMScheduler, DPMSolverMultistepScheduler, DDIMScheduler]
)
def test_latents_are_never_clipped(theirs: type) -> None:
    """Pixels lie in [-1, 1], which DDIM's default is for; latents do not."""
    config = theirs(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").config
    scheduler = Sampler("ddim", 2, 1.0, 0.0).build(config)
    scheduler.set_timesteps(2)
    large = torch.full((1, 4, 2, 2), 5.0)
    drawn = scheduler.step(torch.zeros_like(large), scheduler.timesteps[-1], large).pred_original_sample
    assert drawn.max() > 1


def test_seeds_depend_on_the_parts_alone() -> None:
    assert seed_from(0, "a", 1) == seed_from(0, "a", 1)
    assert len({seed_from(0, "a", 1), seed_from(0, "a", 2), seed_from(0, "b", 1), seed_from(1, "a", 1)}) == 4
    assert all(0 <= seed_from(i) < 2**63 for i in range(50))
