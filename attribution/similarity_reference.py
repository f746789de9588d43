"""Retrieval in plain numpy: what the extension is held to, bit for bit in ids and scores."""

import numpy as np
from jaxtyping import Float32, Float64, Int64

from attribution.similarity_arrays import Inputs, as_float32


def attribute(inputs: Inputs, k: int, inv_tau: float, b: float) -> tuple[np.ndarray, ...]:
    """The six arrays of an Attribution, in its order."""
    ids, top = search(inputs, k)
    scores = all_scores(inputs).astype(np.float64)
    best = scores.max(axis=1, keepdims=True, initial=np.finfo(np.float32).min)  # of an empty gallery too
    weights = np.maximum(np.exp(inv_tau * (scores - best)) + b, 0)
    shown = np.where(ids < 0, 0, np.maximum(np.exp(inv_tau * (top - best)) + b, 0))
    rest = np.sort(weights, axis=1)[:, : max(inputs.rows - k, 0)].sum(axis=1)
    total = weights.sum(axis=1) + (inputs.rows == 0)
    influence, mass, remainder = shown / total[:, None], shown.sum(axis=1) / total, rest / total
    as_float = [values.astype(np.float32) for values in (influence, mass, remainder)]
    # Without a threshold everything has influence, even where float64 has no number small enough for it.
    support = (weights > 0).sum(axis=1) if b < 0 else np.full(len(weights), inputs.rows)
    return ids, top, as_float[0], support, as_float[1], as_float[2]


def search(inputs: Inputs, k: int) -> tuple[Int64[np.ndarray, "queries k"], Float32[np.ndarray, "queries k"]]:
    """Scores descend; equal scores are in gallery order; -1 and -inf fill up beyond the gallery."""
    scores = all_scores(inputs)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int64)
    padding = ((0, 0), (0, k - order.shape[1]))
    ids = np.pad(order, padding, constant_values=-1)
    return ids, np.pad(np.take_along_axis(scores, order, 1), padding, constant_values=-np.inf)


def count_larger(
    inputs: Inputs, thresholds: Float64[np.ndarray, "queries thresholds"], or_equal: bool
) -> Int64[np.ndarray, "queries thresholds"]:
    """Compares every score with every threshold of its query."""
    scores, levels = all_scores(inputs)[:, :, None].astype(np.float64), thresholds[:, None, :]
    return (scores >= levels if or_equal else scores > levels).sum(axis=1)


def canonical_scores(
    inputs: Inputs, ids: Int64[np.ndarray, "queries ids"]
) -> Float32[np.ndarray, "queries ids"]:
    """The scores of the rows that ids name."""
    scores = np.pad(all_scores(inputs), ((0, 0), (0, 1)), constant_values=-np.inf)  # id -1 is the last column
    return np.take_along_axis(scores, ids, 1)


def all_scores(inputs: Inputs) -> Float32[np.ndarray, "queries gallery"]:
    """score = (q . x + offset) * scale: float64 in eight lanes, added as a tree, rounded once to float32."""
    gallery = np.concatenate([as_float32(shard, inputs.storage) for shard in inputs.shards]).astype(
        np.float64
    )
    scale = np.ones(len(gallery)) if inputs.scale is None else inputs.scale.astype(np.float64)
    offset = np.zeros(len(inputs.queries)) if inputs.offset is None else inputs.offset.astype(np.float64)
    _require_usable(gallery, scale)
    scores = np.empty((len(inputs.queries), len(gallery)), np.float32)
    for q, query in enumerate(inputs.queries.astype(np.float64)):
        lanes = np.zeros((len(gallery), 8))
        for d in range(0, gallery.shape[1], 8):
            lanes[:, : len(query) - d] += gallery[:, d : d + 8] * query[d : d + 8]
        fours = lanes[:, :4] + lanes[:, 4:]
        twos = fours[:, :2] + fours[:, 2:]
        with np.errstate(over="ignore"):
            scores[q] = (twos[:, 0] + twos[:, 1] + offset[q]) * scale
        scores[q] += 0.0  # what rounds to -0.0 too
        if not np.isfinite(scores[q]).all():
            row = int(np.isfinite(scores[q]).argmin())
            raise ValueError(
                f"query row {q} and gallery row {row}: their score is beyond the range of float32"
            )
    return scores


def _require_usable(gallery: np.ndarray, scale: np.ndarray) -> None:
    for row in np.flatnonzero(~(np.isfinite(scale) & (scale >= 0)))[:1]:
        raise ValueError(f"gallery row {row}: wanted a finite scale >= 0, got {scale[row]}")
    for row in np.flatnonzero(~np.isfinite(gallery).all(axis=1))[:1]:
        raise ValueError(f"gallery row {row}: wanted finite values, got NaN or infinity")
