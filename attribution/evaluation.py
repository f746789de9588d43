"""Ranks of all queries in one space, and the tables of means, intervals and controls made from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from attribution.mapper import Mapper
from attribution.queries import Queries
from attribution.ranking import (
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

HEADLINE = ("recall_at_10", "mean_average_precision")
# What the differences are taken of: each mapper against what it must beat.
GAINS = {
    "mapped": ("raw", "whitening", "permuted"),
    "own_kind": ("raw", "whitening", "own_kind_permuted", "mapped"),
}


@dataclasses.dataclass(frozen=True)
class Vectors:
    """What is ranked, and against what; raw from a backbone, or mapped and of length 1."""

    queries: Float[np.ndarray, "queries dim"]
    exemplars: Float[np.ndarray, "exemplars dim"]
    distractors: Float[np.ndarray, "distractors dim"]

    def map(self, mapper: Mapper) -> Vectors:
        """Queries through the head `synth`, the rest through `real`."""
        return Vectors(
            mapper.map_synth(self.queries), mapper.map_real(self.exemplars), mapper.map_real(self.distractors)
        )


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Ranks [queries, slots] of the own exemplars, `by_size` of the gallery and in the `hard` gallery.

    by_size: among the first n distractors and own exemplars, for several n. hard: among all distractors and
    the exemplars of every customized model.
    """

    by_size: Mapping[int, np.ndarray]
    hard: Int[np.ndarray, "queries slots"]

    @property
    def own(self) -> Int[np.ndarray, "queries slots"]:
        """Ranks among all distractors and own exemplars: the protocol of arXiv:2306.09345."""
        return self.by_size[max(self.by_size)]


@dataclasses.dataclass(frozen=True)
class Intervals:
    """How 95 % intervals are drawn: percentile bootstrap by customized model."""

    resamples: int
    seed: int

    def of(
        self, values: Float[np.ndarray, "queries metrics"], models: Shaped[np.ndarray, " queries"]
    ) -> tuple[Float[np.ndarray, " metrics"], Float[np.ndarray, " metrics"]] | None:
        """Low and high end of each column's mean; None where there is a single customized model."""
        if (models == models[0]).all():
            return None
        return bootstrap_interval(values, models, resamples=self.resamples, seed=self.seed)


def rank(vectors: Vectors, queries: Queries, gallery_sizes: Sequence[int]) -> Ranks:
    """Exact ranks by counting. Each distractor is scored once: counts over parts of a gallery add up."""
    total = len(vectors.distractors)
    ends = sorted({size for size in gallery_sizes if size < total} | {total})
    scores = own_scores(vectors.queries, vectors.exemplars, queries.own)
    rivals = np.zeros(scores.shape, dtype=np.int64)
    by_size = {}
    for first, end in zip([0, *ends], ends, strict=False):
        rivals = rivals + count_rivals(vectors.queries, vectors.distractors[first:end], scores)
        by_size[end] = ranks_from_rivals(rivals, scores)
    others = count_other_exemplars(vectors.queries, vectors.exemplars, scores)
    return Ranks(by_size, ranks_from_rivals(rivals + others, scores))


def rank_by_kind(
    raw: Vectors, mappers: Mapping[str, Mapper], queries: Queries, gallery_sizes: Sequence[int]
) -> Ranks:
    """Ranks of the queries of each kind in the space of that kind's mapper."""
    hard = np.empty_like(queries.own)
    by_size: dict[int, np.ndarray] = {}
    for kind, mapper in mappers.items():
        rows = np.flatnonzero(queries.kinds == kind)
        asked = dataclasses.replace(raw, queries=raw.queries[rows])
        found = rank(asked.map(mapper), queries.take(rows), gallery_sizes)
        hard[rows] = found.hard
        for size, ranks in found.by_size.items():
            by_size.setdefault(size, np.empty_like(queries.own))[rows] = ranks
    return Ranks(by_size, hard)


def tabulate(
    ranks: Mapping[str, np.ndarray],
    queries: Queries,
    gallery_sizes: Int[np.ndarray, " queries"],
    recall_ks: Sequence[int],
    intervals: Intervals,
) -> dict[str, Any]:
    """Metrics nested as <kind>.<seen|unseen>.<prompt kind>.<variant>.<metric>, and <kind>.all.<variant>...

    `ranks` by variant, in galleries of these sizes. Beside each metric stands its interval [low, high];
    beside the variants stand ceiling, chance and the differences of `GAINS`, paired by query.
    """
    names = [*(f"recall_at_{k}" for k in recall_ks), "mean_average_precision"]
    headline = [names.index(name) for name in HEADLINE]
    values = {variant: _metrics(one, recall_ks) for variant, one in ranks.items()}
    fixed = {
        "ceiling": _ceiling(next(iter(ranks.values())), recall_ks),
        "chance": _chance(queries.sizes, gallery_sizes, recall_ks),
    }
    tables: dict[str, Any] = {}
    for path, mask in cells(queries):
        models = queries.concept_ids[mask]
        cell: dict[str, Any] = {"queries": int(mask.sum()), "customized_models": len(np.unique(models))}
        for variant, columns in fixed.items():
            cell[variant] = _means(names, columns[mask])
        for variant, columns in values.items():
            cell[variant] = _means_with_intervals(names, columns[mask], models, intervals)
        for variant, others in GAINS.items():
            for other in others:
                gain = (values[variant] - values[other])[mask][:, headline]
                cell[f"{variant}_minus_{other}"] = _means_with_intervals(HEADLINE, gain, models, intervals)
        table = tables
        for step in path[:-1]:
            table = table.setdefault(step, {})
        table[path[-1]] = cell
    return tables


def cells(queries: Queries) -> Iterator[tuple[tuple[str, ...], Bool[np.ndarray, " queries"]]]:
    """Where each table stands and which queries are in it; none is empty."""
    for kind in np.unique(queries.kinds).tolist():
        of_kind = queries.kinds == kind
        yield (kind, "all"), of_kind
        for familiarity, here in (("seen", of_kind & queries.seen), ("unseen", of_kind & ~queries.seen)):
            for prompt_kind in np.unique(queries.prompt_kinds[here]).tolist():
                yield (kind, familiarity, prompt_kind), here & (queries.prompt_kinds == prompt_kind)


def _metrics(ranks: np.ndarray, recall_ks: Sequence[int]) -> np.ndarray:
    return np.stack([*(recall_at(ranks, k) for k in recall_ks), average_precision(ranks)], axis=1)


def _ceiling(ranks: np.ndarray, recall_ks: Sequence[int]) -> np.ndarray:
    return np.stack([*(recall_ceiling(ranks, k) for k in recall_ks), np.ones(len(ranks))], axis=1)


def _chance(sizes: np.ndarray, gallery_sizes: np.ndarray, recall_ks: Sequence[int]) -> np.ndarray:
    recalls = [np.array([chance_recall(k, int(size)) for size in gallery_sizes]) for k in recall_ks]
    return np.stack([*recalls, chance_average_precision(sizes, gallery_sizes)], axis=1)


def _means(names: Sequence[str], values: np.ndarray) -> dict[str, Any]:
    return {name: round(float(mean), 6) for name, mean in zip(names, values.mean(axis=0), strict=True)}


def _means_with_intervals(
    names: Sequence[str], values: np.ndarray, models: np.ndarray, intervals: Intervals
) -> dict[str, Any]:
    table = _means(names, values)
    ends = intervals.of(values, models)
    for column, name in enumerate(names):
        table[f"{name}_interval"] = None if ends is None else [round(float(end[column]), 6) for end in ends]
    return table
