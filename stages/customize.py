"""Customizes the base model toward every fresh concept (several in one batch), by the method of choice.

In: data/world/exemplars.parquet, the base model. Out: data/customized/<concept_id>/, a delta in the files
that diffusers loads, with customized.json; and _prior/, the base's own images of each noun. Incremental: a
concept whose exemplars, parameters, base and code are as they were is kept, one that is gone is removed, a
killed run goes on where it was, and what fails is named when all others are done. Cost: about 2 s per concept
on 2 CPU cores with the mini base.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from attribution import (
    augmentation,
    base_model,
    concepts,
    conditioning,
    cross_attention,
    custom_diffusion,
    customization,
    customized_model,
    dreambooth,
    lessons,
    lora,
    pipeline_folder,
    sampling,
    seeds,
    textual_inversion,
)
from attribution.augmentation import AugmentationSettings, draw_view
from attribution.base_model import BaseSettings, Pipeline, encode_images, latent_shape
from attribution.concepts import Concept, fill_prompt, read_concepts
from attribution.customization import RECORD, write_model
from attribution.customized_model import TOKEN
from attribution.files import atomic_path, content_key, read_json, write_json
from attribution.images import decode_image
from attribution.lessons import Lesson, train
from attribution.params import load_params
from attribution.sampling import Drawing, Sampler, base_stack
from attribution.seeds import seed_from
from attribution.training_settings import MethodName, MethodSettings, TrainingSettings
from stages.incremental import (
    StageError,
    Summary,
    alone_in,
    batches,
    code_key,
    concerns_one,
    one_line,
    prune,
    room_for,
)
from stages.workers import base_pipeline, batched, draw_fitting, fitting, is_worker, worker_map

PRIOR = "_prior"
# What a customized model depends on besides its data.
CODE = (
    __file__,
    augmentation.__file__,
    base_model.__file__,
    concepts.__file__,
    cross_attention.__file__,
    custom_diffusion.__file__,
    customization.__file__,
    customized_model.__file__,
    conditioning.__file__,
    dreambooth.__file__,
    lessons.__file__,
    lora.__file__,
    pipeline_folder.__file__,
    sampling.__file__,
    seeds.__file__,
    textual_inversion.__file__,
)


@dataclass(frozen=True)
class Words:
    """Prompts of one kind of concept; any text column of the exemplar table may stand in braces.

    The prior prompt knows {noun} and {kind} only: its images serve all concepts of the noun.
    """

    prompt: str
    prior_prompt: str
    initializer: str

    def __post_init__(self) -> None:
        if "{token}" not in self.prompt or "{token}" in self.prior_prompt:
            raise ValueError("wanted {token} in prompt and not in prior_prompt")


@dataclass(frozen=True)
class Params:
    """`views` of a concept are encoded once; `training` has settings for every method.

    `workers` and `concepts_per_batch` change results by rounding only.
    """

    method: MethodName
    seed: int
    workers: int
    concepts_per_batch: int
    views: int
    prior_images: int
    saved_dtype: Literal["float32", "float16"]
    object: Words
    style: Words
    training: MethodSettings
    augmentation: AugmentationSettings
    prior_sampler: Sampler

    @property
    def settings(self) -> TrainingSettings:
        """Those of the method."""
        return self.training.of(self.method)

    def used(self) -> dict[str, Any]:
        """All but what other methods would use."""
        return asdict(self) | {"training": asdict(self.settings)}

    def words(self, concept: Concept) -> Words:
        """The prompts for a concept of this kind."""
        return self.object if concept.kind == "object" else self.style

    def prior_prompt(self, concept: Concept) -> str:
        """What the base is asked for itself, so that the concept's noun keeps its meaning."""
        template = self.words(concept).prior_prompt
        return fill_prompt(template, {"noun": concept.noun, "kind": concept.kind})


def run(
    params: Params, base: BaseSettings, *, exemplars: Path, customized: Path, fresh: bool | None = True
) -> Summary:
    """Brings `customized` up to date with the concepts of `exemplars` (None: fresh ones and others).

    Raises StageError naming the concepts that failed, after all others are done, or what stopped the run.
    """
    wanted = read_concepts(exemplars, fresh=fresh)
    base_key = content_key(base.key(), code_key(*map(str, CODE)))
    customizer = Customizer(params, base, base_key, concept_keys(params, base_key, wanted), customized)
    with alone_in(customized):
        summary = Summary("customize", pruned=prune(customized, [PRIOR, *customizer.keys]))
        prune(customized / PRIOR, [base_key])
        pending = []
        for concept in wanted:
            if customizer.is_done(concept.concept_id):
                summary.reused.append(concept.concept_id)
            else:
                pending.append(concept)
        with summary.counting([concept.concept_id for concept in pending], customizer.is_done):
            customize_all(customizer, batches(wanted, pending, params.concepts_per_batch), summary)
    summary.raise_failures()
    return summary


