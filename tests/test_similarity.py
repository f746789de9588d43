"""Retrieval is exact: against a float64 oracle, and bit for bit against the plain reference."""

import numpy as np
import pytest
import torch

from attribution import similarity
from tests import oracle

IMPLEMENTATIONS = ("reference", "cpu")
SHARP = {"inv_tau": 16.0, "b": -0.04}


def both(queries, gallery, **arguments):
    return [similarity.attribute(queries, gallery, impl=impl, **arguments) for impl in IMPLEMENTATIONS]


def assert_same(a: similarity.Attribution, b: similarity.Attribution, exact: bool = True) -> None:
    """exact: bit for bit. Otherwise influence may differ by a rounding, as the reference's sums do."""
    for field in ("ids", "scores", "support"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field), err_msg=field)
    for field in ("influence", "support_mass", "remainder"):
        x, y = getattr(a, field), getattr(b, field)
        if exact:
            np.testing.assert_array_equal(x, y, err_msg=field)
        else:
            np.testing.assert_allclose(x, y, rtol=3e-7, atol=1e-12, err_msg=field)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("inv_tau", "b"), [(16.0, -0.04), (1.0, -0.9), (50.0, -1e-6), (5.0, 0.0)])
def test_agrees_with_the_float64_oracle(impl: str, inv_tau: float, b: float) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(1), 7, 1009, 96)
    got = similarity.attribute(queries, gallery, k=20, inv_tau=inv_tau, b=b, impl=impl)
    want = oracle.answer(queries, gallery, inv_tau, b)
    plain_scores, plain_influence = oracle.plain_float32(queries, gallery, inv_tau, b)

    order = np.argsort(-want.scores, axis=1)[:, :20]
    np.testing.assert_array_equal(got.ids, order)
    score_error = np.abs(got.scores - np.take_along_axis(want.scores, order, 1)).max()
    assert score_error <= 2 * np.abs(plain_scores - want.scores).max() + 1e-6
    influence_error = np.abs(got.influence - np.take_along_axis(want.influence, order, 1)).max()
    assert influence_error <= 2 * np.abs(plain_influence - want.influence).max() + 1e-6
    np.testing.assert_array_equal(got.support, want.support)
    shown = np.take_along_axis(want.influence, order, 1).sum(axis=1)
    np.testing.assert_allclose(got.support_mass, shown, atol=1e-6)
    np.testing.assert_allclose(got.remainder, 1 - shown, atol=1e-6)
    assert got.impl == impl


# In threes: aligned to the kernels' tiles, ragged in rows, ragged in depth; tiles +-1 and primes.
@pytest.mark.parametrize("dim", [1, 8, 64, 101])
@pytest.mark.parametrize("rows", [1, 95, 96, 97, 131, 1536, 2003])
@pytest.mark.parametrize("count", [1, 8, 33])
def test_every_size_agrees_with_the_reference(count: int, rows: int, dim: int) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(rows * dim + count), count, rows, dim)
    reference, fast = both(queries, gallery, k=10, **SHARP)
    assert_same(reference, fast, exact=False)
    levels = reference.scores[:, : min(3, rows)]
    for or_equal in (False, True):
        counts = [
            similarity.count_larger(queries, gallery, levels, or_equal=or_equal, impl=impl)
            for impl in IMPLEMENTATIONS
        ]
        np.testing.assert_array_equal(*counts)


