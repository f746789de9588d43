"""What this machine can do at best: multiply-adds and bytes read per second, by one thread and by several."""

import ctypes
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


@dataclass(frozen=True)
class Ceilings:
    """Per thread in units of 1e9 per processor second; read_gb_all_threads per second of wall time."""

    float32_gmacs: float
    bfloat16_gmacs: float  # 0: no such instruction
    int8_gmacs: float  # likewise
    read_gb: float
    read_gb_all_threads: float
    threads: int


def _library() -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("ceilings: wanted a C++ compiler on PATH, got none; do: install g++")
    folder = tempfile.mkdtemp(prefix="ceilings-")
    target = f"{folder}/ceilings.so"
    subprocess.run([compiler, "-O3", "-march=native", "-shared", "-fPIC", SOURCE, "-o", target], check=True)
    library = ctypes.CDLL(target)
    shutil.rmtree(folder)
    for name in ("float32_peak", "bfloat16_peak", "int8_peak"):
        getattr(library, name).restype = ctypes.c_double
        getattr(library, name).argtypes = [ctypes.c_int64]
    library.read_seconds.restype = ctypes.c_double
    library.read_seconds.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    return library


def _wall_seconds(work: Callable[[int], object], threads: int) -> float:
    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - begin


def measure(threads: int, repeats: int = 7, megabytes: int = 512) -> Ceilings:
    """The best of several attempts, at each distance of prefetching that some machine likes."""
    library = _library()
    data = np.ones(megabytes << 20, np.uint8)
    start, share = data.ctypes.data, data.nbytes // threads // 256 * 256
    one, several = [], []
    for _ in range(repeats):
        for ahead in (0, 2048, 8192, 16384):
            one.append(data.nbytes / library.read_seconds(start, data.nbytes, ahead))

            def read(i: int, ahead: int = ahead) -> None:
                library.read_seconds(start + i * share, share, ahead)

            several.append(share * threads / _wall_seconds(read, threads))
    return Ceilings(
        float32_gmacs=max(library.float32_peak(2_000_000) for _ in range(repeats)),
        bfloat16_gmacs=max(library.bfloat16_peak(2_000_000) for _ in range(repeats)),
        int8_gmacs=max(library.int8_peak(2_000_000) for _ in range(repeats)),
        read_gb=max(one) / 1e9,
        read_gb_all_threads=max(several) / 1e9,
        threads=threads,
    )
