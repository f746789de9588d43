"""A gallery with codes on a GPU answers with the CPU's bits, and its bound holds; emulated without a GPU."""

import ctypes
from typing import Any

import numpy as np
import pytest
import torch

from attribution import cuda_call, cuda_gallery, cuda_walk, similarity, similarity_cuda
from attribution.cuda_call import Call, Settings
from tests import oracle
from tests.test_similarity import assert_same
from tests.test_similarity_cuda import device, small_chunks, stored, walks
from tests.test_similarity_int8 import awkward

__all__ = ["device", "walks"]


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTRIBUTION_CODES", "always")


def coded(rows: torch.Tensor) -> similarity_cuda.Gallery:
    """In two shards."""
    cut = len(rows) // 3 + 1
    gallery = similarity.compress(similarity_cuda.Gallery([rows[:cut], rows[cut:]]))
    assert gallery.coded is not None
    return gallery


def check(queries: np.ndarray, rows: torch.Tensor, **arguments: Any) -> None:
    want = similarity.attribute(queries, rows, impl="cpu", **arguments)
    assert_same(want, similarity.attribute(queries, coded(rows), **arguments))


# Queries of 16 bits, in two lines each; of 8 bits: resident, one tile, two tiles shared by two blocks. Rows
# beyond the first chunk, which have cuts to reach; ragged; deep enough for a ring of stages.
@pytest.mark.parametrize(
    ("count", "rows", "dim", "storage"),
    [
        (3, 800, 40, "float32"), (9, 300, 1800, "bfloat16"), (32, 300, 33, "float16"),
        (33, 300, 72, "bfloat16"), (66, 300, 520, "float16"), (129, 300, 136, "float32"),
    ],
)  # fmt: skip
def test_every_kernel_returns_the_bits_of_the_cpu(
    walks: list[int], count: int, rows: int, dim: int, storage: str
) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(count), count, rows, dim)
    check(queries, stored(gallery + np.float32(0.1), storage), k=5, inv_tau=16.0, b=-0.04)


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("world", oracle.extremes())
def test_worlds_at_the_ends_of_the_range(device: str, world: str, count: int) -> None:
    queries, gallery, scale = oracle.extremes()[world]
    compressed = similarity.compress(similarity_cuda.Gallery(gallery))
    for k in (1, 10):
        want = similarity.search(queries[:count], gallery, k=k, scale=scale, impl="cpu")
        got = similarity.search(queries[:count], compressed, k=k, scale=scale)
        np.testing.assert_array_equal(want[0], got[0])
        np.testing.assert_array_equal(want[1], got[1])


@pytest.mark.parametrize("count", [2, 35])
def test_rows_in_no_order_are_walked_once(walks: list[int], count: int) -> None:
    gallery = oracle.unit(np.random.default_rng(0).standard_normal((800, 64)))
    check(gallery[:count], torch.from_numpy(gallery), k=10, inv_tau=100.0, b=-0.5)
    assert not walks


@pytest.mark.parametrize("count", [2, 35])
def test_what_overflows_is_walked_again_by_values(walks: list[int], count: int) -> None:
    """Every row is better than all before it for some queries."""
    rng = np.random.default_rng(1)
    gallery = oracle.unit(rng.standard_normal((801, 32)))
    queries = oracle.unit(rng.standard_normal((count, 32)))
    check(queries, torch.from_numpy(gallery[np.argsort(gallery @ queries[0])]), k=30, inv_tau=100.0, b=-0.5)
    assert walks


@pytest.mark.parametrize(("inv_tau", "b"), [(16.0, -0.04), (0.1, -0.5), (5.0, 0.0)])
def test_scale_offset_and_every_window(walks: list[int], inv_tau: float, b: float) -> None:
    rng = np.random.default_rng(2)
    queries, gallery = oracle.planted(rng, 5, 600, 48)
    scale = rng.uniform(0.5, 2, len(gallery)).astype(np.float32)
    scale[::50] = 0
    offset = rng.standard_normal(len(queries)).astype(np.float32)
    check(queries, stored(gallery, "bfloat16"), k=20, inv_tau=inv_tau, b=b, scale=scale, offset=offset)


