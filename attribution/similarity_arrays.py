"""What callers hand to retrieval, checked and opened as numpy views without a copy of the gallery."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8, UInt16

STORAGES = "float32, float16 or bfloat16"
CODED_DIM = 65536  # what csrc/contract.h calls most_coded_dim
CENTER_ROWS = 1024  # whose median is the center of a compressed gallery
_AS_THEY_ARE = {np.dtype(name): name for name in ("float32", "float16")}


@dataclass(frozen=True)
class Codes:
    """Rows of a gallery less its center, rounded, each in its own scale.

    residuals[i] is at least the length of what is missing of row i, norms[i] at least that of row i less the
    center: they bound the error of every score.
    """

    values: UInt8[np.ndarray, "gallery bytes"]
    steps: Float32[np.ndarray, " gallery"]
    residuals: Float32[np.ndarray, " gallery"]
    norms: Float32[np.ndarray, " gallery"]

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """As the extension takes them."""
        return self.values, self.steps, self.residuals, self.norms

    @property
    def nbytes(self) -> int:
        """What they hold."""
        return sum(array.nbytes for array in self.arrays)


@dataclass(frozen=True)
class Sketches:
    """The same with four bits for each value, to which refinements add two: see csrc/contract.h."""

    values: UInt8[np.ndarray, "gallery bytes"]
    refinements: UInt8[np.ndarray, "gallery fewer_bytes"]
    # of floats the upper halves: steps, residuals, norms, and residuals with the refinements
    facts: UInt16[np.ndarray, "gallery 4"]

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """As the extension takes them."""
        return self.values, self.refinements, self.facts

    @property
    def nbytes(self) -> int:
        """What they hold."""
        return sum(array.nbytes for array in self.arrays)


@dataclass(frozen=True)
class CompressedGallery:
    """A gallery with codes beside its values, which filter; `attribution.similarity.compress` makes it.

    Codes have eight bits, sketches four, to which refinements add two. Answers come from `gallery`, read
    where it lies.
    """

    gallery: Any  # as compress() was given it
    center: Float32[np.ndarray, " dim"]
    codes: Codes  # value d of row i is nearly center[d] + steps[i] * (values[i, d] - 128)
    sketches: Sketches

    @property
    def nbytes(self) -> int:
        """What this holds beside the gallery itself."""
        return self.center.nbytes + self.codes.nbytes + self.sketches.nbytes

    @functools.cached_property
    def opened(self) -> tuple[dict[str, np.ndarray], str]:
        """What open_gallery says of the gallery: a call of 7 ms would spend 0.1 on it every time."""
        return open_gallery(self.gallery)


@dataclass(frozen=True)
class Inputs:
    """queries are float32; the shards keep their storage type, bfloat16 as its bits in uint16."""

    queries: Float32[np.ndarray, "queries dim"]
    shards: tuple[np.ndarray, ...]
    storage: str
    scale: Float32[np.ndarray, " gallery"] | None
    offset: Float32[np.ndarray, " queries"] | None
    compressed: CompressedGallery | None = None

    @property
    def rows(self) -> int:
        """The number of rows of all shards together."""
        return sum(shard.shape[0] for shard in self.shards)

    def require_finite_queries(self) -> None:
        """For all but the extension, which looks itself: numpy takes 25 us where caches are cold."""
        _require_finite(self.queries, "queries")


def open_inputs(queries: Any, gallery: Any, scale: Any, offset: Any) -> Inputs:
    """The result fits together; the values of the gallery and of the queries are still unchecked."""
    query_view, query_storage = open_rows(queries, "queries")
    query_values = np.ascontiguousarray(as_float32(query_view, query_storage))
    compressed = gallery if isinstance(gallery, CompressedGallery) else None
    shards, storage = open_gallery(gallery) if compressed is None else compressed.opened
    for name, shard in shards.items():
        if shard.shape[1] != query_values.shape[1]:
            raise ValueError(
                f"{name}: wanted dim {query_values.shape[1]} as queries {list(query_values.shape)} have, "
                f"got {list(shard.shape)}"
            )
    rows = sum(shard.shape[0] for shard in shards.values())
    scale_values = None if scale is None else _vector(scale, "scale", rows, "gallery rows")
    offset_values = None if offset is None else _vector(offset, "offset", query_values.shape[0], "queries")
    if offset_values is not None:
        _require_finite(offset_values[:, None], "offset")
    if compressed is not None and (held := len(compressed.codes.values)) != rows:
        raise ValueError(f"gallery: compressed with {held} rows but has {rows}; do: compress it again")
    return Inputs(query_values, tuple(shards.values()), storage, scale_values, offset_values, compressed)


def center_of(shards: Sequence[np.ndarray], storage: str) -> Float32[np.ndarray, " dim"]:
    """The median of some finite rows, which outliers among them do not move."""
    rows = sum(len(shard) for shard in shards)
    step = max(1, rows // CENTER_ROWS)
    some = np.concatenate([as_float32(shard[::step], storage) for shard in shards])
    some = some[np.isfinite(some).all(axis=1)]
    # In float64: the mean of two large values in the middle is no float32's on the way.
    middle = np.median(some.astype(np.float64), axis=0) if len(some) else np.zeros(some.shape[1])
    return middle.astype(np.float32)


def aligned_bytes(size: int) -> UInt8[np.ndarray, " size"]:
    """Room that begins where a cache line does."""
    room = np.empty(size + 64, np.uint8)
    begin = -room.ctypes.data % 64
    return room[begin : begin + size]


def room_for_codes(rows: int, dim: int) -> tuple[np.ndarray, ...]:
    """Room for codes, for sketches and for refinements, in whole cache lines."""
    if dim > CODED_DIM:
        raise ValueError(f"gallery: wanted dim <= {CODED_DIM} to compress, got {dim}")
    row_bytes = (-(-dim // values) * 64 for values in (64, 128, 256))
    return tuple(aligned_bytes(rows * size).reshape(rows, size) for size in row_bytes)


def as_float32(values: np.ndarray, storage: str) -> np.ndarray:
    """The same numbers in float32: every storage type fits into it exactly."""
    if storage == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def thresholds(values: Any, queries: int) -> Float64[np.ndarray, "queries thresholds"]:
    """The thresholds are float64 and not NaN."""
    view, storage = _numpy(values, "thresholds")
    numbers = as_float32(view, storage) if storage == "bfloat16" else view
    array = np.ascontiguousarray(numbers, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] != queries:
        raise ValueError(f"thresholds: wanted [{queries} queries, thresholds], got {list(array.shape)}")
    if np.isnan(array).any():
        raise ValueError(f"thresholds: row {int(np.isnan(array).any(1).argmax())} holds NaN")
    return array


def ids(values: Any, queries: int, rows: int) -> Int64[np.ndarray, "queries ids"]:
    """The ids are gallery rows, or -1."""
    array, storage = _numpy(values, "ids")
    if storage == "bfloat16" or array.dtype.kind not in "iu":
        raise TypeError(f"ids: wanted integers, got {storage}")
    if array.ndim != 2 or array.shape[0] != queries:
        raise ValueError(f"ids: wanted [{queries} queries, ids], got {list(array.shape)}")
    if array.size and not (array.min() >= -1 and array.max() < rows):
        raise ValueError(f"ids: wanted -1 <= id < {rows} gallery rows, got {array.min()} to {array.max()}")
    return np.ascontiguousarray(array, dtype=np.int64)


def open_gallery(gallery: Any) -> tuple[dict[str, np.ndarray], str]:
    """Views of the shards by name, and their storage type."""
    if not isinstance(gallery, Sequence) or isinstance(gallery, str | bytes):
        view, storage = open_rows(gallery, "gallery")
        return {"gallery": view}, storage
    if not gallery:
        raise ValueError("gallery: wanted at least one shard, got an empty sequence")
    opened = {f"gallery shard {i}": open_rows(shard, f"gallery shard {i}") for i, shard in enumerate(gallery)}
    storages = {name: storage for name, (_, storage) in opened.items()}
    for name, storage in storages.items():
        if storage != storages["gallery shard 0"]:
            raise TypeError(f"{name}: wanted {storages['gallery shard 0']} as shard 0 has, got {storage}")
    return {name: view for name, (view, _) in opened.items()}, storages["gallery shard 0"]


def _numpy(array: Any, name: str) -> tuple[np.ndarray, str]:
    """A view of the array and the name of its type. torch is not imported for callers who do not use it."""
    if isinstance(array, np.ndarray):
        if array.dtype in _AS_THEY_ARE:  # finding the name takes longer than all else here
            return array, _AS_THEY_ARE[array.dtype]
        if array.dtype.name == "bfloat16":  # of the ml_dtypes package
            return array.view(np.uint16), "bfloat16"
        return array, array.dtype.name if array.dtype.isnative else str(array.dtype)
    if type(array).__module__.split(".")[0] == "torch" and hasattr(array, "detach"):
        if not array.is_cpu:
            raise ValueError(f"{name}: wanted device cpu, got {array.device}; do: {name}.cpu()")
        storage = str(array.dtype).removeprefix("torch.")
        tensor = array.detach() if array.requires_grad else array
        if storage == "bfloat16":
            import torch

            return tensor.view(torch.uint16).numpy(), storage
        return tensor.numpy(), storage
    raise TypeError(f"{name}: wanted a numpy array or a torch tensor, got {type(array).__name__}")


def open_rows(array: Any, name: str) -> tuple[np.ndarray, str]:
    """A view of rows of a storage type, and its name."""
    view, storage = _numpy(array, name)
    if storage not in ("float32", "float16", "bfloat16"):
        raise TypeError(f"{name}: wanted {STORAGES}, got {storage}; do: {name}.astype(np.float32)")
    if view.ndim != 2 or view.shape[1] < 1:
        raise ValueError(f"{name}: wanted [rows, dim] with dim >= 1, got shape {list(view.shape)}")
    row_stride, stride = view.strides
    if view.size and (stride != view.itemsize and view.shape[1] > 1):
        raise ValueError(
            f"{name}: wanted unit stride along dim ({view.itemsize} bytes), "
            f"got strides {list(view.strides)}; "
            f"do: np.ascontiguousarray({name})"
        )
    if not view.flags.aligned or row_stride % view.itemsize:
        raise ValueError(
            f"{name}: wanted aligned values, got strides {list(view.strides)}; do: {name}.copy()"
        )
    return view, storage


def _vector(values: Any, name: str, length: int, of: str) -> np.ndarray:
    view, storage = _numpy(values, name)
    if storage != "float32":
        raise TypeError(f"{name}: wanted float32, got {storage}")
    if view.shape != (length,):
        raise ValueError(f"{name}: wanted one value for each of {length} {of}, got shape {list(view.shape)}")
    return np.ascontiguousarray(view)


def _require_finite(values: np.ndarray, name: str) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        row = int(finite.all(axis=1).argmin())
        raise ValueError(f"{name}: row {row}: wanted finite values, got NaN or infinity")
