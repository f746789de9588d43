"""Customization of several concepts in one batch, by any method, each as if it were trained alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attribution.base_model import Pipeline, leave_device, text_encoders
from attribution.conditioning import encode_text, token_ids, word_vectors
from attribution.cross_attention import Text, project
from attribution.customization import METHODS
from attribution.customized_model import ModelStack
from attribution.seeds import seed_from
from attribution.training_settings import TrainingSettings


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
    pipe: Pipeline,
    lessons: Sequence[Lesson],
    settings: TrainingSettings,
    *,
    method: str,
    seed: int,
    on_step: Callable[[], object] = lambda: None,
) -> tuple[ModelStack, Float[np.ndarray, "steps lessons"]]:
    """One customized model per lesson, equal up to rounding to training that lesson alone; and the losses.

        loss = mean_views(masked mean (f - target)^2) + prior_weight * mean_priors(mean (f - target)^2)

    where the target is the noise or the velocity, as the base's scheduler says. Nothing of one lesson reaches
    another: the sum of their losses is minimised over parameters of which each lesson has its own, element by
    element (AdamW), and its randomness comes from (seed, concept_id, step). All lessons need as many
    views and priors as each other. What is trained is float32, whatever the precision of the base. A lesson
    that diverged has losses that are not finite.
    """
    models, views, priors = len(lessons), settings.views_per_step, settings.priors_per_step
    how, device = METHODS[method], pipe.unet.device
    seeds = [seed_from(seed, lesson.concept_id, "start") for lesson in lessons]
    start = how.start(pipe.unet, seeds, settings)
    weights = {name: weight.float().requires_grad_() for name, weight in start.items()}
    vectors = word_vectors(pipe, [lesson.initializer for lesson in lessons]).float().requires_grad_()
    groups: list[dict[str, Any]] = [{"params": [vectors], "lr": settings.token_learning_rate}]
    if weights:
        groups.insert(0, {"params": list(weights.values()), "lr": settings.learning_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)
    ids = torch.stack(
        [token_ids(pipe, lesson.prompts, [i] * len(lesson.prompts)) for i, lesson in enumerate(lessons)]
    )
    with torch.no_grad():
        prior_ids = token_ids(pipe, [lesson.prior_prompt for lesson in lessons], range(models))
        prior_text = encode_text(pipe, prior_ids, vectors).map(lambda part: part[:, None])

    def arrange(part: Tensor) -> Tensor:
        """[lessons, views + 1, ...] to [lessons * samples, ...]."""
        repeated = part[:, views:].expand(-1, priors, *part.shape[2:])
        return torch.cat([part[:, :views], repeated], dim=1).flatten(0, 1)

    numbers = torch.arange(models, device=device)[:, None]
    scale = LossScale(models, device) if pipe.unet.dtype == torch.float16 else None
    losses = []
    with how.network(pipe.unet, weights) as predict:
        for step in range(settings.steps):
            batch = _draw(pipe, lessons, settings, seed, step)
            text = encode_text(pipe, ids[numbers, batch.views].flatten(0, 1), vectors)
            text = text.map(lambda part: part.unflatten(0, (models, views)))
            own = how.text_weights(pipe.unet, weights)
            told = project(own, Text.cat([text, prior_text], dim=1), start_learns=how.TEXT_START_LEARNS)
            noisy, target = _diffuse(pipe, batch)
            which = numbers.expand(-1, views + priors).flatten()
            output = predict(noisy.flatten(0, 1), batch.timesteps.flatten(), told.map(arrange), which)
            errors = masked_error(output.unflatten(0, noisy.shape[:2]), target, batch.valid)
            loss = errors[:, :views].mean(dim=1)
            if priors:
                loss = loss + settings.prior_weight * errors[:, views:].mean(dim=1)
            optimizer.zero_grad()
            if scale is None:
                loss.sum().backward()
            else:
                scale.backward(loss, [*weights.values(), vectors])
            optimizer.step()
            losses.append(loss.detach())
            on_step()
    leave_device(*(encoder for _, encoder in text_encoders(pipe)))
    trained = {name: weight.detach() for name, weight in weights.items()}
    stack = ModelStack(method, trained, vectors.detach())
    return stack, torch.stack(losses).cpu().numpy()


class LossScale:
    """Keeps the gradients of a float16 base in its range: each model's loss has a factor of its own.

    A model whose gradients overflow learns nothing from that step, in which its momentum moves it on, and its
    factor is halved. Factors are powers of two: where nothing overflows or vanishes they change nothing.
    """

    def __init__(self, models: int, device: torch.device, start: float = 4096.0) -> None:
        self.factors = torch.full((models,), start, device=device)

    def backward(self, loss: Float[Tensor, " models"], parameters: Sequence[Tensor]) -> None:
        """Leaves in the parameters, [models, ...] each, the gradients of the sum of the losses."""
        (loss * self.factors).sum().backward()
        gradients = [one.grad for one in parameters if one.grad is not None]
        finite = torch.stack([one.flatten(1).isfinite().all(dim=1) for one in gradients]).all(dim=0)
        for one in gradients:
            apart = (-1, *(1,) * (one.ndim - 1))
            one.div_(self.factors.view(apart)).masked_fill_(~finite.view(apart), 0)
        self.factors = torch.where(finite, self.factors, self.factors / 2)


def masked_error(
    output: Float[Tensor, "*samples channels rows columns"],
    target: Float[Tensor, "*samples channels rows columns"],
    valid: Bool[Tensor, "*samples rows columns"],
) -> Float[Tensor, "*samples"]:
    """The mean squared error of each sample over its valid cells; nothing outside them counts."""
    errors = (output.float() - target.float()).square().mean(dim=-3)
    return (errors * valid).sum((-2, -1)) / valid.sum((-2, -1))


def _draw(
    pipe: Pipeline, lessons: Sequence[Lesson], settings: TrainingSettings, seed: int, step: int
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
        torch.stack(column).to(pipe.unet.device) for column in zip(*rows, strict=True)
    )
    return _Batch(views, latents.to(pipe.unet.dtype), valid, timesteps, noise.to(pipe.unet.dtype))


def _diffuse(pipe: Pipeline, batch: _Batch) -> tuple[Tensor, Tensor]:
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
