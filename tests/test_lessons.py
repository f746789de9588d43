"""Training several concepts in one batch: as alone, and only what may change changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_diffusers_written_out(
    pipes: dict[str, StableDiffusionPipeline], monkeypatch: pytest.MonkeyPatch, prediction: str, method: str
) -> None:
    """Of the first step, where every model is its base and the token is its initializer."""
    pipe, draw = pipes[prediction], lessons._draw
    batches: list[Any] = []

    def watched(*args: Any) -> Any:
        batches.append(draw(*args))
        return batches[-1]

    monkeypatch.setattr(lessons, "_draw", watched)
    both = [lesson("one"), lesson("two", noun="tree", initializer="red")]
    settings = training_settings(method, steps=1, views_per_step=4, priors_per_step=3, prior_weight=0.7)
    some_hidden = 0
    _, losses = train(pipe, both, settings, method=method, seed=0)
    (batch,) = batches
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    for i, one in enumerate(both):
        views = batch.views[i].tolist()
        told = [one.prompts[view].replace("<new1>", one.initializer) for view in views]
        ids = pipe.tokenizer(
            [*told, *[one.prior_prompt] * 3], padding="max_length", max_length=16, return_tensors="pt"
        ).input_ids
        latents, noise, times = batch.latents[i], batch.noise[i], batch.timesteps[i]
        assert torch.equal(latents[:4], one.latents[views])
        assert all((latent == one.prior_latents).flatten(1).all(dim=1).any() for latent in latents[4:])
        with torch.no_grad():
            noisy = schedule.add_noise(latents, noise, times)
            said = pipe.unet(noisy, times, encoder_hidden_states=pipe.text_encoder(ids)[0]).sample
        target = noise if prediction == "epsilon" else schedule.get_velocity(latents, noise, times)
        some_hidden += not one.valid[views].all()
        shown = [*one.valid[views], *torch.ones(3, 4, 4, dtype=torch.bool)]
        errors = [float(e[:, cells].mean()) for e, cells in zip((said - target) ** 2, shown, strict=True)]
        wanted = np.mean(errors[:4]) + 0.7 * np.mean(errors[4:])
        assert losses[0, i] == pytest.approx(wanted, rel=1e-3)
    assert some_hidden  # else the mask would not have been asked for


def test_every_step_and_concept_draws_its_own_views_times_and_noise(pipe: StableDiffusionPipeline) -> None:
    both, settings = [lesson("one"), lesson("two")], training_settings(METHOD)
    batches = [lessons._draw(pipe, both, settings, 0, step) for step in range(60)]
    times = torch.stack([batch.timesteps for batch in batches]).float()
    last = pipe.scheduler.config.num_train_timesteps - 1
    assert times.min() < 0.05 * last
    assert times.max() > 0.95 * last
    assert times.mean() == pytest.approx(last / 2, rel=0.1)
    assert set(torch.stack([batch.views for batch in batches]).flatten().tolist()) == set(range(5))
    for i, one in enumerate(both):
        used = torch.cat([batch.latents[i, 2:] for batch in batches])
        near = torch.cdist(used.flatten(1), one.prior_latents.flatten(1)).argmin(dim=1)
        assert set(near.tolist()) == {0, 1, 2}
    noise = torch.stack([batch.noise for batch in batches]).flatten(0, 2).flatten(1)
    assert (torch.pdist(noise) > 1).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_is_adamws(pipe: StableDiffusionPipeline, method: str) -> None:
    """Each entry with a gradient moves by its rate, and decays by rate x decay x value besides."""
    rates = {"token_learning_rate": 3e-2} | ({} if method == "textual_inversion" else {"learning_rate": 2e-3})
    found = {}
    for decay in (0.0, 0.5):
        settings = training_settings(method, steps=1, weight_decay=decay, **rates)
        stack, _ = train(pipe, [lesson("one")], settings, method=method, seed=0)
        found[decay] = {"token": stack.vectors, **stack.weights}
    still = {name: 0.0 for name in rates}
    stack, _ = train(
        pipe, [lesson("one")], training_settings(method, steps=1, **still), method=method, seed=0
    )
    for name, start in {"token": stack.vectors, **stack.weights}.items():
        rate = 3e-2 if name == "token" else 2e-3
        moved = found[0.0][name] - start
        # LoRA's A has no gradient as long as B is zero.
        wanted = 0.0 if name.endswith("lora_A.weight") else rate
        assert moved.abs().max() == pytest.approx(wanted, rel=0.01), name
        decayed = found[0.5][name] - found[0.0][name]
        torch.testing.assert_close(decayed, -rate * 0.5 * start, rtol=0.01, atol=1e-6)


def test_gradients_are_of_one_step_alone(
    pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same batch again, with rates of zero, has the same gradients again."""
    draw: Any = lessons._draw
    seen: list[list[torch.Tensor]] = []
    monkeypatch.setattr(lessons, "_draw", lambda *args: draw(*args[:-1], 0))

    class Watched(torch.optim.AdamW):
        def step(self, *args: Any, **options: Any) -> Any:
            seen.append([one.grad.clone() for group in self.param_groups for one in group["params"]])
            return super().step(*args, **options)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    settings = training_settings(METHOD, steps=2, learning_rate=0.0, token_learning_rate=0.0)
    train(pipe, [lesson("one")], settings, method=METHOD, seed=0)
    for first, second in zip(*seen, strict=True):
        torch.testing.assert_close(second, first)


def test_lora_starts_with_the_deviation_of_peft_and_apart_for_each_concept(
    pipe: StableDiffusionPipeline,
) -> None:
    settings = training_settings("lora", rank=8)
    start = METHODS["lora"].start(pipe.unet, [1, 2], settings)
    drawn = {name: weight for name, weight in start.items() if name.endswith("lora_A.weight")}
    assert torch.cat([one.flatten() for one in drawn.values()]).std() == pytest.approx(1 / 8, rel=0.05)
    assert all((one[0] - one[1]).abs().max() > 0.01 for one in drawn.values())
    still = training_settings("lora", steps=1, learning_rate=0.0, token_learning_rate=0.0)
    stack, _ = train(pipe, [lesson("one"), lesson("two")], still, method="lora", seed=0)
    for name in drawn:
        assert (stack.weights[name][0] - stack.weights[name][1]).abs().max() > 0.01


def test_dreambooth_trains_every_parameter_of_the_unet(pipe: StableDiffusionPipeline) -> None:
    """Norms too, which the tiny base has at the values that a missing weight would get."""
    start = METHODS["dreambooth"].start(pipe.unet, [0], training_settings("dreambooth"))
    assert start.keys() == dict(pipe.unet.named_parameters()).keys()
