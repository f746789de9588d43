"""Exemplars and queries as their tables hold them, split by concept, with each query's own exemplars."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int, Shaped

from attribution.features import FeatureSet, check_same_space

SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Exemplars:
    """One row per exemplar image; `kinds` are object or style."""

    image_ids: Shaped[np.ndarray, " exemplars"]
    concept_ids: Shaped[np.ndarray, " exemplars"]
    kinds: Shaped[np.ndarray, " exemplars"]


@dataclasses.dataclass(frozen=True)
class Queries:
    """One row per synthesized image; `own` are rows of its customized model's exemplars, then -1."""

    image_ids: Shaped[np.ndarray, " queries"]
    concept_ids: Shaped[np.ndarray, " queries"]
    kinds: Shaped[np.ndarray, " queries"]
    seen: Bool[np.ndarray, " queries"]
    prompt_kinds: Shaped[np.ndarray, " queries"]
    own: Int[np.ndarray, "queries slots"]

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def sizes(self) -> Int[np.ndarray, " queries"]:
        """P, the number of own exemplars of each query."""
        return (self.own >= 0).sum(axis=1)

    def take(self, rows: np.ndarray) -> Queries:
        """These rows, given by index or by mask."""
        values = {field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)}
        return Queries(**values)


def read_exemplars(path: Path | str) -> Exemplars:
    """All exemplars of the table, in its order. Raises FileNotFoundError, or ValueError for a column."""
    columns = _read_columns(path, {"image_id": "", "concept_id": "", "kind": ""})
    return Exemplars(columns["image_id"], columns["concept_id"], columns["kind"])


def read_queries(
    path: Path | str,
    exemplars: Exemplars,
    *,
    split: str,
    kinds: Collection[str] = ("object", "style"),
) -> Queries:
    """The queries of the concepts of one split, in the table's order.

    Concepts of train and val are asked with train prompts, those of test with test prompts. Raises
    FileNotFoundError for the table; ValueError naming it for a split without queries, and for a customized
    model without exemplars.
    """
    if split not in SPLITS:
        raise ValueError(f"split: wanted one of {', '.join(SPLITS)}, got {split!r}")
    names = ("image_id", "concept_id", "kind", "prompt_kind", "split", "prompt_split")
    columns = _read_columns(path, {**dict.fromkeys(names, ""), "seen": True})
    prompts = "test" if split == "test" else "train"
    chosen = (columns["split"] == split) & (columns["prompt_split"] == prompts)
    chosen &= np.isin(columns["kind"], list(kinds))
    if not chosen.any():
        raise ValueError(
            f"{path}: no queries of split {split} with {prompts} prompts and kind {' or '.join(kinds)}; "
            f"run: dvc repro synthesize"
        )
    columns = {name: values[chosen] for name, values in columns.items()}
    return Queries(
        image_ids=columns["image_id"],
        concept_ids=columns["concept_id"],
        kinds=columns["kind"],
        seen=columns["seen"],
        prompt_kinds=columns["prompt_kind"],
        own=_own_rows(path, columns["concept_id"], exemplars),
    )


def open_features(folder: Path | str, backbone: str) -> tuple[FeatureSet, FeatureSet, FeatureSet]:
    """Feature sets of exemplars, queries and distractors in `folder`, all of one space.

    Raises ValueError when they are of another backbone, or of spaces that differ.
    """
    folder = Path(folder)
    sets = [
        FeatureSet.open(folder / name, backbone=backbone) for name in ("exemplars", "queries", "distractors")
    ]
    for other in sets[1:]:
        check_same_space(other.path, sets[0].space, other.space)
    return sets[0], sets[1], sets[2]


def _own_rows(path: Path | str, concept_ids: np.ndarray, exemplars: Exemplars) -> np.ndarray:
    rows_of: dict[str, list[int]] = {}
    for row, concept_id in enumerate(exemplars.concept_ids.tolist()):
        rows_of.setdefault(concept_id, []).append(row)
    concepts = concept_ids.tolist()
    without = sorted({concept for concept in concepts if concept not in rows_of})
    if without:
        raise ValueError(f"{path}: customized model {without[0]} has no exemplars ({len(without)} such)")
    slots = max(len(rows_of[concept]) for concept in concepts)
    padded = {concept: rows + [-1] * (slots - len(rows)) for concept, rows in rows_of.items()}
    return np.array([padded[concept] for concept in concepts], dtype=np.int64)


def _read_columns(path: Path | str, wanted: dict[str, str | bool]) -> dict[str, np.ndarray]:
    """The columns as numpy arrays, of text or, where the wanted value is a bool, of bools."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table; run: dvc repro")
    try:
        return _columns_of(path, wanted)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a parquet file, or a damaged one ({error}); run: dvc repro") from error


def _columns_of(path: Path, wanted: dict[str, str | bool]) -> dict[str, np.ndarray]:
    names = pq.read_schema(path).names
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; it has: {', '.join(names)}")
    table = pq.read_table(path, columns=list(wanted))
    for name in wanted:
        if table[name].null_count:
            raise ValueError(f"{path}: column {name} has {table[name].null_count} empty values")
    return {
        name: np.array(table[name].to_pylist(), dtype=bool if value is True else np.str_)
        for name, value in wanted.items()
    }
