"""What only a GPU can show: the CPU's suite on it, streams, threads, graphs, memory, 2^31 values."""

import dataclasses
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribution import similarity, similarity_cuda
from tests import oracle, test_similarity
from tests.test_similarity import assert_same
from tests.test_similarity import test_a_known_world_has_its_closed_form as test_closed_form
from tests.test_similarity import test_adversarially_ordered_scores as test_order
from tests.test_similarity import test_agrees_with_the_float64_oracle as test_oracle
from tests.test_similarity import test_all_scores_equal as test_equal
from tests.test_similarity import test_equal_vectors_score_equal_wherever_they_lie as test_copies
from tests.test_similarity import test_every_size_agrees_with_the_reference as test_sizes
from tests.test_similarity import test_k_up_to_and_beyond_the_gallery as test_k
from tests.test_similarity import test_many_thresholds_high_low_and_infinite as test_thresholds
from tests.test_similarity import (
    test_scale_and_offset_stand_for_a_mapped_and_normalized_gallery as test_mapped,
)
from tests.test_similarity import test_shards_are_one_gallery as test_shards
from tests.test_similarity import test_some_windows_wide_and_some_narrow as test_windows
from tests.test_similarity import test_ties_are_in_gallery_order as test_ties
from tests.test_similarity import test_values_near_the_ends_of_float32 as test_ends
from tests.test_similarity import test_zeros_of_both_signs_are_one_score as test_zeros

pytestmark = pytest.mark.gpu
__all__ = [
    "test_closed_form", "test_copies", "test_ends", "test_equal", "test_k", "test_mapped", "test_oracle",
    "test_order", "test_shards", "test_sizes", "test_thresholds", "test_ties", "test_windows", "test_zeros",
]  # fmt: skip

SETTINGS = {"k": 20, "inv_tau": 60.0, "b": -0.2}


