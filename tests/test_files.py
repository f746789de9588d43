"""attribution.files: whole or not at all; equal content, equal key."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors import SafetensorError

from attribution.files import (
    DiskFullError,
    atomic_path,
    content_key,
    read_json,
    require_space,
    sha256_bytes,
    sha256_file,
    write_json,
)

BIG = 1 << 20
SAFETENSORS = "Error while serializing: I/O error: No space left on device (os error 28)"


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_file_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "table.txt"
    for text in ("old", "new"):
        with atomic_path(path) as partial:
            assert partial.suffix == ".txt"
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == text
    assert names(path.parent) == ["table.txt"]


def test_a_folder_replaces_a_full_folder_and_a_file(tmp_path: Path) -> None:
    path = tmp_path / "features"
    path.write_text("a file, once")
    for name in ("a", "b"):
        with atomic_path(path) as partial:
            partial.mkdir()
            (partial / name).write_text(name)
    assert names(tmp_path) == ["features", "features/b"]


def test_a_file_does_not_replace_a_folder_or_a_device(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "mine.png").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    for path in (pictures, tmp_path / "pipe"):
        with (
            pytest.raises(FileExistsError, match=f"{re.escape(str(path))}: wanted to write a file"),
            atomic_path(path) as partial,
        ):
            partial.write_text("page")
    assert names(tmp_path) == ["pictures", "pictures/mine.png", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_a_folder_that_takes_no_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(PermissionError, match=f"{re.escape(str(tmp_path))}: nothing can be written there"):
        write_json(tmp_path / "x.json", {})
    assert names(tmp_path) == []


@pytest.mark.parametrize("folder", [False, True])
def test_an_error_leaves_what_was_there(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "x"
    path.write_text("before")

    def write_half() -> None:
        with atomic_path(path) as partial:
            if folder:
                partial.mkdir()
            (partial / "y" if folder else partial).write_text("half")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_half()
    assert names(tmp_path) == ["x"]
    assert path.read_text() == "before"


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing was written"), atomic_path(tmp_path / "x"):
        pass
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_cleared_and_what_a_live_one_holds_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x"
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from attribution.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half')\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        held = names(tmp_path)
        assert len(held) == 1
        with atomic_path(path) as partial:
            partial.write_text("mine")
        assert names(tmp_path) == sorted([*held, "x"])
        process.send_signal(signal.SIGKILL)
    with atomic_path(path) as partial:
        partial.write_text("again")
    assert names(tmp_path) == ["x"]


def test_a_folder_that_a_kill_left_aside_takes_its_place_again(tmp_path: Path) -> None:
    """Between the two renames that replace a folder, neither version has its name."""
    dead = f".partial-{socket.gethostname()}-{2**22 + 1}-0"
    for name, held in ((f"{dead}-old-x", "before"), (f"{dead}-x", "after")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "held").write_text(held)
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "x"):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["x", "x/held"]
    assert (tmp_path / "x" / "held").read_text() == "before"


def test_partials_of_other_hosts_and_other_paths_stay(tmp_path: Path) -> None:
    host, dead = socket.gethostname(), 2**22 + 1  # above the largest process id
    others = [
        f".partial-elsewhere-{dead}-0-x",
        f".partial-{host}-{dead}-0-xx",
        f".partial-{host}-{os.getpid()}-0-x",
    ]
    for name in [*others, f".partial-{host}-{dead}-7-old-x"]:
        (tmp_path / name).touch()
    with atomic_path(tmp_path / "x") as partial:
        partial.touch()
    assert names(tmp_path) == sorted([*others, "x"])


def test_json_is_sorted_plain_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    write_json(path, {"b": np.float64(0.5), "a": [np.int64(1), "é"], "c": None})
    assert path.read_text(encoding="utf-8") == '{\n "a": [\n  1,\n  "é"\n ],\n "b": 0.5,\n "c": null\n}\n'
    assert read_json(path) == {"a": [1, "é"], "b": 0.5, "c": None}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
def test_json_refuses_what_is_not_finite_and_keeps_the_old_file(tmp_path: Path, value: float) -> None:
    path = tmp_path / "m.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match=r"m\.json: cannot be written as JSON"):
        write_json(path, {"x": value})
    assert read_json(path) == 1


def test_json_refuses_objects(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no canonical form for PosixPath"):
        write_json(tmp_path / "m.json", {"x": tmp_path})


def test_read_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.json: no such file"):
        read_json(tmp_path / "gone.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json: not JSON"):
        read_json(tmp_path / "bad.json")


def test_digests_are_those_of_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "x") == sha256_bytes(b"abc") == known


@dataclass(frozen=True)
class Point:
    x: int
    y: tuple[float, ...]


EQUAL = [
    ((1, "a"), (1, "a")),
    (([1, 2],), ((1, 2),)),
    (({"a": 1, "b": 2},), ({"b": 2, "a": 1},)),
    ((Point(1, (0.5,)),), ({"x": 1, "y": [0.5]},)),
    ((np.float64(0.5),), (0.5,)),
    ((np.arange(3),), (np.arange(3),)),
]
DIFFERENT = [
    ((1,), ("1",)),
    ((1,), (1.0,)),
    ((1,), (True,)),
    (("ab",), ("a", "b")),
    ((["a"], []), ([], ["a"])),
    ((b"a",), ("a",)),
    ((None,), ("",)),
    ((np.arange(3),), (np.arange(3.0),)),
    ((np.zeros((2, 3)),), (np.zeros((3, 2)),)),
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_content_has_an_equal_key(one: tuple[object, ...], other: tuple[object, ...]) -> None:
    assert content_key(*one) == content_key(*other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_content_has_a_different_key(one: tuple[object, ...], other: tuple[object, ...]) -> None:
    assert content_key(*one) != content_key(*other)


def test_the_key_has_not_wandered() -> None:
    """A changed key throws away every finished item of every user: let it be on purpose."""
    assert content_key("a", 1, {"b": [0.5, None]}) == "de6b41adc75eb43b"


def test_paths_stand_for_their_contents(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "f").write_text("same")
    (tmp_path / "two" / "__pycache__").mkdir()
    (tmp_path / "two" / "__pycache__" / "f.pyc").write_text("noise")
    (tmp_path / "two" / ".partial-host-1-0-f").write_text("noise")
    assert content_key(tmp_path / "one") == content_key(tmp_path / "two")
    assert content_key(tmp_path / "one") != content_key(tmp_path / "one" / "sub")
    (tmp_path / "two" / "sub" / "f").write_text("other")
    assert content_key(tmp_path / "one") != content_key(tmp_path / "two")
    with pytest.raises(FileNotFoundError, match="gone: no such file or folder"):
        content_key(tmp_path / "gone")


@pytest.mark.parametrize("part", [{1: "a"}, {1, 2}, object()])
def test_parts_without_a_canonical_form_are_refused(part: object) -> None:
    with pytest.raises(TypeError, match=r"content_key|canonical form"):
        content_key(part)


def test_not_a_number_has_no_key() -> None:
    with pytest.raises(ValueError, match="JSON"):
        content_key(float("nan"))


def test_space_is_asked_for_before_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the disk that holds the nearest folder there is."""
    usage = type(shutil.disk_usage(tmp_path))(10**9, 10**9 - 12_345_678, 12_345_678)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    path = tmp_path / "not" / "yet" / "there"
    require_space(path, 12_345_678, "7 images")
    with pytest.raises(
        DiskFullError, match=r"there: 1.5 TB wanted for 7 images, 12\.3 MB free; make room"
    ) as e:
        require_space(path, 1_500_000_000_000, "7 images")
    assert e.value.errno == errno.ENOSPC
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    require_space(Path("relative/to/here"), 0, "nothing")


