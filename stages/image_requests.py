"""Which images are asked of a customized model: prompts of its kind and split, a seed for each image."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attribution.concepts import Concept, fill_prompt, prompt_names
from attribution.customized_model import TOKEN
from attribution.files import content_key
from attribution.params import read_yaml, require_at_least
from attribution.sampling import Sampler
from attribution.seeds import seed_from

# concept kind -> prompt kind -> train | test -> prompts
Prompts = dict[str, dict[str, dict[str, list[str]]]]
KINDS = {"object": ("media", "gpt"), "style": ("object", "gpt")}


@dataclass(frozen=True)
class Params:
    """`images_per_batch`: how many images are denoised at once; that and `workers` change rounding only.

    `max_failed_share`: how many of the concepts may fail before the stage does, those without a customized
    model among them. `use_shipped`: whether the queries take in data/shipped/synthesized.parquet.
    """

    seed: int
    workers: int
    prompts_per_kind: int
    samples_per_prompt: int
    images_per_batch: int
    max_failed_share: float
    webp_quality: int
    use_shipped: bool
    sampler: Sampler

    def __post_init__(self) -> None:
        if not 0 <= self.max_failed_share <= 1:
            raise ValueError(f"max_failed_share: wanted a share of 1, got {self.max_failed_share}")
        require_at_least(self, workers=1, prompts_per_kind=1, samples_per_prompt=1, images_per_batch=1)
        if not 0 <= self.webp_quality <= 100:
            raise ValueError(f"webp_quality: wanted 0 to 100, got {self.webp_quality}")

    def formative(self) -> dict[str, Any]:
        """What images depend on by more than rounding."""
        others = ("workers", "images_per_batch", "max_failed_share", "use_shipped")
        return {name: value for name, value in asdict(self).items() if name not in others}


@dataclass(frozen=True)
class Request:
    """One image to be made, and how it will be known."""

    image_id: str
    prompt_kind: str
    prompt: str
    prompt_split: str
    seed: int


def read_prompts(folder: Path) -> Prompts:
    """Prompts by concept kind, prompt kind and split, from object.yaml and style.yaml.

    Raises ValueError naming file and prompt for an unknown split, a prompt without {token} or with other
    names than {token} and {noun}, a prompt in both splits or twice, and a prompt kind that is missing.
    """
    prompts = {}
    for kind, prompt_kinds in KINDS.items():
        path = folder / f"{kind}.yaml"
        found = read_yaml(path)
        if not isinstance(found, dict) or sorted(found) != sorted(prompt_kinds):
            raise ValueError(f"{path}: wanted the prompt kinds {', '.join(prompt_kinds)}, got {found!r:.80}")
        split_of: dict[str, str] = {}
        for prompt_kind, splits in found.items():
            where = f"{path}: {prompt_kind}"
            if not isinstance(splits, dict) or sorted(splits) != ["test", "train"]:
                raise ValueError(f"{where}: wanted the lists train and test, got {splits!r:.80}")
            for split, listed in splits.items():
                if not isinstance(listed, list):
                    raise ValueError(f"{where}: {split}: wanted a list of prompts, got {listed!r:.80}")
                for prompt in listed:
                    _check_template(where, prompt)
                    if split_of.get(prompt, split) != split:
                        raise ValueError(f"{where}: {prompt!r} is both a train and a test prompt")
                    if prompt in split_of:
                        raise ValueError(f"{where}: {prompt!r} is listed twice")
                    split_of[prompt] = split
        prompts[kind] = found
    return prompts


def choose(params: Params, concept: Concept, prompts: Prompts) -> list[Request]:
    """The images wanted: prompts by (seed, concept), noise by (seed, concept, prompt, number of sample)."""
    split = "test" if concept.split == "test" else "train"
    requests = []
    for prompt_kind in KINDS[concept.kind]:
        templates = prompts[concept.kind][prompt_kind][split]
        count = params.prompts_per_kind
        if len(templates) < count:
            raise ValueError(
                f"prompts for {concept.kind}, {prompt_kind}, {split}: {len(templates)}, wanted {count}; "
                "write more or lower synthesize.prompts_per_kind"
            )
        rng = np.random.default_rng(seed_from(params.seed, concept.concept_id, prompt_kind))
        for i in sorted(rng.choice(len(templates), size=count, replace=False)):
            prompt = fill_prompt(templates[i], {"token": TOKEN, "noun": concept.noun})
            for sample in range(params.samples_per_prompt):
                seed = seed_from(params.seed, concept.concept_id, prompt, sample)
                image_id = f"{concept.concept_id}-{content_key(prompt_kind, prompt, seed)}"
                requests.append(Request(image_id, prompt_kind, prompt, split, seed))
    return requests


def _check_template(where: str, template: Any) -> None:
    if not isinstance(template, str):
        raise ValueError(f"{where}: wanted a prompt, got {template!r:.80}")
    try:
        fill_prompt(template, {"token": TOKEN, "noun": ""})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if "token" not in prompt_names(template):
        raise ValueError(f"{where}: {template!r}: wanted {{token}} in it")
