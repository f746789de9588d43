"""Gallery rows in device memory, and what is known of them before a walk: their error bounds."""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attribution import cuda_library as cuda
from attribution import similarity_arrays as arrays
from attribution.cuda_device import allocate, stream_of

ALL_ONES = -1  # as a signed word: nothing was refused


@dataclass(frozen=True)
class Rows:
    """Some rows in device memory, with their scales and the error bounds of their stripes."""

    rows: torch.Tensor  # [rows, dim], rows may be apart
    first_row: int
    scale: torch.Tensor | None
    stripes: torch.Tensor  # [stripes, STRIPE_WORDS]: norm, scale, residual, step
    codes: torch.Tensor | None = None  # [rows, dim], which the filter reads in place of the values

    def slab(self) -> cuda.Slab:
        """The same, as the library wants it."""
        rows, scale, stripes, codes = cuda.pointers(self.rows, self.scale, self.stripes, self.codes)
        stride = self.rows.stride(0) * self.rows.element_size()
        pitch = 0 if self.codes is None else self.codes.stride(0)
        return cuda.Slab(rows, stride, self.rows.shape[0], self.first_row, scale, stripes, codes, pitch)

    def largest(self, center: float = 0.0) -> float:
        """An upper bound of (norm + center) * max(scale, 1) that tells whether float32 is safe. Waits."""
        if not len(self.stripes):
            return 0.0
        norm, scale = self.stripes[:, :2].amax(dim=0).tolist()
        return (norm + center) * max(scale, 1.0)


def measure(
    library: Any,
    rows: torch.Tensor,
    storage: str,
    first_row: int,
    scale: torch.Tensor | None,
    refused: torch.Tensor,
    known: Rows | None = None,
) -> Rows:
    """The rows with their error bounds; `refused` gets the first row that is not usable. Does not wait.

    known: the same rows with another scale, from which all else is taken.
    """
    norms, codes = (None, None) if known is None else (known.stripes, known.codes)
    measured = Rows(rows, first_row, scale, room_for_stripes(rows), codes)
    stripes = measured.stripes
    library.measure(
        ctypes.byref(measured.slab()), cuda.STORAGES.index(storage), rows.shape[1],
        *cuda.pointers(norms, stripes, refused), stream_of(rows.device),
    )  # fmt: skip
    return measured


def room_for_stripes(rows: torch.Tensor) -> torch.Tensor:
    """Room for the error bounds of these rows."""
    stripes = -(-rows.shape[0] // cuda.STRIPE_ROWS)
    return torch.empty((stripes, cuda.STRIPE_WORDS), dtype=torch.float32, device=rows.device)


def encode(library: Any, known: Rows, storage: str, center: torch.Tensor) -> Rows:
    """The same rows with codes, and the error bounds of these. Does not wait.

    RuntimeError says how much memory was wanted and had.
    """
    rows = known.rows
    pitch = -(-rows.shape[1] // 16) * 16  # where the copy engine wants a row to begin
    codes = allocate((rows.shape[0], pitch), torch.int8, rows.device, "codes")[:, : rows.shape[1]]
    coded = Rows(rows, known.first_row, None, room_for_stripes(rows), codes)
    library.encode(
        ctypes.byref(coded.slab()), cuda.STORAGES.index(storage), rows.shape[1],
        *cuda.pointers(center, coded.stripes), stream_of(rows.device),
    )  # fmt: skip
    return coded


def none_refused(device: torch.device) -> torch.Tensor:
    """A word that kernels lower to the first row they refuse."""
    return torch.full((), ALL_ONES, dtype=torch.int64, device=device)


def require_usable(refused: torch.Tensor, scale: Any) -> None:
    """No row was refused. Waits."""
    code = int(refused.item())
    if code == ALL_ONES:
        return
    row, of_values = divmod(code, 2)
    if of_values:
        raise ValueError(f"gallery row {row}: wanted finite values, got NaN or infinity")
    raise ValueError(f"gallery row {row}: wanted a finite scale >= 0, got {float(scale[row]):f}")


def require_few(rows: int) -> None:
    """Candidates know their rows by 32 bits."""
    if rows >= 2**32 - 1:
        raise ValueError(
            f'gallery: wanted fewer than 2^32 - 1 rows with impl="cuda", got {rows}; do: attribution.parts'
        )


def open_tensor(tensor: torch.Tensor, name: str) -> tuple[torch.Tensor, str]:
    """A tensor that kernels can read where it lies, and its storage type."""
    storage = str(tensor.dtype).removeprefix("torch.")
    if storage not in cuda.STORAGES:
        raise TypeError(f"{name}: wanted {arrays.STORAGES}, got {storage}; do: {name}.float()")
    if tensor.ndim != 2 or tensor.shape[1] < 1:
        raise ValueError(f"{name}: wanted [rows, dim] with dim >= 1, got shape {list(tensor.shape)}")
    if tensor.numel() and tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(
            f"{name}: wanted unit stride along dim, got strides {list(tensor.stride())}; "
            f"do: {name}.contiguous()"
        )
    return tensor.detach(), storage


def padded_rows(rows: int, dim: int, storage: str, device: torch.device, what: str) -> torch.Tensor:
    """Room for rows that begin at multiples of 16 bytes, as the copy engine wants them; as integers."""
    dtype, each = (torch.int32, 4) if storage == "float32" else (torch.int16, 8)
    pitch = -(-dim // each) * each
    return allocate((rows, pitch), dtype, device, what)[:, :dim]


def bits_type(storage: str) -> type[np.signedinteger]:
    """Integers as large as a value."""
    return np.int32 if storage == "float32" else np.int16
