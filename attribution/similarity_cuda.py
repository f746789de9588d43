"""Retrieval on a GPU, behind the door of attribution.similarity: the same answers, bit for bit.

The gallery is walked in chunks that grow. Tensor cores propose candidates, within a proven error, against a
cut-off per query that each chunk raises; what is left at the end is scored canonically on the device. A
query for which a chunk emits more than its buffer holds is walked again with that chunk in halves. Queries
with more weight outside their top k than is kept, and plain softmaxes, get their sums from a walk of
canonical scores.

CUDA tensors and `Gallery` are read where they lie; galleries in host memory are streamed through the device.
Work is queued on the caller's current stream.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attribution import cuda_library as cuda
from attribution import parts, similarity
from attribution import similarity_arrays as arrays
from attribution.cuda_batch import ENQUEUED_NORM, Batch
from attribution.cuda_gallery import Gallery, Rows, Streamed, open_device, require_current

__all__ = [
    "Gallery",
    "attribute",
    "canonical_scores",
    "count_larger",
    "enqueue",
    "retrieve_part",
    "search",
    "weigh",
]

QUERY_BATCH = (
    1024  # queries that share a walk: what reads the gallery seldom enough to be bound by arithmetic
)
WORKSPACE_BYTES = 192 << 20  # of all batches that walk together
COUNT_CAPACITY = 16384  # rows above the lowest threshold beyond which all rows are scored
THRESHOLDS_AT_ONCE = 512


@dataclass(frozen=True)
class Settings:
    """What is looked for; inv_tau None: the top k alone."""

    k: int
    inv_tau: float | None
    b: float

    def search(self) -> cuda.Search:
        """The same, as the library wants it."""
        if self.inv_tau is None or self.b == 0:
            return cuda.Search(self.k, 0.0, 0.0, 0.0, 0)
        # With room for the roundings of weight(), as in csrc/weight.h.
        depth = max(float(np.log(-self.b)), -746.0) * (1 + 1e-12) - 1e-12
        return cuda.Search(self.k, self.inv_tau, self.b, depth / self.inv_tau, similarity.WINDOW_CAP)


class Call:
    """Checked arguments on the device."""

    def __init__(self, queries: Any, gallery: Any, scale: Any, offset: Any) -> None:
        on_device = getattr(gallery, "is_cuda", False) or _is_cuda_sequence(gallery)
        if on_device and not isinstance(gallery, Gallery):
            gallery = Gallery(gallery)
        self.host_inputs: arrays.Inputs | None = None
        self.gallery: Gallery | Streamed
        if isinstance(gallery, Gallery):
            self.gallery, self.library, self.device = gallery, gallery.library, gallery.device
            require_current(self.device)
            stand_in = np.zeros((0, gallery.dim), np.float32)
            inputs = arrays.open_inputs(_on_host(queries), stand_in, None, _on_host(offset))
            self.scale = None if scale is None else self._vector(scale, gallery.rows)
        else:
            self.library, self.device = open_device()
            inputs = arrays.open_inputs(_on_host(queries), gallery, _on_host(scale), _on_host(offset))
            self.gallery, self.host_inputs = Streamed(self.library, self.device, inputs), inputs
        self.queries, self.offset = inputs.queries, inputs.offset

    @property
    def rows(self) -> int:
        """The number of gallery rows."""
        return self.gallery.rows

    def _vector(self, scale: Any, rows: int) -> torch.Tensor:
        values = scale if isinstance(scale, torch.Tensor) else torch.from_numpy(np.array(scale))
        if values.dtype != torch.float32:
            raise TypeError(f"scale: wanted float32, got {values.dtype}")
        if values.shape != (rows,):
            raise ValueError(
                f"scale: wanted one value for each of {rows} gallery rows, got shape {list(values.shape)}"
            )
        return values.detach().to(self.device).contiguous()

    def batch(self, which: np.ndarray, capacity: int) -> Batch:
        """These queries on the device, with room for candidates."""
        values, offset = self.queries[which], None if self.offset is None else self.offset[which]
        return Batch(
            self.library, self.device, self.gallery.storage, which, values, offset, min(capacity, self.rows)
        )

    def sources(self, batches: list[Batch]) -> Iterator[tuple[Batch, int, Rows]]:
        """Every batch with every slab, noted in the batch; slabs are streamed once for all batches."""
        if isinstance(self.gallery, Gallery):
            shards, largest = self.gallery.scaled(self.scale)
            for batch in batches:
                batch.note(shards, largest)
                for index, shard in enumerate(shards):
                    yield batch, index, shard
            return
        for rows, largest in self.gallery.slabs():
            for batch in batches:
                batch.note([rows], largest)
                yield batch, 0, rows

    def groups(self, which: np.ndarray, bytes_each: int) -> Iterable[list[np.ndarray]]:
        """Queries in batches that walk together."""
        size = max(1, min(QUERY_BATCH, WORKSPACE_BYTES // bytes_each))
        batches = [which[first : first + size] for first in range(0, len(which), size)]
        together = 1
        if isinstance(self.gallery, Streamed):
            together = max(1, WORKSPACE_BYTES // (size * bytes_each))
        return [batches[first : first + together] for first in range(0, len(batches), together)]


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
    for batch in _walked(call, settings, np.arange(count)):
        narrow = ~batch.wide() & (settings.b < 0)
        if narrow.any():
            for field, values in zip(fields, batch.answers(), strict=True):
                field[batch.which[narrow]] = values[narrow]
        if not narrow.all():
            left.append((batch.which[~narrow], batch.candidates(~narrow)))
    for which, (begin, ids, scores) in left:
        wide = np.full(len(which), settings.b < 0)
        part = _part(call, settings, which, (begin, ids, scores, wide))
        mass = _weigh(call, settings, which, part) if part.needs_mass.any() else None
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
    for batch in _walked(call, settings, np.arange(count)):
        ids[batch.which], scores[batch.which] = batch.answers()
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
    levels = arrays.thresholds(_on_host(thresholds), len(call.queries))
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
        tallied = _tally(call, which, cuda.COUNT, some.shape[1], thresholds=some, or_equal=or_equal)
        larger[which, first : first + THRESHOLDS_AT_ONCE] = tallied
    return larger


@dataclass(frozen=True)
class Enqueued:
    """Answers in device memory, valid once the stream has come to them, and only where `settled`."""

    batch: Batch
    largest_norm: torch.Tensor  # of the queries
    ids: torch.Tensor
    scores: torch.Tensor
    influence: torch.Tensor
    support: torch.Tensor
    support_mass: torch.Tensor
    remainder: torch.Tensor

    def settled(self) -> np.ndarray:
        """True for queries whose answer is final; ask `attribute` about the others. Waits."""
        norm = float(self.largest_norm)
        if not norm <= ENQUEUED_NORM:
            raise ValueError(f"enqueue: wanted finite queries with |q| <= 2^30, got one with |q| = {norm}")
        self.batch.require_finite_scores()
        words = self.batch.selected.cpu().numpy()
        return (words[:, cuda.STATUS] == 0) & (words[:, cuda.WIDE] == 0)


def enqueue(queries: torch.Tensor, gallery: Gallery, *, k: int, inv_tau: float, b: float) -> Enqueued:
    """`attribute`, queued on the current stream without waiting for it, so that a CUDA graph can hold it.

    queries: [queries, dim] of float32 on the gallery's device, finite, |q| <= 2^30; b < 0.
    """
    k = similarity.check_settings(k, inv_tau, b)
    wanted = (torch.float32, gallery.device, gallery.dim)
    if queries.ndim != 2 or (queries.dtype, queries.device, queries.shape[1]) != wanted or b == 0:
        raise ValueError(
            f"enqueue: wanted float32 queries [queries, {gallery.dim}] on {gallery.device} and b < 0, got "
            f"{queries.dtype} {list(queries.shape)} on {queries.device} and b = {b}"
        )
    search = Settings(k, float(inv_tau), float(b)).search()
    require_current(gallery.device)
    capacity, first, growth = plan_chunks(search.k, search.window, gallery.rows, len(queries))
    values = queries.detach().contiguous()
    which = np.arange(len(values))
    batch = Batch(gallery.library, gallery.device, gallery.storage, which, values, None, capacity)
    batch.note(gallery.shards, gallery.largest)
    for index, rows in enumerate(gallery.shards):
        batch.walk(index, rows, first, growth, search)
    norms = torch.linalg.vector_norm(values, dim=1)
    largest = norms.amax() if len(values) else norms.sum()
    return Enqueued(batch, largest, *batch.enqueue_answers(search))


def canonical_scores(
    queries: Any, gallery: Any, ids: Any, *, scale: Any = None, offset: Any = None
) -> np.ndarray:
    """What attribution.similarity.canonical_scores says, with impl="cuda"."""
    call = Call(queries, gallery, scale, offset)
    rows = arrays.ids(_on_host(ids), len(call.queries), call.rows)
    if not rows.size or not call.rows:
        return np.full(rows.shape, -np.inf, np.float32)
    if isinstance(call.gallery, Streamed):  # a few rows here and there: not worth the way
        return similarity.canonical_scores(queries, gallery, rows, scale=scale, offset=offset, impl="cpu")
    shards, largest = call.gallery.scaled(call.scale)
    batch = call.batch(np.arange(len(rows)), 1)
    batch.note(shards, largest)
    return batch.score(rows)


def retrieve_part(
    queries: Any,
    gallery: Any,
    *,
    first_row: int,
    k: int,
    inv_tau: float,
    b: float,
    scale: Any = None,
    offset: Any = None,
) -> parts.Part:
    """What attribution.parts.retrieve_part says; merges with parts from anywhere."""
    k = similarity.check_settings(k, inv_tau, b)
    call = Call(queries, gallery, scale, offset)
    if not call.rows or not len(call.queries):
        nothing = np.zeros((0, call.queries.shape[1]), np.float32)
        return parts.retrieve_part(call.queries, nothing, first_row=first_row, k=k, inv_tau=inv_tau, b=b)
    settings, count = Settings(k, float(inv_tau), float(b)), len(call.queries)
    gathered: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0), np.empty(0))] * count
    wide = np.zeros(count, bool)
    for batch in _walked(call, settings, np.arange(count)):
        wide[batch.which] = batch.wide()
        begin, ids, scores = batch.candidates(np.ones(len(batch.which), bool))
        for i, q in enumerate(batch.which):
            gathered[q] = ids[begin[i] : begin[i + 1]], scores[begin[i] : begin[i + 1]]
    begin = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in gathered])]).astype(np.int64)
    ids = np.concatenate([ids for ids, _ in gathered])
    scores = np.concatenate([scores for _, scores in gathered])
    part = _part(call, settings, np.arange(count), (begin, ids, scores, wide))
    part.ids[:] += first_row
    return part


def weigh(
    queries: Any, gallery: Any, whole: parts.Part, *, scale: Any = None, offset: Any = None
) -> parts.Mass:
    """What attribution.parts.weigh says."""
    call = Call(queries, gallery, scale, offset)
    if len(call.queries) != len(whole.wide):
        raise ValueError(f"weigh: wanted the part's {len(whole.wide)} queries, got {len(call.queries)}")
    return _weigh(call, Settings(whole.k, whole.inv_tau, whole.b), np.arange(len(whole.wide)), whole)


def _walked(call: Call, settings: Settings, which: np.ndarray) -> Iterator[Batch]:
    """Batches whose candidates are final and sorted; who overflowed comes again, with care."""
    search = settings.search()
    capacity, first, growth = plan_chunks(search.k, search.window, call.rows, len(which))
    again = []
    for group in call.groups(which, 12 * capacity):
        batches = [call.batch(some, capacity) for some in group]
        streamed = isinstance(call.gallery, Streamed)
        for batch, index, rows in call.sources(batches):
            if streamed:
                batch.walk_carefully(index, rows, first, growth, search)
                batch.settle(search)  # while the rows are here
            else:
                batch.walk(index, rows, first, growth, search)
        for batch in batches:
            overflowed = batch.finish(search)
            again.append(batch.which[overflowed])
            yield batch.without(overflowed)
            batch.release()
    left = np.concatenate(again)
    for (some,) in call.groups(left, 12 * capacity) if len(left) else []:
        batch = call.batch(some, capacity)
        for _, index, rows in call.sources([batch]):
            batch.walk_carefully(index, rows, first, growth, search)
        batch.finish(search)
        yield batch
        batch.release()


def plan_chunks(k: int, window: int, rows: int, queries: int) -> tuple[int, int, int]:
    """Room for candidates, rows of the first chunk, and how much longer what was seen is after each chunk.

    A chunk emits about (growth - 1) times what the rows before it keep, if rows come in no order: k, a third
    more for the filter's error, and the window. It need not be so: a query that gets more is walked again.
    """
    most = k + max(window, k // 2 + 64)
    fresh = max(4096, 12 * k)
    # Every hit holds up a tile of many queries; few queries have few hits, and pay for each chunk.
    most_growth = 16 if queries <= 64 else 4
    growth = min(most_growth, max(2, int(1 + 0.5 * fresh / (1.4 * k + 64))))
    first = -(-max(4096, 2 * k) // 256) * 256
    return min(most + fresh, max(rows, 1)), first, growth


def _part(call: Call, settings: Settings, which: np.ndarray, found: tuple[np.ndarray, ...]) -> parts.Part:
    begin, ids, scores, wide = found
    assert settings.inv_tau is not None
    tops, bins = np.empty(0, np.int64), np.empty((0, 8), np.uint64)
    beyond = np.empty(0, bool)
    if settings.b == 0:
        best = scores[begin[:-1]].astype(np.float64) * settings.inv_tau
        shifted = np.clip(best, -(2.0**20), 2.0**20) * float.fromhex("0x1.71547652b82fep+0") + 1.5 * 2.0**52
        tops = (shifted.view(np.int64) - 0x4338000000000000) >> 5  # of exponential.h
        words = _tally(
            call,
            which,
            cuda.SOFTMAX,
            cuda.SOFTMAX_WORDS,
            best=scores[begin[:-1]],
            top=tops,
            settings=settings,
        )
        beyond = words[:, 12] != 0
        limbs = words[:, :12].reshape(-1, 4, 3).astype(object)
        sums = limbs[..., 0] + (limbs[..., 1] * 2**32) + (limbs[..., 2] * 2**64)
        bins = np.stack([sums // 2**64, sums % 2**64], axis=2).reshape(-1, 8).astype(np.uint64)
    arrays_of_part = (begin, ids, scores, wide, tops, bins, beyond)
    return parts.Part(settings.k, settings.inv_tau, settings.b, call.rows, *arrays_of_part)


def _weigh(call: Call, settings: Settings, which: np.ndarray, part: parts.Part) -> parts.Mass:
    needed = np.flatnonzero(part.needs_mass)
    words = np.zeros((len(which), cuda.MASS_WORDS), np.uint64)
    if len(needed) and call.rows:
        best = part.scores[part.begin[:-1][needed]]
        words[needed] = _tally(call, which[needed], cuda.MASS, cuda.MASS_WORDS, best=best, settings=settings)
    shift, mask = np.uint64(32), np.uint64(2**32 - 1)
    carried = words[:, 1] + (words[:, 0] >> shift)
    low = (carried << shift) | (words[:, 0] & mask)
    return parts.Mass(words[:, 2].astype(np.int64), carried >> shift, low)


def _tally(
    call: Call,
    which: np.ndarray,
    kind: int,
    words: int,
    *,
    best: np.ndarray | None = None,
    top: np.ndarray | None = None,
    thresholds: np.ndarray | None = None,
    or_equal: bool = False,
    settings: Settings | None = None,
) -> np.ndarray:
    """[queries, words] sums over the canonical scores of all rows."""
    sums = np.zeros((len(which), words), np.uint64)
    position = np.empty(int(which.max(initial=-1)) + 1, np.int64)
    position[which] = np.arange(len(which))
    inv_tau, b = (1.0, 0.0) if settings is None else (settings.inv_tau or 1.0, settings.b)
    for group in call.groups(which, 12 * 64):
        batches = [call.batch(some, 1) for some in group]
        for batch in batches:
            at = position[batch.which]
            chosen = [None if values is None else values[at] for values in (best, top, thresholds)]
            batch.begin_tally(words, chosen, or_equal, inv_tau, b)
        for batch, index, _ in call.sources(batches):
            batch.tally(index, kind)
        for batch in batches:
            sums[position[batch.which]] = batch.tallied()
    return sums


def _of_nothing(call: Call, k: int, inv_tau: float, b: float) -> similarity.Attribution:
    """Without queries or rows there is nothing for a GPU to do."""
    nothing = np.zeros((0, call.queries.shape[1]), np.float32)
    found = similarity.attribute(call.queries, nothing, k=k, inv_tau=inv_tau, b=b, impl="cpu")
    fields = (found.ids, found.scores, found.influence, found.support, found.support_mass, found.remainder)
    return similarity.Attribution(*fields, "cuda")


def _on_host(values: Any) -> Any:
    return values.detach().cpu() if isinstance(values, torch.Tensor) and values.is_cuda else values


def _is_cuda_sequence(gallery: Any) -> bool:
    return isinstance(gallery, list | tuple) and bool(gallery) and getattr(gallery[0], "is_cuda", False)
