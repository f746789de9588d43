"""Work shared among single-threaded processes, in batches that fit in memory.

A small net uses two cores better as two processes.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from attribution.base_model import BaseSettings, Pipeline, load_base
from attribution.customized_model import ModelStack
from attribution.memory import halving, is_out_of_memory
from attribution.sampling import Drawing, Sampler, draw_latents
from stages.incremental import Summary, concerns_one, one_line
from stages.processes import killed_worker_told, process_pool

T = TypeVar("T")
Result = TypeVar("Result")
# How many items at a time this process's memory held, where that was fewer than wanted.
_held: dict[tuple[str, str], int] = {}


@contextlib.contextmanager
def worker_map(workers: int) -> Iterator[Callable[..., Iterable]]:
    """`map` over `workers` processes, results in order; with one worker, `map` itself with all its threads.

    Functions and items travel by pickle among our own processes. The first error ends the work; what a
    process had finished stays done. A worker does not outlive a parent that was killed. Raises ValueError
    for less than one worker, BrokenProcessPool when one was killed.
    """
    if workers < 1:
        raise ValueError(f"workers: wanted at least 1, got {workers}")
    if workers == 1:
        yield map
        return
    with process_pool(workers, torch.set_num_threads, 1) as pool:

        def each(function: Callable[[Any], Result], items: Iterable[Any]) -> Iterator[Result]:
            with killed_worker_told():
                yield from pool.map(function, items)

        yield each


def fitting(
    run: Callable[[Any], Result], items: Sequence[Any] | np.ndarray, size: int, *, where: str, noun: str
) -> list[Result]:
    """The results of `run` on all items, at most `size` at a time and no more than memory has held before.

    Says in a line on stderr when memory runs out and the batch is halved; see attribution.memory.
    """

    def say(message: Warning | str, *_: object) -> None:
        tqdm.write(str(message), file=sys.stderr)

    size = min(size, _held.get((where, noun), size))
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=re.escape(f"{where}: out of memory on "))
        warnings.showwarning = say  # type: ignore[assignment]
        results, held = halving(run, items, size, where=where, noun=noun)
    if held < size:
        _held[where, noun] = held
    return results


def batched(
    run: Callable[[Sequence[T]], Summary], batch: Sequence[T], *, name: Callable[[T], str], where: str
) -> Summary:
    """What `run` made of a batch of concepts, and of its halves where memory did not hold it.

    Where an error may be the fault of one of them, each is run alone, and fails alone under its name.
    """

    def attempt(some: Sequence[T]) -> Summary:
        try:
            return run(some)
        except Exception as error:
            if not concerns_one(error) or (is_out_of_memory(error) and len(some) > 1):
                raise
            if len(some) == 1:
                return Summary(where, failed={name(some[0]): one_line(error)})
        # Here, where the exception no longer holds what was computed.
        return merge(attempt([one]) for one in some)

    def merge(parts: Iterable[Summary]) -> Summary:
        whole = Summary(where)
        for part in parts:
            whole.add(part)
        return whole

    return merge(fitting(attempt, batch, len(batch), where=where, noun="concepts"))


def draw_fitting(
    pipe: Pipeline,
    stack: ModelStack,
    drawings: Sequence[Drawing],
    sampler: Sampler,
    size: int,
    *,
    where: str,
) -> Tensor:
    """The latents of attribution.sampling.draw_latents, at most `size` images at a time."""

    def draw(some: Sequence[Drawing]) -> Tensor:
        return draw_latents(pipe, stack, some, sampler, batch_size=size)

    return torch.cat(fitting(draw, drawings, size, where=where, noun="images") or [draw([])])


def is_worker() -> bool:
    """Whether this process works for another, and should leave the terminal to it."""
    return multiprocessing.parent_process() is not None


def base_pipeline(base: BaseSettings) -> Pipeline:
    """The base, loaded once in each process, and again when its folder has changed."""
    # Not by content: reading gigabytes for each batch would cost more than some batches.
    states = [(path, path.stat()) for path in sorted(Path(base.model).rglob("*"))]
    return _load(base, tuple((str(path), state.st_size, state.st_mtime_ns) for path, state in states))


@functools.lru_cache(maxsize=1)
def _load(base: BaseSettings, state: tuple[tuple[str, int, int], ...]) -> Pipeline:
    return load_base(base)