@pytest.mark.parametrize("isa", similarity.load_extension().instruction_sets())
def test_a_short_row_beside_a_long_one_keeps_its_own_error(isa: str, monkeypatch) -> None:
    """Rows along what rounding took from a query: nothing is seen of their scores, and all is allowed for."""
    monkeypatch.setenv("ATTRIBUTION_ISA", isa)
    rng = np.random.default_rng(15)
    queries = rng.standard_normal((16, 200)).astype(np.float32)
    lost = queries - torch.from_numpy(queries).to(torch.bfloat16).to(torch.float32).numpy()
    gallery = 1e-4 * rng.standard_normal((2000, 200)).astype(np.float32)
    gallery[50::90] = -5 * queries.sum(axis=0)
    gallery[: 16 * 8] = np.linspace(1, 1.02, 8)[:, None].repeat(16, 0) * np.tile(oracle.unit(lost), (8, 1))
    gallery = gallery[rng.permutation(len(gallery))]
    rows = torch.from_numpy(gallery).to(torch.bfloat16)
    want, found = (similarity.search(queries, rows, k=4, impl=impl) for impl in IMPLEMENTATIONS)
    for a, b in zip(want, found, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (want[1] > 0.9 * np.linalg.norm(lost, axis=1, keepdims=True)).all()


# Every arrangement of rows of two bytes: of one query, of few, of sixteen, of tiles.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 7, 8, 31, 33, 96, 127])
@pytest.mark.parametrize("count", [1, 3, 7, 11, 16, 17])
def test_halves_of_every_size_agree_with_the_reference(count: int, dim: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(count * dim)
    for rows in (1, 3, 5, 98, 202):
        queries, gallery = oracle.planted(rng, count, rows, dim)
        halves = torch.from_numpy(gallery).to(dtype)
        mapped = {
            "scale": rng.uniform(0, 2, rows).astype(np.float32),
            "offset": rng.standard_normal(count).astype(np.float32),
        }
        for arguments in ({}, mapped):
            reference, fast = both(queries, halves, k=10, **SHARP, **arguments)
            assert_same(reference, fast, exact=False)
            counts = [
                similarity.count_larger(queries, halves, reference.scores[:, :3], impl=impl, **arguments)
                for impl in IMPLEMENTATIONS
            ]
            np.testing.assert_array_equal(*counts)


@pytest.mark.parametrize("k", [1, 2, 100, 499, 500, 501, 1200])
def test_k_up_to_and_beyond_the_gallery(k: int) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(2), 5, 500, 32)
    reference, fast = both(queries, gallery, k=k, **SHARP)
    assert_same(reference, fast, exact=False)
    assert fast.ids.shape == (5, k)
    assert (fast.ids[:, 500:] == -1).all()
    assert (fast.scores[:, 500:] == -np.inf).all()
    assert (fast.influence[:, 500:] == 0).all()
    assert (np.sort(fast.ids[:, :500]) >= 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("count", "rows"), [(0, 10), (3, 0), (0, 0)])
def test_nothing_in_nothing_out(impl: str, count: int, rows: int) -> None:
    queries, gallery = np.ones((count, 4), np.float32), np.ones((rows, 4), np.float32)
    got = similarity.attribute(queries, gallery, k=2, impl=impl, **SHARP)
    assert got.ids.shape == got.scores.shape == got.influence.shape == (count, 2)
    assert (got.ids == -1).all()
    assert (got.support == 0).all()
    assert (got.support_mass + got.remainder == 0).all()
    assert (
        similarity.count_larger(queries, gallery, np.zeros((count, 3)), impl=impl).tolist()
        == [[0] * 3] * count
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [50, 5000])
def test_ties_are_in_gallery_order(impl: str, rows: int) -> None:
    vectors = np.eye(4, dtype=np.float32)[np.arange(rows) % 4]
    got = similarity.attribute(np.eye(4, dtype=np.float32), vectors, k=7, impl=impl, **SHARP)
    np.testing.assert_array_equal(got.ids, np.arange(4)[:, None] + 4 * np.arange(7))
    assert (got.scores == 1).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_equal_vectors_score_equal_wherever_they_lie(impl: str) -> None:
    rng = np.random.default_rng(3)
    queries, gallery = oracle.planted(rng, 9, 700, 77)
    copies = rng.permutation(700)[:40]
    gallery[copies] = gallery[copies[0]]
    scores = similarity.canonical_scores(queries, gallery, np.tile(copies, (9, 1)), impl=impl)
    assert (scores == scores[:, :1]).all()
    larger = similarity.count_larger(queries, gallery, scores[:, :1], impl=impl)
    at_least = similarity.count_larger(queries, gallery, scores[:, :1], or_equal=True, impl=impl)
    assert (at_least - larger == 40).all()


def test_all_scores_equal() -> None:
    queries, gallery = np.ones((3, 16), np.float32), np.ones((20_011, 16), np.float32)
    got = similarity.attribute(queries, gallery, k=5, impl="cpu", **SHARP)
    assert (got.ids == np.arange(5)).all()
    np.testing.assert_allclose(got.influence, 1 / 20_011, rtol=1e-6)
    assert (got.support == 20_011).all()
    np.testing.assert_allclose(got.support_mass + got.remainder, 1, rtol=1e-6)


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_adversarially_ordered_scores(order: str) -> None:
    scores = np.linspace(-1, 1, 30_011, dtype=np.float32)
    if order == "descending":
        scores = scores[::-1]
    gallery = np.stack([scores, np.zeros_like(scores)], axis=1)
    queries = np.array([[1, 0], [-1, 0.5]], np.float32)
    reference, fast = both(queries, gallery, k=50, inv_tau=100.0, b=-0.5)
    assert_same(reference, fast, exact=False)


@pytest.mark.parametrize(("inv_tau", "b"), [(16.1587, -0.0385), (0.01, -0.5), (3.0, 0.0), (2000.0, 0.0)])
def test_a_window_too_wide_to_keep_gives_the_same_answer(inv_tau: float, b: float, monkeypatch) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(4), 6, 4001, 48)
    whole = similarity.attribute(queries, gallery, k=10, inv_tau=inv_tau, b=b, impl="cpu")
    monkeypatch.setattr(similarity, "WINDOW_CAP", 3)
    second_walk = similarity.attribute(queries, gallery, k=10, inv_tau=inv_tau, b=b, impl="cpu")
    assert_same(whole, second_walk)
    assert_same(
        similarity.attribute(queries, gallery, k=10, inv_tau=inv_tau, b=b, impl="reference"),
        whole,
        exact=False,
    )


