"""Retrieval in parts: of a gallery whose shards lie on several machines, or come one after the other.

    parts = [retrieve_part(queries, shard, first_row=..., k=..., inv_tau=..., b=...) for each shard]
    whole = merge(*parts)                                    # in any order, in any tree
    mass = sum_of(weigh(queries, shard, whole) for each shard)    # only if whole.needs_mass.any()
    result = conclude(whole, mass)

The result is, bit for bit, what `attribution.similarity.attribute` returns for the whole gallery.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt64

from attribution import similarity


@dataclass(frozen=True)
class Part:
    """What some rows of a gallery say about each query.

    Of query q: ids and scores [begin[q], begin[q + 1]): its top k in order, then the others that have weight
    beside its best score. A wide query has more than `window` of those and keeps its top k alone. tops, bins
    and beyond hold the softmax sums where b = 0.
    """

    k: int
    inv_tau: float
    b: float
    window: int
    rows: int  # of the gallery
    begin: Int64[np.ndarray, " queries_and_end"]
    ids: Int64[np.ndarray, " items"]
    scores: Float32[np.ndarray, " items"]
    wide: Bool[np.ndarray, " queries"]
    tops: Int64[np.ndarray, " sums"]
    bins: UInt64[np.ndarray, "sums words"]
    beyond: Bool[np.ndarray, " sums"]

    @property
    def needs_mass(self) -> Bool[np.ndarray, " queries"]:
        """True for the queries whose weights must be summed in a second walk over the gallery."""
        needed = self.wide | self.beyond if len(self.beyond) else self.wide
        return needed & (np.diff(self.begin) > 0)

    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self.begin, self.ids, self.scores, self.wide, self.tops, self.bins, self.beyond


@dataclass(frozen=True)
class Mass:
    """How many rows have weight, and their sum in units of 2^-62: high * 2^64 + low."""

    count: Int64[np.ndarray, " queries"]
    high: UInt64[np.ndarray, " queries"]
    low: UInt64[np.ndarray, " queries"]

    def __add__(self, other: "Mass") -> "Mass":
        """The mass of both parts together, exactly."""
        low = self.low + other.low
        return Mass(self.count + other.count, self.high + other.high + (low < self.low), low)


def retrieve_part(
    queries: Any,
    gallery: Any,
    *,
    first_row: int,
    k: int,
    inv_tau: float,
    b: float,
    scale: Any = None,
    offset: Any = None,
    threads: int | None = None,
    window: int | None = None,
) -> Part:
    """The part of these gallery rows, which are rows first_row, first_row + 1, ... of the whole gallery.

    A smaller `window` than similarity.WINDOW_CAP takes less memory and more often a second walk.
    """
    k = similarity.check_settings(k, inv_tau, b)
    call = similarity.Call(queries, gallery, scale, offset, "cpu", threads)
    threads, cap, batch = call.limits()
    window = cap if window is None else min(window, cap)
    arrays = similarity.load_extension().retrieve_part(
        *call.extension_inputs(), k, float(inv_tau), float(b), threads, window, batch, first_row
    )
    return Part(k, float(inv_tau), float(b), window, call.inputs.rows, *arrays)


def merge(*parts: Part) -> Part:
    """The part of all rows that the given parts, which must not overlap, are of."""
    if not parts:
        raise ValueError("merge: wanted at least one part, got none")
    first = parts[0]
    for part in parts[1:]:
        settings, wanted = (part.k, part.inv_tau, part.b), (first.k, first.inv_tau, first.b)
        if settings != wanted:
            raise ValueError(f"merge: wanted parts of one (k, inv_tau, b), got {wanted} and {settings}")
        if len(part.wide) != len(first.wide):
            raise ValueError(
                f"merge: wanted parts of the same queries, got {len(first.wide)} and {len(part.wide)}"
            )
    window = min(part.window for part in parts)
    arrays = similarity.load_extension().merge(
        [part._arrays() for part in parts], first.k, first.inv_tau, first.b, window
    )
    return Part(first.k, first.inv_tau, first.b, window, sum(part.rows for part in parts), *arrays)


def weigh(
    queries: Any,
    gallery: Any,
    whole: Part,
    *,
    scale: Any = None,
    offset: Any = None,
    threads: int | None = None,
) -> Mass:
    """The weight that these gallery rows have beside the best scores of the whole gallery."""
    call = similarity.Call(queries, gallery, scale, offset, "cpu", threads)
    if len(call.inputs.queries) != len(whole.wide):
        raise ValueError(
            f"weigh: wanted the part's {len(whole.wide)} queries, got {len(call.inputs.queries)}"
        )
    needed = whole.needs_mass
    best = np.zeros(len(needed), np.float32)
    best[needed] = whole.scores[whole.begin[:-1][needed]]
    threads, _, batch = call.limits()
    settings = (whole.inv_tau, whole.b, best, needed)
    return Mass(*similarity.load_extension().weigh(*call.extension_inputs(), *settings, threads, batch))


def sum_of(masses: Iterable[Mass]) -> Mass:
    """The mass of all of them together."""
    return functools.reduce(Mass.__add__, masses)


def conclude(whole: Part, mass: Mass | None = None) -> similarity.Attribution:
    """The attribution over the gallery that the part is of."""
    if mass is None and whole.needs_mass.any():
        raise ValueError(
            f"conclude: {int(whole.needs_mass.sum())} queries have weight outside the part; "
            "do: conclude(whole, sum_of(weigh(queries, shard, whole) for each shard))"
        )
    if mass is None:
        none = np.zeros(len(whole.wide), np.uint64)
        mass = Mass(none.astype(np.int64), none, none)
    ids, scores, influence, support, support_mass, remainder = similarity.load_extension().conclude(
        whole._arrays(), whole.k, whole.inv_tau, whole.b, whole.rows, mass.count, mass.high, mass.low
    )
    return similarity.Attribution(ids, scores, influence, support, support_mass, remainder, "cpu")
