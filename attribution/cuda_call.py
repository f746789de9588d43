"""The arguments of a call, checked and on their way: which queries walk together, over which rows."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attribution import cuda_device, similarity
from attribution import cuda_library as cuda
from attribution import similarity_arrays as arrays
from attribution.cuda_batch import Batch
from attribution.cuda_gallery import Gallery
from attribution.cuda_rows import Rows
from attribution.cuda_streamed import Streamed

# Queries that share a walk: what reads the gallery seldom enough to be bound by arithmetic.
QUERY_BATCH = 1024
WORKSPACE_BYTES = 192 << 20  # of all batches that walk together


@dataclass(frozen=True)
class Settings:
    """What is looked for; inv_tau None: the top k alone."""

    k: int
    inv_tau: float | None
    b: float

    def search(self) -> cuda.Search:
        """The same, as the library wants it."""
        if self.inv_tau is None or self.b == 0:
            return cuda.Search(self.k, 0.0, 0.0, 0.0, 0)
        # With room for the roundings of weight(), as in csrc/weight.h.
        depth = max(float(np.log(-self.b)), -746.0) * (1 + 1e-12) - 1e-12
        return cuda.Search(self.k, self.inv_tau, self.b, depth / self.inv_tau, similarity.WINDOW_CAP)


class Call:
    """Checked arguments on the device."""

    def __init__(self, queries: Any, gallery: Any, scale: Any, offset: Any) -> None:
        on_device = getattr(gallery, "is_cuda", False) or _is_cuda_sequence(gallery)
        if on_device and not isinstance(gallery, Gallery):
            gallery = Gallery(gallery)
        self.host_inputs: arrays.Inputs | None = None
        self.gallery: Gallery | Streamed
        if isinstance(gallery, Gallery):
            self.gallery, self.library, self.device = gallery, gallery.library, gallery.device
            cuda_device.require_current(self.library, self.device)
            stand_in = np.zeros((0, gallery.dim), np.float32)
            inputs = arrays.open_inputs(on_host(queries), stand_in, None, on_host(offset))
            self.scale = None if scale is None else self._vector(scale, gallery.rows)
        else:
            self.library, self.device = cuda_device.open_device()
            cuda_device.require_current(self.library, self.device)
            inputs = arrays.open_inputs(on_host(queries), gallery, on_host(scale), on_host(offset))
            self.gallery, self.host_inputs = Streamed(self.library, self.device, inputs), inputs
        inputs.require_finite_queries()
        self.queries, self.offset = inputs.queries, inputs.offset

    @property
    def rows(self) -> int:
        """The number of gallery rows."""
        return self.gallery.rows

    def _vector(self, scale: Any, rows: int) -> torch.Tensor:
        values = scale if isinstance(scale, torch.Tensor) else torch.from_numpy(np.array(scale))
        if values.dtype != torch.float32:
            raise TypeError(f"scale: wanted float32, got {values.dtype}")
        if values.shape != (rows,):
            raise ValueError(
                f"scale: wanted one value for each of {rows} gallery rows, got shape {list(values.shape)}"
            )
        return values.detach().to(self.device).contiguous()

    def batch(self, which: np.ndarray, capacity: int, *, operand: str | None = None) -> Batch:
        """These queries on the device, with room for candidates; operand: codes, where not the values."""
        some = in_a_row(which)
        values, offset = self.queries[some], None if self.offset is None else self.offset[some]
        coded = self.gallery.coded if operand is not None and isinstance(self.gallery, Gallery) else None
        return Batch(
            self.library, self.device, self.gallery.storage, operand or self.gallery.storage,
            None if coded is None else coded.center, which, values, offset, min(capacity, self.rows),
        )  # fmt: skip

    def sources(self, batches: list[Batch], *, coded: bool = False) -> Iterator[tuple[Batch, int, Rows]]:
        """Every batch with every slab, noted in the batch; slabs are streamed once for all batches."""
        if isinstance(self.gallery, Gallery):
            shards, largest = self.gallery.scaled(self.scale, coded=coded)
            for batch in batches:
                batch.note(shards, largest)
                for index, shard in enumerate(shards):
                    yield batch, index, shard
            return
        for rows, largest in self.gallery.slabs():
            for batch in batches:
                batch.note([rows], largest)
                yield batch, 0, rows

    def groups(self, which: np.ndarray, bytes_each: int) -> Iterable[list[np.ndarray]]:
        """Queries in batches that walk together."""
        size = max(1, min(QUERY_BATCH, WORKSPACE_BYTES // bytes_each))
        batches = [which[first : first + size] for first in range(0, len(which), size)]
        together = 1
        if isinstance(self.gallery, Streamed):
            together = max(1, WORKSPACE_BYTES // (size * bytes_each))
        return [batches[first : first + together] for first in range(0, len(batches), together)]


def in_a_row(which: np.ndarray) -> slice | np.ndarray:
    """The same ascending numbers, as a slice if none is missing between them: that copies nothing."""
    if len(which) and which[-1] - which[0] == len(which) - 1:
        return slice(int(which[0]), int(which[-1]) + 1)
    return which


def on_host(values: Any) -> Any:
    """The same values where numpy can read them."""
    return values.detach().cpu() if isinstance(values, torch.Tensor) and values.is_cuda else values


def _is_cuda_sequence(gallery: Any) -> bool:
    return isinstance(gallery, list | tuple) and bool(gallery) and getattr(gallery[0], "is_cuda", False)
