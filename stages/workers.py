"""Work shared among single-threaded processes: a small net uses two cores better as two processes."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection

import torch
from diffusers import StableDiffusionPipeline

from attribution.base_model import BaseSettings, load_base


@contextlib.contextmanager
def worker_map(workers: int) -> Iterator[Callable[..., Iterable]]:
    """`map` over `workers` processes, results in order; with one worker, `map` itself with all its threads.

    Functions and items travel by pickle among our own processes. The first error ends the work; what a
    process had finished stays done. A worker does not outlive a parent that was killed. Raises ValueError
    for less than one worker.
    """
    if workers < 1:
        raise ValueError(f"workers: wanted at least 1, got {workers}")
    if workers == 1:
        yield map
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def is_worker() -> bool:
    """Whether this process works for another, and should leave the terminal to it."""
    return multiprocessing.parent_process() is not None


def base_pipeline(base: BaseSettings) -> StableDiffusionPipeline:
    """The base, loaded once in each process, and again when the contents of its folder have changed."""
    return _load(base, base.key())


@functools.lru_cache(maxsize=1)
def _load(base: BaseSettings, key: str) -> StableDiffusionPipeline:
    return load_base(base)


def _begin() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
