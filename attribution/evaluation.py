"""Ranks of all queries in one space, and the tables of means, intervals and controls made from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from attribution.gallery import Gallery, Reader
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


class Rivals:
    """Rivals of each query's own exemplars in one space, counted while the distractors pass by.

    Exact: counts over parts of a gallery add up. `sizes` are those of smaller galleries to be ranked in too:
    the distractors in the first places.
    """

    def __init__(
        self,
        queries: Float[np.ndarray, "queries dim"],
        exemplars: Float[np.ndarray, "exemplars dim"],
        own: Int[np.ndarray, "queries slots"],
        sizes: Iterable[int],
    ) -> None:
        self.queries = queries
        self.scores = own_scores(queries, exemplars, own)
        self.others = count_other_exemplars(queries, exemplars, self.scores)
        self.sizes = sorted(set(sizes))
        # Among the distractors of the smallest gallery, those that the next one adds, ... and all the rest.
        self.counts = np.zeros((len(self.sizes) + 1, *self.scores.shape), dtype=np.int64)
        self.passed = 0

    def add(self, distractors: Float[np.ndarray, "rows dim"], places: Int[np.ndarray, " rows"]) -> None:
        """Counts more distractors, which come in ascending places."""
        blocks = np.split(distractors, np.searchsorted(places, self.sizes))
        for counts, block in zip(self.counts, blocks, strict=True):
            if len(block):
                counts += count_rivals(self.queries, block, self.scores)
        self.passed += len(distractors)

    def ranks(self) -> Ranks:
        """Ranks among all that have passed."""
        *smaller, whole = self.counts.cumsum(axis=0)
        by_size = {
            size: ranks_from_rivals(counts, self.scores)
            for size, counts in zip(self.sizes, smaller, strict=True)
            if size < self.passed
        }
        by_size[self.passed] = ranks_from_rivals(whole, self.scores)
        return Ranks(by_size, ranks_from_rivals(whole + self.others, self.scores))


def rank(vectors: Vectors, queries: Queries, gallery_sizes: Sequence[int]) -> Ranks:
    """Exact ranks by counting. Each distractor is scored once."""
    rivals = Rivals(vectors.queries, vectors.exemplars, queries.own, gallery_sizes)
    rivals.add(vectors.distractors, np.arange(len(vectors.distractors)))
    return rivals.ranks()


def rank_in_spaces(
    spaces: Mapping[str, Mapping[str, Mapper]],
    asked: Float[np.ndarray, "queries dim"],
    queries: Queries,
    gallery: Gallery,
    gallery_sizes: Sequence[int],
    *,
    beside: Sequence[tuple[Mapper, Reader]] = (),
) -> dict[str, Ranks]:
    """Ranks in several spaces, each of a mapper for each kind of query, while the gallery passes by once.

    `asked` are the queries' features, un-normalized. Whoever shares a mapper shares its work, other readers
    of this walk (`beside`) too.
    """
    counted: dict[str, list[tuple[np.ndarray, Mapper, Rivals]]] = {}
    for name, mappers in spaces.items():
        counted[name] = []
        for mapper in {id(one): one for one in mappers.values()}.values():
            rows = np.flatnonzero([mappers[kind] is mapper for kind in queries.kinds.tolist()])
            vectors, exemplars = mapper.map_synth(asked[rows]), mapper.map_real(gallery.exemplars)
            rivals = Rivals(vectors, exemplars, queries.own[rows], gallery_sizes)
            counted[name].append((rows, mapper, rivals))
    readers = [(mapper, rivals.add) for parts in counted.values() for _, mapper, rivals in parts]
    gallery.show([*readers, *beside])
    return {name: _join(parts, queries.own.shape) for name, parts in counted.items()}


def _join(parts: Sequence[tuple[np.ndarray, Mapper, Rivals]], shape: tuple[int, ...]) -> Ranks:
    """The ranks of all queries, out of those of some rows each."""
    hard, by_size = np.empty(shape, np.int64), dict[int, np.ndarray]()
    for rows, _, rivals in parts:
        found = rivals.ranks()
        hard[rows] = found.hard
        for size, ranks in found.by_size.items():
            by_size.setdefault(size, np.empty(shape, np.int64))[rows] = ranks
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
