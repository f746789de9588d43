"""Threads that compute side by side, one core each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


@contextlib.contextmanager
def one_core_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of so many threads, in each of which torch computes on that thread alone.

    Small nets and matrices are slower on several threads that wait for each other, and on one thread they
    give the same bytes whatever the number of cores. After an error, what has not begun is not begun.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
