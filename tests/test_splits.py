"""Which concept goes into which split."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from attribution.exemplar_table import Entry
from attribution.splits import Shares, assign_splits


def entries(objects: int, styles: int) -> list[Entry]:
    counts = {"object": objects, "style": styles}
    return [
        Entry(f"{kind}-{number:03d}", kind, "thing", "thing", Path("x"), "x")
        for kind, count in counts.items()
        for number in range(count)
    ]


def test_each_kind_is_split_in_the_shares_that_are_named() -> None:
    splits = assign_splits(entries(50, 20), Shares(0.6, 0.1, 0.3), seed=0)
    for kind, wanted in (("object", (30, 5, 15)), ("style", (12, 2, 6))):
        found = Counter(split for concept_id, split in splits.items() if concept_id.startswith(kind))
        assert (found["train"], found["val"], found["test"]) == wanted


def test_splits_are_drawn_and_not_in_the_order_of_names() -> None:
    """Names often say the noun first: its concepts would all be in one split."""
    first, other = (assign_splits(entries(60, 0), Shares(0.5, 0.25, 0.25), seed=seed) for seed in (0, 1))
    assert first != other
    for splits in (first, other):
        early = [splits[f"object-{number:03d}"] for number in range(30)]
        assert 8 <= early.count("train") <= 22


@pytest.mark.parametrize("concepts", [3, 4, 5])
def test_of_three_concepts_every_split_gets_one(concepts: int) -> None:
    splits = assign_splits(entries(concepts, 0), Shares(0.9, 0.05, 0.05), seed=0)
    assert set(splits.values()) == {"train", "val", "test"}
    assert len(splits) == concepts


def test_a_split_that_lacks_a_concept_takes_it_from_one_that_can_spare_it() -> None:
    """One concept is in test by its table; of the two others, train and val need one each."""
    given = [dataclasses.replace(one, split="test") for one in entries(1, 0)]
    splits = assign_splits([*given, *entries(3, 0)[1:]], Shares(0.8, 0.1, 0.1), seed=0)
    assert set(splits.values()) == {"train", "val", "test"}


@pytest.mark.parametrize("concepts", range(3, 12))
@pytest.mark.parametrize("given", [(), ("test",), ("train", "val"), ("val", "val", "val")])
@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.1), (0.34, 0.33, 0.33), (0.1, 0.1, 0.8), (0.98, 0.01, 0.01)])
def test_every_split_with_a_share_gets_one(
    concepts: int, given: tuple[str, ...], shares: tuple[float, float, float]
) -> None:
    some = entries(concepts + len(given), 0)
    named = [dataclasses.replace(one, split=split) for one, split in zip(some, given, strict=False)]
    splits = assign_splits([*named, *some[len(given) :]], Shares(*shares), seed=0)
    assert set(splits.values()) == {"train", "val", "test"}
