"""What this machine can do at best: multiply-adds and bytes read per second, by one thread and by several."""

import ctypes
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).with_name("ceilings.cpp")
# bfloat16 and int8 in matrix registers, where there are such; bfloat16_dot in vector registers everywhere.
PEAKS = ("float32", "bfloat16", "bfloat16_dot", "int8")


def _library() -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("ceilings: wanted a C++ compiler on PATH, got none; do: install g++")
    folder = tempfile.mkdtemp(prefix="ceilings-")
    target = f"{folder}/ceilings.so"
    subprocess.run([compiler, "-O3", "-march=native", "-shared", "-fPIC", SOURCE, "-o", target], check=True)
    library = ctypes.CDLL(target)
    shutil.rmtree(folder)
    for name in PEAKS:
        getattr(library, f"{name}_peak").restype = ctypes.c_double
        getattr(library, f"{name}_peak").argtypes = [ctypes.c_int64]
    library.read_seconds.restype = ctypes.c_double
    library.read_seconds.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    return library


def _wall_seconds(work: Callable[[int], object], threads: int) -> float:
    """From when the first begins until the last has ended; all are there by then."""
    together = threading.Barrier(threads)
    spans: list[tuple[float, float]] = []

    def timed(i: int) -> None:
        together.wait()
        begin = time.perf_counter()
        work(i)
        spans.append((begin, time.perf_counter()))

    workers = [threading.Thread(target=timed, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return max(end for _, end in spans) - min(begin for begin, _ in spans)


class Machine:
    """What this machine does at best with so many threads, asked as often as one likes."""

    def __init__(self, threads: int, megabytes: int = 512) -> None:
        self.threads = threads
        self.library = _library()
        self.data = np.ones(megabytes << 20, np.uint8)

    def arithmetic(self, repeats: int = 7) -> dict[str, float]:
        """1e9 multiply-adds per processor second of one thread, by type; 0: no such instruction."""
        peaks = {name: getattr(self.library, f"{name}_peak") for name in PEAKS}
        return {f"{name}_gmacs": max(peak(2_000_000) for _ in range(repeats)) for name, peak in peaks.items()}

    def reading(self) -> tuple[float, float]:
        """1e9 bytes read per processor second by one thread, and per second by all, now.

        The best over the distances of prefetching that some machine likes.
        """
        start, share = self.data.ctypes.data, self.data.nbytes // self.threads // 256 * 256
        one, several = [], []
        for ahead in (0, 2048, 8192, 16384):
            one.append(self.data.nbytes / self.library.read_seconds(start, self.data.nbytes, ahead))

            def read(i: int, ahead: int = ahead) -> None:
                self.library.read_seconds(start + i * share, share, ahead)

            several.append(share * self.threads / _wall_seconds(read, self.threads))
        return max(one) / 1e9, max(several) / 1e9
