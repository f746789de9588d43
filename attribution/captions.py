"""What is said of images whose vectors came ready made: their captions stay in clip-retrieval's metadata."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from attribution.clip_retrieval import NAME_COLUMNS
from attribution.features import FeatureSet
from attribution.files import read_json

CAPTION_COLUMNS = ("caption", "text", "TEXT", "alt")


def describe(features: FeatureSet, image_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Id to what the metadata say of those of the images whose vectors came ready made: {"caption": text}."""
    shards = read_json(features.path / "space.json")["shards"]
    kept = [np.delete(np.arange(shard["rows"]), shard.get("without", [])) for shard in shards]
    starts = np.cumsum([0, *map(len, kept)])
    rows_of = features.rows_of(image_ids)
    asked = np.unique(rows_of[rows_of >= 0])
    asked_ids = features.ids_of(asked)
    found = {}
    for shard, own, start, end in zip(shards, kept, starts, starts[1:], strict=False):
        of_shard = (asked >= start) & (asked < end)
        if of_shard.any() and "metadata" in shard:
            file = features.path / shard["metadata"]
            if not file.is_file():
                do = f"put it back, or run: dvc repro featurize@{features.space.backbone}"
                raise FileNotFoundError(f"{file.resolve()}: no such file, which ready features need; {do}")
            present = pq.read_schema(file).names
            columns = [name for name in (*CAPTION_COLUMNS, *reversed(NAME_COLUMNS)) if name in present]
            rows = pq.read_table(file, columns=columns).take(own[asked[of_shard] - start]).to_pylist()
            for image_id, values in zip(asked_ids[of_shard].tolist(), rows, strict=True):
                said = dict.fromkeys(str(values[name]) for name in columns if values[name])
                found[image_id] = {"caption": " ".join(" ".join(said).split())}
    return found
