"""The table of queries: every synthesized image, drawn in this run or shipped, with what is known of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from attribution.base_model import BaseSettings
from attribution.concepts import Concept, read_concepts
from attribution.files import atomic_path
from attribution.images import decode_image, read_image_table
from stages.synthesizer import SCHEMA


def write_queries(
    path: Path, base: BaseSettings, *, exemplars: Path, synthesized: Path, shipped: Path | None
) -> str:
    """Lists every synthesized image in `path`, with what is known of its concept. Returns a line of counts.

    They are ordered by concept, whoever drew them: results depend on the order, for mappers are trained in
    it. Shipped rows of concepts that are fresh, even if they failed, or unknown here are left out. Raises
    ValueError when the shipped images are of another base model, or of a concept with other exemplars.
    """
    known = {concept.concept_id: concept for concept in read_concepts(exemplars)}
    columns = [name for name in SCHEMA.names if name != "image"]
    parts = [pq.read_table(part, columns=columns) for part in sorted(synthesized.glob("*.parquet"))]
    fresh = pa.concat_tables([SCHEMA.remove(SCHEMA.get_field_index("image")).empty_table(), *parts])
    fresh = fresh.replace_schema_metadata(None)
    others, left_out = fresh.slice(0, 0), 0
    if shipped is not None:
        check_shipped(shipped, base, known)
        others = read_image_table(shipped, columns).replace_schema_metadata(None)
        mine = {concept.concept_id for concept in read_concepts(exemplars, fresh=False)}
        mask = pc.is_in(others["concept_id"], value_set=pa.array(sorted(mine), pa.string()))
        left_out = len(others) - pc.sum(mask).as_py() if len(others) else 0
        others = others.filter(mask)
    rows = pa.concat_tables([fresh, others])
    order = np.argsort(rows["concept_id"].to_numpy().astype(np.str_), kind="stable")
    rows = rows.take(pa.array(order, pa.int64()))
    concepts_of_rows = [known[concept_id] for concept_id in rows["concept_id"].to_pylist()]
    for name in ("kind", "noun", "split", "seen"):
        rows = rows.append_column(name, pa.array([getattr(concept, name) for concept in concepts_of_rows]))
    source = np.where(order < len(fresh), "fresh", "shipped").tolist()
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


def check_shipped(shipped: Path, base: BaseSettings, known: dict[str, Concept]) -> None:
    """Raises ValueError unless the shipped images are of this base, and of these concepts as far as known."""
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
