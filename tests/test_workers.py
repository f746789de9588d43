"""Work shared among processes: in order, with errors carried over, and no process left behind."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from stages.incremental import batches
from stages.workers import worker_map

ROOT = Path(__file__).parent.parent
PARENT = """
import time
from stages.workers import worker_map
if __name__ == "__main__":
    with worker_map(2) as each:
        for number in each(__import__("tests.test_workers").test_workers.slow_pid, range(2)):
            print(number, flush=True)
"""


def slow_pid(seconds: int) -> int:
    """This process's number, at once or after a minute."""
    time.sleep(60 * seconds)
    return os.getpid()


def meet(place: tuple[str, int]) -> int:
    """The number, once two processes have come; a minute later for those after them."""
    folder, number = Path(place[0]), place[1]
    (folder / str(number)).touch()
    while number < 2 and len(list(folder.iterdir())) < 2:
        time.sleep(0.01)
    time.sleep(60 * (number > 1))
    return number


def pid_or_error(number: int) -> int:
    if number == 2:
        raise ValueError("two is refused")
    return os.getpid()


def end_suddenly(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_order_and_errors_reach_the_caller() -> None:
    with worker_map(2) as each:
        assert list(each(abs, [-3, 2, -1])) == [3, 2, 1]
        assert os.getpid() not in list(each(pid_or_error, [0, 1]))
        with pytest.raises(ValueError, match="two is refused"):
            list(each(pid_or_error, [1, 2]))
        # As when the kernel, out of memory, picks this process to kill.
        why = "a worker process was killed, .*; run again to go on from there; workers: 1 and"
        with pytest.raises(BrokenProcessPool, match=why):
            list(each(end_suddenly, [0]))


def test_one_worker_is_this_process() -> None:
    with worker_map(1) as each:
        assert list(each(pid_or_error, [0])) == [os.getpid()]


def test_no_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="workers: wanted at least 1, got 0"), worker_map(0):
        pass


def test_of_an_interrupt_the_parent_alone_has_the_word(tmp_path: Path) -> None:
    script = PARENT.replace("slow_pid, range(2)", f"meet, [({str(tmp_path)!r}, i) for i in range(4)]")
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        assert [parent.stdout.readline() for _ in range(2)] == ["0\n", "1\n"]
        os.killpg(parent.pid, signal.SIGINT)
        _, said = parent.communicate(timeout=30)
    assert said.count("Traceback") == 1, said
    assert said.rstrip().endswith("KeyboardInterrupt")


def test_a_worker_does_not_outlive_a_parent_that_was_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker went on for ten seconds")


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        ("", ["abc", "def", "g"]),
        ("abc", ["def", "g"]),
        ("def", ["abc", "g"]),
        ("bdefg", ["ac"]),
        ("bd", ["g", "ace", "f"]),
    ],
)
def test_a_run_that_resumes_forms_the_batches_of_an_undisturbed_one(done: str, expected: list[str]) -> None:
    pending = [letter for letter in "abcdefg" if letter not in done]
    assert ["".join(batch) for batch in batches("abcdefg", pending, 3)] == expected
