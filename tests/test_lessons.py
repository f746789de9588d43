"""Training several concepts in one batch: as alone, and only what may change changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from attribution import lessons
from attribution.base_model import BaseSettings, load_base
from attribution.conditioning import word_vectors
from attribution.cross_attention import Text
from attribution.customization import METHODS
from attribution.lessons import Lesson, masked_error, train
from attribution.sampling import Drawing, Sampler, base_stack, draw_latents
from attribution.seeds import seed_from
from tests.tiny import save_tiny_pipeline
from tests.tiny_models import training_settings

SETTINGS = {method: training_settings(method) for method in METHODS}
METHOD = "custom_diffusion"


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StableDiffusionPipeline]:
    """By what they predict."""
    folders = {
        name: save_tiny_pipeline(tmp_path_factory.mktemp(name), prediction_type=name)
        for name in ("v_prediction", "epsilon")
    }
    return {
        name: load_base(BaseSettings(str(folder), None, "cpu", "float32")) for name, folder in folders.items()
    }


@pytest.fixture(scope="module")
def pipe(pipes: dict[str, StableDiffusionPipeline]) -> StableDiffusionPipeline:
    return pipes["v_prediction"]


def lesson(name: str, *, noun: str = "car", initializer: str = "art", views: int = 5) -> Lesson:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    valid = torch.ones(views, 4, 4, dtype=torch.bool)
    valid[0, :2] = False
    return Lesson(
        concept_id=name,
        initializer=initializer,
        latents=torch.randn(views, 4, 4, 4, generator=generator),
        valid=valid,
        prompts=tuple(f"{'far away ' * (i % 2)}<new1> {noun}" for i in range(views)),
        prior_latents=torch.randn(3, 4, 4, 4, generator=generator),
        prior_prompt=f"a {noun}",
    )


@pytest.mark.parametrize(
    ("prediction", "method"), [("epsilon", METHOD), *(("v_prediction", method) for method in METHODS)]
)
def test_together_is_as_alone(
    pipes: dict[str, StableDiffusionPipeline], prediction: str, method: str
) -> None:
    pipe = pipes[prediction]
    all_of_them = [lesson("one"), lesson("two", noun="tree", initializer="red"), lesson("three", noun="cat")]
    stack, losses = train(pipe, all_of_them, SETTINGS[method], method=method, seed=0)
    seeds = [seed_from(0, one.concept_id, "start") for one in all_of_them]
    start = METHODS[method].start(pipe.unet, seeds, SETTINGS[method])
    vectors = word_vectors(pipe, [one.initializer for one in all_of_them])
    for i, one in enumerate(all_of_them):
        alone, alone_losses = train(pipe, [one], SETTINGS[method], method=method, seed=0)
        np.testing.assert_allclose(losses[:, i], alone_losses[:, 0], rtol=1e-4)
        moved = (stack.vectors[i] - vectors[i]).abs().max()
        assert moved > 0.01
        torch.testing.assert_close(stack.vectors[i], alone.vectors[0], rtol=0, atol=0.02 * moved.item())
        assert alone.weights.keys() == stack.weights.keys() == start.keys()
        for name, weight in alone.weights.items():
            moved = (stack.weights[name][i] - start[name][i]).abs().max()
            assert moved > 1e-4, name
            torch.testing.assert_close(stack.weights[name][i], weight[0], rtol=0, atol=0.05 * moved.item())


@pytest.mark.parametrize("method", METHODS)
def test_the_base_is_as_before(pipe: StableDiffusionPipeline, method: str) -> None:
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    before = [parameter.clone() for part in parts for parameter in part.parameters()]
    train(pipe, [lesson("one")], SETTINGS[method], method=method, seed=0)
    after = [parameter for part in parts for parameter in part.parameters()]
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, after, strict=True))
    assert not any(layer._forward_hooks for layer in pipe.unet.modules())


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_learned_nothing_draws_as_the_base(pipe: StableDiffusionPipeline, method: str) -> None:
    still = training_settings(method, steps=1, token_learning_rate=0.0)
    still = still if still.learning_rate is None else replace(still, learning_rate=0.0)
    stack, _ = train(pipe, [lesson("one")], still, method=method, seed=0)
    drawings = [Drawing(0, "a <new1> car", 1)]
    drawn, base = (
        draw_latents(pipe, models, drawings, Sampler("ddim", 3, 3.0, 0.0), batch_size=1)
        for models in (stack, base_stack(pipe, ["art"]))
    )
    torch.testing.assert_close(drawn, base, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("method", "word"), [(METHOD, 0), (METHOD, 1), ("dreambooth", 0)])
def test_the_start_of_text_teaches_custom_diffusion_nothing(
    pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, method: str, word: int
) -> None:
    real = lessons.encode_text

    def only_one_word(*arguments: object) -> Text:
        text = real(*arguments)  # type: ignore[arg-type]
        keep = torch.zeros_like(text.words)
        keep[:, word] = 1
        return Text(text.words * keep, text.added)

    monkeypatch.setattr(lessons, "encode_text", only_one_word)
    settings = training_settings(method, weight_decay=0.0)
    stack, _ = train(pipe, [lesson("one")], settings, method=method, seed=0)
    start = METHODS[method].start(pipe.unet, [0], settings)
    readers = METHODS[method].text_weights(pipe.unet, stack.weights)
    before = METHODS[method].text_weights(pipe.unet, start)
    unchanged = all(torch.equal(readers[name], before[name]) for name in readers)
    assert unchanged == (word == 0 and method == "custom_diffusion")


def test_the_prior_pulls_by_its_weight(pipe: StableDiffusionPipeline) -> None:
    one = lesson("one")
    losses = [
        train(pipe, [one], training_settings(METHOD, steps=1, prior_weight=weight), method=METHOD, seed=0)[1]
        for weight in (0.0, 1.0, 2.0)
    ]
    assert losses[1][0, 0] > losses[0][0, 0]
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_no_priors_are_needed_when_none_are_wanted(pipe: StableDiffusionPipeline, method: str) -> None:
    one = lesson("one")
    one = replace(one, prior_latents=one.prior_latents[:0])
    _, losses = train(pipe, [one], training_settings(method, priors_per_step=0), method=method, seed=0)
    assert np.isfinite(losses).all()


@pytest.mark.parametrize(
    ("prediction", "method"), [("epsilon", METHOD), *(("v_prediction", method) for method in METHODS)]
)
def test_the_concept_is_learned(
    pipes: dict[str, StableDiffusionPipeline], prediction: str, method: str
) -> None:
    pipe, one = pipes[prediction], lesson("one", views=1)
    options = {"steps": 30, "priors_per_step": 0}
    fast = {"token_learning_rate": 0.1} if method == "textual_inversion" else {"learning_rate": 1e-2}
    # One row of a random text encoder says little.
    wanted = 0.995 if method == "textual_inversion" else 0.97
    _, losses = train(pipe, [one], training_settings(method, **options, **fast), method=method, seed=0)
    still = {name: 0.0 for name in ("token_learning_rate", *fast)}
    _, before = train(pipe, [one], training_settings(method, **options, **still), method=method, seed=0)
    assert losses[-15:].mean() < wanted * before[-15:].mean()


def test_cells_that_are_not_valid_do_not_count() -> None:
    output, target = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    valid[1, :, 2:] = False
    target[1, :, :, 2:] = 100.0
    assert torch.equal(masked_error(output, target, valid), torch.ones(2))


def test_an_unknown_prediction_type_is_named(tmp_path: Path) -> None:
    folder = save_tiny_pipeline(tmp_path / "base")
    pipe = load_base(BaseSettings(str(folder), None, "cpu", "float32"))
    pipe.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match="wanted prediction_type epsilon or v_prediction, got sample"):
        train(pipe, [lesson("one")], SETTINGS[METHOD], method=METHOD, seed=0)
