"""A process that has imported the stages and loaded a base model, and forks itself for each run.

A run that is to be killed, or to have little memory, starts in milliseconds, and nothing of it is left.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Server:
    """The process, asked by lines of JSON."""

    process: subprocess.Popen[str]

    def start(self, function: str, log: Path, **arguments: object) -> int:
        """Calls `module:function` in a session of its own, and returns its number; output goes to `log`."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([function, str(log), arguments]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def wait(self) -> int:
        """The exit status of the last call, less than 0 for a signal; no process is left of it."""
        status, session = self._answer(), self._answer()
        for _ in range(200):
            left = members(session)
            if not left:
                return status
            time.sleep(0.05)
        for number in left:
            os.kill(number, signal.SIGKILL)
        raise AssertionError(f"went on for ten seconds after the run: {left}")

    def run(self, function: str, log: Path, **arguments: object) -> int:
        """Calls to the end."""
        self.start(function, log, **arguments)
        return self.wait()

    def _answer(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@contextlib.contextmanager
def serving(base: str) -> Iterator[Server]:
    """Such a process, with the base model in the folder `base` loaded."""
    # Memory that is given back goes back at once: a limit counts the addresses that the allocator keeps.
    memory = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | memory
    with subprocess.Popen(
        [sys.executable, "-m", "tests.forked", base],
        cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            yield Server(process)
        finally:
            # A test that failed may have left a run that goes on, or that is stopped.
            for child in children(process.pid):
                os.kill(child, signal.SIGKILL)
            assert process.stdin is not None
            process.stdin.close()


def members(session: int) -> list[int]:
    """The processes that belong to the session and have not ended."""
    return [number for number, _, its_session in living() if its_session == session]


def children(parent: int) -> list[int]:
    """The processes that this one has started and that have not ended."""
    return [number for number, its_parent, _ in living() if its_parent == parent]


def living() -> Iterator[tuple[int, int, int]]:
    """Number, parent and session of every process that has not ended."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if state != "Z":
                    yield int(entry.name), int(parent), int(session)


def main() -> None:
    import torch

    from attribution.base_model import BaseSettings
    from stages import customize, synthesize  # noqa: F401
    from stages.workers import base_pipeline

    torch.set_num_threads(1)
    base_pipeline(BaseSettings(sys.argv[1], None, "cpu", "float32"))
    for line in sys.stdin:
        function, log, arguments = json.loads(line)
        ready, begun = os.pipe()
        child = os.fork()
        if child == 0:
            os.setsid()
            os.write(begun, b"!")
            os._exit(call(function, log, arguments))
        os.read(ready, 1)  # from here on its session is its own
        os.close(ready)
        os.close(begun)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), child, sep="\n", flush=True)


def call(function: str, log: str, arguments: dict[str, object]) -> int:
    for source, number in ((os.open(os.devnull, os.O_RDONLY), 0), (os.open(log, FLAGS), 1), (1, 2)):
        os.dup2(source, number)
    module, name = function.split(":")
    try:
        getattr(importlib.import_module(module), name)(**arguments)
        status = 0
    except SystemExit as error:
        print(error.code, file=sys.stderr)
        status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


FLAGS = os.O_CREAT | os.O_WRONLY | os.O_APPEND

if __name__ == "__main__":
    main()
