"""Draws images with every fresh customized model, and lists them with the shipped ones as queries.

In: data/customized, data/prompts, data/world/exemplars.parquet, data/shipped/synthesized.parquet, the base
model. Out: data/synthesized/<concept_id>.parquet, image tables, and data/queries.parquet, the rest.
Concepts of train and val are drawn from train prompts, those of test from test prompts. Any row can be drawn
again with diffusers alone: load the delta, then pipe(prompt, generator=torch.Generator().manual_seed(seed)).
Incremental per concept, and what fails is named when all others are done, as in customize. Cost: about 2 s
per concept of 20 images on 2 CPU cores (mini base).
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from attribution import (
    base_model,
    conditioning,
    cross_attention,
    custom_diffusion,
    customization,
    customized_model,
    dreambooth,
    lora,
    pipeline_folder,
    sampling,
    seeds,
    textual_inversion,
)
from attribution.base_model import BaseSettings, Pipeline, decode_latents
from attribution.concepts import Concept, fill_prompt, read_concepts
from attribution.customization import model_files, read_model
from attribution.customized_model import TOKEN, CustomizedModel, ModelStack
from attribution.files import atomic_path, content_key
from attribution.images import decode_image, read_image_table, write_image_table
from attribution.memory import is_out_of_memory
from attribution.params import load_params, read_yaml
from attribution.sampling import Drawing, Sampler
from attribution.seeds import seed_from
from stages.incremental import StageError, Summary, alone_in, batches, code_key, one_line, prune, room_for
from stages.workers import base_pipeline, batched, draw_fitting, fitting, worker_map

CODE = (
    __file__,
    base_model.__file__,
    cross_attention.__file__,
    custom_diffusion.__file__,
    customization.__file__,
    customized_model.__file__,
    conditioning.__file__,
    dreambooth.__file__,
    lora.__file__,
    pipeline_folder.__file__,
    sampling.__file__,
    seeds.__file__,
    textual_inversion.__file__,
)
KEY = b"key"
KINDS = {"object": ("media", "gpt"), "style": ("object", "gpt")}
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("concept_id", pa.string()),
        ("prompt_kind", pa.string()),
        ("prompt", pa.string()),
        ("prompt_split", pa.string()),
        ("seed", pa.int64()),
        ("image", pa.binary()),
    ]
)
# concept kind -> prompt kind -> train | test -> prompts
Prompts = dict[str, dict[str, dict[str, list[str]]]]


@dataclass(frozen=True)
class Params:
    """`images_per_batch`: how many images are denoised at once; that and `workers` change rounding only.

    `use_shipped`: whether the queries take in data/shipped/synthesized.parquet.
    """

    seed: int
    workers: int
    prompts_per_kind: int
    samples_per_prompt: int
    images_per_batch: int
    webp_quality: int
    use_shipped: bool
    sampler: Sampler


@dataclass(frozen=True)
class Request:
    """One image to be made, and how it will be known."""

    image_id: str
    prompt_kind: str
    prompt: str
    prompt_split: str
    seed: int


def run(
    params: Params,
    base: BaseSettings,
    *,
    exemplars: Path,
    customized: Path,
    prompts: Path,
    synthesized: Path,
    fresh: bool | None = True,
) -> Summary:
    """Brings `synthesized` up to date with the customized models of the (fresh) concepts.

    Raises StageError naming the concepts that failed, after all others are done, or what stopped the run.
    """
    wanted = read_concepts(exemplars, fresh=fresh)
    words = read_prompts(prompts)
    requests = {concept.concept_id: choose(params, concept, words) for concept in wanted}
    with alone_in(customized, to_read=True), alone_in(synthesized):
        keys, without = _keys(params, base, customized, requests)
        synthesizer = Synthesizer(params, base, keys, requests, customized, synthesized)
        pruned = prune(synthesized, [f"{concept_id}.parquet" for concept_id in requests])
        summary = Summary("synthesize", pruned=pruned, failed=without)
        pending: list[str] = []
        for concept_id in keys:
            (summary.reused if synthesizer.is_done(concept_id) else pending).append(concept_id)
        with summary.counting(pending, synthesizer.is_done):
            synthesize_all(synthesizer, pending, summary)
    summary.raise_failures()
    return summary


def synthesize_all(synthesizer: Synthesizer, pending: Sequence[str], summary: Summary) -> None:
    """Draws concept by concept as far as the disk has room; `summary` says what came of each."""
    if not pending:
        return
    params, images = synthesizer.params, {name: len(synthesizer.requests[name]) for name in pending}
    groups = batches(list(synthesizer.keys), pending, max(1, params.images_per_batch // max(images.values())))
    # What is there of an earlier run gives way to what is made.
    new = {concept_id for concept_id in pending if not synthesizer.table(concept_id).exists()}
    if summary.reused:
        room_for(len(new), "tables of images", like=synthesizer.table(summary.reused[0]))
    with (
        worker_map(min(params.workers, len(groups))) as each,
        tqdm(total=sum(images.values()), desc="synthesize", unit="image", disable=None) as progress,
    ):
        for group, part in zip(groups, each(synthesizer.draw, groups), strict=True):
            summary.add(part)
            progress.update(sum(images[concept_id] for concept_id in group))
            new -= {*part.done, *part.failed}
            if part.done:
                room_for(len(new), "tables of images", like=synthesizer.table(part.done[0]))


@dataclass(frozen=True)
class Synthesizer:
    """One run, as each of its processes needs it."""

    params: Params
    base: BaseSettings
    keys: dict[str, str]
    requests: dict[str, list[Request]]
    customized: Path
    synthesized: Path

    def table(self, concept_id: str) -> Path:
        """Where its images are, or will be."""
        return self.synthesized / f"{concept_id}.parquet"

    def is_done(self, concept_id: str) -> bool:
        """Whether its images are there and drawn with the model that is there now."""
        try:
            metadata = pq.read_schema(self.table(concept_id)).metadata or {}
        except (FileNotFoundError, pa.ArrowInvalid):  # not there, or damaged
            return False
        return metadata.get(KEY) == self.keys[concept_id].encode()

    def draw(self, group: Sequence[str]) -> Summary:
        """Draws a group of concepts in common batches that fit in memory and writes the table of each."""
        return batched(self.draw_at_once, group, name=str, where="synthesize")

    def draw_at_once(self, group: Sequence[str]) -> Summary:
        """Draws a group of concepts in common batches; says what is done."""
        pipe = base_pipeline(self.base)
        models = [read_model(self.customized / concept_id) for concept_id in group]
        requests = [self.requests[concept_id] for concept_id in group]
        images = draw(pipe, self.params, models, requests)
        with contextlib.ExitStack() as commit:
            for concept_id, wanted, pictures in zip(group, requests, images, strict=True):
                path = commit.enter_context(atomic_path(self.table(concept_id)))
                table = _table(concept_id, wanted, pictures, self.params)
                write_image_table(path, table.replace_schema_metadata({KEY: self.keys[concept_id].encode()}))
        return Summary("synthesize", done=list(group))


def read_prompts(folder: Path) -> Prompts:
    """Prompts by concept kind, prompt kind and split, from object.yaml and style.yaml.

    Raises ValueError naming file and prompt for an unknown split, a prompt without {token}, a prompt in both
    splits or twice in one, and a prompt kind that is missing.
    """
    prompts = {}
    for kind, prompt_kinds in KINDS.items():
        path = folder / f"{kind}.yaml"
        found = read_yaml(path)
        if not isinstance(found, dict) or sorted(found) != sorted(prompt_kinds):
            raise ValueError(f"{path}: wanted the prompt kinds {', '.join(prompt_kinds)}, got {found!r:.80}")
        for prompt_kind, splits in found.items():
            where = f"{path}: {prompt_kind}"
            if not isinstance(splits, dict) or sorted(splits) != ["test", "train"]:
                raise ValueError(f"{where}: wanted the lists train and test, got {splits!r:.80}")
            for prompt in [*splits["train"], *splits["test"]]:
                if "{token}" not in prompt:
                    raise ValueError(f"{where}: {prompt!r}: wanted {{token}} in it")
            if any(len(set(listed)) != len(listed) for listed in splits.values()):
                raise ValueError(f"{where}: a prompt is listed twice")
            both = sorted(set(splits["train"]) & set(splits["test"]))
            if both:
                raise ValueError(f"{where}: {both[0]!r} is both a train and a test prompt")
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


def draw(
    pipe: Pipeline,
    params: Params,
    models: Sequence[CustomizedModel],
    requests: Sequence[Sequence[Request]],
) -> list[np.ndarray]:
    """RGB images [images, height, width, 3] of each model for its own requests, drawn in common batches.

    Raises ValueError for models that do not fit the base, and for images that are not finite numbers.
    """
    drawings = [
        Drawing(model, request.prompt, request.seed)
        for model, mine in enumerate(requests)
        for request in mine
    ]
    stack = ModelStack.of(models)
    try:
        latents = draw_fitting(
            pipe, stack, drawings, params.sampler, params.images_per_batch, where="synthesize"
        )
    except (KeyError, RuntimeError) as error:  # of layers that are missing, or of another size
        if is_out_of_memory(error):
            raise
        raise ValueError(f"no model of this base: {error}") from error
    ids = [request.image_id for mine in requests for request in mine]
    bad = [ids[row] for row in (~latents.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()]
    if bad:
        raise ValueError(f"{bad[0]}: not finite numbers ({len(bad)} of {len(ids)} images); customize it anew")

    def decode(rows: range) -> np.ndarray:
        return decode_latents(pipe, latents[rows.start : rows.stop])

    pictures = fitting(decode, range(len(ids)), 32, where="synthesize", noun="decoded images")
    ends = np.cumsum([len(mine) for mine in requests])
    return np.split(np.concatenate(pictures), ends[:-1])


def write_queries(
    path: Path, base: BaseSettings, *, exemplars: Path, synthesized: Path, shipped: Path | None
) -> str:
    """Lists every synthesized image in `path`, fresh before shipped, with what is known of its concept.

    Returns a line of counts. Shipped rows of concepts that are fresh or unknown here are left out. Raises
    ValueError when the shipped images are of another base model, or of a concept with other exemplars.
    """
    known = {concept.concept_id: concept for concept in read_concepts(exemplars)}
    columns = [name for name in SCHEMA.names if name != "image"]
    parts = [pq.read_table(part, columns=columns) for part in sorted(synthesized.glob("*.parquet"))]
    fresh = pa.concat_tables([SCHEMA.remove(SCHEMA.get_field_index("image")).empty_table(), *parts])
    fresh = fresh.replace_schema_metadata(None)
    others, left_out = fresh.slice(0, 0), 0
    if shipped is not None:
        _check_shipped(shipped, base, known)
        others = read_image_table(shipped, columns).replace_schema_metadata(None)
        mine = set(known) - set(fresh["concept_id"].to_pylist())
        mask = pc.is_in(others["concept_id"], value_set=pa.array(sorted(mine), pa.string()))
        left_out = len(others) - pc.sum(mask).as_py() if len(others) else 0
        others = others.filter(mask)
    rows = pa.concat_tables([fresh, others])
    concepts_of_rows = [known[concept_id] for concept_id in rows["concept_id"].to_pylist()]
    for name in ("kind", "noun", "split", "seen"):
        rows = rows.append_column(name, pa.array([getattr(concept, name) for concept in concepts_of_rows]))
    source = ["fresh"] * len(fresh) + ["shipped"] * len(others)
    rows = rows.append_column("source", pa.array(source, pa.string()))
    with atomic_path(path) as partial:
        pq.write_table(rows, partial, compression="zstd", write_statistics=False)
    return f"queries: {len(fresh)} fresh, {len(others)} shipped, {left_out} shipped left out"


def identity(concept: Concept) -> dict[str, Any]:
    """What must be so again where the concept's shipped images are used; encoders of pictures may differ."""
    pictures = [decode_image(one.image, name=one.image_id) for one in concept.exemplars]
    # Four by four mean colours: all but equal for the same picture on any machine, not for another picture.
    looks = np.mean([np.asarray(one.resize((4, 4), Image.Resampling.BOX), float) for one in pictures], axis=0)
    return {
        "kind": concept.kind,
        "noun": concept.noun,
        "split": concept.split,
        "exemplars": len(concept.exemplars),
        "looks": looks.round().astype(int).ravel().tolist(),
    }


