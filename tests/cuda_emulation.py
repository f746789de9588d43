"""The CUDA kernels on a CPU: the same sources, compiled for csrc/cuda/emulate.h, behind the same Python."""

import functools
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from attribution import cuda_device, cuda_library

CSRC = Path(__file__).resolve().parents[1] / "csrc"


def compile_emulated(csrc: Path) -> cuda_library.Library:
    """A library of these sources, loaded; nothing of it stays on the disk."""
    compiler = shutil.which("c++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("the emulation of CUDA wants a C++ compiler and x86-64")
    with tempfile.TemporaryDirectory(prefix="attribution_cuda_") as folder:
        path = Path(folder) / "emulated.so"
        subprocess.run(
            [
                compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
                "-Wno-psabi", "-ffp-contract=off", "-fPIC", "-shared", "-DATTRIBUTION_EMULATED",
                '-DATTRIBUTION_CUDA_SOURCES_SHA256="emulated"',
                "-pthread", "-x", "c++",
                *sorted(str(source) for source in (csrc / "cuda").glob("*.cu")), str(csrc / "team.cpp"),
                "-o", str(path),
            ],
            check=True, timeout=600,
        )  # fmt: skip
        return cuda_library.Library(path)


@functools.cache
def emulated_library() -> cuda_library.Library:
    return compile_emulated(CSRC)


def emulate(
    monkeypatch: pytest.MonkeyPatch, kernel: str, library: cuda_library.Library | None = None
) -> None:
    """impl="cuda" runs on the CPU from here on, with the filter of that name."""
    library = library or emulated_library()
    monkeypatch.setenv("ATTRIBUTION_CUDA_KERNEL", kernel)
    monkeypatch.setattr(cuda_device, "open_device", lambda device=None: (library, torch.device("cpu")))
