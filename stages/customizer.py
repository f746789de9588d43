"""A run of customization as each of its processes needs it: what is wanted, what is done, and a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from tqdm import tqdm

from attribution.base_model import BaseSettings, Pipeline
from attribution.concepts import Concept
from attribution.customization import RECORD, model_files, write_model
from attribution.customized_model import TOKEN, CustomizedModel
from attribution.files import content_key, read_json, write_json
from attribution.lessons import Lesson, train
from stages.imports import code_behind, code_key
from stages.incremental import Summary, concerns_one, one_line, placed_together
from stages.lesson_plan import Params, prepare, prior_latents
from stages.workers import base_pipeline, batched, is_worker

PRIOR = "_prior"
CODE = code_behind(__file__)


@dataclass(frozen=True)
class Customizer:
    """Makes customized models in the folder `customized`; `keys`: what each concept's model depends on."""

    params: Params
    base: BaseSettings
    base_key: str
    keys: dict[str, str]
    customized: Path

    @classmethod
    def of(
        cls, params: Params, base: BaseSettings, wanted: Sequence[Concept], customized: Path
    ) -> Customizer:
        """The one of these concepts: they depend on parameters, base and code, and on their own exemplars."""
        base_key = content_key(base.key(), code_key(*CODE))
        shared = content_key(params.formative(), base_key)
        keys = {
            concept.concept_id: content_key(shared, concept.key(), params.exemplar_prompts(concept))
            for concept in wanted
        }
        return cls(params, base, base_key, keys, customized)

    @property
    def priors(self) -> Path:
        """Where the base's own images are kept, by what they depend on."""
        return self.customized / PRIOR / self.base_key

    def folder(self, concept_id: str) -> Path:
        """Where its customized model is, or will be."""
        return self.customized / concept_id

    def is_done(self, concept_id: str) -> bool:
        """Whether its customized model is there, as it was written, and made from what it would be now."""
        folder = self.folder(concept_id)
        try:
            record = read_json(folder / RECORD)
            return record["key"] == self.keys[concept_id] and record["files"] == self.files_key(folder)
        except (FileNotFoundError, ValueError, KeyError):  # not there, or damaged
            return False

    def files_key(self, folder: Path) -> str:
        """What is in the model's files."""
        return content_key(*model_files(folder, self.params.method))

    def draw_prior(self, concept: Concept) -> str | None:
        """Makes sure that the base's own images for this concept's noun are there, or says why not."""
        try:
            prior_latents(base_pipeline(self.base), self.params, concept, self.priors)
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
        settings, silent = self.params.settings, True if is_worker() else None
        with tqdm(total=settings.steps, desc="batch", unit="step", leave=False, disable=silent) as steps:
            stack, losses = train(
                pipe,
                lessons,
                settings,
                method=self.params.method,
                seed=self.params.seed,
                on_step=steps.update,
            )
        # The rest of a batch that a kill had split would be made in another batch, and round otherwise.
        with placed_together(self.customized, self.keys[learned[0].concept_id]) as batch:
            for i, (concept, lesson) in enumerate(zip(learned, lessons, strict=True)):
                if not np.isfinite(losses[:, i]).all():
                    do = ", or take base.dtype: bfloat16" if self.base.dtype == "float16" else ""
                    summary.failed[concept.concept_id] = (
                        f"the loss is not finite; lower the learning rates{do}"
                    )
                    continue
                self.write(batch / concept.concept_id, concept, lesson, stack[i], losses[:, i], pipe)
                summary.done.append(concept.concept_id)
        return summary

    def write(
        self,
        folder: Path,
        concept: Concept,
        lesson: Lesson,
        model: CustomizedModel,
        losses: Float[np.ndarray, " steps"],
        pipe: Pipeline,
    ) -> None:
        """The model's files, and what it was made from and how."""
        write_model(folder, model, pipe, dtype=getattr(torch, self.params.saved_dtype))
        record = {
            "key": self.keys[concept.concept_id],
            "files": self.files_key(folder),
            "method": self.params.method,
            "concept_id": concept.concept_id,
            "kind": concept.kind,
            "noun": concept.noun,
            "token": TOKEN,
            "prompts": sorted(set(lesson.prompts)),
            "prior_prompt": lesson.prior_prompt,
            "loss": [round(float(loss), 5) for loss in losses],
            "params": self.params.used(),
        }
        write_json(folder / RECORD, record)