def customize_all(customizer: Customizer, groups: Sequence[Sequence[Concept]], summary: Summary) -> None:
    """Customizes group by group as far as the disk has room; `summary` says what came of each concept."""
    params, pending = customizer.params, list(itertools.chain(*groups))
    if not pending:
        return
    # What is there of an earlier run gives way to what is made.
    new = {concept.concept_id for concept in pending if not customizer.folder(concept.concept_id).exists()}
    if summary.reused:
        room_for(len(new), "customized models", like=customizer.folder(summary.reused[0]))
    with (
        worker_map(min(params.workers, len(groups))) as each,
        tqdm(total=len(pending), desc="customize", unit="concept", disable=None) as progress,
    ):
        one_of_each = {params.prior_prompt(concept): concept for concept in pending}
        reasons = dict(zip(one_of_each, each(customizer.draw_prior, one_of_each.values()), strict=True))
        for concept in pending:
            if reason := reasons[params.prior_prompt(concept)]:
                summary.failed[concept.concept_id] = reason
        sound = [[one for one in group if one.concept_id not in summary.failed] for group in groups]
        groups = [group for group in sound if group]
        for group, part in zip(groups, each(customizer.learn, groups), strict=True):
            summary.add(part)
            progress.update(len(group))
            new -= {*part.done, *part.failed}
            if part.done:
                room_for(len(new), "customized models", like=customizer.folder(part.done[0]))


def concept_keys(params: Params, base_key: str, wanted: Sequence[Concept]) -> dict[str, str]:
    """What each concept's customized model depends on, by concept id."""
    shared = content_key(replace(params, workers=0, concepts_per_batch=0).used(), base_key)
    return {
        concept.concept_id: content_key(shared, concept.key(), exemplar_prompts(params, concept))
        for concept in wanted
    }


def exemplar_prompts(params: Params, concept: Concept) -> list[str]:
    """The training prompt of each exemplar."""
    template = params.words(concept).prompt
    return [fill_prompt(template, {**one.texts, "token": TOKEN}) for one in concept.exemplars]


@dataclass(frozen=True)
class Customizer:
    """One run, as each of its processes needs it."""

    params: Params
    base: BaseSettings
    base_key: str
    keys: dict[str, str]
    customized: Path

    @property
    def priors(self) -> Path:
        """Where the base's own images are kept, by what they depend on."""
        return self.customized / PRIOR / self.base_key

    def folder(self, concept_id: str) -> Path:
        """Where its customized model is, or will be."""
        return self.customized / concept_id

    def is_done(self, concept_id: str) -> bool:
        """Whether its customized model is there and made from what it would be made from now."""
        try:
            return read_json(self.folder(concept_id) / RECORD)["key"] == self.keys[concept_id]
        except (FileNotFoundError, ValueError):  # not there, or damaged
            return False

    def draw_prior(self, concept: Concept) -> str | None:
        """Makes sure that the base's own images for this concept's noun are there, or says why not."""
        prompt, word = self.params.prior_prompt(concept), self.params.words(concept).initializer
        try:
            prior_latents(base_pipeline(self.base), self.params, prompt, word, self.priors)
        except Exception as error:
            if not concerns_one(error):
                raise
            return one_line(error)
        return None

    def learn(self, group: Sequence[Concept]) -> Summary:
        """Trains a group in batches that fit in memory and writes what each concept has learned."""
        return batched(self.learn_at_once, group, name=lambda one: one.concept_id, where="customize")

    def learn_at_once(self, group: Sequence[Concept]) -> Summary:
        """Trains a group in one batch; says what is done and what failed."""
        pipe = base_pipeline(self.base)
        summary = Summary("customize")
        lessons: list[Lesson] = []
        learned: list[Concept] = []
        for concept in group:
            try:
                lessons.append(prepare(pipe, self.params, concept, self.priors))
                learned.append(concept)
            except Exception as error:
                if not concerns_one(error):
                    raise
                summary.failed[concept.concept_id] = one_line(error)
        if not lessons:
            return summary
        silent = True if is_worker() else None
        with tqdm(
            total=self.params.settings.steps, desc="batch", unit="step", leave=False, disable=silent
        ) as steps:
            stack, losses = train(
                pipe,
                lessons,
                self.params.settings,
                method=self.params.method,
                seed=self.params.seed,
                on_step=steps.update,
            )
        # All are written before the first takes its place, so that a kill hardly ever splits a batch.
        with contextlib.ExitStack() as commit:
            for i, concept in enumerate(learned):
                if not np.isfinite(losses[:, i]).all():
                    summary.failed[concept.concept_id] = (
                        "the loss is not finite; lower the learning rates"
                        + (", or take base.dtype: bfloat16" if self.base.dtype == "float16" else "")
                    )
                    continue
                folder = commit.enter_context(atomic_path(self.folder(concept.concept_id)))
                write_model(folder, stack[i], pipe, dtype=getattr(torch, self.params.saved_dtype))
                record = {
                    "key": self.keys[concept.concept_id],
                    "method": self.params.method,
                    "concept_id": concept.concept_id,
                    "kind": concept.kind,
                    "noun": concept.noun,
                    "token": TOKEN,
                    "prompts": sorted(set(lessons[i].prompts)),
                    "prior_prompt": lessons[i].prior_prompt,
                    "loss": [round(float(loss), 5) for loss in losses[:, i]],
                    "params": self.params.used(),
                }
                write_json(folder / RECORD, record)
                summary.done.append(concept.concept_id)
        return summary


