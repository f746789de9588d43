"""Which processors to measure on: machines that are rented share their cores with neighbours unseen.

A processor of such a machine is often half a core. Who has the other half changes from second to second, and
takes up to half of the pace: one product in matrix registers took 6 ns on some processors and 14 on others.
"""

import contextlib
import os
import time

ALLOWED = os.sched_getaffinity(0)  # when the program began


def keep_to_quietest(count: int) -> None:
    """Has all threads of this process run on the `count` processors that are fastest now.

    Changes nothing where there are no more than these.
    """
    if count >= len(ALLOWED):
        return
    keep_to(set(sorted(ALLOWED, key=_seconds)[:count]))


def keep_to(processors: set[int]) -> None:
    """Has all threads of this process, and those that they begin, run on these."""
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(task), processors)


def _seconds(processor: int) -> float:
    """That a little work takes there, which asks of a core all the instructions that it can begin."""
    os.sched_setaffinity(0, {processor})
    return min(_work() for _ in range(4))


def _work() -> float:
    begin = time.perf_counter()
    sum(range(4000))
    return time.perf_counter() - begin
