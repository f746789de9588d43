"""attribution.memory: batches are halved where memory runs out, and no result is lost or made twice."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from attribution.memory import halving, is_out_of_memory

ERRORS = {
    "here": MemoryError(),
    "GPU": torch.OutOfMemoryError("CUDA out of memory"),
    "CPU": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    "convolution": RuntimeError("could not create a primitive"),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("fitting", [1, 2, 3, 5, 10])
def test_every_item_is_done_once_and_in_order(error: Exception, fitting: int) -> None:
    tried: list[int] = []

    def run(batch: list[int]) -> list[int]:
        tried.append(len(batch))
        if len(batch) > fitting:
            raise error
        return batch

    items = list(range(10))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        results, size = halving(run, items, 7, where="clip", noun="images")
    if fitting < 7:
        assert str(said[0].message) == "clip: out of memory on 7 images; going on with 4 at a time"
    assert len(said) == len(tried) - len(results) == {1: 3, 2: 2, 3: 2, 5: 1, 10: 0}[fitting]
    assert [one for result in results for one in result] == items
    assert size == {1: 1, 2: 2, 3: 2, 5: 4, 10: 7}[fitting]
    assert max(len(result) for result in results) <= size


def test_rows_of_an_array_are_items_and_none_is_fine() -> None:
    results, size = halving(np.sum, np.ones((5, 2)), 2, where="x", noun="rows")
    assert (results, size) == ([4.0, 4.0, 2.0], 2)
    assert halving(np.sum, [], 2, where="x", noun="rows") == ([], 2)


def test_one_item_too_large_and_other_errors_are_raised() -> None:
    def fail(batch: list[int]) -> None:
        raise error

    for error, items in ((MemoryError(), [1]), (RuntimeError("size mismatch"), [1, 2]), (OSError(), [1, 2])):
        with pytest.raises(type(error)) as e:
            halving(fail, items, 2, where="x", noun="rows")
        assert e.value is error
    assert not is_out_of_memory(RuntimeError("size mismatch"))
