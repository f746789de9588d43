"""Where gallery rows lie for retrieval on a GPU: on the device, measured once, or streamed through it."""

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attribution import cuda_library as cuda
from attribution import similarity_arrays as arrays

SLAB_BYTES = 64 << 20  # of a streamed gallery, in each of two buffers on either side
ALL_ONES = -1  # as a signed word: nothing was refused


@dataclass(frozen=True)
class Rows:
    """Some rows in device memory, with their scales and the error bounds of their stripes."""

    rows: torch.Tensor  # [rows, dim], rows may be apart
    first_row: int
    scale: torch.Tensor | None
    stripes: torch.Tensor  # [stripes, 2]: norm, scale

    def slab(self) -> cuda.Slab:
        """The same, as the library wants it."""
        rows, scale, stripes = cuda.pointers(self.rows, self.scale, self.stripes)
        stride = self.rows.stride(0) * self.rows.element_size()
        return cuda.Slab(rows, stride, self.rows.shape[0], self.first_row, scale, stripes)

    def largest(self) -> float:
        """An upper bound of norm * max(scale, 1) that tells whether float32 arithmetic is safe. Waits."""
        if not len(self.stripes):
            return 0.0
        norm, scale = self.stripes.amax(dim=0).tolist()
        return norm * max(scale, 1.0)


def measure(
    library: Any,
    rows: torch.Tensor,
    storage: str,
    first_row: int,
    scale: torch.Tensor | None,
    refused: torch.Tensor,
    norms: torch.Tensor | None = None,
) -> Rows:
    """The rows with their error bounds; `refused` gets the first row that is not usable. Does not wait."""
    count = rows.shape[0]
    stripes = torch.empty((-(-count // cuda.STRIPE_ROWS), 2), dtype=torch.float32, device=rows.device)
    measured = Rows(rows, first_row, scale, stripes)
    library.measure(
        ctypes.byref(measured.slab()), cuda.STORAGES.index(storage), rows.shape[1],
        *cuda.pointers(norms, stripes, refused), stream_of(rows.device),
    )  # fmt: skip
    return measured


def require_usable(refused: torch.Tensor, scale: Any) -> None:
    """No row was refused. Waits."""
    code = int(refused.item())
    if code == ALL_ONES:
        return
    row, of_values = divmod(code, 2)
    if of_values:
        raise ValueError(f"gallery row {row}: wanted finite values, got NaN or infinity")
    raise ValueError(f"gallery row {row}: wanted a finite scale >= 0, got {float(scale[row]):f}")


def stream_of(device: torch.device) -> ctypes.c_void_p:
    """The caller's current stream on the device."""
    if device.type == "cpu":  # the emulated library
        return ctypes.c_void_p(None)
    return ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)


def none_refused(device: torch.device) -> torch.Tensor:
    """A word that kernels lower to the first row they refuse."""
    return torch.full((), ALL_ONES, dtype=torch.int64, device=device)


class Gallery:
    """A gallery on a device. CUDA tensors are taken where they lie; anything else is copied there once.

    Norms are measured here, so that a call reads the rows once. The values must not change afterwards.
    ValueError names a row that is not finite; RuntimeError says how much memory was wanted and had.
    """

    is_cuda = True

    def __init__(self, gallery: Any, *, device: Any = None) -> None:
        self.library, self.device = open_device(device if device is not None else _device_of(gallery))
        require_current(self.device)
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
        pieces = list(self._pieces())
        most = max((len(piece) for _, piece in pieces), default=0)
        buffers = [_Buffer(most, self.dim, self.storage, self.device) for _ in range(min(2, len(pieces)))]
        for i, (first_row, piece) in enumerate(pieces):
            if i == 0:
                buffers[0].send(piece)
            if i + 1 < len(pieces):
                buffers[(i + 1) % 2].send(pieces[i + 1][1])
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

    def send(self, piece: np.ndarray) -> None:
        """Starts the copy of these rows."""
        if self.real:
            self.sent.synchronize()  # the pinned memory may be written again
        here = self.here[: len(piece)]
        np.copyto(here.numpy(), piece.view(bits_type(self.storage)))
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


def open_device(device: Any = None) -> tuple[Any, torch.device]:
    """The library and a CUDA device. ValueError says what is missing."""
    library = cuda.load_library()
    if not library.devices():
        raise ValueError(
            'impl="cuda": wanted a CUDA device, got none that the driver offers; do: impl="cpu" or "auto"'
        )
    chosen = torch.device("cuda" if device is None else device)
    if chosen.type != "cuda":
        raise ValueError(f"device: wanted a CUDA device, got {chosen}")
    if chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    return library, chosen


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


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device, what: str) -> torch.Tensor:
    """Uninitialized device memory. RuntimeError says how much was wanted and had."""
    try:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    except torch.OutOfMemoryError as error:
        wanted = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        had = torch.cuda.mem_get_info(device)[0]
        raise RuntimeError(
            f"{what}: wanted {wanted:,} bytes on {device}, got {had:,} free; "
            "do: leave the gallery in host memory, or ask for fewer queries or a smaller k"
        ) from error


def bits_type(storage: str) -> type[np.signedinteger]:
    """Integers as large as a value."""
    return np.int32 if storage == "float32" else np.int16


def require_current(device: torch.device) -> None:
    """Kernels are launched on the current device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise ValueError(
            f"gallery: wanted it on the current device cuda:{torch.cuda.current_device()}, got {device}; "
            f"do: with torch.cuda.device({device.index})"
        )


def require_few(rows: int) -> None:
    """Candidates know their rows by 32 bits."""
    if rows >= 2**32 - 1:
        raise ValueError(
            f'gallery: wanted fewer than 2^32 - 1 rows with impl="cuda", got {rows}; do: attribution.parts'
        )


def _is_sequence(gallery: Any) -> bool:
    return isinstance(gallery, Sequence) and not isinstance(gallery, str | bytes)


def _device_of(gallery: Any) -> Any:
    first = gallery[0] if _is_sequence(gallery) and len(gallery) else gallery
    return first.device if isinstance(first, torch.Tensor) and first.device.type == "cuda" else None
