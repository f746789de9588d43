"""Worlds whose recall and AP are known beforehand: exactly, or as a closed form of geometry."""

from __future__ import annotations

from math import comb
from pathlib import Path

import numpy as np
import pytest

from attribution.evaluation import Vectors, rank
from attribution.mapper import normalize
from attribution.queries import Queries, open_features, read_exemplars, read_queries
from attribution.ranking import average_precision, recall_at
from tests.feature_world import make_world, write_vectors


def neighbours(rng: np.random.Generator, vectors: np.ndarray, cosine: float) -> np.ndarray:
    """Unit vectors at exactly this cosine from unit `vectors`, in random directions."""
    across = rng.standard_normal(vectors.shape)
    across -= (across * vectors).sum(axis=1, keepdims=True) * vectors
    return cosine * vectors + np.sqrt(1 - cosine**2) * normalize(across)


@pytest.mark.parametrize("k", [1, 5, 10])
@pytest.mark.parametrize("cosine", [0.9, 0.98])
def test_recall_among_vectors_evenly_on_a_sphere(cosine: float, k: int) -> None:
    """In three dimensions the cap {x: q . x >= c} holds the share p = (1 - c) / 2 of the sphere (Archimedes).

    So rivals are Binomial(N, p), recall@k = P(rivals < k), E[1 / rank] = (1 - (1 - p)^(N + 1)) / ((N + 1) p).
    """
    rng = np.random.default_rng(0)
    distractors, p = 150, (1 - cosine) / 2
    ranks = []
    for _ in range(20):
        queries = normalize(rng.standard_normal((150, 3)))
        own = neighbours(rng, queries, cosine)
        gallery = normalize(rng.standard_normal((distractors, 3)))
        vectors = Vectors(*(part.astype(np.float32) for part in (queries, own, gallery)))
        ranks.append(rank(vectors, single_exemplars(len(queries)), []).own)
    found = np.concatenate(ranks)
    recall = sum(comb(distractors, hits) * p**hits * (1 - p) ** (distractors - hits) for hits in range(k))
    precision = (1 - (1 - p) ** (distractors + 1)) / ((distractors + 1) * p)
    # 20 galleries are the independent draws: their spread gives the standard error.
    spread = np.std([recall_at(one, k).mean() for one in ranks]) / np.sqrt(20)
    assert recall_at(found, k).mean() == pytest.approx(recall, abs=4 * spread + 1e-3)
    assert average_precision(found).mean() == pytest.approx(precision, abs=0.02)


def test_planted_rivals_give_exactly_their_ranks(tmp_path: Path) -> None:
    """Query i has i mod 7 distractors nearer than its exemplar, and i mod 3 that equal its exemplar."""
    world = make_world(tmp_path, styles=0, objects=20, per_model=1, distractors=5)
    exemplars = read_exemplars(world.inputs["exemplars_path"])
    queries = read_queries(world.inputs["queries_path"], exemplars, split="test")
    rng = np.random.default_rng(0)
    asked = normalize(rng.standard_normal((len(queries), 64)))
    own = normalize(rng.standard_normal((len(exemplars.image_ids), 64)))
    own[queries.own[:, 0]] = neighbours(rng, asked, 0.8)
    nearer = [neighbours(rng, np.repeat(asked[[i]], i % 7, axis=0), 0.9) for i in range(len(queries))]
    tied = [np.repeat(own[queries.own[[i], 0]], i % 3, axis=0) for i in range(len(queries))]
    far = normalize(rng.standard_normal((300, 64)))
    distractors = np.concatenate([*nearer, *tied, far])
    assert np.abs(far @ asked.T).max() < 0.7
    ids = [f"d{i}" for i in range(len(distractors))]
    query_ids = queries.image_ids.tolist()
    for name, names, rows in (
        ("exemplars", exemplars.image_ids.tolist(), own),
        ("queries", query_ids, 5.0 * asked),
        ("distractors", ids, distractors),
    ):
        write_vectors(tmp_path / "features" / name, names, rows)
    sets = open_features(tmp_path / "features", "toy")
    found, asked_again, gallery = (one.vectors() for one in sets)
    vectors = Vectors(normalize(asked_again), found, gallery)
    ranks = rank(vectors, queries, [100, 200])
    wanted = np.array([1 + i % 7 + i % 3 for i in range(len(queries))])
    assert ranks.own[:, 0].tolist() == wanted.tolist()
    assert (ranks.hard == ranks.own).all()  # no other exemplar is near
    assert list(ranks.by_size) == [100, 200, len(distractors)]
    assert (ranks.by_size[100] <= ranks.by_size[200]).all()


def single_exemplars(count: int) -> Queries:
    """Queries that own exemplar i each."""
    ids = np.array([f"q{i}" for i in range(count)])
    return Queries(
        image_ids=ids,
        concept_ids=ids,
        kinds=np.full(count, "object"),
        seen=np.ones(count, dtype=bool),
        prompt_kinds=np.full(count, "media"),
        own=np.arange(count)[:, None],
    )
