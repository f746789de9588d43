"""A CUDA device: whether there is one, its current stream, its memory."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from attribution import cuda_library as cuda


def open_device(device: Any = None) -> tuple[Any, torch.device]:
    """The library and a CUDA device. ValueError says what is missing."""
    library = cuda.load_library()
    if not library.devices():
        raise ValueError(
            f'impl="cuda": wanted a CUDA device, got none ({library.failure()}); do: impl="cpu" or "auto"'
        )
    chosen = torch.device("cuda" if device is None else device)
    if chosen.type != "cuda":
        raise ValueError(f"device: wanted a CUDA device, got {chosen}")
    if chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    return library, chosen


def require_current(library: Any, device: torch.device) -> None:
    """What this thread launches from here on goes to the device. ValueError if it is not the current one."""
    if device.type != "cuda":  # the emulated library
        return
    if device.index != torch.cuda.current_device():
        raise ValueError(
            f"gallery: wanted it on the current device cuda:{torch.cuda.current_device()}, got {device}; "
            f"do: with torch.cuda.device({device.index})"
        )
    library.use_device(device.index)


def stream_of(device: torch.device) -> ctypes.c_void_p:
    """The caller's current stream on the device."""
    if device.type == "cpu":  # the emulated library
        return ctypes.c_void_p(None)
    return ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)


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
