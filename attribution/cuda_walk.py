"""Walks over all rows: one for the best of them, in chunks that grow, and one that sums over them."""

from collections.abc import Iterator

import numpy as np

from attribution.cuda_batch import Batch
from attribution.cuda_call import Call, Settings
from attribution.cuda_gallery import Gallery, always_coded
from attribution.cuda_streamed import Streamed

WIDE_QUERIES = 32  # whose codes have 16 bits, in two lines of the 64 that few queries may have
MOST_CODED_K = 256  # of more queries: beyond it they propose too many rows
# How many rows the filter keeps for each of the best k, in a gallery of random rows, by what it reads.
KEPT = {None: 1.4, "wide_codes": 4.0, "codes": 8.0}


def walked(call: Call, settings: Settings, which: np.ndarray) -> Iterator[Batch]:
    """Batches whose candidates are final and sorted; who overflowed comes again, with care."""
    search = settings.search()
    operand = coded_operand(call.gallery, len(which), search.k)
    capacity, first, growth = plan_chunks(search.k, search.window, call.rows, len(which), operand)
    again = []
    for group in call.groups(which, 12 * capacity):
        batches = [call.batch(some, capacity, operand=operand) for some in group]
        streamed = isinstance(call.gallery, Streamed)
        for batch, index, rows in call.sources(batches, coded=operand is not None):
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
    capacity, first, growth = plan_chunks(search.k, search.window, call.rows, len(left))
    for (some,) in call.groups(left, 12 * capacity) if len(left) else []:
        batch = call.batch(some, capacity)
        for _, index, rows in call.sources([batch]):
            batch.walk_carefully(index, rows, first, growth, search)
        batch.finish(search)
        yield batch
        batch.release()


def coded_operand(gallery: Gallery | Streamed, queries: int, k: int) -> str | None:
    """Which codes the filter reads, or None for values: where they are not there or not worth it."""
    if not isinstance(gallery, Gallery) or gallery.coded is None:
        return None
    if queries <= WIDE_QUERIES:
        return "wide_codes"
    return "codes" if k <= MOST_CODED_K or always_coded() else None


def plan_chunks(
    k: int, window: int, rows: int, queries: int, operand: str | None = None
) -> tuple[int, int, int]:
    """Room for candidates, rows of the first chunk, and how much longer what was seen is after each chunk.

    A chunk emits about (growth - 1) times what the rows before it keep, if rows come in no order: k, more for
    the filter's error, and the window. It need not be so: a query that gets more is walked again.
    """
    most = k + max(window, k // 2 + 64)
    fresh = max(4096, 12 * k)
    if operand is not None:
        fresh = max(fresh, 65536 if operand == "wide_codes" else 8192, 16 * k)
    # Every hit holds up a tile of many queries; few queries have few hits, and pay for each chunk.
    most_growth = 16 if queries <= 64 else 4
    growth = min(most_growth, max(2, int(1 + 0.5 * fresh / (KEPT[operand] * k + 64))))
    first = -(-max(4096, 2 * k) // 256) * 256
    return min(most + fresh, max(rows, 1)), first, growth


def tally(
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