def raise_(error: Exception) -> None:
    raise error


# Each has its own way of saying that the disk is full. /dev/full is one that always is.
WRITERS: dict[str, Callable[[Path], object]] = {
    "bytes": lambda path: path.write_bytes(bytes(BIG)),
    "numpy": lambda path: np.save(path, np.zeros(BIG, np.uint8)),
    "parquet": lambda path: pq.write_table(pa.table({"x": np.random.default_rng(0).random(BIG)}), path),
    "safetensors": lambda path: raise_(SafetensorError(SAFETENSORS)),  # its writer refuses /dev/full
    "picture": lambda path: Image.fromarray(np.zeros((99, 99), np.uint8)).save(path, "PNG"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("folder", [False, True])
def test_a_full_disk_is_told_in_a_line_and_nothing_is_left(tmp_path: Path, writer: str, folder: bool) -> None:
    path = tmp_path / "x.npy"
    path.write_text("before")

    def fill() -> None:
        with atomic_path(tmp_path / "outer"), atomic_path(path) as partial:
            if folder:
                partial.mkdir()
                (partial / "small").write_text("small")
            file = partial / "y.npy" if folder else partial
            file.symlink_to("/dev/full")
            WRITERS[writer](file)

    with pytest.raises(
        DiskFullError, match=r"^\[Errno 28\] .*x\.npy: the disk is full after .* of it, .* free; "
    ) as e:
        fill()
    assert "\n" not in str(e.value)
    assert names(tmp_path) == ["x.npy"]
    assert path.read_text() == "before"


def test_no_other_error_is_called_a_full_disk(tmp_path: Path) -> None:
    error = PermissionError(errno.EACCES, "No space left on device")
    with pytest.raises(PermissionError) as e, atomic_path(tmp_path / "x"):
        raise error
    assert e.value is error