@pytest.mark.parametrize(("count", "size"), [(2, 1.0), (2, 1e-30), (2, 1e9), (35, 1.0)])
def test_awkward_rows_give_the_same_bits(device: str, count: int, size: float, monkeypatch) -> None:
    monkeypatch.setattr(cuda_gallery, "LARGEST_CODED", 2.0**60)
    rng = np.random.default_rng(3)
    gallery = awkward(rng, 400, 24)
    queries = (rng.standard_normal((count, 24)) * size).astype(np.float32)
    queries[0] = 0
    largest = float(np.abs(queries @ gallery.T).max())
    small_chunks(monkeypatch)
    check(queries, torch.from_numpy(gallery), k=10, inv_tau=16.0 / largest, b=-0.04)


def fast_scores(
    queries: np.ndarray, gallery: similarity_cuda.Gallery, scale: Any, offset: Any
) -> tuple[np.ndarray, np.ndarray]:
    """What the filter makes of every score, and the error that it allows for."""
    call, count = Call(queries, gallery, scale, offset), len(queries)
    operand = cuda_walk.coded_operand(gallery, count, 1)
    batch = call.batch(np.arange(count), gallery.rows, operand=operand)
    shards, largest = gallery.scaled(call.scale, coded=True)
    batch.note(shards, largest)
    search = Settings(
        gallery.rows, None, 0.0
    ).search()  # so many wanted that none is dropped, or looked at twice
    batch.library.chunk(ctypes.byref(batch.plan), 0, 0, gallery.rows, 1, ctypes.byref(search), 0)
    keys = batch.keys.cpu().numpy().view(np.uint64)
    assert (0xFFFFFFFF - (keys & np.uint64(0xFFFFFFFF)) == np.arange(gallery.rows, dtype=np.uint64)).all()
    bits = (keys >> np.uint64(32)).astype(np.uint32)
    bits ^= np.where(bits >> 31 != 0, np.uint32(0x80000000), np.uint32(0xFFFFFFFF))
    # As error_of in exact.h, in double.
    record = batch._words("query", count, 12, torch.float32).cpu().numpy()[:, :10]  # then padding: anything
    _, a, b, c, _, unit, _, _, size, _ = record.astype(np.float64).T[..., None]
    stripes = np.repeat(shards[0].stripes.cpu().numpy().astype(np.float64), 128, axis=0)[: gallery.rows]
    norm, largest_scale, residual, _ = stripes.T
    error = (a * norm + size * residual + b) * largest_scale + c
    return bits.view(np.float32), error * unit


@pytest.mark.parametrize("kind", ["random", "awkward", "alike", "far from zero", "huge queries", "aligned"])
@pytest.mark.parametrize("count", [3, 35])
def test_the_bound_holds_for_every_score(device: str, kind: str, count: int, monkeypatch) -> None:
    monkeypatch.setattr(cuda_gallery, "LARGEST_CODED", 2.0**60)
    rng = np.random.default_rng(4)
    queries = rng.standard_normal((count, 56)).astype(np.float32)
    gallery = rng.standard_normal((700, 56)).astype(np.float32)
    scale = offset = None
    if kind == "awkward":
        gallery = awkward(rng, 700, 56)
        scale = rng.uniform(0, 3, 700).astype(np.float32)
        offset = (rng.standard_normal(count) * 1e3).astype(np.float32)
    elif kind == "alike":
        gallery[:] = gallery[0] + rng.standard_normal((700, 56)).astype(np.float32) * np.float32(1e-6)
    elif kind == "far from zero":
        gallery += np.float32(1e5)
    elif kind == "huge queries":
        queries *= np.float32(1e20)
    place = similarity_cuda.Gallery(gallery).compressed()
    if kind == "aligned":  # each row misses, along a query, as much as the codes say that a row may miss
        assert place.coded is not None
        shard = place.coded.shards[0]
        assert shard.codes is not None
        _, _, residual, step = np.repeat(shard.stripes.cpu().numpy(), 128, axis=0)[:700].T[..., None]
        held = place.coded.center.cpu().numpy() + shard.codes.cpu().numpy() * step
        moved = held + 0.999 * residual * oracle.unit(queries)[np.arange(700) % count]
        shard.rows.copy_(torch.from_numpy(moved).view(torch.int32))
    fast, error = fast_scores(queries, place, scale, offset)
    exact = similarity.canonical_scores(
        queries, place, np.tile(np.arange(700), (count, 1)), scale=scale, offset=offset
    )
    share = np.abs(fast.astype(np.float64) - exact) / error
    assert share.max() <= 1
    least = {"aligned": 0.9 if count == 3 else 0.4, "random": 0.2}
    assert share.max() > least.get(kind, 0)  # it says no more than it must


