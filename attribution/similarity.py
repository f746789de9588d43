"""The only door to retrieval: exact top k, exact influence over the whole gallery, exact counts.

score(q, x) = (q . x + offset_q) * scale_x, accumulated in float64 in a fixed order and rounded once to
float32. Callers normalize (or pass `scale`). Of equal scores the lower gallery row comes first. Every
thread count, batching, sharding and instruction set returns the same bits.

A gallery is one [rows, dim] array or a sequence of such shards, numpy (memory-mapped ones too) or torch
of float32, float16 or bfloat16; it is read where it lies. On a GPU (impl="cuda", or the gallery lies
there: CUDA tensors, `attribution.similarity_cuda.Gallery`; ATTRIBUTION_IMPL=cuda is impl="cuda" wherever
it is not said) the same answers come bit for bit. Wherever arrays do not fit together, ValueError or
TypeError says which and how.

A gallery that is asked often can be compressed once: every function here takes `compress(gallery)` in the
gallery's place, reads half the bytes that bfloat16 has (for up to 4 queries a quarter), and answers with the
same bits.
"""

import functools
import hashlib
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from attribution import similarity_arrays as arrays
from attribution import similarity_reference as reference
from attribution.similarity_arrays import Codes, CompressedGallery, Sketches

__all__ = [
    "Attribution",
    "CompressedGallery",
    "attribute",
    "canonical_scores",
    "compress",
    "count_larger",
    "search",
]

INTEGERS = (int, np.integer)
IMPLEMENTATIONS = ("auto", "reference", "cpu", "cuda")

# A query with more scores of weight than this outside its top k gets its sum from a second walk.
WINDOW_CAP = 2048
# Queries that share one walk over the gallery: what fits, packed, into a core's second-level cache.
QUERY_BATCH = 256
# A thread that has less to multiply than this costs more to start than it saves.
PRODUCTS_PER_THREAD = 4_000_000


@dataclass(frozen=True)
class Attribution:
    """For each query the k gallery rows of highest score, and the share of influence each holds.

    support counts the gallery items with influence > 0. support_mass is the influence of the k shown
    together, and remainder that of all the others; the two add up to 1, unless the gallery is empty.
    """

    ids: Int64[np.ndarray, "queries k"]  # -1 beyond the end of the gallery
    scores: Float32[np.ndarray, "queries k"]  # -inf there
    influence: Float32[np.ndarray, "queries k"]  # 0 there
    support: Int64[np.ndarray, " queries"]
    support_mass: Float32[np.ndarray, " queries"]
    remainder: Float32[np.ndarray, " queries"]
    impl: str


def attribute(
    queries: Any,
    gallery: Any,
    *,
    k: int,
    inv_tau: float,
    b: float,
    scale: Any = None,
    offset: Any = None,
    impl: str = "auto",
    threads: int | None = None,
) -> Attribution:
    """The influence of a gallery row is its share of the thresholded softmax over the whole gallery.

    influence_i = w_i / sum_j w_j,  w_i = max(exp(inv_tau * (s_i - max_j s_j)) + b, 0)     (arXiv:2306.09345)

    queries: [queries, dim]; inv_tau > 0 per unit of score; -1 < b <= 0. Raises ValueError for values out
    of range or not finite, naming the row.
    """
    k = check_settings(k, inv_tau, b)
    if on_cuda(impl, gallery):
        gallery = uncompressed(gallery)
        return load_cuda().attribute(queries, gallery, k=k, inv_tau=inv_tau, b=b, scale=scale, offset=offset)
    call = Call(queries, gallery, scale, offset, impl, threads)
    if call.impl == "reference":
        found = reference.attribute(call.inputs, k, float(inv_tau), float(b))
    else:
        found = load_extension().retrieve(
            *call.extension_inputs(), k, float(inv_tau), float(b), *call.limits()
        )
    ids, scores, influence, support, support_mass, remainder = found
    return Attribution(ids, scores, influence, support, support_mass, remainder, call.impl)


def search(
    queries: Any,
    gallery: Any,
    *,
    k: int,
    scale: Any = None,
    offset: Any = None,
    impl: str = "auto",
    threads: int | None = None,
) -> tuple[Int64[np.ndarray, "queries k"], Float32[np.ndarray, "queries k"]]:
    """The ids and scores are those that `attribute` returns; no influence is computed."""
    k = _positive(k, "k")
    if on_cuda(impl, gallery):
        return load_cuda().search(queries, uncompressed(gallery), k=k, scale=scale, offset=offset)
    call = Call(queries, gallery, scale, offset, impl, threads)
    if call.impl == "reference":
        return reference.search(call.inputs, k)
    return load_extension().retrieve(*call.extension_inputs(), k, None, 0.0, *call.limits())


