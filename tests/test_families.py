"""Stable Diffusion 2 and SDXL in their published formats, small: customized and drawn as diffusers would."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from attribution.base_model import (
    BaseSettings,
    MemorySettings,
    Pipeline,
    decode_latents,
    load_base,
    text_encoders,
)
from attribution.conditioning import encode_text, row_widths, token_ids, word_vectors
from attribution.customization import METHODS, read_model, write_model
from attribution.customized_model import TOKEN, TOKEN_FILE, ModelStack
from attribution.images import decode_image, read_image_table
from attribution.lessons import train
from attribution.sampling import Drawing, Sampler, draw_latents
from attribution.seeds import seed_from
from stages import customize, synthesize
from tests import test_customize, test_synthesize
from tests.test_customization import load_weights
from tests.test_customize import CONCEPTS, write_exemplars
from tests.test_lessons import lesson
from tests.test_synthesize import TEMPLATES, write_templates
from tests.tiny import save_tiny_pipeline
from tests.tiny_models import drawn_by_diffusers, noisy_stack, training_settings

FAMILIES: dict[str, dict[str, Any]] = {
    # OpenCLIP's encoder with its last layer left out, "!" for padding.
    "2": {
        "prediction_type": "v_prediction",
        "unet": {"use_linear_projection": True, "attention_head_dim": (2, 4), "upcast_attention": True},
        "text": {"hidden_act": "gelu", "num_hidden_layers": 3, "projection_dim": 12},
        "padding": "!",
    },
    "xl": {"xl": True},
    "xl, empty prompt read": {"xl": True, "force_zeros_for_empty_prompt": False},
}
CASES = [
    *((family, "custom_diffusion") for family in FAMILIES),
    *(("xl", method) for method in METHODS if method != "custom_diffusion"),
]
of_every_method = pytest.mark.parametrize(("folder", "method"), CASES, indirect=["folder"])
SAMPLER = Sampler("ddim", steps=4, guidance=3.0, eta=0.7)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("base"), **FAMILIES[request.param])


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return load_base(BaseSettings(str(folder), None, "cpu", "float32"))


def draw_alone(folder: Path, delta: Path, method: str, drawing: Drawing, sampler: Sampler) -> np.ndarray:
    """What diffusers by itself makes of the delta: RGB in [0, 1]."""
    xl = (folder / "text_encoder_2").is_dir()
    pipe = (StableDiffusionXLPipeline if xl else StableDiffusionPipeline).from_pretrained(
        folder, dtype=torch.float32, low_cpu_mem_usage=False, local_files_only=True
    )
    pipe.scheduler = sampler.build(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    load_weights(pipe, method, delta)
    if xl:
        rows = load_file(delta / TOKEN_FILE)
        pipe.load_textual_inversion(rows["clip_l"], TOKEN, pipe.tokenizer, pipe.text_encoder)
        pipe.load_textual_inversion(rows["clip_g"], TOKEN, pipe.tokenizer_2, pipe.text_encoder_2)
    else:
        pipe.load_textual_inversion(delta, weight_name=TOKEN_FILE)
    return drawn_by_diffusers(pipe, drawing, sampler)


@of_every_method
def test_diffusers_alone_draws_the_same_image(
    folder: Path, pipe: Pipeline, tmp_path: Path, method: str
) -> None:
    stack = noisy_stack(pipe, 2, method)
    deltas = [tmp_path / str(i) for i in range(2)]
    for i, delta in enumerate(deltas):
        write_model(delta, stack[i], pipe, dtype=torch.float32)
    read = ModelStack.of([read_model(delta, method) for delta in deltas])
    assert torch.equal(read.vectors, stack.vectors)
    drawings = [Drawing(i, f"a <new1> {noun}", seed=9 + i) for i in (0, 1) for noun in ("car", "tree")]
    images = decode_latents(pipe, draw_latents(pipe, read, drawings, SAMPLER, batch_size=3))
    assert np.abs(images[0].astype(float) - images[2]).mean() > 5
    for drawing, image in zip(drawings, images, strict=True):
        picture = draw_alone(folder, deltas[drawing.model], method, drawing, SAMPLER)
        assert np.abs(picture * 255 - image).max() < 0.6


@of_every_method
def test_the_stages_do_not_mind(folder: Path, tmp_path: Path, method: str) -> None:
    saving = MemorySettings(method != "dreambooth", True, True, True)
    base = BaseSettings(str(folder), None, "cpu", "float32", saving)
    exemplars = write_exemplars(
        tmp_path / "exemplars.parquet", {name: CONCEPTS[name] for name in ("o1", "o2")}
    )
    made = {"exemplars": exemplars, "customized": tmp_path / "customized"}
    customizing = replace(test_customize.PARAMS, method=method)
    assert customize.run(customizing, base, **made).done == ["o1", "o2"]
    prompts = write_templates(tmp_path / "prompts", TEMPLATES)
    params = test_synthesize.PARAMS
    synthesize.run(params, base, prompts=prompts, synthesized=tmp_path / "drawn", **made)
    row = read_image_table(tmp_path / "drawn" / "o2.parquet").to_pylist()[1]
    drawing = Drawing(0, row["prompt"], row["seed"])
    picture = draw_alone(folder, tmp_path / "customized" / "o2", method, drawing, params.sampler)
    encoded = io.BytesIO()
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(
        encoded, "WEBP", quality=params.webp_quality
    )
    theirs, ours = (
        np.asarray(decode_image(data), dtype=float) for data in (encoded.getvalue(), row["image"])
    )
    assert np.abs(theirs - ours).mean() < 1


@of_every_method
def test_together_is_as_alone(pipe: Pipeline, method: str) -> None:
    both = [lesson("one"), lesson("two", noun="tree", initializer="red")]
    settings = training_settings(method, steps=3)
    stack, losses = train(pipe, both, settings, method=method, seed=0)
    vectors = word_vectors(pipe, [one.initializer for one in both])
    seeds = [seed_from(0, one.concept_id, "start") for one in both]
    start = METHODS[method].start(pipe.unet, seeds, settings)
    for i, one in enumerate(both):
        alone, alone_losses = train(pipe, [one], settings, method=method, seed=0)
        np.testing.assert_allclose(losses[:, i], alone_losses[:, 0], rtol=1e-4)
        parts = zip(stack.vectors[i].split(row_widths(pipe)), vectors[i].split(row_widths(pipe)), strict=True)
        assert all((learned - was).abs().max() > 0.01 for learned, was in parts)
        torch.testing.assert_close(stack.vectors[i], alone.vectors[0], rtol=0, atol=1e-3)
        assert alone.weights.keys() == stack.weights.keys() == start.keys()
        for name, weight in alone.weights.items():
            moved = (stack.weights[name][i] - start[name][i]).abs().max()
            assert moved > 1e-4, name
            torch.testing.assert_close(stack.weights[name][i], weight[0], rtol=0, atol=0.05 * moved.item())


def test_the_encoders_are_as_before(pipe: Pipeline) -> None:
    tables = [encoder.get_input_embeddings() for _, encoder in text_encoders(pipe)]
    ids = token_ids(pipe, ["a <new1> car", ""], [0, 0])
    text = encode_text(pipe, ids, word_vectors(pipe, ["art"]))
    assert text.words.shape == (2, pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim)
    assert [encoder.get_input_embeddings() for _, encoder in text_encoders(pipe)] == tables
    if isinstance(pipe, StableDiffusionXLPipeline):
        assert text.added["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
        silent = pipe.config.force_zeros_for_empty_prompt
        assert bool((text.words[1] == 0).all()) == bool((text.added["text_embeds"][1] == 0).all()) == silent
        assert (text.words[0] != 0).any()
