"""Exemplars of one's own, as listed: a folder tree, or a table of concept, kind, noun and path."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from attribution.sources import SIDECAR_SUFFIXES, label

KINDS = ("object", "style")
SPLITS = ("train", "val", "test")
WANTED = ("concept", "kind", "noun", "path")
OPTIONAL = ("split", "group", "caption")
# Columns of the exemplar table that are not the user's to fill.
RESERVED = ("image_id", "concept_id", "seen", "fresh", "source", "image")
STYLE_NOUN = "art"
LONGEST_NAME = 120
LAYOUT = (
    "object/<noun>/<picture>, object/<noun>/<concept>/<picture> or style/<concept>/<picture>, "
    "or a .csv, .jsonl or .parquet file"
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One exemplar as it was listed. `split` and `caption` may be left open; `texts` are further columns."""

    concept_id: str
    kind: str
    noun: str
    group: str
    path: Path
    source: str
    split: str | None = None
    caption: str | None = None
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read_entries(source: Path) -> list[Entry]:
    """Every exemplar that the folder tree or the table lists, in its order.

    Raises FileNotFoundError, or ValueError naming file and row: a picture out of place, a column that is
    missing, and a concept whose rows disagree.
    """
    if source.is_dir():
        entries = list(_from_tree(source))
    elif source.is_file():
        entries = list(_from_table(source))
    else:
        raise FileNotFoundError(f"{source}: no such folder or table; wanted {LAYOUT}")
    if not entries:
        raise ValueError(f"{source}: no exemplars; wanted {LAYOUT}")
    first: dict[str, Entry] = {}
    for entry in entries:
        other = first.setdefault(entry.concept_id, entry)
        for name in ("kind", "noun", "group", "split"):
            if getattr(entry, name) != getattr(other, name):
                raise ValueError(
                    f"{source}: concept {entry.concept_id}: one {name} wanted, got "
                    f"{getattr(other, name)!r} ({other.source}) and {getattr(entry, name)!r} ({entry.source})"
                )
    return entries


def _from_tree(root: Path) -> Iterator[Entry]:
    places: dict[str, Path] = {}
    for path in sorted(_files(root)):
        place = path.relative_to(root)
        kind, *middle = place.parts[:-1] or ("",)
        if (kind, len(middle)) not in (("object", 1), ("object", 2), ("style", 1)):
            raise ValueError(f"{path}: out of place in {root}; wanted {LAYOUT}")
        # Either the folder is the concept, or an object's one picture is.
        concept = place if (kind, len(middle)) == ("object", 1) else place.parent
        concept_id = _plain_name(
            "-".join(concept.with_suffix("").parts if concept == place else concept.parts), path
        )
        if places.setdefault(concept_id, concept) != concept:
            raise ValueError(
                f"{root}: {places[concept_id]} and {concept} would both be concept {concept_id}; rename one"
            )
        noun = _words(label(middle[0])) if kind == "object" else STYLE_NOUN
        yield Entry(concept_id, kind, noun, noun, path, label(place.as_posix()))


