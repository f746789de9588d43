"""What a part of a gallery says about a query, found on a GPU: it merges with parts from anywhere."""

from typing import Any

import numpy as np

from attribution import cuda_library as cuda
from attribution import parts, similarity
from attribution.cuda_call import Call, Settings
from attribution.cuda_walk import tally, walked


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
    for batch in walked(call, settings, np.arange(count)):
        wide[batch.which] = batch.wide()
        begin, ids, scores = batch.candidates(np.ones(len(batch.which), bool))
        for i, q in enumerate(batch.which):
            gathered[q] = ids[begin[i] : begin[i + 1]], scores[begin[i] : begin[i + 1]]
    begin = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in gathered])]).astype(np.int64)
    ids = np.concatenate([ids for ids, _ in gathered])
    scores = np.concatenate([scores for _, scores in gathered])
    part = part_of(call, settings, np.arange(count), (begin, ids, scores, wide))
    part.ids[:] += first_row
    return part


def weigh(
    queries: Any, gallery: Any, whole: parts.Part, *, scale: Any = None, offset: Any = None
) -> parts.Mass:
    """What attribution.parts.weigh says."""
    call = Call(queries, gallery, scale, offset)
    if len(call.queries) != len(whole.wide):
        raise ValueError(f"weigh: wanted the part's {len(whole.wide)} queries, got {len(call.queries)}")
    return mass_of(call, Settings(whole.k, whole.inv_tau, whole.b), np.arange(len(whole.wide)), whole)


def part_of(call: Call, settings: Settings, which: np.ndarray, found: tuple[np.ndarray, ...]) -> parts.Part:
    """The part of these queries, from begin, ids, scores and width of what was found for each."""
    begin, ids, scores, wide = found
    assert settings.inv_tau is not None
    tops, bins = np.empty(0, np.int64), np.empty((0, 8), np.uint64)
    beyond = np.empty(0, bool)
    if settings.b == 0:
        best = scores[begin[:-1]].astype(np.float64) * settings.inv_tau
        shifted = np.clip(best, -(2.0**20), 2.0**20) * float.fromhex("0x1.71547652b82fep+0") + 1.5 * 2.0**52
        tops = (shifted.view(np.int64) - 0x4338000000000000) >> 5  # of exponential.h
        words = tally(
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
    return parts.Part(
        settings.k, settings.inv_tau, settings.b, similarity.WINDOW_CAP, call.rows, *arrays_of_part
    )


def mass_of(call: Call, settings: Settings, which: np.ndarray, part: parts.Part) -> parts.Mass:
    """All weights summed exactly, of the queries that need it."""
    needed = np.flatnonzero(part.needs_mass)
    words = np.zeros((len(which), cuda.MASS_WORDS), np.uint64)
    if len(needed) and call.rows:
        best = part.scores[part.begin[:-1][needed]]
        words[needed] = tally(call, which[needed], cuda.MASS, cuda.MASS_WORDS, best=best, settings=settings)
    shift, mask = np.uint64(32), np.uint64(2**32 - 1)
    carried = words[:, 1] + (words[:, 0] >> shift)
    low = (carried << shift) | (words[:, 0] & mask)
    return parts.Mass(words[:, 2].astype(np.int64), carried >> shift, low)
