"""What a run did, in lines; one run a folder; room for the rest."""

from __future__ import annotations

import errno
import shutil
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from attribution.files import DiskFullError
from stages.incremental import (
    SHOWN,
    StageError,
    Summary,
    alone_in,
    batches,
    chunks,
    concerns_one,
    finish_placing,
    one_line,
    placed_together,
    room_for,
)


def test_each_failure_has_its_line() -> None:
    summary = Summary("customize", done=["a"], failed={"c": "too dark", "b": "not an\nimage"})
    with pytest.raises(StageError) as e:
        summary.raise_failures()
    assert str(e.value).splitlines()[0] == "customize: 1 done, 0 reused, 0 pruned, 2 failed"
    Summary("customize", done=["a"]).raise_failures()


def test_hundreds_of_failures_are_twenty_lines_and_a_count() -> None:
    reason = one_line(ValueError("no good " * 10_000))
    failed = {f"o{i:05}": reason for i in range(7000)}
    with pytest.raises(StageError) as e:
        Summary("customize", failed=failed).raise_failures()
    lines = str(e.value).splitlines()
    assert (len(lines), lines[-2]) == (SHOWN + 3, "  and 6,980 more")
    assert max(map(len, lines)) < 320


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_that_would_leave_all_out_is_refused(size: int) -> None:
    for cut in (lambda: chunks("abc", size), lambda: batches("abc", "c", size)):
        with pytest.raises(ValueError, match=f"wanted 1 or more at a time, got {size}"):
            cut()


def test_an_error_without_words_is_known_by_its_type() -> None:
    assert one_line(MemoryError()) == "MemoryError"
    assert one_line(ValueError("two\n  lines")) == "two lines"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("not an image"), True),
        (FileNotFoundError("gone"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: device-side assert"), False),
        (TypeError("a bug"), False),
        (DiskFullError(errno.ENOSPC, "full"), False),
        (BrokenProcessPool("killed"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_may_be_the_fault_of_one_item(error: Exception, expected: bool) -> None:
    assert concerns_one(error) is expected


@pytest.mark.parametrize("error", [DiskFullError(errno.ENOSPC, "no room"), BrokenProcessPool("no room")])
def test_what_stops_a_run_is_said_and_what_was_not_come_to_is_counted(error: Exception) -> None:
    summary = Summary("customize", reused=["r"])
    with summary.counting("abcd", is_done="b".__contains__):
        summary.add(Summary("customize", done=["a"], failed={"c": "bad"}))
        raise error
    assert (summary.done, summary.skipped) == (["a", "b"], ["d"])
    with pytest.raises(StageError) as e:
        summary.raise_failures()
    assert str(e.value).splitlines() == [
        "customize: 2 done, 1 reused, 0 pruned, 1 failed, 1 skipped",
        "  c: bad",
        f"  stopped: {error}",
    ]


def test_any_other_error_is_raised_with_the_counts() -> None:
    counted = Summary("customize").counting("ab", is_done="a".__contains__)
    with pytest.raises(KeyError) as e, counted:
        raise KeyError("a bug")
    assert e.value.__notes__ == ["customize: 1 done, 0 reused, 0 pruned, 0 failed, 1 skipped"]


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_left(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "customized"
    refused = pytest.raises(StageError, match="customized: another run is at work there; wait for it to end")
    with alone_in(folder), alone_in(tmp_path / "data" / "synthesized"), refused, alone_in(folder):
        pass
    with alone_in(folder, to_read=True), alone_in(folder, to_read=True), refused, alone_in(folder):
        pass
    with alone_in(folder), refused, alone_in(folder, to_read=True):
        pass
    assert list(folder.iterdir()) == []


def test_room_is_asked_for_as_much_as_what_is_there_took(tmp_path: Path) -> None:
    folder = tmp_path / "o1"
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(60_000))
    (folder / "token").write_bytes(bytes(40_000))
    free = shutil.disk_usage(tmp_path).free
    room_for(10, "models", like=folder)
    room_for(0, "models", like=folder)
    for like, each in ((folder, 100_000), (folder / "weights", 60_000)):
        with pytest.raises(
            DiskFullError, match=r"\S+: .* wanted for [0-9,]+ more models, .* free; make room"
        ):
            room_for(2 * free // each, "models", like=like)


def texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write_two(folder: Path, text: str) -> None:
    """A folder and a file, as models and tables are."""
    (folder / "o1").mkdir()
    (folder / "o1" / text).write_text(text)
    (folder / "o2.parquet").write_text(text)


def test_a_batch_takes_its_place_as_one_and_what_was_there_gives_way(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with placed_together(tmp_path, "batch") as batch:
            write_two(batch, text)
            assert set(texts(tmp_path).values()) <= {"old", text}
        assert texts(tmp_path) == {f"o1/{text}": text, "o2.parquet": text}
    with pytest.raises(FileNotFoundError), placed_together(tmp_path, "batch") as batch:
        write_two(batch, "o2.parquet/newer")
    assert texts(tmp_path) == {"o1/new": "new", "o2.parquet": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o1", "o2.parquet"]


@pytest.mark.parametrize("name", ["o1", "o2.parquet"])
def test_placing_that_was_broken_off_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_two(tmp_path, "old")
    replace = Path.replace

    def broken(self: Path, target: Path) -> Path:
        if self.name == name:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", broken)
        with pytest.raises(KeyboardInterrupt), placed_together(tmp_path, "batch") as batch:
            write_two(batch, "new")
    finish_placing(tmp_path)
    assert texts(tmp_path) == {"o1/new": "new", "o2.parquet": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o1", "o2.parquet"]
