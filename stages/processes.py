"""Worker processes: none outlives its parent, of an interrupt the parent has the word, a killed one is told.

Without torch, which costs a process seconds to import and some do without.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any


@contextlib.contextmanager
def process_pool(
    workers: int, begin: Callable[..., object], *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """A pool of so many processes, each of which calls `begin` with the arguments before it works.

    Functions and what they take travel by pickle among our own processes; `arguments` may hold memory that
    they share. The processes start as work comes in, and end with the block, or with a parent that was
    killed. After an error, what has not begun is not begun.
    """
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, initializer=_begin, initargs=(begin, arguments))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def killed_worker_told() -> Iterator[None]:
    """A BrokenProcessPool that leaves the block says what to do."""
    try:
        yield
    except BrokenProcessPool as error:
        why = "a worker process was killed, most likely for want of memory (or could not start: see above)"
        do = "run again to go on from there; workers: 1 and smaller batches take less"
        raise BrokenProcessPool(f"{why}; {do}") from error


def _begin(begin: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    # A Ctrl-C reaches every process of a terminal: the parent has the word, workers end without one.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begin(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
