"""What a concept is learned from, as the parameters say: prompts, views of exemplars, images of the base."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attribution.augmentation import AugmentationSettings, draw_view
from attribution.base_model import Pipeline, encode_images, latent_shape
from attribution.concepts import Concept, fill_prompt, prompt_names
from attribution.customized_model import TOKEN
from attribution.files import atomic_path, content_key
from attribution.images import decode_image
from attribution.lessons import Lesson
from attribution.params import require_at_least
from attribution.sampling import Drawing, Sampler, base_stack
from attribution.seeds import seed_from
from attribution.training_settings import MethodName, MethodSettings, TrainingSettings
from stages.workers import draw_fitting, fitting


@dataclass(frozen=True)
class Words:
    """Prompts of one kind of concept; any text column of the exemplar table may stand in braces.

    The prior prompt knows {noun} and {kind} only: its images serve all concepts of the noun.
    """

    prompt: str
    prior_prompt: str
    initializer: str

    def __post_init__(self) -> None:
        if "token" not in prompt_names(self.prompt) or "token" in prompt_names(self.prior_prompt):
            raise ValueError("wanted {token} in prompt and not in prior_prompt")
        fill_prompt(self.prior_prompt, {"noun": "", "kind": ""})


@dataclass(frozen=True)
class Params:
    """`views` of a concept are encoded once; `training` has settings for every method.

    `workers` and `concepts_per_batch` change results by rounding only. `max_failed_share`: how many of the
    concepts may fail before the stage does.
    """

    method: MethodName
    seed: int
    workers: int
    concepts_per_batch: int
    max_failed_share: float
    views: int
    prior_images: int
    saved_dtype: Literal["float32", "float16"]
    object: Words
    style: Words
    training: MethodSettings
    augmentation: AugmentationSettings
    prior_sampler: Sampler

    def __post_init__(self) -> None:
        if not 0 <= self.max_failed_share <= 1:
            raise ValueError(f"max_failed_share: wanted a share of 1, got {self.max_failed_share}")
        require_at_least(self, workers=1, concepts_per_batch=1, views=1, prior_images=1)

    @property
    def settings(self) -> TrainingSettings:
        """Those of the method."""
        return self.training.of(self.method)

    def used(self) -> dict[str, Any]:
        """All but what other methods would use."""
        return asdict(self) | {"training": asdict(self.settings)}

    def formative(self) -> dict[str, Any]:
        """What models depend on by more than rounding."""
        others = ("workers", "concepts_per_batch", "max_failed_share")
        return {name: value for name, value in self.used().items() if name not in others}

    def words(self, concept: Concept) -> Words:
        """The prompts for a concept of this kind."""
        return self.object if concept.kind == "object" else self.style

    def exemplar_prompts(self, concept: Concept) -> list[str]:
        """The training prompt of each exemplar."""
        template = self.words(concept).prompt
        return [fill_prompt(template, {**one.texts, "token": TOKEN}) for one in concept.exemplars]

    def prior_prompt(self, concept: Concept) -> str:
        """What the base is asked for itself, so that the concept's noun keeps its meaning."""
        template = self.words(concept).prior_prompt
        return fill_prompt(template, {"noun": concept.noun, "kind": concept.kind})


def prepare(pipe: Pipeline, params: Params, concept: Concept, priors: Path) -> Lesson:
    """Encoded views of the concept, the base's images of its noun. Raises ImageError for a bad exemplar."""
    _, rows, columns = latent_shape(pipe)
    pictures = [decode_image(one.image, name=one.image_id) for one in concept.exemplars]
    plain = params.exemplar_prompts(concept)
    views, prompts = [], []
    for i in range(params.views):
        rng = np.random.default_rng(seed_from(params.seed, concept.concept_id, "view", i))
        which = i % len(pictures)
        view = draw_view(
            pictures[which], rng, params.augmentation, cells=(rows, columns), factor=pipe.vae_scale_factor
        )
        views.append(view)
        prompts.append(f"{view.words} {plain[which]}".strip())
    pixels = np.stack([view.pixels for view in views])
    latents = fitting(functools.partial(encode_images, pipe), pixels, 32, where="customize", noun="views")
    return Lesson(
        concept_id=concept.concept_id,
        initializer=params.words(concept).initializer,
        latents=torch.cat(latents).float().cpu(),
        valid=torch.from_numpy(np.stack([view.valid for view in views])),
        prompts=tuple(prompts),
        prior_latents=prior_latents(pipe, params, concept, priors),
        prior_prompt=params.prior_prompt(concept),
    )


def prior_latents(pipe: Pipeline, params: Params, concept: Concept, priors: Path) -> Tensor:
    """Latents that the base drew for the concept's noun, once for all concepts and runs that want the same.

    Raises ValueError if they are not finite.
    """
    prompt = params.prior_prompt(concept)
    key = content_key(prompt, params.seed, params.prior_images, params.prior_sampler)
    path = priors / f"{key}.safetensors"
    if not path.is_file():
        drawings = [
            Drawing(0, prompt, seed_from(params.seed, "prior", prompt, i)) for i in range(params.prior_images)
        ]
        stack = base_stack(pipe, [params.words(concept).initializer])
        size = max(1, params.prior_images)
        latents = draw_fitting(pipe, stack, drawings, params.prior_sampler, size, where="customize")
        if not latents.isfinite().all():
            raise ValueError(f"{prompt!r}: not finite numbers come of it; try base.dtype: float32")
        with atomic_path(path) as partial:
            save_file({"latents": latents.float().cpu()}, partial)
    return load_file(path)["latents"]
