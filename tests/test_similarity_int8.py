"""Codes, of a compressed gallery or made of values, give the bits of values; the error bound is certified."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from attribution import parts, similarity
from tests import oracle
from tests.test_similarity import SHARP, assert_same
from tests.test_similarity_properties import check_against_the_reference, walks, worlds

# The most queries for which each reads codes: beyond, values filter as fast.
MOST_CODED = {"avx512_amx": 256, "avx512_bf16": 256, "avx512f": 8, "avx2": 4, "portable": 2}
# Which make codes of values when they are read.
QUANTIZING = ("avx512_bf16", "avx512_bf16_zen4")
# And the most for which each reads sketches.
MOST_SKETCHED = {"avx512_amx": 4, "avx512_bf16": 4, "avx512f": 4, "avx2": 4, "portable": 0}
# What codes of sketches say of a value, in half steps, where the one before says nothing.
LEVELS = np.array([28, 48, 63, 81, 39, 56, 71, 102, 13, 44, 59, 76, 34, 52, 67, 87])
REFINEMENT = 1.25  # the step of two bits more, in those of sketches
LANES = {"avx512_amx": 16, "avx512_bf16": 16, "avx512f": 16, "avx2": 8, "portable": 4}
# The most queries whose codes have 16 bits, where codes are read at all.
MOST_FINE = {"avx512_amx": 4, "avx512_bf16": 8, "avx512f": 8, "avx2": 4, "portable": 2}
for of_isa in (MOST_CODED, MOST_SKETCHED, LANES, MOST_FINE):
    of_isa["avx512_bf16_zen4"] = of_isa["avx512_bf16"]  # which differs in how it reads memory
ISAS = similarity.load_extension().instruction_sets()
SETTINGS = (
    {"k": 10, "inv_tau": 16.0, "b": -0.04},  # few have weight
    {"k": 3, "inv_tau": 2.0, "b": -0.9},  # many do
    {"k": 10, "inv_tau": 5.0, "b": 0.0},  # all do
)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch) -> str:
    """Each instruction set, asking the codes of every block even where that costs more than it saves."""
    monkeypatch.setenv("ATTRIBUTION_ISA", request.param)
    monkeypatch.setenv("ATTRIBUTION_CODES", "always")
    return request.param


def assert_same_answers(queries, gallery, settings=SETTINGS, compressed=None, **arguments) -> None:
    coded = (gallery, similarity.compress(gallery) if compressed is None else compressed)

    def by_values(ask, one, *more, **named):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ATTRIBUTION_CODES", "never")
            return ask(queries, one, *more, **named, **arguments)

    for chosen in settings:
        want = by_values(similarity.attribute, gallery, **chosen)
        for one in coded:
            assert_same(want, similarity.attribute(queries, one, **chosen, **arguments))
    levels = want.scores[:, :3].astype(np.float64)
    levels = np.concatenate([np.where(np.isfinite(levels), levels, 0), np.zeros((len(levels), 1))], axis=1)
    for or_equal in (False, True):
        counts = by_values(similarity.count_larger, gallery, levels, or_equal=or_equal)
        for one in coded:
            got = similarity.count_larger(queries, one, levels, or_equal=or_equal, **arguments)
            np.testing.assert_array_equal(counts, got)
    ids = want.ids[:, ::-1]
    scores = [similarity.canonical_scores(queries, one, ids, **arguments) for one in coded]
    np.testing.assert_array_equal(*scores)


def awkward(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """Rows of every size, with an outlier, or all alike, or of zeros, or too small for a normal number."""
    gallery = rng.standard_normal((rows, dim)).astype(np.float32)
    gallery[::7] = oracle.unit(gallery[::7])
    gallery[1::7, 0] *= np.float32(1e6)
    gallery[2::7] *= np.float32(1e-41)
    gallery[3::7] = 0
    gallery[4::7] = gallery[4]
    gallery[5::7] *= np.float32(1e12)
    return gallery


@pytest.mark.parametrize("dim", [1, 7, 65, 513])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 33])
def test_every_size_gives_the_same_bits(isa: str, count: int, dim: int) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(dim * count), count, 997, dim)
    assert_same_answers(queries, gallery)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_storage_type_scale_offset_and_shards(isa: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    queries, gallery = oracle.planted(rng, 11, 1203, 40)
    shards = torch.from_numpy(gallery).to(dtype).split([0, 95, 97, 1000, 11])
    scale = rng.uniform(0.5, 2, len(gallery)).astype(np.float32)
    scale[::50] = 0
    offset = rng.standard_normal(len(queries)).astype(np.float32)
    for some in (slice(None), slice(2)):
        assert_same_answers(queries[some], list(shards), scale=scale, offset=offset[some])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_queries_and_rows_have_codes_made(dtype: torch.dtype) -> None:
    """As nothing else is said: enough of both that it pays."""
    rng = np.random.default_rng(14)
    queries, gallery = oracle.planted(rng, 40, 33_000, 420)
    gallery[5000:9000] += 3  # where codes say little
    assert_same_answers(queries, torch.from_numpy(gallery).to(dtype))


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e15])
@pytest.mark.parametrize("count", [2, 20])
def test_awkward_rows_give_the_same_bits(isa: str, count: int, size: float) -> None:
    rng = np.random.default_rng(2)
    gallery = awkward(rng, 700, 24)
    queries = (rng.standard_normal((count, 24)) * size).astype(np.float32)
    queries[0] = 0
    largest = float(np.abs(queries @ gallery.T).max())
    settings = [chosen | {"inv_tau": chosen["inv_tau"] / largest} for chosen in SETTINGS]
    assert_same_answers(queries, gallery, settings)


def test_neighbours_closer_than_a_code_can_tell_keep_their_order(isa: str) -> None:
    rng = np.random.default_rng(3)
    queries = oracle.unit(rng.standard_normal((9, 64)))
    gallery = oracle.unit(rng.standard_normal((3000, 64)))
    for q, query in enumerate(queries):  # differing in the last bits of a float
        near = 100 + 200 * q + np.arange(40)
        gallery[near] = query * np.float32(0.9) + rng.standard_normal((40, 64)).astype(np.float32) * 1e-7
    assert_same_answers(queries, gallery)
    assert_same_answers(queries[:1], gallery)


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("count", [1, 40])
def test_rows_whose_codes_say_nothing_fall_back(always: bool, count: int, monkeypatch) -> None:
    monkeypatch.setenv("ATTRIBUTION_CODES", "always" if always else "")
    rng = np.random.default_rng(4)
    gallery = rng.standard_normal((9000, 48)).astype(np.float32)
    gallery[2000:6000, 7] = 1000
    queries = rng.standard_normal((count, 48)).astype(np.float32)
    settings = [chosen | {"inv_tau": chosen["inv_tau"] / 50} for chosen in SETTINGS]
    for threads in (1, 3):
        assert_same_answers(queries, gallery, settings)
        compressed = similarity.compress(gallery, threads=threads)
        for chosen in settings:
            want = similarity.attribute(queries, gallery, **chosen)
            assert_same(want, similarity.attribute(queries, compressed, threads=threads, **chosen))


@pytest.mark.parametrize("count", [1, 3])
def test_more_rows_than_are_sifted_at_a_time(count: int) -> None:
    rng = np.random.default_rng(11)
    queries = rng.standard_normal((count, 3)).astype(np.float32)
    gallery = rng.standard_normal((1_100_000, 3)).astype(np.float16)
    gallery[[3, 1_060_000, 1_099_999]] = 8 * queries[0]
    compressed = similarity.compress(gallery)
    for chosen in ({"k": 10, "inv_tau": 2.0, "b": -0.04}, {"k": 70, "inv_tau": 0.1, "b": -0.9}):
        want = similarity.attribute(queries, gallery, **chosen)
        assert_same(want, similarity.attribute(queries, compressed, **chosen))


def test_a_window_too_wide_to_keep_gives_the_same_bits(isa: str, monkeypatch) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(5), 6, 4001, 48)
    monkeypatch.setattr(similarity, "WINDOW_CAP", 3)
    assert_same_answers(queries, gallery)


KINDS = ("random", "awkward", "alike", "huge queries", "offset", "aligned", "extreme", "orthogonal")


def lost(queries: np.ndarray, levels: int) -> np.ndarray:
    """What rounding to so many codes takes from queries."""
    steps = np.abs(queries).max(axis=1, keepdims=True) / levels
    return (queries - steps * np.rint(queries / steps)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 4, 37])
@pytest.mark.parametrize("dim", [1, 200, 3000])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds_for_every_score(isa: str, kind: str, dim: int, count: int) -> None:
    rng = np.random.default_rng(dim + count)
    rows = 150
    gallery = rng.standard_normal((rows, dim)).astype(np.float32)
    queries = rng.standard_normal((count, dim)).astype(np.float32)
    offset = None
    if kind == "awkward":
        gallery = awkward(rng, rows, dim)
        queries[:, 0] *= 1e4
    elif kind == "alike":  # far from the origin and near each other: the center takes nearly all of them
        gallery = (1e4 + 1e-3 * gallery).astype(np.float32)
    elif kind == "huge queries":
        queries *= np.float32(1e12)
    elif kind == "offset":
        offset = (-1e5 * rng.random(count)).astype(np.float32)
    elif (
        kind == "aligned" and dim > 1
    ):  # with what the codes of the queries miss, where Cauchy and Schwarz agree
        levels = 127 if count > MOST_FINE[isa] else min(32767, (1 << 23) * LANES[isa] // (-(-dim // 64) * 64))
        missing = lost(queries, levels)[np.arange(rows // 2) % count]
        missing = np.rint(missing * (127 / np.abs(missing).max(axis=1, keepdims=True)))  # codes of themselves
        gallery = np.concatenate([missing, -missing])
    elif kind == "extreme":  # sums of products as large as they come
        gallery = (
            np.sign(gallery[:, :1]) * np.ones((rows, dim), np.float32) * (np.arange(rows) % 3 > 0)[:, None]
        )
        queries = np.ones((count, dim), np.float32)
    elif kind == "orthogonal":  # all rows at the center, and scores of nothing but double's roundings
        gallery[:] = gallery[0]
        order = rng.permutation(dim)
        i, j = order[: dim // 2], order[dim // 2 : dim // 2 * 2]
        queries[:] = 0
        queries[:, i], queries[:, j] = gallery[0, j], -gallery[0, i]
    scale = rng.uniform(0, 3, rows).astype(np.float32)
    exact = similarity.canonical_scores(
        queries, gallery, np.tile(np.arange(rows), (count, 1)), scale=scale, offset=offset
    )
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(gallery, axis=1) * scale
    telling = kind == "random" and dim >= 64  # where bounds shall be no idle ones
    for one, has_codes in (
        (similarity.compress(gallery), count <= MOST_CODED[isa]),
        (gallery, isa in QUANTIZING),
    ):
        call = similarity.Call(queries, one, scale, offset, "cpu", 1)
        coded, bounds = similarity.load_extension().coded_scores(*call.extension_inputs())
        if not has_codes:
            assert np.isnan(coded).all()
            continue
        error = np.abs(coded.astype(np.float64) - exact.astype(np.float64))
        assert (error <= bounds).all()
        assert not telling or (bounds < 0.025 * lengths.max(axis=1, keepdims=True)).all()
    call = similarity.Call(queries, similarity.compress(gallery), scale, offset, "cpu", 1)
    most, refined = similarity.load_extension().sketched_bounds(*call.extension_inputs())
    for bound, slack in ((most, 0.22), (refined, 0.11)):
        if count > MOST_SKETCHED[isa]:
            assert np.isnan(bound).all()
        else:
            assert (bound >= exact).all()
            assert not telling or (bound - exact < slack * lengths.max(axis=1, keepdims=True)).all()


def test_a_query_along_what_codes_of_values_miss_reaches_its_bound(isa: str) -> None:
    if isa not in QUANTIZING:
        pytest.skip("this instruction set makes no codes of values")
    rng = np.random.default_rng(13)
    for dim, dtype in ((65, torch.float32), (512, torch.bfloat16), (1000, torch.float16)):
        gallery = torch.from_numpy(rng.standard_normal((300, dim)).astype(np.float32)).to(dtype)
        values = gallery.to(torch.float32).numpy()
        missing = lost(values, 127)
        reached = []
        for row in range(len(values)):
            call = similarity.Call(missing[row : row + 1], gallery, None, None, "cpu", 1)
            scores, bounds = similarity.load_extension().coded_scores(*call.extension_inputs())
            exact = similarity.canonical_scores(missing[row : row + 1], gallery, np.array([[row]]))
            error = abs(float(scores[0, row]) - float(exact[0, 0]))
            assert error <= bounds[0, row]
            reached.append(error / bounds[0, row])
        # The bound allows for rounding to 256ths of a step, at worst, and for the query's own codes. Where a
        # value lies in the middle of two codes, the other one may have been taken.
        assert np.median(reached) > 0.97


@dataclasses.dataclass
class Unpacked:
    """What sketches say of values in steps of their rows, without and with refinements, and of rows."""

    values: np.ndarray
    refined: np.ndarray
    steps: np.ndarray
    residuals: np.ndarray
    norms: np.ndarray
    refined_residuals: np.ndarray

    def __init__(self, compressed: similarity.CompressedGallery, dim: int) -> None:
        held = compressed.sketches
        rows = len(held.values)
        bytes_ = held.values.reshape(rows, -1, 8, 8)  # [rows, groups, rings, bytes]
        rings = np.stack([bytes_ & 15, bytes_ >> 4], axis=-1)
        before = np.roll(rings.reshape(rows, -1, 8, 16), 1, axis=3).reshape(rings.shape)
        levels = np.moveaxis(LEVELS[rings] + (before & 12), -1, 2)  # [rows, groups, halves, rings, bytes]
        self.values = (levels - 63.5).reshape(rows, -1)[:, :dim].astype(np.longdouble)
        pairs = (
            held.refinements.reshape(rows, -1, 1, 64) >> np.arange(0, 8, 2, dtype=np.uint8).reshape(4, 1) & 3
        )
        self.refined = self.values + REFINEMENT * (pairs.reshape(rows, -1)[:, :dim] - 1.5)
        facts = (held.facts.astype(np.uint32) << 16).view(np.float32).T
        self.steps, self.residuals, self.norms, self.refined_residuals = facts


def test_a_query_along_what_a_sketch_misses_reaches_its_bound(isa: str) -> None:
    if MOST_SKETCHED[isa] == 0:
        pytest.skip("this instruction set reads no sketches")
    rng = np.random.default_rng(12)
    gallery = rng.standard_normal((300, 256)).astype(np.float32)
    compressed = similarity.compress(gallery)
    held = Unpacked(compressed, 256)
    own = np.arange(2)
    for refined, codes, residuals in (
        (False, held.values, held.residuals),
        (True, held.refined, held.refined_residuals),
    ):
        missing = (gallery - compressed.center - held.steps[:, None] * codes).astype(np.float32)[:2]
        call = similarity.Call(missing, compressed, None, None, "cpu", 1)
        bounds = similarity.load_extension().sketched_bounds(*call.extension_inputs())[refined]
        exact = similarity.canonical_scores(missing, gallery, own[:, None])[:, 0]
        along = np.linalg.norm(missing, axis=1) * residuals[:2]
        slack = (bounds[own, own] - exact) / along
        # What is left is the rounding of residuals, at most 2^-7 of them, and the query's own, times how much
        # longer the row is than what is missing of it.
        levels = 127 * 128 if isa.startswith(("avx512_amx", "avx512_bf16")) else 127
        rounding = np.linalg.norm(lost(missing, levels), axis=1) * held.norms[:2] / along
        assert (slack > 0).all()
        assert (slack < 0.02 + 1.5 * rounding).all()
        assert (slack < 0.6).all()


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_residuals_and_norms_are_upper_bounds(isa: str, storage: str) -> None:
    rng = np.random.default_rng(6)
    for dim in (1, 9, 520):
        gallery = awkward(rng, 400, dim)
        if storage == "float16":
            gallery = np.clip(gallery, -6e4, 6e4).astype(np.float16)
        got = similarity.compress(gallery)
        wide = np.longdouble
        assert (got.codes.values[:, dim:] == 128).all()
        centered = gallery.astype(wide) - got.center.astype(wide)
        size = np.sqrt((centered**2).sum(axis=1))
        sketches = Unpacked(got, dim)
        for steps, codes, residuals, norms in (
            (
                got.codes.steps,
                got.codes.values[:, :dim].astype(wide) - 128,
                got.codes.residuals,
                got.codes.norms,
            ),
            (sketches.steps, sketches.values, sketches.residuals, sketches.norms),
            (sketches.steps, sketches.refined, sketches.refined_residuals, sketches.norms),
        ):
            kept = steps[:, None].astype(wide) * codes
            assert (residuals >= np.sqrt(((centered - kept) ** 2).sum(axis=1))).all()
            assert (norms >= np.sqrt((kept**2).sum(axis=1))).all()
            assert (norms >= size).all()
        levels = sketches.steps[:, None].astype(wide) * (sketches.values + 63.5)
        assert (sketches.norms >= np.sqrt((levels**2).sum(axis=1)) / 4).all()
        # Half a step at most, where a step is a number at all.
        normal = got.codes.steps > 1e-37
        assert (got.codes.residuals[normal] <= 0.5001 * np.sqrt(dim) * got.codes.steps[normal]).all()
        if dim == 520:  # of normal values a twelfth, on average, and less than a thirtieth
            ordinary = np.arange(len(gallery)) % 7 == 6
            assert (sketches.residuals[ordinary] / size[ordinary]).mean() < 1 / 12
            assert (sketches.refined_residuals[ordinary] / size[ordinary]).mean() < 1 / 32


def test_the_gallery_is_read_in_place(tmp_path) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(7), 3, 2000, 64)
    np.save(tmp_path / "rows.npy", gallery)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    compressed = similarity.compress(mapped)
    assert compressed.gallery is mapped
    assert compressed.nbytes == 2000 * (64 + 12 + 64 + 64 + 8) + 4 * 64
    assert compressed.codes.values.ctypes.data % 64 == 0
    assert similarity.compress(compressed) is compressed
    assert_same_answers(queries, gallery, compressed=compressed)
    assert_same(
        similarity.attribute(queries, gallery, k=3, impl="reference", **SHARP),
        similarity.attribute(queries, compressed, k=3, impl="reference", **SHARP),
    )


@pytest.mark.parametrize("b", [-0.04, -0.9, 0.0])
def test_parts_of_compressed_shards_make_the_same_whole(b: float, monkeypatch) -> None:
    monkeypatch.setenv("ATTRIBUTION_CODES", "always")
    monkeypatch.setattr(similarity, "WINDOW_CAP", 20)
    queries, gallery = oracle.planted(np.random.default_rng(8), 5, 1500, 32)
    want = similarity.attribute(queries, gallery, k=7, inv_tau=16.0, b=b)
    shards = [(begin, similarity.compress(gallery[begin : begin + 500])) for begin in (0, 500, 1000)]
    found = [
        parts.retrieve_part(queries, shard, first_row=begin, k=7, inv_tau=16.0, b=b)
        for begin, shard in shards
    ]
    whole = parts.merge(*found)
    mass = None
    if whole.needs_mass.any():
        mass = parts.sum_of(parts.weigh(queries, shard, whole) for _, shard in shards)
    assert_same(want, parts.conclude(whole, mass))


def test_a_gpu_gets_the_gallery_itself(monkeypatch) -> None:
    rows = np.ones((3, 4), np.float32)
    seen = []

    class Module:
        def canonical_scores(self, queries, gallery, ids, **rest):
            seen.append(gallery)
            return np.zeros(ids.shape, np.float32)

    monkeypatch.setattr(similarity, "load_cuda", Module)
    similarity.canonical_scores(rows, similarity.compress(rows), np.zeros((3, 1), int), impl="cuda")
    assert seen[0] is rows


@pytest.mark.parametrize(("count", "rows"), [(0, 10), (3, 0), (0, 0)])
def test_nothing_in_nothing_out(count: int, rows: int) -> None:
    queries, gallery = np.ones((count, 4), np.float32), np.ones((rows, 4), np.float32)
    assert_same_answers(queries, gallery)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_row_that_is_not_finite_is_named(isa: str, value: float, dtype: type) -> None:
    gallery: np.ndarray = np.ones((900, 5), dtype)
    gallery[[700, 850], 3] = value
    shards = [gallery[:100], gallery[100:]]
    for ask in (
        lambda: similarity.compress(shards),
        lambda: similarity.attribute(np.ones((20, 5), np.float32), shards, k=3, **SHARP),
        lambda: similarity.count_larger(np.ones((20, 5), np.float32), shards, np.ones((20, 1))),
    ):
        with pytest.raises(ValueError, match=r"gallery row 700: wanted finite values, got NaN or infinity"):
            ask()


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_a_scale_that_is_no_scale_is_named(isa: str, value: float) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(9), 3, 900, 8)
    scale = np.ones(900, np.float32)
    scale[700] = value
    for one in (gallery, similarity.compress(gallery)):
        with pytest.raises(ValueError, match=r"gallery row 700: wanted a finite scale >= 0, got "):
            similarity.attribute(queries, one, k=2, scale=scale, **SHARP)


def test_the_longest_rows_overflow_nothing(isa: str) -> None:
    dim = 65536
    gallery = np.array([[1.0], [-1.0], [0.0], [0.5]], np.float32) * np.ones((4, dim), np.float32)
    queries = np.tile(np.ones(dim, np.float32), (9, 1))
    queries[1] = -1
    for count in (1, 2, 9):
        assert_same_answers(queries[:count], gallery, [{"k": 2, "inv_tau": 1e-4, "b": -0.5}])


def test_a_score_beyond_float32_is_named(isa: str) -> None:
    gallery = np.full((300, 4), 1e-3, np.float32)
    gallery[123] = 1e30
    queries = np.full((2, 4), 1e20, np.float32)
    for one in (gallery, similarity.compress(gallery)):
        with pytest.raises(ValueError, match="query row 0 and gallery row 123: their score is beyond"):
            similarity.search(queries, one, k=2)


def test_what_does_not_fit_is_refused_by_name() -> None:
    rows = np.ones((9, 4), np.float32)
    with pytest.raises(TypeError, match="gallery: wanted float32, float16 or bfloat16, got float64"):
        similarity.compress(rows.astype(float))
    with pytest.raises(ValueError, match=r"gallery shard 1: wanted dim 4 as shard 0 has, got \[9, 3\]"):
        similarity.compress([rows, rows[:, :3]])
    with pytest.raises(ValueError, match="gallery: wanted dim <= 65536 to compress, got 65537"):
        similarity.compress(np.zeros((1, 65537), np.float32))
    with pytest.raises(ValueError, match="threads: wanted an integer >= 1, got 0"):
        similarity.compress(rows, threads=0)
    compressed = similarity.compress(rows)
    with pytest.raises(ValueError, match=r"gallery: wanted dim 5 as queries \[1, 5\] have, got \[9, 4\]"):
        similarity.search(np.ones((1, 5), np.float32), compressed, k=1)
    other = dataclasses.replace(compressed, gallery=rows[:8])
    with pytest.raises(ValueError, match="gallery: compressed with 9 rows but has 8; do: compress it again"):
        similarity.search(rows[:1], other, k=1)


def check_compressed(world, window: int, batch: int, threads: int, cuts: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTRIBUTION_CODES", "always")
        for codes in (similarity.compress, lambda gallery: gallery):
            check_against_the_reference(world, window, batch, threads, cuts, codes)


@settings(max_examples=60, deadline=None)
@given(world=worlds(), **{name: walks[name] for name in walks})
def test_any_walk_over_any_compressed_world(world, window, batch, threads, cuts) -> None:
    check_compressed(world, window, batch, threads, cuts)


@pytest.mark.nightly
@settings(max_examples=10_000, deadline=None)
@given(world=worlds(), **{name: walks[name] for name in walks})
def test_ten_thousand_walks_over_compressed_worlds(world, window, batch, threads, cuts) -> None:
    check_compressed(world, window, batch, threads, cuts)


@pytest.mark.parametrize("count", [1, 3, 8, 40])
@pytest.mark.parametrize("world", oracle.extremes())
def test_worlds_at_the_ends_of_the_range(isa: str, world: str, count: int) -> None:
    queries, gallery, scale = oracle.extremes()[world]
    compressed = similarity.compress(gallery)
    for k in (1, 10):
        want = similarity.search(queries[:count], gallery, k=k, scale=scale, impl="reference")
        got = similarity.search(queries[:count], compressed, k=k, scale=scale)
        np.testing.assert_array_equal(want[0], got[0])
        np.testing.assert_array_equal(want[1], got[1])
    counts = [
        similarity.count_larger(queries[:count], one, want[1][:, :3], scale=scale, impl=impl)
        for one, impl in ((gallery, "reference"), (compressed, "cpu"))
    ]
    np.testing.assert_array_equal(*counts)


def test_the_center_of_large_rows_is_finite() -> None:
    compressed = similarity.compress(np.full((4, 4), 3e38, np.float32))
    np.testing.assert_array_equal(compressed.center, np.full(4, 3e38, np.float32))
