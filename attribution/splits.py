"""Which concepts of one's own a mapper learns from, which it is stopped by, which it is judged on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from attribution.exemplar_table import KINDS, SPLITS, Entry
from attribution.files import content_key


@dataclasses.dataclass(frozen=True)
class Shares:
    """How many of the concepts that name no split go where."""

    train: float
    val: float
    test: float

    def __post_init__(self) -> None:
        values = (self.train, self.val, self.test)
        if min(values) < 0 or abs(sum(values) - 1) > 1e-6:
            raise ValueError(f"wanted three shares of 0 or more that add up to 1, got {values}")


def assign_splits(entries: Sequence[Entry], shares: Shares, seed: int) -> dict[str, str]:
    """Concept id to split: that of its rows, or else drawn, within each kind in these shares.

    Of three or more concepts of a kind every split with a share gets one. A concept more moves two others
    at most: each keeps its place in an order drawn from (seed, id), and only the bounds move.
    """
    splits = {entry.concept_id: entry.split for entry in entries}
    for kind in KINDS:
        given = [one for entry in entries if entry.kind == kind and (one := splits[entry.concept_id])]
        open_ids = {entry.concept_id for entry in entries if entry.kind == kind and entry.split is None}
        ordered = sorted(open_ids, key=lambda concept_id: content_key(seed, concept_id))
        counts = _counts(len(ordered), shares, lacking=[split for split in SPLITS if split not in given])
        drawn = [split for split, count in zip(SPLITS, counts, strict=True) for _ in range(count)]
        splits |= dict(zip(ordered, drawn, strict=True))
    return {concept_id: split for concept_id, split in splits.items() if split is not None}


def _counts(concepts: int, shares: Shares, lacking: Sequence[str]) -> list[int]:
    ends = [round(concepts * end) for end in (shares.train, shares.train + shares.val)]
    counts = [ends[0], ends[1] - ends[0], concepts - ends[1]]
    wanting = [i for i, name in enumerate(SPLITS) if name in lacking and getattr(shares, name) > 0]
    if concepts >= len(wanting):
        for i in wanting:
            if counts[i] == 0:
                spare = [count - (j in wanting) for j, count in enumerate(counts)]
                counts[spare.index(max(spare))] -= 1
                counts[i] = 1
    return counts
