"""Retrieval on a GPU returns the CPU's bits. Without one, its kernels run emulated: cuda_emulation.py."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from attribution import (
    cuda_batch,
    cuda_call,
    cuda_device,
    cuda_library,
    cuda_streamed,
    cuda_walk,
    parts,
    similarity,
    similarity_cuda,
)
from tests import oracle
from tests.cuda_emulation import emulate
from tests.test_similarity import assert_same
from tests.test_similarity_properties import worlds

SHARP = {"inv_tau": 16.0, "b": -0.04}
STORAGES = ("float32", "float16", "bfloat16")


@pytest.fixture(params=["generic", "hopper", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "gpu":
        emulate(monkeypatch, request.param)
    return request.param


def stored(rows: np.ndarray, storage: str) -> torch.Tensor:
    return torch.from_numpy(rows).to(getattr(torch, storage))


def check(queries: np.ndarray, rows: torch.Tensor, **arguments: Any) -> similarity.Attribution:
    """Resident in two shards, against the CPU."""
    want = similarity.attribute(queries, rows, impl="cpu", **arguments)
    scale = arguments.pop("scale", None)
    cut = len(rows) // 3 + 1
    gallery = similarity_cuda.Gallery([rows[:cut], rows[cut:]])
    got = similarity.attribute(queries, gallery, scale=scale, **arguments)
    assert_same(want, got)
    assert got.impl == "cuda"
    return got


# One tile of queries resident, one tile, two tiles shared by two blocks; ragged in rows and in depth; deep
# enough for every ring of stages to come round.
@pytest.mark.parametrize(
    ("count", "rows", "dim", "storage"),
    [
        (3, 259, 40, "float32"), (3, 259, 840, "float16"), (3, 259, 72, "bfloat16"), (65, 140, 40, "float32"),
        (66, 140, 600, "bfloat16"), (129, 257, 72, "float16"), (129, 140, 328, "bfloat16"),
    ],
)  # fmt: skip
def test_every_kernel_returns_the_bits_of_the_cpu(
    device: str, count: int, rows: int, dim: int, storage: str
) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(count), count, rows, dim)
    check(queries, stored(gallery, storage), k=5, **SHARP)


@pytest.mark.parametrize("dim", [1, 33])
def test_rows_that_begin_anywhere(device: str, dim: int) -> None:
    """Rows of odd length cannot be fetched by 16 bytes; a Gallery that copies pads them."""
    queries, gallery = oracle.planted(np.random.default_rng(dim), 3, 200, dim)
    check(queries, stored(gallery, "float16"), k=4, **SHARP)
    want = similarity.attribute(queries, gallery, k=4, impl="cpu", **SHARP)
    assert_same(want, similarity.attribute(queries, gallery, k=4, impl="cuda", **SHARP))


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("world", oracle.extremes())
def test_worlds_at_the_ends_of_the_range(device: str, world: str, count: int) -> None:
    queries, gallery, scale = oracle.extremes()[world]
    for k in (1, 10):
        want, got = (
            similarity.search(queries[:count], gallery, k=k, scale=scale, impl=impl)
            for impl in ("cpu", "cuda")
        )
        np.testing.assert_array_equal(want[0], got[0])
        np.testing.assert_array_equal(want[1], got[1])


@pytest.mark.parametrize(("inv_tau", "b"), [(16.0, -0.04), (1.0, -0.9), (5.0, 0.0)])
def test_agrees_with_the_float64_oracle(device: str, inv_tau: float, b: float) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(1), 2, 509, 96)
    got = similarity.attribute(queries, gallery, k=20, inv_tau=inv_tau, b=b, impl="cuda")
    want = oracle.answer(queries, gallery, inv_tau, b)
    order = np.argsort(-want.scores, axis=1)[:, :20]
    np.testing.assert_array_equal(got.ids, order)
    np.testing.assert_allclose(got.scores, np.take_along_axis(want.scores, order, 1), atol=1e-6)
    np.testing.assert_allclose(got.influence, np.take_along_axis(want.influence, order, 1), atol=1e-6)
    np.testing.assert_array_equal(got.support, want.support)
    np.testing.assert_allclose(got.support_mass + got.remainder, 1, atol=1e-6)


@pytest.mark.parametrize("k", [1, 100, 130])
def test_k_up_to_and_beyond_the_gallery(device: str, k: int) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(2), 3, 100, 16)
    check(queries, stored(gallery, "bfloat16"), k=k, **SHARP)


@pytest.mark.parametrize("b", [-0.5, 0.0])
@pytest.mark.parametrize(("count", "rows"), [(0, 10), (3, 0), (0, 0)])
def test_nothing_in_nothing_out(device: str, count: int, rows: int, b: float) -> None:
    queries, gallery = np.ones((count, 4), np.float32), np.ones((rows, 4), np.float32)
    for place in (gallery, similarity_cuda.Gallery(gallery)):
        got = similarity.attribute(queries, place, k=2, inv_tau=1.0, b=b, impl="cuda")
        assert_same(similarity.attribute(queries, gallery, k=2, inv_tau=1.0, b=b, impl="cpu"), got)
        levels = np.zeros((count, 3))
        assert (similarity.count_larger(queries, place, levels, impl="cuda") == 0).all()


def test_the_environment_may_choose(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(3), 3, 300, 16)
    settings = {"k": 2, "inv_tau": 16.0, "b": -0.04}
    assert similarity.attribute(queries, gallery, **settings).impl == "cpu"
    monkeypatch.setenv("ATTRIBUTION_IMPL", "cuda")
    assert similarity.attribute(queries, gallery, **settings).impl == "cuda"
    assert similarity.attribute(queries, gallery, impl="cpu", **settings).impl == "cpu"
    monkeypatch.setenv("ATTRIBUTION_IMPL", "gpu")
    with pytest.raises(ValueError, match="ATTRIBUTION_IMPL: wanted auto, cpu or cuda, got 'gpu'"):
        similarity.attribute(queries, gallery, **settings)


def small_chunks(monkeypatch: pytest.MonkeyPatch, fresh: int = 300) -> None:
    def plan(
        k: int, window: int, rows: int, queries: int, operand: str | None = None
    ) -> tuple[int, int, int]:
        return k + max(window, k // 2 + 64) + fresh, 256, 4

    monkeypatch.setattr(cuda_walk, "plan_chunks", plan)


@pytest.fixture
def walks(device: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How long the chunks were that had to be walked with care."""
    lengths: list[int] = []
    chunk = cuda_batch.Batch._chunk

    def counted(self: Any, index: int, begin: int, end: int, *rest: Any) -> None:
        lengths.append(end - begin)
        chunk(self, index, begin, end, *rest)

    monkeypatch.setattr(cuda_batch.Batch, "_chunk", counted)
    small_chunks(monkeypatch)
    monkeypatch.setattr(similarity, "WINDOW_CAP", 50)
    return lengths


