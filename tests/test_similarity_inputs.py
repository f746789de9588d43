"""Every storage gives the same answer in place, and everything that does not fit is refused by name."""

import ctypes
import mmap
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from attribution import similarity
from tests import oracle

SHARP = {"k": 6, "inv_tau": 16.0, "b": -0.04}


@pytest.fixture
def world() -> tuple[np.ndarray, np.ndarray]:
    return oracle.planted(np.random.default_rng(20), 5, 1003, 37)


def storages(gallery: np.ndarray) -> dict[str, tuple[object, np.ndarray]]:
    """Name -> (as a caller may hold it, the same values in float32)."""
    half, brain = gallery.astype(np.float16), torch.from_numpy(gallery).bfloat16()
    return {
        "float32": (gallery, gallery),
        "float16": (half, half.astype(np.float32)),
        "torch.float32": (torch.from_numpy(gallery), gallery),
        "torch.float16": (torch.from_numpy(half), half.astype(np.float32)),
        "torch.bfloat16": (brain, brain.float().numpy()),
        "torch with gradient": (torch.from_numpy(gallery).requires_grad_(), gallery),
    }


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("name", list(storages(np.zeros((1, 1), np.float32))))
def test_storage_types_hold_the_values_they_hold(world, name: str, impl: str) -> None:
    queries, gallery = world
    stored, values = storages(gallery)[name]
    got = similarity.attribute(queries, stored, impl=impl, **SHARP)
    want = similarity.attribute(queries, values, impl="cpu", **SHARP)
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_array_equal(got.scores, want.scores)
    np.testing.assert_allclose(got.influence, want.influence, rtol=3e-7)
    levels = want.scores[:, :3]
    np.testing.assert_array_equal(
        similarity.count_larger(queries, stored, levels, impl=impl),
        similarity.count_larger(queries, values, levels),
    )


@pytest.fixture
def memory_before_a_wall() -> Iterator[memoryview]:
    """Bytes that end where the next one must not be touched."""
    size = 64 * mmap.PAGESIZE
    held = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(held))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert protect(address + size, mmap.PAGESIZE, 0) == 0, ctypes.get_errno()
    yield memoryview(held)[:size]
    assert protect(address + size, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 6, 40])  # by each of the kernels
