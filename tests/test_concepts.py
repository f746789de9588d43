"""Concepts from the exemplar table, and prompts filled in for them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from attribution.concepts import fill_prompt, prompt_names, read_concepts
from attribution.images import write_image_table

ROW = {
    "image_id": "a1",
    "concept_id": "a",
    "kind": "object",
    "noun": "car",
    "split": "train",
    "seen": True,
    "fresh": True,
    "caption": "a red car",
    "image": b"pixels",
}


def write(path: Path, *changes: dict[str, object]) -> Path:
    rows = [{**ROW, "image_id": f"i{i}", **change} for i, change in enumerate(changes)]
    write_image_table(path, pa.Table.from_pylist(rows))
    return path


def test_concepts_come_by_id_with_their_exemplars_by_id(tmp_path: Path) -> None:
    path = write(
        tmp_path / "exemplars.parquet",
        {"concept_id": "b", "image_id": "z", "kind": "style", "noun": "art", "fresh": False},
        {"concept_id": "a", "image_id": "y"},
        {"concept_id": "b", "image_id": "x", "kind": "style", "noun": "art", "fresh": False},
    )
    concepts = read_concepts(path)
    assert [concept.concept_id for concept in concepts] == ["a", "b"]
    assert [one.image_id for one in concepts[1].exemplars] == ["x", "z"]
    assert concepts[0].exemplars[0].texts["caption"] == "a red car"
    assert [concept.concept_id for concept in read_concepts(path, fresh=True)] == ["a"]
    assert [concept.concept_id for concept in read_concepts(path, fresh=False)] == ["b"]


def test_a_concept_is_keyed_by_its_content(tmp_path: Path) -> None:
    def key(**change: object) -> str:
        return read_concepts(write(tmp_path / "exemplars.parquet", {**change}))[0].key()

    assert key() == key(split="test") == key(fresh=False) == key(caption="a car")
    assert len({key(), key(image=b"other"), key(noun="bus"), key(kind="style"), key(concept_id="b")}) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "music"}, "a: kind: wanted object or style, got music"),
        ({"split": "dev"}, "a: split: wanted train or val or test, got dev"),
        ({"concept_id": "../a"}, "concept_id '../a': wanted a plain folder name"),
        ({"concept_id": "_prior"}, "concept_id '_prior': wanted a plain folder name"),
        ({"concept_id": "a/b"}, "concept_id 'a/b': wanted a plain folder name"),
    ],
)
def test_bad_concepts_are_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_concepts(write(tmp_path / "exemplars.parquet", change))


def test_rows_that_disagree_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a: noun: wanted one value, got bus, car"):
        read_concepts(write(tmp_path / "exemplars.parquet", {}, {"noun": "bus"}))


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    rows = pa.Table.from_pylist([ROW]).drop_columns(["fresh"])
    write_image_table(tmp_path / "exemplars.parquet", rows)
    with pytest.raises(ValueError, match=r"wanted a column fresh \(bool\); got: image_id \(string\)"):
        read_concepts(tmp_path / "exemplars.parquet")


def test_prompts_are_filled() -> None:
    texts = {"token": "<new1>", "noun": "car", "place": ""}
    assert fill_prompt("a photo of {token} {noun} {place}", texts) == "a photo of <new1> car"
    with pytest.raises(ValueError, match=r"nothing to put for \{color\}; known: noun, place, token"):
        fill_prompt("a {color} {noun}", texts)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a {token} {", r"prompt 'a \{token\} \{': .*; wanted names in braces"),
        ("a {token} {noun", r"prompt 'a \{token\} \{noun': .*; wanted names in braces"),
        ("a } {token}", r"prompt 'a \} \{token\}': .*; wanted names in braces"),
        ("a {token} {noun:d}", r"\{noun:d\}': wanted \{noun\} alone, without : or !"),
        ("a {token} {noun!r}", r"\{noun!r\}': wanted \{noun\} alone, without : or !"),
    ],
)
def test_braces_that_hold_no_name_are_told(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill_prompt(template, {"token": "<new1>", "noun": "car"})
    with pytest.raises(ValueError, match=message):
        prompt_names(template)