@pytest.fixture(autouse=True)
def imported_tests_mean_the_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the tests of the CPU, "cpu" and "auto" become "cuda"."""
    if request.function.__module__ != test_similarity.__name__:
        return

    def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, impl: str = "auto", **named: Any) -> Any:
            found = function(*arguments, impl="cuda" if impl in ("auto", "cpu") else impl, **named)
            is_record = isinstance(found, similarity.Attribution)
            return dataclasses.replace(found, impl=impl) if is_record else found

        return call

    # canonical_scores of rows in host memory are the CPU's work in any case.
    for name in ("attribute", "search", "count_larger"):
        monkeypatch.setattr(similarity, name, on_gpu(getattr(similarity, name)))


def world(
    seed: int, count: int, rows: int, dim: int
) -> tuple[np.ndarray, torch.Tensor, similarity.Attribution]:
    queries, gallery = oracle.planted(np.random.default_rng(seed), count, rows, dim)
    stored = torch.from_numpy(gallery).bfloat16()
    return queries, stored, similarity.attribute(queries, stored, impl="cpu", **SETTINGS)


def assert_enqueued(found: similarity_cuda.Enqueued, want: similarity.Attribution) -> None:
    assert found.settled().all()
    for field in ("ids", "scores", "influence", "support", "support_mass", "remainder"):
        np.testing.assert_array_equal(
            getattr(found, field).cpu().numpy(), getattr(want, field), err_msg=field
        )


# Fresh inputs every time: a kernel that leaves its output as it was would pass on the last one's.
@pytest.mark.parametrize("count", [1, 2, 32, 33, 63, 64, 65, 127, 128, 129, 256, 257, 1025])
@pytest.mark.parametrize("rows", [20_000, 65_537])
def test_many_rows(count: int, rows: int) -> None:
    queries, stored, want = world(int.from_bytes(os.urandom(4), "little"), count, rows, 768)
    on_device = stored.cuda()
    assert_same(want, similarity.attribute(queries, on_device, **SETTINGS))
    coded = similarity.compress(on_device)
    assert coded.coded is not None
    assert_same(want, similarity.attribute(queries, coded, **SETTINGS))
    assert_same(want, similarity.attribute(queries, similarity_cuda.Gallery(stored), **SETTINGS))


def test_cuda_tensors_are_read_where_they_lie() -> None:
    queries, stored, want = world(1, 9, 30_011, 96)
    wide = torch.empty((30_011, 104), dtype=torch.bfloat16, device="cuda")
    wide[:, 3:99] = stored.cuda()  # rows apart, and not at multiples of 16 bytes
    assert_same(want, similarity.attribute(queries, wide[:, 3:99], **SETTINGS))
    assert_same(want, similarity.attribute(torch.from_numpy(queries).cuda(), stored.cuda(), **SETTINGS))


def test_what_lay_in_memory_before_does_not_matter() -> None:
    queries, stored, want = world(2, 40, 40_000, 64)
    place = similarity_cuda.Gallery(stored)
    for value in (0, 255, 127):
        torch.full(
            (512 << 20,), value, dtype=torch.uint8, device="cuda"
        )  # goes back to the allocator at once
        torch.cuda.synchronize()
        assert_same(want, similarity.attribute(queries, place, **SETTINGS))


def test_two_streams_and_two_threads_do_not_meet() -> None:
    worlds = [world(seed, 20 + seed, 50_000, 64) for seed in (3, 4)]
    places = [similarity_cuda.Gallery(stored) for _, stored, _ in worlds]
    torch.cuda.synchronize()
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    assert_same(worlds[i][2], similarity.attribute(worlds[i][0], places[i], **SETTINGS))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("count", [5, 70])
def test_a_graph_holds_a_call(count: int, coded: bool) -> None:
    queries, stored, want = world(5, count, 50_000, 64)
    other = queries[::-1].copy()
    place = similarity_cuda.Gallery(stored)
    place = place.compressed() if coded else place
    values = torch.from_numpy(queries).cuda()
    similarity_cuda.enqueue(values, place, **SETTINGS)  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = similarity_cuda.enqueue(values, place, **SETTINGS)
    for _ in range(3):
        values.copy_(torch.from_numpy(other))
        graph.replay()
        assert_enqueued(found, similarity.attribute(other, stored, impl="cpu", **SETTINGS))
        values.copy_(torch.from_numpy(queries))
        graph.replay()
        assert_enqueued(found, want)


def test_more_than_two_billion_values() -> None:
    rows, dim = 2**31 // 64 + 4_000_000, 64
    if torch.cuda.mem_get_info()[0] < 2.2 * rows * dim * 2:
        pytest.skip("needs more free device memory")
    gallery = torch.empty((rows, dim), dtype=torch.bfloat16, device="cuda")
    for some in gallery.split(1 << 22):
        some.normal_(std=0.01)
    for row, value in ((5, 0.5), (rows - 1, 1.0), (2**31 // 64 + 1, 0.75)):
        gallery[row, 1] = value
    queries = np.zeros((3, dim), np.float32)
    queries[:, 1] = 1
    ids, scores = similarity.search(queries, gallery, k=3)
    assert ids.tolist() == [[rows - 1, 2**31 // 64 + 1, 5]] * 3
    assert scores.tolist() == [[1.0, 0.75, 0.5]] * 3


def test_a_streamed_gallery_takes_little_memory() -> None:
    queries, stored, want = world(6, 12, 400_000, 512)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert_same(want, similarity.attribute(queries, stored, impl="cuda", **SETTINGS))
    assert torch.cuda.max_memory_allocated() - before < 400 << 20


def test_pinned_rows_are_sent_from_where_they_lie() -> None:
    queries, stored, want = world(8, 12, 200_000, 100)
    wide = torch.empty((len(stored), 107), dtype=stored.dtype, pin_memory=True)
    wide[:, 3:103] = stored
    for gallery in (stored.pin_memory(), wide[:, 3:103]):
        assert_same(want, similarity.attribute(queries, gallery, impl="cuda", **SETTINGS))


def test_a_call_takes_little_memory_beside_the_gallery() -> None:
    queries, stored, _ = world(7, 2048, 100_000, 128)
    place = similarity_cuda.Gallery(stored)
    for some in (place, place.compressed()):
        for count, k in ((2048, 100), (2048, 1000), (32, 1000)):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            similarity.attribute(queries[:count], some, k=k, inv_tau=60.0, b=-0.2)
            assert torch.cuda.max_memory_allocated() - before < 256 << 20


def test_too_little_memory_says_how_much() -> None:
    free = torch.cuda.mem_get_info()[0]
    rows = np.broadcast_to(np.ones((1, 1024), np.float16), (int(free * 1.5) // 2048, 1024))
    with pytest.raises(
        RuntimeError, match=r"gallery: wanted [\d,]+ bytes on cuda:0, got [\d,]+ free; do: leave"
    ):
        similarity_cuda.Gallery(rows)


def test_a_fault_surfaces_at_its_launch_when_debugging() -> None:
    code = """
        import ctypes, numpy as np, torch
        from attribution import cuda_gallery, similarity, similarity_cuda
        place = similarity_cuda.Gallery(torch.ones((4096, 64), dtype=torch.float16))
        bad = place.shards[0]
        slab = type(bad).slab
        type(bad).slab = lambda self: (lambda s: (setattr(s, "stripes", 16), s)[1])(slab(self))
        try:
            similarity.search(np.ones((1, 64), np.float32), place, k=1)
        except RuntimeError as error:
            print(error, flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=Path(__file__).resolve().parents[1],
        env=os.environ | {"ATTRIBUTION_CUDA_DEBUG": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "cuda: filter" in done.stdout, done.stdout + done.stderr
