"""Calibration error: zero for what keeps its word, and its size for what does not."""

from __future__ import annotations

import numpy as np
import pytest

from attribution.reliability import BIN_ENDS, influence_due, reliability


def test_influence_that_comes_true_has_no_error() -> None:
    rng = np.random.default_rng(0)
    influence = np.tile([0.6, 0.25, 0.15], (20000, 1))
    right = rng.choice(3, p=[0.6, 0.25, 0.15], size=20000)
    due = (np.arange(3)[None] == right[:, None]).astype(float)
    assert reliability(influence, due).error == pytest.approx(0.0, abs=0.01)


def test_error_is_the_influence_that_went_to_the_wrong_bin() -> None:
    # All claimed for an item that is right half of the time; otherwise none of those shown is.
    influence = np.array([[1.0, 0.0], [1.0, 0.0]])
    due = np.array([[1.0, 0.0], [0.0, 0.0]])
    found = reliability(influence, due)
    assert found.error == pytest.approx(0.5)
    assert found.claimed[-1] == pytest.approx(0.0)
    assert found.due[-1] == pytest.approx(0.5)


def test_own_exemplars_without_influence_are_due_to_the_rest() -> None:
    found = reliability(np.array([[0.5, 0.5, 0.0]]), np.array([[0.0, 0.0, 1.0]]))
    assert found.due[-1] == 1.0
    assert found.items.sum() == 2
    assert found.error == pytest.approx(1.0)


def test_sums_are_whole() -> None:
    rng = np.random.default_rng(1)
    influence = rng.dirichlet(np.full(8, 0.2), size=50).astype(np.float32)[:, :5]
    due = rng.integers(0, 2, (50, 5)) / 8
    found = reliability(influence, due)
    assert found.claimed.sum() == pytest.approx(1.0)
    assert found.due.sum() == pytest.approx(1.0)
    assert 0 <= found.error <= 1


def test_due_is_shared_among_a_querys_exemplars() -> None:
    due = influence_due(np.array([[4, 2, 7], [2, 4, -1]]), np.array([[7, 4, 9, 1], [5, -1, -1, -1]]))
    assert due.tolist() == [[0.25, 0.0, 0.25], [0.0, 0.0, 0.0]]


def test_each_influence_is_in_the_bin_that_it_ends_or_lies_in() -> None:
    """Claims and dues of an item go to one bin, the ends of the bins and the least influence included."""
    for place, end in enumerate(BIN_ENDS):
        for influence in (end, 0.9 * end):
            found = reliability(np.array([[influence]]), np.array([[1.0]]))
            assert np.flatnonzero(found.claimed[:-1]).tolist() == [place]
            assert found.claimed[place] == pytest.approx(influence)
            assert found.due[place] == found.items[place] == 1
            assert found.error == pytest.approx(1 - influence)
