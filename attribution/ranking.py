"""Where a query's own exemplars rank in a gallery, by counting; recall, AP and intervals from those ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped

from attribution import similarity

# Fills the unused places of queries that have fewer exemplars than others.
NO_RANK = np.iinfo(np.int64).max


def own_scores(
    queries: Float[np.ndarray, "queries dim"],
    exemplars: Float[np.ndarray, "exemplars dim"],
    own: Int[np.ndarray, "queries slots"],
) -> Float[np.ndarray, "queries slots"]:
    """Scores of each query's own exemplars (rows of `exemplars`; -1 = unused place, NaN), exact to the bit.

    They are the scores that `attribution.similarity` counts with, so an equal vector gives an equal score.
    """
    if own.shape[1] == 0 or (own[:, 0] < 0).any():
        raise ValueError("own: a query without exemplars; each customized model needs at least one")
    filled = np.where(own < 0, own[:, :1], own)
    scores = similarity.canonical_scores(queries, exemplars, filled)
    return np.where(own < 0, np.nan, scores)


def count_rivals(
    queries: Float[np.ndarray, "queries dim"],
    gallery: Float[np.ndarray, "gallery dim"] | Sequence[np.ndarray],
    scores: Float[np.ndarray, "queries slots"],
) -> Int[np.ndarray, "queries slots"]:
    """How many gallery items score at least as much as each score: ties count against the exemplar.

    Counts add up over any division of a gallery. The gallery must not hold the query's own exemplars.
    Unused places (NaN) count nothing.
    """
    filled = np.where(np.isnan(scores), scores[:, :1], scores)
    counts = similarity.count_larger(queries, gallery, filled, or_equal=True)
    return np.where(np.isnan(scores), 0, counts)


def count_other_exemplars(
    queries: Float[np.ndarray, "queries dim"],
    exemplars: Float[np.ndarray, "exemplars dim"],
    scores: Float[np.ndarray, "queries slots"],
) -> Int[np.ndarray, "queries slots"]:
    """Rivals among the exemplars of other customized models, when `exemplars` holds the own ones too."""
    own_at_least = (scores[:, None, :] >= scores[:, :, None]).sum(axis=2)  # NaN compares false
    return count_rivals(queries, exemplars, scores) - own_at_least


def ranks_from_rivals(
    rivals: Int[np.ndarray, "queries slots"], scores: Float[np.ndarray, "queries slots"]
) -> Int[np.ndarray, "queries slots"]:
    """Ranks of the own exemplars in the full ranking, ascending; unused places hold `NO_RANK` and come last.

        rank_j = j + (rivals of the j-th best own exemplar),  j = 1 .. P

    Equal scores of own exemplars take consecutive ranks.
    """
    used = ~np.isnan(scores)
    # A better exemplar never has more rivals, so sorting the counts sorts the exemplars.
    ordered = np.sort(np.where(used, rivals, NO_RANK), axis=1)
    return np.where(ordered == NO_RANK, NO_RANK, ordered + np.arange(1, rivals.shape[1] + 1))


def recall_at(ranks: Int[np.ndarray, "queries slots"], k: int) -> Float[np.ndarray, " queries"]:
    """Share of a query's own exemplars that are in the top k: hits / P, not hits / min(k, P)."""
    return (ranks <= k).sum(axis=1) / _sizes(ranks)


def recall_ceiling(ranks: Int[np.ndarray, "queries slots"], k: int) -> Float[np.ndarray, " queries"]:
    """The largest recall@k that a query can have: min(k, P) / P."""
    sizes = _sizes(ranks)
    return np.minimum(k, sizes) / sizes


def average_precision(ranks: Int[np.ndarray, "queries slots"]) -> Float[np.ndarray, " queries"]:
    """AP over the full ranking.

        AP = (1/P) sum_j j / rank_j

    with the ranks ascending (arXiv:2306.09345). Raises ValueError for a query without exemplars.
    """
    sizes = _sizes(ranks)
    order = np.arange(1, ranks.shape[1] + 1)
    return np.where(ranks == NO_RANK, 0.0, order / ranks).sum(axis=1) / sizes


def chance_recall(k: int, gallery_size: int) -> float:
    """Expected recall@k of a random ranking of `gallery_size` items, whatever the number of exemplars."""
    return min(k, gallery_size) / gallery_size


def chance_average_precision(
    sizes: Int[np.ndarray, " queries"], gallery_sizes: Int[np.ndarray, " queries"]
) -> Float[np.ndarray, " queries"]:
    """Expected AP of a random ranking with P exemplars among n items.

    E[AP] = (H_n + (P - 1) / (n - 1) * (n - H_n)) / n,  H_n = 1 + 1/2 + ... + 1/n
    """
    harmonic = np.cumsum(1.0 / np.arange(1, gallery_sizes.max() + 1))[gallery_sizes - 1]
    others = (sizes - 1) / np.maximum(gallery_sizes - 1, 1)
    return (harmonic + others * (gallery_sizes - harmonic)) / gallery_sizes


def bootstrap_interval(
    values: Float[np.ndarray, "queries metrics"],
    models: Shaped[np.ndarray, " queries"],
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> tuple[Float[np.ndarray, " metrics"], Float[np.ndarray, " metrics"]]:
    """Low and high ends of the percentile interval of each column's mean, resampled by customized model.

    Images of one customized model are not independent: models are drawn with replacement, each with all of
    its queries. Equal seeds draw equal models, so the difference of two columns is a paired difference.
    Raises ValueError for fewer than two models, from which nothing can be said.
    """
    names, index = np.unique(models, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"models: wanted at least 2 customized models to resample, got {len(names)}")
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, index, values)
    sizes = np.bincount(index)
    draws = np.random.default_rng(seed).multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=resamples
    )
    means = (draws @ sums) / (draws @ sizes)[:, None]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def _sizes(ranks: Int[np.ndarray, "queries slots"]) -> Int[np.ndarray, " queries"]:
    sizes = (ranks != NO_RANK).sum(axis=1)
    if (sizes == 0).any():
        raise ValueError(f"ranks: {int((sizes == 0).sum())} queries without exemplars")
    return sizes
