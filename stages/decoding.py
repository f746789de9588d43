"""Encoded pictures as a net takes them, made ahead of it by threads or processes: the same bytes by either.

Pillow lets go of the interpreter while it decodes and resizes, but not for all that it does besides, and each
time it waits to have it back: threads end at some thousand pictures a second, on however many cores.
Processes go on from there. A child imports what this module does, which is why there is no torch in it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8

from attribution.images import ImageError, decode_image
from attribution.preprocessing import Preprocessing
from stages.processes import killed_worker_told, process_pool

Owner = TypeVar("Owner")
BATCHES_AHEAD = 2
# To start takes half a second on each core. On 16, where threads end at 1,100 images a second and processes
# at 2,000, that is gained back by about 1,500 images; on 2, at 330 a second to their 300, by 2,000.
FEWEST_FOR_PROCESSES = 4096


@dataclass(frozen=True)
class EncodedImage:
    """A picture as its table holds it."""

    image_id: str
    data: bytes
    sha256: str


@dataclass(frozen=True)
class PixelLoader:
    """`fill` brings pictures into the rows of a slab from a given one on, in any worker of `pool`."""

    pool: Executor
    workers: int
    slabs: UInt8[np.ndarray, "slabs images height width 3"]
    fill: Callable[[int, int, Sequence[EncodedImage]], object]

    def pixels_ahead(
        self, batches: Iterable[tuple[Owner, Sequence[EncodedImage]]]
    ) -> Generator[tuple[Owner, UInt8[np.ndarray, "images height width 3"]], None, None]:
        """Each batch decoded and resized, in order, with its owner; the next are made while one is in use.

        Pixels hold until the next are asked for. One iterator at a time. Raises ImageError naming the image
        that cannot be read, BrokenProcessPool where a process was killed.
        """
        ahead: deque[tuple[Owner, np.ndarray, list[Future[object]]]] = deque()

        def first() -> tuple[Owner, np.ndarray]:
            for part in ahead[0][2]:
                part.result()
            return ahead.popleft()[:2]

        try:
            with killed_worker_told():
                for number, (owner, batch) in enumerate(batches):
                    slab = number % len(self.slabs)
                    ahead.append((owner, self.slabs[slab, : len(batch)], self._parts(slab, batch)))
                    if len(ahead) == len(self.slabs):
                        yield first()
                while ahead:
                    yield first()
        except ImageError as error:
            # From a process it comes without the line that raised it, by which attribution.command knows it.
            raise ImageError(str(error)) from error
        finally:
            # No cancelling: a pool whose process was killed meanwhile stumbles over it and hangs. What a pool
            # that has ended cancelled itself is done, yet waiting for it would not end.
            wait([part for _, _, parts in ahead for part in parts if not part.done()])

    def _parts(self, slab: int, batch: Sequence[EncodedImage]) -> list[Future[object]]:
        share = -(-len(batch) // self.workers)
        return [
            self.pool.submit(self.fill, slab, start, batch[start : start + share])
            for start in range(0, len(batch), share)
        ]


@contextlib.contextmanager
def pixel_loader(
    preprocessing: Preprocessing, batch_size: int, workers: int, images: int
) -> Iterator[PixelLoader]:
    """A loader for batches of at most `batch_size`, of so many `images` in all.

    Its workers are processes where several are to bring enough images to be worth their start, else threads.
    What they share has no name on the disk, so that nothing is left of it however they end.
    """
    shape = (BATCHES_AHEAD + 1, batch_size, preprocessing.crop, preprocessing.crop, 3)
    if workers > 1 and images >= FEWEST_FOR_PROCESSES:
        memory = multiprocessing.get_context("spawn").RawArray("B", math.prod(shape))
        slabs = _view(memory, shape)
        with process_pool(workers, _begin, memory, shape, preprocessing) as pool:
            yield PixelLoader(pool, workers, slabs, _fill_shared)
    else:
        slabs = np.empty(shape, np.uint8)
        threads = ThreadPoolExecutor(workers)
        try:
            yield PixelLoader(threads, workers, slabs, functools.partial(_fill, slabs, preprocessing))
        finally:
            threads.shutdown(cancel_futures=True)


def prepare(
    images: Sequence[EncodedImage], preprocessing: Preprocessing
) -> UInt8[np.ndarray, "images height width 3"]:
    """The images decoded and resized."""
    return preprocessing.pixels([decode_image(one.data, name=f"image {one.image_id}") for one in images])


def _fill(
    slabs: np.ndarray, preprocessing: Preprocessing, slab: int, start: int, images: Sequence[EncodedImage]
) -> None:
    for row, image in enumerate(images, start):
        slabs[slab, row] = prepare([image], preprocessing)[0]


def _view(memory: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(memory, np.uint8).reshape(shape)


def _begin(memory: Any, shape: tuple[int, ...], preprocessing: Preprocessing) -> None:
    # Shared memory reaches a process as it starts, not with its work.
    global _fill_here
    _fill_here = functools.partial(_fill, _view(memory, shape), preprocessing)


def _fill_shared(slab: int, start: int, images: Sequence[EncodedImage]) -> None:
    _fill_here(slab, start, images)


_fill_here: Callable[[int, int, Sequence[EncodedImage]], None]
