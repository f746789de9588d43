"""Ranks by counting against ranks by sorting, closed forms, and the bootstrap."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution.ranking import (
    NO_RANK,
    average_precision,
    bootstrap_interval,
    chance_average_precision,
    chance_recall,
    count_other_exemplars,
    count_rivals,
    own_scores,
    ranks_from_rivals,
    recall_at,
    recall_ceiling,
)

VECTORS = json.loads((Path(__file__).parent / "reference" / "calibrator_and_ap.json").read_text())


def ranks_of(matches: list[int]) -> np.ndarray:
    return np.flatnonzero(matches)[None] + 1


def precision_by_sorting(own: np.ndarray, others: np.ndarray) -> float:
    """AP of the sorted list of scores, the own exemplars after whatever ties with them."""
    entries = sorted([(-score, 1) for score in own] + [(-score, 0) for score in others])
    hits, total = 0, 0.0
    for place, (_, match) in enumerate(entries, start=1):
        hits += match
        total += match * hits / place
    return total / len(own)


@pytest.mark.parametrize(
    "case", VECTORS["average_precision"].values(), ids=list(VECTORS["average_precision"])
)
def test_average_precision_agrees_with_the_reference(case: dict) -> None:
    assert average_precision(ranks_of(case["matches"]))[0] == pytest.approx(case["ap"], abs=1e-12)


# Few distinct values, so that most examples have ties.
scores_strategy = st.integers(-3, 3).map(float)


@settings(max_examples=60, deadline=None)
@given(
    own=st.lists(scores_strategy, min_size=1, max_size=5),
    others=st.lists(scores_strategy, min_size=1, max_size=20),
)
def test_average_precision_by_counting_is_that_by_sorting(own: list[float], others: list[float]) -> None:
    queries = np.ones((1, 1), np.float32)
    gallery = np.array(others, np.float32)[:, None]
    exemplars = np.array(own, np.float32)[:, None]
    places = np.arange(len(own))[None]
    scores = own_scores(queries, exemplars, places)
    ranks = ranks_from_rivals(count_rivals(queries, gallery, scores), scores)
    assert average_precision(ranks)[0] == pytest.approx(precision_by_sorting(np.array(own), np.array(others)))
    # Counted over two parts of the gallery and added up, it is the same.
    parts = [gallery[: len(others) // 2], gallery[len(others) // 2 :]]
    added = np.sum([count_rivals(queries, part, scores) for part in parts if len(part)], axis=0)
    assert (ranks_from_rivals(added, scores) == ranks).all()


def test_other_exemplars_are_rivals_and_own_ones_are_not() -> None:
    rng = np.random.default_rng(0)
    exemplars = rng.integers(-2, 3, (12, 4)).astype(np.float32)  # many ties
    queries = rng.integers(-2, 3, (6, 4)).astype(np.float32)
    own = np.array([[0, 1, 2], [0, 1, 2], [3, -1, -1], [4, 5, -1], [6, 7, 8], [9, -1, -1]])
    scores = own_scores(queries, exemplars, own)
    counted = count_other_exemplars(queries, exemplars, scores)
    for query, members in enumerate(own):
        mine = [member for member in members if member >= 0]
        others = [row for row in range(12) if row not in mine]
        for slot, member in enumerate(mine):
            level = queries[query] @ exemplars[member]
            assert counted[query, slot] == sum(queries[query] @ exemplars[row] >= level for row in others)


def test_unused_places_neither_rank_nor_count() -> None:
    ranks = ranks_from_rivals(
        np.array([[4, 0, 0], [2, 5, 0]]), np.array([[0.5, np.nan, np.nan], [0.9, 0.1, 0.9]])
    )
    assert ranks.tolist() == [[5, NO_RANK, NO_RANK], [1, 4, 8]]
    assert recall_at(ranks, 4).tolist() == [0, 2 / 3]
    assert recall_ceiling(ranks, 2).tolist() == [1, 2 / 3]
    assert average_precision(ranks).tolist() == pytest.approx([1 / 5, (1 + 2 / 4 + 3 / 8) / 3])


def test_recall_divides_by_all_exemplars_not_by_k() -> None:
    ranks = np.arange(1, 21)[None]
    assert recall_at(ranks, 10)[0] == 0.5 == recall_ceiling(ranks, 10)[0]


def test_a_query_without_exemplars_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 queries without exemplars"):
        average_precision(np.full((2, 1), NO_RANK))
    with pytest.raises(
        ValueError, match="a query without exemplars; each customized model needs at least one"
    ):
        own_scores(np.ones((1, 2), np.float32), np.ones((1, 2), np.float32), np.array([[-1]]))


@pytest.mark.parametrize(("exemplars", "others"), [(1, 4), (2, 4), (3, 3)])
def test_chance_is_the_mean_over_all_orders(exemplars: int, others: int) -> None:
    size = exemplars + others
    orders = {order for order in permutations([1] * exemplars + [0] * others)}
    ranks = np.concatenate([ranks_of(list(order)) for order in sorted(orders)])
    expected = chance_average_precision(np.array([exemplars]), np.array([size]))[0]
    assert average_precision(ranks).mean() == pytest.approx(expected)
    assert recall_at(ranks, 2).mean() == pytest.approx(chance_recall(2, size))


def test_chance_recall_is_one_when_k_covers_the_gallery() -> None:
    assert chance_recall(10, 7) == 1.0


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Models differ more than their images: resampling images would give intervals far too small."""
    covered = 0
    models = np.repeat(np.arange(40), 10)
    for trial in range(100):
        rng = np.random.default_rng(trial)
        values = (rng.normal(size=40)[models] + 0.3 * rng.normal(size=400))[:, None]
        low, high = bootstrap_interval(values, models, resamples=300, seed=trial)
        covered += bool(low[0] <= 0 <= high[0])
    assert 85 <= covered <= 99


def test_interval_is_seeded_and_paired() -> None:
    rng = np.random.default_rng(0)
    models = rng.integers(0, 9, 50)
    values = rng.normal(size=(50, 1))
    first = bootstrap_interval(values, models, resamples=200, seed=3)
    assert np.array_equal(first, bootstrap_interval(values, models, resamples=200, seed=3))
    assert not np.array_equal(first, bootstrap_interval(values, models, resamples=200, seed=4))
    shifted = bootstrap_interval(values + 1.0, models, resamples=200, seed=3)
    assert np.allclose(np.subtract(shifted, first), 1.0)


def test_interval_weighs_models_by_their_queries() -> None:
    values = np.array([[1.0], [1.0], [1.0], [0.0]])
    low, high = bootstrap_interval(values, np.array(["a", "a", "a", "b"]), resamples=500, seed=0)
    assert (low[0], high[0]) == (0.0, 1.0)
    with pytest.raises(ValueError, match="at least 2 customized models to resample, got 1"):
        bootstrap_interval(values, np.array(["a"] * 4), resamples=10, seed=0)


def test_a_resample_is_a_mean_over_queries_not_over_models() -> None:
    """Of the draws aa, ab, bb the middle one is ab, in which the four queries count alike: 3/4, not 1/2."""
    values, models = np.array([[1.0], [1.0], [1.0], [0.0]]), np.array(["a", "a", "a", "b"])
    middle, _ = bootstrap_interval(values, models, resamples=500, seed=0, level=0.0)
    assert middle[0] == pytest.approx(0.75)