def test_a_compressed_gallery_answers_everything(device: str) -> None:
    rng = np.random.default_rng(5)
    queries, gallery = oracle.planted(rng, 4, 500, 24)
    place = coded(torch.from_numpy(gallery))
    want = similarity.search(queries, gallery, k=12, impl="cpu")
    np.testing.assert_array_equal(similarity.search(queries, place, k=12), want)
    levels = want[1][:, ::5].astype(np.float64)
    np.testing.assert_array_equal(
        similarity.count_larger(queries, place, levels), similarity.count_larger(queries, gallery, levels)
    )
    found = similarity_cuda.enqueue(
        torch.from_numpy(queries).to(place.device), place, k=6, inv_tau=50.0, b=-0.2
    )
    assert found.settled().all()
    np.testing.assert_array_equal(found.ids.cpu().numpy(), want[0][:, :6])
    assert similarity.compress(place) is place
    assert 500 * 32 < place.coded.nbytes < 500 * 32 + 1000


def test_batches_of_queries_change_no_bit(device: str, monkeypatch) -> None:
    queries, gallery = oracle.planted(np.random.default_rng(6), 35, 300, 24)
    monkeypatch.setattr(cuda_call, "QUERY_BATCH", 17)
    check(queries, torch.from_numpy(gallery), k=4, inv_tau=16.0, b=-0.04)


def test_codes_that_miss_too_much_are_not_kept(device: str, monkeypatch) -> None:
    monkeypatch.delenv("ATTRIBUTION_CODES")
    rng = np.random.default_rng(7)
    gallery = rng.standard_normal((600, 48)).astype(np.float32)
    assert similarity_cuda.Gallery(gallery).compressed().coded is not None
    gallery[::50, 7] = 1000
    place = similarity_cuda.Gallery(gallery)
    assert place.compressed() is place
    assert similarity_cuda.Gallery(gallery[:0]).compressed().coded is None
    assert similarity_cuda.Gallery(gallery * np.float32(1e12)).compressed().coded is None


def test_many_queries_that_want_many_rows_are_answered_by_values(device: str, monkeypatch) -> None:
    monkeypatch.delenv("ATTRIBUTION_CODES")
    place = coded(torch.from_numpy(np.random.default_rng(8).standard_normal((600, 48)).astype(np.float32)))
    chosen = [cuda_walk.coded_operand(place, *some) for some in ((1, 5000), (32, 100), (33, 100), (33, 5000))]
    assert chosen == ["wide_codes", "wide_codes", "codes", None]


@pytest.mark.parametrize("operand", ["codes", "wide_codes"])
@pytest.mark.parametrize("rows", [1, 1000, 10**7])
@pytest.mark.parametrize("k", [1, 100, 1000, 50_000])
def test_chunks_leave_room_for_what_they_emit(operand: str, k: int, rows: int) -> None:
    capacity, first, growth = cuda_walk.plan_chunks(k, 2048, rows, 16, operand)
    assert capacity >= min(rows, k + 2048)
    assert min(rows, first) <= capacity
    assert (growth - 1) * cuda_walk.KEPT[operand] * k + k <= capacity or capacity == rows
    assert first >= k
