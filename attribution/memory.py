"""Work in batches that shrink until memory holds them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

Result = TypeVar("Result")


def halving(
    run: Callable[[Any], Result], items: Sequence[Any] | np.ndarray, size: int, *, where: str, noun: str
) -> tuple[list[Result], int]:
    """The results of `run` on all items in order, some at a time, and how many at a time memory held.

    Begins with `size` at a time. Where memory runs out, on the device or here, the batch is halved and a
    warning says so ("clip: out of memory on 256 images; going on with 128 at a time"): give the size that
    comes back to the next call. `run` is called again on the halves, so it should leave nothing behind when
    it raises. Raises what `run` raises for one item alone, and anything but running out of memory.
    """
    assert size >= 1
    results: list[Result] = []
    done = 0
    while done < len(items):
        batch = items[done : done + size]
        fitted, result = _try(run, batch)
        if fitted:
            results += result
            done += len(batch)
        else:
            size = (len(batch) + 1) // 2
            said = f"{where}: out of memory on {len(batch)} {noun}; going on with {size} at a time"
            warnings.warn(said, stacklevel=2)
    return results, size


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of this machine."""
    # By name, so that those without torch need none; a CPU's allocator raises a plain RuntimeError.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    said = ("can't allocate memory", "not enough memory", "could not create a primitive")  # the last: oneDNN
    return named or any(words in str(error) for words in said)


def _try(run: Callable[[Any], Result], batch: Sequence[Any] | np.ndarray) -> tuple[bool, list[Result]]:
    try:
        return True, [run(batch)]
    except (MemoryError, RuntimeError) as error:
        if len(batch) == 1 or not is_out_of_memory(error):
            raise
    if "torch" in sys.modules:  # here, where the exception no longer holds the net's activations
        import torch

        torch.cuda.empty_cache()
    return False, []