def test_some_windows_wide_and_some_narrow() -> None:
    rng = np.random.default_rng(5)
    gallery = oracle.unit(rng.standard_normal((5000, 8)))
    queries = np.stack([rng.standard_normal(8) * size for size in (0.01, 5, 0.1, 30, 1)]).astype(np.float32)
    reference, fast = both(queries, gallery, k=4, **SHARP)
    assert_same(reference, fast, exact=False)
    assert fast.support.min() < 100
    assert fast.support.max() == 5000


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [1, 5, 256])
@pytest.mark.parametrize("b", [-0.04, -0.9, 0.0])
def test_threads_and_batching_change_no_bit(threads: int, batch: int, b: float, monkeypatch) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(6), 11, 3301, 40)
    want = similarity.attribute(queries, gallery, k=30, inv_tau=9.0, b=b, impl="cpu", threads=1)
    monkeypatch.setattr(similarity, "QUERY_BATCH", batch)
    got = similarity.attribute(queries, gallery, k=30, inv_tau=9.0, b=b, impl="cpu", threads=threads)
    assert_same(want, got)
    one = similarity.attribute(queries[4:5], gallery, k=30, inv_tau=9.0, b=b, impl="cpu", threads=threads)
    np.testing.assert_array_equal(one.influence, want.influence[4:5])


@pytest.mark.parametrize("cuts", [[1], [96, 97], [0, 0, 5, 5, 3301], [100, 1000, 2000, 3000]])
@pytest.mark.parametrize("b", [-0.04, 0.0])
def test_shards_are_one_gallery(cuts: list[int], b: float) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(7), 4, 3301, 40)
    shards = np.split(gallery, cuts)
    whole = similarity.attribute(queries, gallery, k=30, inv_tau=9.0, b=b, impl="cpu")
    assert_same(whole, similarity.attribute(queries, shards, k=30, inv_tau=9.0, b=b, impl="cpu"))
    levels = whole.scores[:, ::7]
    np.testing.assert_array_equal(
        similarity.count_larger(queries, gallery, levels), similarity.count_larger(queries, shards, levels)
    )
    ids = whole.ids[:, ::-3]
    np.testing.assert_array_equal(
        similarity.canonical_scores(queries, gallery, ids), similarity.canonical_scores(queries, shards, ids)
    )


