"""A gallery in host memory, or in files mapped there, that goes through the device slab by slab."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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

SLAB_BYTES = 64 << 20  # of each of two buffers on either side
MOST_COPIERS = 8  # threads into pinned memory: one alone is slower than the link to the device


class Streamed:
    """A gallery in host memory, or in files mapped there, that goes through the device slab by slab."""

    def __init__(self, library: Any, device: torch.device, inputs: arrays.Inputs) -> None:
        self.library, self.device, self.inputs = library, device, inputs
        self.storage, self.dim, self.rows = inputs.storage, inputs.queries.shape[1], inputs.rows
        require_few(self.rows)
        row_bytes = self.dim * inputs.shards[0].itemsize
        self.slab_rows = max(cuda.STRIPE_ROWS, SLAB_BYTES // row_bytes // cuda.STRIPE_ROWS * cuda.STRIPE_ROWS)

    def slabs(self) -> Iterator[tuple[Rows, float]]:
        """Each slab with the bound of Rows.largest. The next one is on its way while one is worked on."""
        copiers = min(MOST_COPIERS, similarity.threads_allowed())
        with ThreadPoolExecutor(copiers) as pool, ThreadPoolExecutor(1) as sender:
            yield from self._sent(sender, pool, copiers)

    def _sent(
        self, sender: ThreadPoolExecutor, pool: ThreadPoolExecutor, copiers: int
    ) -> Iterator[tuple[Rows, float]]:
        pieces = list(self._pieces())
        most = max((len(piece) for _, piece in pieces), default=0)
        buffers = [_Buffer(most, self.dim, self.storage, self.device) for _ in range(min(2, len(pieces)))]
        sent = [sender.submit(buffers[0].send, pieces[0][1], pool, copiers)] if pieces else []
        for i, (first_row, piece) in enumerate(pieces):
            sent[i].result()
            if i + 1 < len(pieces):
                sent.append(sender.submit(buffers[(i + 1) % 2].send, pieces[i + 1][1], pool, copiers))
            rows = buffers[i % 2].receive(len(piece))
            scale = None
            if self.inputs.scale is not None:
                own = self.inputs.scale[first_row : first_row + len(piece)]
                scale = torch.tensor(own, device=self.device)
            refused = none_refused(self.device)
            measured = measure(self.library, rows, self.storage, first_row, scale, refused)
            require_usable(refused, self.inputs.scale)
            yield measured, measured.largest()
            buffers[i % 2].free()

    def _pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        first_row = 0
        for shard in self.inputs.shards:
            for first in range(0, len(shard), self.slab_rows):
                yield first_row + first, shard[first : first + self.slab_rows]
            first_row += len(shard)


class _Buffer:
    """Pinned memory here and memory on the device, with a copy between them on a stream of its own."""

    def __init__(self, rows: int, dim: int, storage: str, device: torch.device) -> None:
        self.device, self.storage = device, storage
        self.there = padded_rows(rows, dim, storage, device, "a slab of the gallery")
        self.real = device.type == "cuda"
        dtype = torch.int32 if storage == "float32" else torch.int16
        self.here = torch.empty((rows, dim), dtype=dtype, pin_memory=self.real)
        if self.real:
            self.stream = torch.cuda.Stream(device)
            self.sent, self.used = torch.cuda.Event(), torch.cuda.Event()
            self.used.record(torch.cuda.current_stream(device))
            # A call that fails leaves a copy under way: nobody else may get the memory before it has landed.
            self.there.record_stream(self.stream)

    def send(self, piece: np.ndarray, pool: ThreadPoolExecutor, copiers: int) -> None:
        """Starts the copy of these rows."""
        if self.real:
            self.sent.synchronize()  # the pinned memory may be written again
        here = self.here[: len(piece)]
        to, bits = here.numpy(), piece.view(bits_type(self.storage))
        bounds = [len(piece) * i // copiers for i in range(copiers + 1)]
        parts = [slice(*bound) for bound in itertools.pairwise(bounds)]
        list(pool.map(lambda part: np.copyto(to[part], bits[part]), parts))
        if not self.real:
            self.there[: len(piece)].copy_(here)
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.used)
            self.there[: len(piece)].copy_(here, non_blocking=True)
            self.sent.record(self.stream)

    def receive(self, count: int) -> torch.Tensor:
        """The rows, for work on the current stream."""
        if self.real:
            torch.cuda.current_stream(self.device).wait_event(self.sent)
        return self.there[:count]

    def free(self) -> None:
        """The current stream has all its work on the rows before this."""
        if self.real:
            self.used.record(torch.cuda.current_stream(self.device))
