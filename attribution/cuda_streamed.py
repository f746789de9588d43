"""A gallery in host memory, or in files mapped there, that goes through the device slab by slab."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from attribution import cuda_library as cuda
from attribution import similarity
from attribution import similarity_arrays as arrays
from attribution.cuda_rows import (
    Rows,
    bits_type,
    measure,
    none_refused,
    padded_rows,
    require_few,
    require_usable,
)

SLAB_BYTES = 64 << 20  # of each of two buffers on the device
PIECE_BYTES = 4 << 20  # that one thread copies into pinned memory, and the device from the processor's caches
MOST_COPIERS = 16  # threads that do so: few are slower than the link to the device


class Streamed:
    """A gallery in host memory, or in files mapped there, that goes through the device slab by slab."""

    def __init__(self, library: Any, device: torch.device, inputs: arrays.Inputs) -> None:
        self.library, self.device, self.inputs = library, device, inputs
        self.storage, self.dim, self.rows = inputs.storage, inputs.queries.shape[1], inputs.rows
        require_few(self.rows)
        self.row_bytes = self.dim * inputs.shards[0].itemsize
        self.slab_rows = max(1, SLAB_BYTES // self.row_bytes // cuda.STRIPE_ROWS) * cuda.STRIPE_ROWS

    def slabs(self) -> Iterator[tuple[Rows, float]]:
        """Each slab with the bound of Rows.largest. The next one is on its way while one is worked on."""
        slabs = list(self._cut())
        most = max((len(slab) for _, slab in slabs), default=0)
        buffers = [_Buffer(most, self.dim, self.storage, self.device) for _ in range(min(2, len(slabs)))]
        copiers = min(MOST_COPIERS, similarity.threads_allowed())
        piece_rows = min(most, max(1, PIECE_BYTES // self.row_bytes))
        link = _Link(piece_rows, self.dim, self.storage, self.device, copiers)
        with ThreadPoolExecutor(copiers) as pool:
            if slabs:
                buffers[0].send(slabs[0][1], link, pool)
            for i, (first_row, slab) in enumerate(slabs):
                if i + 1 < len(slabs):
                    buffers[(i + 1) % 2].send(slabs[i + 1][1], link, pool)
                rows = buffers[i % 2].receive(len(slab))
                scale = None
                if self.inputs.scale is not None:
                    own = self.inputs.scale[first_row : first_row + len(slab)]
                    scale = torch.tensor(own, device=self.device)
                refused = none_refused(self.device)
                measured = measure(self.library, rows, self.storage, first_row, scale, refused)
                require_usable(refused, self.inputs.scale)
                yield measured, measured.largest()
                buffers[i % 2].free()

    def _cut(self) -> Iterator[tuple[int, np.ndarray]]:
        first_row = 0
        for shard in self.inputs.shards:
            for first in range(0, len(shard), self.slab_rows):
                yield first_row + first, shard[first : first + self.slab_rows]
            first_row += len(shard)


class _Link:
    """The way to the device: a piece of pinned memory for each thread, and a stream."""

    def __init__(self, rows: int, dim: int, storage: str, device: torch.device, copiers: int) -> None:
        self.rows, self.storage = rows, storage
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        dtype = torch.int32 if storage == "float32" else torch.int16
        self.pieces: SimpleQueue[tuple[torch.Tensor, torch.cuda.Event | None]] = SimpleQueue()
        for _ in range(copiers):
            here = torch.empty((rows, dim), dtype=dtype, pin_memory=self.stream is not None)
            self.pieces.put((here, None))

    def copy(self, rows: np.ndarray, to: torch.Tensor) -> torch.cuda.Event | None:
        """Copies up to `self.rows` rows; the event tells when they have landed. For any thread."""
        here, sent = self.pieces.get()
        try:
            if sent is not None:
                sent.synchronize()  # the pinned memory may be written again
            np.copyto(here[: len(rows)].numpy(), rows.view(bits_type(self.storage)))
            if self.stream is None:
                to.copy_(here[: len(rows)])
            else:
                with torch.cuda.stream(self.stream):
                    to.copy_(here[: len(rows)], non_blocking=True)
                    sent = torch.cuda.Event()
                    sent.record(self.stream)
        finally:
            self.pieces.put((here, sent))
        return sent


class _Buffer:
    """Memory on the device for a slab, and the pieces that are on their way there."""

    def __init__(self, rows: int, dim: int, storage: str, device: torch.device) -> None:
        self.device = device
        self.there = padded_rows(rows, dim, storage, device, "a slab of the gallery")
        self.pieces: list[Future[torch.cuda.Event | None]] = []
        self.used = torch.cuda.Event() if device.type == "cuda" else None
        self.free()

    def send(self, slab: np.ndarray, link: _Link, pool: ThreadPoolExecutor) -> None:
        """Starts the copy of these rows, behind all work on those before them."""
        if link.stream is not None and self.used is not None:
            link.stream.wait_event(self.used)
            # A call that fails leaves copies under way: nobody else may get the memory before they land.
            self.there.record_stream(link.stream)
        for first in range(0, len(slab), link.rows):
            some = slice(first, min(first + link.rows, len(slab)))
            self.pieces.append(pool.submit(link.copy, slab[some], self.there[some]))

    def receive(self, count: int) -> torch.Tensor:
        """The rows, for work on the current stream."""
        for piece in self.pieces:
            landed = piece.result()
            if landed is not None:
                torch.cuda.current_stream(self.device).wait_event(landed)
        self.pieces.clear()
        return self.there[:count]

    def free(self) -> None:
        """The current stream has all its work on the rows before this."""
        if self.used is not None:
            self.used.record(torch.cuda.current_stream(self.device))
