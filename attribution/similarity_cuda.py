"""Retrieval on a GPU, behind the door of attribution.similarity: the same answers, bit for bit.

The gallery is walked in chunks that grow. Tensor cores propose candidates, within a proven error, against a
cut-off per query that each chunk raises; what is left at the end is scored canonically on the device. A
query for which a chunk emits more than its buffer holds is walked again with that chunk in halves. Queries
with more weight outside their top k than is kept, and plain softmaxes, get their sums from a walk of
canonical scores.

CUDA tensors and `Gallery` are read where they lie; galleries in host memory are streamed through the device.
Work is queued on the caller's current stream.
"""

from typing import Any

import numpy as np

from attribution import cuda_library as cuda
from attribution import parts, similarity
from attribution import similarity_arrays as arrays
from attribution.cuda_call import Call, Settings, in_a_row, on_host
from attribution.cuda_enqueue import Enqueued, enqueue
from attribution.cuda_gallery import Gallery
from attribution.cuda_parts import mass_of, part_of, retrieve_part, weigh
from attribution.cuda_streamed import Streamed
from attribution.cuda_walk import tally, walked

__all__ = [
    "Enqueued",
    "Gallery",
    "attribute",
    "canonical_scores",
    "compressed",
    "count_larger",
    "enqueue",
    "retrieve_part",
    "search",
    "weigh",
]

COUNT_CAPACITY = 16384  # rows above the lowest threshold beyond which all rows are scored
THRESHOLDS_AT_ONCE = 512


def attribute(
    queries: Any, gallery: Any, *, k: int, inv_tau: float, b: float, scale: Any = None, offset: Any = None
) -> similarity.Attribution:
    """What attribution.similarity.attribute says, with impl="cuda"."""
    k = similarity.check_settings(k, inv_tau, b)
    call = Call(queries, gallery, scale, offset)
    if not call.rows or not len(call.queries):
        return _of_nothing(call, k, inv_tau, b)
    settings = Settings(k, float(inv_tau), float(b))
    count = len(call.queries)
    found = similarity.Attribution(
        np.empty((count, k), np.int64), np.empty((count, k), np.float32), np.empty((count, k), np.float32),
        np.empty(count, np.int64), np.empty(count, np.float32), np.empty(count, np.float32), "cuda",
    )  # fmt: skip
    fields = (found.ids, found.scores, found.influence, found.support, found.support_mass, found.remainder)
    left = []
    for batch in walked(call, settings, np.arange(count)):
        narrow = ~batch.wide() & (settings.b < 0)
        if narrow.any():
            to, of_batch = in_a_row(batch.which[narrow]), in_a_row(np.flatnonzero(narrow))
            for field, values in zip(fields, batch.answers(), strict=True):
                field[to] = values[of_batch]
        if not narrow.all():
            left.append((batch.which[~narrow], batch.candidates(~narrow)))
    for which, (begin, ids, scores) in left:
        wide = np.full(len(which), settings.b < 0)
        part = part_of(call, settings, which, (begin, ids, scores, wide))
        mass = mass_of(call, settings, which, part) if part.needs_mass.any() else None
        done = parts.conclude(part, mass)
        some = (done.ids, done.scores, done.influence, done.support, done.support_mass, done.remainder)
        for field, answer in zip(fields, some, strict=True):
            field[which] = answer
    return found


def search(
    queries: Any, gallery: Any, *, k: int, scale: Any = None, offset: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """What attribution.similarity.search says, with impl="cuda"."""
    k = similarity.check_settings(k, 1.0, 0.0)
    call = Call(queries, gallery, scale, offset)
    if not call.rows or not len(call.queries):
        nothing = _of_nothing(call, k, 1.0, 0.0)
        return nothing.ids, nothing.scores
    settings, count = Settings(k, None, 0.0), len(call.queries)
    ids, scores = np.empty((count, k), np.int64), np.empty((count, k), np.float32)
    for batch in walked(call, settings, np.arange(count)):
        some = in_a_row(batch.which)
        ids[some], scores[some] = batch.answers()
    return ids, scores


def count_larger(
    queries: Any,
    gallery: Any,
    thresholds: Any,
    *,
    or_equal: bool = False,
    scale: Any = None,
    offset: Any = None,
) -> np.ndarray:
    """What attribution.similarity.count_larger says, with impl="cuda"."""
    call = Call(queries, gallery, scale, offset)
    levels = arrays.thresholds(on_host(thresholds), len(call.queries))
    larger = np.zeros(levels.shape, np.int64)
    if not call.rows or not larger.size:
        return larger
    # Few rows lie above a level that ranks high: those are found and scored. Else all rows are.
    low = np.nextafter(levels.min(axis=1).astype(np.float32), np.float32(-np.inf))
    dense = []
    for group in call.groups(np.arange(len(levels)), 12 * COUNT_CAPACITY):
        batches = [call.batch(which, COUNT_CAPACITY) for which in group]
        for batch in batches:
            batch.begin_counting(low[batch.which], levels[batch.which], or_equal)
        for batch, index, rows in call.sources(batches):
            batch.count(index, rows)
        for batch in batches:
            counts, overflowed = batch.counted()
            larger[batch.which[~overflowed]] = counts[~overflowed]
            dense.append(batch.which[overflowed])
    which = np.concatenate(dense)
    for first in range(0, levels.shape[1], THRESHOLDS_AT_ONCE):
        some = levels[which, first : first + THRESHOLDS_AT_ONCE]
        tallied = tally(call, which, cuda.COUNT, some.shape[1], thresholds=some, or_equal=or_equal)
        larger[which, first : first + THRESHOLDS_AT_ONCE] = tallied
    return larger


def canonical_scores(
    queries: Any, gallery: Any, ids: Any, *, scale: Any = None, offset: Any = None
) -> np.ndarray:
    """What attribution.similarity.canonical_scores says, with impl="cuda"."""
    call = Call(queries, gallery, scale, offset)
    rows = arrays.ids(on_host(ids), len(call.queries), call.rows)
    if not rows.size or not call.rows:
        return np.full(rows.shape, -np.inf, np.float32)
    if isinstance(call.gallery, Streamed):  # a few rows here and there: not worth the way
        return similarity.canonical_scores(queries, gallery, rows, scale=scale, offset=offset, impl="cpu")
    shards, largest = call.gallery.scaled(call.scale)
    batch = call.batch(np.arange(len(rows)), 1)
    batch.note(shards, largest)
    return batch.score(rows)


def compressed(gallery: Any) -> Gallery:
    """What attribution.similarity.compress says of a gallery that lies on a device, or shall lie there."""
    return (gallery if isinstance(gallery, Gallery) else Gallery(gallery)).compressed()


def _of_nothing(call: Call, k: int, inv_tau: float, b: float) -> similarity.Attribution:
    """Without queries or rows there is nothing for a GPU to do."""
    nothing = np.zeros((0, call.queries.shape[1]), np.float32)
    found = similarity.attribute(call.queries, nothing, k=k, inv_tau=inv_tau, b=b, impl="cpu")
    fields = (found.ids, found.scores, found.influence, found.support, found.support_mass, found.remainder)
    return similarity.Attribution(*fields, "cuda")
