"""Scores with millions of items in fixed room: the best one by one, all others in narrow bins."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

BEST = 1024  # scores of each query that are kept as they are
PER_UNIT = 4096  # bins per unit of cosine; they reach from -1 to 1


class ScoreBins:
    """Of each query the best scores, and how many others lie in each bin, their mean and spread: 200 kB.

    A bin stands for its scores as two points that have half its count each, a standard deviation below and
    above its mean. So sums of 1, s and s^2 are exact, and one or two scores stand for themselves. Where they
    are spread evenly over a bin of width w = 1 / 4096, a sum of f(s) is off by f''''(s) w^4 / 4320 an item.
    """

    def __init__(self, queries: int) -> None:
        self._best = np.full((queries, BEST), -np.inf, np.float32)
        # Of 1, x and x^2, where x is the place inside the bin, from 0 to 1.
        self._sums = np.zeros((queries, 3, 2 * PER_UNIT))

    def add(self, scores: Float[np.ndarray, "queries rows"]) -> None:
        """Counts more scores (cosines, float32) of every query."""
        for best, sums, row in zip(self._best, self._sums, scores, strict=True):
            together = np.concatenate([best, row])
            together.partition(len(row))
            best[:] = together[len(row) :]
            others = together[: len(row)]
            scaled = others[others > -np.inf] * np.float32(PER_UNIT)  # a power of two: nothing is rounded
            bins = np.clip(np.floor(scaled), -PER_UNIT, PER_UNIT - 1)
            inside = (scaled - bins).astype(np.float64)
            places = bins.astype(np.int64) + PER_UNIT
            for one, weights in zip(sums, (None, inside, inside * inside), strict=True):
                one += np.bincount(places, weights, minlength=len(one))

    def points(self) -> tuple[Float[np.ndarray, "queries points"], Float[np.ndarray, "queries points"]]:
        """Scores that stand for all that were counted, and how many each stands for, maybe none; float32."""
        used = np.flatnonzero(self._sums[:, 0].any(axis=0))
        count, total, squares = (self._sums[:, moment, used] for moment in range(3))
        some = np.maximum(count, 1)
        mean = total / some
        spread = np.sqrt(np.maximum(squares / some - mean * mean, 0))
        low, high = (
            np.where(count > 0, (used - PER_UNIT + mean + sign * spread) / PER_UNIT, -np.inf)
            for sign in (-1, 1)
        )
        scores = np.concatenate([self._best, low, high], axis=1, dtype=np.float32, casting="same_kind")
        counts = np.concatenate([self._best > -np.inf, count / 2, count / 2], axis=1, dtype=np.float32)
        return scores, counts
