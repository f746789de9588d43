"""Parts of a gallery merge, in any order and grouping, into the answer for the whole."""

import itertools

import numpy as np
import pytest

from attribution import parts, similarity
from tests import oracle

SETTINGS = [
    {"k": 30, "inv_tau": 9.0, "b": -0.5},
    {"k": 5, "inv_tau": 16.0, "b": -0.04},
    {"k": 400, "inv_tau": 0.5, "b": -0.2},
    {"k": 10, "inv_tau": 9.0, "b": 0.0},
    {"k": 3, "inv_tau": 3e6, "b": 0.0},  # beyond the range of the one-walk softmax
]


@pytest.fixture
def world() -> tuple[np.ndarray, np.ndarray]:
    return oracle.planted(np.random.default_rng(30), 7, 1501, 40)


def shards_of(gallery: np.ndarray, cuts: list[int]) -> list[tuple[int, np.ndarray]]:
    bounds = [0, *cuts, len(gallery)]
    return [(begin, gallery[begin:end]) for begin, end in itertools.pairwise(bounds)]


def concluded(
    queries: np.ndarray, shards: list[tuple[int, np.ndarray]], whole: parts.Part
) -> similarity.Attribution:
    mass = None
    if whole.needs_mass.any():
        mass = parts.sum_of(parts.weigh(queries, shard, whole) for _, shard in shards)
    return parts.conclude(whole, mass)


def assert_identical(a: similarity.Attribution, b: similarity.Attribution) -> None:
    for field in ("ids", "scores", "influence", "support", "support_mass", "remainder"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field), err_msg=field)


@pytest.mark.parametrize("windows", [(2048,), (20,), (0,), (2048, 7)])
@pytest.mark.parametrize("cuts", [[], [700], [1, 1, 97, 600, 1500]])
@pytest.mark.parametrize("settings", SETTINGS)
def test_any_tree_of_parts_gives_the_whole(
    world, settings: dict, cuts: list[int], windows: tuple[int, ...]
) -> None:
    queries, gallery = world
    want = similarity.attribute(queries, gallery, **settings)
    shards = shards_of(gallery, cuts)
    pieces = [
        parts.retrieve_part(queries, shard, first_row=first, window=window, **settings)
        for (first, shard), window in zip(shards, itertools.cycle(windows), strict=False)
    ]

    flat = parts.merge(*pieces)
    left = parts.merge(pieces[0])
    for piece in pieces[1:]:
        left = parts.merge(left, piece)
    right = pieces[-1]
    for piece in pieces[-2::-1]:
        right = parts.merge(right, piece)
    for whole in (flat, left, right):
        assert_identical(concluded(queries, shards, whole), want)


def test_masses_carry_from_low_to_high() -> None:
    one, most = np.ones(1, np.uint64), np.full(1, 2**64 - 1, np.uint64)
    both = parts.Mass(np.array([2]), one, most) + parts.Mass(np.array([3]), one, one)
    assert (both.count[0], both.high[0], both.low[0]) == (5, 3, 0)


def test_a_part_of_nothing_changes_nothing(world) -> None:
    queries, gallery = world
    settings = SETTINGS[1]
    whole = parts.merge(
        parts.retrieve_part(queries, gallery[:0], first_row=0, **settings),
        parts.retrieve_part(queries, gallery, first_row=0, **settings),
    )
    assert_identical(
        concluded(queries, [(0, gallery)], whole), similarity.attribute(queries, gallery, **settings)
    )


def test_parts_that_do_not_fit_are_refused(world) -> None:
    queries, gallery = world
    part = parts.retrieve_part(queries, gallery, first_row=0, k=3, inv_tau=9.0, b=-0.5)
    with pytest.raises(ValueError, match=r"merge: wanted at least one part, got none"):
        parts.merge()
    other = parts.retrieve_part(queries, gallery, first_row=0, k=4, inv_tau=9.0, b=-0.5)
    with pytest.raises(ValueError, match=r"one \(k, inv_tau, b\), got \(3, 9.0, -0.5\) and \(4, 9.0, -0.5\)"):
        parts.merge(part, other)
    fewer = parts.retrieve_part(queries[:2], gallery, first_row=0, k=3, inv_tau=9.0, b=-0.5)
    with pytest.raises(ValueError, match=r"merge: wanted parts of the same queries, got 7 and 2"):
        parts.merge(part, fewer)
    with pytest.raises(ValueError, match=r"weigh: wanted the part's 7 queries, got 2"):
        parts.weigh(queries[:2], gallery, part)


def test_a_wide_part_is_not_concluded_without_its_mass(world) -> None:
    queries, gallery = world
    part = parts.retrieve_part(queries, gallery, first_row=0, k=1, inv_tau=0.1, b=-0.5, window=0)
    with pytest.raises(
        ValueError, match=r"conclude: 7 queries have weight outside the part; do: conclude\(whole, sum"
    ):
        parts.conclude(part)
