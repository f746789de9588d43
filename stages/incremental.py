"""Stages that keep one file or folder per concept: what is done already, what must go, what came of it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from attribution.files import DiskFullError, atomic_path, require_space, write_json
from attribution.memory import is_out_of_memory

T = TypeVar("T")
SHOWN = 20
READY = ".ready-"
FAILED = "_failed.json"


class StageError(RuntimeError):
    """What a run did and why that is not all, in lines for a terminal."""


@dataclass
class Summary:
    """What a run did with each item, for one line at its end and one for each failure.

    `skipped` are those that it did not come to, because of `stopped`.
    """

    noun: str
    done: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    pruned: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    stopped: str = ""

    def __str__(self) -> str:
        counts = (len(self.done), len(self.reused), len(self.pruned), len(self.failed))
        line = f"{self.noun}: {counts[0]} done, {counts[1]} reused, {counts[2]} pruned, {counts[3]} failed"
        return line + f", {len(self.skipped)} skipped" * bool(self.skipped)

    def add(self, part: Summary) -> None:
        """Takes in what came of some of the items."""
        self.done += part.done
        self.failed |= part.failed

    @contextlib.contextmanager
    def counting(self, wanted: Iterable[str], is_done: Callable[[str], bool]) -> Iterator[None]:
        """A full disk or a dead process ends the block and not the count: each item wanted has its place.

        Any other error is raised, with the counts.
        """
        try:
            yield
        except (DiskFullError, BrokenExecutor) as error:
            self.stopped = one_line(error)
            self._settle(wanted, is_done)
        except BaseException as error:
            self._settle(wanted, is_done)
            error.add_note(str(self))
            raise

    def _settle(self, wanted: Iterable[str], is_done: Callable[[str], bool]) -> None:
        known = {*self.failed, *self.done}
        for item in wanted:
            if item not in known:
                # Whatever stopped the run, other processes may have finished theirs.
                (self.done if is_done(item) else self.skipped).append(item)

    def report(self) -> str:
        """The counts, and a line for each failure as far as a reader goes."""
        lines = [f"{item}: {reason}" for item, reason in sorted(self.failed.items())]
        rest = [f"and {len(lines) - SHOWN:,} more"] * (len(lines) > SHOWN)
        return "\n  ".join([str(self), *lines[:SHOWN], *rest])

    def raise_failures(self, allowed_share: float = 0.0) -> None:
        """Raises StageError with the report if more failed than this share of all, or if the run was stopped.

        What is done stays done.
        """
        if self.stopped:
            raise StageError(f"{self.report()}\n  stopped: {self.stopped}")
        allowed = int(allowed_share * (len(self.done) + len(self.reused) + len(self.failed)) + 1e-9)
        if len(self.failed) > allowed:
            option = f"{self.noun}.max_failed_share {allowed_share:g}"
            raise StageError(f"{self.report()}\n  wanted at most {allowed:,} to fail ({option})")


def one_line(error: BaseException) -> str:
    """What the error says, however long, in a line."""
    said = " ".join(str(error)[:10_000].split()) or type(error).__name__
    return said if len(said) <= 300 else f"{said[:297]}..."


def concerns_one(error: Exception) -> bool:
    """Whether an item is at fault, or too large: the others may go on."""
    return isinstance(error, ValueError | FileNotFoundError) or is_out_of_memory(error)


@contextlib.contextmanager
def alone_in(folder: Path, *, to_read: bool = False) -> Iterator[None]:
    """No other run works in `folder` meanwhile, but that those which only read it may read it together.

    The folder is made. A process that ends, however it ends, is in it no more. Raises StageError if another
    run is. A file system without locks keeps nobody out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(handle, (fcntl.LOCK_SH if to_read else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                say = f"{folder}: another run is at work there; wait for it to end, or end it"
                raise StageError(say) from None
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def placed_together(folder: Path, name: str) -> Iterator[Path]:
    """What the block makes in the folder that it is given takes its place in `folder`, all of it or nothing.

    After a kill, nothing of the batch, known by its `name`, is there, or `finish_placing` places all of it.
    Raises as atomic_path.
    """
    ready = folder / f"{READY}{name}"
    with atomic_path(ready) as partial:
        partial.mkdir()
        yield partial
    _place(ready)


def finish_placing(folder: Path) -> None:
    """Puts in their places what a killed run had ready; to be called by who is alone in the folder."""
    for ready in sorted(folder.glob(f"{READY}*")):
        _place(ready)


def room_for(count: int, noun: str, *, like: Path) -> None:
    """Returns only where `count` more of the size of `like`, a file or folder, fit beside it."""
    members = like.rglob("*") if like.is_dir() else (like,)
    size = sum(member.stat().st_size for member in members if member.is_file())
    require_space(like.parent, count * size, f"{count:,} more {noun}")


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """`items` in order, `size` at a time. Raises ValueError for a size that would leave all of them out."""
    if size < 1:
        raise ValueError(f"wanted 1 or more at a time, got {size}")
    return (items[start : start + size] for start in range(0, len(items), size))


def batches(wanted: Sequence[T], pending: Sequence[T], size: int) -> list[Sequence[T]]:
    """`pending`, a part of `wanted` in its order, in batches of `size`.

    First come the chunks of `wanted` of which none is done. So a run that resumes forms the batches that an
    undisturbed run would have formed, whichever of them were done: batched arithmetic rounds by batch, and
    the results stay equal to the bit.
    """
    whole, rest = [], []
    queue = deque(pending)
    for chunk in chunks(wanted, size):
        left = [queue.popleft() for item in chunk if queue and queue[0] == item]
        if len(left) == len(chunk):
            whole.append(chunk)
        else:
            rest += left
    return [*whole, *chunks(rest, size)]


def prune(folder: Path, keep: Iterable[str]) -> list[str]:
    """Nothing is left in `folder` but the names to keep; returns the names that went."""
    wanted = set(keep)
    stale = sorted((path for path in folder.glob("*") if path.name not in wanted), key=lambda path: path.name)
    for path in stale:
        _remove(path)
    return [path.name for path in stale]


def leave_out(folder: Path, failed: dict[str, str], keep: Iterable[str]) -> None:
    """Nothing that an earlier run made of what failed is left in `folder`, but the reasons are, in FAILED."""
    prune(folder, keep)
    if failed:
        write_json(folder / FAILED, failed)


def _place(ready: Path) -> None:
    for member in sorted(ready.iterdir()):
        place = ready.with_name(member.name)
        if place.exists() and (place.is_dir() or member.is_dir()):  # which rename() does not replace
            _remove(place)
        member.replace(place)
    ready.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
