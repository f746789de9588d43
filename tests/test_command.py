"""attribution.command: a line for what has been foreseen, a traceback for what has not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from attribution.command import command_line, in_a_line
from attribution.files import DiskFullError, read_json

ROOT = Path(__file__).resolve().parents[1]


def in_words() -> None:
    raise ValueError("x.json: wanted a, got b")


def in_more_words() -> None:
    error = RuntimeError("customize: 1 failed")
    error.add_note("7 done")
    raise error


def full_disk() -> None:
    raise DiskFullError(28, "data: 1 GB wanted, 3 kB free")


SAID: dict[str, tuple[Callable[[], object], str]] = {
    "in words": (in_words, "x.json: wanted a, got b"),
    "in more words": (in_more_words, "customize: 1 failed\n  7 done"),
    "of a file": (lambda: Path("/nowhere/x").read_text(), "/nowhere/x: No such file or directory"),
    "full disk": (full_disk, "data: 1 GB wanted, 3 kB free"),
    "from below": (lambda: read_json("/nowhere/x"), "/nowhere/x: no such file"),
}
UNFORESEEN: dict[str, Callable[[], object]] = {
    "numpy, from C": lambda: np.zeros(2) + np.zeros(3),
    "numpy, from Python": lambda: np.linalg.norm(np.zeros(2), axis=5),
    "pyarrow": lambda: pa.array(["x"]).cast(pa.int64()),
    "a bug": lambda: dict[str, int]()["x"],
}


@pytest.mark.parametrize("name", SAID)
def test_what_has_been_foreseen_is_a_line_and_status_1(name: str) -> None:
    act, line = SAID[name]
    with pytest.raises(SystemExit) as stopped, command_line("stages.some", None):
        act()
    assert stopped.value.code == f"some: {line}"


@pytest.mark.parametrize("name", UNFORESEEN)
def test_what_nobody_foresaw_keeps_its_traceback(name: str) -> None:
    with pytest.raises(Exception, match=r".") as raised, command_line("stages.some", None):
        UNFORESEEN[name]()
    assert in_a_line(raised.value) is None


def test_an_interrupt_is_a_line_and_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, command_line("stages.some", None):
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "some: interrupted; nothing is half written, run it again\n"


@pytest.mark.parametrize("arguments", [["--help"], ["stray"]])
def test_a_stage_without_arguments_does_not_run_on_any(tmp_path: Path, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stages.import_data", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (0 if arguments == ["--help"] else 2)
    assert ("Cost: CPU time" in done.stdout) == (arguments == ["--help"])
    assert "usage: python -m stages.import_data" in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "module", sorted(path for path in (ROOT / "stages").glob("*.py") if "__main__" in path.read_text())
)
def test_every_stage_and_tool_has_such_a_command_line(module: Path) -> None:
    """`python -m stages.pretrain --help` must not begin two hours of training."""
    text = module.read_text()
    assert f'with command_line("stages.{module.stem}", __doc__) as parser:' in text
    assert "parser.parse_args()" in text
    assert "ArgumentParser(" not in text
