"""What this machine can do at best: multiply-adds and bytes read per second, by one thread and by several."""

import ctypes
import itertools
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Pace:
    """What the machine does at best, at some moment."""

    gmacs: float  # 1e9 multiply-adds per processor second of one thread
    read_gb: float  # 1e9 bytes read per processor second of one thread
    read_gb_all_threads: float  # 1e9 bytes read per second by all

    def faster(self, other: "Pace") -> "Pace":
        return Pace(
            max(self.gmacs, other.gmacs),
            max(self.read_gb, other.read_gb),
            max(self.read_gb_all_threads, other.read_gb_all_threads),
        )

    def near(self, other: "Pace", within: float) -> bool:
        """Whether threads together read, and one multiplies, as fast as then, but for this part."""
        pairs = (self.gmacs, other.gmacs), (self.read_gb_all_threads, other.read_gb_all_threads)
        return all(abs(a - b) <= within * max(a, b) for a, b in pairs)


class Machine:
    """What this machine does at best with so many threads, asked as often as one likes."""

    def __init__(self, threads: int, megabytes: int = 512) -> None:
        self.threads = threads
        self.library = _library()
        self.data = np.ones(megabytes << 20, np.uint8)
        self.peaks = self.arithmetic()
        self._distances = itertools.cycle((0, 2048, 8192, 16384))  # of prefetching, that some machine likes
        self._best = next(self._distances)
        self._most = 0.0
        for _ in range(3):
            self.pace("float32")

    def arithmetic(self, repeats: int = 7) -> dict[str, float]:
        """1e9 multiply-adds per processor second of one thread, by type; 0: no such instruction."""
        return {f"{name}_gmacs": max(self._peak(name) for _ in range(repeats)) for name in PEAKS}

    def _peak(self, name: str) -> float:
        peak: float = getattr(self.library, f"{name}_peak")(2_000_000)
        return peak

    def pace(self, arithmetic: str) -> Pace:
        """Now. By the distance of prefetching that was best so far, and by another one."""
        gmacs = self._peak(arithmetic) or self._peak("float32")
        one, several = [], []
        for ahead in {self._best, next(self._distances)}:
            one.append(self._read_by_one(ahead))
            several.append(self._read_by_all(ahead))
            if several[-1] > self._most:
                self._best, self._most = ahead, several[-1]
        return Pace(gmacs, max(one), max(several))

    def _read_by_one(self, ahead: int) -> float:
        seconds: float = self.library.read_seconds(self.data.ctypes.data, self.data.nbytes, ahead)
        return self.data.nbytes / seconds / 1e9

    def _read_by_all(self, ahead: int) -> float:
        share = self.data.nbytes // self.threads // 256 * 256

        def read(i: int) -> None:
            self.library.read_seconds(self.data.ctypes.data + i * share, share, ahead)

        return share * self.threads / _wall_seconds(read, self.threads) / 1e9