def count_larger(
    queries: Any,
    gallery: Any,
    thresholds: Any,
    *,
    or_equal: bool = False,
    scale: Any = None,
    offset: Any = None,
    impl: str = "auto",
    threads: int | None = None,
) -> Int64[np.ndarray, "queries thresholds"]:
    """Each count is the number of gallery rows whose score is larger than the threshold.

    With `or_equal`, equal scores count too. thresholds: [queries, thresholds]. Take them from
    `canonical_scores` and equal vectors compare equal; the rank of an exemplar is then 1 + the number
    larger in the rest of the gallery, or equal where ties are to count against it.
    """
    if on_cuda(impl, gallery):
        return load_cuda().count_larger(
            queries, uncompressed(gallery), thresholds, or_equal=or_equal, scale=scale, offset=offset
        )
    call = Call(queries, gallery, scale, offset, impl, threads)
    levels = arrays.thresholds(thresholds, call.inputs.queries.shape[0])
    if call.impl == "reference":
        return reference.count_larger(call.inputs, levels, or_equal)
    threads, _, batch = call.limits()
    return load_extension().count_larger(*call.extension_inputs(), levels, or_equal, threads, batch)


def canonical_scores(
    queries: Any, gallery: Any, ids: Any, *, scale: Any = None, offset: Any = None, impl: str = "auto"
) -> Float32[np.ndarray, "queries ids"]:
    """Each score is the one by which `attribute` and `count_larger` order that gallery row; -inf for id -1.

    ids: [queries, ids], gallery rows.
    """
    if on_cuda(impl, gallery):
        return load_cuda().canonical_scores(queries, uncompressed(gallery), ids, scale=scale, offset=offset)
    call = Call(queries, gallery, scale, offset, impl, None)
    rows = arrays.ids(ids, call.inputs.queries.shape[0], call.inputs.rows)
    if call.impl == "reference":
        return reference.canonical_scores(call.inputs, rows)
    return load_extension().canonical_scores(*call.extension_inputs(), rows)


def compress(gallery: Any, *, threads: int | None = None) -> Any:
    """Every function here answers from the result with the same bits, and reads one byte for each value.

    A CompressedGallery; of CUDA tensors, or of a Gallery of attribution.similarity_cuda, such a Gallery with
    codes on its device (`Gallery.compressed`).

    x = center + step_x * code_x + e_x,  |e_x| <= residual_x;   q = step_q * code_q + e_q

    |q . x - (q . center + step_q step_x code_q . code_x)| <= |q| residual_x + |e_q| norm_x + roundings,

    by Cauchy and Schwarz, row by row. What may reach the cut by this bound is scored from the gallery itself,
    which is kept, read where it lies, and must not change. Codes come twice, with 8 bits and, as sketches for
    up to 4 queries, with 4 and then 2 more: together dim * 14 / 8, in whole cache lines, + 20 bytes a row,
    for any scale and offset. Where they say too little (rows with outliers, thresholds amid the bulk of the
    scores, b = 0), the gallery is read as if it had none. ValueError names a row with NaN or inf.
    """
    if isinstance(gallery, CompressedGallery):
        return gallery
    if lies_on_device(gallery):
        return load_cuda().compressed(gallery)
    shards, storage = arrays.open_gallery(gallery)
    views = list(shards.values())
    for name, view in shards.items():
        if view.shape[1] != views[0].shape[1]:
            raise ValueError(f"{name}: wanted dim {views[0].shape[1]} as shard 0 has, got {list(view.shape)}")
    center = arrays.center_of(views, storage)
    rows = sum(len(view) for view in views)
    room = arrays.room_for_codes(rows, len(center))
    threads = _positive(threads_allowed() if threads is None else threads, "threads")
    codes, sketches = load_extension().compress(views, storage, center, *room, threads)
    return CompressedGallery(gallery, center, Codes(*codes), Sketches(*sketches))


def check_settings(k: int, inv_tau: float, b: float) -> int:
    """The settings make sense; k as a plain int."""
    if not 0 < inv_tau < float("inf"):
        raise ValueError(f"inv_tau: wanted a finite number > 0, got {inv_tau}")
    if not -1 < b <= 0:
        raise ValueError(f"b: wanted -1 < b <= 0, got {b}")
    return _positive(k, "k")


