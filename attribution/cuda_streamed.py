"""A gallery in host memory, or in files mapped there, that goes through the device slab by slab."""

import ctypes
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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

SLAB_BYTES = 128 << 20  # of each of two buffers on the device
PIECE_BYTES = 2 << 20  # that one thread copies into pinned memory at a time
MOST_COPIERS = 12  # threads that do so: more get in the way of whoever feeds the device


class Streamed:
    """A gallery in host memory, or in files mapped there, that goes through the device slab by slab."""

    def __init__(self, library: Any, device: torch.device, inputs: arrays.Inputs) -> None:
        self.library, self.device, self.inputs = library, device, inputs
        self.storage, self.dim, self.rows = inputs.storage, inputs.queries.shape[1], inputs.rows
        require_few(self.rows)
        row_bytes = self.dim * inputs.shards[0].itemsize
        self.slab_rows = max(1, SLAB_BYTES // row_bytes // cuda.STRIPE_ROWS) * cuda.STRIPE_ROWS

    def slabs(self) -> Iterator[tuple[Rows, float]]:
        """Each slab with the bound of Rows.largest. The next one is on its way while one is worked on."""
        slabs = list(self._cut())
        most = max((len(slab) for _, slab in slabs), default=0)
        buffers = [_Buffer(most, self.dim, self.storage, self.device) for _ in range(min(2, len(slabs)))]
        # The sender ends before the link: with statements close what was opened last.
        with _Link(self.library, self.device, self.dim * 4) as link, ThreadPoolExecutor(1) as sender:
            if slabs:
                buffers[0].send(slabs[0][1], link, sender)
            for i, (first_row, slab) in enumerate(slabs):
                if i + 1 < len(slabs):
                    buffers[(i + 1) % 2].send(slabs[i + 1][1], link, sender)
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
            bits = shard.view(bits_type(self.storage))
            for first in range(0, len(shard), self.slab_rows):
                yield first_row + first, bits[first : first + self.slab_rows]
            first_row += len(shard)


class _Link:
    """The way to the device: threads that fill pinned memory, and a stream."""

    def __init__(self, library: Any, device: torch.device, row_bytes: int) -> None:
        self.library, self.device = library, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        copiers, piece = min(MOST_COPIERS, similarity.threads_allowed()), max(PIECE_BYTES, row_bytes)
        pinned = self.stream is not None
        self.pinned = torch.empty(copiers * 2 * piece, dtype=torch.uint8, pin_memory=pinned)
        self.link = ctypes.c_void_p()
        where = device.index or 0
        library.open_link(where, copiers, *cuda.pointers(self.pinned), piece, ctypes.byref(self.link))

    def __enter__(self) -> "_Link":
        return self

    def __exit__(self, *_: object) -> None:
        # A call that fails leaves copies under way: nobody else may get the memory before they land.
        if self.stream is not None:
            self.stream.synchronize()
        self.library.close_link(self.link)

    def copy(self, rows: np.ndarray, to: torch.Tensor) -> torch.cuda.Event | None:
        """Copies rows; the event tells when they have landed."""
        row_bytes = rows.shape[1] * rows.itemsize
        apart = rows.flags.writeable and rows.strides[0] >= row_bytes  # as the device wants what it reads
        staged = not (apart and torch.from_numpy(rows).is_pinned())
        pitch = to.stride(0) * to.element_size()
        stream = ctypes.c_void_p(None if self.stream is None else self.stream.cuda_stream)
        self.library.send(
            self.link, ctypes.c_void_p(rows.ctypes.data), rows.strides[0], row_bytes, len(rows),
            *cuda.pointers(to), pitch, int(staged), stream,
        )  # fmt: skip
        if self.stream is None:
            return None
        landed = torch.cuda.Event()
        landed.record(self.stream)
        return landed


class _Buffer:
    """Memory on the device for a slab, and the rows that are on their way there."""

    def __init__(self, rows: int, dim: int, storage: str, device: torch.device) -> None:
        self.device = device
        self.there = padded_rows(rows, dim, storage, device, "a slab of the gallery")
        self.used = torch.cuda.Event() if device.type == "cuda" else None
        self.free()

    def send(self, slab: np.ndarray, link: _Link, sender: ThreadPoolExecutor) -> None:
        """Starts the copy of these rows, behind all work on those before them."""
        if link.stream is not None and self.used is not None:
            link.stream.wait_event(self.used)
        self.on_the_way: Future[torch.cuda.Event | None] = sender.submit(
            link.copy, slab, self.there[: len(slab)]
        )

    def receive(self, count: int) -> torch.Tensor:
        """The rows, for work on the current stream."""
        landed = self.on_the_way.result()
        if landed is not None:
            torch.cuda.current_stream(self.device).wait_event(landed)
        return self.there[:count]

    def free(self) -> None:
        """The current stream has all its work on the rows before this."""
        if self.used is not None:
            self.used.record(torch.cuda.current_stream(self.device))