def test_search_finds_what_attribute_finds() -> None:
    queries, gallery = oracle.planted(np.random.default_rng(8), 6, 900, 24)
    want = similarity.attribute(queries, gallery, k=12, **SHARP)
    for impl in IMPLEMENTATIONS:
        ids, scores = similarity.search(queries, gallery, k=12, impl=impl)
        np.testing.assert_array_equal(ids, want.ids)
        np.testing.assert_array_equal(scores, want.scores)


def test_many_thresholds_high_low_and_infinite() -> None:
    rng = np.random.default_rng(9)
    queries, gallery = oracle.planted(rng, 5, 1501, 24)
    levels = similarity.canonical_scores(queries, gallery, rng.integers(1501, size=(5, 67))).astype(
        np.float64
    )
    levels[:, :4] = [-np.inf, np.inf, -1e300, 1e300]
    all_scores = oracle.scores(queries, gallery)
    for or_equal in (False, True):
        got = similarity.count_larger(queries, gallery, levels, or_equal=or_equal, impl="cpu")
        want = similarity.count_larger(queries, gallery, levels, or_equal=or_equal, impl="reference")
        np.testing.assert_array_equal(got, want)
        assert got[:, :4].tolist() == [[1501, 0, 1501, 0]] * 5
        loose = (all_scores[:, None] > levels[:, :, None] + 1e-6).sum(axis=2)
        assert (got >= loose).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_thresholds_no_counts(impl: str) -> None:
    rows = np.ones((3, 5), np.float32)
    assert similarity.count_larger(rows, rows, np.empty((3, 0)), impl=impl).shape == (3, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("scaled", [False, True])
def test_levels_amid_the_scores_are_told_apart_to_the_last_bit(
    scaled: bool, count: int, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(count)
    rows, dim = 500, 203
    queries = rng.standard_normal((count, dim)).astype(np.float32)
    gallery = torch.from_numpy(rng.standard_normal((rows, dim)).astype(np.float32)).to(dtype)
    more = {}
    if scaled:
        more = {
            "scale": rng.uniform(0.5, 2, rows).astype(np.float32),
            "offset": rng.standard_normal(count).astype(np.float32),
        }
    _, found = similarity.search(queries, gallery, k=rows, impl="reference", **more)
    scores = found.astype(np.float64)
    hits = np.take_along_axis(found, rng.integers(rows, size=(count, 4)), 1)
    ends = [np.nextafter(hits, np.float32(end)) for end in (-np.inf, np.inf)]
    between = [hits + (end.astype(np.float64) - hits) / 4 for end in ends]
    levels = np.concatenate([hits, *ends, *between], axis=1).astype(np.float64)
    for or_equal in (False, True):
        above = np.greater_equal if or_equal else np.greater
        want = above(scores[:, None], levels[:, :, None]).sum(axis=2)
        got = similarity.count_larger(queries, gallery, levels, or_equal=or_equal, impl="cpu", **more)
        np.testing.assert_array_equal(got, want)


def test_scale_and_offset_stand_for_a_mapped_and_normalized_gallery() -> None:
    rng = np.random.default_rng(10)
    queries, gallery = oracle.planted(rng, 6, 1203, 30)
    weight, bias = rng.standard_normal((30, 30)) / 6 + np.eye(30), rng.standard_normal(30) / 10
    mapped = gallery @ weight.T + bias
    scale = (1 / np.linalg.norm(mapped, axis=1)).astype(np.float32)
    folded = (queries @ weight).astype(np.float32)
    offset = (queries @ bias).astype(np.float32)
    want = oracle.answer(queries, oracle.unit(mapped), 16.0, -0.04)
    for impl in IMPLEMENTATIONS:
        got = similarity.attribute(folded, gallery, k=9, scale=scale, offset=offset, impl=impl, **SHARP)
        order = np.argsort(-want.scores, axis=1)[:, :9]
        np.testing.assert_array_equal(got.ids, order)
        np.testing.assert_allclose(got.scores, np.take_along_axis(want.scores, order, 1), atol=3e-6)
        np.testing.assert_allclose(got.influence, np.take_along_axis(want.influence, order, 1), atol=1e-4)
    pair = both(folded, gallery, k=9, scale=scale, offset=offset, **SHARP)
    assert_same(*pair, exact=False)
    levels = pair[0].scores[:, :4]
    for or_equal in (False, True):
        counts = [
            similarity.count_larger(
                folded, gallery, levels, or_equal=or_equal, scale=scale, offset=offset, impl=impl
            )
            for impl in IMPLEMENTATIONS
        ]
        np.testing.assert_array_equal(*counts)
    shards = np.split(gallery, [17, 400])
    assert_same(
        pair[1], similarity.attribute(folded, shards, k=9, scale=scale, offset=offset, impl="cpu", **SHARP)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count", [1, 4, 5, 8, 16, 17, 33])
def test_values_of_which_rounding_takes_most(count: int, dtype: torch.dtype) -> None:
    """1 + 2^-8 loses 2^-8 of it as bfloat16, 2 - 2^-8 half as much; with few dims nothing averages out."""
    rng = np.random.default_rng(count)
    least = 2.0**-20 if dtype == torch.float32 else 2.0**-10
    steps = np.array([1, 3, -0.5, -1.5])[:, None] * 2.0**-8 + np.array([-least, 0, least])
    for dim in (1, 2, 3, 7):
        queries = rng.choice([1.0, 1 + 2.0**-8], size=(count, dim)).astype(np.float32)
        gallery = torch.from_numpy(rng.choice(1 + steps.flatten(), size=(200, dim)).astype(np.float32)).to(
            dtype
        )
        ids, scores = similarity.search(queries, gallery, k=200, impl="reference")
        for k in (1, 10):
            found = similarity.search(queries, gallery, k=k, impl="cpu")
            np.testing.assert_array_equal(found[0], ids[:, :k])
            np.testing.assert_array_equal(found[1], scores[:, :k])
        levels = scores[:, ::7].astype(np.float64)
        want = (scores[:, None] > levels[:, :, None]).sum(axis=2)
        np.testing.assert_array_equal(similarity.count_larger(queries, gallery, levels, impl="cpu"), want)


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-18, 1e15, 3e18])
def test_values_near_the_ends_of_float32(size: float) -> None:
    rng = np.random.default_rng(11)
    queries = rng.standard_normal((3, 16)).astype(np.float32)
    gallery = (rng.standard_normal((2500, 16)) * size).astype(np.float32)
    gallery[::5] *= np.float32(1e-3)
    for arguments in (
        {"inv_tau": 1.0, "b": -0.5},
        {"inv_tau": 1 / size if size > 1e-40 else 1.0, "b": -0.04},
    ):
        reference, fast = both(queries, gallery, k=10, **arguments)
        assert_same(reference, fast, exact=False)


@pytest.mark.parametrize("size", [1e20, 1e30])
def test_scores_whose_partial_sums_leave_float32(size: float) -> None:
    big = np.float32(size)
    queries = np.array([[big, big, 1, 0]], np.float32)
    gallery = np.array([[big, -big, i, 0] for i in range(300)], np.float32)
    for impl in IMPLEMENTATIONS:
        ids, scores = similarity.search(queries, gallery, k=3, impl=impl)
        assert (ids >= 0).all()
        assert np.isfinite(scores).all()
    np.testing.assert_array_equal(
        *[similarity.search(queries, gallery, k=3, impl=i)[0] for i in IMPLEMENTATIONS]
    )
    gallery[123, 1] = big
    for impl in IMPLEMENTATIONS:
        with pytest.raises(
            ValueError, match="query row 0 and gallery row 123: their score is beyond the range"
        ):
            similarity.search(queries, gallery, k=3, impl=impl)


def test_zeros_of_both_signs_are_one_score() -> None:
    queries = np.array([[1.0, 0.0], [-1.0, -0.0]], np.float32)
    gallery = np.array([[-0.0, 1.0], [0.0, -1.0], [0.0, 0.0], [-0.0, -0.0]], np.float32)
    for got in both(queries, gallery, k=4, **SHARP):
        assert (got.ids == np.arange(4)).all()
        assert not np.signbit(got.scores).any()
    assert (
        similarity.count_larger(queries, gallery, np.full((2, 1), -0.0), or_equal=True, impl="cpu") == 4
    ).all()


def test_a_known_world_has_its_closed_form() -> None:
    """With one neighbour planted at cosine c, P(rank 1) = P(a random cosine is below c)^N."""
    rng = np.random.default_rng(12)
    count, rows, cosine = 400, 2000, 0.75
    queries = oracle.unit(rng.standard_normal((count, 8)))
    aside = rng.standard_normal((count, 8))
    aside = oracle.unit(aside - (aside * queries).sum(1, keepdims=True) * queries)
    neighbours = oracle.unit(cosine * queries + np.sqrt(1 - cosine**2) * aside)
    others = oracle.unit(rng.standard_normal((rows, 8)))
    levels = (queries * neighbours).sum(1, keepdims=True)
    larger = similarity.count_larger(queries, others, levels)
    # The cosine of a random direction in 8 dimensions: density (1 - t^2)^(5/2), tail by quadrature.
    t = np.linspace(-1, 1, 200_001)
    density = (1 - t**2) ** 2.5
    tail = density[t > cosine].sum() / density.sum()
    expected = (1 - tail) ** rows
    assert abs((larger == 0).mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / count)
    assert abs(larger.mean() - rows * tail) < 0.1 * rows * tail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3, 8, 40])