@pytest.mark.parametrize("rows", [31, 32, 96, 97])
def test_nothing_is_read_past_the_end(
    memory_before_a_wall, dtype: torch.dtype, count: int, rows: int
) -> None:
    rng = np.random.default_rng(24)
    for dim in (1, 2, 30, 32, 34, 62, 64, 67, 96, 98):
        queries, values = oracle.planted(rng, count, rows, dim)
        values = torch.from_numpy(values).to(dtype)
        size = values.numel() * values.element_size()
        gallery = torch.frombuffer(memory_before_a_wall[-size:], dtype=dtype).view(rows, dim)
        gallery.copy_(values)
        got = similarity.attribute(queries, gallery, impl="cpu", **SHARP)
        elsewhere = values.float().numpy()
        want = similarity.attribute(queries, elsewhere, impl="cpu", **SHARP)
        np.testing.assert_array_equal(got.ids, want.ids)
        np.testing.assert_array_equal(got.scores, want.scores)
        levels = want.scores[:, :2]
        np.testing.assert_array_equal(
            similarity.count_larger(queries, gallery, levels, or_equal=True, impl="cpu"),
            similarity.count_larger(queries, elsewhere, levels, or_equal=True, impl="reference"),
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_finite_half_precision_value_is_read_exactly(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)[:, None]
    values = values[torch.isfinite(values[:, 0])]
    queries, ids = np.ones((1, 1), np.float32), np.arange(len(values))[None]
    scores = similarity.canonical_scores(queries, values, ids, impl="cpu")
    np.testing.assert_array_equal(scores[0], values.float().numpy()[:, 0])
    found, best = similarity.search(queries, values, k=len(values), impl="cpu")
    np.testing.assert_array_equal(best[0], np.sort(values.float().numpy()[:, 0])[::-1])
    assert np.unique(found).size == len(values)


def test_queries_of_every_storage_type(world) -> None:
    queries, gallery = world
    half = torch.from_numpy(queries).bfloat16()
    want = similarity.attribute(half.float(), gallery, **SHARP)
    np.testing.assert_array_equal(similarity.attribute(half, gallery, **SHARP).scores, want.scores)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_read_only_memmap_is_the_array(world, dtype: type, tmp_path) -> None:
    queries, gallery = world
    np.save(tmp_path / "shard_0.npy", gallery[:300].astype(dtype))
    np.save(tmp_path / "shard_1.npy", gallery[300:].astype(dtype))
    shards = [np.load(tmp_path / f"shard_{i}.npy", mmap_mode="r") for i in range(2)]
    got = similarity.attribute(queries, shards, **SHARP)
    want = similarity.attribute(queries, gallery.astype(dtype), **SHARP)
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_array_equal(got.influence, want.influence)


def test_rows_may_be_strided_and_reversed(world) -> None:
    queries, gallery = world
    padded = np.full((2 * len(gallery), 50), np.nan, np.float32)
    padded[::2, 5:42] = gallery
    view = padded[::2, 5:42]
    want = similarity.attribute(queries, gallery, **SHARP)
    np.testing.assert_array_equal(similarity.attribute(queries, view, **SHARP).ids, want.ids)
    got = similarity.attribute(queries, view[::-1], **SHARP)
    np.testing.assert_array_equal(got.ids, len(gallery) - 1 - want.ids)


def test_one_row_stands_for_more_than_two_to_the_31(tmp_path) -> None:
    rows = 2**31 + 7
    sparse = np.memmap(tmp_path / "sparse", np.float16, "w+", shape=(rows, 2))
    sparse[rows - 2] = [0.5, 0.25]
    first = np.broadcast_to(np.float16([3, 0]), (2**33, 2))
    queries = np.float32([[1, 2]])
    ids = np.array([[2**33 - 1, 2**33 + rows - 2, 2**33 + rows - 1, 0]])
    scores = similarity.canonical_scores(queries, [first, sparse], ids, impl="cpu")
    assert scores.tolist() == [[3, 1, 0, 3]]


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 95, 500, 1002])
def test_a_value_that_is_not_finite_is_named_by_its_row(world, row: int, value: float, impl: str) -> None:
    queries, gallery = world
    gallery[row, 36] = value
    gallery[1002, 0] = value  # the first one is named
    with pytest.raises(ValueError, match=f"gallery row {row}: wanted finite values, got NaN or infinity"):
        similarity.attribute(queries, gallery, impl=impl, **SHARP)
    with pytest.raises(ValueError, match=f"gallery row {row}: "):
        similarity.count_larger(queries, [gallery[:400], gallery[400:]], np.zeros((5, 1)), impl=impl)
    with pytest.raises(ValueError, match=f"gallery row {row}: "):
        similarity.attribute(queries, gallery.astype(np.float16), impl=impl, **SHARP)
    queries[3, 7] = value
    with pytest.raises(ValueError, match="queries: row 3: wanted finite values"):
        similarity.attribute(queries, world[1], impl=impl, **SHARP)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_a_scale_that_is_no_scale_is_named_by_its_row(world, value: float, impl: str) -> None:
    queries, gallery = world
    scale = np.ones(len(gallery), np.float32)
    scale[700] = value
    with pytest.raises(ValueError, match=r"gallery row 700: wanted a finite scale >= 0, got "):
        similarity.attribute(queries, gallery, scale=scale, impl=impl, **SHARP)