@pytest.mark.parametrize("b", [-0.5, 0.0])
def test_what_overflows_is_walked_again_in_halves(walks: list[int], b: float) -> None:
    """Every row is better than all before it for one query, and worse for the other."""
    scores = np.linspace(-1, 1, 1501, dtype=np.float32)
    rows = torch.from_numpy(np.stack([scores, np.zeros_like(scores)], axis=1))
    queries = np.array([[1, 0], [-1, 0.5], [0, 1]], np.float32)
    check(queries, rows, k=30, inv_tau=100.0, b=b)
    assert walks
    assert min(walks) < 512


@pytest.mark.parametrize(("count", "scaled"), [(2, False), (66, True), (130, False)])
def test_rows_in_no_order_are_walked_once(walks: list[int], count: int, scaled: bool) -> None:
    """Cut after cut, in every shape of kernel: of a tile's scores few are hits, wherever they lie."""
    rng = np.random.default_rng(0)
    gallery = oracle.unit(rng.standard_normal((1500 if count == 2 else 600, 16)))
    scale = np.ones(len(gallery), np.float32) if scaled else None
    check(gallery[:count], torch.from_numpy(gallery), k=30, inv_tau=100.0, b=-0.5, scale=scale)
    assert not walks


def test_all_scores_equal(walks: list[int]) -> None:
    rows = torch.ones((1011, 16))
    got = check(np.ones((2, 16), np.float32), rows, k=5, **SHARP)
    assert (got.ids == np.arange(5)).all()
    assert (got.support == 1011).all()


