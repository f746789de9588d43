"""A gallery that lies on the device, measured once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from attribution import cuda_device
from attribution import similarity_arrays as arrays
from attribution.cuda_rows import (
    Rows,
    bits_type,
    measure,
    none_refused,
    open_tensor,
    padded_rows,
    require_few,
    require_usable,
)
from attribution.cuda_streamed import SLAB_BYTES


class Gallery:
    """A gallery on a device. CUDA tensors are taken where they lie; anything else is copied there once.

    Norms are measured here, so that a call reads the rows once. The values must not change afterwards.
    ValueError names a row that is not finite; RuntimeError says how much memory was wanted and had.
    """

    is_cuda = True

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

    def scaled(self, scale: torch.Tensor | None) -> tuple[list[Rows], float]:
        """The shards with these scales, and the bound of Rows.largest over all. Waits if there are any."""
        if scale is None:
            return self.shards, self.largest
        refused, scaled = none_refused(self.device), []
        for shard in self.shards:
            own = scale[shard.first_row : shard.first_row + shard.rows.shape[0]]
            scaled.append(
                measure(self.library, shard.rows, self.storage, shard.first_row, own, refused, shard.stripes)
            )
        require_usable(refused, scale)
        return scaled, max(shard.largest() for shard in scaled)

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


def _is_sequence(gallery: Any) -> bool:
    return isinstance(gallery, Sequence) and not isinstance(gallery, str | bytes)


def _device_of(gallery: Any) -> Any:
    first = gallery[0] if _is_sequence(gallery) and len(gallery) else gallery
    return first.device if isinstance(first, torch.Tensor) and first.device.type == "cuda" else None
