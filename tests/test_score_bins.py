"""Bins stand for many scores in every sum that the calibrator's fit takes."""

from __future__ import annotations

import numpy as np
import pytest

from attribution import score_bins
from attribution.calibrator import Calibrator, fit, losses, relaxed_loss
from attribution.score_bins import ScoreBins


def binned(scores: np.ndarray, cuts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    bins = ScoreBins(len(scores))
    for block in np.split(scores, cuts, axis=1):
        bins.add(block)
    return bins.points()


def draw_scores(gallery: int) -> np.ndarray:
    """Cosines of a few kinds of queries, float32; the fourth has many equal best ones."""
    rng = np.random.default_rng(0)
    spread = np.array([[0.03], [0.08], [0.15], [0.25], [0.01], [0.1]])
    return np.clip(0.1 + spread * rng.standard_normal((6, gallery)), -1, 1).astype(np.float32)


@pytest.mark.parametrize("kept", [1, 2, 3, 100])
def test_few_scores_stand_for_themselves(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_bins, "BEST", kept)
    scores = np.array(
        [[1.0, -1.0, 0.5, 0.501, 0.5, 1.0000001], [0.0, -0.1, 0.2, 0.3, -1e-9, 0.6]], np.float32
    )
    points, counts = binned(scores, [1, 4])
    for row, wanted in enumerate(scores):
        best = np.sort(points[row, :kept][counts[row, :kept] > 0])
        assert best.tolist() == np.sort(wanted)[-kept:].tolist()
        used = counts[row] > 0
        there = np.repeat(points[row, used], np.round(2 * counts[row, used]).astype(int))
        np.testing.assert_allclose(np.sort(there), np.sort(np.repeat(wanted, 2)), atol=1.3e-7)


def test_sums_of_moments_are_exact() -> None:
    scores = draw_scores(20_000)
    points, counts = binned(scores, [1, 7000, 7000])
    points = np.where(counts > 0, points, 0).astype(np.float64)
    assert counts.sum(axis=1).tolist() == [20_000] * 6
    wide = scores.astype(np.float64)
    for power in (1, 2):
        np.testing.assert_allclose((counts * points**power).sum(1), (wide**power).sum(1), atol=1e-3)


@pytest.mark.parametrize(
    ("inv_tau", "b"), [(1.0, 0.0), (6.0, -0.03), (20.0, -0.05), (36.0, -0.1), (100.0, -0.4)]
)
def test_the_loss_is_that_of_all_scores(inv_tau: float, b: float) -> None:
    """Against float64 over every score."""
    scores = draw_scores(100_000)
    points, counts = binned(scores, [30_000])
    own = np.ones((6, 1), dtype=bool)
    good = np.quantile(scores, 0.999, axis=1, keepdims=True)
    points = np.concatenate([good, points], axis=1).astype(np.float64)
    counts = np.concatenate([np.ones_like(good), counts], axis=1)
    loss, slope = relaxed_loss(points, own, inv_tau, b, counts)
    wanted, wanted_slope = relaxed_loss(
        np.concatenate([good, scores], axis=1).astype(np.float64), own, inv_tau, b
    )
    np.testing.assert_allclose(loss, wanted, atol=2e-6)
    np.testing.assert_allclose(slope, wanted_slope, rtol=1e-5, atol=1e-5)


def test_the_fit_is_that_to_all_scores() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(0, 0.08, (40, 9000)).astype(np.float32)
    own = np.zeros((40, 3), dtype=bool)
    own[np.arange(40), np.arange(40) % 3] = True
    scores[:, :3] += np.where(own, rng.uniform(0.1, 0.5, (40, 1)), 0).astype(np.float32)
    start = Calibrator(1.0, 0.0)
    wanted = fit(scores, own, start=start)
    points, counts = binned(scores[:, 3:], [100])
    together = np.concatenate([scores[:, :3], points], axis=1)
    weights = np.concatenate([np.ones((40, 3), np.float32), counts], axis=1)
    found = fit(together, own, start=start, counts=weights)
    assert found.inv_tau == pytest.approx(wanted.inv_tau, rel=1e-3)
    assert found.b == pytest.approx(wanted.b, rel=1e-3)
    np.testing.assert_allclose(losses(together, own, wanted, weights), losses(scores, own, wanted), rtol=1e-6)