def test_a_streamed_gallery_is_the_gallery(walks: list[int], tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cuda_streamed, "SLAB_BYTES", 400 * 24 * 2)
    rng = np.random.default_rng(3)
    queries, gallery = oracle.planted(rng, 2, 1203, 24)
    gallery = gallery[np.argsort(gallery @ queries[0])].astype(np.float16)  # ever better rows
    np.save(tmp_path / "shard.npy", gallery[600:])
    shards = [gallery[:600], np.load(tmp_path / "shard.npy", mmap_mode="r")]
    scale = rng.uniform(0.5, 1.5, 1203).astype(np.float32)
    offset = rng.standard_normal(2).astype(np.float32) / 9
    for b in (-0.3, 0.0):
        arguments = {"k": 30, "inv_tau": 9.0, "b": b, "scale": scale, "offset": offset}
        want = similarity.attribute(queries, shards, impl="cpu", **arguments)
        assert_same(want, similarity.attribute(queries, shards, impl="cuda", **arguments))
    levels = want.scores[:, ::7]
    counts = [
        similarity.count_larger(queries, shards, levels, scale=scale, offset=offset, impl=impl)
        for impl in ("cpu", "cuda")
    ]
    np.testing.assert_array_equal(*counts)


@pytest.mark.parametrize(
    ("inv_tau", "b", "cap"),
    [(16.1587, -0.0385, 2048), (0.01, -0.5, 3), (3.0, 0.0, 3), (3e6, 0.0, 3), (16.0, -0.04, 0)],
)
def test_windows_narrow_and_wide(device: str, inv_tau: float, b: float, cap: int, monkeypatch) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(4), 3, 401, 48)
    monkeypatch.setattr(similarity, "WINDOW_CAP", cap)
    check(queries, stored(gallery, "bfloat16"), k=10, inv_tau=inv_tau, b=b)


def test_search_finds_what_attribute_finds(device: str) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(8), 6, 500, 24)
    want = similarity.search(queries, gallery, k=12, impl="cpu")
    for place in (gallery, similarity_cuda.Gallery(gallery)):
        ids, scores = similarity.search(queries, place, k=12, impl="cuda")
        np.testing.assert_array_equal(ids, want[0])
        np.testing.assert_array_equal(scores, want[1])


def test_batches_of_queries_change_no_bit(device: str, monkeypatch) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(6), 7, 300, 24)
    monkeypatch.setattr(cuda_call, "QUERY_BATCH", 3)
    check(queries, torch.from_numpy(gallery), k=4, **SHARP)
    want = similarity.attribute(queries, gallery, k=4, impl="cpu", **SHARP)
    assert_same(want, similarity.attribute(queries, gallery, k=4, impl="cuda", **SHARP))