def _check_shipped(shipped: Path, base: BaseSettings, known: dict[str, Concept]) -> None:
    metadata = pq.read_schema(shipped).metadata or {}
    again = "run: python -m stages.ship_synthesized"
    if metadata.get(b"base") != base.key().encode():
        raise ValueError(f"{shipped}: drawn by another base model than {base.model}; {again}")
    for concept_id, was in json.loads(metadata[b"concepts"]).items():
        if concept_id in known:
            now = identity(known[concept_id])
            off = np.abs(np.subtract(now.pop("looks"), was.pop("looks"))).max()
            if now != was or off > 6:
                raise ValueError(
                    f"{shipped}: {concept_id} is another concept, or looks different, now; {again}"
                )


def _table(concept_id: str, requests: Sequence[Request], pictures: np.ndarray, params: Params) -> pa.Table:
    rows = []
    for request, picture in zip(requests, pictures, strict=True):
        encoded = io.BytesIO()
        Image.fromarray(picture).save(encoded, "WEBP", quality=params.webp_quality)
        rows.append({**asdict(request), "concept_id": concept_id, "image": encoded.getvalue()})
    return pa.Table.from_pylist(rows, SCHEMA)


def _keys(
    params: Params, base: BaseSettings, customized: Path, requests: dict[str, list[Request]]
) -> tuple[dict[str, str], dict[str, str]]:
    """What the images of each concept depend on, and the reason for those that have no customized model."""
    shared = content_key(
        replace(params, workers=0, images_per_batch=0, use_shipped=False),
        base.key(),
        code_key(*map(str, CODE)),
    )
    keys, without = {}, {}
    for concept_id, wanted in requests.items():
        try:
            delta = model_files(customized / concept_id)
        except (FileNotFoundError, ValueError) as error:
            without[concept_id] = f"{one_line(error)}; run: dvc repro customize"
        else:
            keys[concept_id] = content_key(shared, delta, wanted)
    return keys, without


def main() -> None:
    """`python -m stages.synthesize`, from the repository's root. No queries are listed if one failed."""
    params, base = load_params(Params, "synthesize"), load_params(BaseSettings, "base")
    exemplars, synthesized = Path("data/world/exemplars.parquet"), Path("data/synthesized")
    try:
        summary = run(
            params,
            base,
            exemplars=exemplars,
            customized=Path("data/customized"),
            prompts=Path("data/prompts"),
            synthesized=synthesized,
        )
    except StageError as error:
        sys.exit(str(error))
    print(summary)
    print(
        write_queries(
            Path("data/queries.parquet"),
            base,
            exemplars=exemplars,
            synthesized=synthesized,
            shipped=Path("data/shipped/synthesized.parquet") if params.use_shipped else None,
        )
    )


if __name__ == "__main__":
    main()
