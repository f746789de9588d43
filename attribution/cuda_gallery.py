"""A gallery that lies on the device, measured once."""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attribution import cuda_device
from attribution import similarity_arrays as arrays
from attribution.cuda_rows import (
    Rows,
    bits_type,
    encode,
    measure,
    none_refused,
    open_tensor,
    padded_rows,
    require_few,
    require_usable,
)
from attribution.cuda_streamed import SLAB_BYTES

LARGEST_CODED = 2.0**40  # length of a row
# How much of a score codes may miss, in standard deviations of the scores of random rows.
MOST_MISSED = 1.0


@dataclass(frozen=True)
class Coded:
    """The rows of a gallery with codes, less their center: [dim] of float32."""

    center: torch.Tensor
    shards: list[Rows]
    largest: float

    @property
    def nbytes(self) -> int:
        """What they hold beside the gallery."""
        kept = [tensor for shard in self.shards for tensor in (shard.codes, shard.stripes)]
        return sum(tensor.untyped_storage().nbytes() for tensor in [self.center, *kept] if tensor is not None)


class Gallery:
    """A gallery on a device. CUDA tensors are taken where they lie; anything else is copied there once.

    Norms are measured here, so that a call reads the rows once. The values must not change afterwards.
    ValueError names a row that is not finite; RuntimeError says how much memory was wanted and had.
    """

    is_cuda = True
    coded: Coded | None = None

    def __init__(self, gallery: Any, *, device: Any = None) -> None:
        self.library, self.device = cuda_device.open_device(
            device if device is not None else _device_of(gallery)
        )
        cuda_device.require_current(self.library, self.device)
        shards = list(gallery) if _is_sequence(gallery) else [gallery]
        if not shards:
            raise ValueError("gallery: wanted at least one shard, got an empty sequence")
        refused = none_refused(self.device)
        self.shards: list[Rows] = []
        for i, shard in enumerate(shards):
            name = f"gallery shard {i}" if _is_sequence(gallery) else "gallery"
            rows, storage = self._on_device(shard, name)
            if i == 0:
                self.storage, self.dim = storage, rows.shape[1]
            if storage != self.storage:
                raise TypeError(f"{name}: wanted {self.storage} as shard 0 has, got {storage}")
            if rows.shape[1] != self.dim:
                raise ValueError(f"{name}: wanted dim {self.dim} as shard 0 has, got {list(rows.shape)}")
            self.shards.append(measure(self.library, rows, storage, self.rows, None, refused))
        require_few(self.rows)
        require_usable(refused, None)
        self.largest = max(shard.largest() for shard in self.shards)

    @property
    def rows(self) -> int:
        """The number of rows of all shards together."""
        return sum(shard.rows.shape[0] for shard in self.shards)

    def compressed(self) -> "Gallery":
        """The same gallery with codes of eight bits beside its values: dim bytes a row, and some.

        As attribution.similarity.compress says, but that 128 rows share a step. Where the codes miss too much
        of the rows, or values lie near the ends of float32, there are none. RuntimeError says how much memory
        was wanted and had.
        """
        if self.coded is not None or not self.rows or self.dim > arrays.CODED_DIM:
            return self
        if not self.largest < LARGEST_CODED:
            return self
        cuda_device.require_current(self.library, self.device)
        center, length = self._center()
        shards = [encode(self.library, shard, self.storage, center) for shard in self.shards]
        missed = torch.cat([shard.stripes for shard in shards])[:, 2].median()
        if missed * self.dim**0.5 > MOST_MISSED * length and not always_coded():
            return self
        made = copy.copy(self)
        made.coded = Coded(center, shards, max(shard.largest(self._center_length) for shard in shards))
        return made

    def scaled(self, scale: torch.Tensor | None, *, coded: bool = False) -> tuple[list[Rows], float]:
        """The shards with these scales, and the bound of Rows.largest over all. Waits if there are any.

        coded: with their codes, of which there are some.
        """
        held = self.coded if coded else None
        shards = self.shards if held is None else held.shards
        if scale is None:
            return shards, self.largest if held is None else held.largest
        refused, scaled = none_refused(self.device), []
        for shard in shards:
            own = scale[shard.first_row : shard.first_row + shard.rows.shape[0]]
            scaled.append(
                measure(self.library, shard.rows, self.storage, shard.first_row, own, refused, shard)
            )
        require_usable(refused, scale)
        center = 0.0 if held is None else self._center_length
        return scaled, max(shard.largest(center) for shard in scaled)

    @property
    def _center_length(self) -> float:
        """An upper bound: half of the rows have values as large as the median, or larger."""
        return 1.5 * self.largest

    def _center(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[dim], the median of some rows, and how far from it half of them are."""
        step = max(1, self.rows // arrays.CENTER_ROWS)
        some = []
        for shard in self.shards:
            rows = shard.rows[::step].contiguous()
            some.append(rows.view(getattr(torch, self.storage)).float())
        rows = torch.cat(some)
        center = rows.median(dim=0).values.contiguous()
        return center, torch.linalg.vector_norm(rows - center, dim=1).median()

    def _on_device(self, shard: Any, name: str) -> tuple[torch.Tensor, str]:
        if isinstance(shard, torch.Tensor) and shard.device == self.device:
            return open_tensor(shard, name)
        if isinstance(shard, torch.Tensor):
            shard = shard.cpu()
        view, storage = arrays.open_rows(shard, name)
        rows = padded_rows(len(view), view.shape[1], storage, self.device, "gallery")
        step = max(1, SLAB_BYTES // max(1, view.shape[1] * view.itemsize))
        for first in range(0, len(view), step):
            some = np.array(view[first : first + step])
            rows[first : first + step].copy_(torch.from_numpy(some.view(bits_type(storage))))
        return rows, storage


def always_coded() -> bool:
    """ATTRIBUTION_CODES=always: codes are read even where that costs more than it saves."""
    return os.environ.get("ATTRIBUTION_CODES", "") == "always"


def _is_sequence(gallery: Any) -> bool:
    return isinstance(gallery, Sequence) and not isinstance(gallery, str | bytes)


def _device_of(gallery: Any) -> Any:
    first = gallery[0] if _is_sequence(gallery) and len(gallery) else gallery
    return first.device if isinstance(first, torch.Tensor) and first.device.type == "cuda" else None