@pytest.mark.parametrize("capacity", [16384, 40])
def test_counts_are_exact(device: str, capacity: int, monkeypatch) -> None:
    monkeypatch.setattr(similarity_cuda, "COUNT_CAPACITY", capacity)
    monkeypatch.setattr(similarity_cuda, "THRESHOLDS_AT_ONCE", 5)
    rng = np.random.default_rng(9)
    queries, gallery = oracle.planted(rng, 4, 401, 24)
    gallery[rng.permutation(401)[:40]] = gallery[0]
    levels = similarity.canonical_scores(queries, gallery, rng.integers(401, size=(4, 12))).astype(np.float64)
    levels[:, :4] = [-np.inf, np.inf, -1e300, 1e300]
    levels[:2] = np.sort(levels[:2])[:, -1:]  # few rows lie above
    place = similarity_cuda.Gallery(gallery)
    for or_equal, some in ((False, levels), (True, levels[:, 4:])):
        want = similarity.count_larger(queries, gallery, some, or_equal=or_equal, impl="cpu")
        got = similarity.count_larger(queries, place, some, or_equal=or_equal, impl="cuda")
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("storage", STORAGES)
def test_canonical_scores_are_the_bits_of_the_cpu(device: str, storage: str) -> None:
    rng = np.random.default_rng(10)
    queries, gallery = oracle.planted(rng, 3, 211, 77)
    rows, ids = stored(gallery, storage), rng.integers(-1, 211, size=(3, 19))
    want = similarity.canonical_scores(queries, rows, ids, impl="cpu")
    for place in (rows, similarity_cuda.Gallery([rows[:100], rows[100:]])):
        np.testing.assert_array_equal(similarity.canonical_scores(queries, place, ids, impl="cuda"), want)


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-18, 1e15, 3e18])
def test_values_near_the_ends_of_float32(device: str, size: float) -> None:
    rng = np.random.default_rng(11)
    queries = rng.standard_normal((3, 16)).astype(np.float32)
    gallery = (rng.standard_normal((300, 16)) * size).astype(np.float32)
    gallery[::5] *= np.float32(1e-3)
    check(queries, torch.from_numpy(gallery), k=10, inv_tau=1.0, b=-0.5)
    check(queries * np.float32(1e-30), torch.from_numpy(gallery), k=10, inv_tau=1.0, b=-0.5)


@pytest.mark.parametrize("size", [1e20, 1e30])
def test_scores_whose_partial_sums_leave_float32(device: str, size: float) -> None:
    big = np.float32(size)
    queries = np.array([[big, big, 1, 0]], np.float32)
    gallery = np.array([[big, -big, i, 0] for i in range(300)], np.float32)
    check(queries, torch.from_numpy(gallery), k=3, inv_tau=0.1, b=-0.5)
    gallery[123, 1] = big
    for place in (gallery, similarity_cuda.Gallery(gallery)):
        with pytest.raises(
            ValueError, match="query row 0 and gallery row 123: their score is beyond the range"
        ):
            similarity.search(queries, place, k=3, impl="cuda")


def test_scale_and_offset(device: str) -> None:
    rng = np.random.default_rng(12)
    queries, gallery = oracle.planted(rng, 6, 403, 40)
    scale, offset = rng.uniform(0, 2, 403).astype(np.float32), rng.standard_normal(6).astype(np.float32)
    got = check(queries, stored(gallery, "bfloat16"), k=9, scale=scale, offset=offset, **SHARP)
    place = similarity_cuda.Gallery(stored(gallery, "bfloat16"))
    levels = got.scores[:, :3]
    counts = [
        similarity.count_larger(queries, some, levels, scale=scale, offset=offset, impl=impl)
        for some, impl in ((stored(gallery, "bfloat16"), "cpu"), (place, "cuda"))
    ]
    np.testing.assert_array_equal(*counts)


