"""A run of synthesis as each of its processes needs it: what is wanted, what is done, and a batch."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8
from PIL import Image

from attribution.base_model import BaseSettings, Pipeline, decode_latents
from attribution.customization import model_files, read_model
from attribution.customized_model import CustomizedModel, ModelStack
from attribution.files import content_key, is_of_the_system
from attribution.images import write_image_table
from attribution.memory import is_out_of_memory
from attribution.sampling import Drawing
from stages.image_requests import Params, Request
from stages.imports import code_behind, code_key
from stages.incremental import Summary, one_line, placed_together
from stages.workers import base_pipeline, batched, draw_fitting, fitting

CODE = code_behind(__file__)
KEY = b"key"
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


@dataclass(frozen=True)
class Synthesizer:
    """Draws what is requested of each model in `customized`, into the folder `synthesized`.

    `keys`: what each concept's images depend on; `without`: why the others have no model to draw with.
    """

    params: Params
    base: BaseSettings
    keys: dict[str, str]
    without: dict[str, str]
    requests: dict[str, list[Request]]
    customized: Path
    synthesized: Path

    @classmethod
    def of(
        cls,
        params: Params,
        base: BaseSettings,
        requests: Mapping[str, list[Request]],
        customized: Path,
        synthesized: Path,
    ) -> Synthesizer:
        """The one of these requests: images depend on parameters, base, code, their model and the request."""
        shared = content_key(params.formative(), base.key(), code_key(*CODE))
        keys, without = {}, {}
        for concept_id, wanted in requests.items():
            try:
                delta = model_files(customized / concept_id)
            except (FileNotFoundError, ValueError) as error:
                without[concept_id] = f"{one_line(error)}; run: dvc repro --force --single-item customize"
            else:
                keys[concept_id] = content_key(shared, delta, wanted)
        return cls(params, base, keys, without, dict(requests), customized, synthesized)

    def part(self, group: Sequence[str]) -> Synthesizer:
        """What drawing a group needs of this, for another process."""
        keys, requests = {one: self.keys[one] for one in group}, {one: self.requests[one] for one in group}
        return replace(self, keys=keys, requests=requests, without={})

    def table(self, concept_id: str) -> Path:
        """Where its images are, or will be."""
        return self.synthesized / f"{concept_id}.parquet"

    def is_done(self, concept_id: str) -> bool:
        """Whether its images are there and drawn with the model that is there now."""
        try:
            metadata = pq.read_schema(self.table(concept_id)).metadata or {}
        except FileNotFoundError:
            return False
        except (pa.ArrowException, OSError) as error:
            if is_of_the_system(error):
                raise
            return False  # damaged
        return metadata.get(KEY) == self.keys[concept_id].encode()

    def draw(self, group: Sequence[str]) -> Summary:
        """Draws a group of concepts in common batches that fit in memory and writes the table of each."""
        return batched(self.draw_at_once, group, name=str, where="synthesize")

    def draw_at_once(self, group: Sequence[str]) -> Summary:
        """Draws a group of concepts in common batches; says what is done."""
        models = [read_model(self.customized / concept_id) for concept_id in group]
        requests = [self.requests[concept_id] for concept_id in group]
        images = draw(base_pipeline(self.base), self.params, models, requests)
        with placed_together(self.synthesized, self.keys[group[0]]) as batch:
            for concept_id, wanted, pictures in zip(group, requests, images, strict=True):
                table = image_table(concept_id, wanted, pictures, webp_quality=self.params.webp_quality)
                table = table.replace_schema_metadata({KEY: self.keys[concept_id].encode()})
                write_image_table(batch / self.table(concept_id).name, table)
        return Summary("synthesize", done=list(group))


def draw(
    pipe: Pipeline,
    params: Params,
    models: Sequence[CustomizedModel],
    requests: Sequence[Sequence[Request]],
) -> list[UInt8[np.ndarray, "images height width 3"]]:
    """RGB images of each model for its own requests, drawn in common batches.

    Raises ValueError for models that do not fit the base, and for images that are not finite numbers.
    """
    drawings = [
        Drawing(model, request.prompt, request.seed)
        for model, mine in enumerate(requests)
        for request in mine
    ]
    stack = ModelStack.of(models)
    if other := next((one.prompt for one in drawings if stack.token not in one.prompt), None):
        raise ValueError(f"prompt {other!r}: wanted {stack.token} in it, which the model knows")
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


def image_table(
    concept_id: str,
    requests: Sequence[Request],
    pictures: UInt8[np.ndarray, "images height width 3"],
    *,
    webp_quality: int,
) -> pa.Table:
    """The concept's rows of SCHEMA."""
    rows = []
    for request, picture in zip(requests, pictures, strict=True):
        encoded = io.BytesIO()
        Image.fromarray(picture).save(encoded, "WEBP", quality=webp_quality)
        rows.append({**asdict(request), "concept_id": concept_id, "image": encoded.getvalue()})
    return pa.Table.from_pylist(rows, SCHEMA)
