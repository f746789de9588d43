"""Concepts: what a model is customized toward, with its exemplars, read from the exemplar table."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from attribution.files import content_key
from attribution.images import read_image_table

WANTED_COLUMNS = {
    "image_id": pa.string(),
    "concept_id": pa.string(),
    "kind": pa.string(),
    "noun": pa.string(),
    "split": pa.string(),
    "seen": pa.bool_(),
    "fresh": pa.bool_(),
    "image": pa.binary(),
}


@dataclass(frozen=True)
class Exemplar:
    """One training image, encoded as it came, with the text cells of its row."""

    image_id: str
    image: bytes
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Concept:
    """An exemplar set with its noun and kind."""

    concept_id: str
    kind: Literal["object", "style"]
    noun: str
    split: Literal["train", "val", "test"]
    seen: bool
    exemplars: tuple[Exemplar, ...]

    def key(self) -> str:
        """Equal for concepts with equal id, kind, noun and exemplar images."""
        return content_key(self.concept_id, self.kind, self.noun, [one.image for one in self.exemplars])


def read_concepts(path: Path | str, *, fresh: bool | None = None) -> list[Concept]:
    """The concepts of an exemplar table by id, each with its exemplars by id; None: fresh ones and others.

    Raises ValueError for a missing column, an id that cannot name a folder, and a concept whose rows disagree
    on kind, noun, split or seen.
    """
    table = read_image_table(path)
    for name, kind in WANTED_COLUMNS.items():
        if name not in table.column_names or table.schema.field(name).type != kind:
            raise ValueError(f"{path}: wanted a column {name} ({kind}); got: {_columns(table)}")
    if fresh is not None:
        table = table.filter(pc.equal(table["fresh"], fresh))
    texts = [field.name for field in table.schema if field.type == pa.string()]
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in table.sort_by([("concept_id", "ascending"), ("image_id", "ascending")]).to_pylist():
        rows.setdefault(row["concept_id"], []).append(row)
    return [_concept(concept_id, members, texts, path) for concept_id, members in rows.items()]


def fill_prompt(template: str, texts: Mapping[str, str]) -> str:
    """`template` with the {names} of `texts` filled in, one space between words.

    Raises ValueError for a name that is not known, and for braces that hold no name.
    """
    for name in prompt_names(template):
        if name not in texts:
            known = ", ".join(sorted(texts))
            raise ValueError(f"prompt {template!r}: nothing to put for {{{name}}}; known: {known}")
    return " ".join(template.format(**texts).split())


def prompt_names(template: str) -> list[str]:
    """The {names} in the template. Raises ValueError for braces that hold more, or do not close."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"prompt {template!r}: {error}; wanted names in braces") from error
    for _, name, form, conversion in parts:
        if form or conversion:
            raise ValueError(f"prompt {template!r}: wanted {{{name}}} alone, without : or !")
    return [name for _, name, _, _ in parts if name is not None]


def _concept(
    concept_id: str, rows: Sequence[dict[str, Any]], texts: Sequence[str], path: Path | str
) -> Concept:
    if not concept_id or concept_id[0] in "._" or "/" in concept_id:
        raise ValueError(
            f"{path}: concept_id {concept_id!r}: wanted a plain folder name, without leading . or _"
        )
    choices_of = {"kind": ("object", "style"), "split": ("train", "val", "test"), "noun": (), "seen": ()}
    for column, choices in choices_of.items():
        found = sorted({str(row[column]) for row in rows})
        if len(found) > 1 or (choices and found[0] not in choices):
            wanted = " or ".join(choices) if choices else "one value"
            raise ValueError(f"{path}: {concept_id}: {column}: wanted {wanted}, got {', '.join(found)}")
    exemplars = tuple(
        Exemplar(row["image_id"], row["image"], {name: row[name] or "" for name in texts}) for row in rows
    )
    first = rows[0]
    return Concept(concept_id, first["kind"], first["noun"] or "", first["split"], first["seen"], exemplars)


def _columns(table: pa.Table) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in table.schema)
