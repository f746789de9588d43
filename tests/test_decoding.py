"""stages.decoding: the same pixels in order, by threads and by processes of which nothing is left."""

from __future__ import annotations

import dataclasses
import functools
import io
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attribution.command import in_a_line
from attribution.images import ImageError, decode_image
from attribution.preprocessing import Preprocessing
from stages import decoding
from stages.decoding import EncodedImage, PixelLoader, pixel_loader

PLAIN = Preprocessing("shortest", 12, 10, "bicubic", (0.0,) * 3, (1.0,) * 3)
BATCH = 5  # images at most
KINDS = ("threads", "processes")


@functools.cache
def picture(seed: int) -> EncodedImage:
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 16, 3), dtype=np.uint8))
    file = io.BytesIO()
    image.save(file, "JPEG")
    return EncodedImage(f"picture {seed}", file.getvalue(), "")


BAD = EncodedImage("bad", picture(0).data[:200], "")


@pytest.fixture(scope="module")
def loaders() -> Iterator[dict[str, PixelLoader]]:
    """One of 3 threads and one of 3 processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "FEWEST_FOR_PROCESSES", 100)
        with pixel_loader(PLAIN, BATCH, 3, 99) as threads, pixel_loader(PLAIN, BATCH, 3, 100) as processes:
            yield {"threads": threads, "processes": processes}
    assert not multiprocessing.active_children()


def test_processes_are_for_many_images_and_several_workers(loaders: dict[str, PixelLoader]) -> None:
    assert type(loaders["threads"].pool) is ThreadPoolExecutor
    assert type(loaders["processes"].pool) is ProcessPoolExecutor
    for workers, images in ((1, 10**6), (8, decoding.FEWEST_FOR_PROCESSES - 1)):
        with pixel_loader(PLAIN, BATCH, workers, images) as loader:
            assert type(loader.pool) is ThreadPoolExecutor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[1], [2, 5], [5, 5, 5, 5, 5, 5, 5, 4, 1, 5], []])
def test_pixels_come_in_order_each_with_its_owner(
    loaders: dict[str, PixelLoader], kind: str, sizes: list[int]
) -> None:
    groups = [[picture(10 * number + row) for row in range(size)] for number, size in enumerate(sizes)]
    seen = 0
    for owner, pixels in loaders[kind].pixels_ahead(enumerate(groups)):
        assert owner == seen
        wanted = PLAIN.pixels([decode_image(one.data) for one in groups[owner]])
        np.testing.assert_array_equal(pixels, wanted)
        seen += 1
    assert seen == len(groups)


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupt_image_is_named_in_a_line_and_the_loader_serves_on(
    loaders: dict[str, PixelLoader], kind: str
) -> None:
    good = [picture(row) for row in range(BATCH)]
    batches = [good, [*good[:2], BAD, *good[3:]], good, good, good]
    came = []
    with pytest.raises(ImageError, match=r"^image bad: truncated or corrupt image") as raised:
        came += [owner for owner, _ in loaders[kind].pixels_ahead(enumerate(batches))]
    assert in_a_line(raised.value) == str(raised.value)
    # What was under way has ended, and writes no more into pixels of others.
    other = [picture(row) for row in range(50, 50 + BATCH)]
    wanted = PLAIN.pixels([decode_image(one.data) for one in other])
    for _, pixels in loaders[kind].pixels_ahead([(None, other)] * 4):
        np.testing.assert_array_equal(pixels, wanted)


def test_what_has_begun_has_ended_with_the_iterator(loaders: dict[str, PixelLoader]) -> None:
    ended = []

    def slow(slab: int, start: int, images: Sequence[EncodedImage]) -> None:
        time.sleep(0.05)
        ended.append((slab, start))

    loader = dataclasses.replace(loaders["threads"], fill=slow)
    pixels = loader.pixels_ahead([(None, [picture(0)] * 3)] * 9)
    next(pixels)
    assert len(ended) < 9
    pixels.close()
    assert sorted(ended) == [(slab, start) for slab in range(3) for start in range(3)]


def test_an_iterator_that_outlives_its_pool_ends() -> None:
    """As after an error in who used the pixels: the pool ends first, and cancels what has not begun."""
    with pixel_loader(PLAIN, BATCH, 1, 1) as loader:
        slow = dataclasses.replace(loader, fill=lambda *part: time.sleep(0.05))
        pixels = slow.pixels_ahead([(None, [picture(0)])] * 9)
        next(pixels)
    closing = threading.Thread(target=pixels.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()


def test_a_process_imports_no_torch(loaders: dict[str, PixelLoader]) -> None:
    modules = loaders["processes"].pool.submit(eval, "sorted(__import__('sys').modules)").result()
    assert "stages.decoding" in modules
    assert "torch" not in modules


def test_what_is_shared_has_no_name(loaders: dict[str, PixelLoader]) -> None:
    """So that nothing can be left of it, whoever is killed in whichever order."""
    address = loaders["processes"].slabs.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= address < last:
            assert line.split()[1] == "rw-s"
            assert line.endswith(" (deleted)"), line
            return
    pytest.fail("the slabs are in no mapping")


def test_a_killed_process_ends_the_loading_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "FEWEST_FOR_PROCESSES", 1)
    processes, threads = set(multiprocessing.active_children()), threading.active_count()

    def batches() -> Iterator[tuple[int, list[EncodedImage]]]:
        for number in range(10**4):
            if number == 4:
                os.kill(loader.pool.submit(os.getpid).result(), signal.SIGKILL)
            yield number, [picture(0)] * BATCH

    why = "a worker process was killed, .*; run again to go on from there; workers: 1 and"
    with pixel_loader(PLAIN, BATCH, 2, 1) as loader, pytest.raises(BrokenProcessPool, match=why) as raised:
        list(loader.pixels_ahead(batches()))
    assert in_a_line(raised.value) == str(raised.value)
    assert set(multiprocessing.active_children()) == processes
    assert threading.active_count() == threads