@pytest.mark.parametrize(("b", "cap"), [(-0.5, 2048), (-0.04, 5), (0.0, 5)])
def test_parts_of_a_gpu_and_of_a_cpu_merge(device: str, b: float, cap: int, monkeypatch) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(30), 2, 400, 24)
    want = similarity.attribute(queries, gallery, k=7, inv_tau=9.0, b=b, impl="cpu")
    monkeypatch.setattr(similarity, "WINDOW_CAP", cap)
    arguments = {"k": 7, "inv_tau": 9.0, "b": b}
    shards = [(0, gallery[:200]), (200, gallery[200:])]
    here = parts.retrieve_part(queries, shards[0][1], first_row=0, **arguments)
    there = similarity_cuda.retrieve_part(
        queries, similarity_cuda.Gallery(shards[1][1]), first_row=200, **arguments
    )
    whole = parts.merge(there, here)
    weighers: list[Callable[..., parts.Mass]] = [parts.weigh, similarity_cuda.weigh]
    masses = [weigh(queries, shard, whole) for weigh, (_, shard) in zip(weighers, shards, strict=True)]
    assert_same(want, parts.conclude(whole, parts.sum_of(masses) if whole.needs_mass.any() else None))


@pytest.mark.parametrize("resident", [False, True])
def test_rows_that_are_not_usable_are_named(device: str, resident: bool) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(13), 2, 300, 16)

    def search(rows: np.ndarray, **arguments: Any) -> None:
        place = similarity_cuda.Gallery([rows[:100], rows[100:]]) if resident else rows
        similarity.search(queries, place, k=2, impl="cuda", **arguments)

    for value in (np.nan, np.inf, -np.inf):
        bad = gallery.copy()
        bad[[217, 250], 3] = value
        with pytest.raises(ValueError, match=r"gallery row 217: wanted finite values, got NaN or infinity"):
            search(bad)
    for value in (np.nan, np.inf, -1.0):
        scale = np.ones(300, np.float32)
        scale[[131, 132]] = value
        with pytest.raises(ValueError, match=r"gallery row 131: wanted a finite scale >= 0, got"):
            search(gallery, scale=scale)
    with pytest.raises(ValueError, match=r"scale: wanted one value for each of 300 gallery rows"):
        search(gallery, scale=np.ones(299, np.float32))
    with pytest.raises(ValueError, match=r"wanted dim 9 as queries \[2, 9\] have, got \["):
        similarity.search(np.ones((2, 9), np.float32), similarity_cuda.Gallery(gallery), k=2)
    with pytest.raises(ValueError, match=r"queries: row 1: wanted finite values"):
        similarity.search(np.array([[1], [np.nan]], np.float32), gallery[:, :1], k=2, impl="cuda")


def test_galleries_that_do_not_fit_together_are_refused(device: str) -> None:
    rows = torch.ones((5, 4))
    with pytest.raises(ValueError, match=r"gallery: wanted at least one shard, got an empty sequence"):
        similarity_cuda.Gallery([])
    with pytest.raises(TypeError, match=r"gallery shard 1: wanted float32 as shard 0 has, got float16"):
        similarity_cuda.Gallery([rows, rows.half()])
    with pytest.raises(ValueError, match=r"gallery shard 1: wanted dim 4 as shard 0 has, got \[5, 3\]"):
        similarity_cuda.Gallery([rows, rows[:, :3]])
    with pytest.raises(TypeError, match=r"gallery: wanted float32, float16 or bfloat16, got float64"):
        similarity_cuda.Gallery(rows.double())


