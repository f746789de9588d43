"""Retrieval again, in float64 and the plainest numpy, sharing no code with what it judges."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Answer:
    """Everything about all scores of a batch, in float64."""

    scores: np.ndarray  # [queries, gallery]
    influence: np.ndarray  # [queries, gallery]
    support: np.ndarray  # [queries]


def scores(queries: np.ndarray, gallery: np.ndarray, scale=None, offset=None) -> np.ndarray:
    result = queries.astype(np.float64) @ gallery.astype(np.float64).T
    if offset is not None:
        result = result + offset.astype(np.float64)[:, None]
    if scale is not None:
        result = result * scale.astype(np.float64)
    return result


def influence(all_scores: np.ndarray, inv_tau: float, b: float) -> np.ndarray:
    weights = np.exp(inv_tau * (all_scores - all_scores.max(axis=1, keepdims=True))) + b
    weights = np.where(weights > 0, weights, 0)
    return weights / weights.sum(axis=1, keepdims=True)


def answer(queries, gallery, inv_tau, b, scale=None, offset=None) -> Answer:
    all_scores = scores(queries, gallery, scale, offset)
    shares = influence(all_scores, inv_tau, b)
    return Answer(all_scores, shares, (shares > 0).sum(axis=1))


def plain_float32(queries, gallery, inv_tau, b) -> tuple[np.ndarray, np.ndarray]:
    """What one would write without care, in float32: the yardstick for rounding errors."""
    all_scores = queries.astype(np.float32) @ gallery.astype(np.float32).T
    weights = np.exp(np.float32(inv_tau) * (all_scores - all_scores.max(axis=1, keepdims=True))) + np.float32(
        b
    )
    weights = np.maximum(weights, np.float32(0))
    return all_scores, weights / weights.sum(axis=1, keepdims=True)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def planted(rng: np.random.Generator, queries: int, gallery: int, dim: int, noise: float = 0.05):
    """Unit vectors; half of the gallery lies near some query, so that a softmax over it is sharp."""
    q = unit(rng.standard_normal((queries, dim)))
    g = unit(rng.standard_normal((gallery, dim))) if gallery else np.zeros((0, dim), np.float32)
    near = rng.permutation(gallery)[: gallery // 2]
    if len(near) and queries:
        g[near] = unit(
            q[rng.integers(queries, size=len(near))] + noise * rng.standard_normal((len(near), dim))
        )
    return q, g


def extremes() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Finite worlds at the ends of float32's range: 40 queries, a gallery, the scales of its rows."""
    rng = np.random.default_rng(77)
    worlds = {}

    # Nothing coarser than the largest float is finite.
    gallery = np.zeros((300, 16))
    gallery[np.arange(300), np.arange(300) % 16] = np.arange(300) * 0.01
    gallery[::7] = 0
    scale = np.ones(300)
    scale[::7] = np.finfo(np.float32).max
    worlds["largest scale"] = np.abs(rng.standard_normal((40, 16))), gallery, scale

    # A dot that is no float before it is scaled; other rows have larger scales.
    for name, power, query in (("long row", 63, 2.0**90), ("longer row", 100, 2.0**45)):
        gallery = np.zeros((4000, 8))
        gallery[:, 0] = -2 - np.arange(4000) / 4000
        gallery[3000, 0] = -(2.0**power)
        scale = np.ones(4000)
        scale[3000] = 2.0**-power
        queries = np.zeros((40, 8))
        queries[:, 0] = query
        worlds[name] = queries, gallery, scale
    queries, gallery, scale = worlds["long row"]
    worlds["long row without weight"] = queries, gallery, np.where(scale == 1, scale, 0)

    # Lengths that vanish when they are scaled, though their products with the queries do not.
    gallery = rng.standard_normal(64) * 2.0**-58 * (1 + 1e-7 * rng.standard_normal((4000, 64)))
    worlds["small scales"] = rng.standard_normal((40, 64)) * 2.0**95, gallery, np.full(4000, 2.0**-100)

    return {
        name: (queries.astype(np.float32), gallery.astype(np.float32), scale.astype(np.float32))
        for name, (queries, gallery, scale) in worlds.items()
    }
