"""Customized models of the tiny pipelines, by every method."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from attribution.conditioning import word_vectors
from attribution.customization import METHODS
from attribution.customized_model import ModelStack
from attribution.sampling import Drawing, Sampler
from attribution.training_settings import LoraSettings, MethodSettings, TrainingSettings


def training_settings(method: str, **changes: object) -> TrainingSettings:
    """A few quick steps of this method."""
    values: dict[str, object] = {
        "steps": 4,
        "learning_rate": None if method == "textual_inversion" else 1e-3,
        "token_learning_rate": 1e-2,
        "weight_decay": 1e-2,
        "views_per_step": 2,
        "priors_per_step": 2,
        "prior_weight": 1.0,
        **changes,
    }
    return LoraSettings(**{"rank": 2, **values}) if method == "lora" else TrainingSettings(**values)


def method_settings(**changes: object) -> MethodSettings:
    """Those of every method, as quick."""
    return MethodSettings(**{method: training_settings(method, **changes) for method in METHODS})


def noisy_stack(pipe: StableDiffusionPipeline, models: int, method: str = "custom_diffusion") -> ModelStack:
    """Customized models that differ from the base and from each other."""
    generator = torch.Generator().manual_seed(1)

    def shaken(values: torch.Tensor, by: float) -> torch.Tensor:
        return values + by * torch.randn(values.shape, generator=generator)

    start = METHODS[method].start(pipe.unet, range(models), training_settings(method))
    weights = {
        # Norms far from their start make noise of every picture.
        name: shaken(weight, 0.2 if weight.ndim == 3 else 0.02)
        for name, weight in start.items()
    }
    return ModelStack(method, weights, shaken(word_vectors(pipe, ["art"] * models), 1.0))


def drawn_by_diffusers(pipe: Any, drawing: Drawing, sampler: Sampler) -> np.ndarray:
    """What the pipeline of diffusers draws by itself, [height, width, 3] in 0 to 1."""
    return pipe(
        drawing.prompt,
        num_inference_steps=sampler.steps,
        guidance_scale=sampler.guidance,
        eta=sampler.eta,
        generator=torch.Generator().manual_seed(drawing.seed),
        output_type="np",
    ).images[0]