def on_cuda(impl: str, gallery: Any) -> bool:
    """True if the GPU is asked for, here or by ATTRIBUTION_IMPL, or has the gallery and the choice."""
    if impl == "auto" and (wanted := os.environ.get("ATTRIBUTION_IMPL", "")):
        if wanted not in ("auto", "cpu", "cuda"):
            raise ValueError(f"ATTRIBUTION_IMPL: wanted auto, cpu or cuda, got {wanted!r}")
        impl = wanted
    return impl == "cuda" or (impl == "auto" and lies_on_device(gallery))


def lies_on_device(gallery: Any) -> bool:
    """True for CUDA tensors, a sequence of them, and a Gallery of attribution.similarity_cuda."""
    first = gallery[0] if isinstance(gallery, list | tuple) and gallery else gallery
    return bool(getattr(first, "is_cuda", False))


def uncompressed(gallery: Any) -> Any:
    """The gallery as compress() was given it, or any other as it is."""
    return gallery.gallery if isinstance(gallery, CompressedGallery) else gallery


def load_cuda() -> Any:
    """The module that retrieves on a GPU: never imported for others, because it needs torch."""
    return importlib.import_module("attribution.similarity_cuda")


class Call:
    """The checked arguments that all operations share."""

    def __init__(
        self, queries: Any, gallery: Any, scale: Any, offset: Any, impl: str, threads: int | None
    ) -> None:
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl: wanted one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
        self.impl = "cpu" if impl == "auto" else impl
        self.inputs = arrays.open_inputs(queries, gallery, scale, offset)
        if self.impl == "reference":
            self.inputs.require_finite_queries()
        self.threads = _positive(self._default_threads() if threads is None else threads, "threads")

    def _default_threads(self) -> int:
        inputs = self.inputs
        products = len(inputs.queries) * inputs.rows * inputs.queries.shape[1]
        return min(threads_allowed(), 1 + products // PRODUCTS_PER_THREAD)

    def extension_inputs(self) -> tuple[Any, ...]:
        """What every function of the extension takes first."""
        inputs, codes = self.inputs, None
        if inputs.compressed is not None:
            held = inputs.compressed
            codes = (held.center, held.codes.arrays, held.sketches.arrays)
        return list(inputs.shards), inputs.storage, inputs.queries, inputs.offset, inputs.scale, codes

    def limits(self) -> tuple[int, int, int]:
        """Threads, window cap and query batch, which change the cost and never the answer."""
        return self.threads, WINDOW_CAP, QUERY_BATCH


def _positive(value: int, name: str) -> int:
    if not isinstance(value, INTEGERS) or isinstance(value, bool):
        raise TypeError(f"{name}: wanted an integer >= 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: wanted an integer >= 1, got {value}")
    return int(value)


def threads_allowed() -> int:
    """ATTRIBUTION_THREADS, or else the processors that this process may run on."""
    wanted = os.environ.get("ATTRIBUTION_THREADS", "")
    if not wanted:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not wanted.isdecimal() or int(wanted) < 1:
        raise ValueError(f"ATTRIBUTION_THREADS: wanted an integer >= 1, got {wanted!r}")
    return int(wanted)


def sources_digest(names: Sequence[Path]) -> str:
    """The digest that CMakeLists.txt builds into the extension, of these files of csrc."""
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in names)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@functools.cache
def load_extension() -> Any:
    """The compiled module, which was built from the csrc beside this package. ImportError if not."""
    repair = "run: uv sync --reinstall-package attribution-by-customization"
    try:
        extension = importlib.import_module("attribution_extension")
    except ImportError as error:
        raise ImportError(f"attribution_extension: cannot be imported ({error}); {repair}") from error
    # An experiment that runs in a copy of the repository brings its own csrc, but shares the environment.
    csrc = Path(__file__).resolve().parent.parent / "csrc"
    if csrc.is_dir():
        here = sources_digest(
            sorted(path for path in csrc.iterdir() if path.suffix in (".h", ".inc", ".cpp", ".cu"))
        )
        if extension.sources_sha256 != here:
            raise ImportError(
                f"attribution_extension: built from other sources ({extension.sources_sha256[:12]}) "
                f"than csrc holds ({here[:12]}): stale extension; {repair}"
            )
    return extension
