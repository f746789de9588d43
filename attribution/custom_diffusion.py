"""Custom Diffusion (arXiv:2212.04488) of several concepts in one batch, each as if it were trained alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import Bool, Float
from torch import Tensor

from attribution.conditioning import encode_text, token_ids
from attribution.cross_attention import project, text_attention
from attribution.customized_model import ModelStack
from attribution.sampling import base_stack
from attribution.seeds import seed_from


@dataclass(frozen=True)
class TrainingSettings:
    """Per step and concept, `views_per_step` views of exemplars and `priors_per_step` images of the base."""

    steps: int
    learning_rate: float
    token_learning_rate: float
    weight_decay: float
    views_per_step: int
    priors_per_step: int
    prior_weight: float

    def __post_init__(self) -> None:
        if self.steps < 1 or self.views_per_step < 1 or self.priors_per_step < 0:
            raise ValueError("wanted steps >= 1, views_per_step >= 1, priors_per_step >= 0")


@dataclass(frozen=True)
class Lesson:
    """What one concept is learned from: latents of views of its exemplars, and of the base's own images.

    `initializer` is the word that the new token starts from.
    """

    concept_id: str
    initializer: str
    latents: Float[Tensor, "views channels rows columns"]
    valid: Bool[Tensor, "views rows columns"]
    prompts: tuple[str, ...]
    prior_latents: Float[Tensor, "priors channels rows columns"]
    prior_prompt: str


@dataclass(frozen=True)
class _Batch:
    """One step's samples of every lesson, views before priors: [lessons, samples, ...]."""

    views: Tensor
    latents: Tensor
    valid: Tensor
    timesteps: Tensor
    noise: Tensor


def train(
    pipe: StableDiffusionPipeline,
    lessons: Sequence[Lesson],
    settings: TrainingSettings,
    *,
    seed: int,
    on_step: Callable[[], object] = lambda: None,
) -> tuple[ModelStack, Float[np.ndarray, "steps lessons"]]:
    """One customized model per lesson, equal up to rounding to training that lesson alone; and the losses.

        loss = mean_views(masked mean (f - target)^2) + prior_weight * mean_priors(mean (f - target)^2)

    where the target is the noise or the velocity, as the base's scheduler says. Nothing of one lesson reaches
    another: the sum of their losses is minimised over parameters of which each lesson has its own, element by
    element (AdamW), and its randomness comes from (seed, concept_id, step). All lessons need as many
    views and priors as each other. A lesson that diverged has losses that are not finite.
    """
    models, views, priors = len(lessons), settings.views_per_step, settings.priors_per_step
    start = base_stack(pipe, [lesson.initializer for lesson in lessons])
    weights = {name: weight.float().requires_grad_() for name, weight in start.weights.items()}
    vectors = start.vectors.float().requires_grad_()
    optimizer = torch.optim.AdamW(
        [
            {"params": list(weights.values()), "lr": settings.learning_rate},
            {"params": [vectors], "lr": settings.token_learning_rate},
        ],
        weight_decay=settings.weight_decay,
        fused=True,
    )
    ids = torch.stack(
        [token_ids(pipe, lesson.prompts, [i] * len(lesson.prompts)) for i, lesson in enumerate(lessons)]
    )
    with torch.no_grad():
        prior_ids = token_ids(pipe, [lesson.prior_prompt for lesson in lessons], range(models))
        prior_text = encode_text(pipe, prior_ids, vectors)[:, None]

    def arrange(part: Tensor) -> Tensor:
        """[lessons, views + 1, words, out] to [lessons * samples, words, out]; word 0 does not learn."""
        part = torch.cat([part[:, :, :1].detach(), part[:, :, 1:]], dim=2)
        return torch.cat([part[:, :views], part[:, views:].expand(-1, priors, -1, -1)], dim=1).flatten(0, 1)

    numbers = torch.arange(models, device=pipe.device)[:, None]
    losses = []
    with text_attention(pipe.unet) as predict:
        for step in range(settings.steps):
            batch = _draw(pipe, lessons, settings, seed, step)
            text = encode_text(pipe, ids[numbers, batch.views].flatten(0, 1), vectors).unflatten(
                0, (models, views)
            )
            made = project(weights, torch.cat([text, prior_text], dim=1))
            keys_values = {layer: (arrange(key), arrange(value)) for layer, (key, value) in made.items()}
            noisy, target = _diffuse(pipe, batch)
            output = predict(noisy.flatten(0, 1), batch.timesteps.flatten(), keys_values)
            errors = masked_error(output.unflatten(0, noisy.shape[:2]), target, batch.valid)
            loss = errors[:, :views].mean(dim=1)
            if priors:
                loss = loss + settings.prior_weight * errors[:, views:].mean(dim=1)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            losses.append(loss.detach())
            on_step()
    stack = ModelStack(
        {name: weight.detach() for name, weight in weights.items()}, vectors.detach(), start.token
    )
    return stack, torch.stack(losses).cpu().numpy()


def masked_error(
    output: Float[Tensor, "*samples channels rows columns"],
    target: Float[Tensor, "*samples channels rows columns"],
    valid: Bool[Tensor, "*samples rows columns"],
) -> Float[Tensor, "*samples"]:
    """The mean squared error of each sample over its valid cells; nothing outside them counts."""
    errors = (output.float() - target.float()).square().mean(dim=-3)
    return (errors * valid).sum((-2, -1)) / valid.sum((-2, -1))


def _draw(
    pipe: StableDiffusionPipeline, lessons: Sequence[Lesson], settings: TrainingSettings, seed: int, step: int
) -> _Batch:
    samples = settings.views_per_step + settings.priors_per_step
    rows = []
    for lesson in lessons:
        generator = torch.Generator().manual_seed(seed_from(seed, lesson.concept_id, "train", step))
        views = torch.randint(len(lesson.latents), (settings.views_per_step,), generator=generator)
        # With no priors wanted there may be none to choose from.
        priors = torch.randint(
            max(1, len(lesson.prior_latents)), (settings.priors_per_step,), generator=generator
        )
        latents = torch.cat([lesson.latents[views], lesson.prior_latents[priors]])
        valid = torch.cat(
            [lesson.valid[views], torch.ones_like(lesson.valid[:1]).expand(len(priors), -1, -1)]
        )
        timesteps = torch.randint(pipe.scheduler.config.num_train_timesteps, (samples,), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        rows.append((views, latents, valid, timesteps, noise))
    views, latents, valid, timesteps, noise = (
        torch.stack(column).to(pipe.device) for column in zip(*rows, strict=True)
    )
    return _Batch(views, latents.to(pipe.unet.dtype), valid, timesteps, noise.to(pipe.unet.dtype))


def _diffuse(pipe: StableDiffusionPipeline, batch: _Batch) -> tuple[Tensor, Tensor]:
    """The noisy latents x_t = a x + s n, and what the network should say of them (n, or a n - s x)."""
    kept = pipe.scheduler.alphas_cumprod.to(batch.latents.device)[batch.timesteps][..., None, None, None]
    signal, spread = kept.sqrt().to(batch.latents.dtype), (1 - kept).sqrt().to(batch.latents.dtype)
    noisy = signal * batch.latents + spread * batch.noise
    match pipe.scheduler.config.prediction_type:
        case "epsilon":
            return noisy, batch.noise
        case "v_prediction":
            return noisy, signal * batch.noise - spread * batch.latents
        case other:
            raise ValueError(f"base scheduler: wanted prediction_type epsilon or v_prediction, got {other}")