ROWS, QUERIES = np.ones((9, 4), np.float32), np.ones((2, 4), np.float32)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"b": -1.0}, ValueError, r"b: wanted -1 < b <= 0, got -1.0"),
        ({"b": 0.1}, ValueError, r"b: wanted -1 < b <= 0, got 0.1"),
        ({"b": np.nan}, ValueError, r"b: wanted -1 < b <= 0, got nan"),
        ({"inv_tau": 0.0}, ValueError, r"inv_tau: wanted a finite number > 0, got 0.0"),
        ({"inv_tau": -3.0}, ValueError, r"inv_tau: wanted a finite number > 0, got -3.0"),
        ({"inv_tau": np.inf}, ValueError, r"inv_tau: wanted a finite number > 0, got inf"),
        ({"k": 0}, ValueError, r"k: wanted an integer >= 1, got 0"),
        ({"k": True}, TypeError, r"k: wanted an integer >= 1, got True"),
        ({"threads": 0}, ValueError, r"threads: wanted an integer >= 1, got 0"),
        ({"impl": "gpu"}, ValueError, r"impl: wanted one of auto, reference, cpu, cuda, got 'gpu'"),
        (
            {"gallery": ROWS[:, :3]},
            ValueError,
            r"gallery: wanted dim 4 as queries \[2, 4\] have, got \[9, 3\]",
        ),
        ({"gallery": ROWS[0]}, ValueError, r"gallery: wanted \[rows, dim\] with dim >= 1, got shape \[4\]"),
        (
            {"queries": QUERIES[0]},
            ValueError,
            r"queries: wanted \[rows, dim\] with dim >= 1, got shape \[4\]",
        ),
        (
            {"gallery": ROWS[:, :0]},
            ValueError,
            r"gallery: wanted \[rows, dim\] with dim >= 1, got shape \[9, 0\]",
        ),
        (
            {"gallery": ROWS.astype(float)},
            TypeError,
            r"gallery: wanted float32, float16 or bfloat16, got float64",
        ),
        (
            {"queries": QUERIES.astype(int)},
            TypeError,
            r"queries: wanted float32, float16 or bfloat16, got int64",
        ),
        (
            {"gallery": ROWS.astype(">f4")},
            TypeError,
            r"gallery: wanted float32, float16 or bfloat16, got >f4",
        ),
        ({"gallery": "features.npy"}, TypeError, r"gallery: wanted a numpy array or a torch tensor, got str"),
        ({"gallery": []}, ValueError, r"gallery: wanted at least one shard, got an empty sequence"),
        (
            {"gallery": np.ones((4, 9), np.float32).T},
            ValueError,
            r"unit stride along dim \(4 bytes\), got strides \[4, 36\]",
        ),
        (
            {"gallery": np.ones((9, 8), np.float32)[:, ::2]},
            ValueError,
            r"unit stride .*, got strides \[32, 8\]",
        ),
        (
            {"gallery": [ROWS, ROWS.astype(np.float16)]},
            TypeError,
            r"shard 1: wanted float32 as shard 0 has, got float16",
        ),
        ({"gallery": [ROWS, ROWS[:, :2]]}, ValueError, r"gallery shard 1: wanted dim 4 .*, got \[9, 2\]"),
        ({"gallery": torch.ones(9, 4, device="meta")}, ValueError, r"gallery: wanted device cpu, got meta"),
        (
            {"scale": np.ones(8, np.float32)},
            ValueError,
            r"scale: wanted one value for each of 9 gallery rows, got shape \[8\]",
        ),
        ({"scale": np.ones(9)}, TypeError, r"scale: wanted float32, got float64"),
        (
            {"offset": np.ones(9, np.float32)},
            ValueError,
            r"offset: wanted one value for each of 2 queries, got shape \[9\]",
        ),
        ({"offset": np.float32([1, np.nan])}, ValueError, r"offset: row 1: wanted finite values"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changed: dict, error: type, message: str) -> None:
    arguments = {"queries": QUERIES, "gallery": ROWS, "k": 2, "inv_tau": 1.0, "b": -0.5} | changed
    with pytest.raises(error, match=message):
        similarity.attribute(**arguments)


def test_unaligned_values_are_refused() -> None:
    shifted = np.frombuffer(bytes(9 * 4 * 4 + 1), np.uint8)[1:].view(np.float32).reshape(9, 4)
    with pytest.raises(ValueError, match=r"gallery: wanted aligned values"):
        similarity.search(QUERIES, shifted, k=1)


def test_thresholds_and_ids_are_checked() -> None:
    with pytest.raises(ValueError, match=r"thresholds: wanted \[2 queries, thresholds\], got \[3, 1\]"):
        similarity.count_larger(QUERIES, ROWS, np.zeros((3, 1)))
    with pytest.raises(ValueError, match=r"thresholds: row 1 holds NaN"):
        similarity.count_larger(QUERIES, ROWS, np.array([[0.0], [np.nan]]))
    with pytest.raises(ValueError, match=r"ids: wanted -1 <= id < 9 gallery rows, got 0 to 9"):
        similarity.canonical_scores(QUERIES, ROWS, np.array([[0], [9]]))
    with pytest.raises(TypeError, match=r"ids: wanted integers, got float64"):
        similarity.canonical_scores(QUERIES, ROWS, np.zeros((2, 1)))