def prepare(pipe: Pipeline, params: Params, concept: Concept, priors: Path) -> Lesson:
    """Encoded views of the concept, the base's images of its noun. Raises ImageError for a bad exemplar."""
    words = params.words(concept)
    _, rows, columns = latent_shape(pipe)
    pictures = [decode_image(one.image, name=one.image_id) for one in concept.exemplars]
    plain = exemplar_prompts(params, concept)
    views, prompts = [], []
    for i in range(params.views):
        rng = np.random.default_rng(seed_from(params.seed, concept.concept_id, "view", i))
        which = i % len(pictures)
        view = draw_view(
            pictures[which], rng, params.augmentation, cells=(rows, columns), factor=pipe.vae_scale_factor
        )
        views.append(view)
        prompts.append(f"{view.words} {plain[which]}".strip())
    prior_prompt = params.prior_prompt(concept)
    pixels = np.stack([view.pixels for view in views])
    latents = fitting(functools.partial(encode_images, pipe), pixels, 32, where="customize", noun="views")
    return Lesson(
        concept_id=concept.concept_id,
        initializer=words.initializer,
        latents=torch.cat(latents).float().cpu(),
        valid=torch.from_numpy(np.stack([view.valid for view in views])),
        prompts=tuple(prompts),
        prior_latents=prior_latents(pipe, params, prior_prompt, words.initializer, priors),
        prior_prompt=prior_prompt,
    )


def prior_latents(pipe: Pipeline, params: Params, prompt: str, initializer: str, priors: Path) -> Tensor:
    """Latents that the base drew for `prompt`, once for all concepts and runs that want the same."""
    key = content_key(prompt, params.seed, params.prior_images, params.prior_sampler)
    path = priors / f"{key}.safetensors"
    if not path.is_file():
        drawings = [
            Drawing(0, prompt, seed_from(params.seed, "prior", prompt, i)) for i in range(params.prior_images)
        ]
        stack = base_stack(pipe, [initializer])
        latents = draw_fitting(
            pipe, stack, drawings, params.prior_sampler, max(1, params.prior_images), where="customize"
        )
        if not latents.isfinite().all():
            raise ValueError(f"{prompt!r}: not finite numbers come of it; try base.dtype: float32")
        with atomic_path(path) as partial:
            save_file({"latents": latents.float().cpu()}, partial)
    return load_file(path)["latents"]


def main() -> None:
    """`python -m stages.customize`, from the repository's root."""
    try:
        summary = run(
            load_params(Params, "customize"),
            load_params(BaseSettings, "base"),
            exemplars=Path("data/world/exemplars.parquet"),
            customized=Path("data/customized"),
        )
    except StageError as error:
        sys.exit(str(error))
    print(summary)


if __name__ == "__main__":
    main()