def test_enqueued_answers_are_the_answers(device: str) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(14), 5, 900, 32)
    place = similarity_cuda.Gallery(stored(gallery, "bfloat16"))
    found = similarity_cuda.enqueue(
        torch.from_numpy(queries).to(place.device), place, k=6, inv_tau=50.0, b=-0.2
    )
    assert found.settled().all()
    want = similarity.attribute(queries, stored(gallery, "bfloat16"), k=6, inv_tau=50.0, b=-0.2, impl="cpu")
    for field in ("ids", "scores", "influence", "support", "support_mass", "remainder"):
        np.testing.assert_array_equal(
            getattr(found, field).cpu().numpy(), getattr(want, field), err_msg=field
        )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_enqueued_query_that_is_not_finite_is_left_out(device: str, value: float, monkeypatch) -> None:
    """Nobody has checked it; its candidates must not be what memory held before."""
    allocate = cuda_batch.allocate

    def filled(*wanted: Any) -> torch.Tensor:
        return allocate(*wanted).view(torch.uint8).fill_(255).view(wanted[1])  # row 0 with NaN for a score

    monkeypatch.setattr(cuda_batch, "allocate", filled)
    queries, gallery = oracle.planted(np.random.default_rng(15), 3, 700, 32)
    place = similarity_cuda.Gallery(gallery)
    bad = queries.copy()
    bad[1, 5] = value
    found = similarity_cuda.enqueue(torch.from_numpy(bad).to(place.device), place, k=6, inv_tau=50.0, b=-0.2)
    with pytest.raises(ValueError, match=r"enqueue: wanted finite queries with \|q\| <= 2\^30, got one"):
        found.settled()
    assert found.selected[:, cuda_library.STATUS].tolist() == [0, 2, 0]
    assert found.ids[1].tolist() == [-1] * 6
    want = similarity.attribute(queries, gallery, k=6, inv_tau=50.0, b=-0.2, impl="cpu")
    np.testing.assert_array_equal(found.ids[::2].cpu().numpy(), want.ids[::2])


def test_launches_go_where_pytorch_is(monkeypatch) -> None:
    """The library's runtime knows nothing of the device that PyTorch made current in this thread."""
    used: list[int] = []
    library = SimpleNamespace(use_device=used.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    cuda_device.require_current(library, torch.device("cuda", 1))
    assert used == [1]
    with pytest.raises(ValueError, match=r"wanted it on the current device cuda:1, got cuda:0; do: with"):
        cuda_device.require_current(library, torch.device("cuda", 0))
    assert used == [1]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(world=worlds())
def test_any_world_gives_the_bits_of_the_cpu(device: str, world) -> None:
    queries, gallery, arguments = world
    check(queries, torch.from_numpy(gallery), **arguments)


@pytest.mark.parametrize("rows", [1, 1000, 10**7, 2**32])
@pytest.mark.parametrize("k", [1, 100, 1000, 50_000])
@pytest.mark.parametrize("queries", [1, 1024])
def test_chunks_leave_room_for_what_they_emit(queries: int, k: int, rows: int) -> None:
    capacity, first, growth = cuda_walk.plan_chunks(k, 2048, rows, queries)
    assert capacity >= min(rows, k + 2048)
    assert min(rows, first) <= capacity
    assert (growth - 1) * 1.4 * k + k <= capacity or capacity == rows
    assert first >= k


def test_only_kernels_that_there_are_can_be_asked_for(device: str, monkeypatch) -> None:
    monkeypatch.setenv("ATTRIBUTION_CUDA_KERNEL", "volta")
    with pytest.raises(ValueError, match=r"ATTRIBUTION_CUDA_KERNEL: wanted generic or hopper, got 'volta'"):
        similarity.search(np.ones((1, 4), np.float32), np.ones((9, 4), np.float32), k=1, impl="cuda")


def test_without_kernels_or_device_the_door_says_what_to_do(monkeypatch, tmp_path) -> None:
    rows = np.ones((3, 4), np.float32)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r'impl="cuda": wanted .*, got .*; do: impl="cpu" or "auto"'):
            similarity.search(rows, rows, k=1, impl="cuda")
    assert similarity.attribute(rows, rows, k=1, **SHARP).impl == "cpu"
    extension = type("Extension", (), {"__file__": str(tmp_path / "attribution_extension.so")})
    monkeypatch.setattr(similarity, "load_extension", lambda: extension)
    cuda_library.load_library.cache_clear()
    with pytest.raises(
        ValueError, match=r'built with CUDA kernels, got one without .*; do: impl="cpu" or "auto"'
    ):
        similarity.search(rows, rows, k=1, impl="cuda")