@pytest.mark.parametrize("world", oracle.extremes())
def test_worlds_at_the_ends_of_the_range(world: str, count: int, dtype: torch.dtype) -> None:
    queries, rows, scale = oracle.extremes()[world]
    gallery = torch.from_numpy(rows).to(dtype)
    for k in (1, 10):
        want, got = (
            similarity.search(queries[:count], gallery, k=k, scale=scale, impl=impl)
            for impl in IMPLEMENTATIONS
        )
        np.testing.assert_array_equal(want[0], got[0])
        np.testing.assert_array_equal(want[1], got[1])
    for or_equal in (False, True):
        counts = [
            similarity.count_larger(
                queries[:count], gallery, want[1][:, :3], or_equal=or_equal, scale=scale, impl=impl
            )
            for impl in IMPLEMENTATIONS
        ]
        np.testing.assert_array_equal(*counts)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_score_that_rounds_to_zero_has_no_sign(impl: str) -> None:
    rows = np.array([[-1e-30]], np.float32)
    _, scores = similarity.search(-rows, rows, k=1, impl=impl)
    assert not np.signbit(scores[0, 0])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_thresholds_and_ids_of_bfloat16(impl: str) -> None:
    queries, gallery = np.ones((1, 1), np.float32), np.array([[1.0], [0.25]], np.float32)
    thresholds = torch.tensor([[0.5]], dtype=torch.bfloat16)
    assert similarity.count_larger(queries, gallery, thresholds, impl=impl)[0, 0] == 1
    with pytest.raises(TypeError, match=r"ids: wanted integers, got bfloat16"):
        similarity.canonical_scores(queries, gallery, torch.ones((1, 1), dtype=torch.bfloat16), impl=impl)
