"""Exact retrieval as this project does it, and as others do: the top k, with influence where they can."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attribution import similarity
from attribution.similarity_arrays import aligned_bytes

INV_TAU, B = 50.0, -0.1  # a window of 0.046 below the best cosine
SCORE_BYTES = 256 << 20  # what peers may hold of the queries x gallery scores at a time

Search = Callable[[np.ndarray, int], np.ndarray]  # (queries in float32, k) -> ids


@dataclass(frozen=True)
class Method:
    """One way to search. `influence`: it also normalises over the whole gallery."""

    name: str
    bytes_per_value: int  # of the gallery as it reads it
    influence: bool
    arithmetic: str  # whose peak bounds it: float32 | bfloat16 | int8
    build: Callable[[np.ndarray, int], Search]  # (gallery in float32, threads) -> search
    bytes_for_few: float | None = None  # the same as bytes_per_value, where up to 4 queries read less

    def bytes_read(self, queries: int) -> float:
        """Bytes per value that one walk for so many queries reads."""
        return self.bytes_for_few if self.bytes_for_few and queries <= 4 else self.bytes_per_value


def room(shape: tuple[int, int], dtype: type[np.generic]) -> np.ndarray:
    """Memory as everybody likes it: in large pages, as numpy's; on a cache line's begin, as torch's."""
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    return aligned_bytes(size).view(dtype).reshape(shape)


def _held(gallery: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The gallery in `dtype`, in memory like its own."""
    if dtype == torch.float32:
        return torch.from_numpy(gallery)
    held = torch.from_numpy(room(gallery.shape, np.uint16)).view(dtype)
    return held.copy_(torch.from_numpy(gallery))


def _ours(storage: str, influence: bool, compressed: bool = False) -> Callable[[np.ndarray, int], Search]:
    def build(gallery: np.ndarray, threads: int) -> Search:
        held: Any = _held(gallery, getattr(torch, storage))
        if compressed:
            held = similarity.compress(held, threads=threads)

        def search(queries: np.ndarray, k: int) -> np.ndarray:
            if not influence:
                return similarity.search(queries, held, k=k, threads=threads)[0]
            return similarity.attribute(queries, held, k=k, inv_tau=INV_TAU, b=B, threads=threads).ids

        return search

    return build


def _faiss(blas_threshold: int | None) -> Callable[[np.ndarray, int], Search]:
    def build(gallery: np.ndarray, threads: int) -> Search:
        import faiss

        index = faiss.IndexFlatIP(gallery.shape[1])
        index.add(gallery)
        stock = faiss.cvar.distance_compute_blas_threshold

        def search(queries: np.ndarray, k: int) -> np.ndarray:
            faiss.omp_set_num_threads(threads)
            faiss.cvar.distance_compute_blas_threshold = stock if blas_threshold is None else blas_threshold
            return index.search(queries, k)[1]

        return search

    return build


def _torch(dtype: torch.dtype) -> Callable[[np.ndarray, int], Search]:
    def build(gallery: np.ndarray, threads: int) -> Search:
        held = _held(gallery, dtype)
        together = max(1, SCORE_BYTES // (len(gallery) * held.element_size()))

        def search(queries: np.ndarray, k: int) -> np.ndarray:
            torch.set_num_threads(threads)
            ids = []
            for some in torch.from_numpy(queries).to(dtype).split(together):
                scores = some @ held.T
                ids.append(scores.topk(k, dim=1).indices)
                torch.logsumexp(scores * INV_TAU, dim=1)
            return torch.cat(ids).numpy()

        return search

    return build


def _numpy(gallery: np.ndarray, threads: int) -> Search:
    from threadpoolctl import ThreadpoolController

    libraries = ThreadpoolController()  # numpy itself has no say in how many threads its products take
    together = max(1, SCORE_BYTES // (len(gallery) * 4))

    def search(queries: np.ndarray, k: int) -> np.ndarray:
        found = []
        for first in range(0, len(queries), together):
            with libraries.limit(limits=threads, user_api="blas"):
                scores = queries[first : first + together] @ gallery.T
            ids = np.argpartition(scores, -k, axis=1)[:, -k:]
            order = np.argsort(-np.take_along_axis(scores, ids, 1), axis=1)
            found.append(np.take_along_axis(ids, order, 1))
        return np.concatenate(found)

    return search


def _usearch(gallery: np.ndarray, threads: int) -> Search:
    from usearch.index import MetricKind
    from usearch.index import search as exact_search

    def search(queries: np.ndarray, k: int) -> np.ndarray:
        matches = exact_search(gallery, queries, k, MetricKind.IP, exact=True, threads=threads)
        return np.asarray(matches.keys).reshape(len(queries), k).astype(np.int64)

    return search


def methods() -> list[Method]:
    """All that can run here; this project's first."""
    found = [
        Method("ours bfloat16", 2, True, "bfloat16", _ours("bfloat16", True)),
        Method(
            "ours compressed bfloat16", 1, True, "int8", _ours("bfloat16", True, compressed=True), 64 / 128
        ),
        Method("ours bfloat16, search only", 2, False, "bfloat16", _ours("bfloat16", False)),
        Method("ours float16", 2, True, "bfloat16", _ours("float16", True)),
        Method("ours float32", 4, True, "bfloat16", _ours("float32", True)),
        Method("torch bfloat16", 2, True, "bfloat16", _torch(torch.bfloat16)),
        Method("torch float32", 4, True, "float32", _torch(torch.float32)),
        Method("numpy float32", 4, False, "float32", _numpy),
    ]
    if importlib.util.find_spec("faiss"):
        found += [
            Method("faiss IndexFlatIP", 4, False, "float32", _faiss(None)),
            Method("faiss IndexFlatIP, always BLAS", 4, False, "float32", _faiss(1)),
            Method("faiss IndexFlatIP, never BLAS", 4, False, "float32", _faiss(1 << 30)),
        ]
    if importlib.util.find_spec("usearch"):
        found.append(Method("usearch exact float32", 4, False, "float32", _usearch))
    return found
