"""The compiled CUDA part of retrieval (csrc/cuda), by ctypes: its records, its functions, its failures."""

import ctypes
import functools
import os
from collections.abc import Callable
from ctypes import c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any

from attribution import similarity

STORAGES = ("float32", "float16", "bfloat16")  # in the order of contract.h
OPERANDS = (*STORAGES, "codes", "wide_codes")  # in the order of device.h
STRIPE_ROWS, STRIPE_WORDS = 128, 4
SELECTED_WORDS = 8  # cut, fill, exact, before, status, wide, pending, all
FILL, STATUS, WIDE = 1, 4, 5
PLACES = ("packed", "query", "selected", "buffer", "scratch", "fault", "slabs", "all")


class Slab(ctypes.Structure):
    """Rows that lie together in device memory."""

    _fields_ = (
        ("rows", c_void_p), ("stride", c_int64), ("count", c_int64), ("first_row", c_int64),
        ("scale", c_void_p), ("stripes", c_void_p), ("codes", c_void_p), ("code_stride", c_int64),
    )  # fmt: skip


class Plan(ctypes.Structure):
    """Some queries, their workspace, and the rows that their candidates lie in."""

    _fields_ = (
        ("queries", c_int64), ("dim", c_int64), ("storage", c_int64), ("capacity", c_int64),
        ("operand", c_int64), ("center", c_void_p), ("values", c_void_p), ("offset", c_void_p),
        ("workspace", c_void_p), ("slabs", ctypes.POINTER(Slab)), ("slab_count", c_int64),
        ("processors", c_int64), ("hopper", c_int64), ("unsafe", c_int64), ("stream", c_void_p),
    )  # fmt: skip


class Search(ctypes.Structure):
    """What to find; without a threshold (b = 0) the top k alone."""

    _fields_ = (
        ("k", c_int64), ("inv_tau", c_double), ("b", c_double), ("depth", c_double), ("window", c_int64),
    )  # fmt: skip


class Answers(ctypes.Structure):
    """Where results go, in device memory."""

    _fields_ = tuple(
        (name, c_void_p) for name in ("ids", "scores", "influence", "support", "shown", "remainder")
    )


class Tallied(ctypes.Structure):
    """What every canonical score is compared with, and where the sums go."""

    _fields_ = (
        ("best", c_void_p), ("top", c_void_p), ("thresholds", c_void_p), ("threshold_count", ctypes.c_int),
        ("or_equal", ctypes.c_int), ("inv_tau", c_double), ("b", c_double), ("sums", c_void_p),
    )  # fmt: skip


MASS, SOFTMAX, COUNT = 1, 2, 3  # kinds of tally
MASS_WORDS, SOFTMAX_WORDS = 3, 13


class Library:
    """The functions of the library; those that can fail raise RuntimeError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._functions = ctypes.CDLL(str(path))
        self._functions.attribution_cuda_sources.restype = ctypes.c_char_p
        self._functions.attribution_cuda_failure.restype = ctypes.c_char_p
        self.sources: str = self._functions.attribution_cuda_sources().decode()

    @property
    def has_hopper(self) -> bool:
        """True if it was built with the kernel for sm_90a."""
        return bool(self._functions.attribution_cuda_has_hopper())

    def devices(self) -> int:
        """The number of devices; 0 where there is no driver."""
        return int(self._functions.attribution_cuda_devices())

    def failure(self) -> str:
        """Why the last call of this thread failed, or found no device."""
        return str(self._functions.attribution_cuda_failure().decode())

    @functools.cache  # noqa: B019 - one library, a few shapes
    def layout(self, *shape: int) -> dict[str, int]:
        """Offsets into the workspace of (queries, dim, operand, capacity, slabs), and its size as "all"."""
        at = (c_int64 * len(PLACES))()
        self._functions.attribution_cuda_layout(*(c_int64(value) for value in shape), at)
        return dict(zip(PLACES, at, strict=True))

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self._functions, f"attribution_cuda_{name}")

        def call(*arguments: Any) -> None:
            passed = [c_int64(value) if isinstance(value, int) else value for value in arguments]
            if function(*passed):
                raise RuntimeError(f"cuda: {self.failure()}")

        setattr(self, name, call)
        return call


def kernel_allowed() -> str:
    """ATTRIBUTION_CUDA_KERNEL: "generic", or else "hopper", which is used where it can be."""
    wanted = os.environ.get("ATTRIBUTION_CUDA_KERNEL", "hopper")
    if wanted not in ("generic", "hopper"):
        raise ValueError(f"ATTRIBUTION_CUDA_KERNEL: wanted generic or hopper, got {wanted!r}")
    return wanted


def sources_digest(csrc: Path) -> str:
    """The digest that CMakeLists.txt builds into the library: of csrc/cuda and of the headers it includes."""
    names = sorted(path for path in (csrc / "cuda").iterdir() if path.suffix in (".h", ".cu"))
    shared = [csrc / name for name in ("contract.h", "exponential.h", "team.cpp", "team.h")]
    return similarity.sources_digest([*shared, *names])


@functools.cache
def load_library() -> Library:
    """The library beside the extension, built from the csrc beside this package. ValueError if none."""
    path = Path(similarity.load_extension().__file__).with_name("attribution_cuda.so")
    if not path.is_file():
        raise ValueError(
            'impl="cuda": wanted an extension built with CUDA kernels, got one without '
            '(csrc/README.md tells how); do: impl="cpu" or "auto"'
        )
    library = Library(path)
    csrc = Path(__file__).resolve().parent.parent / "csrc"
    if csrc.is_dir() and library.sources != sources_digest(csrc):
        raise ImportError(
            f"{path.name}: built from other sources than csrc holds: stale library; "
            "run: uv sync --reinstall-package attribution-by-customization"
        )
    return library


def pointers(*tensors: Any) -> list[c_void_p]:
    """Where the tensors' values lie; null for None."""
    return [c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
