"""Training several concepts in one batch: as alone, and only what may change changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from attribution import custom_diffusion
from attribution.base_model import BaseSettings, load_base
from attribution.custom_diffusion import Lesson, TrainingSettings, masked_error, train
from attribution.sampling import base_stack
from tests.tiny import save_tiny_pipeline

SETTINGS = TrainingSettings(
    steps=4,
    learning_rate=1e-3,
    token_learning_rate=1e-2,
    weight_decay=1e-2,
    views_per_step=2,
    priors_per_step=2,
    prior_weight=1.0,
)


@pytest.fixture(scope="module", params=["v_prediction", "epsilon"])
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    folder = save_tiny_pipeline(tmp_path_factory.mktemp("base"), prediction_type=request.param)
    return load_base(BaseSettings(str(folder), None, "cpu", "float32"))


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


def test_together_is_as_alone(pipe: StableDiffusionPipeline) -> None:
    lessons = [lesson("one"), lesson("two", noun="tree", initializer="red"), lesson("three", noun="cat")]
    stack, losses = train(pipe, lessons, SETTINGS, seed=0)
    start = base_stack(pipe, [one.initializer for one in lessons])
    for i, one in enumerate(lessons):
        alone, alone_losses = train(pipe, [one], SETTINGS, seed=0)
        np.testing.assert_allclose(losses[:, i], alone_losses[:, 0], rtol=1e-4)
        moved = (stack.vectors[i] - start.vectors[i]).abs().max()
        assert moved > 0.01
        torch.testing.assert_close(stack.vectors[i], alone.vectors[0], rtol=0, atol=0.02 * moved.item())
        for name, weight in alone.weights.items():
            moved = (stack.weights[name][i] - start.weights[name][i]).abs().max()
            assert moved > 1e-3
            torch.testing.assert_close(stack.weights[name][i], weight[0], rtol=0, atol=0.02 * moved.item())


def test_the_base_is_as_before(pipe: StableDiffusionPipeline) -> None:
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    before = [parameter.clone() for part in parts for parameter in part.parameters()]
    train(pipe, [lesson("one")], SETTINGS, seed=0)
    after = [parameter for part in parts for parameter in part.parameters()]
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("word", [0, 1])
def test_the_start_of_text_teaches_nothing(
    pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, word: int
) -> None:
    real = custom_diffusion.encode_text

    def only_one_word(*arguments: object) -> torch.Tensor:
        text = real(*arguments)  # type: ignore[arg-type]
        keep = torch.zeros_like(text)
        keep[:, word] = 1
        return text * keep

    monkeypatch.setattr(custom_diffusion, "encode_text", only_one_word)
    stack, _ = train(pipe, [lesson("one")], replace(SETTINGS, weight_decay=0.0), seed=0)
    start = base_stack(pipe, ["art"])
    unchanged = all(torch.equal(stack.weights[name], start.weights[name]) for name in stack.weights)
    assert unchanged == (word == 0)


def test_the_prior_pulls_by_its_weight(pipe: StableDiffusionPipeline) -> None:
    one = lesson("one")
    losses = [
        train(pipe, [one], replace(SETTINGS, steps=1, prior_weight=weight), seed=0)[1][0, 0]
        for weight in (0.0, 1.0, 2.0)
    ]
    assert losses[1] > losses[0]
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4)


def test_no_priors_are_needed_when_none_are_wanted(pipe: StableDiffusionPipeline) -> None:
    one = lesson("one")
    _, losses = train(
        pipe,
        [replace(one, prior_latents=one.prior_latents[:0])],
        replace(SETTINGS, priors_per_step=0),
        seed=0,
    )
    assert np.isfinite(losses).all()


def test_the_concept_is_learned(pipe: StableDiffusionPipeline) -> None:
    one = lesson("one", views=1)
    settings = replace(SETTINGS, steps=60, learning_rate=1e-2, priors_per_step=0)
    _, losses = train(pipe, [one], settings, seed=0)
    still = train(pipe, [one], replace(settings, learning_rate=0.0, token_learning_rate=0.0), seed=0)[1]
    assert losses[-20:].mean() < 0.97 * still[-20:].mean()


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
        train(pipe, [lesson("one")], SETTINGS, seed=0)