def _files(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if links := [name for name in folders if Path(folder, name).is_symlink()]:
            link = Path(folder, min(links))
            raise ValueError(f"{link}: a link to a folder, which is not followed; put the folder there")
        for name in files:
            if not name.startswith(".") and not name.lower().endswith(SIDECAR_SUFFIXES):
                yield Path(folder, name)


def _from_table(table: Path) -> Iterator[Entry]:
    names: dict[str, str] = {}
    for number, row in enumerate(_rows(table), start=1):
        entry = _from_row(table, number, row)
        if (other := names.setdefault(entry.concept_id, row["concept"])) != row["concept"]:
            said = f"{other!r} and {row['concept']!r} would both be concept {entry.concept_id}"
            raise ValueError(f"{table}: row {number}: {said}; rename one")
        yield entry


def _from_row(table: Path, number: int, row: dict[str, str]) -> Entry:
    where = f"{table}: row {number}"
    for name in WANTED:
        if not row.get(name) and not (name == "noun" and row.get("kind") == "style"):
            raise ValueError(f"{where}: no {name}; wanted {', '.join(WANTED)}")
    if row["kind"] not in KINDS:
        raise ValueError(f"{where}: kind: wanted {' or '.join(KINDS)}, got {row['kind']!r}")
    split = row.get("split") or None
    if split not in (None, *SPLITS):
        raise ValueError(f"{where}: split: wanted {', '.join(SPLITS)} or nothing, got {split!r}")
    noun = row.get("noun") or STYLE_NOUN
    return Entry(
        concept_id=_plain_name(row["concept"], where),
        kind=row["kind"],
        noun=noun,
        group=row.get("group") or noun,
        path=table.parent / row["path"],
        source=row["path"],
        split=split,
        caption=row.get("caption") or None,
        texts={name: value for name, value in row.items() if name not in (*WANTED, *OPTIONAL)},
    )


def _rows(table: Path) -> list[dict[str, str]]:
    """The table's rows with text cells, all with the same columns; an empty cell is ""."""
    readers = {".csv": _csv_rows, ".jsonl": _json_rows, ".parquet": _parquet_rows}
    if table.suffix.lower() not in readers:
        raise ValueError(f"{table}: wanted {LAYOUT}")
    try:
        found = readers[table.suffix.lower()](table)
    except UnicodeDecodeError as error:
        byte = f"a byte {error.object[error.start]:#x}"
        raise ValueError(f"{table}: not UTF-8 ({byte} out of place); save it as UTF-8") from error
    names = list(dict.fromkeys(name for row in found for name in row if isinstance(name, str)))
    if found and (missing := [name for name in WANTED if name not in names]):
        raise ValueError(f"{table}: no column {', '.join(missing)}; it has: {', '.join(names)}")
    if taken := [name for name in names if name in RESERVED]:
        raise ValueError(f"{table}: column {', '.join(taken)} is filled here; rename yours")
    return [{name: _cell(row.get(name)) for name in names} for row in found]


def _csv_rows(table: Path) -> list[dict[str, Any]]:
    # utf-8-sig: spreadsheets begin their files with a byte order mark.
    with table.open(newline="", encoding="utf-8-sig") as file:
        try:
            found: list[dict[Any, Any]] = list(csv.DictReader(file))
        except csv.Error as error:
            raise ValueError(f"{table}: not CSV: {error}") from error
    for number, row in enumerate(found, start=1):
        if None in row:
            raise ValueError(
                f"{table}: row {number}: {len(row[None])} cells too many; put texts with commas in quotes"
            )
    return found


def _json_rows(table: Path) -> list[dict[str, Any]]:
    lines = table.read_text(encoding="utf-8-sig").split("\n")
    return [_json_row(table, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _parquet_rows(table: Path) -> list[dict[str, Any]]:
    try:
        return pq.read_table(table, partitioning=None).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{table}: no parquet file to read: {' '.join(str(error).split())}") from error


def _json_row(table: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{table}: line {number}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(
            f"{table}: line {number}: wanted an object with {', '.join(WANTED)}, got {line[:60]}"
        )
    return row


def _cell(value: Any) -> str:
    """Half of a character, which JSON may hold, is replaced."""
    return "" if value is None else str(value).strip().encode(errors="replace").decode()


def _words(name: str) -> str:
    return " ".join(name.replace("_", " ").split())


def _plain_name(text: str, where: Path | str) -> str:
    """The text as a folder name: letters, digits, dots and hyphens, no leading dot."""
    name = re.sub(r"[^\w.]+|_+", "-", label(text)).strip("-.")
    if not name or len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"{where}: {text!r} gives no usable concept name; wanted 1 to {LONGEST_NAME} letters"
        )
    return name
