"""What holds for any input, searched for counterexamples by hypothesis."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution import similarity
from tests import oracle


@st.composite
def worlds(draw: st.DrawFn):
    """Small worlds with many ties: values on a coarse grid, some rows copied, some of them huge or tiny."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count, rows, dim = draw(st.integers(1, 6)), draw(st.integers(1, 260)), draw(st.integers(1, 20))
    grid = draw(st.sampled_from([1, 2, 8, 1000]))
    queries = (rng.integers(-grid, grid + 1, (count, dim)) / grid).astype(np.float32)
    gallery = (rng.integers(-grid, grid + 1, (rows, dim)) / grid).astype(np.float32)
    gallery[rng.integers(rows, size=rows // 3)] = gallery[0]
    gallery *= draw(st.sampled_from([1.0, 1.0, 1.0, 1e-20, 1e15, 1e-41]))
    k = draw(st.integers(1, rows + 5))
    inv_tau = draw(st.floats(0.01, 200)) / max(float(np.abs(gallery).max()), 1e-30)
    b = draw(st.one_of(st.just(0.0), st.floats(-0.999, -1e-6)))
    return queries, gallery, {"k": k, "inv_tau": inv_tau, "b": b}


def check_against_the_reference(
    world, window: int, batch: int, threads: int, cuts: list[int], prepare=lambda shards: shards
) -> None:
    queries, gallery, arguments = world
    want = similarity.attribute(queries, gallery, impl="reference", **arguments)
    before = similarity.WINDOW_CAP, similarity.QUERY_BATCH
    try:
        similarity.WINDOW_CAP, similarity.QUERY_BATCH = window, batch
        shards = np.split(gallery, sorted(cut % (len(gallery) + 1) for cut in cuts))
        got = similarity.attribute(queries, prepare(shards), impl="cpu", threads=threads, **arguments)
    finally:
        similarity.WINDOW_CAP, similarity.QUERY_BATCH = before
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_array_equal(got.scores, want.scores)
    np.testing.assert_allclose(got.influence, want.influence, rtol=3e-7, atol=1e-15)
    np.testing.assert_allclose(got.support_mass, want.support_mass, rtol=3e-7)
    np.testing.assert_allclose(got.remainder, want.remainder, rtol=3e-7, atol=1e-15)
    # Where exp(...) + b is zero but for the rounding of exp, either count is right.
    assert (np.abs(got.support - want.support) <= borderline(queries, gallery, arguments)).all()


def borderline(queries, gallery, arguments) -> np.ndarray:
    scores = similarity.canonical_scores(
        queries, gallery, np.tile(np.arange(len(gallery)), (len(queries), 1))
    )
    scores = scores.astype(np.float64)
    depth = arguments["inv_tau"] * (scores - scores.max(axis=1, keepdims=True))
    return (np.abs(np.exp(depth) + arguments["b"]) < 1e-14).sum(axis=1)


walks = {
    "window": st.sampled_from([0, 1, 7, 2048]),
    "batch": st.sampled_from([1, 3, 256]),
    "threads": st.integers(1, 3),
    "cuts": st.lists(st.integers(0, 1000), max_size=4),
}


@settings(max_examples=150, deadline=None)
@given(world=worlds(), **{name: walks[name] for name in walks})
def test_any_walk_over_any_world_gives_the_reference_answer(world, window, batch, threads, cuts) -> None:
    check_against_the_reference(world, window, batch, threads, cuts)


@pytest.mark.nightly
@settings(max_examples=10_000, deadline=None)
@given(world=worlds(), **{name: walks[name] for name in walks})
def test_ten_thousand_walks_give_the_reference_answer(world, window, batch, threads, cuts) -> None:
    check_against_the_reference(world, window, batch, threads, cuts)


@st.composite
def far_worlds(draw: st.DrawFn):
    """Anywhere in float32's range, with scales and offsets that lead scores back into it, or do not."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, dim = draw(st.sampled_from([1, 50, 97, 400])), draw(st.sampled_from([1, 3, 8, 17, 65]))
    count = draw(st.sampled_from([1, 2, 4, 5, 9, 17, 40]))
    of_queries, of_scores = draw(st.integers(-149, 126)), draw(st.integers(-100, 100))
    apart = draw(st.sampled_from([0, 0.02, 1])) > rng.random(rows)
    of_rows = draw(st.integers(-149, 120)) + apart * rng.integers(-60, 60, rows)
    kind = draw(st.sampled_from(["normal", "alike", "sparse", "skewed"]))
    values = rng.standard_normal((rows, dim))
    if kind == "alike":
        values = rng.standard_normal(dim) * (1 + 1e-7 * values)
    elif kind == "sparse":
        values[rng.random(rows) < 0.6] = 0
    elif kind == "skewed":
        values[:, 0] *= 1e4
    arguments = {}
    if draw(st.booleans()):
        of_scale = of_scores - of_queries - (of_rows if draw(st.booleans()) else of_rows[0])
        scale = np.ldexp(rng.uniform(1, 2, rows), np.clip(of_scale, -149, 126))
        scale[rng.random(rows) < 0.01] = 0
        scale[rng.random(rows) < draw(st.sampled_from([0, 0.05]))] = np.finfo(np.float32).max
        arguments["scale"] = scale.astype(np.float32)
    if draw(st.booleans()):
        of_offset = np.clip(of_queries + of_rows[0] + draw(st.integers(-30, 30)), -149, 120)
        arguments["offset"] = np.ldexp(rng.standard_normal(count), of_offset).astype(np.float32)
    queries = np.ldexp(rng.standard_normal((count, dim)), min(of_queries, 124)).astype(np.float32)
    gallery = np.ldexp(values, np.clip(of_rows, -160, 110)[:, None]).astype(np.float32)
    return queries, gallery, draw(st.sampled_from([1, 3, 10, 60])), arguments


def check_far_world(world) -> None:
    queries, gallery, k, arguments = world
    compressed = similarity.compress(gallery)
    try:
        want = similarity.search(queries, gallery, k=k, impl="reference", **arguments)
    except ValueError:  # a score beyond the range
        for one in (gallery, compressed):
            with pytest.raises(ValueError, match="beyond the range"):
                similarity.search(queries, one, k=k, **arguments)
        return
    levels = np.where(np.isfinite(want[1]), want[1], 0)[:, [0, k // 2]].astype(np.float64)
    larger = similarity.count_larger(queries, gallery, levels, impl="reference", **arguments)
    for one in (gallery, compressed):
        for got, wanted in zip(similarity.search(queries, one, k=k, **arguments), want, strict=True):
            np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(similarity.count_larger(queries, one, levels, **arguments), larger)


@settings(max_examples=150, deadline=None)
@given(world=far_worlds())
def test_worlds_anywhere_in_the_range_give_the_reference_answer(world) -> None:
    check_far_world(world)


@pytest.mark.nightly
@settings(max_examples=10_000, deadline=None)
@given(world=far_worlds())
def test_ten_thousand_worlds_anywhere_give_the_reference_answer(world) -> None:
    check_far_world(world)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(2, 400), b=st.sampled_from([0.0, -0.04, -0.5]))
def test_permuting_the_gallery_permutes_the_answer(seed: int, rows: int, b: float) -> None:
    rng = np.random.default_rng(seed)
    queries, gallery = oracle.planted(rng, 3, rows, 12)
    order = rng.permutation(rows)
    before = similarity.attribute(queries, gallery, k=6, inv_tau=16.0, b=b)
    after = similarity.attribute(queries, gallery[order], k=6, inv_tau=16.0, b=b)
    np.testing.assert_array_equal(after.scores, before.scores)
    # Equal scores stand in the order of their rows, which the permutation changes.
    differs = before.scores[:, 1:] != before.scores[:, :-1]
    alone = np.pad(differs, ((0, 0), (1, 0)), constant_values=True)[:, :-1] & differs
    moved = np.where(after.ids < 0, -1, order[after.ids])
    np.testing.assert_array_equal(moved[:, :-1][alone], before.ids[:, :-1][alone])
    np.testing.assert_array_equal(after.influence, before.influence)
    np.testing.assert_array_equal(after.remainder, before.remainder)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), shift=st.floats(-3, 3, width=32))
def test_shifting_every_score_leaves_the_influence(seed: int, shift: float) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(seed), 3, 300, 12)
    before = similarity.attribute(queries, gallery, k=5, inv_tau=16.0, b=-0.04)
    offset = np.full(3, shift, np.float32)
    after = similarity.attribute(queries, gallery, k=5, inv_tau=16.0, b=-0.04, offset=offset)
    np.testing.assert_allclose(after.scores, before.scores + np.float32(shift), atol=1e-6)
    np.testing.assert_allclose(after.influence, before.influence, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), b=st.floats(-0.9, -0.01), more=st.integers(1, 500))
def test_distractors_below_the_cut_change_nothing(seed: int, b: float, more: int) -> None:
    rng = np.random.default_rng(seed)
    queries, gallery = oracle.planted(rng, 1, 200, 12)
    before = similarity.attribute(queries, gallery, k=5, inv_tau=16.0, b=b)
    cut = before.scores[0, 0] + np.log(-b) / 16.0
    others = oracle.unit(rng.standard_normal((more, 12)))
    others = others[others @ queries[0] < min(cut, before.scores[0, -1]) - 1e-3]
    after = similarity.attribute(queries, np.concatenate([gallery, others]), k=5, inv_tau=16.0, b=b)
    for field in ("ids", "scores", "influence", "support", "remainder"):
        np.testing.assert_array_equal(getattr(after, field), getattr(before, field))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), levels=st.lists(st.floats(-0.99, 0), min_size=2, max_size=5))
def test_support_shrinks_as_b_falls(seed: int, levels: list[float]) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(seed), 2, 300, 12)
    supports = [
        similarity.attribute(queries, gallery, k=1, inv_tau=8.0, b=b).support
        for b in sorted(levels, reverse=True)
    ]
    assert (np.diff(np.array(supports), axis=0) <= 0).all()
